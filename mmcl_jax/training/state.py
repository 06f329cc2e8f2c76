"""The training state, a plain pytree, and the optimiser that changes it."""

import re
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from mmcl_jax.training import parallel


@flax.struct.dataclass
class TrainState:
  """step int32 [] counts updates; params and statistics are the model's variables; opt_state is optax's."""

  step: jax.Array
  params: Any
  statistics: Any
  opt_state: Any

  @property
  def variables(self):
    return {"params": self.params, "batch_stats": self.statistics}


def learning_rate(config):
  """Linear warm-up, then a half cosine to 0 at `config.steps`."""
  c = config.optimizer
  return optax.warmup_cosine_decay_schedule(0.0, c.learning_rate, c.warmup, max(config.steps, c.warmup + 1))


def decayed(params):
  """Weight decay on matrices and kernels only: not on biases, norms, tokens or the temperature."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def optimizer(config) -> optax.GradientTransformation:
  """Clip by global norm, then AdamW, all in float32."""
  c = config.optimizer
  return optax.chain(optax.clip_by_global_norm(c.clip),
                     optax.adamw(learning_rate(config), b1=c.b1, b2=c.b2, weight_decay=c.weight_decay, mask=decayed))


def create(model, tx, example, seed: int, mesh, rules) -> tuple[TrainState, Any]:
  """A fresh state, born sharded: no host ever holds a whole copy.

  Args:
    example: a float batch (arrays or shapes) to initialise from.

  Returns:
    state, its shardings.
  """
  def init():
    keys = jax.random.split(jax.random.key(0), example["mask"].shape[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)
    variables = model.init({"params": jax.random.key(seed)}, zeros, keys, train=False)
    params = variables["params"]
    return TrainState(jnp.int32(0), params, variables.get("batch_stats", {}), tx.init(params))

  where = parallel.shardings(jax.eval_shape(init), rules, mesh)
  return jax.jit(init, out_shardings=where)(), where


def cap_temperature(params, max_scale: float):
  """Projects a learned 1/temperature back under its cap after the update; a clamp in the forward pass could not return."""
  return jax.tree_util.tree_map_with_path(
      lambda path, x: jnp.minimum(x, jnp.log(max_scale)) if re.fullmatch("log_scale", path[-1].key) else x, params)
