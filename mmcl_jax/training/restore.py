"""A run from its workdir: config, model and trained state, with no cohort needed."""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from ml_collections import ConfigDict

from mmcl_jax import configuration, models
from mmcl_jax.data import standardise
from mmcl_jax.errors import UserError
from mmcl_jax.models import inference, inputs
from mmcl_jax.training import checkpoint, distributed, parallel, state as state_lib


class Run(NamedTuple):
  """A restored run."""

  config: ConfigDict
  model: Any
  mesh: Mesh
  step: int
  state: state_lib.TrainState
  standardiser: standardise.Standardiser
  manifest: checkpoint.Manifest


class Encoder(NamedTuple):
  """A trained ECG encoder; `embed` takes normalised ECGs float32 [B, L, T] and gives float32 [B,
  D].

  `checkpoint` is as of `checksum`.
  """

  config: ConfigDict
  step: int
  checkpoint: str
  embed: Callable[[np.ndarray], np.ndarray]


def choose(workdir: str, step: int | None = None) -> int:
  """`step`, or where it is None the best on validation, of a run that stops early, which is told;
  else the last."""
  if step is not None:
    return step
  step = checkpoint.chosen(workdir)
  last = checkpoint.latest(workdir)
  if step is None:
    raise UserError(f"{workdir} has no checkpoint yet; train it with `mmcl train`")
  about = checkpoint.manifest(workdir, last)
  best = checkpoint.best_step(about)
  if distributed.this_host.index == 0 and best is not None:
    what = "the best" if step == best else f"the last, for the best, {best}, is not there any more"
    print(f"{workdir}: step {step}, {what} by {about['config']['stop_on']}", flush=True)
  return step


def load_run(workdir: str, step: int | None = None) -> Run:
  """Restores `step` (None: see `choose`) on all devices of all hosts, whatever mesh trained it."""
  config = configuration.load(workdir)
  step = choose(workdir, step)
  about = checkpoint.manifest(workdir, step)
  check_config(workdir, step, about, config)
  standardiser = standardise.from_json(about["standardiser"])
  mesh = parallel.make_mesh(data=-1, model=1)
  model = models.build(
    config.model, config.data.samples, len(standardiser.targets), len(standardiser.diseases)
  )
  example = inputs.example(config, about["shapes"], len(standardiser.targets), 1)
  abstract, where = state_lib.abstract(
    model, state_lib.optimizer_for(model, example, config), example, config.seed, mesh, rules=()
  )
  with jax.set_mesh(mesh):
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, where
    )
    state, _, manifest = checkpoint.restore(workdir, step, abstract)
  return Run(config, model, mesh, step, state, standardiser, manifest)


def checksum(workdir: str, step: int) -> str:
  """A checkpoint's: the first 16 hexadecimal digits of that of its manifest, which holds those of
  its files."""
  return checkpoint.checksum(checkpoint.step_folder(workdir, step) / "meta" / "manifest.json")[:16]


def check_config(
  workdir: str, step: int, manifest: checkpoint.Manifest, config: ConfigDict
) -> None:
  """Raises a UserError where `config` is not the one that the manifest of a step holds."""
  trained = ConfigDict(manifest["config"])
  if differing := configuration.differences(trained, config):
    raise UserError(
      f"{workdir}/config.json is damaged or was changed: it is not the one that step {step} was "
      "trained with "
      f"({'; '.join(differing[:4])}); put it back"
    )


def untrained(run: Run) -> dict:
  """params and batch_stats drawn from the run's seed, of no training at all: the untrained encoder
  of the baselines."""
  example = inputs.example(run.config, run.manifest["shapes"], len(run.standardiser.targets), 1)
  everywhere = NamedSharding(run.mesh, P())
  return jax.jit(
    lambda: state_lib.variables(run.model, example, run.config.seed), out_shardings=everywhere
  )()


def load_variables(workdir: str) -> dict:
  """params and batch_stats of the checkpoint of `choose`, on the host, and the run's config: where
  a later stage starts."""
  run = load_run(workdir)
  return jax.device_get(run.state.variables) | {"config": run.config}


def load_ecg_run(workdir: str, step: int | None = None) -> Run:
  """A run whose ECG encoder asks for nothing but an ECG."""
  run = load_run(workdir, step)
  if "ecg" not in run.config.model.towers:
    raise UserError(
      f"{workdir} has no ECG encoder (config.model.towers has no ecg); take a run that has one"
    )
  if run.config.model.towers.ecg.get("film"):
    raise UserError(
      f"the ECG encoder of {workdir} also takes covariates (config.model.towers.ecg.film), which "
      "ECG files do not hold; "
      "evaluate it on a cohort with `mmcl evaluate`, or train one with film=False"
    )
  return run


def load_encoder(workdir: str, step: int | None = None) -> Encoder:
  """Loads the ECG encoder of a checkpoint.

  Args:
    workdir: of a run of `mmcl train`, or made by `mmcl convert`.
    step: of the checkpoint; None: the best of a run that stops early, else the last.

  Raises:
    UserError: there is no such checkpoint, it is damaged, or its encoder also needs covariates.
  """
  run = load_ecg_run(workdir, step)
  embed_ecg = jax.jit(inference.make_embed_ecg(run.model, run.config.data.samples, "embed_ecg"))
  # On one device of this host: every host embeds recordings of its own, at its own pace.
  variables = jax.device_put(jax.device_get(run.state.variables), jax.local_devices()[0])

  def embed(ecg):
    return np.asarray(embed_ecg(variables, ecg)["ecg_embedding"])

  return Encoder(run.config, run.step, checksum(workdir, run.step), embed)


def write_run(
  workdir: str,
  config: ConfigDict,
  variables: dict,
  shapes: dict,
  standardiser: standardise.Standardiser,
  origin: str,
) -> None:
  """A workdir with one checkpoint, step 0, made of weights that were trained elsewhere.

  Args:
    variables: params and batch_stats of the whole model that `config` builds, host arrays.
    shapes: of the cohort records that it reads, as cohort.json has them.
    origin: where the weights come from, for the manifest.
  """
  mesh = parallel.make_mesh(data=-1, model=1)
  model = models.build(
    config.model, config.data.samples, len(standardiser.targets), len(standardiser.diseases)
  )
  with jax.set_mesh(mesh):
    example = inputs.example(config, shapes, len(standardiser.targets), 1)
    state, _ = state_lib.create(
      model, state_lib.optimizer_for(model, example, config), example, config.seed, mesh, rules=()
    )
    state = state.replace(
      params=jax.device_put(variables["params"], jax.tree.map(lambda x: x.sharding, state.params)),
      statistics=variables["batch_stats"],
    )
    pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
    checkpoints = checkpoint.Checkpoints(workdir, keep=1)
    about = meta(0, "", shapes, standardiser, config=json.loads(config.to_json()), origin=origin)
    checkpoints.save(0, state, data={"next_step": 0}, meta=about)
    checkpoints.close()
  configuration.save(config, workdir)


def meta(
  step: int, cohort: str, shapes: dict, standardiser: standardise.Standardiser, **more
) -> dict:
  """What the manifest of a checkpoint says beside its checksums."""
  return {
    "step": step,
    "cohort": cohort,
    "shapes": shapes,
    "devices": jax.device_count(),
    "standardiser": standardise.to_json(standardiser),
    **more,
  }
