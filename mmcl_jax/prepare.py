"""`mmcl prepare`: raw recordings and images, or the synthetic heart, to a cohort.

    mmcl prepare ukb --input /data/ecg /data/cmr --segmentations=/data/seg --tables=main.csv \\
      --out=cohort
    mmcl prepare wfdb --input=/data/ptb-xl --tables=/data/ptb-xl/ptbxl_database.csv --out=ptbxl
    mmcl prepare synthetic --subjects=1600 --seed=0 --out=demo/cohort

Interrupted, the same command goes on where it stopped. docs/your_data.md tells what each source
expects.
"""

import argparse
import csv
import functools
import hashlib
import inspect
import io
import os
import pathlib
import re
import secrets
import types

import numpy as np

from mmcl_jax import registry
from mmcl_jax.data import builder, readers, schema
from mmcl_jax.data.cohort import Cohort
from mmcl_jax.data.preprocess import cmr as preprocess_cmr, ecg as preprocess_ecg
from mmcl_jax.data.sources import synthetic
from mmcl_jax.errors import UserError, writing
from mmcl_jax.evaluators import ridge, statistics
from mmcl_jax.reports import quality
from mmcl_jax.support import files
from mmcl_jax.support.paths import local

SOURCES = {  # name -> its plan, what it reads
  "ukb": (
    "mmcl_jax.data.sources.ukb:plan",
    "UK Biobank: ECG XML (field 20205) with short-axis DICOM zips (20209)",
  ),
  "ukbb_cardiac": (
    "mmcl_jax.data.sources.ukb:plan_folders",
    "UK Biobank: ECG XML with folders of NIfTI as ukbb_cardiac leaves them",
  ),
  "acdc": ("mmcl_jax.data.sources.acdc:plan", "ACDC challenge folders, CMR alone"),
  "mnms": ("mmcl_jax.data.sources.mnms:plan", "M&Ms challenge folders, CMR alone"),
  "wfdb": (
    "mmcl_jax.data.sources.wfdb:plan",
    "PTB-XL, MIMIC-IV-ECG, CinC or any WFDB records, ECG alone",
  ),
  "ecg": (
    "mmcl_jax.data.sources.ecg:plan",
    "ECG files of any format that mmcl embed or --reader reads, ECG alone",
  ),
  "mmcl_pt": (
    "mmcl_jax.data.sources.mmcl_pt:plan",
    "torch files of the MMCL reference project, read without torch",
  ),
  "synthetic": ("mmcl_jax.data.sources.synthetic:plan", "hearts with known phenotypes"),
}
# flags that no source needs to know; others: TAKES
EVERY_SOURCE = {"source", "more", "out", "private", "processes", "beam"}


def main(argv):
  args = parse(argv)
  shares = fractions(args.split)
  builder.check_out(args.out)
  plan_of = find_source(args)
  if args.source == "synthetic":
    plan = plan_of(args)
  else:
    private = args.private or f"{args.out.rstrip('/')}.private"
    identities = Identities(private, args.out)
    plan = plan_of(args, identities.identify)
    plan = plan._replace(info=plan.info | {"salt_tag": identities.tag})
    identities.save()
  for step, count in plan.steps.items():
    print(f"{count:8d}  {step}")
  run = None
  if args.beam is not None:
    from mmcl_jax.data import beam  # Apache Beam lives in an environment of its own

    run = functools.partial(beam.run, options=args.beam.split())
  with writing(args.out):
    cohort = builder.build(
      args.out,
      plan,
      shares=shares,
      profile=args.profile,
      processes=args.processes,
      report=report,
      run=run,
    )
  counts = cohort.info["counts"]
  listed = ", ".join(f"{count} {split}" for split, count in counts.items())
  print(f"{cohort.path}: {listed}")
  if args.source == "synthetic" and min(counts.values()):
    scores = "  ".join(f"{name} {r2:.2f}" for name, r2 in ceiling(cohort).items())
    print(f"ceiling, R2 on test of ridge on the generator's own ECG parameters: {scores}")


def report(folder, cohort, outcome):
  for suspicion in quality.write(folder, cohort, outcome):
    print(f"LOOK: {suspicion}")
  print(
    f"{len(outcome.splits)} records kept, {len(outcome.flags)} of them with remarks, "
    f"{len(outcome.rejected)} rejected: see quality.html in the cohort"
  )


def parse(argv):
  sources = [f"  {name:16s}{what}" for name, (_, what) in SOURCES.items()]
  sources.append("  my_module:plan  a source of your own (docs/extending.md)")
  parser = argparse.ArgumentParser(
    prog="mmcl prepare",
    description="Makes a cohort.",
    allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="\n".join(["sources:", *sources]),
  )
  add_inputs(parser)
  add_outcomes(parser)
  add_output(parser)
  add_shape(parser)
  add_synthetic(parser)
  add_work(parser)
  parser.add_argument("more", type=local, nargs="*", metavar="PATH", help="more inputs")
  args = parser.parse_intermixed_args(argv)
  args.input += args.more
  given = set()
  for name, value in vars(args).items():
    if value != parser.get_default(name) and value != []:
      given.add(name)
  args.given = given
  args.own_readers = readers.parse_own(args.reader)
  args.shape = preprocess_cmr.Shape(args.slices, args.size, args.pixel_mm, args.frames)
  check(args)
  return args


def add_inputs(parser):
  parser.add_argument("source", metavar="SOURCE", help="one of the sources below")
  parser.add_argument(
    "--input",
    type=local,
    nargs="+",
    action="extend",
    default=[],
    metavar="PATH",
    help="raw files and folders",
  )
  parser.add_argument("--reader", **readers.FLAG)
  parser.add_argument(
    "--tables",
    type=local,
    nargs="+",
    action="extend",
    default=[],
    metavar="FILE",
    help="CSV, TSV or Parquet tables of phenotypes, covariates and outcomes",
  )
  parser.add_argument(
    "--segmentations",
    type=local,
    metavar="DIR",
    help="ukb: folders {id}_{visit} with ukbb_cardiac's seg_sa.nii.gz",
  )
  parser.add_argument(
    "--withdrawn",
    type=local,
    metavar="FILE",
    help="ids of participants who have withdrawn, one a line",
  )


def add_outcomes(parser):
  parser.add_argument(
    "--diseases",
    default="any",
    choices=("any", "prevalent", "incident"),
    help="which diagnoses count, by their date against the visit (default %(default)s)",
  )
  parser.add_argument(
    "--censored",
    metavar="YYYY-MM-DD",
    help="end of follow-up (default: the last diagnosis or death in the tables)",
  )
  parser.add_argument(
    "--codes",
    type=local,
    metavar="FILE",
    help="lists of ICD-10 codes in place of mmcl_jax/data/diseases.toml",
  )


def add_output(parser):
  parser.add_argument(
    "--out",
    type=local,
    required=True,
    metavar="DIR",
    help="folder to make",
  )
  parser.add_argument(
    "--private",
    type=local,
    metavar="DIR",
    help="folder of the salt and of the table from hashes to participants; stays with you. "
    "The same folder gives the same hashes and splits (default OUT.private)",
  )
  parser.add_argument(
    "--split",
    default="0.7,0.1,0.2",
    help="shares of train,val,test, drawn by subject (default %(default)s)",
  )
  parser.add_argument(
    "--profile",
    default="minimal",
    help=f"normalisation of the ECG: {', '.join(preprocess_ecg.PROFILES)} (default %(default)s)",
  )


def add_shape(parser):
  shape = preprocess_cmr.Shape()
  parser.add_argument(
    "--slices",
    type=int,
    default=shape.slices,
    help="short-axis slices kept (default %(default)s)",
  )
  parser.add_argument(
    "--size",
    type=int,
    default=shape.size,
    help="pixels of the square round the heart (default %(default)s)",
  )
  parser.add_argument(
    "--pixel-mm",
    type=float,
    default=shape.pixel_mm,
    help="size of a pixel in mm (default %(default)s)",
  )
  parser.add_argument(
    "--frames",
    type=int,
    default=shape.frames,
    help="frames of the cine slice; 0: none (default %(default)s)",
  )


def add_synthetic(parser):
  parser.add_argument(
    "--subjects",
    type=int,
    default=0,
    help="synthetic: number of subjects",
  )
  parser.add_argument(
    "--seed",
    type=int,
    default=0,
    help="synthetic: cohorts of different seeds share no subject",
  )
  parser.add_argument(
    "--lax",
    action="store_true",
    help="synthetic: the long-axis view too",
  )


def add_work(parser):
  parser.add_argument(
    "--processes",
    type=int,
    default=os.cpu_count(),
    help="worker processes (default %(default)s)",
  )
  parser.add_argument(
    "--beam",
    metavar="OPTIONS",
    help="run on Apache Beam with these pipeline options (docs/beam.md)",
  )


def check(args):
  """UserError for a number or a profile that there cannot be."""
  positive = min(args.slices, args.size, args.processes) >= 1
  if not positive or args.frames < 0 or not 0 < args.pixel_mm < 100:
    raise UserError(
      f"--slices={args.slices} --size={args.size} --pixel-mm={args.pixel_mm} "
      f"--frames={args.frames} --processes={args.processes}; expected positive numbers (frames may "
      "be 0)"
    )
  if args.profile not in preprocess_ecg.PROFILES:
    raise UserError(
      f"--profile is {args.profile!r}; expected one of {', '.join(preprocess_ecg.PROFILES)}"
    )


def find_source(args):
  """The `plan` function of a source's name or of my_module:plan; a flag that the source has no use
  for is a mistake."""
  built_in = {name: fn for name, (fn, _) in SOURCES.items()}
  plan = registry.resolve(args.source, built_in, "SOURCE")
  takes = getattr(inspect.getmodule(plan), "TAKES", args.given)
  if useless := args.given - set(takes) - EVERY_SOURCE:
    raise UserError(
      f"source {args.source} has no use for {flags(sorted(useless))}; it takes {flags(takes)}"
    )
  return plan


def flags(names) -> str:
  return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def fractions(text: str) -> tuple[float, float, float]:
  try:
    shares = tuple(float(x) for x in text.split(","))
  except ValueError:
    shares = ()
  if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
    raise UserError(
      f"--split is {text!r}; expected three shares that sum to 1, such as 0.7,0.1,0.2"
    )
  return shares


class Identities:
  """Salted hashes of participants, and who they are, in a folder that only its owner can read.

  The salt decides hashes and splits, so a cohort that grows keeps both if it is prepared with the
  same folder. Nothing is written before `save`.
  """

  def __init__(self, folder: str, out: str):
    self.folder = pathlib.Path(folder)
    self.hashes = {}  # participant -> hash, of this run
    place = self.folder.resolve()
    if pathlib.Path(out).resolve() in (place, *place.parents):
      raise UserError(
        f"--private={folder} lies in --out={out}; expected another place, for a cohort may be "
        "given away"
      )
    file = self.folder / "salt"
    try:
      text = file.read_text().strip() if file.exists() else secrets.token_hex(32)
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f"cannot read {file} ({error})") from None
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
      raise UserError(
        f"{file} is not a salt; expected 64 hexadecimal digits: give the folder that was made with "
        "it"
      )
    self.salt = bytes.fromhex(text)

  @property
  def tag(self) -> str:
    """Tells whether two cohorts have the same salt, and nothing of the salt."""
    return hashlib.blake2b(b"tag of a salt", key=self.salt, digest_size=8).hexdigest()

  def identify(self, participant: str) -> np.ndarray:
    """uint32 [2]"""
    self.hashes[participant] = schema.subject_hash(participant, self.salt)
    return self.hashes[participant]

  def save(self):
    """Writes the salt, if it is new, and adds the participants of this run to participants.csv."""
    file = self.folder / "participants.csv"
    salt = self.folder / "salt"
    rows = {}
    try:
      self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
      if not salt.exists():
        write_private(salt, self.salt.hex() + "\n")
        print(
          f"made a new salt: keep {self.folder} to yourself, and give it as --private when this "
          "cohort grows"
        )
      if file.exists():
        with open(file, newline="") as f:
          present = list(csv.reader(f))
        rows = dict(present[1:])
      for participant, subject in self.hashes.items():
        rows[schema.hash_name(subject)] = participant
      text = io.StringIO()
      table = csv.writer(text, lineterminator="\n")
      table.writerow(["hash", "participant"])
      table.writerows(sorted(rows.items()))
      write_private(file, text.getvalue())
    except OSError as error:
      raise UserError(f"cannot write to --private={self.folder}: {error.strerror}") from None
    except (ValueError, csv.Error):
      raise UserError(
        f"{file} is not a table of hash,participant; expected the one that was made with this salt"
      ) from None


def write_private(file: pathlib.Path, text: str):
  """Writes a file that only its owner can read, whole or not at all."""

  def opener(name, flags):
    return os.open(name, flags, 0o600)

  with files.atomic(file, opener=opener) as f:
    f.write(text)


def prepare_synthetic(
  out: str,
  subjects: int,
  seed: int,
  shares,
  profile: str,
  processes: int,
) -> Cohort:
  """Writes a synthetic cohort to the folder `out`."""
  plan = synthetic.plan(types.SimpleNamespace(subjects=subjects, seed=seed))
  return builder.build(
    out, plan, shares=shares, profile=profile, processes=processes, report=quality.write
  )


def ceiling(cohort: Cohort) -> dict[str, float]:
  """What the ECG can tell at most, linearly: test R2 of ridge on the generator's noise-free ECG
  parameters."""
  x, y = {}, {}
  for split, source in cohort.splits.items():
    records = [source[i] for i in range(len(source))]
    parameters = np.stack([record["ecg_parameters"] for record in records])
    phenotypes = np.stack([record["phenotypes"] for record in records])
    x[split] = parameters.astype(np.float64)
    y[split] = phenotypes.astype(np.float64)
  probe = ridge.fit_probe(x["train"], y["train"], x["val"], y["val"])
  scores = statistics.r2(y["test"], ridge.predict(probe, x["test"]))
  return dict(zip(cohort.info["phenotypes"], map(float, scores)))


if __name__ == "__main__":
  from mmcl_jax import cli

  cli.run(main)
