"""`mmcl evaluate`: phenotypes, diseases, retrieval, localisation from a checkpoint, with baselines,
intervals and figures.

    mmcl evaluate --workdir=W [--step=N] [--cohort=DIR] [--out=DIR]

Probes are fitted on train, their strength chosen on validation, scores taken on test. Writes
W/evaluation/STEP/ or DIR.
"""

import argparse
import contextlib
import json
import os
import pathlib
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from mmcl_jax import configuration
from mmcl_jax.data import cohort as cohort_room, pipeline, schema
from mmcl_jax.data.preprocess import ecg as preprocess_ecg
from mmcl_jax.errors import UserError, writing
from mmcl_jax.evaluators import (
  diseases,
  embeddings,
  figures,
  generation,
  localisation,
  low_data,
  phenotypes,
  readouts,
  report,
  retrieval,
  survival,
)
from mmcl_jax.evaluators.drawings import relevance
from mmcl_jax.models import pretrainer, towers
from mmcl_jax.support import files
from mmcl_jax.support.paths import local
from mmcl_jax.support.text import SYNTHETIC_NOTE
from mmcl_jax.training import checkpoint, distributed, metrics, people, restore, steps


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


def evaluate(  # noqa: C901
  workdir: str,
  step: int | None = None,
  cohort_path: str | None = None,
  batch: int = 64,
  out: str | None = None,
  allow_seen: bool = False,
) -> dict:
  """Evaluates a checkpoint and writes its report; returns what results.json holds.

  What is needed at the end is checked before the work: where the report goes, and what it reads
  beside the cohort. Several hosts embed the recordings together and all get the same results; the
  first one prints and writes them, and counts the times that test was scored.
  """
  files.no_links(pathlib.Path(workdir) / "evaluation")
  step = restore.choose(workdir, step)
  cohort = cohort_room.load(cohort_path) if cohort_path else own_cohort(workdir, step)
  distributed.agree(
    {
      "--workdir": os.path.abspath(workdir),
      "the checkpoint": step,
      "--batch": batch,
      "the fingerprint of the cohort": cohort.fingerprint,
      "the content of its files": cohort.content,
    }
  )
  seen = people.held_out(
    cohort,
    people.of_run(workdir, step),
    f"had part in the training of {workdir}",
    allow_seen,
    "--allow_seen",
  )
  run = restore.load_run(workdir, step)
  distributed.check_mesh(run.mesh)
  model = run.config.model
  if not model.towers:
    raise UserError(
      f"{workdir} has no encoder of an ECG or a CMR, only a {' and a '.join(generation.parts(model))}, which is "
      "evaluated with the generator that it serves (configs/ecg_to_cmr.py)"
    )
  ecg_tower = model.towers.get("ecg", {})
  takes_covariates = ecg_tower.get("film", False)
  # a run without an ECG tower is judged by its CMR embedding
  reads = "ECG" if "ecg" in model.towers else "CMR"
  if reads == "ECG" and cohort.info["ecg_profile"] != run.config.data.ecg_profile:
    raise UserError(
      f"the cohort {cohort.path} was normalised by profile {cohort.info['ecg_profile']!r}, the encoder was "
      f"trained on {run.config.data.ecg_profile!r}; prepare the cohort with --profile={run.config.data.ecg_profile}"
    )
  lacking = [
    f"{reads} in {split}"
    for split in schema.SPLITS
    if not cohort.info[f"with_{reads.lower()}"][split]
  ]
  lacking += ["phenotypes and no diseases"] * (
    not cohort.info["phenotypes"] and not cohort.info["diseases"]
  )
  fields = pretrainer.fields(model)
  lacking += [field for field in fields if reads == "CMR" and field not in cohort.info["shapes"]]
  if lacking:
    raise UserError(
      f"the cohort {cohort.path} has no {', no '.join(lacking)}; evaluation fits on train, chooses on val and scores "
      "phenotypes and diseases on test: name another one with --cohort"
    )
  if takes_covariates and not run.scales.covariates:
    raise UserError(
      f"the encoder takes covariates, whose names and scales {workdir}, converted weights, does not "
      "tell; start a stage from it with config.init_from.ecg, and evaluate that"
    )
  if takes_covariates and tuple(cohort.info["covariates"]) != run.scales.covariates:
    raise UserError(
      f"the encoder takes the covariates {', '.join(run.scales.covariates)}, the cohort {cohort.path} has "
      f"{', '.join(cohort.info['covariates']) or 'none'}; evaluate on a cohort with the same ones"
    )
  if fields and all(name in cohort.info["shapes"] for name in fields):
    pretrainer.check(model, cohort.info["shapes"])
  has_cmr = (
    bool(fields)
    and cohort.info["with_cmr"]["test"] > 0
    and all(name in cohort.info["shapes"] for name in fields)
  )

  first_process = jax.process_index() == 0
  out = pathlib.Path(out) if out else place(pathlib.Path(workdir) / "evaluation", run, cohort)
  if first_process:
    report.check_place(out)
    earlier = scored_before(pathlib.Path(workdir), cohort)
    curves = metrics.read(pathlib.Path(workdir) / "metrics.jsonl")
  read = prepared(cohort)
  if first_process and seen["note"]:
    print(seen["note"], flush=True)
  if first_process and "event_years" in cohort.info["shapes"] and not survival.installed():
    print(
      "no incident risk: the cohort has dates, but scikit-survival is not installed; pip install 'mmcl-jax[survival]'"
    )
  if fields and not has_cmr and first_process:
    print(
      f"no retrieval, no localisation: the test split of {cohort.path} has no CMR, or lacks some of {', '.join(fields)}"
    )
  paired = has_cmr and reads == "ECG" and bool(towers.cmr(model))
  if has_cmr and not paired and first_process:
    print(
      f"no retrieval, no localisation: the run has no {'CMR' if reads == 'ECG' else 'ECG'} tower"
    )

  with jax.set_mesh(run.mesh):
    untrained = restore.untrained(run)
    features = embed_splits(
      run, untrained, cohort, batch, fields if has_cmr and towers.cmr(model) else ()
    )
    if reads == "CMR":  # the ceiling is that of an ECG
      features = {
        split: {name: x for name, x in found.items() if name != "ecg_parameters"}
        for split, found in features.items()
      }
    shown = reconstruction(run, cohort, batch) if ecg_tower.get("mask_ratio") else None
    located, explained = (
      localisation.evaluate(run, untrained, cohort, batch) if paired else ({}, [])
    )
    generated = has_cmr and generation.parts(model) == ["tokenizer", "segmenter", "generator"]
    if generated and (why := generation.lacking(run, cohort, features)):
      generated = False
      if first_process:
        print(f"no hearts are drawn: {why}", flush=True)
    results_of_draws, hearts = generation.evaluate(run, cohort, features) if generated else ({}, {})
    # an ECG and a CMR, not only the one here, the other there
    paired = paired and bool((features["test"]["has_cmr"] > 0).any())

  if first_process:
    print("fitting probes, drawing 1,000 bootstrap samples", flush=True)
  names, units = list(cohort.info["phenotypes"]), list(cohort.info["phenotypes"].values())
  measured, ill = readouts.predict(features, run.scales, names, list(cohort.info["diseases"]))
  results, predictions, probe = phenotypes.evaluate(features, names, units, measured)
  results["diseases"], sick, _ = diseases.evaluate(features, cohort.info["diseases"], ill)
  predictions |= {f"disease_{name}": x for name, x in sick.items() if name != "subject"}
  probe["note"] = seen["note"]  # for whoever reads the intervals alone
  scored = [
    c for c, score in enumerate(results["diseases"]["embedding"].values()) if "auroc" in score
  ]
  members = {
    group: [names.index(name) for name in found]
    for group, found in results["group_members"].items()
  }
  whole = {
    model: [score["value"] for score in groups.values()]
    for model, groups in results["groups"].items()
    if model in low_data.MODELS
  }
  if scored:
    for model, found in whole.items():
      found.append(np.mean([list(results["diseases"][model].values())[c]["auroc"] for c in scored]))
  results["low_data"] = low_data.evaluate(features, members, scored, whole)
  if "event_years" in features["test"] and survival.installed():
    results["survival"], risk = survival.evaluate(features, cohort.info["diseases"])
    predictions |= {f"survival_{name}": x for name, x in risk.items() if name != "subject"}
  if paired:
    test = features["test"]
    pairs = test["has_cmr"] > 0
    results["retrieval"], ranks = retrieval.retrieval(
      test["ecg_projection"][pairs], test["cmr_projection"][pairs], test["subject"][pairs]
    )
    results["localisation"] = located
  if generated:
    results["generation"] = results_of_draws
  note = SYNTHETIC_NOTE if cohort.info.get("synthetic") else ""
  results |= {
    "note": note,
    "encoder": reads,
    "workdir": str(workdir),
    "step": run.step,
    "checkpoint": restore.checksum(workdir, run.step),
    "cohort": cohort.path,
    "cohort_fingerprint": cohort.fingerprint,
    "counts": {split: len(f["subject"]) for split, f in features.items()},
    "data": data_card(cohort, features) | read,
    "seen_people": seen,
    "config": json.loads(run.config.to_json_best_effort()),
  }
  if not first_process:
    return results
  drawings = {}
  if names:
    y, predicted = predictions["y_true"], predictions["embedding"]
    drawings["r2"] = figures.r2_bars(results, note)
    drawings["predicted_against_true"] = figures.predicted_against_true(
      y, predicted, results["phenotypes"], note
    )
    drawings["bland_altman"] = figures.bland_altman(y, predicted, results["phenotypes"], note)
  if any("auroc" in scores for scores in results["diseases"]["embedding"].values()):
    drawings["roc_curves"] = figures.roc_curves(sick["y_true"], sick, results["diseases"], note)
    drawings["calibration"] = figures.calibration(results["diseases"], note)
  if results["low_data"]["embedding"]:  # nothing is scored where test has too few labels
    drawings["low_data"] = figures.low_data(results["low_data"], note)
  if generated:
    drawings["hearts"] = figures.hearts(**hearts, note=note)
  if paired:
    drawings["retrieval"] = figures.retrieval_ranks(ranks, note)
  if curves:  # weights from elsewhere have none
    drawings["training_curves"] = figures.training_curves(curves, note)
  if shown:
    drawings["reconstruction"] = figures.reconstruction(**shown, note=note)
  drawings |= relevance(explained, note)
  results["test_scored"] = earlier + 1
  count_scoring(pathlib.Path(workdir), run.step, cohort)
  report.write(results, predictions, probe, drawings, out)
  print(report.table(results))
  if paired:
    found = results["retrieval"]["ecg_to_cmr"]
    print(
      f"retrieval of the CMR by its ECG: R@10 {found['r@10']:.3f} (chance {found['chance_r@10']:.3f}, "
      f"{found['n_candidates']} candidates)"
    )
  print(f"{note}\n{out}/report.html" if note else f"{out}/report.html")
  return results


def own_cohort(workdir: str, step: int) -> cohort_room.Cohort:
  """The cohort that a step was trained on, by its fingerprint: where the config has it, or where it
  lay in training."""
  manifest = checkpoint.manifest(workdir, step)
  if not manifest["cohort"]:
    raise UserError(
      f"the weights of {workdir} come from elsewhere and have no cohort of their own; name the one to "
      "evaluate on with --cohort=DIR"
    )
  places = list(
    filter(None, (configuration.load(workdir).data.cohort, manifest.get("cohort_path")))
  )
  found = [
    cohort_room.load(path) for path in places if (pathlib.Path(path) / "cohort.json").is_file()
  ]
  for cohort in found:
    if cohort.fingerprint == manifest["cohort"]:
      return cohort
  if found:
    raise UserError(
      f"{found[0].path} is no longer the cohort that step {step} was trained on; name the one to "
      "evaluate on with --cohort=DIR"
    )
  raise UserError(
    f"no cohort at {' or '.join(map(repr, dict.fromkeys(places)))}, where {workdir} was trained; name "
    "the folder in which it is now with --cohort=DIR"
  )


def place(root: pathlib.Path, run, cohort) -> pathlib.Path:
  """ROOT/STEP for the run's own cohort, else ROOT/STEP-NAME, with part of the fingerprint if
  another cohort has that.

  Weights from elsewhere have no cohort: the first that they are evaluated on counts as theirs.
  """
  name = f"{run.step}-{pathlib.Path(cohort.path).resolve().name}"
  own = [str(run.step)] if run.manifest["cohort"] in ("", cohort.fingerprint) else []
  for folder in (root / one for one in (*own, name)):
    # none there, or one that is made anew
    with contextlib.suppress(OSError, ValueError, AttributeError):
      if (
        json.loads((folder / "results.json").read_text()).get("cohort_fingerprint")
        != cohort.fingerprint
      ):
        continue
    return folder
  return root / f"{name}-{cohort.fingerprint[:8]}"


def data_card(cohort, features) -> dict:
  """What the scores rest on: labels known, and cases, by split."""

  def known(kind, names):
    return {
      name: {split: int(np.isfinite(f[kind][:, k]).sum()) for split, f in features.items()}
      for k, name in enumerate(names)
    }

  cases = {
    name: {split: int((f["diseases"][:, k] == 1).sum()) for split, f in features.items()}
    for k, name in enumerate(cohort.info["diseases"])
  }
  return {
    "source": cohort.info["source"],
    "with_ecg": cohort.info["with_ecg"],
    "with_cmr": cohort.info["with_cmr"],
    "labels": known("phenotypes", cohort.info["phenotypes"]),
    "cases": cases,
  }


def prepared(cohort) -> dict:
  """{steps, rejected} of `mmcl prepare`; empty where quality.json is absent, or damaged, which a
  line then says."""
  file = pathlib.Path(cohort.path) / "quality.json"
  try:
    found = json.loads(file.read_bytes()) if file.exists() else {"steps": {}, "reasons": []}
    return {
      "steps": {name: int(count) for name, count in found["steps"].items()},
      "rejected": {str(reason["text"]): int(reason["records"]) for reason in found["reasons"]},
    }
  except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    if jax.process_index() == 0:
      print(
        f"{file} cannot be read ({type(error).__name__}): the report will not say what was read "
        "and rejected",
        flush=True,
      )
    return {"steps": {}, "rejected": {}}


def scored_before(workdir: pathlib.Path, cohort) -> int:
  """How often the test split of this cohort was scored from this workdir so far, by
  evaluation/scored.jsonl.

  A test split that is looked at again and again, to choose by it, is a validation split. If this
  time cannot be counted, a line says so.
  """
  file, lines, times, damaged = workdir / "evaluation" / "scored.jsonl", [], 0, 0
  try:
    lines = file.read_bytes().splitlines() if file.exists() else []
    file.parent.mkdir(exist_ok=True)
    os.close(files.opened(file, os.O_WRONLY))
  except OSError as error:
    print(
      f"this scoring of the test split will not be counted: {file}: {error.strerror}", flush=True
    )
  for line in lines:
    try:
      times += json.loads(line)["cohort_fingerprint"] == cohort.fingerprint
    except (ValueError, KeyError, TypeError, RecursionError):
      damaged += 1
  if damaged:
    print(
      f"{file}: {damaged} lines cannot be read; what they say of earlier scorings is not counted",
      flush=True,
    )
  return times


def count_scoring(workdir: pathlib.Path, step: int, cohort) -> None:
  line = {
    "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    "step": step,
    "cohort_fingerprint": cohort.fingerprint,
  }
  path = workdir / "evaluation" / "scored.jsonl"
  with (
    contextlib.suppress(OSError),  # said by `scored_before`
    open(files.opened(path, os.O_WRONLY | os.O_APPEND), "a") as log,
  ):
    print(json.dumps(line), file=log)


def embed_splits(run, untrained, cohort, batch: int, fields) -> dict[str, dict[str, np.ndarray]]:
  """Trained and untrained embeddings, and projections, of every split, in one pass."""
  embed = steps.make_embed(run.model, run.config, run.scales)
  both = jax.jit(
    lambda pair, rows: (
      embed(pair[0], rows) | {"random_embedding": embed(pair[1], rows)["embedding"]}
    )
  )
  pair, reads_ecg = (run.state.variables, untrained), "ecg" in run.config.model.towers
  return {
    split: embeddings.collect(
      both,
      pair,
      cohort.splits[split],
      mesh=run.mesh,
      batch=batch,
      needs="has_ecg" if reads_ecg else "has_cmr",
      fields=fields,
      title=f"embed {split}",
    )
    for split in schema.SPLITS
  }


def reconstruction(run, cohort, batch: int) -> dict:
  """The masked autoencoder on the first test recording."""

  def rebuild(variables, rows):
    rows = steps.first_window(
      steps.to_float(rows, run.scales if run.config.model.towers.ecg.get("film") else None),
      run.config.data.samples,
    )
    keys = steps.sample_keys(run.config.seed, rows["index"])
    return rows["ecg"], run.model.apply(
      variables, rows["ecg"], keys, rows.get("conditions"), method="reconstruct"
    )

  rows = next(
    rows for rows in pipeline.one_pass(cohort.splits["test"], batch=1) if rows["has_ecg"][0]
  )
  ecg, outputs = jax.device_get(
    jax.jit(rebuild, out_shardings=NamedSharding(run.mesh, P()))(run.state.variables, rows)
  )
  return {
    "ecg": ecg[0],
    "rebuilt": outputs["reconstruction"][0],
    "mask": outputs["patch_mask"][0],
    "patch": run.config.model.towers.ecg.patch,
    "rate_hz": preprocess_ecg.rate_hz(run.config.data.ecg_profile),
  }


if __name__ == "__main__":
  from mmcl_jax import cli

  cli.run(main, hosts=True)
