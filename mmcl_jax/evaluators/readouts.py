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
    phenotypes = list(info["phenotypes"])
    diseases = list(info["diseases"])
    return predict(context.all_features(), context.run.standardiser, phenotypes, diseases)

  return context.once("readouts", make)


def predict(
  features: dict,
  standardiser,
  names: list[str],
  diseases: list[str],
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
  of_phenotypes = of_kind("phenotypes", features, standardiser.targets, names)
  of_diseases = of_kind("diseases", features, standardiser.diseases, diseases)
  of_test = {readout: predicted["test"] for readout, predicted in of_phenotypes.items()}
  return of_test, of_diseases


def of_kind(
  kind: str,
  features: dict,
  learned: tuple[str, ...],
  wanted: list[str],
) -> dict[str, dict]:
  """{readout: {split: [N, K]}} of val and test, of the labels of a kind.

  Args:
    kind: "phenotypes" or "diseases".
    features: as in `predict`.
    learned: names of the columns of own_KIND.
    wanted: names of the columns of KIND.
  """
  train, val, test = (features[split] for split in ("train", "val", "test"))
  y = train[kind]
  y_val = val[kind]
  x, x_val, x_test = (split["embedding"].astype(np.float64) for split in (train, val, test))
  mean, scale = ridge.standardisation(x)
  readouts = {}
  if f"own_{kind}" in test:
    readouts["own_head"] = matched_columns(features, f"own_{kind}", learned, wanted)
  readouts["knn"] = neighbours.predict(
    retrieval.unit((x - mean) / scale),
    y,
    retrieval.unit((x_val - mean) / scale),
    y_val,
    retrieval.unit((x_test - mean) / scale),
  )
  is_binary = kind == "diseases"
  readouts["mlp"] = mlp.predict(x, y, x_val, y_val, x_test, binary=is_binary)
  if not {"ecg_projection", "cmr_projection"} <= train.keys():
    return readouts
  has_cmr = train["has_cmr"] > 0
  if has_cmr.any():
    # as retrieval scores a pair: mean cosine over phases
    gallery = retrieval.unit(train["cmr_projection"][has_cmr]).mean(axis=1)
    readouts["cmr_neighbours"] = neighbours.predict(
      gallery,
      y[has_cmr],
      retrieval.unit(val["ecg_projection"]),
      y_val,
      retrieval.unit(test["ecg_projection"]),
    )
  return readouts


def matched_columns(
  features: dict,
  field: str,
  learned: tuple[str, ...],
  wanted: list[str],
) -> dict[str, np.ndarray]:
  """The columns `learned` of features[split][field] as those `wanted`, {split: [N, wanted]}; NaN
  for what was not learned."""
  matched = {}
  for split, arrays in features.items():
    x = arrays[field]
    matched[split] = np.full((len(x), len(wanted)), np.nan)
    for k, name in enumerate(wanted):
      if name in learned:
        matched[split][:, k] = x[:, list(learned).index(name)]
  return matched
