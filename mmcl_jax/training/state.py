"""The training state, a plain pytree, and the optimiser that changes it."""

import re
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mmcl_jax.errors import UserError
from mmcl_jax.models import towers
from mmcl_jax.training import parallel


@flax.struct.dataclass
class TrainState:
  """step int32 [] counts updates; params and statistics are the model's variables; opt_state is
  optax's."""

  step: jax.Array
  params: Any
  statistics: Any
  opt_state: Any

  @property
  def variables(self):
    """What evaluation looks at: the running mean of the parameters where the optimiser keeps one
    (config.optimizer.ema)."""
    return {"params": averaged(self.params, self.opt_state), "batch_stats": self.statistics}


class Treatment(NamedTuple):
  """What the optimiser does to one parameter; `factor` multiplies its learning rate, and with it
  its weight decay."""

  frozen: bool
  decayed: bool
  factor: float


def learning_rate(config):
  """Linear warm-up, then a half cosine to 0 at `config.steps`."""
  c = config.optimizer
  return optax.warmup_cosine_decay_schedule(
    0.0, c.learning_rate, c.warmup, max(config.steps, c.warmup + 1)
  )


def path_name(path) -> str:
  """Path of a leaf as the config's regexes see it: `ecg/block0/qkv/kernel`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def decayed(params):
  """Weight decay on matrices and kernels only: not on biases, norms, tokens, positions or the
  temperature."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def optimizer(config, params, statistics=None) -> optax.GradientTransformation:
  """Clip by the global norm of the trained parameters (clip 0: none), then AdamW; frozen parameters
  get updates of 0.

  AdamW (Loshchilov & Hutter 2019), eps 1e-8: p -= rate(step) factor (m / (sqrt(v) + eps) +
  weight_decay p). Moments are kept for trained parameters only, in their dtype. With
  config.optimizer.l2 it is Adam with an L2 penalty, as torch.optim.Adam has it: weight_decay p is
  added to the gradient of every parameter.

  Args:
    params: the model's parameters, arrays or ShapeDtypeStructs.
    statistics: its batch statistics, likewise; see `treatments`.

  Raises:
    UserError: see `treatments`.
  """
  c = config.optimizer
  by_path = treatments(config, params, statistics)

  def labels(tree):
    def label(path, _):
      return "frozen" if by_path[path_name(path)].frozen else "trained"

    return jax.tree_util.tree_map_with_path(label, tree)

  def scale(updates, _):
    def scaled(path, update):
      return update * by_path[path_name(path)].factor

    return jax.tree_util.tree_map_with_path(scaled, updates)

  adam = optax.scale_by_adam(b1=c.b1, b2=c.b2)
  clip = optax.clip_by_global_norm(c.clip) if c.clip else optax.identity()
  if c.l2:
    rule = [optax.add_decayed_weights(c.weight_decay), adam]
  else:
    rule = [adam, optax.add_decayed_weights(c.weight_decay, mask=decayed)]
  chain = [
    clip,
    *rule,
    optax.stateless(scale),
    optax.scale_by_learning_rate(learning_rate(config)),
  ]
  if c.ema:
    chain.append(keep_average(c.ema))
  transforms = {"trained": optax.chain(*chain), "frozen": optax.set_to_zero()}
  return optax.partition(transforms, labels)


class Average(NamedTuple):
  """mean: of the parameters after every update so far, weighted by what adds up to `weight` float32
  []."""

  weight: jax.Array
  mean: Any


def keep_average(decay: float) -> optax.GradientTransformation:
  """Last of a chain: updates pass as they are, and a running mean of the parameters after them is
  kept beside (Polyak).

  It starts at 0 and is divided by its weight, 1 - decay^updates, where it is read, as Adam's
  moments are: nothing of the first, random parameters is in it.
  """

  def init(params):
    return Average(jnp.float32(0), jax.tree.map(jnp.zeros_like, params))

  def next_mean(mean, x, change):
    return decay * mean + (1 - decay) * (x + change)

  def update(updates, state, params):
    mean = jax.tree.map(next_mean, state.mean, params, updates)
    return updates, Average(decay * state.weight + 1 - decay, mean)

  return optax.GradientTransformation(init, update)


def averaged(params, opt_state):
  """The running mean where the optimiser keeps one and has taken an update in; of frozen
  parameters, themselves."""

  def is_average(x):
    return isinstance(x, Average)

  def is_masked(x):
    return isinstance(x, optax.MaskedNode)

  kept = [x for x in jax.tree.leaves(opt_state, is_leaf=is_average) if is_average(x)]
  if not kept:
    return params
  weight, mean = kept[0]

  def corrected(mean, x):
    if is_masked(mean):
      return x
    average = mean / jnp.maximum(weight, 1e-30)
    return jnp.where(weight > 0, average, x).astype(x.dtype)

  return jax.tree.map(corrected, mean, params, is_leaf=is_masked)


def stop_frozen(params, treatment: dict[str, Treatment]):
  """The same parameters, no gradient into the frozen ones: none is computed, and none counts in a
  norm."""

  def stopped(path, x):
    return jax.lax.stop_gradient(x) if treatment[path_name(path)].frozen else x

  return jax.tree_util.tree_map_with_path(stopped, params)


def treatments(config, params, statistics=None) -> dict[str, Treatment]:
  """Path of every parameter -> whether it is frozen, whether it decays, what multiplies its
  learning rate.

  Frozen: what a regex of `config.freeze` finds, and the backbones of the towers with
  `config.model.towers.NAME.frozen`.
  Factor: of the first entry of `config.optimizer.rates` whose regex is found, times
  `layer_factors`.

  Args:
    params: arrays or ShapeDtypeStructs.
    statistics: batch statistics, likewise. Where given, a regex of `config.freeze` must not touch a
      module that has some: it would stay in training mode, and its statistics would go on changing.

  Raises:
    UserError: an entry is malformed or decides nothing, or nothing is left to train.
  """
  paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  decays = dict(zip(paths, jax.tree.leaves(decayed(params)), strict=True))
  frozen = frozen_paths(config, paths, statistics)
  trained = [path for path in paths if path not in frozen]
  factors = rate_factors(config.optimizer.rates, trained, paths)
  layers = layer_factors(config.optimizer.layer_decay, paths)
  treatment = {}
  for path in paths:
    factor = factors.get(path, 1.0) * layers[path]
    treatment[path] = Treatment(path in frozen, decays[path], factor)
  return treatment


def frozen_paths(config, paths: list[str], statistics) -> set[str]:
  """The paths that config.freeze or config.model.towers.NAME.frozen keeps as they are."""
  frozen = set()
  for name, tower in towers.cmr(config.model).items():
    if tower.get("frozen"):
      frozen |= {path for path in paths if path.startswith(f"cmr_{name}/backbone/")}
  for regex in regexes(config.freeze, "config.freeze"):
    matching = {path for path in paths if re.search(regex, path)}
    if not matching:
      raise UserError(
        f"config.freeze has {regex!r}, which matches no parameter; parameters are {shown(paths)}"
      )
    check_statistics(regex, sorted(matching - frozen), statistics)
    frozen |= matching
  if len(frozen) == len(paths):
    raise UserError(
      f"config.freeze {tuple(config.freeze)} and config.model.towers.*.frozen leave no parameter "
      f"to train; parameters are {shown(paths)}"
    )
  return frozen


def rate_factors(entries, trained: list[str], paths: list[str]) -> dict[str, float]:
  """Path of a trained parameter -> factor of the first entry of config.optimizer.rates that finds
  it."""
  factors = {}
  for regex, factor in rates(entries):
    matching = [path for path in trained if re.search(regex, path) and path not in factors]
    if not matching:
      raise UserError(
        f"config.optimizer.rates has {regex!r}, which matches no trained parameter that an entry "
        f"before it has not taken; parameters are {shown(paths)}"
      )
    factors |= dict.fromkeys(matching, factor)
  return factors


def shown(paths: list[str]) -> str:
  """A few paths from everywhere, for a message."""
  apart = max(len(paths) // 5, 1)
  return f"{', '.join(paths[::apart][:5])}, ..."


def layer_factors(decay: float, paths: list[str]) -> dict[str, float]:
  """Layer-wise learning-rate decay of the ECG tower (BEiT, Bao et al. 2022): decay^(depth + 1 -
  layer).

  patch_embed, cls_token, pos_embed and stem* are layer 0, block i is layer i + 1, all else of the
  tower is layer depth + 1. So are the other modules, whose factor is 1: heads, read-outs, and the
  CMR towers, which have no layer decay.
  """
  blocks = {}
  for path in paths:
    if match := re.match(r"ecg/block(\d+)/", path):
      blocks[path] = int(match[1])
  if decay < 1 and not blocks:
    raise UserError(
      f"config.optimizer.layer_decay is {decay}, but this model has no ECG tower with layers named "
      "block0, block1 and so on; set it to 1.0"
    )
  depth = max(blocks.values(), default=-1) + 1

  factors = {}
  for path in paths:
    layer = blocks.get(path, depth) + 1
    if re.match(r"ecg/(patch_embed|cls_token|pos_embed|stem\d*)(/|$)", path):
      layer = 0
    factors[path] = decay ** (depth + 1 - layer)
  return factors


def check_statistics(regex: str, paths: list[str], statistics) -> None:
  """Refuses to freeze by regex what has batch statistics: `cmr_NAME/backbone`, `head_ecg/norm1`."""

  def module_of(path):
    return "/".join(path.split("/")[:2])

  with_statistics = set()
  for path, _ in jax.tree_util.tree_leaves_with_path(statistics or {}):
    with_statistics.add(module_of(path_name(path)))
  for path in paths:
    module = module_of(path)
    if module not in with_statistics:
      continue
    way_out = "leave it out of config.freeze"
    if tower := re.fullmatch("cmr_(.+)/backbone", module):
      way_out = (
        f"set config.model.towers.{tower[1]}.frozen=True, which keeps all of it in evaluation mode"
      )
    raise UserError(
      f"config.freeze has {regex!r}, which freezes {path}, but the batch statistics of "
      f"{module} would go on changing; {way_out}"
    )


def regexes(entries, key: str) -> tuple[str, ...]:
  """The regexes of a config entry, or a UserError."""
  if not isinstance(entries, (tuple, list)) or not all(isinstance(entry, str) for entry in entries):
    raise UserError(f"{key} is {entries!r}; expected a tuple of regexes, such as ('^ecg/block0/',)")
  for entry in entries:
    try:
      re.compile(entry)
    except re.error as error:
      raise UserError(f"{key} has {entry!r}, which is no regex: {error}") from None
  return tuple(entries)


def rates(entries) -> list[tuple[str, float]]:
  pairs = []
  for entry in entries if isinstance(entries, (tuple, list)) else [entries]:
    pair = tuple(entry) if isinstance(entry, (tuple, list)) else ()
    if len(pair) != 2 or not isinstance(pair[1], (int, float)):
      raise UserError(
        f"config.optimizer.rates is {entries!r}; expected pairs of a regex and a positive factor, "
        "such as (('^ecg/', 0.1),); to keep parameters as they are, name them in config.freeze"
      )
    pairs.append(pair)
  regexes([regex for regex, _ in pairs], "config.optimizer.rates")
  return pairs


def variables(model, example, seed: int = 0):
  """Fresh params and batch_stats for a float batch `example` (arrays or shapes); under
  jax.eval_shape, their shapes."""
  (rows,) = example["mask"].shape
  keys = jax.random.split(jax.random.key(0), rows)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)
  rngs = {"params": jax.random.key(seed)}
  return {"batch_stats": {}} | model.init(rngs, zeros, keys, train=False)


def optimizer_for(model, example, config) -> optax.GradientTransformation:
  """`optimizer` of a model that no one has made yet."""
  shapes = jax.eval_shape(lambda: variables(model, example))
  return optimizer(config, shapes["params"], shapes["batch_stats"])


def create(model, tx, example, seed: int, mesh, rules) -> tuple[TrainState, Any]:
  """A fresh state, born sharded: no host ever holds a whole copy.

  Args:
    example: a float batch (arrays or shapes) to initialise from.

  Returns:
    state, its shardings.
  """
  _, where = abstract(model, tx, example, seed, mesh, rules)
  make = jax.jit(lambda: fresh(model, tx, example, seed), out_shardings=where)
  return make(), where


def abstract(model, tx, example, seed: int, mesh, rules) -> tuple[TrainState, Any]:
  """The shapes of `create`'s state and its shardings; nothing is computed."""
  heads = {}  # path of a module with attention -> its heads

  def note_heads(call, args, kwargs, context):
    if hasattr(context.module, "heads"):
      heads["/".join(context.module.path)] = context.module.heads
    return call(*args, **kwargs)

  with nn.intercept_methods(note_heads):
    shapes = jax.eval_shape(lambda: fresh(model, tx, example, seed))
  where = parallel.shardings(shapes, rules, mesh)
  parallel.check_heads(where.params, heads, mesh)
  return shapes, where


def fresh(model, tx, example, seed: int) -> TrainState:
  made = variables(model, example, seed)
  params = made["params"]
  statistics = made["batch_stats"]
  return TrainState(jnp.int32(0), params, statistics, tx.init(params))


def cap_temperature(params, max_scale: float):
  """Projects a learned 1/temperature back under its cap after the update; a clamp in the forward
  pass could not return."""

  def capped(path, x):
    return jnp.minimum(x, jnp.log(max_scale)) if path[-1].key == "log_scale" else x

  return jax.tree_util.tree_map_with_path(capped, params)
