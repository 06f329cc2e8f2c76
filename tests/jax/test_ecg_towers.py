"""xResNet1d and S4: forward passes against PyTorch and NumPy, learning, and every program with
them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import erf

from mmcl_jax import models
from mmcl_jax.errors import UserError
from mmcl_jax.models.towers import s4, xresnet1d

TOWERS = {"xresnet1d": xresnet1d.XResNet1d("test"), "s4": s4.S4("test")}


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


def drawn(tree, seed=0):
  """Arrays like those of a tree, none of them neutral; variances and scales above 0."""
  rng = np.random.default_rng(seed)

  def draw(path, x):
    if path[-1].key in ("var", "scale"):
      return rng.uniform(0.5, 1.5, x.shape)
    return rng.normal(0, 0.5, x.shape)

  return jax.tree_util.tree_map_with_path(draw, tree)


def shapes(model, *args):
  return jax.eval_shape(lambda key: model.init(key, *args), jax.random.key(0))


# -- xResNet1d --


def torch_xresnet(size, leads):
  """The network from the paper's description, of PyTorch's own layers, named as ours."""
  torch = pytest.importorskip("torch")
  from torch import nn

  def layer(into, out, kernel, stride=1):
    conv = nn.Conv1d(into, out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.ModuleDict({"conv": conv, "norm": nn.BatchNorm1d(out)})

  class Net(nn.Module):
    def __init__(self):
      super().__init__()
      self.layers, channels = nn.ModuleDict(), leads
      for i, width in enumerate(size["stem"]):
        self.layers[f"stem{i}"] = layer(channels, width, 5, 1 if i else 2)
        channels = width
      width, out = size["width"], 4 * size["width"]
      self.strides = []
      for stage, depth in enumerate(size["depths"]):
        for i in range(depth):
          stride = 2 if stage and not i else 1
          block = {
            "layer1": layer(channels, width, 1),
            "layer2": layer(width, width, 5, stride),
            "layer3": layer(width, out, 1),
          }
          if channels != out:
            block["skip"] = layer(channels, out, 1)
          self.layers[f"block{len(self.strides)}"] = nn.ModuleDict(block)
          self.strides.append(stride)
          channels = out

    def forward(self, x):
      def run(layer, x):
        return layer["norm"](layer["conv"](x))

      for i in range(3):
        x = torch.relu(run(self.layers[f"stem{i}"], x))
      x = nn.functional.max_pool1d(x, 3, 2, 1)
      for i, stride in enumerate(self.strides):
        block = self.layers[f"block{i}"]
        y = torch.relu(run(block["layer1"], x))
        y = torch.relu(run(block["layer2"], y))
        y = run(block["layer3"], y)
        if stride > 1:
          x = nn.functional.avg_pool1d(x, 2, ceil_mode=True)
        if "skip" in block:
          x = run(block["skip"], x)
        x = torch.relu(x + y)
      return x, torch.cat([x.mean(2), x.amax(2)], 1)

  return Net().double()


def load(net, variables):
  """Puts our variables into the PyTorch network."""
  torch = pytest.importorskip("torch")
  names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
  state = net.state_dict()
  flat = jax.tree_util.tree_leaves_with_path([variables["params"], variables["batch_stats"]])
  for path, x in flat:
    *module, leaf = (entry.key for entry in path[1:])
    x = np.asarray(x)
    if leaf == "kernel":  # [5, I, O], or [I, O] of a kernel of 1
      x, leaf = (x if x.ndim == 3 else x[None]).transpose(2, 1, 0), "kernel"
    key = f"layers.{'.'.join(module)}.{names.get(leaf, 'weight')}"
    assert state[key].shape == x.shape, key
    state[key] = torch.tensor(x)
  net.load_state_dict(state)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("samples", [96, 101])
def test_xresnet1d_is_torch_s(float64, train, samples):
  torch = pytest.importorskip("torch")
  size = xresnet1d.SIZES["test"]
  model = xresnet1d.XResNet1d("test", dtype=jnp.float64)
  x = np.random.default_rng(1).normal(size=(4, 3, samples))
  rows = np.array([1.0, 1.0, 0.0, 1.0])
  variables = drawn(shapes(model, x, rows))
  net = torch_xresnet(size, 3)
  load(net, variables)
  (tokens, embedding), changed = jax.jit(
    lambda v, x: model.apply(v, x, rows, train, mutable=["batch_stats"])
  )(variables, x)
  kept = rows > 0  # torch sees only the rows that count
  theirs = net.train(train)(torch.tensor(x[kept]))
  np.testing.assert_allclose(tokens[kept], theirs[0].detach().swapaxes(1, 2), rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(embedding[kept], theirs[1].detach(), rtol=1e-9, atol=1e-9)
  if train:
    norm = changed["batch_stats"]["block0"]["skip"]["norm"]
    theirs = net.layers["block0"]["skip"]["norm"]
    np.testing.assert_allclose(norm["var"], theirs.running_var, rtol=1e-9)


@pytest.mark.parametrize("size, count", [("50", 886_400), ("101", 1_804_672)])
def test_xresnet1d_has_the_weights_of_its_formula(size, count):
  """Of the stem and of bottlenecks of width 64 that give 256, each layer with a scale and a
  bias."""
  stem = 5 * (12 * 32 + 32 * 32 + 32 * 64) + 2 * (32 + 32 + 64)
  first, later = 64 * 64 + 64 * 256, 256 * 64
  inner = 5 * 64 * 64 + 64 * 256 + 2 * (64 + 64 + 256)
  blocks = sum(xresnet1d.SIZES[size]["depths"])
  expected = stem + first + 2 * 256 + (blocks - 1) * later + blocks * inner
  variables = shapes(xresnet1d.XResNet1d(size), jnp.zeros((1, 12, 500)), jnp.ones(1))
  assert sum(x.size for x in jax.tree.leaves(variables["params"])) == expected == count


# -- S4 --


def recurrence(u, dt, a, c):
  """y [S] of u [S]: the state of a channel, step by step, in NumPy."""
  step, into = np.exp(dt * a), (np.exp(dt * a) - 1) / a
  x, y = np.zeros(len(a), np.complex128), []
  for value in u:
    x = step * x + into * value
    y.append(2 * (c * x).sum().real)
  return np.array(y)


def both_ways(u, p):
  """y [S, H] of u [S, H] by the recurrence, over earlier samples and, shifted by one, over later
  ones."""
  y = np.zeros_like(u)
  for h in range(u.shape[1]):
    a = -np.exp(p["log_decay"][h]) + 1j * p["frequency"][h]
    c = p["c"][:, h, :, 0] + 1j * p["c"][:, h, :, 1]
    dt = np.exp(p["log_dt"][h])
    later = recurrence(u[::-1, h], dt, a, c[1])[::-1]
    y[:, h] = recurrence(u[:, h], dt, a, c[0]) + np.append(later[1:], 0) + p["direct"][h] * u[:, h]
  return y


def test_the_convolution_is_the_recurrence(float64):
  model = s4.StateSpace(6)
  u = np.random.default_rng(0).normal(size=(2, 40, 3))
  p = drawn(shapes(model, u))["params"]
  found = jax.jit(model.apply)({"params": p}, u)
  for row in range(2):
    np.testing.assert_allclose(found[row], both_ways(u[row], p), rtol=1e-10, atol=1e-10)


def test_the_convolution_is_the_recurrence_where_training_starts():
  """5,000 steps, in float32, with the slowest and the fastest step."""
  model = s4.StateSpace(16)
  u = np.random.default_rng(0).normal(size=(1, 5000, 2)).astype(np.float32)
  p = model.init(jax.random.key(0), u[:, :4])["params"]
  p["log_dt"] = jnp.log(jnp.array([s4.SLOWEST, s4.FASTEST]))
  found = jax.jit(model.apply)({"params": p}, u)[0]
  expected = both_ways(u[0].astype(np.float64), jax.tree.map(np.float64, p))
  assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_s4_is_numpy(float64):
  model = s4.S4("test", patch=4, dtype=jnp.float64)
  x = np.random.default_rng(0).normal(size=(2, 3, 48))
  p = drawn(shapes(model, x))["params"]
  tokens, embedding = jax.jit(model.apply)({"params": p}, x)
  for row in range(2):
    steps = x[row].reshape(3, 12, 4).swapaxes(0, 1).reshape(12, 12)
    y = steps @ p["stem"]["kernel"] + p["stem"]["bias"]
    for i in range(2):
      q = p[f"block{i}"]
      z = both_ways(y, q["ssm"])
      z = z * 0.5 * (1 + erf(z / np.sqrt(2)))
      z, gate = np.split(z @ q["out"]["kernel"] + q["out"]["bias"], 2, axis=1)
      y = y + z / (1 + np.exp(-gate))
      y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
      y = y * q["norm"]["scale"] + q["norm"]["bias"]
    # GELU is right to 3e-7 in float32, which its formula is taken in
    np.testing.assert_allclose(tokens[row], y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(embedding[row], y.mean(axis=0), rtol=1e-5, atol=1e-5)


# -- both --


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_learns(name):
  """Where in the ECG a wave of its own height stands is no matter; how high it is comes out."""
  rng = np.random.default_rng(0)
  height = rng.uniform(0.5, 2, 16)
  x = rng.normal(0, 0.1, (16, 12, 200)).astype(np.float32)
  for row, place in enumerate(rng.integers(20, 160, 16)):
    x[row, :, place : place + 20] += height[row]
  model, keys = TOWERS[name], jax.random.split(jax.random.key(1), 16)
  variables = model.init(jax.random.key(0), x, jnp.ones(16), False)
  statistics = variables.get("batch_stats", {})
  width = model.apply(variables, x, jnp.ones(16), False)[1].shape[1]
  params = {"tower": variables["params"], "out": jnp.zeros(width)}

  def loss(params):
    given = {"params": params["tower"], "batch_stats": statistics}
    (_, z), _ = model.apply(given, x, jnp.ones(16), True, keys, mutable=["batch_stats"])
    return jnp.mean((z @ params["out"] + 1.25 - height) ** 2)

  tx = optax.adam(1e-2)

  @jax.jit
  def step(params, state):
    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = tx.update(gradient, state)
    return optax.apply_updates(params, updates), state, value

  state, values = tx.init(params), []
  for _ in range(60):
    params, state, value = step(params, state)
    values.append(float(value))
  assert np.mean(values[-5:]) < 0.3 * values[0], values[::10]


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_remat_keeps_shapes_and_embeddings_are_float32(name, dtype):
  x, keys = jnp.zeros((2, 12, 100)), jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))

  def run(keys, **levers):
    model = TOWERS[name].clone(dtype=jnp.dtype(dtype), **levers)
    return model.init_with_output(jax.random.key(0), x, jnp.ones(2), True, keys)

  plain = jax.eval_shape(run, keys)
  assert jax.eval_shape(functools.partial(run, remat="dots"), keys) == plain
  (tokens, embedding), variables = plain
  assert tokens.dtype == embedding.dtype == jnp.float32 and tokens.ndim == 3
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
  "entry, says",
  [
    (dict(fn="s4", size="test", patch=7), "ecg.patch is 7, which does not divide"),
    (dict(fn="s4", size="50"), "ecg.size is '50'; expected one of test, demo, base"),
    (dict(fn="xresnet1d", size="18"), "ecg.size is '18'; expected one of test, demo, 50, 101"),
    (
      dict(fn="xresnet1d", size="50", mask_ratio=0.8),
      "ecg sets mask_ratio, which xresnet1d does not take; its parameters are size",
    ),
  ],
)
def test_mistakes_are_one_line(entry, says):
  from mmcl_jax import configuration

  c = configuration.defaults(8, 6).model
  c.towers.ecg = dict(view="ecg") | entry
  with pytest.raises(UserError) as error:
    models.build(c, 500)
  assert says in str(error.value) and "\n" not in str(error.value)
