r"""LV, myocardium and RV of any short-axis stack: a small U-Net, by which generated hearts are
measured (ecg_to_cmr.py).

    mmcl prepare synthetic --subjects=1600 --out=demo/cohort
    mmcl train --config=configs/cmr_segmenter.py:demo --workdir=demo/segmenter \
      --config.data.cohort=demo/cohort

Expected time: `:demo` 5 minutes on 2 CPU cores (100 of its 400 steps were timed: 1.9 a second), 11
beside other work. Expected score: Dice on test hearts LV 0.99, myocardium 0.95, RV 0.98; R2 of what
is measured LVEDV 1.00, LVM 0.96, LVEF 0.98 (96 hearts, 1 seed, 2,700 training subjects, synthetic).
`:base` was not trained here. The cohort needs labels: synthetic, ACDC, M&Ms and segmented UK
Biobank cohorts have them.

Source: U-Net, Ronneberger et al. 2015. What differs: docs/recipes.md.
"""

from mmcl_jax.configuration import defaults, parse_arg

SIZES = {
  "demo": dict(
    segmenter="demo",
    batch=8,
    steps=400,
    learning_rate=3e-3,
  ),
  "test": dict(
    segmenter="test",
    batch=8,
    steps=6,
    learning_rate=1e-2,
  ),
  "base": dict(
    segmenter="base",
    batch=32,
    steps=10_000,
    learning_rate=1e-3,
  ),
}


def get_config(arg=None):
  arg = parse_arg(arg, size=SIZES, batch=0, steps=0)
  size = SIZES[arg.size]
  c = defaults(arg.batch or size["batch"], arg.steps or size["steps"])  # hearts, updates
  c.init_from = dict(segmenter="")  # workdir of weights to start from; "": fresh
  c.model.fn = "generation"
  c.model.segmenter = dict(size=size["segmenter"])
  c.objectives.segmentation = dict(fn="segmentation", weight=1.0)
  c.evaluators.probes.every = 0  # there is no embedding to probe
  c.optimizer.update(learning_rate=size["learning_rate"], weight_decay=0.01)
  return c
