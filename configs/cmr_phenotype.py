r"""Supervised CMR encoders: the teachers of dual_phase.py and arms.py, one a view, trained to
measure what they see.

    mmcl prepare synthetic --subjects=1600 --out=demo/cohort
    mmcl train --config=configs/cmr_phenotype.py:demo --workdir=demo/ed \
      --config.data.cohort=demo/cohort
    mmcl train --config=configs/cmr_phenotype.py:demo,view=es_volume --workdir=demo/es \
      --config.data.cohort=demo/cohort
    mmcl evaluate --workdir=demo/ed

`view` is ed_volume, es_volume, ed_slice or cine_slice. `targets` is 3 (LVEDV, LVM, RVEDV), 5
(LVEDV, LVESV, LVEF, RVEDV, RVESV), 13, or all of the cohort; as published es_volume has 5 and the
others 3, in the demo all have 13.
Expected time: `:demo` 7 to 9 minutes on 2 CPU cores, two at a time.
Expected score, read from the ED volume: test R2 of LVM 0.96, LVEDV 0.94, LVEF 0.05 (1 seed).
`:r50`, the published size, was not trained here.
Next: dual_phase.py or arms.py, by `--config.init_from.cmr_ed=demo/ed`.

Sources: Alvarez-Florez et al. 2026, Bujalance Gomez et al. 2026. What differs: docs/recipes.md.
"""

from mmcl_jax.configuration import defaults, parse_arg
from mmcl_jax.data import schema

SIZES = {
  "demo": dict(
    cmr="demo",
    profile="minimal",  # of the cohort that the next stage shares; no ECG is read here
    width=256,  # of the embedding
    frames=5,  # of a cine
    batch=32,
    steps=600,
    learning_rate=2e-3,
  ),
  "test": dict(
    cmr="test",
    profile="minimal",
    width=16,
    frames=3,
    batch=8,
    steps=6,
    learning_rate=1e-3,
  ),
  "r50": dict(
    cmr="r50",
    profile="dual_phase",
    width=768,
    frames=50,
    batch=96,
    steps=49_800,  # 200 epochs x 23,900 / 96
    learning_rate=1e-4,
  ),
}
# view -> tower, slices (0: the frames of a cine), targets as published
VIEWS = {
  "ed_volume": ("ed", 6, "3"),
  "es_volume": ("es", 6, "5"),
  "ed_slice": ("slice", 1, "3"),
  "cine_slice": ("cine", 0, "3"),
}
TARGETS = {
  "3": ("LVEDV", "LVM", "RVEDV"),
  "5": ("LVEDV", "LVESV", "LVEF", "RVEDV", "RVESV"),
  # but for radial strain (Err), which is not among schema.PHENOTYPES
  "13": tuple(schema.PHENOTYPES),
  "all": (),
}


def get_config(arg=None):
  arg = parse_arg(arg, size=SIZES, view=VIEWS, targets=("default", *TARGETS), batch=0, steps=0)
  size = SIZES[arg.size]
  tower, slices, published = VIEWS[arg.view]
  targets = arg.targets
  if targets == "default":
    targets = "13" if arg.size == "demo" else published
  long = arg.size == "r50" and targets == "13"  # 400 epochs, not 200
  steps = arg.steps or size["steps"] * (2 if long else 1)
  c = defaults(arg.batch or size["batch"], steps)  # hearts, updates
  # workdir of weights to start from, such as `mmcl convert` makes; "": fresh
  c.init_from = {f"cmr_{tower}": ""}
  c.data.ecg_profile = size["profile"]
  c.data.targets = TARGETS[targets]

  # In place of the published left-right flip, which swaps the ventricles. No zoom: size is what is
  # measured.
  c.augment.cmr.update(rotation_deg=15.0, shift=0.05)

  c.model.towers[tower] = dict(
    fn="slow_resnet",
    view=arg.view,
    planes=slices or size["frames"],
    size=size["cmr"],
    width=size["width"],
  )
  c.model.regression = (tower,)
  # built and left alone: the next stage brings its own
  c.model.projection.update(hidden=16, width=16)
  # squared error in SD
  c.objectives.phenotypes = dict(fn="phenotype_regression", weight=1.0, of=tower, delta=0.0)
  warmup = c.steps // (10 if long else 5)  # 40 epochs
  c.optimizer.update(
    learning_rate=size["learning_rate"],
    warmup=max(warmup, 1),
    b1=0.9,
    b2=0.95,
    weight_decay=1e-5,
  )
  return c
