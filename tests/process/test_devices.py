"""Eight simulated devices against one: the same loss and gradients, no collective that is not
needed, elastic resume."""

import json
import shutil

import numpy as np
import pytest
from common import python, tiny_flags

COMPARE = """
import json, re, sys
import jax, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from common import tiny_step
from mmcl_jax.models import inputs
from mmcl_jax.training import parallel, state as state_lib, step as step_lib

config, cohort, standardiser, model, objectives, batch = tiny_step(sys.argv[1])
batch["subject"][5] = batch["subject"][2]  # two visits of one person, on different devices
batch["mask"][11] = 0
tx = optax.sgd(1.0)  # new parameters are the old ones minus the gradient
result, worst, text = {}, {}, None
for devices in (1, 8):
  mesh = Mesh(np.array(jax.devices()[:devices]).reshape(devices, 1), ("data", "model"),
              axis_types=(jax.sharding.AxisType.Auto,) * 2)
  with jax.set_mesh(mesh):
    example = inputs.example(config, cohort.info["shapes"], len(standardiser.targets), 16)
    state, where = state_lib.create(model, tx, example, 0, mesh, ())
    rows = parallel.to_global(batch, mesh)
    step = jax.jit(step_lib.make_train_step(model, objectives, tx, config, standardiser), out_shardings=(where, None))
    compiled = step.lower(state, rows).compile()
    new, metrics = compiled(state, rows)
    grads = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b), state.params, new.params)
    result[devices] = grads, jax.device_get(new.statistics), {k: float(v) for k, v in metrics.items() if k != "top_loss_subjects"}
    worst[devices] = metrics["top_loss_subjects"].tolist()
    text = compiled.as_text()
scale = np.sqrt(sum((g ** 2).sum() for g in jax.tree.leaves(result[1][0])))
differ = lambda a, b: max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
sizes = []
for line in text.splitlines():
  found = re.search(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?[(]", line)
  if found:
    shapes = re.findall(r"[a-z]+[0-9]+\\[([0-9,]*)\\]", found[1])
    sizes.append((found[2], sum(int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes)))

print(json.dumps(dict(worst=worst, metrics={str(d): r[2] for d, r in result.items()}, gradient=differ(result[1][0], result[8][0]) / scale,
  statistics=differ(result[1][1], result[8][1]), collectives=sizes,
  parameters=sum(x.size for x in jax.tree.leaves(state.params)))))
"""


@pytest.fixture(scope="module")
def compared(cohort):
  # Compiled well: sums that are not vectorised differ by ten times as much between one device and
  # eight.
  return json.loads(python(COMPARE, cohort.path, devices=8, flags="").strip().splitlines()[-1])


def test_loss_and_every_metric_agree(compared):
  one, eight = compared["metrics"]["1"], compared["metrics"]["8"]
  assert one.keys() == eight.keys()
  assert eight == pytest.approx(one, rel=1e-5, abs=1e-6)
  assert one["rows_left_out"] == 1
  assert compared["worst"]["1"] == compared["worst"]["8"]  # the subjects that a spike would name


def test_gradients_and_batch_statistics_agree(compared):
  # largest difference of any element, as a share of the global norm
  assert compared["gradient"] < 1e-6
  assert compared["statistics"] < 1e-6


def test_compiled_step_holds_the_expected_collectives_and_no_more(compared):
  kinds = {kind for kind, _ in compared["collectives"]}
  assert kinds == {"all-reduce", "all-gather"}
  gathered = [size for kind, size in compared["collectives"] if kind == "all-gather"]
  # What contrastive learning over the global batch needs from the other devices: three projections
  # [16, 128], the subjects [16, 2] and masks [16]. Anything larger would be an image, an ECG or a
  # parameter travelling.
  assert max(gathered) <= 16 * 128 and sum(gathered) <= 6 * 16 * 128, gathered
  reduced = sum(size for kind, size in compared["collectives"] if kind == "all-reduce")
  # Every gradient once, the cotangents of the gathered projections, and sums over the batch
  # (statistics, losses).
  assert compared["parameters"] <= reduced <= compared["parameters"] + 8 * 16 * 128, reduced


RUN = "import sys; from mmcl_jax import cli, train; cli.run(train.main, sys.argv[1:])"


def arrays(workdir, step, devices=1):
  code = (
    "import sys, jax, numpy as np; from mmcl_jax.training import restore; run = "
    "restore.load_run(sys.argv[1], int(sys.argv[2]));"
    "leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(run.state));"
    "np.savez(sys.argv[3], **{jax.tree_util.keystr(p): x for p, x in leaves})"
  )
  python(code, workdir, step, workdir / f"{step}.npz", devices=devices)
  return dict(np.load(workdir / f"{step}.npz"))


def test_resumed_on_fewer_devices_ends_in_the_same_state(cohort, tmp_path):
  """Trained on 8 devices to step 6; again from its step 3 on 4 devices."""
  eight, four = tmp_path / "eight", tmp_path / "four"
  python(RUN, *tiny_flags(cohort.path, eight), devices=8)
  shutil.copytree(eight, four)
  shutil.rmtree(four / "checkpoints/6")
  printed = python(RUN, *tiny_flags(cohort.path, four), devices=4)
  assert "from step 3" in printed
  a, b = arrays(eight, 6), arrays(four, 6)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=2e-5, err_msg=name)
  assert any(not np.array_equal(a[name], arrays(eight, 3)[name]) for name in a)


def test_batch_that_does_not_divide_is_one_line(cohort, tmp_path):
  code = "import sys; from mmcl_jax import cli, train\ntry: cli.run(train.main, sys.argv[1:])\nexcept SystemExit as e: print('exit', e.code)"
  printed = python(
    code.replace("print(", "import sys; print("),
    *tiny_flags(cohort.path, tmp_path / "w"),
    "--config.batch=12",
    devices=8,
  )
  assert printed.splitlines()[-1] == "exit 2"
  assert not (tmp_path / "w").exists()
