"""The jitted training step and the losses of a validation batch: batch in, state and metrics
out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics as clu_metrics
from jax.sharding import PartitionSpec as P

from mmcl_jax import augment as augment_lib
from mmcl_jax.errors import UserError
from mmcl_jax.models import cmr_tower, exchange, pretrainer
from mmcl_jax.models.inputs import first_window, sample_keys, to_float
from mmcl_jax.objectives import mean
from mmcl_jax.training import accumulate, state as state_lib

TOP_LOSS_ROWS = 4  # rows of a batch that a message on a spike of the loss names


def augment(batch, keys, config):
  """Crops and augments every row with its own key, each device its own rows; a model without an ECG
  tower leaves the ECG.

  The augmentation of this package changes each plane by itself, and gets only those that towers
  see; one of the user's own gets all.

  Under shard_map, because the partitioner would gather whole batches for a Fourier transform or a
  gather per row.
  """
  reads_ecg = "ecg" in config.model.towers
  of_ecg = augment_lib.build("ecg", config.augment.ecg)
  of_cmr = augment_lib.build("cmr", config.augment.cmr)
  cmr = batch["cmr"]
  if config.augment.cmr.fn in augment_lib.BUILT_IN["cmr"]:
    cmr = cmr_tower.seen(cmr, config.model)

  def one_ecg(key, ecg):
    return of_ecg(key, ecg, config.data.samples)

  def rows(ecg, cmr, keys):
    ecg_keys, cmr_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    if reads_ecg:
      ecg = jax.vmap(one_ecg)(ecg_keys, ecg)
    fields = {}
    for i, (field, x) in enumerate(sorted(cmr.items())):
      # By keys of its own: a rotation that two views share would tell which belong together.
      fields[field] = jax.vmap(of_cmr)(pretrainer.fold(cmr_keys, i), x)
    return ecg, fields

  def augmented(keys):
    on_each_device = jax.shard_map(rows, in_specs=P("data"), out_specs=P("data"))
    changed_ecg, changed_cmr = on_each_device(batch["ecg"], cmr, keys)
    return {"ecg": changed_ecg, "cmr": changed_cmr}

  if not config.augment.twice:
    return batch | augmented(keys)
  return batch | augmented(keys) | {"again": augmented(pretrainer.fold(keys, 1))}


def check_outputs(model, objectives, batch, state):
  """Finds an objective that asks for an output the model does not make, before any compile."""

  def forward(params, statistics, batch, keys):
    return model.apply({"params": params, "batch_stats": statistics}, batch, keys, train=False)

  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch["mask"].shape[0]))
  outputs = jax.eval_shape(forward, state.params, state.statistics, batch, keys)
  for objective in objectives:
    try:
      jax.eval_shape(objective.loss, outputs, batch)
    except KeyError as error:
      names = ", ".join(
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(outputs)
      )
      raise UserError(
        f"config.objectives.{objective.name} asks for {error}, which this model or batch does not "
        f"make; outputs are {names}; batch has {', '.join(batch)}"
      ) from None
    except (TypeError, ValueError) as error:
      raise UserError(f"config.objectives.{objective.name} cannot be computed: {error}") from None


def total_loss(outputs, batch, objectives, step):
  """Weighted sum of the objectives, and their metrics named objective/metric.

  `top_loss_subjects` among them, uint32 [min(TOP_LOSS_ROWS, B), 2], are the subjects of the rows
  that add most to the sum, not finite first.
  """
  total = 0.0
  metrics = {}
  rows = jnp.zeros(len(batch["mask"]))
  for objective in objectives:
    loss = objective.loss(outputs, batch)
    value = mean(loss)
    weight = objective.weight(step)
    total += weight * value
    counted = jnp.maximum(jnp.sum(loss.weight), 1)
    rows += jnp.where(loss.weight > 0, weight * loss.values, 0) / counted
    metrics[f"{objective.name}/loss"] = value
    metrics[f"{objective.name}/weight"] = weight
    for name, x in loss.metrics.items():
      metrics[f"{objective.name}/{name}"] = x
  shares = jnp.where(jnp.isfinite(rows), rows, jnp.inf)
  count = min(TOP_LOSS_ROWS, len(rows))
  _, largest = jax.lax.top_k(jax.lax.stop_gradient(shares), count)
  return total, metrics | {"top_loss_subjects": batch["subject"][largest]}


@functools.partial(jax.tree_util.register_dataclass, data_fields=("words",), meta_fields=("names",))
@dataclasses.dataclass
class Packed:
  """Metrics of a step in one array, so that the host asks for one transfer and not for thirty.

  words: uint32 [N + 2 R]: the bits of N float32 scalars in the order of `names`, then subjects.
  """

  words: jax.Array
  names: tuple[str, ...]


def pack(metrics) -> Packed:
  """The metrics of a train step, scalars and `top_loss_subjects` uint32 [R, 2], as one array."""
  subjects = metrics.pop("top_loss_subjects")
  names = tuple(sorted(metrics))
  scalars = jnp.stack([jnp.asarray(metrics[name], jnp.float32).reshape(()) for name in names])
  bits = jax.lax.bitcast_convert_type(scalars, jnp.uint32)
  words = jnp.concatenate([bits, subjects.reshape(-1)])
  return Packed(jax.lax.with_sharding_constraint(words, P()), names)


def unpack(packed: Packed) -> tuple[dict[str, float], np.ndarray]:
  """Scalars by name and subjects uint32 [R, 2], on the host."""
  words = np.asarray(packed.words)
  count = len(packed.names)
  scalars = words[:count].view(np.float32).tolist()
  return dict(zip(packed.names, scalars, strict=True)), words[count:].reshape(-1, 2)


def make_train_step(model, objectives, tx, config, standardiser):
  """(state, batch) -> (state, metrics). The old state stays whole where the loss or a gradient is
  not finite.

  With config.accumulation above 1 the batch is computed in so many parts (training.accumulate).
  """
  schedule = state_lib.learning_rate(config)

  def forward(params, statistics, batch):
    """Compact rows -> (outputs, float rows), the batch statistics after them."""
    keys = sample_keys(config.seed, batch["index"])
    keys, model_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    batch = augment(to_float(batch, standardiser), keys, config)
    params = state_lib.stop_frozen(params, state_lib.treatments(config, params))
    variables = {"params": params, "batch_stats": statistics}
    with exchange.gradients_in(config.gradient_dtype):
      outputs, changed = model.apply(
        variables, batch, model_keys, train=True, mutable=["batch_stats"]
      )
    return (outputs, batch), changed.get("batch_stats", {})

  def train_step(state, batch):
    def loss_of(outputs, batch):
      return total_loss(outputs, batch, objectives, state.step)

    def loss_of_batch(params):
      (outputs, float_batch), statistics = forward(params, state.statistics, batch)
      loss, metrics = loss_of(outputs, float_batch)
      return loss, (metrics, statistics)

    if config.accumulation == 1:
      value_and_grad = jax.value_and_grad(loss_of_batch, has_aux=True)
      (loss, (metrics, statistics)), grads = value_and_grad(state.params)
    else:
      in_parts = accumulate.value_and_grad(forward, loss_of, config.accumulation)
      (loss, metrics), statistics, grads = in_parts(state.params, state.statistics, batch)
    # every host names them
    subjects = jax.lax.with_sharding_constraint(metrics["top_loss_subjects"], P())
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    rate = schedule(state.step)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params = state_lib.cap_temperature(params, config.model.max_scale)
    new = state_lib.TrainState(state.step + 1, params, statistics, opt_state)
    state = jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, state)
    return state, metrics | {
      "top_loss_subjects": subjects,
      "loss": loss,
      "gradient_norm": norm,
      "learning_rate": rate,
      "rows_left_out": jnp.sum(1.0 - batch["mask"]),
      "finite": finite.astype(jnp.float32),
    }

  return train_step


def make_loss_step(model, objectives, config, standardiser):
  """(state, batch) -> clu metrics of every objective in evaluation mode, rows weighted by their
  mask.

  Objectives of two augmentations see two augmentations here too: of two equal views they would say
  nothing.
  """

  def loss_step(state, batch):
    keys = sample_keys(config.seed, batch["index"])
    recordings = to_float(batch, standardiser)
    if config.augment.twice:
      batch = augment(recordings, keys, config)
    else:
      batch = first_window(recordings, config.data.samples)
    outputs = model.apply(state.variables, batch, keys, train=False)
    losses = {objective.name: objective.loss(outputs, batch) for objective in objectives}
    return {
      name: clu_metrics.Average.from_model_output(loss.values, mask=loss.weight)
      for name, loss in losses.items()
    }

  return loss_step
