r"""Dual-phase contrastive learning: an ECG encoder tied to frozen CMR encoders of end-diastole and
end-systole.

    mmcl train --config=configs/ecg_mae.py:demo --workdir=demo/mae --config.data.cohort=demo/cohort
    mmcl train --config=configs/cmr_phenotype.py:demo --workdir=demo/ed \
      --config.data.cohort=demo/cohort
    mmcl train --config=configs/cmr_phenotype.py:demo,view=es_volume --workdir=demo/es \
      --config.data.cohort=demo/cohort
    mmcl train --config=configs/dual_phase.py:demo --workdir=demo/dual \
      --config.data.cohort=demo/cohort \
      --config.init_from.ecg=demo/mae --config.init_from.cmr_ed=demo/ed \
      --config.init_from.cmr_es=demo/es
    mmcl evaluate --workdir=demo/dual

Expected time: the last stage of `:demo` 4 minutes on 2 CPU cores; frozen encoders run once.
Expected score: test R2 of LVM 0.40, LVEDV 0.28, LVEF 0.07 (3 seeds);
untrained 0.34, 0.23, 0.06; docs/results.md.
`:medium`, the published size, was not trained here. arms.py has this and its four rivals.

Source: Alvarez-Florez et al. 2026. What differs: docs/recipes.md.
"""

from mmcl_jax.configuration import defaults, parse_arg
from mmcl_jax.data import schema

SIZES = {
  "demo": dict(
    ecg="demo",
    profile="minimal",  # `mmcl prepare --profile`
    samples=1000,  # at 500 Hz, that the encoder sees
    head=256,  # of the ECG encoder
    cmr="demo",
    width=256,  # of the CMR embedding
    hidden=256,  # of the projections
    batch=32,
    steps=600,
    learning_rate=1e-3,
  ),
  "test": dict(
    ecg="test",
    profile="minimal",
    samples=500,
    head=16,
    cmr="test",
    width=16,
    hidden=32,
    batch=8,
    steps=6,
    learning_rate=1e-3,
  ),
  "medium": dict(
    ecg="medium",
    profile="dual_phase",
    samples=5000,  # all 10 s
    head=1000,  # timm's
    cmr="r50",
    width=768,
    hidden=768,
    batch=64,
    steps=74_800,  # 200 epochs x 23,940 / 64
    learning_rate=1e-5,
  ),
}


def get_config(arg=None):
  arg = parse_arg(arg, size=SIZES, batch=0, steps=0)
  size = SIZES[arg.size]
  c = defaults(arg.batch or size["batch"], arg.steps or size["steps"])  # pairs, updates
  # workdirs of ecg_mae.py and, by view, of cmr_phenotype.py
  c.init_from = dict(ecg="", cmr_ed="", cmr_es="")
  # left behind there: the autoencoder's; fresh here: the head
  c.init_except = ("^ecg/(decoder|norm|siamese.*|head)/",)
  c.data.ecg_profile = size["profile"]
  c.data.samples = size["samples"]
  # No augmentation of the ECG, as published. Frozen encoders see the images as they are: the
  # published flip, drawn apart for ED and ES, would swap the ventricles of one of them.

  # patch: samples of one lead
  c.model.towers.ecg = dict(
    fn="ecg_vit",
    view="ecg",
    size=size["ecg"],
    patch=100,
    head=size["head"],
    drop_path=0.0 if arg.size == "demo" else 0.1,  # the demo's scores: without
  )
  for phase in schema.PHASES:
    c.model.towers[phase] = dict(
      fn="slow_resnet",
      view=f"{phase}_volume",
      planes=6,  # slices
      size=size["cmr"],
      width=size["width"],
      frozen=True,  # all but the Linear `fc`
    )
  c.model.projection.update(
    hidden=size["hidden"], ecg_hidden=432 if arg.size == "medium" else 0, width=128, norm=True
  )
  c.objectives.dual_phase = dict(
    fn="dual_phase", weight=1.0, w_ed=1.0, w_es=1.0, w_edes=1.0, temperature=0.07
  )
  c.optimizer.update(
    learning_rate=size["learning_rate"],
    warmup=max(c.steps // 5, 1),
    b1=0.9,
    b2=0.95,
    weight_decay=1e-5,
  )
  return c
