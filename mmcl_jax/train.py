"""`mmcl train`: the training loop of every recipe.

    mmcl train --config=configs/joint.py:demo --workdir=W --config.data.cohort=DIR

Running the same command again goes on from the last checkpoint, and ends in the same state bit for
bit as if it had never stopped (same devices; to float tolerance on others). SIGTERM, SIGHUP,
SIGUSR1 or SIGUSR2 to any host, or Ctrl-C, saves a checkpoint on all and exits with status 75
(EX_TEMPFAIL: run the command again); a second Ctrl-C ends at once. On several hosts, see
training/distributed.py and docs/multi_host.md.
"""

import contextlib
import json
import os
import pathlib
import time

import jax
import numpy as np

from mmcl_jax import configuration, evaluators, objectives as objective_room, ranges
from mmcl_jax.data import cohort as cohort_room, pipeline
from mmcl_jax.errors import DamagedRecord, UserError, writing
from mmcl_jax.evaluators.context import Context
from mmcl_jax.models import pretrainer, towers
from mmcl_jax.support import locks
from mmcl_jax.support.tree import flatten
from mmcl_jax.training import (
  checkpoint,
  distributed,
  faults,
  frozen,
  initialise,
  metrics,
  parallel,
  people,
  restore,
  signals,
  state as state_room,
  steps as step_room,
  stopping,
)

ALLOW = "--config.data.allow_seen=True"
USAGE = "usage: mmcl train --config=configs/joint.py:demo --workdir=W --config.data.cohort=DIR [--config.x.y=V ...]"


NOTHING, SAVE, STOP = 0, 1, 2  # what a host may ask of all; of several wishes the largest counts


def main(argv):
  config, flags = configuration.from_flags(
    "mmcl train", USAGE, argv, {"workdir": "folder of the run, made if absent"}
  )
  with signals.stops() as asked_to_stop, writing(flags.workdir):
    train(config, flags.workdir, asked_to_stop)


def train(config, workdir: str, asked_to_stop=lambda: False, clock=time.monotonic):  # noqa: C901
  """Runs or resumes a run; returns its final state.

  Where config.stop_after is set, that is the last state of training, not the best one, which is
  kept beside it.

  Args:
    asked_to_stop: read before every step; once it is true on any host, all save after the next step
      and exit with 75.
    clock: seconds, by which host 0 knows that config.every.save_minutes are over.
  """
  # -- What is asked for, checked before anything is made or compiled --
  config.model = towers.complete(config.model)
  ranges.check(config)
  configuration.check_workdir(config, workdir)
  cohort = cohort_room.load(config.data.cohort)
  others = load_mix(config.data.mix)
  start = checkpoint.latest(workdir) or 0
  stages = stages_of(config, workdir, start)
  if start:  # what it started from stays on record, wherever that lies by now
    config.init_from = configuration.load(workdir).init_from
  read = [cohort, *(other for other, _ in others)]
  distributed.agree(
    {
      **{f"config.{key}": value for key, value in flatten(json.loads(config.to_json())).items()},
      "--workdir": os.path.abspath(workdir),
      "its last checkpoint": start,
      "the fingerprint of the cohorts": [one.fingerprint for one in read],
      "the content of the cohorts' files": [one.content for one in read],
    }
  )
  mesh = parallel.make_mesh(**config.mesh)
  parallel.check_batch(config.batch, mesh)
  distributed.check_mesh(mesh)
  scales = targets(cohort, config)
  objectives = objective_room.build(config.objectives)
  watching = evaluators.in_training(config)
  stopping.check(config)
  model = pretrainer.build(
    config.model, config.data.samples, len(scales.names), len(scales.diseases)
  )
  check_cohorts(cohort, others, config)
  learned_from = people_of(cohort, others, config, workdir, start)
  cohort, others = (
    tolerant(cohort, config),
    [(tolerant(one, config), share) for one, share in others],
  )
  first_process = jax.process_index() == 0

  with hold(workdir), jax.set_mesh(mesh):
    if (checkpoint.latest(workdir) or 0) != start:
      raise UserError(
        f"another run has just saved a checkpoint in {workdir}; give the same command again to go on from there"
      )
    # -- State: the last checkpoint of this workdir, else fresh, with what earlier stages have
    # learned --
    example = step_room.example(config, cohort.info["shapes"], len(scales.names), config.batch)
    tx = state_room.optimizer_for(model, example, config)
    state, where = state_room.create(model, tx, example, config.seed, mesh, config.sharding)
    step_room.check_outputs(model, objectives, example, state)
    best, skipped = stopping.Best(), faults.Skipped()
    if start:
      abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where
      )
      state, _, manifest = checkpoint.restore(workdir, start, abstract)
      restore.check_config(workdir, start, manifest, config)
      # both absent from the checkpoints of older runs
      best = stopping.Best(**manifest.get("best") or {})
      skipped = faults.Skipped(**manifest.get("skipped") or {})
      fingerprints = [manifest["cohort"], *manifest.get("mixed", [])]
      for one, fingerprint in zip(
        [cohort, *(other for other, _ in others)], fingerprints, strict=True
      ):
        if fingerprint != one.fingerprint:
          raise UserError(
            f"{workdir} was trained on the cohort {fingerprint}, {one.path} is {one.fingerprint}; "
            "give the first one or take another --workdir"
          )
    else:
      state, carried = initialise.carry_over(state, config, restore.load_variables)
    pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
    distributed.check_shared(workdir)

    # of hearts that nobody has measured
    spacing = {"spacing": mean_spacing(cohort)} if config.model.get("generator") else {}

    # -- Data: towers that do not learn look at every heart once, before the loop --
    fields = pretrainer.fields(config.model, only=pretrainer.learning(config.model))

    def records(one, split):
      return frozen.with_features(
        one, split, model, state.variables, mesh, workdir, config.batch, config.loader.threads
      )

    train_records, mix = records(cohort, "train"), mixed(cohort, others, config, records)

    def batch_of(start):
      return pipeline.train_batches(
        train_records,
        seed=config.seed,
        batch=config.batch,
        fields=fields,
        start_step=start,
        host=jax.process_index(),
        hosts=jax.process_count(),
        mix=mix,
        **config.loader,
      )

    about = {"cohort": cohort.fingerprint, "shapes": cohort.info["shapes"], **spacing}
    # without a state, which each evaluation brings
    run = restore.Run(config, model, mesh, start, None, scales, about)
    context = Context(run, cohort, "val", workdir, config.batch)
    if watching:
      context.records["val"] = records(cohort, "val")
    if first_process:
      configuration.save(config, workdir)
      print(
        f"resuming {workdir} from step {start}"
        if start
        else json.dumps(json.loads(config.to_json()), indent=1)
      )
      print(parallel.table(state, where, most=8))
      if not start:
        print(initialise.describe(carried))

    # -- The loop: evaluate -> save -> take the next batch -> step -> write the metrics of the step
    # before -- What is saved holds the word of its own evaluation, so that a resumed run repeats
    # none and misses none.
    step_and_metrics = step_room.make_train_step(model, objectives, tx, config, scales)

    def step_on_hosts(state, batch):
      """`asked` goes with the batch and comes back with the metrics: all hosts learn of a wish at
      the same step."""
      asked = batch.pop("asked").max()
      state, values = step_and_metrics(state, batch)
      return state, values | {"asked": asked}

    train_step = jax.jit(step_on_hosts, donate_argnums=0, out_shardings=(where, None))
    writer = metrics.create_writer(workdir, start, just_logging=not first_process)
    progress = metrics.Progress(start, config.steps, config.batch)
    checkpoints = checkpoint.Checkpoints(workdir, config.keep, people.as_arrays(learned_from))
    batches = batch_of(start)
    spikes = faults.Spikes()
    # (step, metrics) on the device: fetched one step late, so that fetching never stalls it
    pending = None

    def flush_pending() -> int:
      """Fetches the step before, and stops if it left out too much; returns what a host has asked
      for by then."""
      nonlocal skipped
      if pending is None:
        return NOTHING
      step, values = pending
      values = jax.device_get(values)
      worst = values.pop("worst")
      values = {name: float(x) for name, x in values.items()}
      asked = int(values.pop("asked"))
      if not values["finite"] or values["rows_left_out"]:
        checkpoints.finish()  # what is said about the last good one must be true,
        distributed.meet()  # and host 0 has signed it before another host ends all
      try:
        skipped = faults.judged(skipped, step, values, worst, config, objectives, workdir)
      except UserError:
        checkpoints.close()
        raise
      told = spikes.tell(step, values["loss"], worst)
      if not values.pop("finite"):
        told = faults.skipped_step(step, skipped, values, worst, config, objectives)
      if told and first_process:
        print(told, flush=True)
      if step % config.every.log == 0 or step == config.steps:
        writer.write_scalars(step, values)
        if first_process:
          shown = {"loss": values["loss"]} | {o.name: values[f"{o.name}/loss"] for o in objectives}
          progress.report(step, shown)
      return asked

    def wish() -> int:
      overdue = (
        distributed.here.index == 0 and 0 < 60 * config.every.save_minutes <= clock() - saved
      )
      return STOP if asked_to_stop() else SAVE if overdue else NOTHING

    asked, saved = NOTHING, clock()
    for step in range(start, config.steps + 1):

      def due(every, step=step):
        return step > start and (step % every == 0 or step == config.steps)

      due_now = [one for one in watching if due(one.every)]
      if due_now or due(config.every.save) or asked:
        asked = max(asked, flush_pending())
        pending = None
      if due_now:
        scores = {}
        for found in evaluators.scores(due_now, context.at(step, state)):
          writer.write_scalars(step, found)
          if first_process:
            print(
              f"validation {step}/{config.steps}  "
              + "  ".join(f"{k} {v:.3f}" for k, v in found.items()),
              flush=True,
            )
          scores |= found
        # by the first host's number: hosts that differed by a rounding would part for good
        if config.stop_after and config.stop_on in scores:
          best = stopping.judged(
            best, step, float(distributed.gather(np.float32([scores[config.stop_on]]))[0][0])
          )
      over = step == config.steps or stopping.over(best, config.stop_after)
      if over and config.stop_after and best.step is None:
        checkpoints.close()
        raise UserError(
          f"{config.stop_on} was not finite at any evaluation up to step {step}, so no step is the best; does the val "
          f"split of {cohort.path} know what it is a loss of? --config.stop_after=0 trains without it"
        )
      if due(config.every.save) or (step > start and (asked or over or step == best.step)):
        checkpoints.save(
          step,
          state,
          data={"next_step": step, "batch": config.batch, "seed": config.seed},
          meta=restore.meta(
            step,
            cohort.fingerprint,
            cohort.info["shapes"],
            scales,
            config=json.loads(config.to_json()),
            best=best._asdict(),
            skipped=skipped._asdict(),
            mixed=[other.fingerprint for other, _ in others],
            cohort_path=os.path.abspath(cohort.path),
            stages=stages,
            **spacing,
          ),
        )
        saved = clock()
      if asked == STOP or over:
        break
      rows = next(batches)
      rows["asked"] = np.full(len(rows["mask"]), wish(), np.float32)
      state, values = train_step(state, parallel.to_global(rows, mesh))
      asked = flush_pending()
      checkpoints.poll()
      pending = step + 1, values
    checkpoints.close()
    writer.close()
  if not over:
    if first_process:
      print(
        f"asked to stop: saved {workdir}/checkpoints/{step}; the same command goes on from there",
        flush=True,
      )
    raise SystemExit(os.EX_TEMPFAIL)
  if first_process:
    early = (
      f" (of {config.steps}: no better {config.stop_on} in {best.since} evaluations)"
      if step < config.steps
      else ""
    )
    print(f"trained to step {step}{early}: {workdir}/checkpoints/{step}")
    if best.step is not None:
      print(
        f"the best {config.stop_on} was {best.loss:.4f} at step {best.step}: {workdir}/checkpoints/{best.step}"
      )
    print(configuration.longer(config, workdir))
  return state


def hold(workdir: str):
  """The lock of a workdir; of several hosts the first one holds it for all."""
  return contextlib.nullcontext() if distributed.here.index else locks.workdir_held(workdir)


def targets(cohort, config) -> step_room.Scales:
  """config.data.targets (empty: all of the cohort's phenotypes) and how they and the covariates are
  standardised."""
  known = list(cohort.info["phenotypes"])
  if unknown := [name for name in config.data.targets if name not in known]:
    raise UserError(
      f"config.data.targets has {', '.join(unknown)}; the cohort {cohort.path} has {', '.join(known) or 'no phenotypes'}"
    )
  names = tuple(config.data.targets) or tuple(known)
  columns = [known.index(name) for name in names]
  mean, sd = cohort_room.train_statistics(cohort, "phenotypes")
  return step_room.Scales(
    names,
    tuple(cohort.info["covariates"]),
    tuple(columns),
    (mean[columns], sd[columns]),
    cohort_room.train_statistics(cohort, "covariates"),
    tuple(cohort.info["diseases"]),
  )


def first_hearts(cohort, most: int = 200):
  """The first records of train with CMR; those that cannot be read are for training to judge."""
  source, found = cohort.splits["train"], 0
  for i in range(len(source)):
    with contextlib.suppress(DamagedRecord):
      record = source[i]
      if record["has_cmr"] and found < most:
        found += 1
        yield record
    if found == most:
      return


def mean_spacing(cohort) -> list[float]:
  """mm between voxels along Z, H, W, the mean of the first hearts of train."""
  return np.mean(
    [record["spacing"] for record in first_hearts(cohort)], axis=0, dtype=np.float64
  ).tolist()


def load_mix(mix) -> list[tuple[cohort_room.Cohort, float]]:
  """The cohorts of config.data.mix with their shares."""
  pairs = (
    [tuple(pair) if isinstance(pair, (tuple, list)) else () for pair in mix]
    if isinstance(mix, (tuple, list))
    else [()]
  )
  if not all(
    len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], (int, float))
    for pair in pairs
  ):
    raise UserError(
      f"config.data.mix is {mix!r}; expected pairs of a cohort and its share, such as (('ptbxl', 0.3),)"
    )
  return [(cohort_room.load(path), share) for path, share in pairs]


def tolerant(cohort: cohort_room.Cohort, config) -> cohort_room.Cohort:
  """Its records as training reads them: bad ones count as rows without anything
  (config.bad_rows)."""
  reads = tuple(pretrainer.fields(config.model))
  if "ecg" in config.model.towers:
    reads = ("ecg", *reads)
  return cohort._replace(
    splits={
      split: pipeline.Tolerant(source, f"{split} in {cohort.path}", reads)
      if len(source)
      else source
      for split, source in cohort.splits.items()
    }
  )


def check_cohorts(cohort, others, config):  # noqa: C901
  """The cohorts must have been prepared the way the config says, and alike."""
  reads_ecg = "ecg" in config.model.towers
  for one, _ in [(cohort, 1), *others]:
    found = one.info["ecg_profile"]
    if reads_ecg and found != config.data.ecg_profile:
      raise UserError(
        f"the cohort {one.path} was normalised by profile {found!r}, config.data.ecg_profile is "
        f"{config.data.ecg_profile!r}; set it to {found!r} or prepare the cohort again"
      )
    if one.info["shapes"]["ecg"] != cohort.info["shapes"]["ecg"]:
      raise UserError(
        f"the cohort {one.path} has ECG of shape {one.info['shapes']['ecg']}, {cohort.path} of "
        f"{cohort.info['shapes']['ecg']}; expected the same"
      )
    if not one.splits["train"]:
      raise UserError(
        f"the cohort {one.path} has no train split; prepare it with a --split whose first share is not 0"
      )
    if reads_ecg and not one.info["with_ecg"]["train"]:
      raise UserError(f"the cohort {one.path} has no ECG to train on; prepare it with ECG")
    if units := [
      name
      for name, unit in one.info["phenotypes"].items()
      if cohort.info["phenotypes"].get(name, unit) != unit
    ]:
      raise UserError(
        f"{', '.join(units)} of {one.path} and {cohort.path} have different units; prepare them alike"
      )
    fields = pretrainer.fields(config.model)
  for one, _ in others:
    if clash := [
      name
      for name in fields
      if name in one.info["shapes"] and one.info["shapes"][name] != cohort.info["shapes"].get(name)
    ]:
      raise UserError(
        f"{', '.join(clash)} of {one.path} and {cohort.path} differ in shape; prepare them with the same "
        "--slices, --size and --frames"
      )
  if fields and not cohort.info["with_cmr"]["train"]:
    raise UserError(
      f"the cohort {cohort.path} has no CMR to train on; take a recipe without CMR towers "
      "(configs/joint.py:demo,arm=mae) or a cohort of pairs, into which this one is mixed by config.data.mix"
    )
  if absent := [name for name in fields if name not in cohort.info["shapes"]]:
    raise UserError(
      f"the cohort {cohort.path} has no {', '.join(absent)} for config.model.towers; it has "
      f"{', '.join(cohort.info['shapes'])}"
    )
  pretrainer.check(config.model, cohort.info["shapes"])
  taking = pretrainer.takes_covariates(config.model)
  if taking and not np.isfinite(cohort_room.train_statistics(cohort, "covariates")).any():
    raise UserError(
      f"config.model.{taking[0]}=True asks for covariates, and {cohort.path} knows none that differ in train; prepare "
      f"it with --tables that hold them, or set config.model.{taking[0]}=False"
    )
  if any(config.augment.cmr.values()) and pretrainer.frozen(config.model):
    raise UserError(
      f"config.augment.cmr is {config.augment.cmr.to_dict()}, and frozen towers look at every heart once, as it is; "
      "set all of it to 0"
    )
  if config.model.get("segmenter") and not any(
    record["labels"].any() for record in first_hearts(cohort)
  ):
    raise UserError(
      f"the first hearts of {cohort.path} have no labels, which config.model.segmenter learns from; prepare it with "
      "segmentations (`mmcl prepare --segmentations`)"
    )
  if config.model.get("segmenter") and any(config.augment.cmr.values()):
    raise UserError(
      f"config.augment.cmr is {config.augment.cmr.to_dict()}, and labels, which the segmenter learns from, would not "
      "follow; set all of it to 0"
    )
  check_splits(cohort, others, config)
  shares = [share for _, share in others]
  if sum(shares) >= 1:
    raise UserError(f"config.data.mix has the shares {shares}; expected less than 1 together")
  watching = evaluators.in_training(config)
  if watching and not cohort.splits["val"]:
    raise UserError(
      f"the cohort {cohort.path} has no val split; prepare it with one or set "
      f"config.evaluators.NAME.every=0 for {', '.join(one.name for one in watching)}"
    )
  length = cohort.info["shapes"]["ecg"][1]
  if reads_ecg and not 0 < config.data.samples <= length:
    raise UserError(
      f"config.data.samples is {config.data.samples}; the cohort's recordings have {length} samples"
    )


def check_splits(cohort, others, config):
  """Nobody who is held out in the first cohort may come back to train through another one."""
  for other, _ in others:
    if (
      other.info["source"] == cohort.info["source"]
      and other.info.get("salt_tag") != cohort.info.get("salt_tag")
      and not config.data.allow_seen
    ):
      raise UserError(
        f"{other.path} and {cohort.path} are both of {cohort.info['source']} and were prepared with different salts, so "
        "people held out in one may train in the other unseen; prepare both with the same --private, or "
        f"{ALLOW} to go on"
      )
    tell_seen(cohort, people.of_cohort(other), f"are in the train split of {other.path}", config)


def stages_of(config, workdir: str, start: int) -> dict[str, str]:
  """{module: name of the run that it starts from, or, at step `start`, started from}; UserError if
  that changed."""
  found = {
    module: checkpoint.run_name(stage) for module, stage in config.init_from.items() if stage
  }
  if not start:
    return found
  kept = checkpoint.manifest(workdir, start).get("stages", {})
  # No run: it is gone by now.
  if other := [module for module, run in found.items() if run and run != kept.get(module, run)]:
    raise UserError(
      f"config.init_from.{other[0]} is {config.init_from[other[0]]}, and {workdir} started from another "
      "run; give that one, wherever it lies, or take another --workdir"
    )
  return kept


def people_of(cohort, others, config, workdir: str, start: int) -> people.People:
  """Whom this run and the stages before it learn from; none of them may be held out in its
  cohort."""
  before = [people.of_run(workdir, start)] if start else []
  for stage in dict.fromkeys(filter(None, () if start else config.init_from.values())):
    # else initialise.carry_over has a word on it
    if (step := checkpoint.chosen(stage)) is not None:
      before.append(people.of_run(stage, step))
      tell_seen(
        cohort, before[-1], f"had part in the training of {stage} (config.init_from)", config
      )
  own = people.of_cohort(cohort, chooses=config.stop_after > 0)
  return people.together(*before, own, *(people.of_cohort(other) for other, _ in others))


def tell_seen(cohort, earlier: people.People, part: str, config) -> None:
  note = people.held_out(cohort, earlier, part, config.data.allow_seen, ALLOW)["note"]
  if note and jax.process_index() == 0:
    print(note, flush=True)


def mixed(cohort, others, config, records) -> list[pipeline.Mixed]:
  """The other cohorts' records in the form of the first one's; `records(cohort, split)` reads
  them."""
  fields, found = pretrainer.fields(config.model), []
  for other, share in others:
    has_all = all(name in other.info["shapes"] for name in fields)
    source = records(other, "train") if has_all else other.splits["train"]
    found.append(
      pipeline.Mixed(
        source,
        share,
        pipeline.conforming(other.info, cohort.info, records(cohort, "train")[0], fields),
      )
    )
  return found


if __name__ == "__main__":
  from mmcl_jax import cli

  cli.run(main, hosts=True)
