"""One batch on which every objective can be computed, with all that a batch may hold: padding,
missing modalities, repeated subjects, missing targets."""

import numpy as np

B, E, K = 16, 6, 4

# name in objectives.BUILT_IN -> parameters that let its every part matter, and what a row needs to
# count
CASES = {
  "mae": (dict(ncc_weight=0.1), ("has_ecg",)),
  "dual_phase": (dict(w_ed=1.0, w_es=2.0, w_edes=0.5), ("has_ecg", "has_cmr")),
  "clip": (dict(a="ecg", b="image", b_to_a=0.75), ("has_ecg", "has_cmr")),
  "nt_xent": (dict(of="image"), ("has_cmr",)),
  "siglip": (dict(a="ecg", b="image", bias=-3.0), ("has_ecg", "has_cmr")),
  "phenotype_weighted": (dict(a="ecg", b="image", sigma=1.5), ("has_ecg", "has_cmr")),
  "soft_positive": (dict(a="ecg", b="image", sigma=1.5, radius=1.3), ("has_ecg", "has_cmr")),
  "false_negative_removal": (dict(a="ecg", b="image", radius=1.3), ("has_ecg", "has_cmr")),
  "relational": (dict(sigma=0.7), ("has_ecg",)),
  "phenotype_regression": (dict(of="ecg", delta=0.7), ("has_ecg",)),
  "disease_classification": (dict(of="ecg", smoothing=0.2), ("has_ecg",)),
  "vicreg": (dict(a="ecg", b="image"), ("has_ecg", "has_cmr")),
  "simsiam": (dict(), ("has_ecg",)),
  "cmr_mae": (dict(of="sax", norm_pix=True), ("has_cmr",)),
  "kl_autoencoder": (dict(noise=0.3), ("has_cmr",)),
  "segmentation": (dict(), ("has_cmr",)),
  "flow_matching": (dict(), ("has_cmr",)),
}

# name, parameters: of those that take ring=True, which must change no number
RING = (
  ("dual_phase", CASES["dual_phase"][0]),
  *(("clip", dict(a="ecg", b="image", b_to_a=share)) for share in (0.0, 0.75, 1.0)),
)


def case(seed=0, dtype=np.float32, whole=False):
  """outputs, batch; `whole`: every row counts, is of its own subject and has all targets."""
  rng = np.random.default_rng(seed)

  def z(*shape):
    return rng.normal(size=shape).astype(dtype)

  def projection():
    return {"projection": z(B, E)}

  patch_mask = (rng.random((B, 5)) < 0.6).astype(dtype)
  ecg_mask = (rng.random((B, 2, 4)) < 0.6).astype(dtype)
  patch_mask[:, 0] = ecg_mask[:, 0, 0] = 1
  outputs = {
    "ecg_projection": z(B, E),
    "cmr": {"ed": projection(), "es": projection(), "image": projection()},
    "again": {"ecg_projection": z(B, E), "cmr": {"image": projection()}},
    "siamese": {"projection": z(2, B, E), "prediction": z(2, B, E)},
    "regression": {"ecg": z(B, K), "image": z(B, K)},
    "reconstruction": z(B, 2, 20),
    "patch_mask": ecg_mask,
  }
  outputs["cmr"]["sax"] = {
    "patches": z(B, 5, 7),
    "reconstruction": z(B, 5, 7),
    "patch_mask": patch_mask,
  }
  batch = {"ecg": z(B, 2, 20), "targets": z(B, K)}
  # both words count
  batch["subject"] = np.stack([np.arange(B) // 2, np.arange(B) % 2], axis=1).astype(np.uint32)
  batch |= {name: np.ones(B, dtype) for name in ("mask", "has_ecg", "has_cmr")}
  if not whole:
    batch["mask"][[3, 15]] = 0
    batch["has_ecg"][6] = batch["has_cmr"][9] = 0
    batch["subject"][5] = batch["subject"][2]
    batch["subject"][12] = batch["subject"][11]
    batch["targets"][rng.random((B, K)) < 0.3] = np.nan
    batch["targets"][4] = np.nan  # knows nothing
    # nothing in common
    batch["targets"][7], batch["targets"][8] = [1, np.nan, -1, np.nan], [np.nan, 0, np.nan, 2]
    batch["targets"][10] = batch["targets"][1]  # the same heart, as far as known
  outputs["classification"] = {"ecg": 3 * z(B, K), "image": z(B, K)}  # log-odds
  batch["diseases"] = (rng.random((B, K)) < 0.4).astype(dtype)
  if not whole:
    batch["diseases"][rng.random((B, K)) < 0.3] = np.nan
    batch["diseases"][4] = np.nan  # knows nothing
  outputs["tokenizer"] = {
    "reconstruction": z(B, 2, 3, 4, 2),
    "latent_mean": z(B, 5, 3),
    "latent_log_variance": z(B, 5, 3),
  }
  outputs["segmentation"] = z(B, 2, 3, 4, 2, 4)
  outputs["generator"] = {"velocity": z(B, 5, 3), "target": z(B, 5, 3)}
  batch["cmr"] = {"ed_es_volumes": rng.random((B, 2, 3, 4, 2)).astype(dtype)}
  batch["labels"] = rng.integers(0, 4, (B, 2, 3, 4, 2)).astype(np.uint8)
  return outputs, batch


def counts(batch, needs):
  """[B] bool, by row."""
  return np.array(
    [batch["mask"][i] > 0 and all(batch[need][i] > 0 for need in needs) for i in range(B)]
  )


VALUE_AND_GRAD = {}  # compiled once an objective: every case has the same shapes


def value_and_grad(name, outputs, batch):
  """Mean of the objective `name` of CASES over the rows that count, and its gradients in the
  outputs."""
  import jax

  from mmcl_jax import objectives

  if name not in VALUE_AND_GRAD:
    parameters, _ = CASES[name]
    fn = objectives.find(name, "")
    VALUE_AND_GRAD[name] = jax.jit(
      jax.value_and_grad(lambda o, b: objectives.mean(fn(o, b, **parameters)))
    )
  return jax.device_get(VALUE_AND_GRAD[name](outputs, batch))
