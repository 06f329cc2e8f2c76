"""The pure, jitted functions: batch in, state and metrics out. No file is touched here."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics as clu_metrics
from jax.sharding import PartitionSpec as P

from mmcl_jax import objectives as objective_room
from mmcl_jax.augment import cmr as augment_cmr, ecg as augment_ecg
from mmcl_jax.data import pipeline
from mmcl_jax.errors import UserError
from mmcl_jax.models import generator, mar, pretrainer, towers
from mmcl_jax.training import accumulate, state as state_room


WORST = 4  # rows of a batch that a spike of the loss names


class Scales(NamedTuple):
  """How labels are standardised: the train split's mean and SD of the targets [K] and of the
  covariates [V].

  `names` [K] are the targets, `columns` [K] their places among the cohort's phenotypes,
  `covariates` [V] its covariates, `diseases` [C] its diseases, which are 0 or 1 as they are.
  """

  names: tuple[str, ...]
  covariates: tuple[str, ...]
  columns: tuple[int, ...]
  target: tuple[np.ndarray, np.ndarray]
  covariate: tuple[np.ndarray, np.ndarray]
  diseases: tuple[str, ...] = ()


def to_float(batch, scales: Scales | None = None):
  """The compact host batch (int16 ECG with its scale, uint8 CMR) -> float32, CMR in [0, 1];
  `labels` of its voxels as they are.

  With `scales` also targets [B, K] and conditions [B, V], standardised, NaN = not measured.
  """
  batch = dict(batch)
  batch["ecg"] = batch["ecg"].astype(jnp.float32) * batch.pop("ecg_scale")[:, None, None]
  if "labels" in batch["cmr"]:
    batch["labels"] = batch["cmr"]["labels"]
  batch["cmr"] = {
    view: x.astype(jnp.float32) / 255 for view, x in batch["cmr"].items() if view != "labels"
  }
  for name in ("mask", "has_ecg", "has_cmr"):
    batch[name] = batch[name].astype(jnp.float32)
  if scales:
    batch["targets"] = (
      batch["phenotypes"][:, list(scales.columns)] - scales.target[0]
    ) / scales.target[1]
    batch["conditions"] = (batch["covariates"] - scales.covariate[0]) / scales.covariate[1]
  return batch


def example(config, shapes: dict[str, list[int]], targets: int, rows: int):
  """Shapes of a float batch of `rows` rows, as the model sees it; `shapes` are those of the
  cohort's records."""
  batch = model_input(config.model, config.data.samples, shapes, targets, rows)
  if config.augment.twice:
    batch["again"] = {name: batch[name] for name in ("ecg", "cmr")}
  return batch


def model_input(model_config, samples: int, shapes, targets: int, rows: int):
  """`example` of a model that looks at `samples` samples of an ECG, without augmentation."""

  def as_seen(batch):
    batch = first_window(to_float(batch), samples)
    batch["targets"] = jnp.zeros((rows, targets))
    batch["conditions"] = batch["covariates"]
    return batch

  spec = pipeline.element_spec(shapes, pretrainer.fields(model_config), rows)
  return jax.eval_shape(as_seen, spec)


def sample_keys(seed: int, index):
  """One key a row from (seed, position in the data stream): independent of hosts, devices and the
  row's place."""
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(index)


def augment(batch, keys, config):
  """Crops and augments every row with its own key, each device its own rows; a model without an ECG
  tower leaves the ECG.

  Under shard_map, because the partitioner would gather whole batches for a Fourier transform or a
  gather per row.
  """
  reads_ecg, samples, strengths = "ecg" in config.model.towers, config.data.samples, config.augment

  def rows(ecg, cmr, keys):
    ecg_keys, cmr_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    if reads_ecg:
      ecg = jax.vmap(lambda key, x: augment_ecg.augment(key, x, samples, **strengths.ecg))(
        ecg_keys, ecg
      )
    # Every field by keys of its own: a rotation that two views share would tell which belong
    # together.
    return ecg, {
      field: jax.vmap(lambda key, x: augment_cmr.augment(key, x, **strengths.cmr))(
        pretrainer.fold(cmr_keys, i), x
      )
      for i, (field, x) in enumerate(sorted(cmr.items()))
    }

  def augmented(keys):
    return dict(
      zip(
        ("ecg", "cmr"),
        jax.shard_map(rows, in_specs=P("data"), out_specs=P("data"))(
          batch["ecg"], batch["cmr"], keys
        ),
      )
    )

  if not strengths.twice:
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
        "make; "
        f"outputs are {names}; batch has {', '.join(batch)}"
      ) from None
    except (TypeError, ValueError) as error:
      raise UserError(f"config.objectives.{objective.name} cannot be computed: {error}") from None


def total_loss(outputs, batch, objectives, step):
  """Weighted sum of the objectives, and their metrics named objective/metric.

  `worst` among them, uint32 [min(WORST, B), 2], are the subjects of the rows that add most to the
  sum, not finite first.
  """
  total, metrics, rows = 0.0, {}, jnp.zeros(len(batch["mask"]))
  for objective in objectives:
    loss = objective.loss(outputs, batch)
    value, weight = objective_room.mean(loss), objective.weight(step)
    total += weight * value
    rows += jnp.where(loss.weight > 0, weight * loss.values, 0) / jnp.maximum(
      jnp.sum(loss.weight), 1
    )
    metrics |= {f"{objective.name}/loss": value, f"{objective.name}/weight": weight}
    metrics |= {f"{objective.name}/{name}": x for name, x in loss.metrics.items()}
  _, worst = jax.lax.top_k(
    jax.lax.stop_gradient(jnp.where(jnp.isfinite(rows), rows, jnp.inf)), min(WORST, len(rows))
  )
  return total, metrics | {"worst": batch["subject"][worst]}


def make_train_step(model, objectives, tx, config, scales):
  """(state, batch) -> (state, metrics). The old state stays whole where the loss or a gradient is
  not finite.

  With config.accumulation above 1 the batch is computed in so many parts (training.accumulate).
  """
  schedule = state_room.learning_rate(config)

  def forward(params, statistics, batch):
    """Compact rows -> (outputs, float rows), the batch statistics after them."""
    keys = sample_keys(config.seed, batch["index"])
    keys, model_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    batch = augment(to_float(batch, scales), keys, config)
    params = state_room.stop_frozen(params, state_room.treatments(config, params))
    variables = {"params": params, "batch_stats": statistics}
    outputs, changed = model.apply(
      variables, batch, model_keys, train=True, mutable=["batch_stats"]
    )
    return (outputs, batch), changed.get("batch_stats", {})

  def train_step(state, batch):
    def loss_of(outputs, batch):
      return total_loss(outputs, batch, objectives, state.step)

    def whole(params):
      seen, statistics = forward(params, state.statistics, batch)
      loss, metrics = loss_of(*seen)
      return loss, (metrics, statistics)

    if config.accumulation == 1:
      value_and_grad = jax.value_and_grad(whole, has_aux=True)
      (loss, (metrics, statistics)), grads = value_and_grad(state.params)
    else:
      in_parts = accumulate.value_and_grad(forward, loss_of, config.accumulation)
      (loss, metrics), statistics, grads = in_parts(state.params, state.statistics, batch)
    worst = jax.lax.with_sharding_constraint(metrics["worst"], P())  # every host names them
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    rate = schedule(state.step)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params = state_room.cap_temperature(params, config.model.max_scale)
    new = state_room.TrainState(state.step + 1, params, statistics, opt_state)
    state = jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, state)
    return state, metrics | {
      "worst": worst,
      "loss": loss,
      "gradient_norm": norm,
      "learning_rate": rate,
      "rows_left_out": jnp.sum(1.0 - batch["mask"]),
      "finite": finite.astype(jnp.float32),
    }

  return train_step


def first_window(batch, samples: int):
  """The first `samples` samples of every recording: evaluation does not crop at random."""
  return batch | {"ecg": batch["ecg"][:, :, :samples]}


def make_loss_step(model, objectives, config, scales):
  """(state, batch) -> clu metrics of every objective in evaluation mode, rows weighted by their
  mask.

  Objectives of two augmentations see two augmentations here too: of two equal views they would say
  nothing.
  """

  def loss_step(state, batch):
    keys = sample_keys(config.seed, batch["index"])
    whole = to_float(batch, scales)
    batch = first_window(whole, config.data.samples)
    if config.augment.twice:
      batch = augment(whole, keys, config)
    outputs = model.apply(state.variables, batch, keys, train=False)
    losses = {objective.name: objective.loss(outputs, batch) for objective in objectives}
    return {
      name: clu_metrics.Average.from_model_output(loss.values, mask=loss.weight)
      for name, loss in losses.items()
    }

  return loss_step


def windows(ecg, conditions, samples: int):
  """The whole windows of `samples` samples of ecg [B, L, T], [B W, L, samples], those of a
  recording one after the other; and conditions [B, V] or None once for each."""
  B, L, T = ecg.shape
  count = T // samples
  ecg = (
    ecg[:, :, : count * samples]
    .reshape(B, L, count, samples)
    .swapaxes(1, 2)
    .reshape(B * count, L, samples)
  )
  return ecg, None if conditions is None else jnp.repeat(conditions, count, axis=0)


def make_embed_ecg(model, samples: int, method: str = "encode_ecg"):
  """(variables, ecg [B, L, T], conditions [B, V] or None) -> ecg_embedding [B, D], ecg_projection
  [B, E].

  A recording longer than the model's window is embedded as the mean over its whole windows. By
  method "embed_ecg" there is no projection, nor its head in the program.
  """

  def embed_ecg(variables, ecg, conditions=None):
    outputs = model.apply(variables, *windows(ecg, conditions, samples), method=method)

    # B may be symbolic (mmcl export)
    def over_windows(x):
      return x.reshape(ecg.shape[0], -1, x.shape[-1]).mean(axis=1)

    return {
      name: over_windows(outputs[name])
      for name in ("ecg_embedding", "ecg_projection")
      if name in outputs
    }

  return embed_ecg


def make_embed(model, config, scales):
  """(variables, batch) -> embedding [B, D]: of the ECG, or of a run without an ECG tower, of its
  CMR towers side by side.

  Beside it ecg_projection [B, E], where there is an ECG tower, and cmr_projection [B, towers, E]
  where the batch has CMR. What the ECG tower's own read-outs say, where it has them: own_phenotypes
  [B, K], the targets in their units, and own_diseases [B, C], probabilities. Those of a recording
  of several windows are of the mean of its log-odds.
  """
  embed_ecg, (mean, sd) = make_embed_ecg(model, config.data.samples), scales.target

  def embed(variables, batch):
    batch, outputs = (
      to_float(batch, scales if config.model.towers.get("ecg", {}).get("film") else None),
      {},
    )
    if "ecg" in config.model.towers:
      found = embed_ecg(variables, batch["ecg"], batch.get("conditions"))
      outputs = {"embedding": found["ecg_embedding"], "ecg_projection": found["ecg_projection"]}

      # Linear, so that reading out the mean over windows is the mean of reading out each.
      def read_out(kind):
        return model.apply(
          variables, outputs["embedding"], method=lambda m, x: getattr(m, kind)["ecg"](x)
        )

      if "ecg" in config.model.regression:
        outputs["own_phenotypes"] = mean + sd * read_out("regression")
      if "ecg" in config.model.classification:
        outputs["own_diseases"] = jax.nn.sigmoid(read_out("classification"))
    if towers.cmr(config.model) and pretrainer.sees_all(config.model, batch):
      found = model.apply(variables, batch, method="encode_cmr")
      outputs["cmr_projection"] = jnp.stack(
        [tower["projection"] for tower in found.values()], axis=1
      )
      if "ecg" not in config.model.towers:
        outputs["embedding"] = jnp.concatenate(
          [tower["embedding"] for tower in found.values()], axis=1
        )
    return outputs

  return embed


def make_generate(model, config, shape: tuple[int, int, int], steps: int, guidance: float):
  """(variables, ecg [B, L, T], noise [B, S, *pretrainer.noise_shape], conditions [B, V] or None) ->
  stacks [B, S, P, Z, H, W].

  Each of the S hearts of a recording, in [0, 1], grows from its own noise. Of a recording longer
  than the model's window they look at its windows in turn.

  Args:
    shape: (Z, H, W) of a stack.
    steps, guidance: see models.generator.integrate and guided; with guidance 0 the ECG is not
      looked at.
  """

  def generate(variables, ecg, noise, conditions=None):
    B, S = noise.shape[:2]
    tokens = model.apply(
      variables, *windows(ecg, conditions, config.data.samples), method="encode_ecg"
    )["ecg_tokens"]
    tokens = tokens.reshape(B, -1, *tokens.shape[1:])
    tokens = tokens[:, np.arange(S) % tokens.shape[1]].reshape(B * S, *tokens.shape[2:])
    conditions = None if conditions is None else jnp.repeat(conditions, S, axis=0)
    noise = noise.reshape(B * S, *noise.shape[2:])

    def apply(method, *inputs, given):
      return model.apply(
        variables, *inputs, tokens, jnp.full(B * S, given), shape, conditions, method=method
      )

    if pretrainer.masked(config.model):

      def tell(*known):
        return {given: apply("tell", *known, given=given) for given in generator.looks(guidance)}

      def velocity(x, time, told):
        return generator.guided(
          lambda given: model.apply(
            variables, x, time, told[given], method=lambda m, *args: m.generator.token(*args)
          ),
          guidance,
        )

      latents = mar.draw(tell, velocity, noise[..., :-1], noise[..., -1].argsort(axis=1), steps)
    else:

      def velocity(x, time):
        return generator.guided(lambda given: apply("velocity", x, time, given=given), guidance)

      latents = generator.integrate(velocity, noise, steps)
    stacks = model.apply(
      variables, latents, shape, method=lambda m, *args: m.tokenizer.decode(*args)
    )
    return jnp.clip(stacks, 0, 1).reshape(B, S, *stacks.shape[1:])

  return generate


def make_segment(model):
  """(variables, stacks [B, P, Z, H, W] in [0, 1]) -> labels uint8 [B, P, Z, H, W]
  (schema.LABELS)."""

  def segment(variables, stacks):
    return (
      model.apply(variables, stacks, method=lambda m, x: m.segmenter(x))
      .argmax(axis=-1)
      .astype(jnp.uint8)
    )

  return segment


def make_features(model, names):
  """(variables, batch) -> {tower: features [B, F]} of the towers `names`."""

  def features(variables, batch):
    towers = model.apply(variables, to_float(batch), only=names, method="encode_cmr")
    return {name: tower["features"] for name, tower in towers.items()}

  return features
