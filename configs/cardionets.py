r"""CardioNets: an ECG encoder tied to a frozen video autoencoder of the cine; hearts alike are no
strong negatives.

    mmcl prepare synthetic --subjects=1600 --out=demo/cohort
    mmcl train --config=configs/cardionets.py:demo,stage=cmr --workdir=demo/cio_cmr \
      --config.data.cohort=demo/cohort
    mmcl train --config=configs/cardionets.py:demo,stage=ecg --workdir=demo/cio_ecg \
      --config.data.cohort=demo/cohort
    mmcl train --config=configs/cardionets.py:demo,stage=align --workdir=demo/cio \
      --config.data.cohort=demo/cohort \
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

SIZES = {
  "demo": dict(
    ecg="demo",
    profile="minimal",  # `mmcl prepare --profile`
    samples=1000,  # that the encoder sees, a random crop of the 10 s
    patch=100,  # samples of one lead
    cmr="demo",
    frames=10,
    cmr_patch=(2, 16, 16),  # frames, rows, columns
    width=128,  # of the shared space
    pretrain=dict(batch=32, steps=600, learning_rate=2e-3),  # stages cmr and ecg
    align=dict(batch=32, steps=600, learning_rate=1e-3),
  ),
  "test": dict(
    ecg="test",
    profile="minimal",
    samples=500,
    patch=100,
    cmr="test",
    frames=4,
    cmr_patch=(2, 16, 16),
    width=16,
    pretrain=dict(batch=8, steps=6, learning_rate=1e-3),
    align=dict(batch=8, steps=6, learning_rate=1e-3),
  ),
  "base": dict(
    ecg="base",
    profile="cardionets",
    samples=2250,  # 9 s at 250 Hz
    patch=75,
    cmr="base",
    frames=50,
    cmr_patch=(2, 16, 16),
    width=256,
    # 400 epochs x 29,700 / 128; 1e-3 x 128 / 256
    pretrain=dict(batch=128, steps=92_800, learning_rate=5e-4),
    # 100 epochs x 29,700 / 256
    align=dict(batch=256, steps=11_600, learning_rate=1e-3),
  ),
}
STAGES = ("align", "cmr", "ecg")
# of align: that of stage=ecg, or ST-MEM's, whose published weights `mmcl convert` reads
ENCODERS = ("ecg_vit", "st_mem")


def get_config(arg=None):
  arg = parse_arg(arg, size=SIZES, stage=STAGES, encoder=ENCODERS, batch=0, steps=0)
  size = SIZES[arg.size]
  aligns = arg.stage == "align"
  training = size["align"] if aligns else size["pretrain"]
  c = defaults(arg.batch or training["batch"], arg.steps or training["steps"])  # rows, updates
  c.init_from = dict(ecg="", cmr_cine="")  # of align: workdirs of ecg and cmr
  c.data.ecg_profile = size["profile"]
  c.data.samples = size["samples"]
  c.model.projection.update(hidden=size["width"], width=size["width"])
  warmup = c.steps // 5 if aligns else c.steps // 10  # 20 of 100 epochs, 40 of 400
  c.optimizer.update(
    learning_rate=training["learning_rate"],
    warmup=max(warmup, 1),
    b1=0.9,
    b2=0.95,
    weight_decay=0.05,
  )

  if arg.stage in ("ecg", "align"):
    c.model.towers.ecg = dict(fn="ecg_vit", view="ecg", size=size["ecg"], patch=size["patch"])
    if not aligns:
      c.model.towers.ecg.mask_ratio = 0.75
    if arg.size == "base" and not aligns:
      c.model.towers.ecg.decoder = (256, 4, 4)  # ST-MEM's: width, blocks, heads
  if arg.stage in ("cmr", "align"):
    c.model.towers.cine = dict(
      fn="video_vit",
      view="cine_slice",
      planes=size["frames"],
      size=size["cmr"],
      patch=size["cmr_patch"],
      mask_ratio=0.0 if aligns else 0.75,
      frozen=aligns,  # its head trains
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
      c.model.towers.ecg.fn = "st_mem"
      c.init_except = ("^cmr_cine/backbone/decoder/",)
    c.objectives.contrastive = dict(
      fn="phenotype_weighted", weight=1.0, a="ecg", b="cine", temperature=0.05, sigma=0.5
    )
  return c
