"""What the scores rest on: records, labels and cases by split; what was read, and what left out."""

import json
import pathlib

import jax
import numpy as np

from mmcl_jax.evaluators.base import Result, Table
from mmcl_jax.evaluators.context import Context


def data(context: Context) -> Result:
  """The data card: counts of each split, and what `mmcl prepare` read and rejected."""
  cohort = context.cohort
  features = {split: context.features(split) for split in cohort.splits}
  card = data_card(cohort, features) | prepared(cohort)
  counts = {split: len(found["subject"]) for split, found in features.items()}
  return Result({"data": card}, tables(card, counts))


def data_card(cohort, features) -> dict:
  """Labels known, and cases, by split."""

  def counted(kind, names, holds):
    found = {}
    for k, name in enumerate(names):
      found[name] = {split: int(holds(x[kind][:, k]).sum()) for split, x in features.items()}
    return found

  return {
    "source": cohort.info["source"],
    "with_ecg": cohort.info["with_ecg"],
    "with_cmr": cohort.info["with_cmr"],
    "labels": counted("phenotypes", cohort.info["phenotypes"], np.isfinite),
    "cases": counted("diseases", cohort.info["diseases"], lambda y: y == 1),
  }


def prepared(cohort) -> dict:
  """{steps, rejected} of `mmcl prepare`; empty where quality.json is absent, or damaged, which a
  line then says."""
  file = pathlib.Path(cohort.path) / "quality.json"
  if not file.exists():
    return {"steps": {}, "rejected": {}}
  try:
    found = json.loads(file.read_bytes())
    return {
      "steps": {name: int(count) for name, count in found["steps"].items()},
      "rejected": {str(reason["text"]): int(reason["records"]) for reason in found["reasons"]},
    }
  except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    if jax.process_index() == 0:
      print(
        f"{file} cannot be read ({type(error).__name__}): the report will not say what was read "
        "and rejected",
        flush=True,
      )
    return {"steps": {}, "rejected": {}}


def tables(card: dict, counts: dict[str, int]) -> list[Table]:
  """Those that have rows: records, labels and cases by split; what was read and what rejected."""
  if not card:
    return []
  records = {
    "in the splits": counts,
    "with ECG": card["with_ecg"],
    "with CMR": card["with_cmr"],
  }
  found = []
  for title, table in (
    ("records", records),
    ("known labels", card["labels"]),
    ("cases", card["cases"]),
  ):
    rows = [[name, *(f"{row[split]:,}" for split in counts)] for name, row in table.items()]
    found.append(Table(f"Data: {title}", ["", *counts], rows))
  for title, table in (
    ("what was read", card["steps"]),
    ("rejected, and why", card["rejected"]),
  ):
    rows = [[name, f"{count:,}"] for name, count in table.items()]
    found.append(Table(f"Data: {title}", ["", "records"], rows))
  return [table for table in found if table.rows]
