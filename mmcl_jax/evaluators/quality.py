"""The report that `mmcl prepare` puts beside a cohort: what went in, what was left out and why,
what the rest is like.

`quality.json` holds all of it, `quality.html` shows it (mmcl_jax.evaluators.quality_page). Records
are named by their salted hash alone.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mmcl_jax.data import ukb_fields
from mmcl_jax.data.builder import Outcome
from mmcl_jax.data.cohort import Cohort
from mmcl_jax.data.synthetic import couplings
from mmcl_jax.evaluators import drawings, quality_page
from mmcl_jax.support import files
from mmcl_jax.support.text import SYNTHETIC_NOTE

SHOWN = 6  # records drawn on the page
EXAMPLES = 3  # ids given for a group of reasons
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MANY = 20  # values from which a mean is compared with the published one
FAR_SD, FAR_CODE_SD = 10, 4
CODES = [sign * code for code in (9, 99, 999, 9999, 99999, 88, 888, 8888) for sign in (1, -1)]
DPI = 127  # 5 pixels a millimetre of ECG paper
UNITS = {field.name: field.unit for field in ukb_fields.CARDIAC.values()}  # of what is published


def write(folder: str, cohort: Cohort, outcome: Outcome) -> list[str]:
  """Writes quality.json and quality.html into `folder`, each whole or not at all; gives what the
  user has to look at.

  Args:
    folder: of the cohort, or what it is called while it is made.
    cohort: opened; of its records only those that are drawn are read.
    outcome: what became of the records that were planned.
  """
  summary = summarise(cohort, outcome)
  _replace(Path(folder, "quality.json"), json.dumps(summary, indent=1, allow_nan=False) + "\n")
  page = quality_page.page(summary, histograms(cohort, outcome), contact_sheet(cohort))
  _replace(Path(folder, "quality.html"), page)
  return summary["suspicions"]


def summarise(cohort: Cohort, outcome: Outcome) -> dict:
  """All numbers of the report, as JSON's own types; None for what is not known."""
  info, groups, splits = cohort.info, sexes(cohort, outcome), np.array(outcome.splits)
  phenotypes = {}
  for k, (name, unit) in enumerate(info["phenotypes"].items()):
    values = outcome.phenotypes[:, k].astype(np.float64)
    whole, known = statistics(values), published(name, unit)
    by_sex = {who: statistics(values[rows]) for who, rows in groups.items()}
    phenotypes[name] = {
      "unit": unit,
      **whole,
      "missing": len(values) - whole["n"],
      **by_sex,
      "splits": {
        split: int(np.isfinite(values[splits == split]).sum()) for split in info["counts"]
      },
      "published": known,
      "far_from_published": _far({"all": whole} | by_sex, known),
      "codes": codes_of_missing(values),
    }
  return {
    "note": SYNTHETIC_NOTE if info.get("synthetic") else "",
    "cohort": {name: value for name, value in info.items() if type(value) in (str, int, float)},
    "steps": dict(outcome.steps),
    "counts": dict(info["counts"]),
    "reasons": grouped((entry["id"], entry["reason"]) for entry in outcome.rejected),
    "flags": grouped((entry["id"], flag) for entry in outcome.flags for flag in entry["flags"]),
    "suspicions": [suspicion(name, found) for name, found in phenotypes.items() if found["codes"]],
    "phenotypes": phenotypes,
    "rejected": outcome.rejected,
    "flagged": outcome.flags,
  }


def grouped(texts: Iterable[tuple[str, str]]) -> list[dict]:
  """Texts that differ in numbers alone, counted together, the most frequent first.

  Args:
    texts: (id, text).

  Returns:
    dicts of `text` with # for numbers, `records` (how many have it), `times`, `examples` (the first
      ids).
  """
  groups = {}
  for name, text in texts:
    entry = groups.setdefault(without_numbers(text), {"times": 0, "ids": {}})
    entry["times"] += 1
    entry["ids"][name] = None
  found = [
    {
      "text": text,
      "records": len(entry["ids"]),
      "times": entry["times"],
      "examples": list(entry["ids"])[:EXAMPLES],
    }
    for text, entry in groups.items()
  ]
  return sorted(found, key=lambda group: (-group["records"], group["text"]))


def without_numbers(text: str) -> str:
  """`text` with # in place of every number but those in the names of leads; lists of numbers become
  one."""
  text = re.sub(
    r"\b(?:nan|inf)\b|(?:(?<!\w)[-+])?(?<!\bV(?=[1-6]\b))\d+(?:[.,]\d+)*(?:e[-+]?\d+)?", "#", text
  )
  return re.sub(r"#(?:, #)+", "#, ...", text)


def statistics(values: np.ndarray) -> dict:
  """Moments and quantiles of the finite ones of `values` [N]; `outside_4_sd` is a share, by their
  own mean and SD."""
  values = values[np.isfinite(values)]
  n = len(values)
  mean, sd = values.mean() if n else np.nan, values.std(ddof=1) if n > 1 else np.nan
  return {
    "n": n,
    "mean": _finite(mean),
    "sd": _finite(sd),
    "min": _finite(values.min(initial=np.inf)),
    "max": _finite(values.max(initial=-np.inf)),
    "quantiles": {f"{q:g}": _finite(np.quantile(values, q)) if n else None for q in QUANTILES},
    "outside_4_sd": _finite(np.mean(np.abs(values - mean) > 4 * sd)) if n > 1 else None,
  }


def codes_of_missing(values: np.ndarray) -> dict[str, int]:
  """{value: times} of those of `values` [N] that look like codes for a missing one, the most
  frequent first.

  They lie more than FAR_SD robust SDs (1.4826 times the median absolute deviation) from the median;
  for usual CODES that occur at least twice, FAR_CODE_SD is enough. Nothing is dropped for it: a
  rare measurement may be true.
  """
  found, times = np.unique(values[np.isfinite(values)].astype(np.float32), return_counts=True)
  if not len(found):
    return {}
  middle = np.median(np.repeat(found, times))
  sd = 1.4826 * np.median(np.repeat(np.abs(found - middle), times))
  away = np.abs(found - middle) / sd if sd else np.zeros(len(found))
  odd = (away > FAR_SD) | (np.isin(found, CODES) & (times > 1) & (away > FAR_CODE_SD))
  return {f"{found[i]:g}": int(times[i]) for i in np.argsort(-times, kind="stable") if odd[i]}


def suspicion(name: str, found: dict) -> str:
  value, times = next(iter(found["codes"].items()))
  return (
    f"{name}: {sum(found['codes'].values())} of {found['n']} values lie far from all others "
    "(median "
    f"{found['quantiles']['0.5']:.4g} {found['unit']}), such as {value}, {times} times: are they "
    "codes for a "
    "missing value? They were kept; empty these cells of the table to leave them out"
  )


def sexes(cohort: Cohort, outcome: Outcome) -> dict[str, np.ndarray]:
  """bool [N] of the women and the men; empty where the cohort does not know."""
  names = list(cohort.info["covariates"])
  if "sex" not in names:
    return {}
  sex = outcome.covariates[:, names.index("sex")]
  return {"women": sex == 0, "men": sex == 1} if np.isfinite(sex).any() else {}


def published(name: str, unit: str) -> dict[str, dict]:
  """Mean and SD of UK Biobank, of `all` and of healthy `women` and `men`, as far as they are
  published in that unit."""
  found = {}
  if unit != UNITS.get(name):
    return found
  if name in ukb_fields.POPULATION:
    mean, sd = ukb_fields.POPULATION[name]
    found["all"] = {
      "mean": mean,
      "sd": _finite(sd),
      "source": "UK Biobank imaging, Alvarez-Florez et al. 2026",
    }
  if moments := (couplings.PHENOTYPES | couplings.DERIVED).get(name):
    for who in ("women", "men"):
      mean, sd = getattr(moments, who)
      found[who] = {"mean": mean, "sd": sd, "source": moments.source}
  return found


def histograms(cohort: Cohort, outcome: Outcome) -> dict[str, bytes]:
  """PNG of each phenotype that has values."""
  groups = sexes(cohort, outcome)
  if groups:
    groups["sex unknown"] = ~(groups["women"] | groups["men"])
  found = {}
  for k, (name, unit) in enumerate(cohort.info["phenotypes"].items()):
    values = outcome.phenotypes[:, k].astype(np.float64)
    if np.isfinite(values).any():
      parts = {who: values[rows] for who, rows in groups.items()} or {"all": values}
      figure = quality_page.histogram(name, unit, parts, published(name, unit))
      found[name] = quality_page.png(drawings.stacked([figure], 150), 32)
  return found


def contact_sheet(cohort: Cohort) -> list[tuple[str, bytes]]:
  """Captions and PNGs of SHOWN records."""
  sheet = []
  for split, index in sample(cohort.info["counts"], SHOWN):
    record = cohort.splits[split][index]
    figures = drawings.of_record(record, cohort.info, columns=12)
    image = quality_page.png(drawings.stacked(figures, DPI), 128) if figures else b""
    sheet.append((drawings.describe(record, cohort.info, split, index), image))
  return sheet


def sample(counts: dict[str, int], most: int) -> list[tuple[str, int]]:
  """(split, index) of at most `most` records drawn at random, in order; the same at every call."""
  ends = np.cumsum(list(counts.values()))
  chosen = np.sort(np.random.default_rng(0).permutation(ends[-1])[:most])
  splits = np.searchsorted(ends, chosen, side="right")
  return [(list(counts)[s], int(at - (ends[s - 1] if s else 0))) for s, at in zip(splits, chosen)]


def _far(found, known):
  """Groups whose mean lies more than one published SD from the published mean."""
  return [
    who
    for who, moments in found.items()
    if who in known
    and moments["n"] >= MANY
    and known[who]["sd"] is not None
    and abs(moments["mean"] - known[who]["mean"]) > known[who]["sd"]
  ]


def _finite(value):
  return float(value) if np.isfinite(value) else None


def _replace(path, text):
  with files.atomic(path, encoding="utf-8") as file:
    file.write(text)
