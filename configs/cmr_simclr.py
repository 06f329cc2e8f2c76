r"""SimCLR on CMR: MMCL's image encoder before it meets an ECG. A ResNet over three frames, NT-Xent.

    mmcl prepare synthetic --subjects=1600 --out=demo/cohort
    mmcl train --config=configs/cmr_simclr.py:demo --workdir=demo/simclr \
      --config.data.cohort=demo/cohort
    mmcl evaluate --workdir=demo/simclr

Expected time: `:demo` 2 minutes on 2 CPU cores.
Expected score, read from the image: test R2 of LVM 0.68, LVEDV 0.80, LVEF 0.61 (1 seed).
`:r50`, the published size, was not trained here. Next: mmcl.py, by
`--config.init_from.cmr_image=demo/simclr`.

Source: Turgut et al. 2025. What differs: docs/recipes.md.
"""

from mmcl_jax.configuration import defaults, parse_arg

SIZES = {
  "demo": dict(
    image="demo",
    profile="minimal",  # of the cohort that the next stage shares; no ECG is read here
    hidden=128,  # of the head
    width=64,  # of the head
    batch=32,
    steps=600,
    learning_rate=1e-3,
  ),
  "test": dict(
    image="test",
    profile="minimal",
    hidden=16,
    width=8,
    batch=8,
    steps=6,
    learning_rate=1e-3,
  ),
  "r50": dict(
    image="r50",
    profile="mmcl",
    hidden=2048,
    width=128,
    batch=256,
    steps=32_800,  # 300 epochs x 28,000 / 256
    learning_rate=3e-3,
  ),
}


def get_config(arg=None):
  arg = parse_arg(arg, size=SIZES, batch=0, steps=0)
  size = SIZES[arg.size]
  c = defaults(arg.batch or size["batch"], arg.steps or size["steps"])  # images, updates
  # workdir of weights to start from, such as `mmcl convert` makes; "": fresh
  c.init_from = dict(cmr_image="")
  c.data.ecg_profile = size["profile"]

  c.augment.twice = True  # two augmentations of every image are what NT-Xent compares
  # scale, shift: as wide as crops of 60 to 100 % of the area. intensity: brightness, contrast x
  # U(0.5, 1.5), SD 0.29. No left-right flip, which would swap the ventricles; no saturation: the
  # channels are moments, not colours.
  c.augment.cmr.update(rotation_deg=45.0, scale=0.14, shift=0.11, intensity_sigma=0.29)

  c.model.towers.image = dict(fn="resnet", view="three_frames", size=size["image"])
  c.model.projection.update(hidden=size["hidden"], width=size["width"])
  c.objectives.simclr = dict(fn="nt_xent", weight=1.0, of="image", temperature=0.1)
  c.optimizer.update(
    learning_rate=size["learning_rate"],
    warmup=max(c.steps // 10, 1),
    b1=0.9,
    b2=0.999,
    weight_decay=1e-4,
    l2=arg.size != "demo",
  )  # Adam; the demo's scores: AdamW
  return c
