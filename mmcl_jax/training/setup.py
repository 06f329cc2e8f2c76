"""What a run needs before its first step: everything that was asked for, checked; the state; the
data."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import optax

from mmcl_jax import augment, configuration, evaluators, models, objectives as objective_lib, ranges
from mmcl_jax.data import pipeline, standardise
from mmcl_jax.data.cohort import Cohort, load
from mmcl_jax.errors import UserError
from mmcl_jax.evaluators.context import Context
from mmcl_jax.models import exchange, inputs, towers
from mmcl_jax.support import locks
from mmcl_jax.support.tree import flatten
from mmcl_jax.training import (
  checkpoint,
  cohorts,
  distributed,
  frozen,
  initialise,
  metrics,
  monitor,
  parallel,
  people,
  profile,
  restore,
  state as state_lib,
  step as step_lib,
)


class Job(NamedTuple):
  """A run as it was asked for, checked. Nothing is compiled and nothing is written yet.

  start: the step of the workdir's last checkpoint; cohort, others: as training reads them, the
  others with their shares; evaluators: those that run while training; stages: module -> name of the
  run that it starts from.
  """

  config: Any
  workdir: str
  start: int
  mesh: jax.sharding.Mesh
  cohort: Cohort
  others: list[tuple[Cohort, float]]
  standardiser: standardise.Standardiser
  model: Any
  objectives: list
  evaluators: list[evaluators.Evaluator]
  stages: dict[str, str]
  people: people.People


class Start(NamedTuple):
  """Where a run begins or resumes; `report` says what came from earlier stages, None where it
  resumes."""

  optimizer: optax.GradientTransformation
  state: state_lib.TrainState
  shardings: Any
  best: monitor.Best
  skipped: monitor.Skipped
  report: initialise.Report | None


class Data(NamedTuple):
  """batches: of this host, from the start on, endless; validation: records; spacing: for the
  manifest, of a generator's hearts, that nobody has measured."""

  batches: Iterator[dict]
  validation: Any
  spacing: dict[str, list[float]]


def check(config, workdir: str) -> Job:
  """Opens and checks all that a run is asked for; mistakes are UserErrors.

  The paths in config.init_from become those that the run started from, wherever these lie by now,
  and config.model has all keys of every tower.
  """
  config.model = towers.complete(config.model)
  ranges.check(config)
  exchange.check(config)
  configuration.check_workdir(config, workdir)
  cohort = load(config.data.cohort)
  others = cohorts.load_mix(config.data.mix)
  start = checkpoint.latest(workdir) or 0
  stages = cohorts.stages_of(config, workdir, start)
  if start:
    config.init_from = configuration.load(workdir).init_from
  check_hosts(config, workdir, start, [cohort, *(other for other, _ in others)])
  mesh = parallel.make_mesh(**config.mesh)
  parallel.check_batch(config.batch, mesh)
  distributed.check_mesh(mesh)
  standardiser = standardise.of_cohort(cohort, config.data.targets)
  objectives = objective_lib.build(config.objectives)
  watching = evaluators.in_training(config)
  monitor.check_stopping(config)
  profile.check(config)
  for view in augment.BUILT_IN:
    augment.build(view, config.augment[view])
  metrics.find(config.writers)
  model = models.build(
    config.model, config.data.samples, len(standardiser.targets), len(standardiser.diseases)
  )
  cohorts.check(cohort, others, config)
  learned_from = cohorts.people_of(cohort, others, config, workdir, start)
  cohort = cohorts.tolerant(cohort, config)
  others = [(cohorts.tolerant(other, config), share) for other, share in others]
  return Job(
    config,
    workdir,
    start,
    mesh,
    cohort,
    others,
    standardiser,
    model,
    objectives,
    watching,
    stages,
    learned_from,
  )


def check_hosts(config, workdir: str, start: int, all_cohorts: list[Cohort]) -> None:
  """All hosts must have been asked for the same, and find the same."""
  facts = {}
  for key, value in flatten(json.loads(config.to_json())).items():
    facts[f"config.{key}"] = value
  facts["--workdir"] = os.path.abspath(workdir)
  facts["its last checkpoint"] = start
  facts["the fingerprint of the cohorts"] = [cohort.fingerprint for cohort in all_cohorts]
  facts["the content of the cohorts' files"] = [cohort.content for cohort in all_cohorts]
  distributed.check_same(facts)


@contextlib.contextmanager
def hold(job: Job):
  """Holds the workdir, of several hosts by the first one; a UserError where another run has gone on
  in it since it was looked at."""
  first = distributed.this_host.index == 0
  with locks.workdir_held(job.workdir) if first else contextlib.nullcontext():
    if (checkpoint.latest(job.workdir) or 0) != job.start:
      raise UserError(
        f"another run has just saved a checkpoint in {job.workdir}; give the same command again to "
        "go on from there"
      )
    yield


def state(job: Job) -> Start:
  """The state of the workdir's last checkpoint, else a fresh one with what earlier stages have
  learned."""
  config = job.config
  example = inputs.example(
    config, job.cohort.info["shapes"], len(job.standardiser.targets), config.batch
  )
  tx = state_lib.optimizer_for(job.model, example, config)
  fresh, shardings = state_lib.create(
    job.model, tx, example, config.seed, job.mesh, config.sharding
  )
  step_lib.check_outputs(job.model, job.objectives, example, fresh)
  if job.start:
    restored, best, skipped = resume(job, fresh, shardings)
    begun = Start(tx, restored, shardings, best, skipped, None)
  else:
    loaded, report = initialise.load_pretrained(fresh, config, restore.load_variables)
    begun = Start(tx, loaded, shardings, monitor.Best(), monitor.Skipped(), report)
  pathlib.Path(job.workdir).mkdir(parents=True, exist_ok=True)
  distributed.check_shared(job.workdir)
  return begun


def resume(job: Job, fresh, shardings):
  """State, best and skipped of the last checkpoint; a UserError where it is of another config or
  cohort."""
  abstract = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), fresh, shardings
  )
  restored, _, manifest = checkpoint.restore(job.workdir, job.start, abstract)
  restore.check_config(job.workdir, job.start, manifest, job.config)
  now = [job.cohort, *(other for other, _ in job.others)]
  trained_on = [manifest["cohort"], *manifest["mixed"]]
  for cohort, fingerprint in zip(now, trained_on, strict=True):
    if fingerprint != cohort.fingerprint:
      raise UserError(
        f"{job.workdir} was trained on the cohort {fingerprint}, {cohort.path} is "
        f"{cohort.fingerprint}; give the first one or take another --workdir"
      )
  return restored, monitor.Best(**manifest["best"]), monitor.Skipped(**manifest["skipped"])


def open_data(job: Job, variables) -> Data:
  """The data of a run. Frozen towers, which have `variables`, look at every heart once, here."""
  config = job.config

  def records(cohort, split):
    return frozen.with_features(
      cohort,
      split,
      job.model,
      variables,
      job.mesh,
      job.workdir,
      config.batch,
      config.loader.threads,
    )

  batches = pipeline.train_batches(
    records(job.cohort, "train"),
    seed=config.seed,
    batch=config.batch,
    fields=models.fields(config.model, only=models.learning(config.model)),
    start_step=job.start,
    host=jax.process_index(),
    hosts=jax.process_count(),
    mix=cohorts.mixed(job.cohort, job.others, config, records),
    **config.loader,
  )
  spacing = {}
  if "labels" in models.fields(config.model):
    spacing["spacing"] = cohorts.mean_spacing(job.cohort)
  return Data(batches, records(job.cohort, "val") if job.evaluators else (), spacing)


def context(job: Job, data: Data) -> Context:
  """What evaluators look at while training; without a state, which each evaluation brings."""
  about = {"cohort": job.cohort.fingerprint, "shapes": job.cohort.info["shapes"], **data.spacing}
  run = restore.Run(job.config, job.model, job.mesh, job.start, None, job.standardiser, about)
  records = {"val": data.validation} if job.evaluators else {}
  return Context(run, job.cohort, "val", job.workdir, job.config.batch, records=records)


def announce(job: Job, begun: Start) -> None:
  """Keeps the config in the workdir, and prints where the run begins and what lies on which
  device."""
  if jax.process_index() > 0:
    return
  configuration.save(job.config, job.workdir)
  if job.start:
    print(f"resuming {job.workdir} from step {job.start}")
  else:
    print(json.dumps(json.loads(job.config.to_json()), indent=1))
  print(parallel.table(begun.state, begun.shardings, most=8))
  print(f"gradients are exchanged in {job.config.gradient_dtype} (config.gradient_dtype)")
  if begun.report:
    print(initialise.describe(begun.report))
