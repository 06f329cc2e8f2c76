"""Linear probes of phenotypes: closed-form ridge on frozen embeddings, strength chosen on
validation, scored on test.

Letters: N rows, D features, K phenotypes, G strengths, R bootstrap draws.
"""

import csv
import io
import re

import numpy as np
from matplotlib.figure import Figure

from mmcl_jax.evaluators import readouts, statistics
from mmcl_jax.evaluators.base import Result, Table, interval, number
from mmcl_jax.evaluators.context import Context
from mmcl_jax.evaluators.ridge import fit_probe, inputs, predict
from mmcl_jax.evaluators.statistics import FEWEST_TEST_ROWS
from mmcl_jax.reports import figures
from mmcl_jax.reports.report import as_cell

BASELINES = {"random_encoder": "random", "covariates": "covariates", "with_covariates": "emb + cov"}
# of UK Biobank's category 157 (data/ukb_fields.py): name -> start of its phenotypes' names
GROUPS = {
  "left ventricle": "LV",
  "right ventricle": "RV",
  "atria": "[LR]A(V|SV|EF)",
  "aorta": "[AD]Ao_",
  "wall thickness": "WT",
  "circumferential strain": "Ecc",
  "radial strain": "Err",
  "longitudinal strain": "Ell",
}
DIFFERENCES = (
  ("embedding", "random_encoder"),
  ("embedding", "covariates"),
  ("with_covariates", "covariates"),
)


def phenotypes(context: Context, draws: int = 1000, seed: int = 0) -> Result:
  """R2 and further scores of every phenotype, from the embedding, baselines and read-outs.

  Args:
    context: features of train, val and the scored split.
    draws, seed: of the bootstrap over test subjects.

  Returns:
    metrics and predictions as `evaluate` gives them; the probe of the embedding, which `mmcl embed`
    and `mmcl export` apply, as probes.npz; results.csv, one line per model and phenotype.
  """
  results, predictions, probe = scored(context, draws, seed)
  # for whoever reads the intervals of `mmcl embed` alone
  probe = probe | {"note": context.seen_people.get("note", "")}
  return Result(
    results,
    tables(results, context.reads),
    drawings(results, predictions, context),
    predictions,
    {"probes": probe},
    {"results.csv": as_csv(results)},
  )


def drawings(results: dict, predictions: dict, context: Context) -> dict[str, Figure]:
  """The figures by name; none of a cohort without phenotypes."""
  scores = results["phenotypes"]
  if not scores:
    return {}
  y = predictions["y_true"]
  predicted = predictions["embedding"]
  r2 = figures.r2_bars(results | {"encoder": context.reads}, context.note)
  r2.set_label("R2 of every phenotype, beside its baselines")
  scatter = figures.predicted_against_true(y, predicted, scores, context.note)
  scatter.set_label("Predicted against measured")
  agreement = figures.bland_altman(y, predicted, scores, context.note)
  agreement.set_label(
    "Bland-Altman: difference against mean, with bias and 95 % limits of agreement"
  )
  return {"r2": r2, "predicted_against_true": scatter, "bland_altman": agreement}


def scored(
  context: Context,
  draws: int = 1000,
  seed: int = 0,
) -> tuple[dict, dict, dict]:
  """`evaluate` on the features of `context`, once for all evaluators that ask for it."""

  def make():
    units = context.cohort.info["phenotypes"]
    features = context.all_features()
    predicted, _ = readouts.of(context)
    context.say(f"fitting probes, drawing {draws:,} bootstrap samples")
    return evaluate(features, list(units), list(units.values()), predicted, draws, seed)

  return context.once(("phenotypes", draws, seed), make)


def evaluate(
  features: dict,
  names: list,
  units: list,
  others: dict | None = None,
  draws: int = 1000,
  seed: int = 0,
) -> tuple[dict, dict, dict]:
  """Probes of every phenotype from every input, scored on the test split.

  Args:
    features: {split: {name: array}} of 'train', 'val', 'test'; see `ridge.inputs`.
    names, units: K each, of the columns of `phenotypes`.
    others: {READOUT: predictions [N, K] of test, in units}, of read-outs fitted elsewhere.
    draws, seed: of the bootstrap over test subjects.

  Returns:
    results: `phenotypes.NAME`, `baselines.MODEL.NAME`, `readouts.READOUT.NAME`,
      `groups.MODEL.GROUP` (mean R2 of the scored phenotypes of a group), `group_members.GROUP`,
      `differences.A_minus_B.NAME` and, where it is known, `ceiling.NAME` and
      `share_of_ceiling.NAME`, as results.json has them; a score that cannot be computed is NaN.
    predictions: on test, in the units of the phenotypes: `subject`, `y_true` [N, K], and one [N, K]
      per model.
    probe: of the ECG embedding alone, as `ridge.fit_probe` returns it, with `names`, `units` and
      `half_width` [K], that of a 95 % prediction interval; `coverage95` of results is its share of
      test rows.
  """
  others = others or {}
  subject = features["test"]["subject"]
  y = features["test"]["phenotypes"].astype(np.float64)
  weights = statistics.bootstrap_weights(subject, draws, seed)
  probes, predicted = fit_probes(features)
  predicted |= others

  enough = np.isfinite(y).sum(axis=0) >= FEWEST_TEST_ROWS
  r2, r2_draws = r2_of_models(y, predicted, weights, enough)
  scores = {}
  for model, x in predicted.items():
    scores[model] = model_scores(y, x, r2[model], r2_draws[model], names, units)
    if model in probes:
      add_probe(scores[model], y, x, probes[model])

  members = grouped([name for name, is_scored in zip(names, enough) if is_scored])
  results = {
    "phenotypes": scores.pop("embedding"),
    "differences": differences(names, r2, r2_draws),
    "groups": group_means(names, members, r2, r2_draws),
    "group_members": members,
    "readouts": {name: scores.pop(name) for name in others},
  }
  if "ceiling" in scores:
    ceiling = scores.pop("ceiling")
    results["ceiling"] = {name: score["r2"] for name, score in ceiling.items()}
    results["share_of_ceiling"] = share_of_ceiling(y, predicted, weights, names)
  results["baselines"] = scores
  predictions = {"subject": subject, "y_true": y, **predicted}
  probe = {"names": np.array(names), "units": np.array(units), **probes["embedding"]}
  return results, predictions, probe


def fit_probes(features: dict) -> tuple[dict, dict]:
  """Of every input: its probe, with the half width of a prediction interval, and what it predicts
  of test [N, K]."""
  y_train = features["train"]["phenotypes"]
  y_val = features["val"]["phenotypes"]
  probes = {}
  predicted = {}
  for model, x in inputs(features).items():
    probe = fit_probe(x["train"], y_train, x["val"], y_val)
    # The strength was chosen on these rows too, which costs 0.003 of coverage with 39 of them,
    # 0.001 with 411 (simulated): less than to fit, choose or calibrate on fewer rows. coverage95
    # tells it on test.
    probe["half_width"] = statistics.half_width(y_val, predict(probe, x["val"]))
    probes[model] = probe
    predicted[model] = predict(probe, x["test"])
  return probes, predicted


def r2_of_models(
  y: np.ndarray,
  predicted: dict,
  weights: np.ndarray,
  enough: np.ndarray,
) -> tuple[dict, dict]:
  """R2 {MODEL: [K]} and its draws {MODEL: [R, K]}; NaN of phenotypes that have not `enough` [K]
  rows."""
  r2 = {}
  r2_draws = {}
  for model, x in predicted.items():
    r2[model] = np.where(enough, statistics.r2(y, x), np.nan)
    r2_draws[model] = np.where(enough, statistics.r2(y, x, weights), np.nan)
  return r2, r2_draws


def differences(names: list[str], r2: dict, r2_draws: dict) -> dict:
  """{A_minus_B: {NAME: {value, ci}}} of DIFFERENCES, of R2 {MODEL: [K]} and its draws {MODEL: [R,
  K]}, paired."""
  entries = {}
  for a, b in DIFFERENCES:
    if a in r2 and b in r2:
      value = r2[a] - r2[b]
      draws = r2_draws[a] - r2_draws[b]
      of_names = entries[f"{a}_minus_{b}"] = {}
      for k, name in enumerate(names):
        of_names[name] = entry(value[k], draws[:, k])
  return entries


def group_means(names: list[str], members: dict, r2: dict, r2_draws: dict) -> dict:
  """{MODEL: {GROUP: {value, ci}}}, the mean R2 of the members of each group; r2 and r2_draws as in
  `differences`."""
  means = {}
  for model in r2:
    means[model] = {}
    for group, group_names in members.items():
      columns = [names.index(name) for name in group_names]
      value = r2[model][columns].mean()
      draws = r2_draws[model][:, columns].mean(axis=1)
      means[model][group] = entry(value, draws)
  return means


def entry(value, draws) -> dict:
  """{value, ci} of a score and its draws [R]."""
  return {"value": float(value), "ci": statistics.interval(draws).tolist()}


def grouped(names: list[str]) -> dict[str, list[str]]:
  """The phenotypes by GROUPS, those that belong to none under `other`; groups without any are left
  out."""
  members = {group: [] for group in (*GROUPS, "other")}
  for name in names:
    groups = [group for group, pattern in GROUPS.items() if re.match(pattern, name)]
    for group in groups or ["other"]:
      members[group].append(name)
  return {group: group_names for group, group_names in members.items() if group_names}


def share_of_ceiling(
  y: np.ndarray,
  predicted: dict,
  weights: np.ndarray,
  names: list[str],
) -> dict:
  """{NAME: {value, ci}}: R2 of the embedding over R2 of the ceiling, paired; NaN where the
  ceiling's interval holds 0."""
  embedding = predicted["embedding"]
  ceiling = predicted["ceiling"]
  share = statistics.r2(y, embedding) / statistics.r2(y, ceiling)
  ceiling_draws = statistics.r2(y, ceiling, weights)
  embedding_draws = statistics.r2(y, embedding, weights)
  low, high = statistics.interval(embedding_draws / ceiling_draws)
  lowest_ceiling, _ = statistics.interval(ceiling_draws)
  for x in (share, low, high):
    x[~(lowest_ceiling > 0)] = np.nan
  shares = {}
  for k, name in enumerate(names):
    shares[name] = {
      "value": float(share[k]),
      "ci": [float(low[k]), float(high[k])],
    }
  return shares


def model_scores(
  y: np.ndarray,
  prediction: np.ndarray,
  r2: np.ndarray,
  r2_draws: np.ndarray,
  names: list[str],
  units: list[str],
) -> dict:
  """{NAME: its scores} of one model on test, R2 [K] and its draws [R, K] given."""
  count = np.isfinite(y).sum(axis=0)
  low, high = statistics.interval(r2_draws)
  correlation = statistics.pearson(y, prediction)
  error = statistics.mae(y, prediction)
  bias, lower, upper = statistics.limits_of_agreement(y, prediction)
  for x in (correlation, error, bias, lower, upper):
    x[count < FEWEST_TEST_ROWS] = np.nan
  scores = {}
  for k, name in enumerate(names):
    scores[name] = {
      "r2": float(r2[k]),
      "r2_ci": [float(low[k]), float(high[k])],
      "pearson": float(correlation[k]),
      "mae": float(error[k]),
      "bias": float(bias[k]),
      "limits": [float(lower[k]), float(upper[k])],
      "n": int(count[k]),
      "units": units[k],
    }
  return scores


def add_probe(scores: dict, y: np.ndarray, prediction: np.ndarray, probe: dict) -> None:
  """Adds to the scores of a ridge its strength, and the coverage of its prediction intervals."""
  coverage = statistics.coverage(y, prediction, probe["half_width"])
  for k, score in enumerate(scores.values()):
    enough = score["n"] >= FEWEST_TEST_ROWS
    score["coverage95"] = float(coverage[k]) if enough else np.nan
    score["strength"] = float(probe["strength"][k])
    score["strength_at_edge"] = bool(probe["at_edge"][k])


def tables(results: dict, encoder: str = "ECG") -> list[Table]:
  """Those that there is something for: scores beside the baselines, groups, other read-outs."""
  drawn = []
  if results.get("phenotypes"):
    drawn.append(headline(results, encoder))
  if results.get("group_members"):
    drawn.append(group_table(results))
  if results.get("readouts") and results.get("phenotypes"):
    drawn.append(readout_table(results, encoder))
  return drawn


def headline(results: dict, encoder: str = "ECG") -> Table:
  """Of each phenotype: unit, R2 with its interval, baselines and ceiling where known."""
  scored_baselines = results.get("baselines", {})
  baselines = [model for model in BASELINES if model in scored_baselines]
  ceiling = results.get("ceiling", {})
  own_head = results.get("readouts", {}).get("own_head", {})
  head = ["phenotype", "unit", "R2 [95 % CI]"]
  if own_head:
    head.append("own head")
  for model in baselines:
    head.append(BASELINES[model])
  if ceiling:
    head.append("ceiling")
  rows = []
  for name, score in results.get("phenotypes", {}).items():
    row = [name, score["units"], interval(score["r2"], score["r2_ci"])]
    if own_head:
      row.append(interval(own_head[name]["r2"], own_head[name]["r2_ci"]))
    for model in baselines:
      row.append(number(scored_baselines[model][name]["r2"]))
    if ceiling:
      row.append(number(ceiling.get(name)))
    rows.append(row)
  return Table(f"Phenotypes from the {encoder}", head, rows)


def group_table(results: dict) -> Table:
  """Mean R2 of every group of phenotypes from every model, the ceiling last."""
  models = [model for model in results["groups"] if model != "ceiling"]
  if "ceiling" in results["groups"]:
    models.append("ceiling")
  titles = BASELINES | readouts.TITLES
  head = ["group", "phenotypes"]
  for model in models:
    head.append(titles.get(model, model))
  rows = []
  for group, members in results["group_members"].items():
    row = [group, str(len(members))]
    for model in models:
      score = results["groups"][model][group]
      row.append(interval(score["value"], score["ci"]))
    rows.append(row)
  return Table("Mean R2 of groups of phenotypes", head, rows)


def readout_table(results: dict, encoder: str = "ECG") -> Table:
  """R2 and Pearson's correlation of every read-out, beside the linear probe's R2."""
  head = ["phenotype", "linear"]
  for name in results["readouts"]:
    title = readouts.TITLES.get(name, name)
    head += [title, f"{title}, r"]
  rows = []
  for name, score in results["phenotypes"].items():
    row = [name, number(score["r2"])]
    for scores in results["readouts"].values():
      row.append(interval(scores[name]["r2"], scores[name]["r2_ci"]))
      row.append(number(scores[name]["pearson"]))
    rows.append(row)
  title = f"Other read-outs of the {encoder} (R2; r: Pearson's correlation)"
  return Table(title, head, rows)


def as_csv(results: dict) -> str:
  """One line per model and phenotype; empty cells for what is not known."""
  models = {"embedding": results["phenotypes"], **results["baselines"], **results["readouts"]}
  file = io.StringIO(newline="")
  rows = csv.writer(file)
  rows.writerow(["model", "phenotype", "r2", "lo", "hi", "pearson", "mae", "n", "units"])
  for model, scores in models.items():
    for name, score in scores.items():
      low, high = score["r2_ci"]
      values = []
      for value in (score["r2"], low, high, score["pearson"], score["mae"]):
        values.append(value if np.isfinite(value) else None)
      row = [model, as_cell(name), *values, score["n"], as_cell(score["units"])]
      rows.writerow(row)
  return file.getvalue()
