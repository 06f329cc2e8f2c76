"""What the contrastive part adds: joint, MAE-only and contrastive-only pre-training on one synthetic cohort, 3 seeds each.

    python benchmarks/study.py --out=study            # about 35 minutes on 2 CPU cores; run again, it goes on

Every run is `mmcl train` + `mmcl evaluate`; finished ones are not run again. Ends with study/results.json and the table of
docs/results.md. Scores are means over seeds; intervals are 95 %, from one bootstrap over test subjects shared by all runs
(1,000 draws), so comparisons are paired. They hold the cohort's test subjects responsible, not the choice of seed: the
spread over seeds stands beside them.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import queue
import subprocess
import sys

import numpy as np

from mmcl_jax.data import cohort as cohort_room
from mmcl_jax.evaluators import statistics

ROOT = pathlib.Path(__file__).resolve().parents[1]
ARMS = ("joint", "mae", "contrastive")
SHOWN = ("LVM", "LVEDV", "LVEF", "LVESV", "RVEDV", "WT", "Ecc")


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", default="study")
  parser.add_argument("--subjects", type=int, default=5200)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=600)
  parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on its share of the cores")
  args = parser.parse_args()
  out = pathlib.Path(args.out)
  cohort = out / "cohort"
  if not (cohort / "cohort.json").is_file():
    call("prepare", "synthetic", f"--subjects={args.subjects}", "--seed=100", "--split=0.52,0.08,0.40", f"--out={cohort}")
  runs = [(arm, seed) for seed in range(args.seeds) for arm in ARMS]
  cores, shares = sorted(os.sched_getaffinity(0)), queue.SimpleQueue()
  for job in range(args.jobs):
    shares.put(cores[job::args.jobs])

  def turn(arm_seed):
    share = shares.get()
    try:
      run(out, cohort, *arm_seed, args.steps, share)
    finally:
      shares.put(share)

  with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
    list(pool.map(turn, runs))
  results = summarise(out, args.seeds) | {"retrieval_ceiling": retrieval_ceiling(cohort_room.load(str(cohort)))}
  (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
  print(table(results))


def call(*words, cores=None, log=None):
  """Runs a program of the package on some cores; stops the study where it fails."""
  pin = (lambda: os.sched_setaffinity(0, cores)) if cores else None
  done = subprocess.run([sys.executable, "-m", f"mmcl_jax.{words[0]}", *words[1:]], stdout=log, stderr=log, preexec_fn=pin)
  if done.returncode:
    raise SystemExit(f"`mmcl {' '.join(words)}` ended with status {done.returncode}{f'; see {log.name}' if log else ''}")


def run(out, cohort, arm, seed, steps, cores):
  workdir = out / f"{arm}-{seed}"
  if (workdir / f"evaluation/{steps}/results.json").is_file():
    return
  workdir.mkdir(parents=True, exist_ok=True)
  print(f"{arm}, seed {seed}: {workdir}/log.txt", flush=True)
  with open(workdir / "log.txt", "a") as log:
    call("train", f"--config={ROOT}/configs/joint.py:demo,arm={arm},steps={steps}", f"--workdir={workdir}",
         f"--config.data.cohort={cohort}", f"--config.seed={seed}", f"--config.every.evaluate={steps}", cores=cores, log=log)
    call("evaluate", f"--workdir={workdir}", cores=cores, log=log)


def summarise(out: pathlib.Path, seeds: int) -> dict:
  """Scores over seeds, with intervals over test subjects.

  Returns {"r2": {model: {NAME: {mean, ci, seed_sd}}}, "differences": {A_minus_B: ...}, "share_of_ceiling": ..., ...};
  models are arm/embedding, arm/with_covariates, random_encoder, covariates and ceiling.
  """
  reports = {(arm, seed): next((out / f"{arm}-{seed}/evaluation").glob("*/results.json")) for arm in ARMS for seed in range(seeds)}
  predictions = {key: np.load(path.parent / "predictions.npz") for key, path in reports.items()}
  scores = {key: json.loads(path.read_text()) for key, path in reports.items()}
  first = predictions["joint", 0]
  y, names = first["y_true"], list(scores["joint", 0]["phenotypes"])
  weights = statistics.bootstrap_weights(first["subject"], 1000, seed=0)
  for found in predictions.values():
    if not np.array_equal(found["subject"], first["subject"]):
      raise SystemExit("the runs were not evaluated on the same test subjects; remove their evaluation folders")

  models = {f"{arm}/{model}": [predictions[arm, s][model] for s in range(seeds)] for arm in ARMS
            for model in ("embedding", "with_covariates")}
  models["random_encoder"] = [predictions["joint", s]["random_encoder"] for s in range(seeds)]
  models |= {model: [first[model]] for model in ("covariates", "ceiling")}
  point = {model: np.stack([statistics.r2(y, p) for p in found]) for model, found in models.items()}         # [S, K]
  draws = {model: np.mean([statistics.r2(y, p, weights) for p in found], axis=0) for model, found in models.items()}  # [R, K]

  def entry(value, drawn, spread=None):
    low, high = statistics.interval(drawn)
    return {name: {"mean": float(value[k]), "ci": [float(low[k]), float(high[k])]}
            | ({} if spread is None else {"seed_sd": float(spread[k])}) for k, name in enumerate(names)}

  sd = lambda x: x.std(axis=0, ddof=1) if len(x) > 1 else np.zeros(x.shape[1])
  pairs = [("joint/embedding", "random_encoder"), ("joint/embedding", "mae/embedding"),
           ("joint/embedding", "contrastive/embedding"), ("joint/with_covariates", "covariates"),
           ("mae/embedding", "random_encoder"), ("contrastive/embedding", "random_encoder")]
  share = point["joint/embedding"].mean(0) / point["ceiling"][0]
  return {
      "subjects": len(np.unique(first["subject"], axis=0)), "seeds": seeds, "counts": scores["joint", 0]["counts"],
      "r2": {model: entry(x.mean(axis=0), draws[model], sd(x)) for model, x in point.items()},
      "differences": {f"{a} minus {b}": entry(point[a].mean(0) - point[b].mean(0), draws[a] - draws[b]) for a, b in pairs},
      "share_of_ceiling": entry(share, draws["joint/embedding"] / draws["ceiling"]),
      "retrieval": {f"{arm}-{s}": scores[arm, s].get("retrieval") for arm in ARMS for s in range(seeds)},
  }


def retrieval_ceiling(cohort: cohort_room.Cohort) -> dict:
  """R@10 that a perfect reader of this cohort would get: the generator's ECG parameters against the measured phenotypes.

  Candidates are ranked by log p(phenotypes | ECG) - log p(phenotypes), jointly Gaussian in logarithms, fitted on train.
  """
  read = lambda split, name: np.stack([cohort.splits[split][i][name] for i in range(len(cohort.splits[split]))]).astype(float)
  columns = [list(cohort.info["phenotypes"]).index(name) for name in ("LVEDV", "LVESV", "LVM", "RVEDV", "RVESV", "WT", "Ecc")]
  x, y = ({split: np.log(np.abs(read(split, name)[:, keep])) for split in ("train", "test")}
          for name, keep in (("ecg_parameters", slice(None)), ("phenotypes", columns)))
  x, y = ({split: a[split] - a["train"].mean(axis=0) for split in a} for a in (x, y))
  slope, *_ = np.linalg.lstsq(x["train"], y["train"], rcond=None)
  given, alone = (np.linalg.inv(np.cov(r.T)) for r in (y["train"] - x["train"] @ slope, y["train"]))
  expected, seen = x["test"] @ slope, y["test"]
  square = lambda a, m: np.einsum("nk,kl,nl->n", a, m, a)
  score = expected @ given @ seen.T - 0.5 * (square(expected, given)[:, None] + square(seen, given - alone)[None, :])
  own = np.diag(score)
  return {"ecg_to_cmr": float(((score >= own[:, None]).sum(axis=1) <= 10).mean()),
          "cmr_to_ecg": float(((score >= own[None, :]).sum(axis=0) <= 10).mean())}


def table(results: dict) -> str:
  """The study in Markdown."""
  cell = lambda x: f"{x['mean']:.3f} [{x['ci'][0]:.3f}, {x['ci'][1]:.3f}]" + (f" ±{x['seed_sd']:.3f}" if x.get("seed_sd") else "")
  rows = [f"| test R2 | {' | '.join(SHOWN)} |", "|---" * (len(SHOWN) + 1) + "|"]
  for group in ("r2", "differences"):
    rows += [f"| {name} | {' | '.join(cell(scores[p]) for p in SHOWN)} |" for name, scores in results[group].items()]
  rows.append(f"| joint as a share of the ceiling | {' | '.join(cell(results['share_of_ceiling'][p]) for p in SHOWN)} |")
  rows += ["", "| retrieval, R@10 | ECG to CMR | CMR to ECG | chance |", "|---|---|---|---|"]
  rows += [f"| {name} | {found['ecg_to_cmr']['r@10']:.3f} | {found['cmr_to_ecg']['r@10']:.3f} | {found['ecg_to_cmr']['chance_r@10']:.4f} |"
           for name, found in results["retrieval"].items() if found]
  best = results["retrieval_ceiling"]
  rows.append(f"| ceiling: the generator's own parameters | {best['ecg_to_cmr']:.3f} | {best['cmr_to_ecg']:.3f} | |")
  return "\n".join(rows)


if __name__ == "__main__":
  main()
