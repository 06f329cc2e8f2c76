"""What the loops around the device do not wait for, or do not compute, against the plain form.

    source launch/env.sh && python benchmarks/loop.py

Every line is JSON, `plain` against `ours`, in ms. `save`: what a save of --mb random parameters
holds up the loop for after orbax has written it, where the loop hashes all files and where a
thread does. `metrics`: fetching those of a step, finished, as an array each and as one.
`augmentation`: of a batch as in joint:demo, all slices against those that towers see. `inference`:
a split through an encoder as in joint:demo, each batch fetched at once and one batch late.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

import jax
import jax.numpy as jnp
import numpy as np

from mmcl_jax import configuration, models
from mmcl_jax.data import standardise
from mmcl_jax.data.preprocess import cmr as preprocess_cmr
from mmcl_jax.models import cmr_tower, inference, inputs
from mmcl_jax.training import checkpoint, over_split, parallel, state as state_lib, step as step_lib


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--mb", type=int, default=300, help="of the state that is saved")
  parser.add_argument("--repeats", type=int, default=5)
  parts = {"save": save, "metrics": metrics, "augmentation": augmentation, "inference": embedding}
  parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
  args = parser.parse_args()
  with jax.set_mesh(parallel.make_mesh(data=-1, model=1)):
    for name in args.only:
      found = parts[name](args)
      median = {form: round(1e3 * statistics.median(times), 2) for form, times in found.items()}
      best = {f"{form}_least": round(1e3 * min(times), 2) for form, times in found.items()}
      load = [round(x, 2) for x in os.getloadavg()]
      print(json.dumps({"what": name, **median, **best, "load": load}), flush=True)


def in_turn(repeats: int, **forms) -> dict[str, list[float]]:
  """Seconds of every form, `repeats` times in turn after one that is not counted."""
  times = {name: [] for name in forms}
  for i in range(repeats + 1):
    for name, form in forms.items():
      begun = time.perf_counter()
      form()
      if i:
        times[name].append(time.perf_counter() - begun)
  return times


def save(args) -> dict[str, list[float]]:
  rng = np.random.default_rng(0)
  state = {f"w{i}": jnp.asarray(rng.random((args.mb, 25_000), np.float32)) for i in range(10)}
  found = {"plain": [], "ours": []}
  with tempfile.TemporaryDirectory() as workdir:
    saved = checkpoint.Checkpoints(workdir, keep=1)
    for step in range(2 * args.repeats):
      form = ("plain", "ours")[step % 2]
      saved.save(step + 1, state, {}, {})
      saved.manager.wait_until_finished()
      held = 0.0
      while saved.pending is not None or saved.signing is not None:
        begun = time.perf_counter()
        saved.poll()
        if form == "plain":
          saved.finish()
        held += time.perf_counter() - begun
        time.sleep(0.05)  # a step
      found[form].append(held)
    saved.close()
  return found


def metrics(args) -> dict[str, list[float]]:
  values = {f"metric {i}": jnp.float32(i) for i in range(30)}
  values["top_loss_subjects"] = jnp.zeros((4, 2), jnp.uint32)
  step = jax.jit(lambda values: {name: x + 1 for name, x in values.items()})
  packed = jax.jit(lambda values: step_lib.pack(step(values)))
  found = {"plain": [], "ours": []}
  for _ in range(20 * args.repeats):
    apart, together = jax.block_until_ready((step(values), packed(values)))
    begun = time.perf_counter()
    fetched = jax.device_get(apart)
    subjects = fetched.pop("top_loss_subjects")
    scalars = {name: float(x) for name, x in fetched.items()}
    between = time.perf_counter()
    unpacked = step_lib.unpack(together)
    found["ours"].append(time.perf_counter() - between)
    found["plain"].append(between - begun)
    assert unpacked[0] == scalars and (unpacked[1] == subjects).all()
  return found


def demo():
  """The config of joint:demo, and shapes of what `mmcl prepare` makes."""
  config = configuration.recipe(f"{ROOT}/configs/joint.py", "demo")
  size = preprocess_cmr.Shape()
  return config, (2, size.slices, size.size, size.size)


def augmentation(args) -> dict[str, list[float]]:
  config, volumes = demo()
  rng = np.random.default_rng(0)
  rows = config.batch
  batch = {
    "ecg": jnp.asarray(rng.normal(size=(rows, 12, 5000)).astype(np.float32)),
    "cmr": {"ed_es_volumes": jnp.asarray(rng.random((rows, *volumes), np.float32))},
  }
  keys = jax.random.split(jax.random.key(0), rows)

  def compiled(seen):
    kept = cmr_tower.seen
    cmr_tower.seen = seen
    try:
      # what the towers see is all that the step computes with
      def augment(batch, keys):
        batch = step_lib.augment(batch, keys, config)
        planes = [
          cmr_tower.select_view(batch["cmr"], config.model.towers[name]) for name in ("ed", "es")
        ]
        return batch["ecg"], planes

      return jax.jit(augment).lower(batch, keys).compile()
    finally:
      cmr_tower.seen = kept

  whole = compiled(lambda cmr, _: cmr)
  cut = compiled(cmr_tower.seen)
  return in_turn(
    args.repeats,
    plain=lambda: jax.block_until_ready(whole(batch, keys)),
    ours=lambda: jax.block_until_ready(cut(batch, keys)),
  )


class Records:
  """Random ECGs of 10 s."""

  def __len__(self):
    return 512

  def __getitem__(self, i):
    rng = np.random.default_rng(i)
    return {
      "ecg": rng.integers(-1000, 1000, (12, 5000), np.int16),
      "ecg_scale": 1e-3,
      "subject": np.uint32([0, i]),
      **{name: np.uint8(1) for name in ("has_ecg", "has_cmr")},
      **{name: np.zeros(1, np.float32) for name in ("phenotypes", "diseases", "covariates")},
    }


def embedding(args) -> dict[str, list[float]]:
  config, volumes = demo()
  model = models.build(config.model, config.data.samples)
  shapes = {"ecg": [12, 5000], "ed_es_volumes": volumes}
  shapes |= {name: [1] for name in ("phenotypes", "diseases", "covariates")}
  variables = state_lib.variables(model, inputs.example(config, shapes, 0, 1), 0)
  standardiser = standardise.as_they_are([], covariates=("none",))
  embed = jax.jit(inference.make_embed(model, config, standardiser))
  mesh = parallel.make_mesh(data=-1, model=1)

  def over_records():
    over_split.over_split(embed, variables, Records(), mesh=mesh, batch=config.batch)

  def at_once():
    kept = over_split.one_late
    over_split.one_late = iter
    try:
      over_records()
    finally:
      over_split.one_late = kept

  return in_turn(args.repeats, plain=at_once, ours=over_records)


if __name__ == "__main__":
  main()
