"""Linear probes of phenotypes: closed-form ridge on frozen embeddings, strength chosen on
validation, scored on test.

Letters: N rows, D features, K phenotypes, G strengths, R bootstrap draws.
"""

import csv
import io
import re

import numpy as np

from mmcl_jax.evaluators import figures, readouts, statistics
from mmcl_jax.evaluators.base import Result, Table, interval, number
from mmcl_jax.evaluators.context import Context
from mmcl_jax.evaluators.report import as_cell
from mmcl_jax.evaluators.ridge import fit_probe, inputs, predict
from mmcl_jax.evaluators.statistics import FEWEST_TEST_ROWS

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
  drawn = {}
  if results["phenotypes"]:
    y, predicted = predictions["y_true"], predictions["embedding"]
    shown = results | {"encoder": context.reads}
    drawn["r2"] = figures.r2_bars(shown, context.note)
    drawn["r2"].set_label("R2 of every phenotype, beside its baselines")
    drawn["predicted_against_true"] = figures.predicted_against_true(
      y, predicted, results["phenotypes"], context.note
    )
    drawn["predicted_against_true"].set_label("Predicted against measured")
    drawn["bland_altman"] = figures.bland_altman(y, predicted, results["phenotypes"], context.note)
    drawn["bland_altman"].set_label(
      "Bland-Altman: difference against mean, with bias and 95 % limits of agreement"
    )
  # for whoever reads the intervals of `mmcl embed` alone
  probe = probe | {"note": context.seen_people.get("note", "")}
  return Result(
    results,
    tables(results, context.reads),
    drawn,
    predictions,
    {"probes": probe},
    {"results.csv": as_csv(results)},
  )


def scored(context: Context, draws: int = 1000, seed: int = 0) -> tuple[dict, dict, dict]:
  """`evaluate` on the features of `context`, once for all evaluators that ask for it."""

  def make():
    features, known = context.all_features(), context.cohort.info["phenotypes"]
    measured, _ = readouts.of(context)
    context.say(f"fitting probes, drawing {draws:,} bootstrap samples")
    return evaluate(features, list(known), list(known.values()), measured, draws, seed)

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
    others: {READOUT: predictions [N, K] of test, in units}, of read-outs that were fitted
    elsewhere.
    draws, seed: of the bootstrap over test subjects.

  Returns:
    results: `phenotypes.NAME`, `baselines.MODEL.NAME`, `readouts.READOUT.NAME`,
      `groups.MODEL.GROUP` (mean R2 of the scored phenotypes of a group), `group_members.GROUP`,
      `differences.A_minus_B.NAME` and, where it is known, `ceiling.NAME` and
        `share_of_ceiling.NAME`, as results.json has them; a score that cannot be told is NaN.
    predictions: on test, in the units of the phenotypes: `subject`, `y_true` [N, K], and one [N, K]
      per model.
    probe: of the ECG embedding alone, as `ridge.fit_probe` returns it, with `names`, `units` and
      `half_width` [K], that of a 95 % prediction interval; `coverage95` of results is its share of
        test rows.
  """
  train, val, test = (features[split] for split in ("train", "val", "test"))
  y = test["phenotypes"].astype(np.float64)
  weights = statistics.bootstrap_weights(test["subject"], draws, seed)
  predicted, probes = {}, {}
  for model, x in inputs(features).items():
    probe = fit_probe(x["train"], train["phenotypes"], x["val"], val["phenotypes"])
    # The strength was chosen on these rows too, which costs 0.003 of coverage with 39 of them,
    # 0.001 with 411 (simulated): less than to fit, choose or calibrate on fewer rows. coverage95
    # tells it on test.
    probe["half_width"] = statistics.half_width(val["phenotypes"], predict(probe, x["val"]))
    probes[model] = probe
    predicted[model] = predict(probe, x["test"])
  predicted |= others or {}

  enough = np.isfinite(y).sum(axis=0) >= FEWEST_TEST_ROWS
  r2, drawn, scores = {}, {}, {}
  for model, x in predicted.items():
    r2[model] = np.where(enough, statistics.r2(y, x), np.nan)
    drawn[model] = np.where(enough, statistics.r2(y, x, weights), np.nan)
    scores[model] = _scores(y, x, r2[model], drawn[model], probes.get(model), names, units)

  members = grouped([name for name, scored in zip(names, enough) if scored])
  results = {
    "phenotypes": scores.pop("embedding"),
    "differences": differences(names, r2, drawn),
    "groups": group_means(names, members, r2, drawn),
    "group_members": members,
    "readouts": {name: scores.pop(name) for name in others or ()},
  }
  if "ceiling" in scores:
    results["ceiling"] = {name: score["r2"] for name, score in scores.pop("ceiling").items()}
    results["share_of_ceiling"] = share_of_ceiling(
      y, predicted["embedding"], predicted["ceiling"], weights, names
    )
  results["baselines"] = scores
  predictions = {"subject": test["subject"], "y_true": y, **predicted}
  probe = {"names": np.array(names), "units": np.array(units), **probes["embedding"]}
  return results, predictions, probe


def differences(names: list[str], r2: dict, drawn: dict) -> dict:
  """{A_minus_B: {NAME: {value, ci}}} of DIFFERENCES, of R2 {MODEL: [K]} and its draws {MODEL: [R,
  K]}, paired."""
  found = {}
  for a, b in DIFFERENCES:
    if a in r2 and b in r2:
      value, draws = r2[a] - r2[b], drawn[a] - drawn[b]
      entries = {name: entry(value[k], draws[:, k]) for k, name in enumerate(names)}
      found[f"{a}_minus_{b}"] = entries
  return found


def group_means(names: list[str], members: dict, r2: dict, drawn: dict) -> dict:
  """{MODEL: {GROUP: {value, ci}}}, the mean R2 of the members of each group; r2 and drawn as in
  `differences`."""
  found = {}
  for model in r2:
    found[model] = {}
    for group, inside in members.items():
      columns = [names.index(name) for name in inside]
      value, draws = r2[model][columns].mean(), drawn[model][:, columns].mean(axis=1)
      found[model][group] = entry(value, draws)
  return found


def entry(value, draws) -> dict:
  """{value, ci} of a score and its draws [R]."""
  return {"value": float(value), "ci": statistics.interval(draws).tolist()}


def grouped(names: list[str]) -> dict[str, list[str]]:
  """The phenotypes by GROUPS, those that belong to none under `other`; groups without any are left
  out."""
  found = {group: [] for group in (*GROUPS, "other")}
  for name in names:
    belongs = [group for group, pattern in GROUPS.items() if re.match(pattern, name)]
    for group in belongs or ["other"]:
      found[group].append(name)
  return {group: members for group, members in found.items() if members}


def share_of_ceiling(y, embedding, ceiling, weights, names) -> dict:
  """{NAME: {value, ci}}: R2 of the embedding over R2 of the ceiling, paired; NaN where the
  ceiling's interval holds 0."""
  share = statistics.r2(y, embedding) / statistics.r2(y, ceiling)
  drawn = statistics.r2(y, ceiling, weights)
  low, high = statistics.interval(statistics.r2(y, embedding, weights) / drawn)
  told = statistics.interval(drawn)[0] > 0
  share, low, high = (np.where(told, x, np.nan) for x in (share, low, high))
  found = {}
  for k, name in enumerate(names):
    found[name] = {"value": float(share[k]), "ci": [float(low[k]), float(high[k])]}
  return found


def _scores(y, prediction, r2, drawn, probe, names, units):
  """{NAME: its scores} of one model on test, R2 [K] and its draws [R, K] given; of a ridge also
  strength and coverage."""
  count = np.isfinite(y).sum(axis=0)
  enough = count >= FEWEST_TEST_ROWS
  low, high = statistics.interval(drawn)
  agreement = statistics.limits_of_agreement(y, prediction)
  columns = [statistics.pearson(y, prediction), statistics.mae(y, prediction), *agreement]
  correlation, error, bias, lower, upper = np.where(enough, columns, np.nan)
  found = {}
  for k, name in enumerate(names):
    found[name] = {
      "r2": float(r2[k]),
      "r2_ci": [float(low[k]), float(high[k])],
      "pearson": float(correlation[k]),
      "mae": float(error[k]),
      "bias": float(bias[k]),
      "limits": [float(lower[k]), float(upper[k])],
      "n": int(count[k]),
      "units": units[k],
    }
  if probe:
    covered = statistics.coverage(y, prediction, probe["half_width"])
    covered = np.where(enough, covered, np.nan)
    for k, name in enumerate(names):
      found[name]["coverage95"] = float(covered[k])
      found[name]["strength"] = float(probe["strength"][k])
      found[name]["strength_at_edge"] = bool(probe["at_edge"][k])
  return found


def tables(results: dict, encoder: str = "ECG") -> list[Table]:
  """Those that there is something for: scores beside the baselines, groups, other read-outs."""
  found = []
  if results.get("phenotypes"):
    found.append(headline(results, encoder))
  if results.get("group_members"):
    found.append(group_table(results))
  if results.get("readouts") and results.get("phenotypes"):
    found.append(readout_table(results, encoder))
  return found


def headline(results: dict, encoder: str = "ECG") -> Table:
  """Of each phenotype: unit, R2 with its interval, baselines and ceiling where known."""
  baselines = {}
  for model in BASELINES:
    if model in results.get("baselines", {}):
      baselines[model] = results["baselines"][model]
  ceiling = results.get("ceiling", {})
  own = results.get("readouts", {}).get("own_head", {})
  head = ["phenotype", "unit", "R2 [95 % CI]"]
  if own:
    head.append("own head")
  head += [BASELINES[model] for model in baselines]
  if ceiling:
    head.append("ceiling")
  rows = []
  for name, score in results.get("phenotypes", {}).items():
    row = [name, score["units"], interval(score["r2"], score["r2_ci"])]
    if own:
      row.append(interval(own[name]["r2"], own[name]["r2_ci"]))
    row += [number(scores[name]["r2"]) for scores in baselines.values()]
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
  head = ["group", "phenotypes", *(titles.get(model, model) for model in models)]
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
      values = []
      for value in (score["r2"], *score["r2_ci"], score["pearson"], score["mae"]):
        values.append(value if np.isfinite(value) else None)
      rows.writerow([model, as_cell(name), *values, score["n"], as_cell(score["units"])])
  return file.getvalue()
