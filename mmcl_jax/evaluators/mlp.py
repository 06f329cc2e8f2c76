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
  mean, scale = standardisation(train)
  x, x_val, x_test = (jnp.asarray((x - mean) / scale, jnp.float32) for x in (train, val, test))
  usable = np.isfinite(labels).any(axis=0) & np.isfinite(val_labels).any(axis=0)
  if not usable.any():
    nothing = np.full(labels.shape[1], np.nan)
    return {"val": np.tile(nothing, (len(val), 1)), "test": np.tile(nothing, (len(test), 1))}
  centre, spread = np.zeros(labels.shape[1]), np.ones(labels.shape[1])
  if not binary:
    centre[usable] = np.nanmean(labels[:, usable], axis=0, dtype=np.float64)
    deviation = np.nanstd(labels[:, usable], axis=0, dtype=np.float64)
    spread[usable] = np.where(deviation > 0, deviation, 1.0)
  y, y_val = (jnp.asarray((t - centre) / spread, jnp.float32) for t in (labels, val_labels))

  best = fit(x, y, x_val, y_val, binary, seed)

  def said(x):
    parts = []
    for part in np.array_split(x, -(-len(x) // ROWS)):
      parts.append(np.asarray(forward(best, part), np.float64))
    y = np.concatenate(parts)
    return np.where(usable, expit(y) if binary else y * spread + centre, np.nan)

  return {"val": said(x_val), "test": said(x_test)}


def fit(x, y, x_val, y_val, binary: bool, seed: int) -> dict:
  """Parameters of the epoch of least loss on validation, each label's own; stops when none has
  gained for PATIENCE epochs. Arguments as in `losses` and `predict`, standardised."""
  labels = y.shape[1]
  params = start(jax.random.key(seed), x.shape[1], labels)
  opt_state = optimizer().init(params)
  best, least, waited = params, jnp.full(labels, jnp.inf), 0
  for epoch in tqdm(
    range(EPOCHS),
    "MLP, at most",
    unit="epoch",
    mininterval=1,
    leave=False,
    disable=jax.process_index() > 0,
  ):
    key = jax.random.fold_in(jax.random.key(seed), epoch)
    params, opt_state, loss = run_epoch(params, opt_state, x, y, x_val, y_val, key, binary)
    better = loss < least

    def keep_better(old, new, better=better):
      return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    best = jax.tree.map(keep_better, best, params)
    least = jnp.where(better, loss, least)
    waited = 0 if better.any() else waited + 1
    if waited == PATIENCE:
      break
  return best


def start(key, width: int, labels: int) -> dict:
  """Weights [K, I, O] and biases [K, O] of the three layers, Glorot-uniform and zero."""
  widths = (width, max(width // 2, 1), max(width // 4, 1), 1)
  glorot = jax.nn.initializers.glorot_uniform(batch_axis=0)
  return {
    f"fc{i}": {
      "kernel": glorot(jax.random.fold_in(key, i), (labels, a, b)),
      "bias": jnp.zeros((labels, b)),
    }
    for i, (a, b) in enumerate(zip(widths, widths[1:]))
  }


def optimizer():
  return optax.adamw(RATE, weight_decay=WEIGHT_DECAY)


@jax.jit
def forward(params, x):
  """x [N, D] -> [N, K]."""
  x = jnp.einsum("nd,kde->kne", x, params["fc0"]["kernel"]) + params["fc0"]["bias"][:, None]
  for name in ("fc1", "fc2"):
    x = (
      jnp.einsum("knd,kde->kne", jax.nn.gelu(x, approximate=False), params[name]["kernel"])
      + params[name]["bias"][:, None]
    )
  return x[..., 0].T


def losses(params, x, y, binary):
  """Mean loss [K] over the rows that know a label; 0 where none does."""
  said, known = forward(params, x), jnp.isfinite(y)
  target = jnp.where(known, y, 0)
  each = optax.sigmoid_binary_cross_entropy(said, target) if binary else jnp.square(said - target)
  return (each * known).sum(axis=0) / jnp.maximum(known.sum(axis=0), 1)


@functools.partial(jax.jit, static_argnames="binary")
def run_epoch(params, opt_state, x, y, x_val, y_val, key, binary):
  """One pass over the rows in a random order (the rest of the last batch waits): parameters, and
  the loss [K] on validation."""
  batch = min(BATCH, len(x))
  order = jax.random.permutation(key, len(x))[: len(x) // batch * batch].reshape(-1, batch)

  def step(carry, rows):
    params, opt_state = carry
    grads = jax.grad(lambda params: losses(params, x[rows], y[rows], binary).sum())(params)
    updates, opt_state = optimizer().update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), None

  (params, opt_state), _ = jax.lax.scan(step, (params, opt_state), order)
  return params, opt_state, losses(params, x_val, y_val, binary)
