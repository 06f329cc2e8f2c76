"""`mmcl compare`: evaluated runs side by side, on the same test subjects.

    mmcl compare W1 W2 ... --out=DIR

A run is a workdir that `mmcl evaluate` has scored (the newest step counts) or the folder of one evaluation. Every run is
held against the first, in pairs: both are scored on the same bootstrap draws of test subjects. Writes DIR/report.html,
results.json and figures.
"""

import argparse
import json
import pathlib
from typing import NamedTuple

import numpy as np

from mmcl_jax.errors import UserError
from mmcl_jax.evaluators import figures, report, statistics
from mmcl_jax.evaluators.phenotypes import FEWEST_TEST_ROWS

DRAWS = 1000
COVARIATES = "covariates"


class Evaluation(NamedTuple):
  """What `mmcl evaluate` left: results.json, and predictions.npz on test."""

  name: str
  folder: pathlib.Path
  results: dict
  predictions: dict[str, np.ndarray]


def main(argv):
  parser = argparse.ArgumentParser(prog="mmcl compare", description=__doc__.partition("\n\n")[0], allow_abbrev=False)
  parser.add_argument("runs", nargs="+", metavar="W", help="workdir, or folder of an evaluation; the first is the reference")
  parser.add_argument("--out", required=True, help="folder for the report")
  args = parser.parse_intermixed_args(argv)
  if len(args.runs) < 2:
    raise UserError("mmcl compare needs two runs or more; the first is the one that the others are held against")
  print(compare(args.runs, args.out))


def compare(runs: list[str], out: str) -> str:
  """Writes the report; returns its table as text."""
  found = named([read(pathlib.Path(run)) for run in runs])
  check(found)
  first, others = found[0], found[1:]
  weights = statistics.bootstrap_weights(first.predictions["subject"], DRAWS, seed=0)

  # -- Scores of every run, and of the covariates alone, which no run has to itself --
  phenotypes = list(first.results["phenotypes"])
  y = first.predictions["y_true"]
  models = {one.name: one.predictions["embedding"] for one in found}
  if COVARIATES in first.predictions:
    models[COVARIATES] = first.predictions[COVARIATES]
  enough = np.isfinite(y).sum(axis=0) >= FEWEST_TEST_ROWS
  r2 = {name: score(lambda w: np.where(enough, statistics.r2(y, x, w), np.nan), weights) for name, x in models.items()}
  diseases = scored_diseases(found)
  sick = first.predictions["disease_y_true"]
  columns = [list(first.results["diseases"]["embedding"]).index(name) for name in diseases]
  area = lambda x: lambda w: np.stack([statistics.auroc(sick[:, c], x[:, c], w) for c in columns], axis=-1)
  auroc = {one.name: score(area(one.predictions["disease_embedding"]), weights) for one in found} if diseases else {}

  # -- Differences to the first, and how sure they are when this many are looked at --
  names = {"r2": phenotypes, "auroc": diseases}
  differences = {what: differ(scores, first.name, [one.name for one in others]) for what, scores in (("r2", r2), ("auroc", auroc))}
  results = {
      "reference": first.name, "runs": {one.name: str(one.folder) for one in found}, "cohort": first.results["cohort"],
      "cohort_fingerprint": first.results["cohort_fingerprint"], "test_rows": len(y),
      **{what: {run: table(names[what], *scores[run]) for run in scores} for what, scores in (("r2", r2), ("auroc", auroc))},
      "differences": {what: {run: [{"name": name} | entry for name, entry in zip(names[what], entries)]
                             for run, entries in differences[what].items()} for what in differences},
      "retrieval": {one.name: one.results["retrieval"] for one in found if "retrieval" in one.results},
  }
  notes = [first.results["note"]] if first.results.get("note") else []
  counts = " or ".join(f"all {len(of) * len(others)} of {what}" for of, what in ((phenotypes, "R2"), (diseases, "AUROC")) if of)
  notes.append(f"Differences are to {first.name}, paired by test subject. Brackets are 95 % intervals, each by itself; * marks those "
               f"that stay away from 0 when {counts} are to be right at once. One training run of each: other seeds may differ by "
               "more.")
  sections = [(title, rows) for title, rows in (
      ("Phenotypes: test R2", side_by_side("phenotype", results["r2"])),
      ("Phenotypes: difference of R2", changes("phenotype", results["differences"]["r2"])),
      ("Diseases: test AUROC", side_by_side("disease", results["auroc"])),
      ("Diseases: difference of AUROC", changes("disease", results["differences"]["auroc"])),
      ("Retrieval of the CMR by its ECG, and back: R@10", retrieval_rows(results["retrieval"]))) if len(rows) > 1]
  forest = {run: {name: {"mean": entry["value"], "ci": entry["ci"]} for name, entry in scores.items()}
            for run, scores in results["r2"].items()}
  images = {"r2": report.png(figures.forest(forest, phenotypes, [one.name for one in found], (COVARIATES,), "test $R^2$",
                                            notes[0] if first.results.get("note") else ""))}
  facts = {one.name: one.folder for one in found} | {"cohort": first.results["cohort"], "test recordings": f"{len(y):,}"}
  with report.replaced(out) as folder:
    (folder / "results.json").write_text(report.as_json(results))
    (folder / "r2.png").write_bytes(images["r2"])
    (folder / "report.html").write_text(report.page("Comparison", notes, facts, sections, images, {}), encoding="utf-8")
  text = "\n\n".join(report.aligned(rows) for _, rows in sections)
  return "\n\n".join([text, *notes, f"{out}/report.html"])


def read(path: pathlib.Path) -> Evaluation:
  """The evaluation in a folder, or the newest of a workdir on its own cohort."""
  folder = path
  if not (path / "results.json").is_file():
    steps = [one for one in (path / "evaluation").glob("*") if one.name.isdigit() and (one / "results.json").is_file()]
    if not steps:
      raise UserError(f"{path} has no evaluation; mmcl evaluate --workdir={path} makes one (one on another cohort is named by "
                      "its folder, W/evaluation/STEP-COHORT)")
    folder = max(steps, key=lambda one: int(one.name))
  try:
    results = json.loads((folder / "results.json").read_text())
    with np.load(folder / "predictions.npz") as arrays:
      predictions = dict(arrays)
  except Exception as error:  # a damaged archive raises zlib's, zipfile's and NumPy's errors alike
    raise UserError(f"cannot read the evaluation in {folder} ({error}); mmcl evaluate makes it anew") from error
  lacking = [f"{name} in results.json" for name in ("phenotypes", "diseases", "cohort", "cohort_fingerprint") if name not in results]
  lacking += [f"{name} in predictions.npz" for name in ("subject", "y_true", "embedding", "disease_y_true", "disease_embedding")
              if name not in predictions]
  if lacking:
    raise UserError(f"{folder} has no {', no '.join(lacking)}; evaluate the run anew with mmcl evaluate")
  return Evaluation((path.parents[1] if path == folder and path.parent.name == "evaluation" else path).resolve().name, folder,
                    results, predictions)


def named(found: list[Evaluation]) -> list[Evaluation]:
  """Runs of equal names get their step, and where that is equal too, their place in the list."""
  names = [one.name for one in found]
  names = [name if names.count(name) == 1 else f"{name}/{one.folder.name}" for name, one in zip(names, found)]
  names = [name if names.count(name) == 1 and name != COVARIATES else f"{name} ({i + 1})" for i, name in enumerate(names)]
  return [one._replace(name=name) for name, one in zip(names, found)]


def check(found: list[Evaluation]) -> None:
  first = found[0]
  for one in found[1:]:
    if one.results["cohort_fingerprint"] != first.results["cohort_fingerprint"]:
      raise UserError(f"{one.folder} was evaluated on the cohort {one.results['cohort']}, {first.folder} on {first.results['cohort']}; "
                      "compare runs on one cohort: mmcl evaluate --cohort=DIR")
    for name in ("subject", "y_true", "disease_y_true"):
      if not np.array_equal(one.predictions[name], first.predictions[name], equal_nan=name != "subject"):
        raise UserError(f"{one.folder} and {first.folder} were not scored on the same test recordings ({name} differs); evaluate "
                        "both anew")


def scored_diseases(found: list[Evaluation]) -> list[str]:
  """Diseases that every run has an AUROC of."""
  tables = [one.results["diseases"]["embedding"] for one in found]
  return [name for name in tables[0] if all("auroc" in table[name] for table in tables)]


def score(function, weights) -> tuple[np.ndarray, np.ndarray]:
  """Scores [K] and their draws [R, K]."""
  return function(None), function(weights)


def differ(scores: dict, reference: str, others: list[str]) -> dict[str, list[dict]]:
  """{run: [{value, ci, stands}]}: each run minus the reference; stands: 0 lies outside the simultaneous interval of all."""
  if not scores:
    return {}
  value = np.stack([scores[run][0] - scores[reference][0] for run in others])
  draws = np.stack([scores[run][1] - scores[reference][1] for run in others], axis=1)
  ci, (low, high) = statistics.interval(draws), statistics.simultaneous(value, draws)
  return {run: [{"value": float(value[i, k]), "ci": ci[:, i, k].tolist(), "stands": bool(low[i, k] > 0 or high[i, k] < 0)}
                for k in range(value.shape[1])] for i, run in enumerate(others)}


def table(names: list[str], value: np.ndarray, draws: np.ndarray) -> dict:
  ci = statistics.interval(draws)
  return {name: {"value": float(value[k]), "ci": ci[:, k].tolist()} for k, name in enumerate(names)}


# Rows of text, headings first

def side_by_side(what: str, scores: dict) -> list[list[str]]:
  names = list(next(iter(scores.values()), {}))
  return [[what, *scores], *([name, *(report.interval(one[name]["value"], one[name]["ci"]) for one in scores.values())]
                             for name in names)]


def changes(what: str, differences: dict) -> list[list[str]]:
  rows = [[what, *differences]]
  for entries in zip(*differences.values()):
    rows.append([entries[0]["name"], *(report.interval(one["value"], one["ci"]) + " *" * one["stands"] for one in entries)])
  return rows


def retrieval_rows(retrieval: dict) -> list[list[str]]:
  return [["run", "ECG to CMR", "CMR to ECG", "chance", "candidates"],
          *([run, *(report.number(ways[way]["r@10"]) for way in ("ecg_to_cmr", "cmr_to_ecg")),
             report.number(ways["ecg_to_cmr"]["chance_r@10"]), f"{ways['ecg_to_cmr']['n_candidates']:,}"]
            for run, ways in retrieval.items())]


if __name__ == "__main__":
  from mmcl_jax import cli
  cli.run(main)
