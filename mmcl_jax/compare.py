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
from mmcl_jax.evaluators import figures, report, statistics
from mmcl_jax.evaluators.base import Table, interval, number
from mmcl_jax.evaluators.statistics import FEWEST_TEST_ROWS
from mmcl_jax.support import files
from mmcl_jax.support.paths import local

DRAWS = 1000
COVARIATES = "covariates"
FIGURE_TITLES = {
  "r2": "R2 of every phenotype, beside its baselines",
  "auroc": "AUROC of every disease",
}


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
  found = named([read(pathlib.Path(run)) for run in runs])
  check(found)
  first = found[0]
  results = measured(found)
  notes, tables = notes_on(found, results), tables_of(results)
  what = "r2" if first.results["phenotypes"] else "auroc"
  image = forest(found, what, results[what])
  facts = {one.name: one.folder for one in found}
  facts |= {"cohort": results["cohort"], "test recordings": f"{results['test_rows']:,}"}
  with report.replaced(out) as folder:
    (folder / "results.json").write_text(report.as_json(results))
    images = []
    if image:
      (folder / f"{what}.png").write_bytes(image)
      images.append((FIGURE_TITLES[what], image))
    page = report.page("Comparison", notes, facts, tables, images, {})
    (folder / "report.html").write_text(page, encoding="utf-8")
  texts = [report.as_text(table) for table in tables]
  return "\n\n".join([*texts, *notes, f"{out}/report.html"])


def measured(found: list[Evaluation]) -> dict:
  """Scores of every run, differences to the first one and spread over seeds, as results.json has
  them.

  All runs are scored on the same bootstrap draws of test subjects.
  """
  first = found[0]
  weights = statistics.bootstrap_weights(first.predictions["subject"], DRAWS, seed=0)
  names = {"r2": list(first.results["phenotypes"]), "auroc": scored_diseases(found)}
  scores = {"r2": r2_of(found, weights), "auroc": auroc_of(found, names["auroc"], weights)}
  results = {
    "reference": first.name,
    "runs": {one.name: str(one.folder) for one in found},
    "cohort": first.results["cohort"],
    "cohort_fingerprint": first.results["cohort_fingerprint"],
    "test_rows": len(first.predictions["y_true"]),
    "differences": {},
    "seeds": {},
    "retrieval": {},
    "seen_people": {},
  }
  families = seeds(found)  # the spread that no interval of one run tells of
  others = [one.name for one in found[1:]]
  for what, of_runs in scores.items():
    results[what] = {}
    for run, (value, draws) in of_runs.items():
      results[what][run] = entries_of(names[what], value, draws)
    results["differences"][what] = {}
    for run, entries in differ(of_runs, first.name, others).items():
      named_entries = []
      for name, entry in zip(names[what], entries):
        named_entries.append({"name": name} | entry)
      results["differences"][what][run] = named_entries
    if of_runs:
      results["seeds"][what] = {}
      for family, members in families.items():
        values = [of_runs[run][0] for run in members]
        results["seeds"][what][family] = over_seeds(names[what], values)
  for one in found:
    for key in ("retrieval", "seen_people"):
      if key in one.results:
        results[key][one.name] = one.results[key]
  return results


def r2_of(found: list[Evaluation], weights: np.ndarray) -> dict:
  """{run: (R2 [K], its draws [R, K])} of phenotypes; of the covariates alone too, which no run has
  to itself. NaN where too few are measured."""
  first = found[0]
  y = first.predictions["y_true"]
  enough = np.isfinite(y).sum(axis=0) >= FEWEST_TEST_ROWS
  models = {one.name: one.predictions["embedding"] for one in found}
  if COVARIATES in first.predictions:
    models[COVARIATES] = first.predictions[COVARIATES]
  scores = {}
  for run, x in models.items():
    value, draws = statistics.r2(y, x), statistics.r2(y, x, weights)
    scores[run] = np.where(enough, value, np.nan), np.where(enough, draws, np.nan)
  return scores


def auroc_of(found: list[Evaluation], diseases: list[str], weights: np.ndarray) -> dict:
  """{run: (AUROC [C], its draws [R, C])} of `diseases`; {} where there are none."""
  first = found[0]
  y = first.predictions["disease_y_true"]
  known = list(first.results["diseases"]["embedding"])
  scores = {}
  for one in found if diseases else ():
    value, draws = [], []
    for name in diseases:
      c = known.index(name)
      x = one.predictions["disease_embedding"][:, c]
      value.append(statistics.auroc(y[:, c], x))
      draws.append(statistics.auroc(y[:, c], x, weights))
    scores[one.name] = np.stack(value, axis=-1), np.stack(draws, axis=-1)
  return scores


def notes_on(found: list[Evaluation], results: dict) -> list[str]:
  """What to know before reading the tables."""
  first, notes = found[0], []
  if first.results.get("note"):
    notes.append(first.results["note"])
  for run, seen in results["seen_people"].items():
    if seen["note"]:
      notes.append(f"{run}: {seen['note']}")
  counts = []
  for what, title in (("r2", "R2"), ("auroc", "AUROC")):
    compared = sum(len(entries) for entries in results["differences"][what].values())
    if compared:
      counts.append(f"all {compared} of {title}")
  notes.append(
    f"Differences are to {first.name}, paired by test subject. Brackets are 95 % intervals, each "
    "by "
    f"itself; * marks those that stay away from 0 when {' or '.join(counts)} are to be right at "
    "once. They are of these training runs: other seeds may differ by more."
  )
  return notes


def tables_of(results: dict) -> list[Table]:
  tables = []
  for what, name, kind, title in (
    ("r2", "R2", "phenotype", "Phenotypes"),
    ("auroc", "AUROC", "disease", "Diseases"),
  ):
    tables.append(side_by_side(f"{title}: test {name}", kind, results[what]))
    tables.append(changes(f"{title}: difference of {name}", kind, results["differences"][what]))
    over = f"{title}: mean {name} (SD) over seeds"
    tables.append(seed_table(over, kind, results["seeds"].get(what, {})))
  tables.append(retrieval_table(results["retrieval"]))
  return [table for table in tables if table.rows]


def forest(found: list[Evaluation], what: str, scores: dict) -> bytes | None:
  """PNG of the scores of every run with their intervals; None where nothing is scored."""
  points = {}
  for run, entries in scores.items():
    points[run] = {name: {"mean": x["value"], "ci": x["ci"]} for name, x in entries.items()}
  names = list(next(iter(points.values()), {}))
  if not names:
    return None
  label = {"r2": "test R\u00b2", "auroc": "test AUROC"}[what]
  note = found[0].results.get("note", "")
  runs = [one.name for one in found]
  return report.png(figures.forest(points, names, runs, (COVARIATES,), label, note))


def read(path: pathlib.Path) -> Evaluation:
  """The evaluation in a folder, or the newest of a workdir on its own cohort."""
  folder = path
  if not (path / "results.json").is_file():
    steps = [
      one
      for one in (path / "evaluation").glob("*")
      if one.name.isdigit() and (one / "results.json").is_file()
    ]
    if not steps:
      raise UserError(
        f"{path} has no evaluation; mmcl evaluate --workdir={path} makes one (one on another "
        "cohort is named by "
        "its folder, W/evaluation/STEP-COHORT)"
      )
    folder = max(steps, key=lambda one: int(one.name))
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
  lacking = [
    f"{name} in results.json"
    for name in ("phenotypes", "diseases", "cohort", "cohort_fingerprint")
    if name not in results
  ]
  lacking += [
    f"{name} in predictions.npz"
    for name in ("subject", "y_true", "embedding", "disease_y_true", "disease_embedding")
    if name not in predictions
  ]
  if lacking:
    raise UserError(
      f"{folder} has no {', no '.join(lacking)}; evaluate the run anew with mmcl evaluate"
    )
  if wrong := malformed(results, predictions):
    raise UserError(
      f"{folder}: {', '.join(wrong)} not in the form that mmcl evaluate writes; evaluate the run "
      "anew"
    )
  return Evaluation(
    (path.parents[1] if path == folder and path.parent.name == "evaluation" else path)
    .resolve()
    .name,
    folder,
    results,
    predictions,
  )


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
  there, back = x["ecg_to_cmr"], x["cmr_to_ecg"]
  numbers = [
    there.get("r@10"),
    there.get("chance_r@10"),
    there.get("n_candidates"),
    back.get("r@10"),
  ]
  return all(isinstance(one, (int, float)) and abs(one) < 1e12 for one in numbers)


def is_array(x: np.ndarray, shape: tuple, kinds: str) -> bool:
  return x.shape == shape and x.dtype.kind in kinds


def named(found: list[Evaluation]) -> list[Evaluation]:
  """Runs of equal names get their step, and where that is equal too, their place in the list."""
  names = [one.name for one in found]
  names = [
    name if names.count(name) == 1 else f"{name}/{one.folder.name}"
    for name, one in zip(names, found)
  ]
  names = [
    name if names.count(name) == 1 and name != COVARIATES else f"{name} ({i + 1})"
    for i, name in enumerate(names)
  ]
  return [one._replace(name=name) for name, one in zip(names, found)]


def check(found: list[Evaluation]) -> None:
  first = found[0]
  for one in found[1:]:
    if one.results["cohort_fingerprint"] != first.results["cohort_fingerprint"]:
      raise UserError(
        f"{one.folder} was evaluated on the cohort {one.results['cohort']}, {first.folder} on "
        f"{first.results['cohort']}; "
        "compare runs on one cohort: mmcl evaluate --cohort=DIR"
      )
    for name in ("subject", "y_true", "disease_y_true"):
      if not np.array_equal(
        one.predictions[name], first.predictions[name], equal_nan=name != "subject"
      ):
        raise UserError(
          f"{one.folder} and {first.folder} were not scored on the same test recordings ({name} "
          "differs); evaluate "
          "both anew"
        )


def scored_diseases(found: list[Evaluation]) -> list[str]:
  """Diseases that every run has an AUROC of."""
  tables = [one.results["diseases"]["embedding"] for one in found]
  return [name for name in tables[0] if all("auroc" in table[name] for table in tables)]


def seeds(found: list[Evaluation]) -> dict[str, list[str]]:
  """{"A, B, ...": [A, B, ...]}: runs whose configs agree in all but the seed and where the cohort
  lies."""
  families = {}
  for one in found:
    config = {key: value for key, value in one.results.get("config", {}).items() if key != "seed"}
    if config:
      config["data"] = {key: value for key, value in config["data"].items() if key != "cohort"}
      families.setdefault(json.dumps(config, sort_keys=True), {}).setdefault(
        one.results["config"]["seed"], one.name
      )
  return {
    ", ".join(members.values()): list(members.values())
    for members in families.values()
    if len(members) > 1
  }


def over_seeds(names: list[str], values: list[np.ndarray]) -> dict:
  """{NAME: {mean, sd, seeds}} of a score [K] of each run."""
  mean, sd = np.mean(values, axis=0), np.std(values, axis=0, ddof=1)
  return {
    name: {"mean": float(mean[k]), "sd": float(sd[k]), "seeds": len(values)}
    for k, name in enumerate(names)
  }


def differ(scores: dict, reference: str, others: list[str]) -> dict[str, list[dict]]:
  """{run: [{value, ci, stands}]}: each run minus the reference; stands: 0 lies outside the
  simultaneous interval of all."""
  if not scores:
    return {}
  value = np.stack([scores[run][0] - scores[reference][0] for run in others])
  draws = np.stack([scores[run][1] - scores[reference][1] for run in others], axis=1)
  ci, (low, high) = statistics.interval(draws), statistics.simultaneous(value, draws)
  return {
    run: [
      {
        "value": float(value[i, k]),
        "ci": ci[:, i, k].tolist(),
        "stands": bool(low[i, k] > 0 or high[i, k] < 0),
      }
      for k in range(value.shape[1])
    ]
    for i, run in enumerate(others)
  }


def entries_of(names: list[str], value: np.ndarray, draws: np.ndarray) -> dict:
  ci = statistics.interval(draws)
  return {name: {"value": float(value[k]), "ci": ci[:, k].tolist()} for k, name in enumerate(names)}


def side_by_side(title: str, kind: str, scores: dict) -> Table:
  rows = []
  for name in next(iter(scores.values()), {}):
    row = [name]
    for one in scores.values():
      row.append(interval(one[name]["value"], one[name]["ci"]))
    rows.append(row)
  return Table(title, [kind, *scores], rows)


def changes(title: str, kind: str, differences: dict) -> Table:
  """Differences to the reference; * marks those that stand."""
  rows = []
  for entries in zip(*differences.values()):
    row = [entries[0]["name"]]
    for one in entries:
      mark = " *" if one["stands"] else ""
      row.append(interval(one["value"], one["ci"]) + mark)
    rows.append(row)
  return Table(title, [kind, *differences], rows)


def seed_table(title: str, kind: str, families: dict) -> Table:
  rows = []
  for name in next(iter(families.values()), {}):
    row = [name]
    for one in families.values():
      row.append(f"{number(one[name]['mean'])} ({number(one[name]['sd'])})")
    rows.append(row)
  return Table(title, [kind, *families], rows)


def retrieval_table(retrieval: dict) -> Table:
  rows = []
  for run, ways in retrieval.items():
    there, back = ways["ecg_to_cmr"], ways["cmr_to_ecg"]
    recalls = [number(there["r@10"]), number(back["r@10"]), number(there["chance_r@10"])]
    rows.append([run, *recalls, f"{there['n_candidates']:,}"])
  head = ["run", "ECG to CMR", "CMR to ECG", "chance", "candidates"]
  return Table("Retrieval of the CMR by its ECG, and back: R@10", head, rows)


if __name__ == "__main__":
  from mmcl_jax import cli

  cli.run(main)
