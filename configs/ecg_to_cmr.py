r"""CMR from an ECG: rectified flow over the latents of an autoencoder, given the tokens of a
trained ECG encoder.

    mmcl prepare synthetic --subjects=1600 --out=demo/cohort
    mmcl train --config=configs/joint.py:demo --workdir=demo/joint --config.data.cohort=demo/cohort
    mmcl train --config=configs/cmr_autoencoder.py:demo --workdir=demo/autoencoder \
      --config.data.cohort=demo/cohort
    mmcl train --config=configs/cmr_segmenter.py:demo --workdir=demo/segmenter \
      --config.data.cohort=demo/cohort
    mmcl train --config=configs/ecg_to_cmr.py:demo --workdir=demo/generator \
      --config.data.cohort=demo/cohort \
        --config.init_from.ecg=demo/joint --config.init_from.tokenizer=demo/autoencoder \
        --config.init_from.segmenter=demo/segmenter

Expected time: `:demo` 17 minutes on 2 CPU cores (80 of its 1,000 steps were timed: 1.05 a second),
31 beside tests. Expected score: R2 of the mean of 64 draws LVM 0.26, LVEDV 0.30, LVEF -0.15; CRPS
of LVM 13.7 g, of all of train 15.5 g (200 test subjects, 1 seed, encoder of joint.py:demo,
synthetic, 2,697 training subjects; docs/results.md). `:small` and `:base` were not trained here.

`:demo,kind=masked` draws a few tokens at a time (MAR, Li et al. 2024), as CardioNets does; the
figures above are of `kind=flow`.

Source: the second stage of latent generation (Rombach et al. 2022; CardioNets, Ding et al. 2026).
What differs: docs/recipes.md.
"""

from mmcl_jax.configuration import defaults, parse_arg

SIZES = {
  "demo": dict(
    ecg="demo",
    samples=1000,  # at 500 Hz, that the encoder sees
    tokenizer="demo",
    patch=(4, 8, 8),  # of the tokenizer: slices, pixels, pixels
    channels=8,  # numbers a token
    segmenter="demo",
    generator="demo",
    batch=32,
    steps=1000,
    learning_rate=1e-3,
    ema=0.99,  # what the running mean of the weights keeps of itself a step
  ),
  "test": dict(
    ecg="test",
    samples=500,
    tokenizer="test",
    patch=(6, 16, 16),
    channels=4,
    segmenter="test",
    generator="test",
    batch=8,
    steps=6,
    learning_rate=1e-3,
    ema=0.9,
  ),
  "small": dict(
    ecg="medium",
    samples=5000,
    tokenizer="small",
    patch=(2, 8, 8),
    channels=16,
    segmenter="base",
    generator="small",
    batch=64,
    steps=100_000,
    learning_rate=2e-4,
    ema=0.999,
  ),
  "base": dict(
    ecg="base",
    samples=5000,
    tokenizer="base",
    patch=(2, 8, 8),
    channels=16,
    segmenter="base",
    generator="base",
    batch=256,
    steps=200_000,
    learning_rate=1e-4,
    ema=0.999,
  ),
}


def get_config(arg=None):
  arg = parse_arg(arg, size=SIZES, kind=("flow", "masked"), batch=0, steps=0)
  size = SIZES[arg.size]
  c = defaults(arg.batch or size["batch"], arg.steps or size["steps"])  # pairs, updates
  # workdirs of the stages before; the segmenter only measures
  c.init_from = dict(ecg="", tokenizer="", segmenter="")
  c.init_except = ("^ecg/(decoder|norm|siamese.*)/",)  # what only the masked autoencoder needs
  c.freeze = ("^ecg/", "^tokenizer/", "^segmenter/")
  c.data.samples = size["samples"]
  c.model.fn = "generation"
  c.model.towers.ecg = dict(fn="ecg_vit", view="ecg", size=size["ecg"], patch=100)
  c.model.tokenizer = dict(size=size["tokenizer"], patch=size["patch"], channels=size["channels"])
  c.model.segmenter = dict(size=size["segmenter"])
  c.model.generator = dict(
    size=size["generator"],
    masked=arg.kind == "masked",
    dropout=0.1,  # of the ECG, so that it also learns the hearts of all
    covariates=False,
  )  # beside the ECG, withheld as often
  c.objectives.flow = dict(fn="flow_matching", weight=1.0)
  c.evaluators.probes.every = 0
  c.optimizer.update(learning_rate=size["learning_rate"], weight_decay=0.0, ema=size["ema"])
  return c
