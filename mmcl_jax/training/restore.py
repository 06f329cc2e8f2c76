"""A run from its workdir: config, model and trained state, with no cohort needed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmcl_jax import configuration
from mmcl_jax.errors import UserError
from mmcl_jax.models import pretrainer
from mmcl_jax.training import checkpoint, parallel, state as state_room, steps


class Run(NamedTuple):
  """A restored run; `fresh` is the state it started from, the untrained encoder of the baselines."""

  config: ConfigDict
  model: Any
  mesh: Mesh
  step: int
  state: state_room.TrainState
  fresh: state_room.TrainState
  manifest: dict


class Encoder(NamedTuple):
  """A trained ECG encoder; `embed` takes normalised ECGs float32 [B, L, T] and gives float32 [B, D]."""

  config: ConfigDict
  step: int
  embed: Callable[[np.ndarray], np.ndarray]


def load_run(workdir: str, step: int | None = None) -> Run:
  """Restores `step` (default: the last) on all devices of this machine, whatever mesh trained it."""
  config = configuration.load(workdir)
  step = checkpoint.latest(workdir) if step is None else step
  if step is None:
    raise UserError(f"{workdir} has no checkpoint yet; train it with `mmcl train`")
  shapes = checkpoint.manifest(workdir, step)["shapes"]
  mesh = parallel.make_mesh(data=-1, model=1)
  model = pretrainer.build(config.model, config.data.samples)
  with jax.set_mesh(mesh):
    fresh, where = state_room.create(model, state_room.optimizer(config), steps.example(config, shapes, 1), config.seed,
                                     mesh, rules=())
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), fresh, where)
    state, _, manifest = checkpoint.restore(workdir, step, abstract)
  return Run(config, model, mesh, step, state, fresh, manifest)


def load_encoder(workdir: str, step: int | None = None) -> Encoder:
  """The ECG tower of a checkpoint alone."""
  run = load_run(workdir, step)
  embed_ecg = jax.jit(steps.make_embed_ecg(run.model, run.config.data.samples))
  variables = run.state.variables
  return Encoder(run.config, run.step, lambda ecg: np.asarray(embed_ecg(variables, ecg)["ecg_embedding"]))
