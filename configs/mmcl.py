r"""MMCL: an ECG encoder and a ResNet over three frames of the CMR, each pre-trained alone, then
tied to each other.

    mmcl train --config=configs/ecg_mae.py:demo --workdir=demo/mae --config.data.cohort=demo/cohort
    mmcl train --config=configs/cmr_simclr.py:demo --workdir=demo/simclr \
      --config.data.cohort=demo/cohort
    mmcl train --config=configs/mmcl.py:demo --workdir=demo/mmcl --config.data.cohort=demo/cohort \
      --config.init_from.ecg=demo/mae --config.init_from.cmr_image=demo/simclr
    mmcl evaluate --workdir=demo/mmcl

Expected time: the last stage of `:demo` 4 minutes on 2 CPU cores.
Expected score: test R2 of LVM 0.37, LVEDV 0.26, LVEF 0.06 (3 seeds);
untrained 0.34, 0.23, 0.06; docs/results.md.
`:tiny`, the published size, was not trained here. `:demo,arm=wo_mdm` starts the ECG encoder fresh,
and is given `init_from.cmr_image` alone.

Source: Turgut et al. 2025. What differs: docs/recipes.md.
"""

from mmcl_jax.configuration import defaults, parse_arg

SIZES = {
  "demo": dict(
    ecg="demo",
    profile="minimal",  # `mmcl prepare --profile`
    samples=1000,  # at 500 Hz, that the encoder sees, a random crop of the 10 s
    image="demo",
    hidden=128,  # of the projections
    batch=32,
    steps=600,
    learning_rate=dict(mmcl=1e-3, wo_mdm=2e-3),
  ),
  "test": dict(
    ecg="test",
    profile="minimal",
    samples=500,
    image="test",
    hidden=16,
    batch=8,
    steps=6,
    learning_rate=dict(mmcl=1e-3, wo_mdm=1e-3),
  ),
  "tiny": dict(
    ecg="tiny",
    profile="mmcl",
    samples=2500,
    image="r50",
    hidden=512,
    batch=256,
    steps=32_800,  # 300 epochs x 28,000 / 256
    learning_rate=dict(mmcl=1e-4, wo_mdm=3e-4),
  ),
}
ARMS = ("mmcl", "wo_mdm")  # the ECG encoder is pre-trained, or starts fresh


def get_config(arg=None):
  arg = parse_arg(arg, size=SIZES, arm=ARMS, batch=0, steps=0)
  size = SIZES[arg.size]
  fresh = arg.arm == "wo_mdm"
  published = arg.size != "demo"  # the demo's scores were taken with forms of this project's own
  c = defaults(arg.batch or size["batch"], arg.steps or size["steps"])  # pairs, updates
  c.init_from = dict(ecg="", cmr_image="")  # workdirs of ecg_mae.py and cmr_simclr.py
  # what only the masked autoencoder needs
  c.init_except = () if fresh else ("^ecg/(decoder|norm|siamese.*)/",)
  c.data.ecg_profile = size["profile"]
  c.data.samples = size["samples"]

  if size["profile"] == "mmcl":  # noise in proportion to the signal, which MMCL calls jitter
    c.augment.ecg.update(phase_noise_strength=0.1, gain_noise_sigma=0.25, rescale_sigma=0.5)
  else:  # profile minimal keeps voltage, which is informative
    c.augment.ecg.update(phase_noise_strength=0.05, jitter_sigma=0.1, rescale_sigma=0.05)
  c.augment.ecg.phase_noise_always = published
  # As in cmr_simclr.py: crops of 60 to 100 % of the area, brightness, contrast; no flip, which
  # swaps the ventricles.
  c.augment.cmr.update(rotation_deg=45.0, scale=0.14, shift=0.11, intensity_sigma=0.29)

  # patch: samples of one lead
  c.model.towers.ecg = dict(fn="ecg_vit", view="ecg", size=size["ecg"], patch=100, drop_path=0.1)
  if fresh and published:
    c.model.towers.ecg.update(positions="learned", timm_start=True)
  c.model.towers.image = dict(fn="resnet", view="three_frames", size=size["image"])
  c.model.projection.update(hidden=size["hidden"], width=128, norm=False)
  # b_to_a: MMCL's lambda, the weight of "this image among all ECGs".
  c.objectives.contrastive = dict(
    fn="clip", weight=1.0, a="ecg", b="image", b_to_a=0.75, temperature=0.1
  )
  c.optimizer.update(
    learning_rate=size["learning_rate"][arg.arm],
    warmup=max(c.steps // 10, 1),
    b1=0.9,
    b2=0.999,
    weight_decay=1e-4,
    l2=published,
  )  # Adam
  return c
