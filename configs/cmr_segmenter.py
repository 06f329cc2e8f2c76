"""LV, myocardium and RV of any short-axis stack: a small U-Net, by which generated hearts are
measured (ecg_to_cmr.py).

    mmcl prepare synthetic --subjects=1600 --out=demo/cohort
    mmcl train --config=configs/cmr_segmenter.py:demo --workdir=demo/segmenter --config.data.cohort=demo/cohort

Expected time: `:demo` 5 minutes on 2 CPU cores (100 of its 400 steps were timed: 1.9 a second), 11
beside other work. Expected score: Dice on test hearts LV 0.99, myocardium 0.95, RV 0.98; R2 of what
is measured LVEDV 1.00, LVM 0.96, LVEF 0.98 (96 hearts, 1 seed, 2,700 training subjects, synthetic).
`:base` was not trained here. The cohort needs labels: synthetic, ACDC, M&Ms and segmented UK
Biobank cohorts have them.

Source: U-Net, Ronneberger et al. 2015. What differs: docs/recipes.md.
"""

from mmcl_jax.configuration import defaults, parse_arg
from mmcl_jax.errors import UserError

# size -> network, batch, steps, learning rate
SIZES = {
  "test": ("test", 8, 6, 1e-2),
  "demo": ("demo", 8, 400, 3e-3),
  "base": ("base", 32, 10_000, 1e-3),
}


def get_config(arg=None):
  arg = parse_arg(arg, size="demo", batch=0, steps=0)
  if arg.size not in SIZES:
    raise UserError(
      f"the config's argument has size={arg.size}; expected one of {', '.join(SIZES)}"
    )
  size, batch, steps, learning_rate = SIZES[arg.size]
  c = defaults(arg.batch or batch, arg.steps or steps)  # hearts, updates
  c.init_from = dict(segmenter="")  # workdir of weights to start from; "": fresh
  c.model.segmenter = dict(size=size)
  c.objectives.segmentation = dict(fn="segmentation", weight=1.0)
  c.evaluators = ("losses",)  # there is no embedding to probe
  c.optimizer.update(learning_rate=learning_rate, weight_decay=0.01)
  return c
