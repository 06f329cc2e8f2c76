"""Probes fitted on a part of the labelled training subjects: what an embedding is worth where
labels are few.

Only train is thinned out, by the people of whom a label is known; strengths are chosen on the whole
validation split, and test is the same for all.
"""

import numpy as np

from mmcl_jax.evaluators import diseases, figures, phenotypes, ridge, statistics
from mmcl_jax.evaluators.base import Result
from mmcl_jax.evaluators.context import Context

SHARES, SEEDS = (0.01, 0.1), 5
MODELS = ("embedding", "random_encoder", "covariates")


def low_data(context: Context) -> Result:
  """Scores against the number of labelled training subjects, of phenotypes and diseases that all of
  them allow to score."""
  measured, _, _ = phenotypes.scored(context)
  ill, _, _ = diseases.scored(context)
  columns = []
  for c, score in enumerate(ill["embedding"].values()):
    if "auroc" in score:
      columns.append(c)
  names = list(context.cohort.info["phenotypes"])
  members = {}
  for group, found in measured["group_members"].items():
    members[group] = [names.index(name) for name in found]
  whole = {}
  for model, groups in measured["groups"].items():
    if model in MODELS:
      whole[model] = [score["value"] for score in groups.values()]
      if columns:
        scores = list(ill[model].values())
        whole[model].append(np.mean([scores[c]["auroc"] for c in columns]))
  curves = evaluate(context.all_features(), members, columns, whole)
  drawn = {}
  if curves["embedding"]:  # nothing is scored where test has too few labels
    drawn["low_data"] = figures.low_data(curves, context.note)
    drawn["low_data"].set_label("Few labels: probes fitted on a part of the training subjects")
  return Result({"low_data": curves}, figures=drawn)


def evaluate(
  features: dict, groups: dict[str, list[int]], scored: list[int], whole: dict[str, list[float]]
) -> dict:
  """Mean R2 of groups of phenotypes and mean AUROC of diseases, by the share of training subjects
  with labels.

  Args:
    features: {split: {name: array}}, see ridge.inputs.
    groups: name -> columns of `phenotypes`.
    scored: columns of `diseases`, whose mean is called `diseases (AUROC)`.
    whole: {MODEL: `scores` of the probes of all training rows}, which are fitted anyway.

  Returns:
    {MODEL: {GROUP: [{share, subjects, mean, sd, seeds}]}}, shares rising up to 1; mean and SD over
    SEEDS random subsets of subjects (one, `whole`, and SD 0 at share 1). What a subset knows
    nothing of is predicted by a constant: AUROC 0.5 of a disease without a case, R2 0 of a
      phenotype without a label.
  """
  train = features["train"]
  has_phenotype = np.isfinite(train["phenotypes"]).any(axis=1)
  has_disease = np.isfinite(train["diseases"]).any(axis=1)
  _, row_subject = np.unique(train["subject"], axis=0, return_inverse=True)
  row_subject = row_subject.ravel()
  people = np.unique(row_subject[has_phenotype | has_disease])
  models = {name: x for name, x in ridge.inputs(features).items() if name in MODELS}
  titles = list(groups)
  if scored:
    titles.append("diseases (AUROC)")
  found = {model: {title: [] for title in titles} for model in models}
  for share in SHARES:
    count = min(max(2, round(share * len(people))), len(people))
    kept = []
    for seed in range(SEEDS):
      drawn = np.random.default_rng(seed).permutation(people)[:count]
      kept.append(np.isin(row_subject, drawn))
    for model, x in models.items():
      values = np.array([scores(x, features, rows, groups, scored) for rows in kept])
      for title, of_seeds in zip(titles, values.T):
        point = {"share": share, "subjects": count, "mean": float(np.mean(of_seeds))}
        point |= {"sd": float(np.std(of_seeds, ddof=1)), "seeds": SEEDS}
        found[model][title].append(point)
  for model in models:
    for title, value in zip(titles, whole[model]):
      point = {"share": 1.0, "subjects": len(people), "mean": float(value), "sd": 0.0, "seeds": 1}
      found[model][title].append(point)
  return found


def scores(
  x: dict, features: dict, rows: np.ndarray, groups: dict, scored: list[int]
) -> list[float]:
  """Mean R2 of every group, then mean AUROC, of probes fitted on the training rows `rows`
  (bool)."""
  train, val, test = (features[split] for split in ("train", "val", "test"))
  inputs = x["train"][rows]
  probe = ridge.fit_probe(inputs, train["phenotypes"][rows], x["val"], val["phenotypes"])
  r2 = statistics.r2(test["phenotypes"].astype(np.float64), ridge.predict(probe, x["test"]))
  r2 = np.where(np.isnan(probe["intercept"]), 0.0, r2)
  found = [r2[columns].mean() for columns in groups.values()]
  if scored:
    y, y_val, y_test = (split["diseases"][:, scored] for split in (train, val, test))
    probe = diseases.fit_probe(inputs, y[rows], x["val"], y_val)
    said = np.nan_to_num(diseases.predict(probe, x["test"]), nan=0.5)
    areas = [statistics.auroc(y_test[:, i], said[:, i]) for i in range(len(scored))]
    found.append(np.mean(areas))
  return found
