"""`mmcl evaluate`: phenotypes, diseases, retrieval, localisation from a checkpoint, with baselines,
intervals and figures.

    mmcl evaluate --workdir=W [--step=N] [--cohort=DIR] [--out=DIR]

Runs every evaluator of the config (config.evaluators), on the test split. Probes are fitted on
train, their strength chosen on validation, scores taken on test. Writes W/evaluation/STEP/ or DIR.
"""

import argparse
import json
import pathlib

import jax

from mmcl_jax import evaluators
from mmcl_jax.data import schema
from mmcl_jax.errors import UserError, writing
from mmcl_jax.evaluators import scored, setup
from mmcl_jax.evaluators.base import Result, merged
from mmcl_jax.reports import report
from mmcl_jax.support import files
from mmcl_jax.support.paths import local
from mmcl_jax.training import restore


def main(argv):
  parser = argparse.ArgumentParser(
    prog="mmcl evaluate", description="Evaluates a checkpoint.", allow_abbrev=False
  )
  parser.add_argument("--workdir", type=local, required=True, help="folder of the run")
  parser.add_argument(
    "--step",
    type=int,
    help="checkpoint (default: the best of a run that stops early, else the last)",
  )
  parser.add_argument("--cohort", type=local, help="another cohort than the one it was trained on")
  parser.add_argument(
    "--out",
    type=local,
    help="folder for the report, if not in the workdir (default: W/evaluation/STEP)",
  )
  parser.add_argument(
    "--allow_seen",
    action="store_true",
    help="continue though people used in training are held out in the cohort; every report says so",
  )
  parser.add_argument(
    "--batch", type=int, default=64, help="recordings at a time (default %(default)s)"
  )
  args = parser.parse_args(argv)
  if args.batch < 1:
    raise UserError(f"--batch is {args.batch}; expected at least 1")
  with writing(args.out or args.workdir):
    evaluate(args.workdir, args.step, args.cohort, args.batch, args.out, args.allow_seen)


def evaluate(
  workdir: str,
  step: int | None = None,
  cohort_path: str | None = None,
  batch: int = 64,
  out: str | None = None,
  allow_seen: bool = False,
) -> dict:
  """Evaluates a checkpoint and writes its report; returns what results.json holds.

  What is needed at the end is checked before the work. Several hosts embed the recordings together
  and all get the same results; the first one prints and writes them, and counts the times that test
  was scored.
  """
  root = pathlib.Path(workdir)
  files.no_links(root / "evaluation")
  context = setup.of_checkpoint(workdir, step, cohort_path, batch, allow_seen)
  run, cohort = context.run, context.cohort
  of_config = evaluators.build(run.config)
  out = pathlib.Path(out) if out else scored.place(root / "evaluation", run, cohort)
  first_process = jax.process_index() == 0
  earlier = 0
  if first_process:
    report.check_place(out)
    earlier = scored.scored_before(root, cohort)
    if context.seen_people["note"]:
      print(context.seen_people["note"], flush=True)

  about = {
    "note": context.note,
    "encoder": context.reads,
    "workdir": str(workdir),
    "step": run.step,
    "checkpoint": restore.checksum(workdir, run.step),
    "cohort": cohort.path,
    "cohort_fingerprint": cohort.fingerprint,
    "counts": {split: len(context.features(split)["subject"]) for split in schema.SPLITS},
    "seen_people": context.seen_people,
    "config": json.loads(run.config.to_json_best_effort()),
    "test_scored": earlier + 1,
  }
  results = {"mmcl evaluate": Result(about)}
  for evaluator in of_config:
    results[f"config.evaluators.{evaluator.name}"] = evaluator.run(context)
  together = merged(results)
  if first_process:
    scored.count_scoring(root, run.step, cohort)
    report.write(together, out)
    if together.tables:
      print(report.as_text(together.tables[0]))
    if context.note:
      print(context.note)
    print(f"{out}/report.html")
  return together.metrics


if __name__ == "__main__":
  from mmcl_jax import cli

  cli.run(main, hosts=True)
