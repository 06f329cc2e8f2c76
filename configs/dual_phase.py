r"""Dual-phase contrastive learning: an ECG encoder tied to frozen CMR encoders of end-diastole and
end-systole.

    mmcl train --config=configs/ecg_mae.py:demo --workdir=demo/mae --config.data.cohort=demo/cohort
    mmcl train --config=configs/cmr_phenotype.py:demo --workdir=demo/ed --config.data.cohort=demo/cohort
    mmcl train --config=configs/cmr_phenotype.py:demo,view=es_volume --workdir=demo/es --config.data.cohort=demo/cohort
    mmcl train --config=configs/dual_phase.py:demo --workdir=demo/dual --config.data.cohort=demo/cohort \
      --config.init_from.ecg=demo/mae --config.init_from.cmr_ed=demo/ed --config.init_from.cmr_es=demo/es
    mmcl evaluate --workdir=demo/dual

Expected time: the last stage of `:demo` 4 minutes on 2 CPU cores; frozen encoders run once.
Expected score: test R2 of LVM 0.40, LVEDV 0.28, LVEF 0.07 (3 seeds);
untrained 0.34, 0.23, 0.06; docs/results.md.
`:medium`, the published size, was not trained here. arms.py has this and its four rivals.

Source: Alvarez-Florez et al. 2026. What differs: docs/recipes.md.
"""

from mmcl_jax.configuration import defaults, parse_arg
from mmcl_jax.data import schema
from mmcl_jax.errors import UserError

# size -> ECG encoder, ECG profile of the cohort, samples it sees, width of its head, 3-D ResNet,
# width of its         embedding, hidden width of the projections, batch, steps, learning rate
SIZES = {
  "test": ("test", "minimal", 500, 16, "test", 16, 32, 8, 6, 1e-3),
  "demo": ("demo", "minimal", 1000, 256, "demo", 256, 256, 32, 600, 1e-3),
  # 200 epochs x 23,940 / 64
  "medium": ("medium", "dual_phase", 5000, 1000, "r50", 768, 768, 64, 74_800, 1e-5),
}


def get_config(arg=None):
  arg = parse_arg(arg, size="demo", batch=0, steps=0)
  if arg.size not in SIZES:
    raise UserError(
      f"the config's argument has size={arg.size}; expected one of {', '.join(SIZES)}"
    )
  ecg, profile, samples, head, cmr, width, hidden, batch, steps, learning_rate = SIZES[arg.size]
  c = defaults(arg.batch or batch, arg.steps or steps)  # pairs, updates
  # workdirs of ecg_mae.py and, by view, of cmr_phenotype.py
  c.init_from = dict(ecg="", cmr_ed="", cmr_es="")
  # left behind there: the autoencoder's; fresh here: the head
  c.init_except = ("^ecg/(decoder|norm|siamese.*|head)/",)
  c.data.ecg_profile = profile  # `mmcl prepare --profile`
  c.data.samples = samples  # at 500 Hz; the published size sees all 10 s
  # No augmentation of the ECG, as published. Frozen encoders see the images as they are: the
  # published flip, drawn apart for ED and ES, would swap the ventricles of one of them.

  # patch: samples of one lead; head: timm's
  c.model.ecg.update(
    size=ecg, patch=100, pool="mean", head=head, drop_path=0.0 if arg.size == "demo" else 0.1
  )  # the demo's scores: without
  # slices
  c.model.cmr = {
    phase: dict(
      kind="slow_resnet",
      size=cmr,
      view=f"{phase}_volume",
      planes=6,
      width=width,
      # all but the Linear `fc`
      patch=(1, 16, 16),
      mask_ratio=0.0,
      drop_path=0.0,
      frozen=True,
    )
    for phase in schema.PHASES
  }
  c.model.projection.update(
    hidden=hidden, ecg_hidden=432 if arg.size == "medium" else 0, width=128, norm=True
  )
  c.objectives.dual_phase = dict(
    fn="dual_phase", weight=1.0, w_ed=1.0, w_es=1.0, w_edes=1.0, temperature=0.07
  )
  c.optimizer.update(
    learning_rate=learning_rate, warmup=max(c.steps // 5, 1), b1=0.9, b2=0.95, weight_decay=1e-5
  )
  return c
