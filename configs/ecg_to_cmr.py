r"""CMR from an ECG: rectified flow over the latents of an autoencoder, given the tokens of a
trained ECG encoder.

    mmcl prepare synthetic --subjects=1600 --out=demo/cohort
    mmcl train --config=configs/joint.py:demo --workdir=demo/joint --config.data.cohort=demo/cohort
    mmcl train --config=configs/cmr_autoencoder.py:demo --workdir=demo/autoencoder --config.data.cohort=demo/cohort
    mmcl train --config=configs/cmr_segmenter.py:demo --workdir=demo/segmenter --config.data.cohort=demo/cohort
    mmcl train --config=configs/ecg_to_cmr.py:demo --workdir=demo/generator --config.data.cohort=demo/cohort \
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
from mmcl_jax.errors import UserError

# size -> ECG encoder, samples it sees, tokenizer, its patch (slices, pixels, pixels), numbers a
# token, segmenter, generator,         batch, steps, learning rate, what the running mean of the
# weights keeps of itself
SIZES = {
  "test": ("test", 500, "test", (6, 16, 16), 4, "test", "test", 8, 6, 1e-3, 0.9),
  "demo": ("demo", 1000, "demo", (4, 8, 8), 8, "demo", "demo", 32, 1000, 1e-3, 0.99),
  "small": ("medium", 5000, "small", (2, 8, 8), 16, "base", "small", 64, 100_000, 2e-4, 0.999),
  "base": ("base", 5000, "base", (2, 8, 8), 16, "base", "base", 256, 200_000, 1e-4, 0.999),
}


def get_config(arg=None):
  arg = parse_arg(arg, size="demo", kind="flow", batch=0, steps=0)
  if arg.kind not in ("flow", "masked"):
    raise UserError(f"the config's argument has kind={arg.kind}; expected flow or masked")
  if arg.size not in SIZES:
    raise UserError(
      f"the config's argument has size={arg.size}; expected one of {', '.join(SIZES)}"
    )
  (
    ecg,
    samples,
    tokenizer,
    patch,
    channels,
    segmenter,
    generator,
    batch,
    steps,
    learning_rate,
    ema,
  ) = SIZES[arg.size]
  c = defaults(arg.batch or batch, arg.steps or steps)  # pairs, updates
  # workdirs of the stages before; the segmenter only measures
  c.init_from = dict(ecg="", tokenizer="", segmenter="")
  c.init_except = ("^ecg/(decoder|norm|siamese.*)/",)  # what only the masked autoencoder needs
  c.freeze = ("^ecg/", "^tokenizer/", "^segmenter/")
  c.data.samples = samples  # samples it sees at a time
  c.model.ecg.update(size=ecg, patch=100)
  c.model.tokenizer = dict(size=tokenizer, patch=patch, channels=channels)
  c.model.segmenter = dict(size=segmenter)
  c.model.generator = dict(
    size=generator,
    masked=arg.kind == "masked",
    dropout=0.1,  # of the ECG, so that it also learns the hearts of all
    covariates=False,
  )  # beside the ECG, withheld as often
  c.objectives.flow = dict(fn="flow_matching", weight=1.0)
  c.evaluators = ("losses",)
  c.optimizer.update(learning_rate=learning_rate, weight_decay=0.0, ema=ema)
  return c
