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
from mmcl_jax.errors import UserError

# size -> ECG profile of the cohort, samples it sees, mask ratio, share of NCC in the loss, weight
# of SimSiam,         batch, steps, share of warm-up, learning rate, weight decay
SIZES = {
  "test": ("minimal", 500, 0.8, 0.1, 0.1, 8, 6, 0.1, 1e-3, 0.05),
  "demo": ("minimal", 1000, 0.8, 0.1, 0.0, 32, 600, 0.1, 2e-3, 0.05),
  # 400 epochs x 28,000 / 128
  "tiny": ("mmcl", 2500, 0.8, 0.1, 0.0, 128, 87_500, 0.1, 3.2e-4, 0.15),
  # 250 epochs x 47,500 / 64
  "medium": ("dual_phase", 5000, 0.7, 0.1, 0.1, 64, 185_500, 0.16, 1e-4, 1e-4),
  # dual-phase tried it too
  "base": ("dual_phase", 5000, 0.7, 0.1, 0.1, 64, 185_500, 0.16, 1e-4, 1e-4),
  # 400 epochs x 29,000 / 32
  "large": ("minimal", 5000, 0.8, 0.1, 0.0, 32, 362_500, 0.1, 5e-5, 0.05),
}

# ECG profile -> augmentation: strength of phase noise; SD of noise in proportion to the signal, of
# white noise, of gain
AUGMENT = {
  "minimal": (0.05, 0.0, 0.1, 0.05),  # this project's: voltage is informative, so little gain
  # voltage is gone by the z-score; what MMCL calls jitter is in proportion
  "mmcl": (0.1, 0.25, 0.0, 0.5),
  "dual_phase": (0.075, 0.2, 0.0, 0.5),
}


def get_config(arg=None):
  arg = parse_arg(arg, size="demo", batch=0, steps=0)
  if arg.size not in SIZES:
    raise UserError(
      f"the config's argument has size={arg.size}; expected one of {', '.join(SIZES)}"
    )
  profile, samples, mask_ratio, ncc, siamese, batch, steps, warmup, learning_rate, weight_decay = (
    SIZES[arg.size]
  )
  phase, gain_noise, jitter, rescale = AUGMENT[profile]
  c = defaults(arg.batch or batch, arg.steps or steps)  # recordings, updates
  c.data.ecg_profile = profile  # `mmcl prepare --profile`
  c.data.samples = samples  # at 500 Hz, a random crop of the 10 s
  c.augment.ecg.update(
    phase_noise_strength=phase,
    gain_noise_sigma=gain_noise,
    jitter_sigma=jitter,
    rescale_sigma=rescale,
  )

  # patch: samples of one lead; the projection is built and left alone
  c.model.ecg.update(size=arg.size, patch=100, mask_ratio=mask_ratio, siamese=siamese > 0)
  if arg.size == "base":
    c.model.ecg.decoder = (512, 8, 16)  # of He et al. 2022, as in dual-phase's code

  # (1 - w) MSE + w (1 - NCC) with MSE over all patches, as in MMCL's and dual-phase's code.
  c.objectives.reconstruction = dict(fn="mae", weight=1.0, region="all", ncc_weight=ncc)
  if siamese:
    c.objectives.siamese = dict(fn="simsiam", weight=siamese)
  c.optimizer.update(
    learning_rate=learning_rate,
    warmup=max(int(warmup * c.steps), 1),
    b1=0.9,
    b2=0.95,
    weight_decay=weight_decay,
  )
  return c
