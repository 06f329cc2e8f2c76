r"""The heart in a few numbers: a KL autoencoder of the short-axis stacks at ED and ES, whose
latents ecg_to_cmr.py learns to draw.

    mmcl prepare synthetic --subjects=1600 --out=demo/cohort
    mmcl train --config=configs/cmr_autoencoder.py:demo --workdir=demo/autoencoder \
      --config.data.cohort=demo/cohort

Expected time: `:demo` 11 minutes on 2 CPU cores (100 of its 2,000 steps were timed: 3.1 a second),
22 beside other work. Expected score: R2 of what rebuilt test hearts measure, by the segmenter:
LVEDV 0.98, LVM 0.89, LVEF 0.65; PSNR 27.4 dB, SSIM 0.74 (96 hearts, 1 seed, 2,700 training
subjects, synthetic). `:small` and `:base` were not trained here. Next: ecg_to_cmr.py, by
`--config.init_from.tokenizer=demo/autoencoder`.

Source: the first stage of latent generation (Rombach et al. 2022; CardioNets, Ding et al. 2026).
What differs: docs/recipes.md.
"""

from mmcl_jax.configuration import defaults, parse_arg

SIZES = {
  "demo": dict(
    tokenizer="demo",
    patch=(4, 8, 8),  # slices, pixels, pixels
    channels=8,  # numbers a token
    batch=16,
    steps=2000,
    learning_rate=1e-3,
  ),
  "test": dict(
    tokenizer="test",
    patch=(6, 16, 16),
    channels=4,
    batch=8,
    steps=6,
    learning_rate=1e-3,
  ),
  "small": dict(
    tokenizer="small",
    patch=(2, 8, 8),
    channels=16,
    batch=64,
    steps=40_000,
    learning_rate=3e-4,
  ),
  "base": dict(
    tokenizer="base",
    patch=(2, 8, 8),
    channels=16,
    batch=256,
    steps=80_000,
    learning_rate=1e-4,
  ),
}


def get_config(arg=None):
  arg = parse_arg(arg, size=SIZES, batch=0, steps=0)
  size = SIZES[arg.size]
  c = defaults(arg.batch or size["batch"], arg.steps or size["steps"])  # hearts, updates
  c.init_from = dict(tokenizer="")  # workdir of weights to start from; "": fresh
  c.model.fn = "generation"
  c.model.tokenizer = dict(size=size["tokenizer"], patch=size["patch"], channels=size["channels"])
  # SD of the scanner's noise, of the grey scale
  c.objectives.autoencoder = dict(fn="kl_autoencoder", weight=1.0, noise=0.05)
  c.evaluators.probes.every = 0  # there is no embedding to probe
  c.optimizer.update(learning_rate=size["learning_rate"], weight_decay=0.01)
  return c
