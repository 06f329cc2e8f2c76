"""`mmcl inspect`: what a cohort holds, one of its records as a picture, and whether its files are
as they were written.

mmcl inspect demo/cohort
mmcl inspect demo/cohort --split=test --index=3 --out=heart.png
mmcl inspect demo/cohort --check
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from mmcl_jax.data import cohort as cohort_lib, schema
from mmcl_jax.data.preprocess import ecg as preprocess_ecg
from mmcl_jax.errors import UserError, writing
from mmcl_jax.reports import drawings, quality
from mmcl_jax.support import files
from mmcl_jax.support.paths import local
from mmcl_jax.support.text import SYNTHETIC_NOTE, aligned

COUNTED = 2000  # records that are read for the tables; of larger cohorts a sample
DPI = 254  # 10 pixels a millimetre of ECG paper
LABELS = ", ".join(f"{value} {name}" for name, value in schema.LABELS.items())
MEANING = {
  "subject": "keyed hash of the participant",
  "visit": "such as UK Biobank's instance",
  "has_ecg": "0: ecg is zeros",
  "has_cmr": "0: all CMR fields are zeros",
  "ecg": "[lead, sample], times ecg_scale",
  "ecg_scale": "see ecg",
  "ed_es_volumes": "[ED ES, slice, row, column], base to apex, grey values",
  "labels": f"[ED ES, slice, row, column], {LABELS}",
  "cine_slice": "[frame, row, column], frame 0 = ED",
  "three_frames": "[ED half-way ES, row, column], the mid-ventricular slice",
  "lax": "[frame, row, column], long axis and septum, frame 0 = ED",
  "spacing": "mm along slice, row, column",
  "phenotypes": "in the units below, NaN = not measured",
  "diseases": "0, 1, NaN = unknown",
  "covariates": "in the units below, NaN = unknown",
}


def main(argv=None):
  args = parse(argv)
  cohort = cohort_lib.load(args.cohort)
  if args.check:
    print(f"{args.cohort}: {cohort_lib.check(cohort)} files read whole, all as they were written")
    return
  if args.index is None:
    print("\n".join(tell(cohort)))
    return
  source = cohort.splits[args.split]
  if not 0 <= args.index < len(source):
    there = f"records 0 to {len(source) - 1}" if len(source) else "no records"
    raise UserError(f"--index={args.index}, but split {args.split} of {args.cohort} has {there}")
  record = source[args.index]
  print(drawings.describe(record, cohort.info, args.split, args.index))
  figures = drawings.of_record(record, cohort.info)
  if not figures:
    raise UserError(f"{args.split} {args.index} has neither an ECG nor a short axis to draw")
  folder = Path(args.cohort).resolve()
  out = Path(args.out or f"{folder.name}-{args.split}-{args.index}.png")
  save(drawings.stacked(figures, DPI), out)
  print(out)


def parse(argv):
  parser = argparse.ArgumentParser(
    prog="mmcl inspect",
    allow_abbrev=False,
    description="Tells what a cohort holds, or draws one of its records.",
  )
  parser.add_argument("cohort", type=local, metavar="COHORT", help="folder made by mmcl prepare")
  parser.add_argument(
    "--index", type=int, metavar="I", help="draw this record of the split, the first is 0"
  )
  parser.add_argument(
    "--split",
    default="train",
    help=f"{', '.join(schema.SPLITS)}: where --index counts (default %(default)s)",
  )
  parser.add_argument(
    "--check",
    action="store_true",
    help="read every file whole and compare it with its checksum in cohort.json",
  )
  parser.add_argument(
    "--out",
    type=local,
    metavar="FILE.png",
    help="of the drawing (default COHORT-SPLIT-I.png, in this folder)",
  )
  args = parser.parse_args(argv)
  if args.split not in schema.SPLITS:
    raise UserError(f"--split={args.split}; expected one of {', '.join(schema.SPLITS)}")
  if args.out and (args.index is None or Path(args.out).suffix != ".png"):
    raise UserError(
      f"--out={args.out}; expected the name of a .png file, and --index to say what to draw"
    )
  return args


def tell(cohort: cohort_lib.Cohort) -> list[str]:
  """Lines on the cohort: counts, fields, views for config.model.towers, phenotypes, covariates and
  diseases."""
  records = sample(cohort)
  lines = summary(cohort, records)
  lines += fields(cohort.info["ecg_profile"], records[0])
  lines += measures("phenotypes", cohort.info["phenotypes"], records)
  lines += measures("covariates", cohort.info["covariates"], records)
  return lines + diseases(cohort.info["diseases"], records)


def sample(cohort: cohort_lib.Cohort) -> list[dict[str, np.ndarray]]:
  """COUNTED records drawn at random, or all; of all but the first without large arrays."""
  records = []
  for split, index in quality.sample(cohort.info["counts"], COUNTED):
    record = cohort.splits[split][index]
    if records:
      record = {name: x for name, x in record.items() if np.size(x) < 1000}
    records.append(record)
  return records


def summary(cohort: cohort_lib.Cohort, records) -> list[str]:
  info = cohort.info
  total = sum(info["counts"].values())
  counts = [f"{count:,} {split}" for split, count in info["counts"].items()]
  basis = f"numbers below are of {len(records):,} drawn at random"
  if len(records) == total:
    basis = "all of them read"
  lines = [f"{cohort.path}: {total:,} records ({', '.join(counts)}); {basis}"]
  for name, value in info.items():
    if type(value) in (str, int, float):
      lines.append(f"{name.replace('_', ' ')}: {value}")
  if info.get("synthetic"):
    lines.append(f"note: {SYNTHETIC_NOTE}")
  with_ecg = np.mean([record["has_ecg"] for record in records])
  with_cmr = np.mean([record["has_cmr"] for record in records])
  lines.append(f"{with_ecg:.1%} with ECG, {with_cmr:.1%} with CMR")
  return lines


def fields(profile: str, record: dict[str, np.ndarray]) -> list[str]:
  """Lines on what a record holds, and on the views that can be taken of it."""
  rate = preprocess_ecg.rate_hz(profile)
  meaning = dict(MEANING)
  meaning["ecg"] += f", {rate} Hz, normalised by {profile}"
  rows = []
  for name, x in record.items():
    shape = " x ".join(map(str, np.shape(x))) or "-"
    rows.append([name, np.asarray(x).dtype.name, shape, meaning.get(name, "")])
  views = [[view, field] for view, field in schema.VIEWS.items() if field in record]
  return [
    *table(["field", "type", "shape", ""], rows),
    *table(["view", "taken from"], views),
  ]


def measures(kind: str, units: dict[str, str], records) -> list[str]:
  """Lines on the phenotypes or the covariates, name -> unit."""
  values = np.stack([record[kind] for record in records]).astype(np.float64)
  rows = []
  for (name, unit), column in zip(units.items(), values.T):
    moments = quality.moments_and_quantiles(column)
    quantiles = moments["quantiles"]
    row = [
      name,
      unit,
      f"{moments['n']:,}",
      number(moments["mean"]),
      number(moments["sd"]),
      number(quantiles["0.5"]),
      number(quantiles["0.05"]),
      number(quantiles["0.95"]),
    ]
    rows.append(row)
  return table([kind, "unit", "n", "mean", "SD", "median", "5 %", "95 %"], rows)


def diseases(names: list[str], records) -> list[str]:
  """Lines on cases and prevalence."""
  values = np.stack([record["diseases"] for record in records])
  rows = []
  for name, column in zip(names, values.T):
    count = int(np.isfinite(column).sum())
    prevalence = f"{np.nanmean(column):.2%}" if count else "-"
    cases = np.nansum(column)
    rows.append([name, f"{cases:,.0f}", f"{count:,}", prevalence])
  return table(["disease", "cases", "known", "prevalence"], rows)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
  """Aligned lines after an empty one; none where there are no rows."""
  if not rows:
    return []
  text = aligned([head, *rows], left=len(head))
  return ["", *text.splitlines()]


def number(value: float | None) -> str:
  return "-" if value is None else f"{value:.4g}"


def save(pixels: np.ndarray, out: Path) -> None:
  """Writes a PNG whole or not at all; printed at 100 % it is to scale."""
  with writing(out), files.atomic(out, "wb") as file:
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", dpi=(DPI, DPI))


if __name__ == "__main__":
  from mmcl_jax import cli

  cli.run(main)
