"""How often the 95 % intervals of evaluation hold the truth, by size of the test split and number
of cases.

    python benchmarks/coverage.py --simulations=1000 --out=coverage.jsonl    # 15 to 40 minutes of a core; run again, it goes on

A fixed predictor meets new test splits of a made-up population, whose true score is known: R2 in
closed form, the others from 4 million rows. Every split gets its interval as `mmcl evaluate` makes
it (1,000 draws of whole subjects). A fifth of the subjects have two recordings: of R2 the same
twice, of the others with a fifth of the score's variance of their own. A JSON line a score of every
setting, then a Markdown table: the share of intervals that hold the truth, and below and above
which share of them it lies.
"""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

import numpy as np
from tqdm import tqdm

from mmcl_jax.evaluators import statistics

EXPLAINED = 0.3  # R2; coverage does not depend on it
SUBJECTS = (50, 100, 200, 400, 1000)  # of R2
CASES = (10, 20, 30, 50, 100, 200)  # expected, of 1,000 test subjects
DRAWS = 1000


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--simulations", type=int, default=2000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", default="coverage.jsonl")
  args = parser.parse_args()
  out = pathlib.Path(args.out)
  lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
  asked = {"simulations_asked": args.simulations, "seed": args.seed}
  for separation, split, subjects, people, scores in settings():
    about = asked | {"separation": separation, "split": split}
    if any(about.items() <= line.items() for line in lines):
      continue
    found = [about | line for line in simulate(people, scores(), subjects, args, split)]
    lines += found
    with open(out, "a") as file:  # a setting at a time, so that all of its scores are there or none
      file.write("".join(json.dumps(line) + "\n" for line in found))
  print("\n| score | truth | test split | inside | below | above |\n|" + "---|" * 6)
  for line in lines:
    if asked.items() <= line.items():
      print(
        "| {score} | {truth:.3f} | {split} | {inside:.1%} | {below:.1%} | {above:.1%} |".format(
          **line
        )
      )


def settings():
  """(distance of cases from others in SD, words, subjects, people(rng, subjects), scores() with
  their truths) of each."""
  for subjects in SUBJECTS:
    yield (
      None,
      f"{subjects} subjects",
      subjects,
      regression,
      lambda: {"r2": (statistics.r2, EXPLAINED)},
    )
  for shift in (0.5, 1.5):
    for cases in CASES:

      def people(rng, n, cases=cases, shift=shift):
        return classification(rng, n, cases / 1000, shift)

      yield (
        shift,
        f"{cases} cases of 1,000",
        1000,
        people,
        lambda people=people, shift=shift: true_scores(people, shift),
      )


def true_scores(people, shift: float) -> dict:
  """The scores of probabilities with their values in 4 million recordings."""
  y, score, _ = people(np.random.default_rng(1), 4_000_000)
  scores = {
    "auroc": statistics.auroc,
    "auprc": statistics.auprc,
    "balanced_accuracy": lambda y, x, w=None: statistics.balanced_accuracy(y, x >= shift / 2, w),
  }
  return {name: (f, float(f(y, score))) for name, f in scores.items()}


def regression(rng, subjects: int):
  """Measurements and predictions of R2 EXPLAINED; a second recording of a person has the same truth
  and error."""
  person = recordings(rng, subjects)
  truth, error = rng.normal(size=subjects), rng.normal(size=subjects) * np.sqrt(1 - EXPLAINED)
  return truth[person], (truth + error)[person], person


def classification(rng, subjects: int, prevalence: float, shift: float):
  """Cases and scores, normal with SD 1 and `shift` apart; a second recording of a person has a
  score of its own."""
  person = recordings(rng, subjects)
  case = rng.random(subjects) < prevalence
  own = rng.normal(size=subjects) * np.sqrt(0.8) + shift * case
  return (
    case[person].astype(float),
    own[person] + np.sqrt(0.2) * rng.normal(size=len(person)),
    person,
  )


def recordings(rng, subjects: int) -> np.ndarray:
  """The person of every recording."""
  return np.concatenate([np.arange(subjects), np.flatnonzero(rng.random(subjects) < 0.2)])


def simulate(people, scores: dict, subjects: int, args, split: str) -> list[dict]:
  """Coverage of the intervals of every score {name: (function, truth)} over new test splits."""
  found = {name: np.zeros((args.simulations, 2)) for name in scores}
  for i in tqdm(range(args.simulations), desc=f"{', '.join(scores)}, {split}", leave=False):
    y, prediction, person = people(np.random.default_rng((args.seed, subjects, i)), subjects)
    weights = statistics.bootstrap_weights(np.stack([person, person], axis=1), DRAWS, i)
    for name, (function, _) in scores.items():
      found[name][i] = statistics.interval(function(y, prediction, weights))
  lines = []
  for name, (_, truth) in scores.items():
    low, high = found[name].T
    told = np.isfinite(low)
    below, above = (truth < low)[told].mean(), (truth > high)[told].mean()
    lines.append(
      {
        "score": name,
        "truth": round(truth, 4),
        "simulations": int(told.sum()),
        "inside": round(1 - below - above, 4),
        "below": round(below, 4),
        "above": round(above, 4),
      }
    )
  return lines


if __name__ == "__main__":
  main()
