"""Phenotypes and diseases read off without a linear probe.

own_head        what the network's own read-outs say, where training made some
(config.model.regression, classification)
knn             the nearest neighbours of the embedding in train
mlp             an MLP on the embedding
cmr_neighbours  zero-shot: the people of train whose CMR lies nearest to the ECG in the space of the
projections
"""

import numpy as np

from mmcl_jax.evaluators import mlp, neighbours, retrieval, ridge
from mmcl_jax.evaluators.context import Context

TITLES = {
  "own_head": "own head",
  "knn": "k-NN",
  "mlp": "MLP",
  "cmr_neighbours": "CMR neighbours (zero-shot)",
}


def of(context: Context) -> tuple[dict, dict]:
  """`predict` on the features of `context`, once for all evaluators that score read-outs."""

  def make():
    info = context.cohort.info
    return predict(
      context.all_features(),
      context.run.standardiser,
      list(info["phenotypes"]),
      list(info["diseases"]),
    )

  return context.once("readouts", make)


def predict(
  features: dict, standardiser, names: list[str], diseases: list[str]
) -> tuple[dict, dict]:
  """Predictions of every read-out that there is.

  Args:
    features: {split: {name: array}} of 'train', 'val', 'test': embedding [N, D], phenotypes [N, K],
      diseases [N, C]; and where they are, own_phenotypes, own_diseases, ecg_projection [N, E],
        cmr_projection [N, P, E] and has_cmr [N].
    standardiser: data.standardise.Standardiser, for what the columns of own_* are.
    names, diseases: K and C, of the columns.

  Returns:
    {readout: [N, K] of test}, in units; {readout: {split: [N, C]}} of val and test, probabilities.
  """
  train, val, test = (features[split] for split in ("train", "val", "test"))
  x = {split: found["embedding"].astype(np.float64) for split, found in features.items()}
  mean, scale = ridge.standardisation(x["train"])
  near = [retrieval.unit((x[split] - mean) / scale) for split in ("train", "val", "test")]
  found = {}
  for kind, wanted, learned in (
    ("phenotypes", names, standardiser.targets),
    ("diseases", diseases, standardiser.diseases),
  ):
    y, y_val = train[kind], val[kind]
    found[kind] = (
      {"own_head": placed(features, f"own_{kind}", learned, wanted)}
      if f"own_{kind}" in test
      else {}
    )
    found[kind] |= {
      "knn": neighbours.predict(near[0], y, near[1], y_val, near[2]),
      "mlp": mlp.predict(x["train"], y, x["val"], y_val, x["test"], binary=kind == "diseases"),
    }
    if {"ecg_projection", "cmr_projection"} <= train.keys() and (has := train["has_cmr"] > 0).any():
      # as retrieval scores a pair: mean cosine over phases
      gallery = retrieval.unit(train["cmr_projection"][has]).mean(axis=1)
      found[kind]["cmr_neighbours"] = neighbours.predict(
        gallery,
        y[has],
        retrieval.unit(val["ecg_projection"]),
        y_val,
        retrieval.unit(test["ecg_projection"]),
      )
  return {name: said["test"] for name, said in found["phenotypes"].items()}, found["diseases"]


def placed(features: dict, field: str, learned, wanted: list[str]) -> dict[str, np.ndarray]:
  """The columns `learned` of features[split][field] as those `wanted`, {split: [N, wanted]}; NaN
  for what was not learned."""
  columns = [list(learned).index(name) if name in learned else -1 for name in wanted]
  padded = {
    split: np.pad(x[field].astype(np.float64), ((0, 0), (0, 1)), constant_values=np.nan)
    for split, x in features.items()
  }
  return {split: x[:, columns] for split, x in padded.items()}
