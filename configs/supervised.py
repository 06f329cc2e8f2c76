r"""Phenotypes from the ECG by supervision: the fair baseline of every pre-training, and MMCL's
fine-tuning after one.

    mmcl prepare synthetic --subjects=1600 --out=demo/cohort
    mmcl train --config=configs/supervised.py:demo --workdir=demo/supervised \
      --config.data.cohort=demo/cohort
    mmcl train --config=configs/supervised.py:demo,start=pretrained --workdir=demo/tuned \
      --config.data.cohort=demo/cohort --config.init_from.ecg=demo/mmcl
    mmcl evaluate --workdir=demo/supervised

`start=pretrained` takes the ECG encoder of any stage of the same size; `task=diseases` learns
diseases; `encoder=xresnet1d` or `encoder=s4` takes another ECG encoder. Training ends where
validation gains nothing any more, and the best step is kept.
Expected time: `:demo` 3 minutes on 2 CPU cores.
Expected score: test R2 of LVM, LVEDV, LVEF by a probe on the embedding: from scratch 0.40, 0.27,
0.05; fine-tuned from configs/joint.py:demo 0.38, 0.28, 0.07, whose frozen embedding has 0.39, 0.27,
0.06 (seed 0 of each, all intervals overlap); an untrained network 0.34, 0.22, 0.05.
The other sizes were not trained here: `:tiny` (MMCL's encoder), `:medium`, `:base`.

Source: Turgut et al. 2025 (fine-tuning). What differs: docs/recipes.md.
"""

from mmcl_jax.configuration import defaults, parse_arg

SIZES = {
  "demo": dict(
    profile="minimal",  # `mmcl prepare --profile`
    samples=1000,  # at 500 Hz, that the encoder sees, a random crop of the 10 s
    batch=32,
    steps=600,
    learning_rate=dict(scratch=1e-3, pretrained=1e-3),
    evaluations=30,  # in all
    stop_after=10,  # evaluations without gain
  ),
  "test": dict(
    profile="minimal",
    samples=500,
    batch=8,
    steps=6,
    learning_rate=dict(scratch=1e-3, pretrained=1e-3),
    evaluations=2,
    stop_after=1,
  ),
  "tiny": dict(
    profile="mmcl",
    samples=2500,
    batch=32,
    steps=350_000,  # 400 epochs x 28,000 / 32
    learning_rate=dict(scratch=2.4e-4, pretrained=2.4e-5),  # 3e-5 and 3e-6 x 32 / 4
    evaluations=400,
    stop_after=25,
  ),
}
# Larger encoders by analogy with `tiny`.
SIZES["medium"] = SIZES["tiny"] | dict(profile="dual_phase", samples=5000)
SIZES["base"] = SIZES["medium"]
STARTS = ("scratch", "pretrained")
TASKS = ("phenotypes", "diseases")
# ECG encoder -> its published size; ecg_vit has that of the recipe
ENCODERS = {"ecg_vit": "", "xresnet1d": "50", "s4": "base"}


def get_config(arg=None):
  arg = parse_arg(arg, size=SIZES, start=STARTS, task=TASKS, encoder=ENCODERS, batch=0, steps=0)
  size = SIZES[arg.size]
  pretrained, patches = arg.start == "pretrained", arg.encoder == "ecg_vit"
  c = defaults(arg.batch or size["batch"], arg.steps or size["steps"])  # recordings, updates
  # Left behind there: what only the autoencoder, a projection or covariates need. Fresh here: the
  # attention pooling.
  if pretrained and patches:
    c.init_except = ("^ecg/(decoder|norm|siamese.*|head|film|pool)/",)
  c.data.ecg_profile = size["profile"]
  c.data.samples = size["samples"]
  c.data.targets = ()  # all phenotypes of the cohort

  if size["profile"] == "minimal":  # keeps voltage, which is informative
    c.augment.ecg.update(phase_noise_strength=0.05, jitter_sigma=0.1, rescale_sigma=0.05)
  else:  # noise in proportion to the signal, which MMCL calls jitter
    c.augment.ecg.update(phase_noise_strength=0.075, gain_noise_sigma=0.2, rescale_sigma=0.5)

  if patches:
    # patch: samples of one lead
    c.model.towers.ecg = dict(
      fn="ecg_vit", view="ecg", size=arg.size, patch=100, drop_path=0.1, pool="attention"
    )
  else:
    small = arg.size in ("test", "demo")
    c.model.towers.ecg = dict(
      fn=arg.encoder, view="ecg", size=arg.size if small else ENCODERS[arg.encoder]
    )
  if (
    patches and not pretrained and arg.size != "demo"
  ):  # the demo's scores were taken with MAE's start
    c.model.towers.ecg.update(positions="learned", timm_start=True)
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
    learning_rate=size["learning_rate"][arg.start],
    warmup=max(c.steps // 20, 1),
    b1=0.9,
    b2=0.999,
    weight_decay=0.1,
    layer_decay=0.75 if pretrained else 1.0,
  )
  c.every.evaluate = max(c.steps // size["evaluations"], 1)
  c.stop_after, c.stop_on = size["stop_after"], f"validation/{arg.task}"
  return c
