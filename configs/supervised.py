r"""Phenotypes from the ECG by supervision: the fair baseline of every pre-training, and MMCL's
fine-tuning after one.

    mmcl prepare synthetic --subjects=1600 --out=demo/cohort
    mmcl train --config=configs/supervised.py:demo --workdir=demo/supervised --config.data.cohort=demo/cohort
    mmcl train --config=configs/supervised.py:demo,start=pretrained --workdir=demo/tuned \
      --config.data.cohort=demo/cohort --config.init_from.ecg=demo/mmcl
    mmcl evaluate --workdir=demo/supervised

`start=pretrained` takes the ECG encoder of any stage of the same size; `task=diseases` learns
diseases. Training ends where validation gains nothing any more, and the best step is kept.
Expected time: `:demo` 3 minutes on 2 CPU cores.
Expected score: test R2 of LVM, LVEDV, LVEF by a probe on the embedding: from scratch 0.40, 0.27,
0.05; fine-tuned from configs/joint.py:demo 0.38, 0.28, 0.07, whose frozen embedding has 0.39, 0.27,
0.06 (seed 0 of each, all intervals overlap); an untrained network 0.34, 0.22, 0.05.
The other sizes were not trained here: `:tiny` (MMCL's encoder), `:medium`, `:base`.

Source: Turgut et al. 2025 (fine-tuning). What differs: docs/recipes.md.
"""

from mmcl_jax.configuration import defaults, parse_arg
from mmcl_jax.errors import UserError

# size -> ECG profile of the cohort, samples it sees, batch, steps, learning rate fresh and
# pre-trained, weight decay,         evaluations in all, and how many of them without gain end it
SIZES = {
  "test": ("minimal", 500, 8, 6, 1e-3, 1e-3, 0.1, 2, 1),
  "demo": ("minimal", 1000, 32, 600, 1e-3, 1e-3, 0.1, 30, 10),
  # 400 epochs x 28,000 / 32; 3e-5 and 3e-6 x 32 / 4
  "tiny": ("mmcl", 2500, 32, 350_000, 2.4e-4, 2.4e-5, 0.1, 400, 25),
  "medium": ("dual_phase", 5000, 32, 350_000, 2.4e-4, 2.4e-5, 0.1, 400, 25),  # by analogy
  "base": ("dual_phase", 5000, 32, 350_000, 2.4e-4, 2.4e-5, 0.1, 400, 25),
}


def get_config(arg=None):
  arg = parse_arg(arg, size="demo", batch=0, steps=0, start="scratch", task="phenotypes")
  for name, known in (
    ("size", SIZES),
    ("start", ("scratch", "pretrained")),
    ("task", ("phenotypes", "diseases")),
  ):
    if arg[name] not in known:
      raise UserError(
        f"the config's argument has {name}={arg[name]}; expected one of {', '.join(known)}"
      )
  profile, samples, batch, steps, fresh_rate, tuned_rate, weight_decay, evaluations, patience = (
    SIZES[arg.size]
  )
  pretrained = arg.start == "pretrained"
  c = defaults(arg.batch or batch, arg.steps or steps)  # recordings, updates
  # Left behind there: what only the autoencoder, a projection or covariates need. Fresh here: the
  # attention pooling.
  c.init_except = ("^ecg/(decoder|norm|siamese.*|head|film|pool)/",) if pretrained else ()
  c.data.ecg_profile = profile  # `mmcl prepare --profile`
  c.data.samples = samples  # at 500 Hz, a random crop of the 10 s
  c.data.targets = ()  # all phenotypes of the cohort

  if profile == "minimal":  # keeps voltage, which is informative
    c.augment.ecg.update(phase_noise_strength=0.05, jitter_sigma=0.1, rescale_sigma=0.05)
  else:  # noise in proportion to the signal, which MMCL calls jitter
    c.augment.ecg.update(phase_noise_strength=0.075, gain_noise_sigma=0.2, rescale_sigma=0.5)

  # patch: samples of one lead
  c.model.ecg.update(size=arg.size, patch=100, drop_path=0.1, pool="attention")
  if not pretrained and arg.size != "demo":  # the demo's scores were taken with MAE's start
    c.model.ecg.update(positions="learned", timm_start=True)
  c.model.projection.update(hidden=16, width=16)  # built and left alone
  if arg.task == "phenotypes":
    c.model.regression = ("ecg",)
    # squared error in SD
    c.objectives.phenotypes = dict(fn="phenotype_regression", weight=1.0, of="ecg", delta=0.0)
  else:
    c.model.classification = ("ecg",)
    # of the labels
    c.objectives.diseases = dict(fn="disease_classification", weight=1.0, of="ecg", smoothing=0.1)
  c.optimizer.update(
    learning_rate=tuned_rate if pretrained else fresh_rate,
    warmup=max(c.steps // 20, 1),
    b1=0.9,
    b2=0.999,
    weight_decay=weight_decay,
    layer_decay=0.75 if pretrained else 1.0,
  )
  c.every.evaluate = max(c.steps // evaluations, 1)
  c.stop_after, c.stop_on = patience, f"validation/{arg.task}"
  return c
