"""`mmcl compile`: what is read off a compiled step against hand counts, what is refused, and the
table of topologies."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import threading
import types

import jax
import pytest
from common import ROOT

from mmcl_jax import models
from mmcl_jax.errors import UserError
from mmcl_jax.models import inputs
from mmcl_jax.tools import compile_step as program, estimate, gpus, hlo, targets
from mmcl_jax.training import chips, state as state_lib

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "configs")]
import joint
import topologies


CHIP = chips.Chip(flops=100.0, hbm_gib=1, hbm=10.0, network=5.0, network_between=0.5, dimensions=2)
ONE = estimate.Network(groups=1, sides=(2, 2), model=1)


def test_estimate_is_the_slowest_of_three():
  gathered = [hlo.Collective("all-gather", 2, 20, 2)]  # 10 sent, twice, over one hop
  found = estimate.estimate(CHIP, ONE, 200.0, 80.0, 150.0, gathered)
  assert found == {
    "compute_s": 2.0,
    "memory_s": 8.0,
    "network_s": 4.0,
    "latency_s": pytest.approx(2 * 2e-6),
    "step_s": 8.0,
    "limited_by": "memory",
    "mfu_bound": 150 / 100 / 8,
  }
  looped = estimate.estimate(CHIP, ONE, 200.0, 10.0, 900.0, gathered)
  # a kernel's products are seen in the step as written alone
  assert (looped["limited_by"], looped["mfu_bound"]) == ("compute", 1.0)


@pytest.mark.parametrize(
  "kind, within, between",
  [
    # of 4 devices in each of 2 slices: 800 bytes, a device's part 100
    ("all-gather", 3 * 2 * 100, 100),
    ("reduce-scatter", 3 * 2 * 100, 100),
    ("all-reduce", 2 * 3 * 2 * 100, 2 * 100),
    ("all-to-all", 3 * 100, 4 * 100),
    ("collective-permute", 0, 800),
  ],
)
def test_exchanges_between_slices_go_over_the_slow_network(kind, within, between):
  network = estimate.Network(groups=2, sides=(2, 2), model=1)
  seconds = estimate.exchange_seconds(CHIP, network, hlo.Collective(kind, 3, 800, 8))
  assert seconds == pytest.approx(3 * (within / 5.0 + between / 0.5))
  one_slice = hlo.Collective(kind, 3, 800, 4)
  assert estimate.exchange_seconds(CHIP, network, one_slice) == one_slice.sent / 5.0
  of_model = estimate.Network(groups=2, sides=(2, 2), model=2)
  one = hlo.Collective(kind, 3, 800, 2)
  assert estimate.exchange_seconds(CHIP, of_model, one) == one.sent / 5.0


@pytest.mark.parametrize(
  "name, network, kind, group, microseconds",
  [
    ("v5e", (1, (16, 16), 1), "all-reduce", 256, 2 * (8 + 8)),  # half way round both rings
    ("v5e", (1, (4, 4), 1), "all-reduce", 16, 2 * (3 + 3)),  # no rings
    ("v5p", (1, (4, 4, 8), 1), "all-gather", 128, 2 + 2 + 4),
    ("v5e", (2, (16, 16), 1), "all-reduce", 512, 2 * (8 + 8 + 10)),
    ("v5e", (2, (16, 16), 1), "all-reduce", 256, 2 * (8 + 8)),  # of one slice
    ("v5e", (2, (16, 16), 1), "all-reduce", 2, 2 * 10),  # of both, one device each
    ("v5e", (2, (16, 16), 2), "all-reduce", 2, 2 * 1),  # the model axis stays within a slice
    ("v5e", (1, (16, 16), 1), "collective-permute", 256, 1),
    ("v5e", (1, (1, 1), 1), "all-reduce", 1, 0),
    ("h100", (1, (8,), 1), "all-reduce", 8, 6.6 + 2 * 7 * 0.6),
    ("h100", (4, (8,), 1), "all-reduce", 32, 6.6 + 2 * (7 * 0.6 + 2 * 5)),
  ],
)
def test_latency_by_hops(name, network, kind, group, microseconds):
  one = hlo.Collective(kind, 1, 4, group)
  seconds = estimate.latency(chips.CHIPS[name], estimate.Network(*network), one)
  assert 1e6 * seconds == pytest.approx(microseconds)


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
    (["--topology=0xv5e:4x4"], ["expected"]),
    (["--topology=65xv5e:4x4"], ["2xv5e:16x16"]),
    (["--topology=2xcpu:4"], ["expected"]),
    (["--topology=2xh100:8"], ["nodes x GPUs (h100:4x8)"]),
    (["--topology=h100:9"], ["1 to 8 GPUs"]),
    (["--topology=h100:0"], ["1 to 8 GPUs"]),
    (["--topology=h200:2x2x2"], ["expected"]),
    (["--topology=a100:8"], ["h100: or h200:"]),
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


@pytest.mark.parametrize(
  "topology, words",
  [
    ("v5e:4x4", r"libtpu, which is not installed; pip install 'mmcl-jax\[tpu\]'"),
    ("h100:4x8", r"here is jax [\d.]+; pip install 'mmcl-jax\[cuda\]' on Python 3.12"),
  ],
)
def test_without_its_compiler_it_says_what_to_install(topology, words, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=words):
    targets.find(topology)


def test_a_cuda_plugin_of_an_older_jax_does_not_do(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
  monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
  with pytest.raises(UserError, match=r"needs jax 0\.12 or later .* and its CUDA plugin; pip"):
    targets.find("h200:8")


def test_a_gpus_step_is_compiled_as_a_launch_would():
  assert f'XLA_FLAGS="{gpus.FLAGS} ' in (ROOT / "launch/env.sh").read_text()


V5E = targets.Target("v5e:4x4", [], chips.CHIPS["v5e"], 1, (4, 4))
ASSIGNED = "BufferAssignment:\nallocation 0: size {size}, preallocated-temp:\n"


class Lowered:
  """A program whose compiler writes what XLA does, and then goes on until the test ends."""

  def __init__(self, size):
    self.size, self.ends = size, threading.Event()

  def compile(self, compiler_options):
    for name, text in (
      ("module_1.jit_step.before_optimizations.txt", "HloModule before"),
      ("module_1.jit_step.after_optimizations_before_buffer_assignment.txt", "HloModule between"),
      ("module_1.jit_step.after_optimizations-buffer-assignment-values.txt", "values"),
      ("module_1.jit_step.after_optimizations-buffer-assignment.txt", ASSIGNED),
      ("module_1.jit_step.after_optimizations.txt", "HloModule after"),
    ):
      path = pathlib.Path(compiler_options["xla_dump_to"], name)
      path.write_text(text.format(size=self.size))
    self.ends.wait(60)


def test_a_tpus_program_is_read_before_its_code_is_there():
  lowered = Lowered(2**20)
  text, memory = program.compile_or_explain(lowered, V5E, types.SimpleNamespace(batch=8))
  assert not lowered.ends.is_set()
  lowered.ends.set()
  assert text == "HloModule after"
  assert memory["temporaries"] == memory["total"] == 2**20 and memory["capacity"] == 2**34


@pytest.mark.parametrize(
  "error, needs",
  [
    ("memory space hbm. Used 23.01G of 15.75G hbm. Exceeded\n...", "23.01G of the 15.75G bytes"),
    (
      "Ran out of memory on HBM, the total memory required for HLO temporaries (24.25G) exceeds "
      "available HBM (15.75G).",
      "24.25G of the 15.75G bytes",
    ),
    ("Ran out of memory", "more than the bytes"),
  ],
)
def test_a_step_that_does_not_fit_is_told_with_its_size(error, needs):
  class Refused:
    def compile(self, compiler_options):
      raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {error}")

  with pytest.raises(UserError, match=f"batch of 8 on v5e:4x4 needs {needs}.*--batch"):
    program.compile_or_explain(Refused(), V5E, types.SimpleNamespace(batch=8))


def test_a_step_whose_buffers_are_too_many_is_refused():
  lowered = Lowered(17 * 2**30)
  lowered.ends.set()
  with pytest.raises(UserError, match=r"needs 17.00G of the 16G bytes"):
    program.compile_or_explain(lowered, V5E, types.SimpleNamespace(batch=8))


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
  assert found["matmul_flops"] > 0 and found["flops"] > 0 and found["hbm_bytes"] > whole
  assert "params/" in printed and "compiled in" in printed


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="no libtpu: pip install 'mmcl-jax[tpu]' compiles for a TPU, without one",
)
def test_the_step_on_a_tpu_slice():
  found, _ = compile_in_a_process(
    "--topology=v5e:2x2", "--config.sharding=(('head_ecg/fc1/kernel', ('data', None)),)"
  )
  assert (found["chips"], found["batch"]) == (4, 4 * 32)  # 32 a chip, as the recipe says
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
  "hbm_bytes": 2.05e10,
  "matmul_flops": 2.5e12,
  "collectives": {"all-reduce": {"count": 1, "bytes": 10, "sent": 5_000_000}},
  "estimate": {
    "compute_s": 0.01,
    "memory_s": 0.025,
    "network_s": 0.001,
    "latency_s": 0.002,
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
    == "| demo | v5e:4x4 | 2,048 | 1.5 | 2.00 | 16 | 20.5 | 2.500 | 5.0 | 10.00 | 25.00 | 1.00 | 2.00 | memory | 40% |"
  )
  assert printed[-1].startswith("| demo | v6e:16x16 | does not fit |")
  monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "O0")
  run()
  assert calls[4:] == [("demo", topology) for topology in answers]
  calls[4:] = []
  run("--batch=64")  # another question: all anew
  assert len(calls) == 7
