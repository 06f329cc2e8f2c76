"""Joint pre-training: ECG masked autoencoder + dual-phase contrastive loss against the same heart's CMR at ED and ES.

    mmcl prepare synthetic --subjects=1600 --out=demo/cohort
    mmcl train --config=configs/joint.py:demo --workdir=demo/joint --config.data.cohort=demo/cohort

`:demo` takes about 4 minutes on 2 CPU cores. Test R2 from the ECG alone with 2,700 training subjects, 3 seeds: LVM 0.38,
LVEDV 0.26, LVEF 0.05; an untrained encoder has 0.35, 0.24, 0.05 and the cohort's ceiling is 0.43, 0.31, 0.09 (synthetic
cohort, docs/results.md). The other sizes were not trained here: `:tiny` (MMCL's ECG encoder), `:medium` (dual-phase's),
`:base`, `:large`; e.g. `:size=base,batch=1024`. `:demo,arm=mae` leaves out the CMR towers, `arm=contrastive` the
reconstruction.
"""

from ml_collections import ConfigDict

from mmcl_jax.configuration import parse_arg

# size -> ECG encoder, samples it sees, CMR encoder, slices it sees, width of the CMR embedding, hidden width of the heads,
#         batch, steps, learning rate
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
  if arg.size not in SIZES or arg.arm not in ("joint", "mae", "contrastive"):
    raise ValueError(f"size={arg.size}, arm={arg.arm}; expected a size out of {', '.join(SIZES)} and an arm out of "
                     "joint, mae, contrastive")
  ecg, samples, cmr, slices, cmr_width, hidden, batch, steps, learning_rate = SIZES[arg.size]
  c = ConfigDict()
  c.seed = 0                      # of parameters, order of the data, augmentation and masks
  c.batch = arg.batch or batch    # global batch size; divisible by the devices of the data axis
  c.steps = arg.steps or steps    # updates

  c.data = ConfigDict()
  c.data.cohort = ""              # folder made by `mmcl prepare`
  c.data.mix = ()                 # further cohorts and their shares of a batch, e.g. (("ptbxl", 0.3),); may be ECG alone
  c.data.ecg_profile = "minimal"  # normalisation the cohort was prepared with; `mmcl embed` applies the same
  c.data.samples = samples        # samples the model sees at a time; longer recordings: the mean over windows
  c.data.views = ("ed_es_volumes",) if arg.arm != "mae" else ()

  c.augment = ConfigDict()
  c.augment.ecg = dict(phase_noise_strength=0.05, jitter_sigma=0.1, rescale_sigma=0.05)  # normalised units; gain is informative
  c.augment.cmr = dict(rotation_deg=15.0, scale=0.0, shift=0.05, intensity_sigma=0.1)    # no zoom: size is what we look for

  c.model = ConfigDict()
  c.model.ecg = dict(size=ecg, patch=100, mask_ratio=0.8, drop_path=0.0)  # patch in samples of one lead
  c.model.cmr = dict(size=cmr if arg.arm != "mae" else "", slices=slices, width=cmr_width)  # middle slices; "": no towers
  c.model.projection = dict(hidden=hidden, width=128)
  c.model.learned_temperature = 0.0  # where a learned temperature starts; 0: the objective's fixed one
  c.model.max_scale = 100.0          # cap of a learned 1 / temperature
  c.model.dtype = "float32"          # of matrix products: float32 or bfloat16

  c.objectives = ConfigDict()
  if arg.arm != "contrastive":
    c.objectives.reconstruction = dict(fn="mae", weight=1.0, region="masked", ncc_weight=0.0)
  if arg.arm != "mae":
    c.objectives.dual_phase = dict(fn="dual_phase", weight=1.0, w_ed=1.0, w_es=1.0, w_edes=1.0, temperature=0.1)

  c.optimizer = dict(learning_rate=learning_rate, warmup=max(c.steps // 10, 1), b1=0.9, b2=0.95, weight_decay=0.05, clip=1.0)
  c.mesh = dict(data=-1, model=1)  # devices along each axis; -1: all that are left
  c.sharding = ()                  # (regex, spec) rules for parameters and optimiser; nothing matched: replicated
  c.loader = dict(threads=2, buffer=4, workers=0)
  c.every = dict(log=10, evaluate=max(c.steps // 3, 1), save=max(c.steps // 3, 1))  # steps
  c.keep = 2                       # checkpoints kept
  c.evaluators = ("losses", "phenotypes")  # on the validation split, every.evaluate steps
  return c
