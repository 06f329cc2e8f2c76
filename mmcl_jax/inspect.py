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

from mmcl_jax.data import cohort as cohort_room, schema
from mmcl_jax.data.preprocess import ecg as preprocess_ecg
from mmcl_jax.errors import UserError, writing
from mmcl_jax.evaluators import drawings, quality
from mmcl_jax.support import files
from mmcl_jax.support.paths import local
from mmcl_jax.support.text import SYNTHETIC_NOTE, aligned

COUNTED = 2000  # records that are read for the tables; of larger cohorts a sample
DPI = 254  # 10 pixels a millimetre of ECG paper
MEANING = {
  "subject": "keyed hash of the participant",
  "visit": "such as UK Biobank's instance",
  "has_ecg": "0: ecg is zeros",
  "has_cmr": "0: all CMR fields are zeros",
  "ecg": "[lead, sample], times ecg_scale",
  "ecg_scale": "see ecg",
  "ed_es_volumes": "[ED ES, slice, row, column], base to apex, grey values",
  "labels": "[ED ES, slice, row, column], "
  + ", ".join(f"{value} {name}" for name, value in schema.LABELS.items()),
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
  cohort = cohort_room.load(args.cohort)
  if args.check:
    print(f"{args.cohort}: {cohort_room.check(cohort)} files read whole, all as they were written")
    return
  if args.index is None:
    print("\n".join(tell(cohort)))
    return
  source = cohort.splits[args.split]
  if not 0 <= args.index < len(source):
    raise UserError(
      f"--index={args.index}, but split {args.split} of {args.cohort} has "
      + (f"records 0 to {len(source) - 1}" if len(source) else "no records")
    )
  record = source[args.index]
  print(drawings.describe(record, cohort.info, args.split, args.index))
  figures = drawings.of_record(record, cohort.info)
  if not figures:
    raise UserError(f"{args.split} {args.index} has neither an ECG nor a short axis to draw")
  out = Path(args.out or f"{Path(args.cohort).resolve().name}-{args.split}-{args.index}.png")
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


def tell(cohort: cohort_room.Cohort) -> list[str]:
  """Lines on the cohort: counts, fields, views for config.model.towers, phenotypes, covariates and
  diseases."""
  info, total, records = cohort.info, sum(cohort.info["counts"].values()), []
  for split, index in quality.sample(info["counts"], COUNTED):
    record = cohort.splits[split][index]
    # large arrays of one
    records.append({name: x for name, x in record.items() if not records or np.size(x) < 1000})
  counts = ", ".join(f"{n:,} {split}" for split, n in info["counts"].items())
  basis = (
    "all of them read"
    if len(records) == total
    else f"numbers below are of {len(records):,} drawn at random"
  )
  lines = [f"{cohort.path}: {total:,} records ({counts}); {basis}"]
  lines += [
    f"{name.replace('_', ' ')}: {value}"
    for name, value in info.items()
    if type(value) in (str, int, float)
  ]
  if info.get("synthetic"):
    lines.append(f"note: {SYNTHETIC_NOTE}")
  lines.append(
    ", ".join(
      f"{np.mean([r[field] for r in records]):.1%} with {what}"
      for what, field in (("ECG", "has_ecg"), ("CMR", "has_cmr"))
    )
  )
  profile = info["ecg_profile"]
  meaning = MEANING | {
    "ecg": f"{MEANING['ecg']}, {preprocess_ecg.rate_hz(profile)} Hz, normalised by {profile}"
  }
  lines += table(
    ["field", "type", "shape", ""],
    [
      [
        name,
        np.asarray(x).dtype.name,
        " x ".join(map(str, np.shape(x))) or "-",
        meaning.get(name, ""),
      ]
      for name, x in records[0].items()
    ],
  )
  lines += table(
    ["view", "taken from"],
    [[view, field] for view, field in schema.VIEWS.items() if field in records[0]],
  )
  for kind in ("phenotypes", "covariates"):
    values = np.stack([r[kind] for r in records]).astype(np.float64)
    moments = [quality.statistics(column) for column in values.T]
    lines += table(
      [kind, "unit", "n", "mean", "SD", "median", "5 %", "95 %"],
      [
        [
          name,
          unit,
          f"{m['n']:,}",
          *(number(x) for x in (m["mean"], m["sd"])),
          *(number(m["quantiles"][q]) for q in ("0.5", "0.05", "0.95")),
        ]
        for (name, unit), m in zip(info[kind].items(), moments)
      ],
    )
  values = np.stack([r["diseases"] for r in records])
  lines += table(
    ["disease", "cases", "known", "prevalence"],
    [
      [
        name,
        f"{np.nansum(x):,.0f}",
        f"{np.isfinite(x).sum():,}",
        f"{np.nanmean(x):.2%}" if np.isfinite(x).any() else "-",
      ]
      for name, x in zip(info["diseases"], values.T)
    ],
  )
  return lines


def table(head: list[str], rows: list[list[str]]) -> list[str]:
  """Aligned lines after an empty one; none where there are no rows."""
  if not rows:
    return []
  return ["", *aligned([head, *rows], left=len(head)).splitlines()]


def number(value: float | None) -> str:
  return "-" if value is None else f"{value:.4g}"


def save(pixels: np.ndarray, out: Path) -> None:
  """Writes a PNG whole or not at all; printed at 100 % it is to scale."""
  with writing(out), files.atomic(out, "wb") as file:
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", dpi=(DPI, DPI))


if __name__ == "__main__":
  from mmcl_jax import cli

  cli.run(main)
