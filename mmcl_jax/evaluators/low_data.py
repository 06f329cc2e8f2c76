"""Probes fitted on a part of the labelled training subjects: what an embedding is worth where
labels are few.

Only train is thinned out, by the people of whom a label is known; strengths are chosen on the whole
validation split, and test is the same for all.
"""

import numpy as np

from mmcl_jax.evaluators import diseases, phenotypes, ridge, statistics
from mmcl_jax.evaluators.base import Result
from mmcl_jax.evaluators.context import Context
from mmcl_jax.reports import figures

SHARES, SEEDS = (0.01, 0.1), 5
MODELS = ("embedding", "random_encoder", "covariates")


def low_data(context: Context) -> Result:
  """Scores against the number of labelled training subjects, of phenotypes and diseases that all of
  them allow to score."""
  phenotype_results, _, _ = phenotypes.scored(context)
  disease_results, _, _ = diseases.scored(context)
  scored = []
  for c, scores in enumerate(disease_results["embedding"].values()):
    if "auroc" in scores:
      scored.append(c)
  names = list(context.cohort.info["phenotypes"])
  groups = {}
  for group, members in phenotype_results["group_members"].items():
    groups[group] = [names.index(name) for name in members]
  full = {}
  for model, means in phenotype_results["groups"].items():
    if model in MODELS:
      full[model] = [mean["value"] for mean in means.values()]
      if scored:
        of_diseases = list(disease_results[model].values())
        areas = [of_diseases[c]["auroc"] for c in scored]
        full[model].append(np.mean(areas))
  curves = evaluate(context.all_features(), groups, scored, full)
  if not curves["embedding"]:  # nothing is scored where test has too few labels
    return Result({"low_data": curves})
  figure = figures.low_data(curves, context.note)
  figure.set_label("Few labels: probes fitted on a part of the training subjects")
  return Result({"low_data": curves}, figures={"low_data": figure})


def evaluate(
  features: dict,
  groups: dict[str, list[int]],
  scored: list[int],
  full: dict[str, list[float]],
) -> dict:
  """Mean R2 of groups of phenotypes and mean AUROC of diseases, by the share of training subjects
  with labels.

  Args:
    features: {split: {name: array}}, see ridge.inputs.
    groups: name -> columns of `phenotypes`.
    scored: columns of `diseases`, whose mean is called `diseases (AUROC)`.
    full: {MODEL: `scores` of the probes of all training rows}, which are fitted anyway.

  Returns:
    {MODEL: {GROUP: [{share, subjects, mean, sd, seeds}]}}, shares rising up to 1; mean and SD over
    SEEDS random subsets of subjects (one, `full`, and SD 0 at share 1). What a subset knows
    nothing of is predicted by a constant: AUROC 0.5 of a disease without a case, R2 0 of a
      phenotype without a label.
  """
  row_subject, people = labelled_people(features["train"])
  titles = list(groups)
  if scored:
    titles.append("diseases (AUROC)")
  curves = {}
  for model, x in ridge.inputs(features).items():
    if model not in MODELS:
      continue
    curves[model] = {title: [] for title in titles}
    for share in SHARES:
      count = min(max(2, round(share * len(people))), len(people))
      values = []
      for seed in range(SEEDS):
        chosen = np.random.default_rng(seed).permutation(people)[:count]
        rows = np.isin(row_subject, chosen)
        values.append(scores(x, features, rows, groups, scored))
      for title, of_seeds in zip(titles, np.transpose(values)):
        point = {
          "share": share,
          "subjects": count,
          "mean": float(np.mean(of_seeds)),
          "sd": float(np.std(of_seeds, ddof=1)),
          "seeds": SEEDS,
        }
        curves[model][title].append(point)
    for title, value in zip(titles, full[model]):
      point = {
        "share": 1.0,
        "subjects": len(people),
        "mean": float(value),
        "sd": 0.0,
        "seeds": 1,
      }
      curves[model][title].append(point)
  return curves


def labelled_people(train: dict) -> tuple[np.ndarray, np.ndarray]:
  """The number of the subject of each row [N], and the numbers of those who have a label."""
  has_phenotype = np.isfinite(train["phenotypes"]).any(axis=1)
  has_disease = np.isfinite(train["diseases"]).any(axis=1)
  _, row_subject = np.unique(train["subject"], axis=0, return_inverse=True)
  row_subject = row_subject.ravel()
  return row_subject, np.unique(row_subject[has_phenotype | has_disease])


def scores(
  x: dict,
  features: dict,
  rows: np.ndarray,
  groups: dict,
  scored: list[int],
) -> list[float]:
  """Mean R2 of every group, then mean AUROC, of probes fitted on the training rows `rows`
  (bool)."""
  train, val, test = (features[split] for split in ("train", "val", "test"))
  train_x = x["train"][rows]
  probe = ridge.fit_probe(train_x, train["phenotypes"][rows], x["val"], val["phenotypes"])
  y_test = test["phenotypes"].astype(np.float64)
  r2 = statistics.r2(y_test, ridge.predict(probe, x["test"]))
  r2 = np.where(np.isnan(probe["intercept"]), 0.0, r2)
  means = [r2[columns].mean() for columns in groups.values()]
  if scored:
    y, y_val, y_test = (split["diseases"][:, scored] for split in (train, val, test))
    probe = diseases.fit_probe(train_x, y[rows], x["val"], y_val)
    probability = diseases.predict(probe, x["test"])
    probability = np.nan_to_num(probability, nan=0.5)
    areas = []
    for i in range(len(scored)):
      areas.append(statistics.auroc(y_test[:, i], probability[:, i]))
    means.append(np.mean(areas))
  return means
