"""`mmcl compare`: evaluated runs side by side, on the same test subjects.

    mmcl compare W1 W2 ... --out=DIR

A run is a workdir that `mmcl evaluate` has scored (the newest step counts) or the folder of one
evaluation. Every run is held against the first, in pairs: both are scored on the same bootstrap
draws of test subjects. Writes DIR/report.html, results.json and figures.
"""

import argparse
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from mmcl_jax.errors import UserError
from mmcl_jax.evaluators import statistics
from mmcl_jax.evaluators.base import Table, interval, number
from mmcl_jax.evaluators.statistics import FEWEST_TEST_ROWS
from mmcl_jax.reports import figures, report
from mmcl_jax.support import files
from mmcl_jax.support.paths import local

DRAWS = 1000
COVARIATES = "covariates"
# what a comparison reads
RESULTS = ("phenotypes", "diseases", "cohort", "cohort_fingerprint")
PREDICTIONS = ("subject", "y_true", "embedding", "disease_y_true", "disease_embedding")
FIGURE_TITLES = {
  "r2": "R2 of every phenotype, beside its baselines",
  "auroc": "AUROC of every disease",
}


class Draws(NamedTuple):
  """A score of K names, and its bootstrap draws."""

  value: np.ndarray  # [K]
  draws: np.ndarray  # [R, K]


class Evaluation(NamedTuple):
  """What `mmcl evaluate` left: results.json, and predictions.npz on test."""

  name: str
  folder: pathlib.Path
  results: dict
  predictions: dict[str, np.ndarray]


def main(argv):
  parser = argparse.ArgumentParser(
    prog="mmcl compare", description=__doc__.partition("\n\n")[0], allow_abbrev=False
  )
  parser.add_argument(
    "runs",
    type=local,
    nargs="+",
    metavar="W",
    help="workdir, or folder of an evaluation; the first is the reference",
  )
  parser.add_argument("--out", type=local, required=True, help="folder for the report")
  args = parser.parse_intermixed_args(argv)
  if len(args.runs) < 2:
    raise UserError(
      "mmcl compare needs two runs or more; the first is the one that the others are held against"
    )
  print(compare(args.runs, args.out))


def compare(runs: list[str], out: str) -> str:
  """Writes the report; returns its table as text."""
  report.check_place(out)
  evaluations = with_distinct_names([read(pathlib.Path(run)) for run in runs])
  check_comparable(evaluations)
  results = scores_and_differences(evaluations)
  notes = notes_on(evaluations, results)
  tables = tables_of(results)
  metric = "r2" if evaluations[0].results["phenotypes"] else "auroc"
  image = forest(evaluations, metric, results[metric])
  facts = {evaluation.name: evaluation.folder for evaluation in evaluations}
  facts["cohort"] = results["cohort"]
  facts["test recordings"] = f"{results['test_rows']:,}"
  with report.replaced(out) as folder:
    (folder / "results.json").write_text(report.as_json(results))
    images = []
    if image:
      (folder / f"{metric}.png").write_bytes(image)
      images.append((FIGURE_TITLES[metric], image))
    page = report.page("Comparison", notes, facts, tables, images, {})
    (folder / "report.html").write_text(page, encoding="utf-8")
  texts = [report.as_text(table) for table in tables]
  return "\n\n".join([*texts, *notes, f"{out}/report.html"])


def scores_and_differences(evaluations: list[Evaluation]) -> dict:
  """Scores of every run, differences to the first one and spread over seeds, as results.json has
  them.

  All runs are scored on the same bootstrap draws of test subjects.
  """
  first = evaluations[0]
  weights = statistics.bootstrap_weights(first.predictions["subject"], DRAWS, seed=0)
  phenotypes = list(first.results["phenotypes"])
  diseases = scored_diseases(evaluations)
  results = {
    "reference": first.name,
    "runs": {evaluation.name: str(evaluation.folder) for evaluation in evaluations},
    "cohort": first.results["cohort"],
    "cohort_fingerprint": first.results["cohort_fingerprint"],
    "test_rows": len(first.predictions["y_true"]),
    "differences": {},
    "seeds": {},
    "retrieval": {},
    "seen_people": {},
  }
  families = seeds(evaluations)  # the spread that no interval of one run tells of
  others = [evaluation.name for evaluation in evaluations[1:]]
  for metric, names, scores in (
    ("r2", phenotypes, r2_of(evaluations, weights)),
    ("auroc", diseases, auroc_of(evaluations, diseases, weights)),
  ):
    results[metric] = {}
    for run, score in scores.items():
      results[metric][run] = entries_of(names, score)
    results["differences"][metric] = differences(scores, names, first.name, others)
    if scores:
      of_families = {}
      for family, members in families.items():
        values = [scores[run].value for run in members]
        of_families[family] = over_seeds(names, values)
      results["seeds"][metric] = of_families
  for evaluation in evaluations:
    for key in ("retrieval", "seen_people"):
      if key in evaluation.results:
        results[key][evaluation.name] = evaluation.results[key]
  return results


def r2_of(evaluations: list[Evaluation], weights: np.ndarray) -> dict[str, Draws]:
  """R2 [K] of phenotypes of every run, and of the covariates alone, which no run has to itself; NaN
  where too few are measured."""
  first = evaluations[0]
  y = first.predictions["y_true"]
  enough = np.isfinite(y).sum(axis=0) >= FEWEST_TEST_ROWS
  predictions = {evaluation.name: evaluation.predictions["embedding"] for evaluation in evaluations}
  if COVARIATES in first.predictions:
    predictions[COVARIATES] = first.predictions[COVARIATES]
  scores = {}
  for run, x in predictions.items():
    value = np.where(enough, statistics.r2(y, x), np.nan)
    draws = np.where(enough, statistics.r2(y, x, weights), np.nan)
    scores[run] = Draws(value, draws)
  return scores


def auroc_of(
  evaluations: list[Evaluation],
  diseases: list[str],
  weights: np.ndarray,
) -> dict[str, Draws]:
  """AUROC [C] of `diseases` of every run; {} where there are none."""
  if not diseases:
    return {}
  first = evaluations[0]
  y = first.predictions["disease_y_true"]
  all_diseases = list(first.results["diseases"]["embedding"])
  scores = {}
  for evaluation in evaluations:
    value = []
    draws = []
    for name in diseases:
      c = all_diseases.index(name)
      probability = evaluation.predictions["disease_embedding"][:, c]
      value.append(statistics.auroc(y[:, c], probability))
      draws.append(statistics.auroc(y[:, c], probability, weights))
    scores[evaluation.name] = Draws(np.stack(value, axis=-1), np.stack(draws, axis=-1))
  return scores


def notes_on(evaluations: list[Evaluation], results: dict) -> list[str]:
  """What to know before reading the tables."""
  first = evaluations[0]
  notes = []
  if first.results.get("note"):
    notes.append(first.results["note"])
  for run, seen in results["seen_people"].items():
    if seen["note"]:
      notes.append(f"{run}: {seen['note']}")
  counts = []
  for metric, title in (("r2", "R2"), ("auroc", "AUROC")):
    entries_of_runs = results["differences"][metric].values()
    compared = sum(len(entries) for entries in entries_of_runs)
    if compared:
      counts.append(f"all {compared} of {title}")
  notes.append(
    f"Differences are to {first.name}, paired by test subject. Brackets are 95 % intervals, each "
    f"by itself; * marks those that stay away from 0 when {' or '.join(counts)} are to be right at "
    "once. They are of these training runs: other seeds may differ by more."
  )
  return notes


def tables_of(results: dict) -> list[Table]:
  tables = []
  for metric, name, kind, title in (
    ("r2", "R2", "phenotype", "Phenotypes"),
    ("auroc", "AUROC", "disease", "Diseases"),
  ):
    differences = results["differences"][metric]
    of_families = results["seeds"].get(metric, {})
    tables += [
      score_table(f"{title}: test {name}", kind, results[metric]),
      difference_table(f"{title}: difference of {name}", kind, differences),
      seed_table(f"{title}: mean {name} (SD) over seeds", kind, of_families),
    ]
  tables.append(retrieval_table(results["retrieval"]))
  return [table for table in tables if table.rows]


def forest(evaluations: list[Evaluation], metric: str, scores: dict) -> bytes | None:
  """PNG of the scores of every run with their intervals; None where nothing is scored."""
  points = {}
  for run, entries in scores.items():
    points[run] = {}
    for name, entry in entries.items():
      points[run][name] = {"mean": entry["value"], "ci": entry["ci"]}
  names = list(next(iter(points.values()), {}))
  if not names:
    return None
  label = {"r2": "test R\u00b2", "auroc": "test AUROC"}[metric]
  note = evaluations[0].results.get("note", "")
  runs = [evaluation.name for evaluation in evaluations]
  figure = figures.forest(points, names, runs, (COVARIATES,), label, note)
  return report.png(figure)


def read(path: pathlib.Path) -> Evaluation:
  """The evaluation in a folder, or the newest of a workdir on its own cohort."""
  folder = evaluation_folder(path)
  try:
    results = json.loads((folder / "results.json").read_text())
    predictions = files.arrays(folder / "predictions.npz")  # bytes, where a member is no array
  except Exception as error:  # see `arrays`
    raise UserError(
      f"cannot read the evaluation in {folder} ({error}); mmcl evaluate makes it anew"
    ) from error
  if not isinstance(results, dict):
    raise UserError(
      f"{folder}/results.json is not in the form that mmcl evaluate writes; evaluate the run anew"
    )
  lacking = []
  for file, entries, needed in (
    ("results.json", results, RESULTS),
    ("predictions.npz", predictions, PREDICTIONS),
  ):
    lacking += [f"{name} in {file}" for name in needed if name not in entries]
  if lacking:
    raise UserError(
      f"{folder} has no {', no '.join(lacking)}; evaluate the run anew with mmcl evaluate"
    )
  if wrong := malformed(results, predictions):
    raise UserError(
      f"{folder}: {', '.join(wrong)} not in the form that mmcl evaluate writes; evaluate the run "
      "anew"
    )
  workdir = path
  if path == folder and path.parent.name == "evaluation":
    workdir = path.parents[1]
  return Evaluation(workdir.resolve().name, folder, results, predictions)


def evaluation_folder(path: pathlib.Path) -> pathlib.Path:
  """A folder that holds an evaluation, or the newest one of a workdir on its own cohort."""
  if (path / "results.json").is_file():
    return path
  steps = {}
  for folder in (path / "evaluation").glob("*"):
    if folder.name.isdigit() and (folder / "results.json").is_file():
      steps[int(folder.name)] = folder
  if not steps:
    raise UserError(
      f"{path} has no evaluation; mmcl evaluate --workdir={path} makes one (one on another cohort "
      "is named by its folder, W/evaluation/STEP-COHORT)"
    )
  return steps[max(steps)]


def malformed(results: dict, predictions: dict[str, np.ndarray]) -> list[str]:
  """The entries of an evaluation that a comparison would stumble over."""
  diseases = results["diseases"]
  fine = {
    "cohort": isinstance(results["cohort"], str),
    "cohort_fingerprint": isinstance(results["cohort_fingerprint"], str),
    "note": isinstance(results.get("note", ""), str),
    "phenotypes": is_table(results["phenotypes"]),
    "diseases": isinstance(diseases, dict) and is_table(diseases.get("embedding")),
    "config": is_config(results.get("config", {})),
    "seen_people": is_seen_people(results.get("seen_people", {"note": ""})),
    "retrieval": "retrieval" not in results or is_retrieval(results["retrieval"]),
  }
  wrong = [name for name, is_fine in fine.items() if not is_fine]
  if wrong:
    return wrong
  rows = len(np.atleast_1d(predictions["subject"]))
  width = {}
  for name in ("y_true", "embedding"):
    width[name] = len(results["phenotypes"])
    width[f"disease_{name}"] = len(diseases["embedding"])
  if COVARIATES in predictions:
    width[COVARIATES] = width["embedding"]
  for name, columns in width.items():
    if not is_array(predictions[name], (rows, columns), "fiu"):
      wrong.append(name)
  if not is_array(predictions["subject"], (rows, 2), "iu"):
    wrong.append("subject")
  return wrong


def is_table(x: Any) -> bool:
  """Is it {name: {...}}?"""
  return isinstance(x, dict) and all(isinstance(row, dict) for row in x.values())


def is_config(x: Any) -> bool:
  """Is it {} or has it what `seeds` reads?"""
  if not isinstance(x, dict):
    return False
  return not x or (isinstance(x.get("data"), dict) and isinstance(x.get("seed"), int))


def is_seen_people(x: Any) -> bool:
  return isinstance(x, dict) and isinstance(x.get("note"), str)


def is_retrieval(x: Any) -> bool:
  if not is_table(x) or not {"ecg_to_cmr", "cmr_to_ecg"} <= x.keys():
    return False
  to_cmr = x["ecg_to_cmr"]
  to_ecg = x["cmr_to_ecg"]
  values = [
    to_cmr.get("r@10"),
    to_cmr.get("chance_r@10"),
    to_cmr.get("n_candidates"),
    to_ecg.get("r@10"),
  ]
  return all(isinstance(value, (int, float)) and abs(value) < 1e12 for value in values)


def is_array(x: np.ndarray, shape: tuple, kinds: str) -> bool:
  return x.shape == shape and x.dtype.kind in kinds


def with_distinct_names(evaluations: list[Evaluation]) -> list[Evaluation]:
  """Runs of equal names get their step, and where that is equal too, their place in the list."""
  names = [evaluation.name for evaluation in evaluations]
  with_steps = []
  for name, evaluation in zip(names, evaluations):
    if names.count(name) > 1:
      name = f"{name}/{evaluation.folder.name}"
    with_steps.append(name)
  distinct = []
  for place, (name, evaluation) in enumerate(zip(with_steps, evaluations), start=1):
    if with_steps.count(name) > 1 or name == COVARIATES:
      name = f"{name} ({place})"
    distinct.append(evaluation._replace(name=name))
  return distinct


def check_comparable(evaluations: list[Evaluation]) -> None:
  """Raises a UserError where the runs were not scored on the same recordings of one cohort."""
  first, *others = evaluations
  for other in others:
    if other.results["cohort_fingerprint"] != first.results["cohort_fingerprint"]:
      raise UserError(
        f"{other.folder} was evaluated on the cohort {other.results['cohort']}, {first.folder} on "
        f"{first.results['cohort']}; compare runs on one cohort: mmcl evaluate --cohort=DIR"
      )
    for name in ("subject", "y_true", "disease_y_true"):
      has_nan = name != "subject"
      if not np.array_equal(other.predictions[name], first.predictions[name], equal_nan=has_nan):
        raise UserError(
          f"{other.folder} and {first.folder} were not scored on the same test recordings ({name} "
          "differs); evaluate both anew"
        )


def scored_diseases(evaluations: list[Evaluation]) -> list[str]:
  """Diseases that every run has an AUROC of."""
  of_runs = [evaluation.results["diseases"]["embedding"] for evaluation in evaluations]
  return [name for name in of_runs[0] if all("auroc" in diseases[name] for diseases in of_runs)]


def seeds(evaluations: list[Evaluation]) -> dict[str, list[str]]:
  """{"A, B, ...": [A, B, ...]}: runs whose configs agree in all but the seed and where the cohort
  lies."""
  families = {}
  for evaluation in evaluations:
    config = dict(evaluation.results.get("config", {}))
    seed = config.pop("seed", None)
    if config:
      config["data"] = dict(config["data"])
      config["data"].pop("cohort", None)
      family = families.setdefault(json.dumps(config, sort_keys=True), {})
      family.setdefault(seed, evaluation.name)
  runs = {}
  for family in families.values():
    members = list(family.values())
    if len(members) > 1:
      runs[", ".join(members)] = members
  return runs


def over_seeds(names: list[str], values: list[np.ndarray]) -> dict:
  """{NAME: {mean, sd, seeds}} of a score [K] of each run."""
  mean = np.mean(values, axis=0)
  sd = np.std(values, axis=0, ddof=1)
  entries = {}
  for k, name in enumerate(names):
    entries[name] = {"mean": float(mean[k]), "sd": float(sd[k]), "seeds": len(values)}
  return entries


def differences(
  scores: dict[str, Draws],
  names: list[str],
  reference: str,
  others: list[str],
) -> dict[str, list[dict]]:
  """{run: [{name, value, ci, stands}]}: each run minus the reference; stands: 0 lies outside the
  simultaneous interval of all."""
  if not scores:
    return {}
  base = scores[reference]
  value = np.stack([scores[run].value - base.value for run in others])
  draws = np.stack([scores[run].draws - base.draws for run in others], axis=1)
  ci = statistics.interval(draws)
  low, high = statistics.simultaneous(value, draws)
  entries = {}
  for i, run in enumerate(others):
    entries[run] = []
    for k, name in enumerate(names):
      entry = {
        "name": name,
        "value": float(value[i, k]),
        "ci": ci[:, i, k].tolist(),
        "stands": bool(low[i, k] > 0 or high[i, k] < 0),
      }
      entries[run].append(entry)
  return entries


def entries_of(names: list[str], score: Draws) -> dict:
  """{NAME: {value, ci}}."""
  ci = statistics.interval(score.draws)
  entries = {}
  for k, name in enumerate(names):
    entries[name] = {"value": float(score.value[k]), "ci": ci[:, k].tolist()}
  return entries


def score_table(title: str, kind: str, scores: dict) -> Table:
  rows = []
  for name in next(iter(scores.values()), {}):
    row = [name]
    for entries in scores.values():
      row.append(interval(entries[name]["value"], entries[name]["ci"]))
    rows.append(row)
  return Table(title, [kind, *scores], rows)


def difference_table(title: str, kind: str, differences: dict) -> Table:
  """Differences to the reference; * marks those that stand."""
  rows = []
  for entries in zip(*differences.values()):
    row = [entries[0]["name"]]
    for entry in entries:
      mark = " *" if entry["stands"] else ""
      row.append(interval(entry["value"], entry["ci"]) + mark)
    rows.append(row)
  return Table(title, [kind, *differences], rows)


def seed_table(title: str, kind: str, families: dict) -> Table:
  rows = []
  for name in next(iter(families.values()), {}):
    row = [name]
    for entries in families.values():
      mean = number(entries[name]["mean"])
      sd = number(entries[name]["sd"])
      row.append(f"{mean} ({sd})")
    rows.append(row)
  return Table(title, [kind, *families], rows)


def retrieval_table(retrieval: dict) -> Table:
  rows = []
  for run, directions in retrieval.items():
    to_cmr = directions["ecg_to_cmr"]
    to_ecg = directions["cmr_to_ecg"]
    rows.append(
      [
        run,
        number(to_cmr["r@10"]),
        number(to_ecg["r@10"]),
        number(to_cmr["chance_r@10"]),
        f"{to_cmr['n_candidates']:,}",
      ]
    )
  head = ["run", "ECG to CMR", "CMR to ECG", "chance", "candidates"]
  return Table("Retrieval of the CMR by its ECG, and back: R@10", head, rows)


if __name__ == "__main__":
  from mmcl_jax import cli

  cli.run(main)
