r"""CardiacNets: an ECG encoder that knows age, sex and body size, tied to short-axis and long-axis
CMR encoders.

    mmcl prepare synthetic --lax --subjects=1600 --out=demo/lax
    mmcl train --config=configs/cardiacnets.py:demo,stage=cmr --workdir=demo/cn_cmr \
      --config.data.cohort=demo/lax
    mmcl train --config=configs/cardiacnets.py:demo,stage=ecg --workdir=demo/cn_ecg \
      --config.data.cohort=demo/lax
    mmcl train --config=configs/cardiacnets.py:demo,stage=align --workdir=demo/cn \
      --config.data.cohort=demo/lax \
      --config.init_from.ecg=demo/cn_ecg --config.init_from.cmr_sax=demo/cn_cmr \
      --config.init_from.cmr_lax=demo/cn_cmr
    mmcl evaluate --workdir=demo/cn

Expected time and score: `:demo` takes about 20 minutes on one of 2 CPU cores (2 to prepare; 10, 3
and 4 the stages; 1 to evaluate). Test R2, seed 0: LVM 0.66, LVEDV 0.53, LVEF 0.06, of an encoder
that is given age, sex and body size; the covariates alone have 0.58, 0.47, 0.06 and an untrained
encoder 0.34, 0.21, -0.01. Retrieval R@10 0.08, chance 0.03 (synthetic cohort). In the demo
covariates act before the blocks, the embedding is the mean token, and CMR heads learn. `:large`,
the published size, has the published forms and was not trained here.

Source: Ding et al. 2024 (arXiv 2411.13602 v1). Its CMR encoders are Swin-B; here they are ViT-B,
with all frames in one patch as they are channels there. What else differs: docs/recipes.md.
"""

from mmcl_jax.configuration import defaults, parse_arg

SIZES = {
  "demo": dict(
    ecg="demo",
    samples=1000,  # at 500 Hz, that the encoder sees
    cmr="demo",
    frames=25,
    patch=(25, 8, 8),  # frames, rows, columns
    width=128,  # of the shared space
    batch=dict(cmr=32, ecg=32, align=32),
    steps=dict(cmr=600, ecg=600, align=600),
    learning_rate=dict(cmr=1e-3, ecg=2e-3, align=1e-3),
  ),
  "test": dict(
    ecg="test",
    samples=500,
    cmr="test",
    frames=5,
    patch=(5, 16, 16),
    width=16,
    batch=dict(cmr=8, ecg=8, align=8),
    steps=dict(cmr=6, ecg=6, align=6),
    learning_rate=dict(cmr=1e-3, ecg=1e-3, align=1e-3),
  ),
  "large": dict(
    ecg="large",
    samples=5000,
    cmr="base",
    frames=50,
    patch=(50, 16, 16),
    width=256,
    batch=dict(cmr=64, ecg=32, align=64),
    # 400 epochs x 29,000 / batch
    steps=dict(cmr=181_250, ecg=362_500, align=181_250),
    # align: 1e-4 x 64 / 256
    learning_rate=dict(cmr=1e-4, ecg=5e-5, align=2.5e-5),
  ),
}
STAGES = ("align", "cmr", "ecg")


def get_config(arg=None):
  arg = parse_arg(arg, size=SIZES, stage=STAGES, batch=0, steps=0)
  size = SIZES[arg.size]
  batch, steps = size["batch"][arg.stage], size["steps"][arg.stage]
  published = arg.size != "demo"  # the demo's scores were taken with forms of this project's own
  c = defaults(arg.batch or batch, arg.steps or steps)  # rows, updates
  c.init_from = dict(ecg="", cmr_sax="", cmr_lax="")  # of align: workdirs of ecg, twice of cmr
  c.data.samples = size["samples"]
  # hidden 0: one Linear
  c.model.projection.update(hidden=0 if published else size["width"], width=size["width"])
  c.optimizer.update(
    learning_rate=size["learning_rate"][arg.stage],
    warmup=max(c.steps // 10, 1),
    b1=0.9,
    b2=0.95,
    weight_decay=0.05,
  )
  if arg.stage == "cmr":
    add_cmr_towers(c, size, aligns=False)
    mask_cmr(c)
  elif arg.stage == "ecg":
    add_ecg_tower(c, size, published, aligns=False)
    mask_ecg(c, published)
  else:
    add_ecg_tower(c, size, published, aligns=True)
    add_cmr_towers(c, size, aligns=True)
    align(c, published)
  return c


def add_ecg_tower(c, size, published, aligns):
  c.augment.ecg.update(time_flip=0.33, sign_flip=0.33)  # probabilities
  c.model.towers.ecg = dict(
    fn="ecg_vit",
    view="ecg",
    size=size["ecg"],
    patch=100,
    mask_ratio=0.0 if aligns else 0.8,
    film=aligns,  # by the covariates
    film_after=aligns and published,
    pool="cls" if published else "mean",
    dropout=0.05 if aligns and published else 0.0,
  )


def add_cmr_towers(c, size, aligns):
  for name, view in (("sax", "cine_slice"), ("lax", "lax")):
    c.model.towers[name] = dict(
      fn="video_vit",
      view=view,
      planes=size["frames"],
      size=size["cmr"],
      patch=size["patch"],
      mask_ratio=0.0 if aligns else 0.5,
      frozen=aligns,
    )


def mask_cmr(c):
  # Crops of 80 to 100 % of the area. No flips: left to right swaps the ventricles.
  c.augment.cmr.update(rotation_deg=30.0, scale=0.06, shift=0.05)
  c.objectives.sax_mim = dict(fn="cmr_mae", weight=1.0, of="sax", norm_pix=False)
  c.objectives.lax_mim = dict(fn="cmr_mae", weight=1.0, of="lax", norm_pix=False)
  c.objectives.sax_lax = dict(fn="clip", weight=1.0, a="sax", b="lax", b_to_a=0.5, temperature=0.1)


def mask_ecg(c, published):
  # As in MMCL's code, which the name of CardiacNets' checkpoint points to.
  region, ncc = ("all", 0.1) if published else ("masked", 0.0)
  c.objectives.reconstruction = dict(fn="mae", weight=1.0, region=region, ncc_weight=ncc)


def align(c, published):
  # left behind: the decoders and the norm that the pooling has no use for; fresh: FiLM
  unread = "fc_norm" if published else "norm"
  c.init_except = (f"^ecg/(decoder|{unread}|film)/", "^cmr_(sax|lax)/backbone/decoder/")
  if published:  # random projections of the CMR; with freeze=() they learn
    c.freeze = ("^head_(sax|lax)/",)
  for view in ("sax", "lax"):
    c.objectives[f"ecg_{view}"] = dict(
      fn="clip", weight=1.0, a="ecg", b=view, b_to_a=0.5, temperature=0.1
    )
