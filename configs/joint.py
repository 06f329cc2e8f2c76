"""Joint pre-training: ECG masked autoencoder + dual-phase contrastive loss against the same heart's
CMR at ED and ES.

    mmcl prepare synthetic --subjects=1600 --out=demo/cohort
    mmcl train --config=configs/joint.py:demo --workdir=demo/joint --config.data.cohort=demo/cohort

`:demo` takes 4 to 9 minutes on 2 CPU cores. Test R2 from the ECG alone with 2,700 training
subjects, 3 seeds: LVM 0.39, LVEDV 0.28, LVEF 0.06; an untrained encoder has 0.34, 0.23, 0.06 and
the cohort's ceiling is 0.43, 0.31, 0.09 (synthetic cohort, docs/results.md). The other sizes were
not trained here: `:tiny` (MMCL's ECG encoder), `:medium` (dual-phase's), `:base`, `:large`; e.g.
`:size=base,batch=1024`. `:demo,arm=mae` leaves out the CMR towers, `arm=contrastive` the
reconstruction.
"""

from mmcl_jax.configuration import defaults, parse_arg
from mmcl_jax.data import schema
from mmcl_jax.errors import UserError

# size -> ECG encoder, samples it sees, CMR encoder, slices it sees, width of the CMR embedding,
# hidden width of the         heads, batch, steps, learning rate
SIZES = {
  "test": ("test", 500, "test", 6, 16, 32, 8, 6, 1e-3),
  "demo": ("demo", 1000, "demo", 4, 256, 256, 32, 600, 2e-3),
  "tiny": ("tiny", 2500, "r50", 6, 768, 512, 256, 40_000, 3e-4),
  "medium": ("medium", 5000, "r50", 6, 768, 768, 256, 80_000, 1e-4),
  "base": ("base", 5000, "r50", 6, 768, 768, 1024, 80_000, 1e-4),
  "large": ("large", 5000, "r50", 6, 768, 768, 2048, 80_000, 5e-5),
}


def get_config(arg=None):
  arg = parse_arg(arg, size="demo", batch=0, steps=0, arm="joint")
  for name, known in (("size", SIZES), ("arm", ("joint", "mae", "contrastive"))):
    if arg[name] not in known:
      raise UserError(
        f"the config's argument has {name}={arg[name]}; expected one of {', '.join(known)}"
      )
  arm = arg.arm
  ecg, samples, cmr, slices, cmr_width, hidden, batch, steps, learning_rate = SIZES[arg.size]
  c = defaults(arg.batch or batch, arg.steps or steps)  # rows, updates
  # module -> workdir of an earlier stage; "": starts fresh
  c.init_from = dict(ecg="", cmr_ed="", cmr_es="")
  c.per_device_batch = 0 if arg.batch else 32  # of `mmcl compile`
  c.data.samples = samples  # samples it sees at a time

  # mild: gain is informative
  c.augment.ecg.update(phase_noise_strength=0.05, jitter_sigma=0.1, rescale_sigma=0.05)
  # no zoom: size is what we look for
  c.augment.cmr.update(rotation_deg=15.0, shift=0.05, intensity_sigma=0.1)

  # patch: samples of one lead
  c.model.ecg.update(size=ecg, patch=100, mask_ratio=0.8 if arm != "contrastive" else 0.0)
  # planes: slices
  tower = dict(
    kind="slow_resnet",
    size=cmr,
    planes=slices,
    width=cmr_width,
    frozen=False,
    patch=(1, 16, 16),
    mask_ratio=0.0,
    drop_path=0.0,
  )  # of kind="vit"
  c.model.cmr = (
    {phase: tower | dict(view=f"{phase}_volume") for phase in schema.PHASES} if arm != "mae" else {}
  )
  c.model.projection.update(hidden=hidden, width=128)

  if arm != "contrastive":
    c.objectives.reconstruction = dict(fn="mae", weight=1.0, region="masked", ncc_weight=0.0)
  if arm != "mae":
    c.objectives.dual_phase = dict(
      fn="dual_phase", weight=1.0, w_ed=1.0, w_es=1.0, w_edes=1.0, temperature=0.1
    )
  c.optimizer.update(learning_rate=learning_rate, weight_decay=0.05)
  return c
