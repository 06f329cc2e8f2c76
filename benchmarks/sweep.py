"""Every published way to pre-train an ECG encoder with CMR, on one synthetic cohort: the table of
docs/results.md.

    python benchmarks/sweep.py --out=study            # hours on 2 CPU cores; run again, it goes on

Runs, each `mmcl train` + `mmcl evaluate` of a recipe's `demo` size:

    once, seed 0  cmr_ed_volume, cmr_es_volume, cmr_ed_slice, cmr_cine_slice (cmr_phenotype.py: the
                  frozen teachers of the arms) and cmr_simclr; also scored themselves, as what the
                    MRI tells
    every seed    mae (ecg_mae.py), and from it the five arms of arms.py (ecg_only: as many further
                  updates of the MAE) and mmcl; from scratch joint, contrastive (joint.py) and
                    supervised
    no run        covariates alone, the untrained encoder (that of mae) and the ceiling: ridge on
                  the generator's own noise-free ECG parameters

So mae, joint, contrastive and supervised have had half the updates of the others. A finished run is
not run again, an interrupted one goes on from its last checkpoint, a failed one costs itself and
what starts from it. Ends with OUT/results.json, the tables in OUT/table.md and a figure in
OUT/sweep.svg, of the runs that are finished.

Scores are means over seeds; intervals are 95 %, from one bootstrap over test subjects shared by all
runs (1,000 draws), so differences are paired by subject and by seed. They hold the cohort's test
subjects responsible, not the choice of seed: the SD over seeds stands beside them, and does not
cover the teachers, which are trained once.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import queue
import subprocess
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

import numpy as np

from mmcl_jax.data import cohort as cohort_lib
from mmcl_jax.evaluators import statistics
from mmcl_jax.evaluators.diseases import FEWEST_TEST_CASES
from mmcl_jax.reports import figures
from mmcl_jax.support.text import SYNTHETIC_NOTE

DRAWS = 1000
# -> module
VIEWS = {
  "ed_volume": "cmr_ed",
  "es_volume": "cmr_es",
  "ed_slice": "cmr_slice",
  "cine_slice": "cmr_cine",
}
ARMS = {
  "ecg_only": (),
  "ed_slice": ("ed_slice",),
  "cine_slice": ("cine_slice",),
  "ed_volume": ("ed_volume",),
  "dual_phase": ("ed_volume", "es_volume"),
}  # arm of arms.py -> views of its teachers
TRAINED = ("mae", *ARMS, "mmcl", "joint", "contrastive", "supervised")
UNTRAINED, COVARIATES, CEILING = "untrained encoder", "covariates", "ceiling"
BOTH = "{} + covariates".format
GROUPS = {
  "volumes": ("LVEDV", "LVESV", "LVSV", "LVCO", "RVEDV", "RVESV", "RVSV"),
  "mass": ("LVM", "WT"),
  "function": ("LVEF", "RVEF", "Ecc"),
}
SHOWN = ("LVM", "LVEDV", "LVEF", "LVESV", "RVEDV", "RVEF", "WT", "Ecc")
PAIRS = [
  *((arm, "ecg_only") for arm in ARMS if arm != "ecg_only"),
  ("dual_phase", "ed_volume"),
  ("dual_phase", "ed_slice"),
  ("joint", "dual_phase"),
  ("joint", "mmcl"),
  ("joint", "mae"),
  ("joint", "contrastive"),
  *((arm, "supervised") for arm in TRAINED if arm != "supervised"),
  *((arm, UNTRAINED) for arm in TRAINED),
  *((BOTH(arm), COVARIATES) for arm in TRAINED),
]


class Run(NamedTuple):
  """A training run; `starts` names the module of the model and the run that it starts from."""

  name: str
  arm: str
  recipe: str
  seed: int
  starts: dict[str, str]


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", default="study")
  parser.add_argument("--subjects", type=int, default=5200)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=600, help="of every run")
  parser.add_argument(
    "--jobs", type=int, default=2, help="runs at a time, each on its share of the cores"
  )
  args = parser.parse_args()
  out, cores = pathlib.Path(args.out).resolve(), sorted(os.sched_getaffinity(0))
  if min(args.subjects, args.seeds, args.steps, args.jobs) < 1 or args.jobs > len(cores):
    raise SystemExit(
      "expected --subjects, --seeds, --steps, --jobs of at least 1, and --jobs of at most "
      f"{len(cores)}"
    )
  if not (out / "cohort/cohort.json").is_file():
    call(
      "prepare",
      "synthetic",
      f"--subjects={args.subjects}",
      "--seed=100",
      "--split=0.52,0.08,0.40",
      f"--out={out}/cohort",
    )
  cohort = cohort_lib.load(str(out / "cohort"))
  if (count := sum(cohort.info["counts"].values())) != args.subjects:
    raise SystemExit(
      f"{cohort.path} has {count} subjects, --subjects is {args.subjects}; take another --out"
    )

  runs = graph(args.seeds)
  failed = carry_out(runs, out, args.steps, [cores[job :: args.jobs] for job in range(args.jobs)])
  results = summarise(runs, out, args.steps) | {
    "retrieval_ceiling": retrieval_ceiling(cohort),
    "seconds": seconds(out),
  }
  (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
  (out / "table.md").write_text(table(results) + "\n")
  drawing(results).savefig(out / "sweep.svg")
  print(table(results))
  if failed:
    raise SystemExit("\n".join(f"{name}: {why}" for name, why in failed.items()))


def graph(seeds: int) -> list[Run]:
  """All runs, each after what it starts from; seed by seed, so that an unfinished study has whole
  seeds.

  Last the ablation of the joint objective, the least asked for.
  """
  runs = [
    Run(f"cmr_{view}", f"cmr_{view}", f"cmr_phenotype.py:demo,view={view}", 0, {}) for view in VIEWS
  ]
  runs.append(Run("cmr_simclr", "cmr_simclr", "cmr_simclr.py:demo", 0, {}))
  for seed in range(seeds):

    def add(arm, recipe, seed=seed, **starts):
      return runs.append(Run(f"{arm}-{seed}", arm, recipe, seed, starts))

    mae = f"mae-{seed}"
    add("mae", "ecg_mae.py:demo")
    for arm, views in ARMS.items():
      add(arm, f"arms.py:demo,arm={arm}", ecg=mae, **{VIEWS[view]: f"cmr_{view}" for view in views})
    add("mmcl", "mmcl.py:demo", ecg=mae, cmr_image="cmr_simclr")
    add("joint", "joint.py:demo,arm=joint")
    add("supervised", "supervised.py:demo")
  runs += [
    Run(f"contrastive-{seed}", "contrastive", "joint.py:demo,arm=contrastive", seed, {})
    for seed in range(seeds)
  ]
  return runs


# Running


def carry_out(
  runs: list[Run], out: pathlib.Path, steps: int, shares: list[list[int]]
) -> dict[str, str]:
  """Trains and evaluates what is not finished, a run on each share of the cores; returns what
  failed, and why."""
  free = queue.SimpleQueue()
  for share in shares:
    free.put(share)

  def work(run):
    share = free.get()
    try:
      train_and_evaluate(run, out, steps, share)
    finally:
      free.put(share)

  def tell(run, what, done):
    left = time_left([r for r in runs if r.name not in done], runs, seconds(out), len(shares))
    print(
      f"{time.strftime('%H:%M:%S')}  {len(done)} of {len(runs)} done{left}; {run.name} {what}",
      flush=True,
    )

  done = [run.name for run in runs if report_of(run, out, steps).is_file()]
  return schedule(runs, done, work, len(shares), tell)


def schedule(runs, done, work, jobs: int, tell=lambda run, what, done: None) -> dict[str, str]:
  """Calls `work` for every run that is not done, `jobs` at a time, each after what it starts from.

  Runs are in an order in which each comes after what it starts from. One that raises costs itself
  and what starts from it; returns {name: why}.
  """
  done, failed, going = set(done), {}, {}
  waiting = [run for run in runs if run.name not in done]
  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    while waiting or going:
      for run in list(waiting):
        if lost := [start for start in run.starts.values() if start in failed]:
          failed[run.name] = f"starts from {lost[0]}, which failed"
          waiting.remove(run)
      for run in [run for run in waiting if done.issuperset(run.starts.values())][
        : jobs - len(going)
      ]:
        waiting.remove(run)
        going[pool.submit(work, run)] = run
        tell(run, "begins", done)
      for future in concurrent.futures.wait(
        going, return_when=concurrent.futures.FIRST_COMPLETED
      ).done:
        run = going.pop(future)
        if error := future.exception():
          failed[run.name] = str(error)
        else:
          done.add(run.name)
        tell(run, f"failed: {error}" if error else "is done", done)
  return failed


def train_and_evaluate(run: Run, out: pathlib.Path, steps: int, cores: list[int]) -> None:
  workdir = out / run.name
  workdir.mkdir(parents=True, exist_ok=True)
  with open(workdir / "log.txt", "a") as log:
    # written last: the checkpoint is whole
    if not (workdir / f"checkpoints/{steps}/meta/manifest.json").is_file():
      call(
        "train",
        f"--config={ROOT}/configs/{run.recipe},steps={steps}",
        f"--workdir={workdir}",
        f"--config.data.cohort={out}/cohort",
        f"--config.seed={run.seed}",
        f"--config.every.evaluate={steps}",
        *(f"--config.init_from.{module}={out}/{start}" for module, start in run.starts.items()),
        cores=cores,
        log=log,
        times=(out, run),
      )
    call(
      "evaluate", f"--workdir={workdir}", f"--step={steps}", cores=cores, log=log, times=(out, run)
    )


def call(program, *words, cores=None, log=None, times=None):
  """Runs a program of this checkout, on some cores, in the environment of launch/env.sh; raises
  where it fails."""
  pin = (lambda: os.sched_setaffinity(0, cores)) if cores else None
  command = [sys.executable, "-m", f"mmcl_jax.{program}", *words]
  begun = time.monotonic()
  done = subprocess.run(
    ["bash", "-c", 'source "$0" && exec "$@"', f"{ROOT}/launch/env.sh", *command],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=log,
    stderr=log,
    preexec_fn=pin,
  )
  if times:
    out, run = times
    with open(out / "times.jsonl", "a") as file:
      print(
        json.dumps(
          {"run": run.name, "program": program, "seconds": round(time.monotonic() - begun, 1)}
        ),
        file=file,
      )
  if done.returncode:
    raise SystemExit(
      f"`mmcl {program}` ended with status {done.returncode}{f'; see {log.name}' if log else ''}"
    )


def report_of(run: Run, out: pathlib.Path, steps: int) -> pathlib.Path:
  return out / run.name / f"evaluation/{steps}/results.json"


def seconds(out: pathlib.Path) -> dict[str, dict[str, float]]:
  """{run: {train, evaluate}}: time taken, over all the times that the study was started."""
  found = {}
  for line in (
    (out / "times.jsonl").read_text().splitlines() if (out / "times.jsonl").is_file() else ()
  ):
    entry = json.loads(line)
    programs = found.setdefault(entry["run"], {})
    programs[entry["program"]] = programs.get(entry["program"], 0.0) + entry["seconds"]
  return found


def time_left(left: list[Run], runs: list[Run], taken: dict, jobs: int) -> str:
  """What the runs that are left will take if each takes as long as those of its arm, or else of
  all, did."""
  known = [
    (run.arm, sum(taken[run.name].values()))
    for run in runs
    if run.name in taken and run not in left
  ]
  if not known or not left:
    return ""

  def alike(arm):
    return [x for other, x in known if other == arm] or [x for _, x in known]

  minutes = sum(np.mean(alike(run.arm)) for run in left) / jobs / 60
  return f", about {minutes // 60:.0f} h {minutes % 60:02.0f} min left"


# Scores


def summarise(runs: list[Run], out: pathlib.Path, steps: int) -> dict:
  """Scores of all runs that are finished.

  Returns {"r2": {ROW: {COLUMN: {mean, ci, seed_sd}}}, "auroc": ..., "differences": {"r2": {"A minus
  B": ...}, "auroc": ...}, "retrieval": ..., "seeds": {ROW or PAIR: [...]}, "cases": {DISEASE: test
  cases}, ...}. Columns of R2 are GROUPS (the mean over their phenotypes) and phenotypes; of AUROC
  `mean` and every disease with enough test cases.
  """
  finished = [run for run in runs if report_of(run, out, steps).is_file()]
  if not any(run.arm in TRAINED for run in finished):
    raise SystemExit(f"no run of {out} that reads an ECG is finished yet")
  files = {run.name: report_of(run, out, steps) for run in finished}
  reports = {name: json.loads(file.read_text()) for name, file in files.items()}
  predictions = {
    name: dict(np.load(file.with_name("predictions.npz"))) for name, file in files.items()
  }
  first = predictions[finished[-1].name]
  for name, found in predictions.items():
    if not all(
      np.array_equal(found[x], first[x], equal_nan=True)
      for x in ("subject", "y_true", "disease_y_true")
    ):
      raise SystemExit(
        f"{name} was not evaluated on the test subjects of the others; remove its folder "
        "`evaluation`"
      )

  about = reports[finished[-1].name]
  names, diseases = list(about["phenotypes"]), list(about["diseases"]["embedding"])
  sick = first["disease_y_true"]
  cases, controls = ((sick == value).sum(axis=0) for value in (1, 0))
  scored = np.flatnonzero(np.minimum(cases, controls) >= FEWEST_TEST_CASES)
  weights = statistics.bootstrap_weights(first["subject"], DRAWS, seed=0)
  columns = {"r2": [*present(names), *names], "auroc": ["mean", *(diseases[c] for c in scored)]}
  scores = {"r2": {}, "auroc": {}}
  for row, seed, name, model in rows(finished):
    found = predictions[name]
    if model in found:
      both = [
        grouped(statistics.r2(first["y_true"], found[model], w), names) for w in (None, weights)
      ]
      scores["r2"].setdefault(row, {})[seed] = both
    if len(scored) and f"disease_{model}" in found:
      both = [
        aurocs(sick[:, scored], found[f"disease_{model}"][:, scored], w) for w in (None, weights)
      ]
      scores["auroc"].setdefault(row, {})[seed] = both
  return {
    "steps": steps,
    "counts": about["counts"],
    "subjects": len(np.unique(first["subject"], axis=0)),
    "finished": [run.name for run in finished],
    "unfinished": [run.name for run in runs if run not in finished],
    "seeds": {
      row: [seed for seed in found if seed is not None] for row, found in scores["r2"].items()
    }
    | {
      f"{a} minus {b}": common(scores["r2"].get(a, {}), scores["r2"].get(b, {})) for a, b in PAIRS
    },
    "cases": {name: int(count) for name, count in zip(diseases, cases)},
    **{
      what: {row: over_seeds(found, columns[what]) for row, found in scores[what].items()}
      for what in scores
    },
    "differences": {
      what: {
        f"{a} minus {b}": entry
        for a, b in PAIRS
        if (entry := difference(scores[what].get(a, {}), scores[what].get(b, {}), columns[what]))
      }
      for what in scores
    },
    "retrieval": retrieval(
      [(run.arm, found) for run in finished if (found := reports[run.name].get("retrieval"))]
    ),
  }


def rows(finished: list[Run]):
  """(row of the table, seed or None, run, model in its predictions), in the order of the table."""
  ecg = [run for run in finished if run.arm in TRAINED]
  for model, suffix in (("embedding", str), ("with_covariates", BOTH)):
    for arm in TRAINED:
      yield from ((suffix(arm), run.seed, run.name, model) for run in ecg if run.arm == arm)
  yield from ((UNTRAINED, run.seed, run.name, "random_encoder") for run in ecg if run.arm == "mae")
  yield from ((model, None, ecg[0].name, model) for model in (COVARIATES, CEILING))
  for run in finished:
    if run not in ecg:
      yield f"CMR itself: {run.arm.removeprefix('cmr_')}", None, run.name, "embedding"


def present(names: list[str]) -> dict[str, list[int]]:
  """{group: columns of its phenotypes}, of the groups that `names` has any of."""
  found = {
    group: [names.index(name) for name in members if name in names]
    for group, members in GROUPS.items()
  }
  return {group: columns for group, columns in found.items() if columns}


def grouped(scores: np.ndarray, names: list[str]) -> np.ndarray:
  """Scores [..., K] of phenotypes -> [..., G + K]: the mean of each group that is present, then the
  phenotypes."""
  means = [scores[..., columns].mean(axis=-1, keepdims=True) for columns in present(names).values()]
  return np.concatenate([*means, scores], axis=-1)


def aurocs(y: np.ndarray, probability: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
  """[N, C] -> [..., 1 + C]: the mean AUROC, and that of every disease."""
  each = np.stack(
    [statistics.auroc(y[:, c], probability[:, c], weights) for c in range(y.shape[1])], axis=-1
  )
  return np.concatenate([each.mean(axis=-1, keepdims=True), each], axis=-1)


def over_seeds(found: dict, columns: list[str]) -> dict:
  """{seed: (scores [T], their draws [R, T])} -> {column: {mean, ci, seed_sd}}; ci: of the mean over
  seeds."""
  point = np.stack([point for point, _ in found.values()])
  low, high = statistics.interval(np.mean([draws for _, draws in found.values()], axis=0))
  sd = point.std(axis=0, ddof=1) if len(point) > 1 else np.full(len(columns), np.nan)

  def number(x):
    return float(x) if np.isfinite(x) else None

  numbers = zip(*(map(number, x) for x in (point.mean(axis=0), low, high, sd)))
  return {
    column: {"mean": mean, "ci": [lower, upper], "seed_sd": seed_sd}
    for column, (mean, lower, upper, seed_sd) in zip(columns, numbers, strict=True)
  }


def difference(a: dict, b: dict, columns: list[str]) -> dict:
  """`over_seeds` of a - b on their common seeds; nothing where there are none."""

  def of(found, seed):
    return found.get(seed, found.get(None))

  found = {seed: tuple(x - y for x, y in zip(of(a, seed), of(b, seed))) for seed in common(a, b)}
  return over_seeds(found, columns) if found else {}


def common(a: dict, b: dict) -> list[int]:
  """The seeds that both have; what has no seeds ({None: ...}) stands against every seed."""
  return [seed for seed in a if seed in b or None in b]


def retrieval(reports: list[tuple[str, dict]]) -> dict:
  """(arm, report) of every run -> {arm: {direction: mean R@10 over seeds, "seed_sd": ..., "chance":
  ...}}."""
  found = {}
  for arm in TRAINED:
    if own := [report for other, report in reports if other == arm]:
      hits = {way: [report[way]["r@10"] for report in own] for way in ("ecg_to_cmr", "cmr_to_ecg")}
      found[arm] = {way: float(np.mean(x)) for way, x in hits.items()}
      found[arm]["seed_sd"] = {
        way: float(np.std(x, ddof=1)) if len(x) > 1 else None for way, x in hits.items()
      }
      found[arm]["chance"] = own[0]["ecg_to_cmr"]["chance_r@10"]
  return found


def retrieval_ceiling(cohort: cohort_lib.Cohort) -> dict:
  """R@10 of a perfect reader of this cohort: the generator's own ECG parameters against the
  measured phenotypes.

  Candidates are ranked by log p(phenotypes | ECG) - log p(phenotypes), jointly Gaussian in logarithms, fitted on train.
  """
  known, kept = (
    list(cohort.info["phenotypes"]),
    ("LVEDV", "LVESV", "LVM", "RVEDV", "RVESV", "WT", "Ecc"),
  )
  columns = [known.index(name) for name in kept]

  def read(split, name):
    return np.stack([split[i][name] for i in range(len(split))]).astype(float)

  x, y = (
    {
      split: np.log(np.abs(read(cohort.splits[split], name)[:, keep]))
      for split in ("train", "test")
    }
    for name, keep in (("ecg_parameters", slice(None)), ("phenotypes", columns))
  )
  x, y = ({split: a[split] - a["train"].mean(axis=0) for split in a} for a in (x, y))
  slope, *_ = np.linalg.lstsq(x["train"], y["train"], rcond=None)
  given, alone = (np.linalg.inv(np.cov(r.T)) for r in (y["train"] - x["train"] @ slope, y["train"]))
  expected, seen = x["test"] @ slope, y["test"]

  def square(a, m):
    return np.einsum("nk,kl,nl->n", a, m, a)

  score = expected @ given @ seen.T - 0.5 * (
    square(expected, given)[:, None] + square(seen, given - alone)[None, :]
  )
  own = np.diag(score)
  return {
    "ecg_to_cmr": float(((score >= own[:, None]).sum(axis=1) <= 10).mean()),
    "cmr_to_ecg": float(((score >= own[None, :]).sum(axis=0) <= 10).mean()),
  }


# Text


def table(results: dict) -> str:
  """The study in Markdown."""
  most = max(len(seeds) for seeds in results["seeds"].values())
  parts = (
    [f"**Not finished yet: {', '.join(results['unfinished'])}.**", ""]
    if results["unfinished"]
    else []
  )

  def label(row):
    seeds = results["seeds"].get(row, [])
    return row if len(seeds) in (0, most) else f"{row} (seeds {', '.join(map(str, seeds))})"

  def block(title, columns, scores):
    parts.extend([f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"])
    for row, found in scores.items():
      parts.append(
        f"| {label(row)} | {' | '.join(cell(found.get(column)) for column in columns)} |"
      )
    parts.append("")

  some = next(iter(results["r2"].values()))
  groups = [group for group in GROUPS if group in some]
  block("test R2, mean of the group", groups, results["r2"])
  block("test R2", [name for name in SHOWN if name in some], results["r2"])
  areas = list(next(iter(results["auroc"].values()), {}))
  if areas:
    block("test AUROC", areas, results["auroc"])
  cases = results["cases"]
  parts += [
    f"Test cases: {', '.join(f'{name} {count}' for name, count in cases.items())}. "
    f"Too few to score: {', '.join(name for name in cases if name not in areas) or 'none'}.",
    "",
  ]
  areas = results["differences"]["auroc"]
  block(
    "difference",
    [*groups, "mean AUROC"],
    {
      pair: found | {"mean AUROC": areas.get(pair, {}).get("mean")}
      for pair, found in results["differences"]["r2"].items()
    },
  )
  parts += ["| retrieval, R@10 | ECG to CMR | CMR to ECG | chance |", "|---|---|---|---|"]
  for row, found in results["retrieval"].items():
    hits = [spread(found[way], found["seed_sd"][way]) for way in ("ecg_to_cmr", "cmr_to_ecg")]
    parts.append(f"| {label(row)} | {' | '.join(hits)} | {found['chance']:.4f} |")
  best = results["retrieval_ceiling"]
  parts.append(
    f"| ceiling: the generator's own parameters | {best['ecg_to_cmr']:.3f} | "
    f"{best['cmr_to_ecg']:.3f} | |"
  )
  return "\n".join(parts)


def drawing(results: dict):
  """R2 by group from the ECG alone, against what is reached without training and what is there to
  reach."""
  groups = [group for group in GROUPS if group in next(iter(results["r2"].values()))]
  return figures.forest(
    results["r2"],
    groups,
    TRAINED,
    (UNTRAINED, CEILING),
    "test $R^2$, ECG alone",
    SYNTHETIC_NOTE,
  )


def cell(score: dict | None) -> str:
  if not score or score["mean"] is None:
    return "-"
  ci = "" if None in score["ci"] else f" [{score['ci'][0]:z.3f}, {score['ci'][1]:z.3f}]"
  return spread(score["mean"], None) + ci + spread(None, score["seed_sd"])


def spread(value: float | None, sd: float | None) -> str:
  return ("" if value is None else f"{value:z.3f}") + ("" if sd is None else f" ±{sd:.3f}")


if __name__ == "__main__":
  main()
