"""The heart in a few numbers: a KL autoencoder of the short-axis stacks at ED and ES, whose latents
ecg_to_cmr.py learns to draw.

    mmcl prepare synthetic --subjects=1600 --out=demo/cohort
    mmcl train --config=configs/cmr_autoencoder.py:demo --workdir=demo/autoencoder --config.data.cohort=demo/cohort

Expected time: `:demo` 11 minutes on 2 CPU cores (100 of its 2,000 steps were timed: 3.1 a second),
22 beside other work. Expected score: R2 of what rebuilt test hearts measure, by the segmenter:
LVEDV 0.98, LVM 0.89, LVEF 0.65; PSNR 27.4 dB, SSIM 0.74 (96 hearts, 1 seed, 2,700 training
subjects, synthetic). `:small` and `:base` were not trained here. Next: ecg_to_cmr.py, by
`--config.init_from.tokenizer=demo/autoencoder`.

Source: the first stage of latent generation (Rombach et al. 2022; CardioNets, Ding et al. 2026).
What differs: docs/recipes.md.
"""

from mmcl_jax.configuration import defaults, parse_arg
from mmcl_jax.errors import UserError

# size -> tokenizer, its patch (slices, pixels, pixels), numbers a token, batch, steps, learning
# rate
SIZES = {
  "test": ("test", (6, 16, 16), 4, 8, 6, 1e-3),
  "demo": ("demo", (4, 8, 8), 8, 16, 2000, 1e-3),
  "small": ("small", (2, 8, 8), 16, 64, 40_000, 3e-4),
  "base": ("base", (2, 8, 8), 16, 256, 80_000, 1e-4),
}


def get_config(arg=None):
  arg = parse_arg(arg, size="demo", batch=0, steps=0)
  if arg.size not in SIZES:
    raise UserError(
      f"the config's argument has size={arg.size}; expected one of {', '.join(SIZES)}"
    )
  size, patch, channels, batch, steps, learning_rate = SIZES[arg.size]
  c = defaults(arg.batch or batch, arg.steps or steps)  # hearts, updates
  c.init_from = dict(tokenizer="")  # workdir of weights to start from; "": fresh
  c.model.tokenizer = dict(size=size, patch=patch, channels=channels)
  # SD of the scanner's noise, of the grey scale
  c.objectives.autoencoder = dict(fn="kl_autoencoder", weight=1.0, noise=0.05)
  c.evaluators = ("losses",)  # there is no embedding to probe
  c.optimizer.update(learning_rate=learning_rate, weight_decay=0.01)
  return c
