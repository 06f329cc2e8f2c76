"""`mmcl compile`: what is read off a compiled step against hand counts, what is refused, and the
table of topologies."""

import importlib.util
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from common import ROOT
from jax.sharding import PartitionSpec as P

from mmcl_jax import models
from mmcl_jax.errors import UserError
from mmcl_jax.models import inputs
from mmcl_jax.tools import compile_step as program, hlo
from mmcl_jax.training import chips, flops, state as state_lib

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "configs")]
import joint
import topologies

HLO = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4,8]{1,0:T(8,128)})->f32[4,8]{1,0}}, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %scattered = f32[2,8]{1,0} reduce-scatter(%x), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%p, %x)
}

%condition (p: (s32[], f32[4,8])) -> pred[] {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%inner (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %moved = f32[4,8]{1,0} all-to-all(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%all-reduce-scatter.3 (p: f32[4,8]) -> f32[2,8] {
  %p = f32[4,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[4,8]{1,0:T(8,128)} all-reduce(%p), replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  ROOT %slice = f32[2,8]{1,0:T(8,128)} dynamic-slice(%all-reduce.9)
}

%never (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %lost = f32[4,8]{1,0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = (f32[4,8]{1,0:T(8,128)S(1)}, /*index=1*/bf16[3]{0}) all-reduce(%x, %x), replica_groups={}, to_apply=%add
  %all-gather-start = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %shifted = f32[4,8]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  %all-gather-done = f32[16,8]{1,0} all-gather-done(%all-gather-start)
  %async = ((f32[4,8]), f32[4,8], u32[]) async-start(%x), calls=%inner
  %async-done = f32[4,8]{1,0} async-done(%async), calls=%inner
  %loop = (s32[], f32[4,8]{1,0}) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %unknown = (s32[], f32[4,8]{1,0}) while(%t), condition=%condition, body=%body
  ROOT %fusion = f32[2,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3, metadata={op_name="all-reduce(x)"}
}
"""


def test_collectives_of_a_known_text():
  found, loops = hlo.read(HLO)
  assert {(one.kind, one.count, one.bytes, one.group) for one in found} == {
    ("all-reduce", 1, 4 * 8 * 4 + 3 * 2, 8),  # no groups given: all 8
    ("all-gather", 1, 16 * 8 * 4, 4),  # the result, not the operand in the tuple
    ("collective-permute", 1, 4 * 8 * 4, 8),
    ("all-to-all", 1, 4 * 8 * 4, 4),  # once, though start and done both name it
    ("reduce-scatter", 6, 2 * 8 * 4 * 2, 2),  # 5 turns and 1; of the operand
    ("reduce-scatter", 1, 4 * 8 * 4, 4),
  }  # the fusion, which sums all and keeps a slice
  assert sorted(loop.trips for loop in loops) == [0, 5]


def test_bytes_sent_by_a_device():
  def sent(kind, group):
    return hlo.Collective(kind, 3, 800, group).sent

  assert sent("all-reduce", 4) == 3 * 2 * 600
  assert sent("all-gather", 4) == sent("reduce-scatter", 4) == sent("all-to-all", 4) == 3 * 600
  assert sent("collective-permute", 4) == 3 * 800
  assert sent("all-reduce", 1) == 0
  total = hlo.by_kind(
    [hlo.Collective("all-reduce", 3, 800, 4), hlo.Collective("all-reduce", 1, 8, 2)]
  )
  assert total == {"all-reduce": {"count": 4, "bytes": 2408, "sent": 3608}}


@pytest.mark.parametrize(
  "text, size",
  [
    ("f32[]", 4),
    ("bf16[3,5]{1,0:T(8,128)(2,1)}", 30),
    ("pred[7]", 7),
    ("s4[3]", 2),
    ("token[]", 0),
    ("(f32[2]{0}, u8[3]{0:S(1)}, c64[2])", 27),
    ("f8e4m3fn[6]", 6),
    ("f32[<=4,2]", 32),
  ],
)
def test_bytes_of_a_type(text, size):
  assert hlo.shape_bytes(text) == size


@pytest.mark.parametrize(
  "text, size",
  [
    ("replica_groups={{0,1},{2,3}}", 2),
    ("replica_groups=[4,2]<=[8]", 2),
    ("replica_groups=[1,8]<=[2,4]T(1,0)", 8),
    ("", 16),
    ("replica_groups={}", 16),
    ("replica_groups=mesh['a'=4,'b'=2] {'a'}", 4),
    ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
    ("replica_groups=mesh['a'=8,'b'=2] {'a':(2)4}", 4),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, x={7}", 4),
  ],
)
def test_devices_of_a_group(text, size):
  assert hlo.group_size(text, 16) == size


def test_products_are_counted_by_hand():
  def count(f, *shapes):
    return flops.matmul_flops(
      jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    )

  assert count(lambda x, w: x @ w, (6, 5), (5, 4)) == 2 * 6 * 5 * 4
  assert (
    count(lambda x, w: jnp.einsum("bij,bjk->bik", x, w), (3, 6, 5), (3, 5, 4)) == 3 * 2 * 6 * 5 * 4
  )
  # forwards, and of w
  assert count(jax.grad(lambda w, x: jnp.square(x @ w).sum()), (5, 4), (6, 5)) == 2 * (
    2 * 6 * 5 * 4
  )

  def loop(w, x):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

  assert count(loop, (4, 4), (3, 4)) == 7 * 2 * 3 * 4 * 4
  again = jax.value_and_grad(
    lambda w, x: jax.checkpoint(lambda w: jnp.sin(jnp.sin(x @ w) @ w))(w).sum()
  )
  # both; both again; of w twice and of sin(x @ w)
  assert count(again, (4, 4), (3, 4)) == (2 + 2 + 3) * 2 * 3 * 4 * 4

  def conv(x, k):
    return jax.lax.conv_general_dilated(
      x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  assert count(conv, (2, 8, 8, 3), (3, 3, 3, 5)) == 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)

  def branch(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

  assert count(branch, (3, 4), (4, 4)) == 2 * 2 * 3 * 4 * 4
  idle = jax.jit(lambda x, w: (x @ w, x @ w @ w))
  # the compiler leaves the other out too
  assert count(lambda x, w: idle(x, w)[0], (3, 4), (4, 4)) == 2 * 3 * 4 * 4
  mesh = jax.sharding.AbstractMesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.shard_map(
    lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
  )
  assert count(split, (16, 4), (4, 4)) == 2 * 16 * 4 * 4


def test_memory_and_costs_of_a_product():
  shape = (
    jax.ShapeDtypeStruct((128, 256), jnp.float32),
    jax.ShapeDtypeStruct((256, 64), jnp.float32),
  )
  compiled = jax.jit(lambda x, w: x @ w).lower(*shape).compile()
  memory, costs = hlo.memory(compiled), hlo.costs(compiled)
  assert (memory["arguments"], memory["output"], memory["aliased"]) == (
    4 * (128 * 256 + 256 * 64),
    4 * 128 * 64,
    0,
  )
  assert (
    memory["total"]
    == memory["arguments"] + memory["output"] + memory["temporaries"] + memory["code"]
  )
  assert 1 <= costs["flops"] / (2 * 128 * 256 * 64) < 1.1
  assert 1 <= costs["bytes_accessed"] / (memory["arguments"] + memory["output"]) < 1.5
  given_up = jax.jit(lambda x: x + 1, donate_argnums=0).lower(shape[0]).compile()
  # once, not twice
  assert hlo.memory(given_up)["total"] - hlo.memory(given_up)["code"] == 4 * 128 * 256


def test_estimate_is_the_slowest_of_three():
  chip = chips.Chip(
    flops=100.0, hbm_gib=1, hbm=10.0, network=5.0, network_between=1.0, dimensions=2
  )
  found = program.estimate(
    chip, {"flops": 200.0, "bytes_accessed": 80.0}, matmul_flops=150.0, sent=20.0
  )
  assert found == {
    "compute_s": 2.0,
    "memory_s": 8.0,
    "network_s": 4.0,
    "step_s": 8.0,
    "limited_by": "memory",
    "mfu_bound": 150 / 100 / 8,
  }
  looped = program.estimate(
    chip, {"flops": 200.0, "bytes_accessed": 10.0}, matmul_flops=900.0, sent=20.0
  )
  # the compiler counts a loop's body once
  assert (looped["limited_by"], looped["mfu_bound"]) == ("compute", 1.0)


def test_default_batch():
  mesh = types.SimpleNamespace(shape={"data": 16, "model": 2})
  config = joint.get_config("test,batch=32")
  assert program.batch_of(config, mesh) == 32
  config.batch = 33
  assert program.batch_of(config, mesh) == 48
  config.accumulation = 3
  assert program.batch_of(config, mesh) == 48
  config.accumulation = 5
  assert program.batch_of(config, mesh) == 80
  config.per_device_batch = 7
  assert program.batch_of(config, mesh) == 7 * 16


CONFIG = f"--config={ROOT}/configs/joint.py:test"


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--topology=v9:2x2"], ["'v9:2x2'", "expected v5e: or v6e:"]),
    (["--topology=v5e:3x3"], ["16x16"]),
    (["--topology=v5e:4x4x4"], ["expected"]),
    (["--topology=v5e:0x4"], ["expected"]),
    (["--topology=v5e"], ["expected"]),
    (["--topology=v5p:4x4"], ["three sides"]),
    (["--topology=v5p:8x8x9"], ["multiples of 4"]),
    (["--topology=v5p:32x32x32"], ["6,144 chips"]),
    (["--topology=cpu:0"], ["cpu:N"]),
    (["--topology="], ["expected"]),
    (["--topology=v5e:4x4; rm"], ["expected"]),
    ([], ["missing --topology"]),
    (["--topology=cpu:1", "--batch=0"], ["--batch is '0'"]),
    (["--topology=cpu:1", "--batch=many"], ["--batch is 'many'"]),
    (["--topology=cpu:1", "--config.mesh.model=2"], ["config.mesh asks for"]),
    (["--topology=cpu:1", "--config.sharding=(('qkvv', 'fsdp'),)"], ["matches nothing"]),
    (["--topology=cpu:1", "--config.data.samples=510"], ["does not divide config.data.samples"]),
    (["--topology=cpu:1", "--config.data.cohort=/nowhere"], ["no cohort at '/nowhere'"]),
    (["--topology=cpu:1", "--config.objectives.dual_phase.fn=no_such"], ["no_such"]),
    (["--topology=cpu:4096"], ["process of its own"]),
  ],
)
def test_what_cannot_be_compiled_is_one_line_before_any_compile(flags, words, monkeypatch, capsys):
  monkeypatch.setenv("XLA_FLAGS", "")
  monkeypatch.setattr(program, "compile_or_explain", lambda *_: pytest.fail("compiled"))
  with pytest.raises(UserError) as error:
    program.main([CONFIG, *flags])
  text = str(error.value)
  assert "\n" not in text and all(word in text for word in words), text


def test_without_libtpu_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(
    UserError, match=r"libtpu, which is not installed; pip install 'mmcl-jax\[tpu\]'"
  ):
    program.find_devices("v5e:4x4")


def test_a_step_that_does_not_fit_is_told_with_its_size():
  class Lowered:
    def compile(self):
      raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.01G of 15.75G hbm. "
        "Exceeded\n..."
      )

  with pytest.raises(
    UserError, match=r"batch of 8 on v5e:4x4 needs 23.01G of the 15.75G bytes.*--batch"
  ):
    program.compile_or_explain(Lowered(), "v5e:4x4", types.SimpleNamespace(batch=8))


def compile_in_a_process(*flags, timeout=600):
  done = subprocess.run(
    [sys.executable, "-m", "mmcl_jax.tools.compile_step", CONFIG, *flags],
    capture_output=True,
    text=True,
    timeout=timeout,
    env={name: x for name, x in os.environ.items() if name != "XLA_FLAGS"},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1]), done.stdout


def parameters():
  config = joint.get_config("test")
  shapes, standardiser = program.cohort_of(config)
  model = models.build(config.model, config.data.samples, len(standardiser.targets))
  made = jax.eval_shape(
    lambda: state_lib.variables(model, inputs.example(config, shapes, len(standardiser.targets), 1))
  )
  return sum(x.size for x in jax.tree.leaves(made["params"])), made


def test_the_step_on_simulated_devices():
  found, printed = compile_in_a_process("--topology=cpu:8", "--batch=16")
  count, made = parameters()
  assert (found["topology"], found["chips"], found["mesh"], found["batch"]) == (
    "cpu:8",
    8,
    {"data": 8, "model": 1},
    16,
  )
  assert found["params"] == count and found["estimate"] is None
  # Adam keeps two moments
  whole = 4 * (3 * count + sum(x.size for x in jax.tree.leaves(made["batch_stats"])))
  # of a device: int16 ECG, uint8 volumes; little else
  rows = 2 * (12 * 5000 * 2 + 2 * 12 * 64 * 64)
  assert whole + rows <= found["memory"]["arguments"] < whole + rows + 1000
  assert found["memory"]["aliased"] >= whole  # the state is donated
  assert found["collectives"].keys() == {"all-reduce", "all-gather"}  # as in test_devices.py
  assert found["collectives"]["all-reduce"]["bytes"] >= 4 * count
  assert found["matmul_flops"] > 0 and found["flops"] > 0 and found["bytes_accessed"] > whole
  assert "params/" in printed and "compiled in" in printed


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="no libtpu: pip install 'mmcl-jax[tpu]' compiles for a TPU, without one",
)
def test_the_step_on_a_tpu_slice():
  found, _ = compile_in_a_process(
    "--topology=v5e:2x2", "--config.sharding=(('head_ecg/fc1/kernel', ('data', None)),)"
  )
  assert (found["chips"], found["batch"]) == (4, 8)
  assert (
    found["memory"]["capacity"]
    == 16 * 2**30
    > found["memory"]["total"]
    > found["memory"]["arguments"]
    > 0
  )
  assert (
    found["estimate"]["limited_by"] in ("compute", "memory", "network")
    and 0 < found["estimate"]["mfu_bound"] <= 1
  )
  assert found["collectives"]["all-reduce"]["count"] >= 1


# ------------------------------------------------------------------------------------------------
# benchmarks/topologies.py

FOUND = {
  "batch": 2048,
  "params": 1_500_000,
  "memory": {"total": 2**31, "capacity": 2**34},
  "matmul_flops": 2.5e12,
  "collectives": {"all-reduce": {"count": 1, "bytes": 10, "sent": 5_000_000}},
  "estimate": {
    "compute_s": 0.01,
    "memory_s": 0.025,
    "network_s": 0.001,
    "limited_by": "memory",
    "mfu_bound": 0.4,
  },
}


def test_table_of_topologies_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
  out, calls = tmp_path / "t.jsonl", []
  answers = {
    "v5e:4x4": FOUND,
    "v6e:16x16": {"error": "mmcl: error: does not fit"},
    "v5p:8x8x8": None,
  }

  def compile_case(size, topology, arguments):
    calls.append((size, topology))
    return answers[topology]

  def run(*more):
    monkeypatch.setattr(
      sys,
      "argv",
      ["topologies.py", f"--out={out}", "--sizes", "demo", "--topologies", *answers, *more],
    )
    with pytest.raises(SystemExit, match="1 cases died: demo on v5p:8x8x8"):
      topologies.main()

  monkeypatch.setattr(topologies, "compile_case", compile_case)
  run()
  assert calls == [("demo", topology) for topology in answers]
  lines = out.read_text()
  out.write_text(lines + '{"size": "de')  # killed while it wrote
  run()
  assert calls[3:] == [("demo", "v5p:8x8x8")] and out.read_text() == lines
  printed = capsys.readouterr().out.splitlines()
  assert (
    printed[-2]
    == "| demo | v5e:4x4 | 2,048 | 1.5 | 2.00 | 16 | 2.500 | 5.0 | 10.00 | 25.00 | 1.00 | memory | 40% |"
  )
  assert printed[-1].startswith("| demo | v6e:16x16 | does not fit |")
  monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "O0")
  run()
  assert calls[4:] == [("demo", topology) for topology in answers]
  calls[4:] = []
  run("--batch=64")  # another question: all anew
  assert len(calls) == 7
