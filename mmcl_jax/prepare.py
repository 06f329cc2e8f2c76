"""`mmcl prepare`: raw data, or the synthetic heart, to a cohort.

    mmcl prepare synthetic --subjects=1600 --seed=0 --out=demo/cohort
"""

import argparse
import functools
import os

import numpy as np

from mmcl_jax.data import cohort as cohort_room, schema, synthetic
from mmcl_jax.data.preprocess import ecg as preprocess_ecg
from mmcl_jax.errors import UserError
from mmcl_jax.evaluators import phenotypes, statistics


def main(argv):
  parser = argparse.ArgumentParser(prog="mmcl prepare", description="Makes a cohort.", allow_abbrev=False)
  sources = parser.add_subparsers(dest="source", required=True)
  p = sources.add_parser("synthetic", help="a cohort of synthetic hearts with known phenotypes", allow_abbrev=False)
  p.add_argument("--subjects", type=int, required=True, help="number of subjects")
  p.add_argument("--seed", type=int, default=0, help="cohorts of different seeds share no subject")
  p.add_argument("--out", required=True, help="folder to make")
  p.add_argument("--split", default="0.7,0.1,0.2", help="shares of train,val,test (default %(default)s), drawn by subject")
  p.add_argument("--profile", default="minimal", help="normalisation of the ECG: " + ", ".join(preprocess_ecg.PROFILES))
  p.add_argument("--processes", type=int, default=os.cpu_count(), help="worker processes (default %(default)s)")
  args = parser.parse_args(argv)
  if args.subjects < 1 or args.seed < 0 or args.processes < 1:
    raise UserError(f"--subjects={args.subjects} --seed={args.seed} --processes={args.processes}; expected at least 1, 0 and 1")
  if args.profile not in preprocess_ecg.PROFILES:
    raise UserError(f"--profile is {args.profile!r}; expected one of {', '.join(preprocess_ecg.PROFILES)}")
  made = prepare_synthetic(args.out, args.subjects, args.seed, fractions(args.split), args.profile, args.processes)
  print(f"{made.path}: {', '.join(f'{n} {split}' for split, n in made.info['counts'].items())}")
  print("ceiling, R2 on test of ridge on the generator's own ECG parameters: "
        + "  ".join(f"{name} {r2:.2f}" for name, r2 in ceiling(made).items()))


def fractions(text: str) -> tuple[float, float, float]:
  try:
    shares = tuple(float(x) for x in text.split(","))
  except ValueError:
    shares = ()
  if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
    raise UserError(f"--split is {text!r}; expected three positive shares that sum to 1, such as 0.7,0.1,0.2")
  return shares


def prepare_synthetic(out: str, subjects: int, seed: int, shares, profile: str, processes: int) -> cohort_room.Cohort:
  """Writes a synthetic cohort to the folder `out`."""
  keys = {split: [] for split in schema.SPLITS}
  for index in range(subjects):
    keys[schema.split_of(synthetic.identify(seed, index), shares)].append(index)
  info = {"source": f"synthetic hearts, seed {seed}", "synthetic": True, "seed": seed, "ecg_profile": profile,
          "phenotypes": schema.PHENOTYPES, "diseases": list(schema.DISEASES), "covariates": schema.COVARIATES,
          "ecg_parameters": list(synthetic.ECG_PARAMETERS), "split": list(shares)}
  read = functools.partial(read_synthetic, seed, profile)
  return cohort_room.build(out, keys, read, info=info, processes=processes)


def read_synthetic(seed: int, profile: str, index: int) -> dict[str, np.ndarray]:
  return cohort_room.encode(synthetic.subject(seed, index), profile)


def ceiling(cohort: cohort_room.Cohort) -> dict[str, float]:
  """What the ECG can tell at most, linearly: test R2 of ridge on the generator's noise-free ECG parameters."""
  columns = {split: [source[i] for i in range(len(source))] for split, source in cohort.splits.items()}
  x, y = ({split: np.stack([record[name] for record in records]).astype(np.float64) for split, records in columns.items()}
          for name in ("ecg_parameters", "phenotypes"))
  probe = phenotypes.fit_probe(x["train"], y["train"], x["val"], y["val"])
  scores = statistics.r2(y["test"], phenotypes.predict(probe, x["test"]))
  return dict(zip(cohort.info["phenotypes"], map(float, scores)))


if __name__ == "__main__":
  from mmcl_jax import cli
  cli.run(main)
