"""The report that `mmcl prepare` puts beside a cohort: what went in, what was left out and why,
what the rest is like.

`quality.json` holds all of it, `quality.html` shows it (mmcl_jax.reports.quality_page). Records
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
from mmcl_jax.reports import drawings, quality_page
from mmcl_jax.support import files
from mmcl_jax.support.text import SYNTHETIC_NOTE

SHOWN = 6  # records drawn on the page
EXAMPLES = 3  # ids given for a group of reasons
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MANY = 20  # values from which a mean is compared with the published one
FAR_SD, FAR_CODE_SD = 10, 4
CODES = [sign * code for code in (9, 99, 999, 9999, 99999, 88, 888, 8888) for sign in (1, -1)]
DPI = 127  # 5 pixels a millimetre of ECG paper
# nan, inf, or digits with sign, decimals and exponent, but not the digit of a lead V1 to V6
NUMBER = r"\b(?:nan|inf)\b|(?:(?<!\w)[-+])?(?<!\bV(?=[1-6]\b))\d+(?:[.,]\d+)*(?:e[-+]?\d+)?"
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
  text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
  replace(Path(folder, "quality.json"), text)
  page = quality_page.page(summary, histograms(cohort, outcome), contact_sheet(cohort))
  replace(Path(folder, "quality.html"), page)
  return summary["suspicions"]


def summarise(cohort: Cohort, outcome: Outcome) -> dict:
  """All numbers of the report, as JSON's own types; None for what is not known."""
  info = cohort.info
  groups = sexes(cohort, outcome)
  row_split = np.array(outcome.splits)
  splits = {split: row_split == split for split in info["counts"]}
  phenotypes = {}
  suspicions = []
  for k, (name, unit) in enumerate(info["phenotypes"].items()):
    values = outcome.phenotypes[:, k].astype(np.float64)
    entry = phenotype_summary(name, unit, values, groups, splits)
    phenotypes[name] = entry
    if entry["codes"]:
      suspicions.append(suspicion(name, entry))
  reasons = [(entry["id"], entry["reason"]) for entry in outcome.rejected]
  flags = []
  for entry in outcome.flags:
    for flag in entry["flags"]:
      flags.append((entry["id"], flag))
  facts = {name: value for name, value in info.items() if type(value) in (str, int, float)}
  return {
    "note": SYNTHETIC_NOTE if info.get("synthetic") else "",
    "cohort": facts,
    "steps": dict(outcome.steps),
    "counts": dict(info["counts"]),
    "reasons": grouped(reasons),
    "flags": grouped(flags),
    "suspicions": suspicions,
    "phenotypes": phenotypes,
    "rejected": outcome.rejected,
    "flagged": outcome.flags,
  }


def phenotype_summary(
  name: str,
  unit: str,
  values: np.ndarray,
  groups: dict[str, np.ndarray],
  splits: dict[str, np.ndarray],
) -> dict:
  """What `values` [N] of a phenotype are like.

  Args:
    groups, splits: bool [N] of each group of people, and of each split.
  """
  overall = moments_and_quantiles(values)
  by_sex = {who: moments_and_quantiles(values[rows]) for who, rows in groups.items()}
  reference = published(name, unit)
  measured = np.isfinite(values)
  by_split = {split: int(measured[rows].sum()) for split, rows in splits.items()}
  return {
    "unit": unit,
    **overall,
    "missing": len(values) - overall["n"],
    **by_sex,
    "splits": by_split,
    "published": reference,
    "far_from_published": far_from_published({"all": overall} | by_sex, reference),
    "codes": codes_of_missing(values),
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
  counted = []
  for text, entry in groups.items():
    ids = list(entry["ids"])
    counted.append(
      {
        "text": text,
        "records": len(ids),
        "times": entry["times"],
        "examples": ids[:EXAMPLES],
      }
    )

  def most_records_first(group):
    return -group["records"], group["text"]

  return sorted(counted, key=most_records_first)


def without_numbers(text: str) -> str:
  """`text` with # in place of every number but those in the names of leads; lists of numbers become
  one."""
  text = re.sub(NUMBER, "#", text)
  return re.sub(r"#(?:, #)+", "#, ...", text)


def moments_and_quantiles(values: np.ndarray) -> dict:
  """Moments and quantiles of the finite ones of `values` [N]; `outside_4_sd` is a share, by their
  own mean and SD."""
  values = values[np.isfinite(values)]
  n = len(values)
  mean = values.mean() if n else np.nan
  sd = np.nan
  outside = np.nan
  if n > 1:
    sd = values.std(ddof=1)
    outside = np.mean(np.abs(values - mean) > 4 * sd)
  quantiles = {}
  for q in QUANTILES:
    quantiles[f"{q:g}"] = finite_or_none(np.quantile(values, q)) if n else None
  return {
    "n": n,
    "mean": finite_or_none(mean),
    "sd": finite_or_none(sd),
    "min": finite_or_none(values.min(initial=np.inf)),
    "max": finite_or_none(values.max(initial=-np.inf)),
    "quantiles": quantiles,
    "outside_4_sd": finite_or_none(outside),
  }


def codes_of_missing(values: np.ndarray) -> dict[str, int]:
  """{value: times} of those of `values` [N] that look like codes for a missing one, the most
  frequent first.

  They lie more than FAR_SD robust SDs (1.4826 times the median absolute deviation) from the median;
  for usual CODES that occur at least twice, FAR_CODE_SD is enough. Nothing is dropped for it: a
  rare measurement may be true.
  """
  values = values[np.isfinite(values)].astype(np.float32)
  distinct, times = np.unique(values, return_counts=True)
  if not len(distinct):
    return {}
  median = np.median(np.repeat(distinct, times))
  distance = np.abs(distinct - median)
  sd = 1.4826 * np.median(np.repeat(distance, times))
  away = distance / sd if sd else np.zeros(len(distinct))
  repeated_code = np.isin(distinct, CODES) & (times > 1)
  is_code = (away > FAR_SD) | (repeated_code & (away > FAR_CODE_SD))
  codes = {}
  for i in np.argsort(-times, kind="stable"):
    if is_code[i]:
      codes[f"{distinct[i]:g}"] = int(times[i])
  return codes


def suspicion(name: str, phenotype: dict) -> str:
  codes = phenotype["codes"]
  value, times = next(iter(codes.items()))
  median = phenotype["quantiles"]["0.5"]
  return (
    f"{name}: {sum(codes.values())} of {phenotype['n']} values lie far from all others (median "
    f"{median:.4g} {phenotype['unit']}), such as {value}, {times} times: are they codes for a "
    "missing value? They were kept; empty these cells of the table to leave them out"
  )


def sexes(cohort: Cohort, outcome: Outcome) -> dict[str, np.ndarray]:
  """bool [N] of the women and the men; empty where the cohort does not know."""
  names = list(cohort.info["covariates"])
  if "sex" not in names:
    return {}
  sex = outcome.covariates[:, names.index("sex")]
  if not np.isfinite(sex).any():
    return {}
  return {"women": sex == 0, "men": sex == 1}


def published(name: str, unit: str) -> dict[str, dict]:
  """Mean and SD of UK Biobank, of `all` and of healthy `women` and `men`, as far as they are
  published in that unit."""
  if unit != UNITS.get(name):
    return {}
  groups = {}
  if name in ukb_fields.POPULATION:
    mean, sd = ukb_fields.POPULATION[name]
    groups["all"] = {
      "mean": mean,
      "sd": finite_or_none(sd),
      "source": "UK Biobank imaging, Alvarez-Florez et al. 2026",
    }
  healthy = couplings.PHENOTYPES | couplings.DERIVED
  if name in healthy:
    moments = healthy[name]
    for who, (mean, sd) in (("women", moments.women), ("men", moments.men)):
      groups[who] = {"mean": mean, "sd": sd, "source": moments.source}
  return groups


def histograms(cohort: Cohort, outcome: Outcome) -> dict[str, bytes]:
  """PNG of each phenotype that has values."""
  groups = sexes(cohort, outcome)
  if groups:
    groups["sex unknown"] = ~(groups["women"] | groups["men"])
  images = {}
  for k, (name, unit) in enumerate(cohort.info["phenotypes"].items()):
    values = outcome.phenotypes[:, k].astype(np.float64)
    if not np.isfinite(values).any():
      continue
    by_group = {who: values[rows] for who, rows in groups.items()}
    if not by_group:
      by_group["all"] = values
    figure = quality_page.histogram(name, unit, by_group, published(name, unit))
    images[name] = quality_page.png(drawings.stacked([figure], 150), 32)
  return images


def contact_sheet(cohort: Cohort) -> list[tuple[str, bytes]]:
  """Captions and PNGs of SHOWN records."""
  sheet = []
  for split, index in sample(cohort.info["counts"], SHOWN):
    record = cohort.splits[split][index]
    figures = drawings.of_record(record, cohort.info, columns=12)
    image = b""
    if figures:
      image = quality_page.png(drawings.stacked(figures, DPI), 128)
    caption = drawings.describe(record, cohort.info, split, index)
    sheet.append((caption, image))
  return sheet


def sample(counts: dict[str, int], most: int) -> list[tuple[str, int]]:
  """(split, index) of at most `most` records drawn at random, in order; the same at every call."""
  splits = list(counts)
  ends = np.cumsum(list(counts.values()))
  order = np.random.default_rng(0).permutation(ends[-1])
  places = []
  for number in np.sort(order[:most]):
    s = np.searchsorted(ends, number, side="right")
    start = ends[s - 1] if s else 0
    places.append((splits[s], int(number - start)))
  return places


def far_from_published(moments: dict[str, dict], reference: dict[str, dict]) -> list[str]:
  """Groups whose mean lies more than one published SD from the published mean."""
  far = []
  for who, group in moments.items():
    if who not in reference or group["n"] < MANY:
      continue
    mean = reference[who]["mean"]
    sd = reference[who]["sd"]
    if sd is not None and abs(group["mean"] - mean) > sd:
      far.append(who)
  return far


def finite_or_none(value: float) -> float | None:
  return float(value) if np.isfinite(value) else None


def replace(path: Path, text: str) -> None:
  with files.atomic(path, encoding="utf-8") as file:
    file.write(text)
