r"""CardioNets: an ECG encoder tied to a frozen video autoencoder of the cine; hearts alike are no
strong negatives.

    mmcl prepare synthetic --subjects=1600 --out=demo/cohort
    mmcl train --config=configs/cardionets.py:demo,stage=cmr --workdir=demo/cio_cmr --config.data.cohort=demo/cohort
    mmcl train --config=configs/cardionets.py:demo,stage=ecg --workdir=demo/cio_ecg --config.data.cohort=demo/cohort
    mmcl train --config=configs/cardionets.py:demo,stage=align --workdir=demo/cio --config.data.cohort=demo/cohort \
      --config.init_from.ecg=demo/cio_ecg --config.init_from.cmr_cine=demo/cio_cmr
    mmcl evaluate --workdir=demo/cio

Expected time and score: `:demo` takes about 13 minutes on one of 2 CPU cores (1.5 to prepare; 2, 3
and 5 the stages; 1 to evaluate). Test R2, seed 0: LVM 0.45, LVEDV 0.27, LVEF 0.06; an untrained
encoder has 0.34, 0.21, -0.01 and the cohort's ceiling is 0.44, 0.29, 0.07. Retrieval R@10 0.04,
chance 0.03 (synthetic cohort). `:base`, the published size, was not trained here; it needs a cohort
of --profile=cardionets --frames=50 --size=96 --pixel-mm=1.8.

Source: Ding et al. 2026 (NEJM AI). Its ECG encoder starts from the public weights of ST-MEM;
`stage=ecg` takes their place. What else differs: docs/recipes.md.
"""

from mmcl_jax.configuration import defaults, parse_arg
from mmcl_jax.errors import UserError

# size -> ECG encoder, ECG profile of the cohort, samples it sees, its patch, video transformer,
# frames, its patch         (frames, rows, columns), width of the shared space; batch, steps,
# learning rate of cmr and ecg, and of align
SIZES = {
  "test": ("test", "minimal", 500, 100, "test", 4, (2, 16, 16), 16, 8, 6, 1e-3, 8, 6, 1e-3),
  "demo": (
    "demo",
    "minimal",
    1000,
    100,
    "demo",
    10,
    (2, 16, 16),
    128,
    32,
    600,
    2e-3,
    32,
    600,
    1e-3,
  ),
  "base": (
    "base",
    "cardionets",
    2250,
    75,
    "base",
    50,
    (2, 16, 16),
    256,  # 9 s at 250 Hz
    128,
    92_800,
    5e-4,  # 400 epochs x 29,700 / 128; 1e-3 x 128 / 256
    256,
    11_600,
    1e-3,
  ),  # 100 epochs x 29,700 / 256
}
STAGES = ("cmr", "ecg", "align")
# of align: that of stage=ecg, or ST-MEM's, whose published weights `mmcl convert` reads
ENCODERS = ("vit", "st_mem")


def get_config(arg=None):
  arg = parse_arg(arg, size="demo", batch=0, steps=0, stage="align", encoder="vit")
  for name, known in (("size", SIZES), ("stage", STAGES), ("encoder", ENCODERS)):
    if arg[name] not in known:
      raise UserError(
        f"the config's argument has {name}={arg[name]}; expected one of {', '.join(known)}"
      )
  ecg, profile, samples, ecg_patch, cmr, frames, cmr_patch, width, *training = SIZES[arg.size]
  aligns = arg.stage == "align"
  batch, steps, learning_rate = training[3:] if aligns else training[:3]
  c = defaults(arg.batch or batch, arg.steps or steps)  # rows, updates
  c.init_from = dict(ecg="", cmr_cine="")  # of align: workdirs of ecg and cmr
  c.data.ecg_profile = profile  # `mmcl prepare --profile`
  c.data.samples = samples  # a random crop of the 10 s
  c.model.projection.update(hidden=width, width=width)
  warmup = c.steps // 5 if aligns else c.steps // 10  # 20 of 100 epochs, 40 of 400
  c.optimizer.update(
    learning_rate=learning_rate, warmup=max(warmup, 1), b1=0.9, b2=0.95, weight_decay=0.05
  )

  if arg.stage in ("ecg", "align"):
    # patch: samples of one lead
    c.model.ecg.update(size=ecg, patch=ecg_patch, mask_ratio=0.0 if aligns else 0.75)
    if arg.size == "base" and not aligns:
      c.model.ecg.decoder = (256, 4, 4)  # ST-MEM's: width, blocks, heads
  if arg.stage in ("cmr", "align"):
    c.model.cmr = dict(
      cine=dict(
        kind="vit",
        size=cmr,
        view="cine_slice",
        planes=frames,
        width=0,
        patch=cmr_patch,
        # its head trains
        mask_ratio=0.0 if aligns else 0.75,
        drop_path=0.0,
        frozen=aligns,
      )
    )

  if arg.stage == "cmr":
    c.objectives.video = dict(fn="cmr_mae", weight=1.0, of="cine", norm_pix=False)
  if arg.stage == "ecg":
    c.objectives.reconstruction = dict(
      fn="mae", weight=1.0, region="masked", ncc_weight=0.0, norm_pix=arg.size != "demo"
    )  # ST-MEM; the demo's: without
  if aligns:  # left behind: the decoders
    c.init_except = ("^ecg/(decoder|norm)/", "^cmr_cine/backbone/decoder/")
    if arg.encoder == "st_mem":
      c.model.ecg.update(kind="st_mem", positions="learned")
      c.init_except = ("^cmr_cine/backbone/decoder/",)
    c.objectives.contrastive = dict(
      fn="phenotype_weighted", weight=1.0, a="ecg", b="cine", temperature=0.05, sigma=0.5
    )
  return c
