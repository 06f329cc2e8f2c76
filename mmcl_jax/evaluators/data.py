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
  counts = {split: len(arrays["subject"]) for split, arrays in features.items()}
  return Result({"data": card}, tables(card, counts))


def data_card(cohort, features) -> dict:
  """Labels known, and cases, by split."""
  labels = {}
  cases = {}
  for k, name in enumerate(cohort.info["phenotypes"]):
    labels[name] = {}
    for split, arrays in features.items():
      measured = np.isfinite(arrays["phenotypes"][:, k])
      labels[name][split] = int(measured.sum())
  for c, name in enumerate(cohort.info["diseases"]):
    cases[name] = {}
    for split, arrays in features.items():
      is_case = arrays["diseases"][:, c] == 1
      cases[name][split] = int(is_case.sum())
  return {
    "source": cohort.info["source"],
    "with_ecg": cohort.info["with_ecg"],
    "with_cmr": cohort.info["with_cmr"],
    "labels": labels,
    "cases": cases,
  }


def prepared(cohort) -> dict:
  """{steps, rejected} of `mmcl prepare`; empty where quality.json is absent, or damaged, which a
  line then says."""
  file = pathlib.Path(cohort.path) / "quality.json"
  if not file.exists():
    return {"steps": {}, "rejected": {}}
  try:
    quality = json.loads(file.read_bytes())
    steps = {name: int(count) for name, count in quality["steps"].items()}
    rejected = {}
    for reason in quality["reasons"]:
      rejected[str(reason["text"])] = int(reason["records"])
    return {"steps": steps, "rejected": rejected}
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
  tables = []
  for title, by_split in (
    ("records", records),
    ("known labels", card["labels"]),
    ("cases", card["cases"]),
  ):
    rows = []
    for name, split_counts in by_split.items():
      cells = [f"{split_counts[split]:,}" for split in counts]
      rows.append([name, *cells])
    tables.append(Table(f"Data: {title}", ["", *counts], rows))
  for title, by_reason in (
    ("what was read", card["steps"]),
    ("rejected, and why", card["rejected"]),
  ):
    rows = [[name, f"{count:,}"] for name, count in by_reason.items()]
    tables.append(Table(f"Data: {title}", ["", "records"], rows))
  return [table for table in tables if table.rows]
