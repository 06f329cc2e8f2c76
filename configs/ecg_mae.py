"""ECG masked autoencoder: the first stage of MMCL (`:tiny`), dual-phase (`:medium`) and CardiacNets
(`:large`).

    mmcl prepare synthetic --subjects=1600 --out=demo/cohort
    mmcl train --config=configs/ecg_mae.py:demo --workdir=demo/mae --config.data.cohort=demo/cohort
    mmcl evaluate --workdir=demo/mae

Expected time: `:demo` 3 minutes on 2 CPU cores.
Expected score: test R2 of LVM 0.35, LVEDV 0.24, LVEF 0.05 (3 seeds);
untrained 0.34, 0.23, 0.06; docs/results.md.
The published sizes were not trained here. Next: mmcl.py, dual_phase.py, arms.py, supervised.py, by
`--config.init_from.ecg=demo/mae`.

Sources: Turgut et al. 2025 (MMCL; its code of 2023), Alvarez-Florez et al. 2026, Ding et al. 2024.
What differs: docs/recipes.md.
"""

from mmcl_jax.configuration import defaults, parse_arg

SIZES = {
  "demo": dict(
    profile="minimal",  # `mmcl prepare --profile`
    samples=1000,  # at 500 Hz, that the encoder sees, a random crop of the 10 s
    mask_ratio=0.8,
    ncc=0.1,  # share of NCC in the loss
    siamese=0.0,  # weight of SimSiam
    batch=32,
    steps=600,
    warmup=0.1,  # share of the steps
    learning_rate=2e-3,
    weight_decay=0.05,
  ),
  "test": dict(
    profile="minimal",
    samples=500,
    mask_ratio=0.8,
    ncc=0.1,
    siamese=0.1,
    batch=8,
    steps=6,
    warmup=0.1,
    learning_rate=1e-3,
    weight_decay=0.05,
  ),
  "tiny": dict(
    profile="mmcl",
    samples=2500,
    mask_ratio=0.8,
    ncc=0.1,
    siamese=0.0,
    batch=128,
    steps=87_500,  # 400 epochs x 28,000 / 128
    warmup=0.1,
    learning_rate=3.2e-4,
    weight_decay=0.15,
  ),
  "medium": dict(
    profile="dual_phase",
    samples=5000,
    mask_ratio=0.7,
    ncc=0.1,
    siamese=0.1,
    batch=64,
    steps=185_500,  # 250 epochs x 47,500 / 64
    warmup=0.16,
    learning_rate=1e-4,
    weight_decay=1e-4,
  ),
  "large": dict(
    profile="minimal",
    samples=5000,
    mask_ratio=0.8,
    ncc=0.1,
    siamese=0.0,
    batch=32,
    steps=362_500,  # 400 epochs x 29,000 / 32
    warmup=0.1,
    learning_rate=5e-5,
    weight_decay=0.05,
  ),
}
SIZES["base"] = SIZES["medium"]  # dual-phase tried it too

# ECG profile -> augmentation. gain_noise is in proportion to the signal, jitter is white noise.
AUGMENT = {
  # this project's: voltage is informative, so little gain
  "minimal": dict(phase_noise_strength=0.05, jitter_sigma=0.1, rescale_sigma=0.05),
  # voltage is gone by the z-score; what MMCL calls jitter is in proportion
  "mmcl": dict(phase_noise_strength=0.1, gain_noise_sigma=0.25, rescale_sigma=0.5),
  "dual_phase": dict(phase_noise_strength=0.075, gain_noise_sigma=0.2, rescale_sigma=0.5),
}


def get_config(arg=None):
  arg = parse_arg(arg, size=SIZES, batch=0, steps=0)
  size = SIZES[arg.size]
  c = defaults(arg.batch or size["batch"], arg.steps or size["steps"])  # recordings, updates
  c.data.ecg_profile = size["profile"]
  c.data.samples = size["samples"]
  c.augment.ecg.update(AUGMENT[size["profile"]])

  # patch: samples of one lead; the projection is built and left alone
  c.model.towers.ecg = dict(
    fn="ecg_vit",
    view="ecg",
    size=arg.size,
    patch=100,
    mask_ratio=size["mask_ratio"],
    siamese=size["siamese"] > 0,
  )
  if arg.size == "base":
    c.model.towers.ecg.decoder = (512, 8, 16)  # of He et al. 2022, as in dual-phase's code

  # (1 - w) MSE + w (1 - NCC) with MSE over all patches, as in MMCL's and dual-phase's code.
  c.objectives.reconstruction = dict(fn="mae", weight=1.0, region="all", ncc_weight=size["ncc"])
  if size["siamese"]:
    c.objectives.siamese = dict(fn="simsiam", weight=size["siamese"])
  c.optimizer.update(
    learning_rate=size["learning_rate"],
    warmup=max(int(size["warmup"] * c.steps), 1),
    b1=0.9,
    b2=0.95,
    weight_decay=size["weight_decay"],
  )
  return c
