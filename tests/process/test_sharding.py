"""Sharding rules: what each splits, what is refused, and that a step is the same however its state
lies on 8 devices."""

import json

import jax
import numpy as np
import optax
import pytest
from common import ROOT, python
from jax.sharding import AbstractMesh, AxisType

from mmcl_jax import configuration, models
from mmcl_jax.errors import UserError
from mmcl_jax.models import inputs
from mmcl_jax.training import parallel, state as state_lib

MESH = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def shape(*lengths, dtype=np.float32):
  return jax.ShapeDtypeStruct(lengths, dtype)


def block(width):
  def layer(i, o):
    return {"kernel": shape(i, o), "bias": shape(o)}

  return {
    "norm1": {"scale": shape(width)},
    "qkv": layer(width, 3 * width),
    "proj": layer(width, width),
    "fc1": layer(width, 4 * width),
    "fc2": layer(4 * width, width),
  }


STATE = {
  "step": shape(dtype=np.int32),
  "params": {
    "ecg": {"block0": block(256), "patch_embed": {"kernel": shape(100, 256)}},
    "head_ecg": {"fc1": {"kernel": shape(256, 512)}},
  },
  "opt_state": {"mu": {"ecg": {"block0": block(256)}}},
}


def specs(rules, tree=STATE):
  found = parallel.shardings(tree, rules, MESH)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(s.spec)
    for path, s in jax.tree_util.tree_leaves_with_path(found)
  }


def test_no_rules_replicate_everything():
  assert set(specs(()).values()) == {()}


@pytest.mark.parametrize(
  "lengths, expected",
  [
    ((100, 8192), (None, "data")),
    ((8192, 100), ("data", None)),
    ((256, 256), ("data", None)),  # the first of equals
    ((2**16,), ("data",)),
    ((70001, 4), (None, "data")),  # the longest does not divide
    ((3, 3, 64, 256), (None, None, None, "data")),
  ],
)
def test_fsdp_takes_the_longest_dimension_that_divides(lengths, expected):
  assert specs(((".*", "fsdp"),), {"x": shape(*lengths)}) == {"x": expected}


def test_fsdp_leaves_what_is_small_or_does_not_divide():
  tree = {
    "large": shape(512, 512),
    "small": shape(2**16 - 4),
    "odd": shape(333, 333),
    "scalar": shape(),
  }
  assert specs(((".*", "fsdp"),), tree) == {
    "large": ("data", None),
    "small": (),
    "odd": (),
    "scalar": (),
  }


def test_tensor_splits_the_matrices_of_blocks_and_nothing_else():
  found = specs((("^params/", "tensor"),))
  split = {name: spec for name, spec in found.items() if any(spec)}
  where = "params/ecg/block0/"
  assert split == {
    where + "qkv/kernel": (None, "model"),
    where + "qkv/bias": ("model",),
    where + "fc1/kernel": (None, "model"),
    where + "fc1/bias": ("model",),
    where + "proj/kernel": ("model", None),
    where + "fc2/kernel": ("model", None),
  }


def test_the_first_rule_decides_and_a_word_leaves_the_rest_to_the_next():
  found = specs(
    (
      ("^opt_state/.*fc1/kernel", (None, None)),
      ("^opt_state/", "tensor+fsdp"),
      (".*", "tensor"),
      (".*", "fsdp"),
    )
  )
  assert found["opt_state/mu/ecg/block0/fc1/kernel"] == (None, None)
  assert found["opt_state/mu/ecg/block0/qkv/kernel"] == ("data", "model")
  assert found["opt_state/mu/ecg/block0/fc2/kernel"] == ("model", "data")
  assert found["opt_state/mu/ecg/block0/qkv/bias"] == ("model",)  # too small for the data axis
  assert found["params/ecg/block0/qkv/kernel"] == (None, "model")
  assert found["params/head_ecg/fc1/kernel"] == (None, "data")
  assert (
    found["params/ecg/patch_embed/kernel"]
    == found["params/ecg/block0/norm1/scale"]
    == found["step"]
    == ()
  )


@pytest.mark.parametrize(
  "rules, words",
  [
    ((("qkvv", "fsdp"),), ["'qkvv' matches nothing", "params/ecg/block0/"]),
    (
      ((".*", "tensor"), ("block0/fc1/kernel", (None, "model"))),
      ["'block0/fc1/kernel' has nothing left to decide"],
    ),
    (
      ((r"bias$", "fsdp"),),
      ["array of at least 65,536 numbers with a dimension that 4 devices divide"],
    ),
    ((("head_ecg", "tensor"),), ["matrix of a transformer block", "params/head_ecg/fc1/kernel"]),
    ((("head_ecg", "tensor+fsdp"),), ["matrix of a transformer block"]),
    (
      (("qkv/kernel", "zero"),),
      ["expected pairs of a regex and a spec", "fsdp, tensor, tensor+fsdp"],
    ),
    ((("qkv/kernel",),), ["expected pairs"]),
    ((("qkv/kernel", 3),), ["expected pairs"]),
    ((("qkv/kernel", None),), ["expected pairs"]),
    (((3, "fsdp"),), ["expected pairs"]),
    (("qkv", "fsdp"), ["expected pairs"]),
    ("fsdp", ["expected pairs"]),
    ((("qkv/(kernel", "fsdp"),), ["is no regex"]),
    ((("qkv/kernel", (None, "heads")),), ["out of ('data', 'model')"]),
    ((("qkv/kernel", (None, 0)),), ["out of ('data', 'model')"]),
    ((("qkv/kernel", (None, ["model"])),), ["out of ('data', 'model')"]),
    ((("qkv/kernel", ("data", "data")),), ["no axis twice"]),
    ((("qkv/bias", (None, "model")),), ["at most 1 entries"]),
    (((".*", ("data",)),), ["step of shape ()"]),
    ((("patch_embed", ("data", "model")), ("patch", (None, "model"))), ["nothing left"]),
  ],
)
def test_a_rule_that_cannot_be_meant_is_one_line(rules, words):
  with pytest.raises(UserError) as error:
    specs(rules)
  text = str(error.value)
  assert "\n" not in text and "config.sharding" in text and all(word in text for word in words), (
    text
  )


def test_a_dimension_that_does_not_divide_is_named():
  with pytest.raises(
    UserError, match=r"splits x of shape \(6, 5\) over 4 devices of 'data', which does not divide 6"
  ):
    specs((("x", ("data", None)),), {"x": shape(6, 5)})


def test_table_says_what_a_device_holds():
  tree = {
    "params": {"a": shape(256, 512), "b": shape(6)},
    "opt_state": {"a": shape(256, 512, dtype=np.float16)},
  }
  text = parallel.table(tree, parallel.shardings(tree, ((".*/a", (None, "data")),), MESH))
  row = next(line for line in text.splitlines() if "params/a" in line)
  assert [cell.strip() for cell in row.strip("|").split("|")] == [
    "params/a",
    "(256, 512)",
    "float32",
    "(None, 'data')",
    "131,072",
  ]
  # 256 x 512 x 4 / 4 + 6 x 4
  assert "params: 131,078 numbers of 524,312 bytes, 131,096 bytes on each device" in text
  assert "opt_state: 131,072 numbers of 262,144 bytes, 65,536 bytes on each device" in text
  largest = parallel.table(tree, parallel.shardings(tree, (), MESH), most=1)
  assert "params/a" in largest and "opt_state/a" not in largest and "params/b" not in largest
  assert (
    text.splitlines()[-1] == "all: 262,150 numbers of 786,456 bytes, 196,632 bytes on each device"
  )


COMPARE = r"""
import json, math, os, sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from common import tiny_step
from mmcl_jax import models
from mmcl_jax.models import inputs, vit
from mmcl_jax.tools import hlo
from mmcl_jax.training import checkpoint, parallel, state as state_lib, step as step_lib

parallel.FSDP_FROM = 1  # the arrays of a tiny model are split too
config, cohort, standardiser, model, objectives, batch = tiny_step(sys.argv[1])
with config.model.towers.ecg.ignore_type():
  config.model.towers.ecg.size = dict(width=16, depth=1, heads=4, decoder=(16, 1, 4))  # for 4 devices
model = models.build(config.model, config.data.samples)
tx = optax.sgd(1.0, momentum=0.9)  # linear in the gradient, where AdamW would blow up the rounding of one near 0
CASES = {"one": (1, 1, ()), "fsdp": (8, 1, ((".*", "fsdp"),)), "zero1": (8, 1, (("^opt_state/", "fsdp"),)),
         "tensor": (2, 4, ((".*", "tensor"),)), "both": (4, 2, ((".*", "tensor+fsdp"), (".*", "fsdp")))}
mesh_of = lambda data, model: Mesh(np.array(jax.devices()[:data * model]).reshape(data, model), ("data", "model"),
                                   axis_types=(AxisType.Auto,) * 2)
example = inputs.example(config, cohort.info["shapes"], len(standardiser.targets), 16)
states, results = {}, {}
for name, (data, of_model, rules) in CASES.items():
  mesh = mesh_of(data, of_model)
  with jax.set_mesh(mesh):
    state, where = state_lib.create(model, tx, example, 0, mesh, rules)
    rows = parallel.to_global(batch, mesh)
    step = jax.jit(step_lib.make_train_step(model, objectives, tx, config, standardiser), out_shardings=(where, None))
    step = step.lower(state, rows).compile()
    after, metrics = step(state, rows)
    leaves = jax.tree.leaves(after)
    held = sum(shard.data.nbytes for x in leaves for shard in x.addressable_shards if shard.device == jax.devices()[0])
    # Counted by hand: what is split by so many devices, each dimension that any of them can divide.
    expected = {"one": lambda x, p: 1, "fsdp": lambda x, p: 8 if any(n % 8 == 0 for n in x.shape) else 1}
    expected["zero1"] = lambda x, p: expected["fsdp"](x, p) if "trace" in p else 1
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(after)]
    by_hand = sum(x.nbytes // expected[name](x, p) for x, p in zip(leaves, paths)) if name in expected else None
    states[name] = after, where
    results[name] = {
        "metrics": {k: float(v) for k, v in metrics.items() if k != "top_loss_subjects"}, "held": held, "by_hand": by_hand,
        "whole": sum(x.nbytes for x in leaves), "arguments": hlo.memory(step)["arguments"],
        "batch": sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(rows)),
        "parameters": sum(x.nbytes for x in jax.tree.leaves(after.params)),
        "split": sum(x.nbytes for x in jax.tree.leaves(after.params) if not x.is_fully_replicated),
        "collectives": hlo.by_kind(hlo.read(step.as_text())[0])}
host = {name: jax.device_get(after) for name, (after, _) in states.items()}
norm = lambda tree: math.sqrt(sum(float(np.square(x, dtype=np.float64).sum()) for x in jax.tree.leaves(tree)))
differ = lambda a, b: max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
for name in CASES:
  for part in ("params", "statistics", "opt_state"):
    a, b = (getattr(host[which], part) for which in ("one", name))
    results[name][part] = differ(a, b) / norm(a)

# Written as one lies, read as the other: on another mesh, split or whole.
for source, target in (("fsdp", "one"), ("one", "fsdp"), ("both", "zero1")):
  workdir = f"{sys.argv[2]}/{source}"
  os.makedirs(workdir)
  checkpoints = checkpoint.Checkpoints(workdir, keep=1)
  checkpoints.save(1, states[source][0], data={}, meta={})
  checkpoints.close()
  shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), *states[target])
  restored, _, _ = checkpoint.restore(workdir, 1, shapes)
  assert all(x.sharding == s for x, s in zip(jax.tree.leaves(restored), jax.tree.leaves(states[target][1]), strict=True))
  assert differ(jax.device_get(restored), host[source]) == 0, (source, target)
results["restored"] = 3

# One transformer block alone, forwards, and with its gradient.
B, N, D = 16, 12, 64
tower = vit.Block(heads=4)
mesh = mesh_of(4, 2)
with jax.set_mesh(mesh):
  shapes = {"block0": jax.eval_shape(lambda: tower.init(jax.random.key(0), jnp.zeros((B, N, D))))["params"]}
  where = parallel.shardings(shapes, ((".*", "tensor"),), mesh)
  put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  rows = NamedSharding(mesh, P("data"))
  run = jax.jit(lambda p, x: tower.apply({"params": p["block0"]}, x), out_shardings=rows)
  given = jax.tree.map(put, shapes, where), jax.ShapeDtypeStruct((B, N, D), jnp.float32, sharding=rows)
  squares = lambda p, x: (run(p, x) ** 2).sum()
  gradient = jax.jit(jax.value_and_grad(squares, argnums=(0, 1)), out_shardings=(None, (where, rows)))
  for name, function in (("block", run), ("gradient", gradient)):
    text = function.lower(*given).compile().as_text()
    results[name] = [list(one) for one in hlo.read(text)[0]]
results["activation"] = B // 4 * N * D * 4
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def compared(cohort, tmp_path_factory):
  return json.loads(
    python(COMPARE, cohort.path, tmp_path_factory.mktemp("w"), devices=8, timeout=1500)
    .strip()
    .splitlines()[-1]
  )


SPLIT = ("fsdp", "zero1", "tensor", "both")


@pytest.mark.parametrize("case", SPLIT)
def test_a_step_is_the_same_however_the_state_lies(compared, case):
  assert compared[case]["metrics"] == pytest.approx(compared["one"]["metrics"], rel=1e-5, abs=1e-6)
  for part in ("params", "statistics", "opt_state"):
    # largest difference of any element, as a share of the norm
    assert compared[case][part] < 1e-6, part


@pytest.mark.parametrize("case", SPLIT)
def test_a_device_holds_its_share_and_no_more(compared, case):
  found = compared[case]
  assert found["held"] < found["whole"]
  if found["by_hand"]:
    assert found["held"] == found["by_hand"]
  # what the compiled step is given
  assert found["held"] <= found["arguments"] <= found["held"] + found["batch"] + 4096


def test_zero3_holds_less_than_zero1_less_than_all(compared):
  assert (
    compared["fsdp"]["held"]
    < compared["zero1"]["held"]
    < compared["one"]["held"]
    == compared["one"]["whole"]
  )


def test_collectives_of_every_way(compared):
  assert compared["one"]["collectives"] == {}

  def gathered(case):
    return compared[case]["collectives"]["all-gather"]["bytes"]

  assert gathered("fsdp") >= compared["fsdp"]["split"]  # every split parameter, once at least
  # ZeRO-1: parameters are whole again after the update of their parts
  assert gathered("zero1") >= compared["fsdp"]["split"]
  assert gathered("tensor") < gathered("fsdp")
  for case in SPLIT:  # gradients: summed whole, or summed and scattered
    summed = sum(
      compared[case]["collectives"].get(kind, {"bytes": 0})["bytes"]
      for kind in ("all-reduce", "reduce-scatter")
    )
    assert summed >= compared[case]["parameters"] / 8, case


def test_a_block_split_over_the_model_axis_sums_its_activations_twice(compared):
  assert compared["block"] == [["all-reduce", 2, compared["activation"], 2]]


def test_the_gradient_of_a_split_block_takes_two_sums_more_and_gathers_nothing(compared):
  """As Megatron-LM: at the end of each half forwards, at its beginning backwards. Over the data
  axis, whose groups are of 4 devices, the gradients of the parameters are summed."""
  found = compared["gradient"]
  assert {kind for kind, *_ in found} == {"all-reduce"}, found
  assert [one for one in found if one[3] != 4] == [["all-reduce", 4, compared["activation"], 2]]


def test_heads_that_the_model_axis_does_not_divide_are_one_line():
  config = configuration.recipe(str(ROOT / "configs/ecg_mae.py"), "test")
  config.data.samples = 500
  model = models.build(config.model, config.data.samples)
  shapes = {"ecg": [12, 500], "phenotypes": [0], "diseases": [0], "covariates": [0]}
  example = inputs.example(config, shapes, 0, 4)
  mesh = AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  tx = optax.sgd(1.0)
  with pytest.raises(UserError) as error:
    state_lib.abstract(model, tx, example, 0, mesh, ((".*", "tensor"),))
  assert str(error.value) == (
    "config.sharding splits ecg/block0/qkv/bias over config.mesh.model=4 devices, and ecg/block0 "
    "has 2 attention heads; expected config.mesh.model to divide them"
  )
  state_lib.abstract(model, tx, example, 0, mesh, (("fc1/kernel", (None, "model")),))


def test_checkpoints_go_from_any_way_to_any_other(compared):
  assert compared["restored"] == 3
