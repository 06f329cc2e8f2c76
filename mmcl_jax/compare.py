"""`mmcl compare`: evaluated runs side by side, on the same test subjects.

    mmcl compare W1 W2 ... --out=DIR

A run is a workdir that `mmcl evaluate` has scored (the newest step counts) or the folder of one
evaluation. Every run is held against the first, in pairs: both are scored on the same bootstrap
draws of test subjects. Writes DIR/report.html, results.json and figures.
"""

import argparse
import json
import pathlib
from typing import NamedTuple

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
  first, others = found[0], found[1:]
  weights = statistics.bootstrap_weights(first.predictions["subject"], DRAWS, seed=0)

  # -- Scores of every run, and of the covariates alone, which no run has to itself --
  phenotypes = list(first.results["phenotypes"])
  y = first.predictions["y_true"]
  models = {one.name: one.predictions["embedding"] for one in found}
  if COVARIATES in first.predictions:
    models[COVARIATES] = first.predictions[COVARIATES]
  enough = np.isfinite(y).sum(axis=0) >= FEWEST_TEST_ROWS
  r2 = {}
  for name, x in models.items():

    def measured_r2(w=None, x=x):
      return np.where(enough, statistics.r2(y, x, w), np.nan)

    r2[name] = score(measured_r2, weights)
  diseases = scored_diseases(found)
  sick = first.predictions["disease_y_true"]
  columns = [list(first.results["diseases"]["embedding"]).index(name) for name in diseases]

  def area(x):
    return lambda w: np.stack([statistics.auroc(sick[:, c], x[:, c], w) for c in columns], axis=-1)

  auroc = (
    {one.name: score(area(one.predictions["disease_embedding"]), weights) for one in found}
    if diseases
    else {}
  )

  # -- Differences to the first, and how sure they are when this many are looked at --
  names = {"r2": phenotypes, "auroc": diseases}
  families = seeds(found)  # with one, the spread that no interval of one run tells of
  differences = {
    what: differ(scores, first.name, [one.name for one in others])
    for what, scores in (("r2", r2), ("auroc", auroc))
  }
  results = {
    "reference": first.name,
    "runs": {one.name: str(one.folder) for one in found},
    "cohort": first.results["cohort"],
    "cohort_fingerprint": first.results["cohort_fingerprint"],
    "test_rows": len(y),
    **{
      what: {run: table(names[what], *scores[run]) for run in scores}
      for what, scores in (("r2", r2), ("auroc", auroc))
    },
    "differences": {
      what: {
        run: [{"name": name} | entry for name, entry in zip(names[what], entries)]
        for run, entries in differences[what].items()
      }
      for what in differences
    },
    "seeds": {
      what: {
        family: over_seeds(names[what], [scores[run][0] for run in members])
        for family, members in families.items()
      }
      for what, scores in (("r2", r2), ("auroc", auroc))
      if scores
    },
    "retrieval": {
      one.name: one.results["retrieval"] for one in found if "retrieval" in one.results
    },
    "seen_people": {
      one.name: one.results["seen_people"] for one in found if "seen_people" in one.results
    },
  }
  notes = [first.results["note"]] if first.results.get("note") else []
  notes += [
    f"{name}: {seen['note']}" for name, seen in results["seen_people"].items() if seen["note"]
  ]
  counts = " or ".join(
    f"all {len(of) * len(others)} of {what}"
    for of, what in ((phenotypes, "R2"), (diseases, "AUROC"))
    if of
  )
  notes.append(
    f"Differences are to {first.name}, paired by test subject. Brackets are 95 % intervals, each by itself; * marks those "
    f"that stay away from 0 when {counts} are to be right at once. They are of these training runs: other seeds may "
    "differ by more."
  )
  retrieved = retrieval_table(results["retrieval"])
  tables = []
  for what, name, kind, title in (
    ("r2", "R2", "phenotype", "Phenotypes"),
    ("auroc", "AUROC", "disease", "Diseases"),
  ):
    tables.append(side_by_side(f"{title}: test {name}", kind, results[what]))
    tables.append(changes(f"{title}: difference of {name}", kind, results["differences"][what]))
    seeds_title = f"{title}: mean {name} (SD) over seeds"
    tables.append(seed_table(seeds_title, kind, results["seeds"].get(what, {})))
  tables = [table for table in (*tables, retrieved) if table.rows]
  what, label = ("r2", "test R\u00b2") if phenotypes else ("auroc", "test AUROC")
  forest = {
    run: {name: {"mean": entry["value"], "ci": entry["ci"]} for name, entry in scores.items()}
    for run, scores in results[what].items()
  }
  image = None
  if names[what]:
    image = report.png(
      figures.forest(
        forest,
        names[what],
        [one.name for one in found],
        (COVARIATES,),
        label,
        notes[0] if first.results.get("note") else "",
      )
    )
  facts = {one.name: one.folder for one in found} | {
    "cohort": first.results["cohort"],
    "test recordings": f"{len(y):,}",
  }
  with report.replaced(out) as folder:
    (folder / "results.json").write_text(report.as_json(results))
    images = []
    if image:
      (folder / f"{what}.png").write_bytes(image)
      images.append((FIGURE_TITLES[what], image))
    page = report.page("Comparison", notes, facts, tables, images, {})
    (folder / "report.html").write_text(page, encoding="utf-8")
  text = "\n\n".join(report.as_text(table) for table in tables)
  return "\n\n".join([text, *notes, f"{out}/report.html"])


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
        f"{path} has no evaluation; mmcl evaluate --workdir={path} makes one (one on another cohort is named by "
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
      f"{folder}: {', '.join(wrong)} not in the form that mmcl evaluate writes; evaluate the run anew"
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

  def tables(x):
    return isinstance(x, dict) and all(isinstance(one, dict) for one in x.values())

  def numbers(x, names):
    return isinstance(x, dict) and all(
      isinstance(x.get(name), (int, float)) and abs(x[name]) < 1e12 for name in names
    )

  wrong = [
    name
    for name in ("cohort", "cohort_fingerprint", "note")
    if not isinstance(results.get(name, ""), str)
  ]
  wrong += ["phenotypes"] * (not tables(results["phenotypes"]))
  wrong += ["diseases"] * (
    not isinstance(results["diseases"], dict) or not tables(results["diseases"].get("embedding"))
  )
  config, retrieval = (
    results.get("config", {}),
    results.get("retrieval", {"ecg_to_cmr": {}, "cmr_to_ecg": {}}),
  )
  fine = isinstance(config, dict) and (
    not config or (isinstance(config.get("data"), dict) and isinstance(config.get("seed"), int))
  )
  wrong += ["config"] * (not fine)
  seen = results.get("seen_people", {"note": ""})
  wrong += ["seen_people"] * (not isinstance(seen, dict) or not isinstance(seen.get("note"), str))
  fine = tables(retrieval) and (
    "retrieval" not in results
    or (
      numbers(retrieval.get("ecg_to_cmr"), ("r@10", "chance_r@10", "n_candidates"))
      and numbers(retrieval.get("cmr_to_ecg"), ("r@10",))
    )
  )
  wrong += ["retrieval"] * (not fine)
  if wrong:
    return wrong
  rows, width = (
    len(np.atleast_1d(predictions["subject"])),
    {"y_true": len(results["phenotypes"]), "embedding": len(results["phenotypes"])},
  )
  width |= {
    f"disease_{name}": len(results["diseases"]["embedding"]) for name in ("y_true", "embedding")
  }
  width |= {COVARIATES: width["embedding"]} if COVARIATES in predictions else {}
  wrong += [
    name
    for name, columns in width.items()
    if predictions[name].shape != (rows, columns) or predictions[name].dtype.kind not in "fiu"
  ]
  return wrong + ["subject"] * (
    predictions["subject"].shape != (rows, 2) or predictions["subject"].dtype.kind not in "iu"
  )


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
        f"{one.folder} was evaluated on the cohort {one.results['cohort']}, {first.folder} on {first.results['cohort']}; "
        "compare runs on one cohort: mmcl evaluate --cohort=DIR"
      )
    for name in ("subject", "y_true", "disease_y_true"):
      if not np.array_equal(
        one.predictions[name], first.predictions[name], equal_nan=name != "subject"
      ):
        raise UserError(
          f"{one.folder} and {first.folder} were not scored on the same test recordings ({name} differs); evaluate "
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


def score(function, weights) -> tuple[np.ndarray, np.ndarray]:
  """Scores [K] and their draws [R, K]."""
  return function(None), function(weights)


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


def table(names: list[str], value: np.ndarray, draws: np.ndarray) -> dict:
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
