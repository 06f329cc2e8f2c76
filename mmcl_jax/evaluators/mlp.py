"""An MLP on frozen embeddings, one a label: D - D/2 - D/4 - 1 with GELU, dual-phase's 576-288-144-1
by rule.

All labels are fitted at once, each with weights of its own along a leading axis, and each keeps the
epoch of its least loss on validation. Letters: N rows, D features, K labels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import expit
from tqdm import tqdm

from mmcl_jax.evaluators.ridge import standardisation

ROWS = 4096  # predicted at a time
BATCH, RATE, WEIGHT_DECAY, EPOCHS, PATIENCE = 256, 1e-3, 1e-2, 100, 5


def predict(
  train: np.ndarray,
  labels: np.ndarray,
  val: np.ndarray,
  val_labels: np.ndarray,
  test: np.ndarray,
  binary: bool = False,
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """Fits on train, stops on validation, predicts both `val` and `test`.

  Args:
    train, val, test: features [N, D], finite.
    labels, val_labels: [N, K], NaN = unknown.
    binary: labels are 0 or 1 and probabilities are wanted (cross-entropy); else least squares of
      standardised labels.
    seed: of the first weights and the order of the rows.

  Returns:
    float64 [N, K] of each; NaN for a label that train or validation does not know at all.
  """
  label_count = labels.shape[1]
  usable = np.isfinite(labels).any(axis=0) & np.isfinite(val_labels).any(axis=0)
  if not usable.any():
    return {
      "val": np.full((len(val), label_count), np.nan),
      "test": np.full((len(test), label_count), np.nan),
    }
  mean, scale = standardisation(train)
  centre = np.zeros(label_count)
  spread = np.ones(label_count)
  if not binary:
    centre[usable], spread[usable] = label_scale(labels[:, usable])
  x = standardised(train, mean, scale)
  x_val = standardised(val, mean, scale)
  x_test = standardised(test, mean, scale)
  y = standardised(labels, centre, spread)
  y_val = standardised(val_labels, centre, spread)

  params = fit(x, y, x_val, y_val, binary, seed)

  def predicted(x):
    y = forward_in_blocks(params, x)
    y = expit(y) if binary else y * spread + centre
    return np.where(usable, y, np.nan)

  return {"val": predicted(x_val), "test": predicted(x_test)}


def label_scale(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation [K] of labels [N, K] without NaN; 1 for one that does not vary."""
  mean = np.nanmean(labels, axis=0, dtype=np.float64)
  deviation = np.nanstd(labels, axis=0, dtype=np.float64)
  return mean, np.where(deviation > 0, deviation, 1.0)


def standardised(x, mean, scale):
  return jnp.asarray((x - mean) / scale, jnp.float32)


def forward_in_blocks(params: dict, x) -> np.ndarray:
  """`forward` of ROWS rows at a time, as float64 [N, K]."""
  blocks = -(-len(x) // ROWS)
  outputs = []
  for rows in np.array_split(x, blocks):
    output = forward(params, rows)
    outputs.append(np.asarray(output, np.float64))
  return np.concatenate(outputs)


def fit(x, y, x_val, y_val, binary: bool, seed: int) -> dict:
  """Parameters of the epoch of least loss on validation, each label's own; stops when none has
  gained for PATIENCE epochs. Arguments as in `losses` and `predict`, standardised."""
  label_count = y.shape[1]
  seed_key = jax.random.key(seed)
  params = initial_params(seed_key, x.shape[1], label_count)
  opt_state = optimizer().init(params)
  best = params
  least_loss = jnp.full(label_count, jnp.inf)
  waited = 0
  for epoch in tqdm(
    range(EPOCHS),
    "MLP, at most",
    unit="epoch",
    mininterval=1,
    leave=False,
    disable=jax.process_index() > 0,
  ):
    key = jax.random.fold_in(seed_key, epoch)
    params, opt_state, loss = run_epoch(params, opt_state, x, y, x_val, y_val, key, binary)
    better = loss < least_loss
    best = of_better_labels(better, params, best)
    least_loss = jnp.where(better, loss, least_loss)
    waited = 0 if better.any() else waited + 1
    if waited == PATIENCE:
      break
  return best


def of_better_labels(better, params: dict, best: dict) -> dict:
  """The parameters of the labels that are `better` [K], and of the others those of `best`."""

  def choose(new, old):
    trailing = (1,) * (new.ndim - 1)
    return jnp.where(better.reshape(-1, *trailing), new, old)

  return jax.tree.map(choose, params, best)


def initial_params(key, width: int, labels: int) -> dict:
  """Weights [K, I, O] and biases [K, O] of the three layers, Glorot-uniform and zero."""
  widths = (width, max(width // 2, 1), max(width // 4, 1), 1)
  glorot = jax.nn.initializers.glorot_uniform(batch_axis=0)
  params = {}
  for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
    layer_key = jax.random.fold_in(key, i)
    params[f"fc{i}"] = {
      "kernel": glorot(layer_key, (labels, inputs, outputs)),
      "bias": jnp.zeros((labels, outputs)),
    }
  return params


def optimizer():
  return optax.adamw(RATE, weight_decay=WEIGHT_DECAY)


@jax.jit
def forward(params, x):
  """x [N, D] -> [N, K]."""
  layer = params["fc0"]
  x = jnp.einsum("nd,kde->kne", x, layer["kernel"])
  x = x + layer["bias"][:, None]
  for name in ("fc1", "fc2"):
    layer = params[name]
    x = jax.nn.gelu(x, approximate=False)
    x = jnp.einsum("knd,kde->kne", x, layer["kernel"])
    x = x + layer["bias"][:, None]
  return x[..., 0].T


def losses(params, x, y, binary):
  """Mean loss [K] over the rows that know a label; 0 where none does."""
  output = forward(params, x)
  labelled = jnp.isfinite(y)
  target = jnp.where(labelled, y, 0)
  if binary:
    each = optax.sigmoid_binary_cross_entropy(output, target)
  else:
    each = jnp.square(output - target)
  count = labelled.sum(axis=0)
  return (each * labelled).sum(axis=0) / jnp.maximum(count, 1)


@functools.partial(jax.jit, static_argnames="binary")
def run_epoch(params, opt_state, x, y, x_val, y_val, key, binary):
  """One pass over the rows in a random order (the rest of the last batch waits): parameters, and
  the loss [K] on validation."""
  batch = min(BATCH, len(x))
  steps = len(x) // batch
  order = jax.random.permutation(key, len(x))
  order = order[: steps * batch].reshape(steps, batch)

  def total_loss(params, rows):
    return losses(params, x[rows], y[rows], binary).sum()

  def step(carry, rows):
    params, opt_state = carry
    grads = jax.grad(total_loss)(params, rows)
    updates, opt_state = optimizer().update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), None

  (params, opt_state), _ = jax.lax.scan(step, (params, opt_state), order)
  return params, opt_state, losses(params, x_val, y_val, binary)
