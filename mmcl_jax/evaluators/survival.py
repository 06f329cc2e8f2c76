"""Incident disease: Cox proportional hazards (Cox 1972, Efron's ties) on frozen embeddings, scored
by Harrell's C-index.

The fit is scikit-survival's (extra `survival`), on the first principal components of the
standardised features, because its Newton steps take minutes at several hundred features. Letters: N
rows, D features, C diseases, R bootstrap draws.
"""

import importlib.util
from typing import NamedTuple

import numpy as np
from sklearn.decomposition import PCA

from mmcl_jax.evaluators import statistics
from mmcl_jax.evaluators.base import Result, Table, interval, number
from mmcl_jax.evaluators.context import Context
from mmcl_jax.evaluators.ridge import inputs, standardisation

COMPONENTS = 64
STRENGTHS = np.logspace(4, -1, 6)  # of the ridge penalty, strongest first
FEWEST_EVENTS = 30  # in train and in test, below which nothing is fitted or scored
MODELS = ("embedding", "random_encoder", "covariates", "with_covariates")


class Group(NamedTuple):
  """The people at risk of a disease."""

  x: np.ndarray  # features [N, D]
  years: np.ndarray  # to the event, or to the end of observation [N]
  happened: np.ndarray  # bool [N]


def survival(context: Context, draws: int = 1000, seed: int = 0) -> Result:
  """C-index of every disease, of a cohort that has dates and where scikit-survival is installed.

  Args:
    context: features of train, val and the scored split.
    draws, seed: of the bootstrap over test subjects.
  """
  if "event_years" not in context.cohort.info["shapes"]:
    return Result()
  if not installed():
    context.say(
      "no incident risk: the cohort has dates, but scikit-survival is not installed; pip install "
      "'mmcl-jax[survival]'"
    )
    return Result()
  names = context.cohort.info["diseases"]
  results, predictions = evaluate(context.all_features(), names, draws, seed)
  tables = []
  if any(results.values()):
    tables.append(table(results, context.reads))
  arrays = {}
  for name, x in predictions.items():
    if name != "subject":
      arrays[f"survival_{name}"] = x
  return Result({"survival": results}, tables, predictions=arrays)


def installed() -> bool:
  return importlib.util.find_spec("sksurv") is not None


def times(features: dict) -> tuple[np.ndarray, np.ndarray]:
  """Years under observation and whether the disease came: float64 [N, C] (NaN = not at risk, or not
  followed), bool [N, C].

  At risk is who did not have it by the visit. Who had it first after the end of follow-up counts as
  not having had it.
  """
  first = features["event_years"].astype(np.float64)
  end = features["followed_years"].astype(np.float64)[:, None]
  happened = (first > 0) & (first <= end)
  years = np.where(happened, first, end)
  had_it_before = first <= 0
  # a disease without a date, and one that is not known: when is not known
  has_time = (features["diseases"] == 0) | np.isfinite(first)
  at_risk = ~had_it_before & has_time & (years > 0)
  return np.where(at_risk, years, np.nan), happened


def evaluate(
  features: dict,
  names: list,
  draws: int = 1000,
  seed: int = 0,
) -> tuple[dict, dict]:
  """A Cox model of every disease from every input of MODELS that is there, scored on test.

  Args:
    features: {split: {name: array}}, see ridge.inputs; and event_years [N, C], followed_years
      [N] (data/schema.py).
    names: C, of the columns of `diseases`.

  Returns:
    results: {model: {NAME: {events, n, train_events, median_years, ...}}} and, with FEWEST_EVENTS
      in train and test, c_index, c_index_ci and strength.
    predictions: `subject`, `years`, `happened` and log-hazard ratios [N, C] per model, NaN where
      nothing was fitted.
  """
  subject = features["test"]["subject"]
  outcomes = {split: times(arrays) for split, arrays in features.items()}
  years, happened = outcomes["test"]
  weights = statistics.bootstrap_weights(subject, draws, seed)
  results = {}
  predictions = {"subject": subject, "years": years, "happened": happened}
  for model, x in inputs(features).items():
    if model not in MODELS:
      continue
    x = components(x)
    results[model] = {}
    predictions[model] = np.full(years.shape, np.nan)
    for c, name in enumerate(names):
      train = at_risk(x["train"], *outcomes["train"], c)
      val = at_risk(x["val"], *outcomes["val"], c)
      test = at_risk(x["test"], *outcomes["test"], c)
      scores = counts(train, test)
      if min(scores["train_events"], scores["events"]) >= FEWEST_EVENTS:
        risk, scores["strength"] = fit(train, val, x["test"])
        predictions[model][:, c] = risk
        rows = np.isfinite(years[:, c])
        outcome = (test.years, test.happened, risk[rows])
        draws_of_c = statistics.c_index(*outcome, weights[:, rows])
        scores["c_index"] = float(statistics.c_index(*outcome))
        scores["c_index_ci"] = statistics.interval(draws_of_c).tolist()
      results[model][name] = scores
  return results, predictions


def counts(train: Group, test: Group) -> dict:
  """Events in train and test, people in test, and their median years under observation."""
  n = len(test.years)
  return {
    "events": int(test.happened.sum()),
    "n": n,
    "train_events": int(train.happened.sum()),
    "median_years": float(np.median(test.years)) if n else np.nan,
  }


def at_risk(
  x: np.ndarray,
  years: np.ndarray,
  happened: np.ndarray,
  c: int,
) -> Group:
  """Those at risk of disease `c`, of all rows' [N, D], [N, C], [N, C]."""
  rows = np.isfinite(years[:, c])
  return Group(x[rows], years[rows, c], happened[rows, c])


def components(x: dict) -> dict:
  """Standardised features, or the first COMPONENTS principal components where there are more; of
  train's fit."""
  mean, scale = standardisation(x["train"])
  z = {split: (features - mean) / scale for split, features in x.items()}
  rows, width = z["train"].shape
  if width <= COMPONENTS:
    return z
  pca = PCA(min(COMPONENTS, rows), svd_solver="covariance_eigh")
  pca.fit(z["train"])
  return {split: pca.transform(features) for split, features in z.items()}


def fit(train: Group, val: Group, test: np.ndarray) -> tuple[np.ndarray, float]:
  """Log-hazard ratios of `test` [N, D], and the strength: of best C-index on validation, ties to
  the strongest."""
  from sksurv.linear_model import CoxPHSurvivalAnalysis
  from sksurv.util import Surv

  outcome = Surv.from_arrays(train.happened, train.years)
  best_score = -np.inf
  for strength in STRENGTHS:
    model = CoxPHSurvivalAnalysis(alpha=strength, ties="efron")
    model.fit(train.x, outcome)
    score = -1.0
    if len(val.years):
      risk = model.predict(val.x)
      c_index = statistics.c_index(val.years, val.happened, risk)
      score = np.nan_to_num(c_index, nan=-1.0)
    if score > best_score:
      best_score = score
      best_model = model
      best_strength = strength
  return best_model.predict(test), float(best_strength)


def table(results: dict, encoder: str = "ECG") -> Table:
  """Of each disease: counts, and the C-index of every model."""
  head = ["disease", "events", "n", "median years"]
  for model in results:
    title = model.replace("_", " ")
    head.append(f"C-index {title}")
  rows = []
  first_model = next(iter(results))
  for name, first in results[first_model].items():
    row = [
      name,
      f"{first['events']:,}",
      f"{first['n']:,}",
      number(first["median_years"]),
    ]
    for diseases in results.values():
      scores = diseases[name]
      row.append(interval(scores.get("c_index"), scores.get("c_index_ci")))
    rows.append(row)
  title = f"Incident disease from the {encoder} (few events: counted, not scored)"
  return Table(title, head, rows)
