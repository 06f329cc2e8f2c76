"""Joint pre-training: ECG masked autoencoder + dual-phase contrastive loss against the same heart's
CMR at ED and ES.

    mmcl prepare synthetic --subjects=1600 --out=demo/cohort
    mmcl train --config=configs/joint.py:demo --workdir=demo/joint --config.data.cohort=demo/cohort

`:demo` takes 4 to 9 minutes on 2 CPU cores. Test R2 from the ECG alone with 2,700 training
subjects, 3 seeds: LVM 0.39, LVEDV 0.28, LVEF 0.06; an untrained encoder has 0.34, 0.23, 0.06 and
the cohort's ceiling is 0.43, 0.31, 0.09 (synthetic cohort, docs/results.md). The other sizes were
not trained here: `:tiny` (MMCL's ECG encoder), `:medium` (dual-phase's), `:base`, `:large`; e.g.
`:size=base,batch=1024`. `:demo,arm=mae` leaves out the CMR towers, `arm=contrastive` the
reconstruction. `:demo,arm=contrastive,encoder=xresnet1d` or `encoder=s4` takes another ECG encoder;
they have no patches to hide, and so no other arm.
"""

from mmcl_jax.configuration import defaults, parse_arg
from mmcl_jax.data import schema

SIZES = {
  "demo": dict(
    ecg="demo",
    samples=1000,  # at 500 Hz, that the encoder sees at a time
    cmr="demo",
    slices=4,
    width=256,  # of the CMR embedding
    hidden=256,  # of the projections
    batch=32,
    steps=600,
    learning_rate=2e-3,
  ),
  "test": dict(
    ecg="test",
    samples=500,
    cmr="test",
    slices=6,
    width=16,
    hidden=32,
    batch=8,
    steps=6,
    learning_rate=1e-3,
  ),
  "tiny": dict(
    ecg="tiny",
    samples=2500,
    cmr="r50",
    slices=6,
    width=768,
    hidden=512,
    batch=256,
    steps=40_000,
    learning_rate=3e-4,
  ),
  "medium": dict(
    ecg="medium",
    samples=5000,
    cmr="r50",
    slices=6,
    width=768,
    hidden=768,
    batch=256,
    steps=80_000,
    learning_rate=1e-4,
  ),
}
SIZES["base"] = SIZES["medium"] | dict(ecg="base", batch=1024)
SIZES["large"] = SIZES["medium"] | dict(ecg="large", batch=2048, learning_rate=5e-5)
# ECG encoder -> its published size; ecg_vit has that of the recipe
ENCODERS = {"ecg_vit": "", "xresnet1d": "50", "s4": "base"}


def get_config(arg=None):
  arms = "joint", "mae", "contrastive"
  arg = parse_arg(arg, size=SIZES, arm=arms, encoder=ENCODERS, batch=0, steps=0)
  size, arm = SIZES[arg.size], arg.arm
  c = defaults(arg.batch or size["batch"], arg.steps or size["steps"])  # rows, updates
  # module -> workdir of an earlier stage; "": starts fresh
  c.init_from = dict(ecg="", cmr_ed="", cmr_es="")
  c.per_device_batch = 0 if arg.batch else 32  # of `mmcl compile`
  c.data.samples = size["samples"]

  # mild: gain is informative
  c.augment.ecg.update(phase_noise_strength=0.05, jitter_sigma=0.1, rescale_sigma=0.05)
  # no zoom: size is what we look for
  c.augment.cmr.update(rotation_deg=15.0, shift=0.05, intensity_sigma=0.1)

  if arg.encoder == "ecg_vit":
    # patch: samples of one lead
    c.model.towers.ecg = dict(
      fn="ecg_vit",
      view="ecg",
      size=size["ecg"],
      patch=100,
      mask_ratio=0.8 if arm != "contrastive" else 0.0,
    )
  else:
    small = arg.size in ("test", "demo")
    c.model.towers.ecg = dict(
      fn=arg.encoder, view="ecg", size=arg.size if small else ENCODERS[arg.encoder]
    )
  if arm != "mae":
    for phase in schema.PHASES:
      c.model.towers[phase] = dict(
        fn="slow_resnet",
        view=f"{phase}_volume",
        planes=size["slices"],
        size=size["cmr"],
        width=size["width"],
      )
  c.model.projection.update(hidden=size["hidden"], width=128)

  if arm != "contrastive":
    c.objectives.reconstruction = dict(fn="mae", weight=1.0, region="masked", ncc_weight=0.0)
  if arm != "mae":
    c.objectives.dual_phase = dict(
      fn="dual_phase", weight=1.0, w_ed=1.0, w_es=1.0, w_edes=1.0, temperature=0.1
    )
  c.optimizer.update(learning_rate=size["learning_rate"], weight_decay=0.05)
  return c
