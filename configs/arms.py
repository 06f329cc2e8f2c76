r"""The five arms of Bujalance Gomez et al. 2026: what part of the CMR an ECG encoder learns from,
all else being equal.

    mmcl train --config=configs/ecg_mae.py:demo --workdir=demo/mae --config.data.cohort=demo/cohort
    mmcl train --config=configs/cmr_phenotype.py:demo,view=cine_slice --workdir=demo/cine \
      --config.data.cohort=demo/cohort
    mmcl train --config=configs/arms.py:demo,arm=cine_slice --workdir=demo/arm_cine \
      --config.data.cohort=demo/cohort \
      --config.init_from.ecg=demo/mae --config.init_from.cmr_cine=demo/cine
    mmcl evaluate --workdir=demo/arm_cine

    arm         from the CMR                                   config.init_from
    ecg_only    nothing: as many further updates of the MAE    ecg
    ed_slice    the middle slice at ED                         ecg, cmr_slice (view=ed_slice)
    cine_slice  the middle slice over the beat                 ecg, cmr_cine (view=cine_slice)
    ed_volume   six slices at ED                               ecg, cmr_ed (view=ed_volume)
    dual_phase  six slices at ED and at ES                     ecg, cmr_ed, cmr_es (view=es_volume)

Expected time: an arm of `:demo` 3 to 6 minutes on 2 CPU cores, two at a time.
Expected scores, test R2 of LVM, LVEDV, LVEF: ecg_only 0.35, 0.24, 0.05;
ed_slice 0.41, 0.29, 0.07; cine_slice 0.41, 0.29, 0.07;
ed_volume 0.41, 0.28, 0.07; dual_phase 0.40, 0.28, 0.07 (docs/results.md).
`:medium`, the published size, was not trained here. arm=dual_phase is configs/dual_phase.py. What
differs: docs/recipes.md.
"""

from mmcl_jax.configuration import defaults, parse_arg

SIZES = {
  "demo": dict(
    ecg="demo",
    profile="minimal",  # `mmcl prepare --profile`
    samples=1000,  # at 500 Hz, that the encoder sees
    mask_ratio=0.8,
    siamese=0.0,  # weight of SimSiam in the masked autoencoder
    head=256,
    cmr="demo",
    frames=5,  # of a cine
    width=256,  # of the CMR embedding
    hidden=256,  # of the projections
    batch=32,
    steps=600,
    learning_rate=1e-3,
  ),
  "test": dict(
    ecg="test",
    profile="minimal",
    samples=500,
    mask_ratio=0.8,
    siamese=0.1,
    head=16,
    cmr="test",
    frames=3,
    width=16,
    hidden=32,
    batch=8,
    steps=6,
    learning_rate=1e-3,
  ),
  "medium": dict(  # as dual_phase.py
    ecg="medium",
    profile="dual_phase",
    samples=5000,  # all 10 s
    mask_ratio=0.7,
    siamese=0.1,
    head=1000,
    cmr="r50",
    frames=50,
    width=768,
    hidden=768,
    batch=64,
    steps=74_800,
    learning_rate=1e-5,
  ),
}
TOWERS = {  # tower -> view, slices; 0: the frames of a cine
  "slice": ("ed_slice", 1),
  "cine": ("cine_slice", 0),
  "ed": ("ed_volume", 6),
  "es": ("es_volume", 6),
}
ARMS = {
  "dual_phase": ("ed", "es"),
  "ecg_only": (),
  "ed_slice": ("slice",),
  "cine_slice": ("cine",),
  "ed_volume": ("ed",),
}


def get_config(arg=None):
  arg = parse_arg(arg, size=SIZES, arm=ARMS, batch=0, steps=0)
  size, towers = SIZES[arg.size], ARMS[arg.arm]
  c = defaults(arg.batch or size["batch"], arg.steps or size["steps"])  # pairs, updates
  # workdirs of ecg_mae.py and cmr_phenotype.py
  c.init_from = dict(ecg="") | {f"cmr_{name}": "" for name in towers}
  c.data.ecg_profile = size["profile"]
  c.data.samples = size["samples"]
  c.optimizer.update(
    learning_rate=size["learning_rate"], warmup=max(c.steps // 5, 1), weight_decay=1e-5
  )
  # patch: samples of one lead
  c.model.towers.ecg = dict(fn="ecg_vit", view="ecg", size=size["ecg"], patch=100)
  if towers:
    learn_from_cmr(c, arg, size, towers)
  else:  # goes on as ecg_mae.py does, decoder and all
    c.model.towers.ecg.update(mask_ratio=size["mask_ratio"], siamese=size["siamese"] > 0)
    c.objectives.reconstruction = dict(fn="mae", weight=1.0, region="all", ncc_weight=0.1)
    if size["siamese"]:
      c.objectives.siamese = dict(fn="simsiam", weight=size["siamese"])
  return c


def learn_from_cmr(c, arg, size, towers):
  # left behind there: the autoencoder's; fresh here: the head
  c.init_except = ("^ecg/(decoder|norm|siamese.*|head)/",)
  drop_path = 0.0 if arg.size == "demo" else 0.1  # the demo's scores: without
  c.model.towers.ecg.update(head=size["head"], drop_path=drop_path)
  for name in towers:
    view, slices = TOWERS[name]
    c.model.towers[name] = dict(
      fn="slow_resnet",
      view=view,
      planes=slices or size["frames"],
      size=size["cmr"],
      width=size["width"],
      frozen=True,  # all but the Linear `fc`
    )
  ecg_hidden = 432 if arg.size == "medium" else 0
  c.model.projection.update(hidden=size["hidden"], ecg_hidden=ecg_hidden, width=128, norm=True)
  if arg.arm == "dual_phase":
    c.objectives.dual_phase = dict(
      fn="dual_phase", weight=1.0, w_ed=1.0, w_es=1.0, w_edes=1.0, temperature=0.07
    )
  else:
    c.objectives.contrastive = dict(
      fn="clip", weight=1.0, a="ecg", b=towers[0], b_to_a=0.5, temperature=0.07
    )
