"""CMR backbones and pooling against torch modules and NumPy, in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import init

from mmcl_jax.errors import UserError
from mmcl_jax.models import pooling, resnet, towers, vit
from mmcl_jax.models.towers import slow_resnet, video_vit
from mmcl_jax.models.towers import resnet as plane_resnet


# The tests' time is compilation, and the numbers to 1e-15 do not depend on how hard LLVM tries.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def relative(found, expected):
  """Largest difference, relative to the largest expected value."""
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  assert found.shape == expected.shape
  return np.abs(found - expected).max() / np.abs(expected).max()


def randomised(variables, seed=0):
  """Every parameter and statistic drawn anew, float64: fresh zeros and ones would hide mistakes."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    if name in ("var", "scale"):
      return rng.uniform(0.5, 1.5, leaf.shape)
    fan_in = np.prod(leaf.shape[:-1]) if name == "kernel" else 100
    return rng.normal(size=leaf.shape) / np.sqrt(fan_in)

  return jax.tree_util.tree_map_with_path(draw, variables)


def shapes(model, *args):
  return jax.eval_shape(lambda key: model.init(key, *args), jax.random.key(0))


# ------------------------------------------------------------------------------------------------
# ResNets against torch


def torch_resnet(dims, channels, stem, bottleneck, stages, slices=0):
  """torchvision's ResNet (dims=2) or PyTorchVideo's slow_r50 (dims=3) from torch layers, under our
  layers' names."""
  torch = pytest.importorskip("torch")

  def wide(span, side):
    return (span, side, side)[3 - dims :]

  Conv, Norm, Pool = (
    getattr(torch.nn, f"{name}{dims}d") for name in ("Conv", "BatchNorm", "MaxPool")
  )

  def conv(into, out, side, stride=1, span=1):
    return Conv(
      into, out, wide(span, side), wide(1, stride), wide(span // 2, side // 2), bias=False
    )

  class Block(torch.nn.Module):
    def __init__(self, into, width, stride, span):
      super().__init__()
      out = 4 * width if bottleneck else width
      if bottleneck:
        self.conv1, self.conv2, self.conv3 = (
          conv(into, width, 1, span=span),
          conv(width, width, 3, stride),
          conv(width, out, 1),
        )
        self.norm1, self.norm2, self.norm3 = Norm(width), Norm(width), Norm(out)
      else:
        self.conv1, self.conv2 = conv(into, width, 3, stride), conv(width, width, 3)
        self.norm1, self.norm2 = Norm(width), Norm(width)
      if stride > 1 or into != out:
        self.skip, self.skip_norm = conv(into, out, 1, stride), Norm(out)

    def forward(self, x):
      y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
      if bottleneck:
        y = self.norm3(self.conv3(torch.relu(y)))
      return torch.relu(y + (self.skip_norm(self.skip(x)) if hasattr(self, "skip") else x))

  class Net(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.stem, self.stem_norm = conv(channels, stem, 7, 2), Norm(stem)
      self.pool = Pool(wide(1, 3), wide(1, 2), wide(0, 1))
      into, self.blocks = stem, []
      for i, (width, blocks, *span) in enumerate(stages):
        for j in range(blocks):
          self.blocks.append(f"stage{i}_block{j}")
          self.add_module(
            self.blocks[-1], Block(into, width, 2 if i and not j else 1, *span or [1])
          )
          into = 4 * width if bottleneck else width
      if slices:
        self.slice_pool = torch.nn.Linear(slices, 1)

    def forward(self, x):
      x = self.pool(torch.relu(self.stem_norm(self.stem(x))))
      for name in self.blocks:
        x = getattr(self, name)(x)
      x = x.mean(dim=(-2, -1))
      return self.slice_pool(x)[..., 0] if slices else x

  return Net


def to_torch(tree, dims):
  """Our parameters or statistics (nested dicts) -> {torch name: array in torch's layout}."""
  names = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
  }
  state = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    *layers, name = (key.key for key in path)
    x = np.asarray(leaf)
    if layers == ["slice_pool"]:
      x = x.T
    elif name == "kernel" and x.ndim == 4:  # [3, 3, I, O] -> [O, I, (1,) 3, 3]
      x = x.transpose(3, 2, 0, 1)
      x = x[:, :, None] if dims == 3 else x
    elif name == "kernel":  # [span * I, O] -> [O, I, (span,) 1, 1]
      into = INPUTS[".".join(layers)]
      x = x.reshape(-1, into, x.shape[1]).transpose(2, 1, 0)[..., None, None]
      x = x if dims == 3 else x[:, :, 0]
    state[".".join([*layers, names[name]])] = x
  return state


INPUTS = {}  # input channels of the 1x1 layers, as torch has them; filled by `both`

# small, but with every branch: stages with and without stride, blocks with and without skip, both
# spans
CASES = {
  "basic": (
    2,
    dict(stem=4, block=resnet.Basic, widths=(4, 6), depths=(1, 2), spans=(1, 1)),
    (3, 21, 18),
  ),
  "bottleneck": (
    2,
    dict(stem=4, block=resnet.Bottleneck, widths=(2, 3), depths=(1, 2), spans=(1, 1)),
    (3, 21, 18),
  ),
  "slow": (
    3,
    dict(stem=4, block=resnet.Bottleneck, widths=(2, 3), depths=(1, 2), spans=(1, 3)),
    (5, 21, 18),
  ),
}


def torch_numbers(numbers, slow):
  """Of a size: stem, whether its blocks are bottlenecks, stages as torch_resnet takes them."""
  stages = zip(numbers["widths"], numbers["depths"], numbers["spans"], strict=True)
  stages = tuple(stage if slow else stage[:2] for stage in stages)
  return numbers["stem"], numbers["block"] is resnet.Bottleneck, stages


def both(case):
  """Our network, its randomised variables, and the torch network with the same ones."""
  torch = pytest.importorskip("torch")
  dims, size, shape = CASES[case]
  tower = slow_resnet.SlowResNet if dims == 3 else plane_resnet.ResNet
  model = tower(size, dtype=jnp.float64)
  variables = randomised(shapes(model, jnp.zeros((1, *shape)), jnp.ones(1), False))
  slices, channels = (shape[0], 1) if dims == 3 else (0, shape[0])
  net = torch_resnet(dims, channels, *torch_numbers(size, dims == 3), slices)()
  INPUTS.update(
    {
      name: module.in_channels
      for name, module in net.named_modules()
      if hasattr(module, "in_channels")
    }
  )
  net = net.double()
  state = to_torch(variables["params"], dims) | to_torch(variables["batch_stats"], dims)
  state |= {name: x for name, x in net.state_dict().items() if name.endswith("num_batches_tracked")}
  net.load_state_dict(
    {name: torch.as_tensor(np.asarray(x).copy()) for name, x in state.items()}, strict=True
  )
  return model, variables, net


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_resnet_is_torch_s(case, train):
  """Features to 1e-9, gradients to 1e-8 of the global norm, statistics; torch sees only the rows
  that count."""
  torch = pytest.importorskip("torch")
  model, variables, net = both(case)
  dims, _, shape = CASES[case]
  rng = np.random.default_rng(1)
  x, rows = rng.random((4, *shape)), np.array([1.0, 1.0, 0.0, 1.0])
  kept = rows > 0

  def loss(params):
    (_, y), changed = model.apply(
      {**variables, "params": params}, x, rows, train, mutable=["batch_stats"]
    )
    return (y[kept] ** 2).sum(), (y[kept], changed.get("batch_stats"))

  (_, (y, changed)), grads = jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
  image = torch.tensor(2 * x[kept, None] - 1 if dims == 3 else x[kept])
  theirs = net.train(train)(image)
  (theirs**2).sum().backward()
  assert relative(y, theirs.detach()) < 1e-9
  grads, names = to_torch(grads, dims), dict(net.named_parameters())
  assert set(grads) == set(names)
  norm = np.sqrt(sum((p.grad**2).sum() for p in names.values()))
  assert max(np.abs(grads[name] - p.grad.numpy()).max() for name, p in names.items()) < 1e-8 * norm
  if train:
    state = net.state_dict()
    for name, value in to_torch(changed, dims).items():
      assert relative(value, state[name]) < 1e-9, name


@pytest.mark.parametrize(
  "kind, size, planes, count",
  [
    ("resnet", "r18", 3, 11_689_512 - 513_000),  # torchvision's without fc
    ("resnet", "r50", 3, 25_557_032 - 2_049_000),
    # PyTorchVideo's without head, the stem's second and third channel; with a Linear over 6 slices
    ("slow_resnet", "r50", 6, 32_454_096 - 819_600 - 2 * 64 * 7 * 7 + 7),
  ],
)
def test_published_sizes(kind, size, planes, count):
  torch = pytest.importorskip("torch")
  model = towers.build(dict(fn=kind, view="cine_slice", size=size))
  variables = shapes(model, jnp.zeros((1, planes, 32, 32)), jnp.ones(1), False)
  assert sum(np.prod(x.shape, dtype=int) for x in jax.tree.leaves(variables["params"])) == count
  slow = kind == "slow_resnet"
  with torch.device("meta"):
    numbers = torch_numbers(model.numbers, slow)
    net = torch_resnet(2 + slow, 1 if slow else 3, *numbers, planes if slow else 0)()
  INPUTS.update(
    {
      name: module.in_channels
      for name, module in net.named_modules()
      if hasattr(module, "in_channels")
    }
  )
  zeros = jax.tree.map(lambda x: np.broadcast_to(np.int8(0), x.shape), variables)
  ours = to_torch(zeros["params"], 2 + slow) | to_torch(zeros["batch_stats"], 2 + slow)
  theirs = {
    name: tuple(x.shape)
    for name, x in net.state_dict().items()
    if not name.endswith("num_batches_tracked")
  }
  assert {name: x.shape for name, x in ours.items()} == theirs


def test_a_slow_resnet_starts_as_the_mean_over_slices():
  model = slow_resnet.SlowResNet("test")
  x = jnp.repeat(jax.random.uniform(jax.random.key(0), (1, 1, 16, 16)), 3, axis=1)
  pool = jit(lambda key: model.init(key, x, jnp.ones(1), False)["params"]["slice_pool"])(
    jax.random.key(1)
  )
  np.testing.assert_allclose(pool["kernel"], np.full((3, 1), 1 / 3), rtol=1e-6)
  assert (pool["bias"] == 0).all()


# --------------------------------------------------------------------------------------------------
# batch normalisation


def test_a_batch_of_padding_alone_uses_and_keeps_the_running_statistics():
  norm = resnet.BatchNorm(jnp.float32)
  x = jax.random.normal(jax.random.key(0), (4, 5, 3), jnp.float32)
  variables = randomised(shapes(norm, x, jnp.ones(4), False))

  def run(x):
    y, changed = norm.apply(variables, x, jnp.zeros(4), True, mutable=["batch_stats"])
    return y.sum(), (y, changed["batch_stats"])

  (_, (y, changed)), grad = jit(jax.value_and_grad(run, has_aux=True))(x)
  still = jit(lambda x: norm.apply(variables, x, jnp.zeros(4), False))(x)
  np.testing.assert_allclose(y, still, rtol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, changed, variables["batch_stats"])
  assert np.isfinite(grad).all()


# ----------------------------------------------------------------------------------------------------
# video transformer


def test_patches_are_cut_and_put_back_where_they_were():
  x, patch = np.random.default_rng(0).random((2, 4, 6, 9)), (2, 3, 3)
  patches = video_vit.patchify(x, patch)
  n = 0
  for a in range(2):
    for b in range(2):
      for c in range(3):
        piece = x[:, 2 * a : 2 * a + 2, 3 * b : 3 * b + 3, 3 * c : 3 * c + 3]
        np.testing.assert_array_equal(patches[:, n], piece.reshape(2, -1))
        n += 1
  assert patches.shape == (2, n, 18)
  np.testing.assert_array_equal(video_vit.unpatchify(patches, (4, 6, 9), patch), x)


def test_positions_are_sines_and_cosines_of_plane_column_and_row():
  table = video_vit.sincos_3d(planes=3, rows=2, columns=4, width=32)  # 8 + 12 + 12
  for token, found in enumerate(table):
    expected = []
    for position, width in ((token // 8, 8), (token % 4, 12), (token // 4 % 2, 12)):
      angles = [position * 10000 ** (-2 * i / width) for i in range(width // 2)]
      expected += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
  np.testing.assert_array_equal(video_vit.sincos_3d(1, 2, 4, 20), vit.sincos_2d(2, 4, 20))


SHAPE, PATCH = (4, 6, 8), (2, 3, 4)  # 2 x 2 x 2 patches of 24 pixels


def video_case(depth=1, decoder=(16, 1, 2), **kwargs):
  size = dict(width=32, depth=depth, heads=2, decoder=decoder)
  model = video_vit.VideoViT(size, PATCH, mask_ratio=0.6, dtype=jnp.float64, **kwargs)
  x, keys = np.random.default_rng(1).random((3, *SHAPE)), jax.random.split(jax.random.key(0), 3)
  variables = jax.eval_shape(
    lambda key: model.init(key, x, keys, method="reconstruct"), jax.random.key(1)
  )
  return model, randomised(variables), x, keys


def numpy_norm(x, p):
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p[
    "scale"
  ] + p["bias"]


def test_video_tower_without_blocks_is_numpy():
  """Every patch passes alone: embedding, position, norm, and through the decoder to its own
  place."""
  model, variables, x, keys = video_case(depth=0, decoder=(16, 0, 1))
  p = variables["params"]

  def dense(x, p):
    return x @ p["kernel"] + p["bias"]

  patches = np.asarray(video_vit.patchify(x, PATCH))
  tokens = numpy_norm(
    dense(patches, p["patch_embed"]) + video_vit.sincos_3d(2, 2, 2, 32), p["norm"]
  )
  assert relative(jit(lambda v: model.apply(v, x)[1])(variables), tokens.mean(axis=1)) < 1e-12
  out = jit(lambda v: model.apply(v, x, keys, method="reconstruct"))(variables)
  d, hidden = p["decoder"], np.asarray(out["patch_mask"])[..., None] > 0
  inner = np.where(hidden, d["mask_token"], dense(tokens, d["embed"])) + video_vit.sincos_3d(
    2, 2, 2, 16
  )
  assert relative(out["reconstruction"], dense(numpy_norm(inner, d["norm"]), d["pred"])) < 1e-12
  np.testing.assert_array_equal(out["patches"], patches)
  np.testing.assert_array_equal(hidden.sum(axis=(1, 2)), 5)  # round(0.6 * 8)
  assert len({row.tobytes() for row in hidden}) > 1  # each row by its own key


def test_hidden_patches_are_not_seen_and_visible_ones_are():
  model, variables, x, keys = video_case(depth=2)
  run = jit(lambda x: model.apply(variables, x, keys, method="reconstruct"))
  out = run(x)
  hidden = np.repeat(np.asarray(out["patch_mask"])[..., None], 24, axis=2)
  hidden = np.asarray(video_vit.unpatchify(hidden, SHAPE, PATCH)) > 0
  np.testing.assert_array_equal(
    run(np.where(hidden, 9.0, x))["reconstruction"], out["reconstruction"]
  )
  changed = run(np.where(hidden, x, x[:, ::-1]))["reconstruction"]
  # the visible ones fill in every patch
  assert (np.abs(changed - out["reconstruction"]).max(axis=2) > 1e-3).all()


def test_video_tower_applies_its_blocks_with_drop_path_growing_by_depth():
  model, variables, x, keys = video_case(depth=3, drop_path=0.6)
  p = variables["params"]
  tokens = (
    np.asarray(video_vit.patchify(x, PATCH)) @ p["patch_embed"]["kernel"] + p["patch_embed"]["bias"]
  )
  for with_keys in (None, keys):
    y = tokens + video_vit.sincos_3d(2, 2, 2, 32)
    for i, rate in enumerate((0.0, 0.3, 0.6)):
      y = vit.Block(2, i, rate, jnp.float64).apply({"params": p[f"block{i}"]}, y, with_keys)
    expected = numpy_norm(np.asarray(y), p["norm"]).mean(axis=1)
    assert (
      relative(model.apply(variables, x, None, with_keys is not None, keys)[1], expected) < 1e-12
    )
  # evaluation drops nothing
  assert relative(model.apply(variables, x)[1], expected) > 1e-3


def test_gradients_reach_all_parameters_of_the_video_tower():
  model, variables, x, keys = video_case()

  def loss(variables):
    out = model.apply(variables, x, keys, method="reconstruct")
    return (out["patch_mask"][..., None] * (out["patches"] - out["reconstruction"]) ** 2).sum()

  for path, grad in jax.tree_util.tree_leaves_with_path(jit(jax.grad(loss))(variables)):
    assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-6, path


# --------------------------------------------------------------------------------------------------------------
# pooling


def test_attention_pool_is_torch_s_with_the_mean_token_as_query():
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  tokens, pool = rng.normal(size=(3, 7, 12)), pooling.AttentionPool(3, jnp.float64)
  params = randomised(shapes(pool, tokens))["params"]
  theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)

  def in_torchs_order(x):  # columns [heads, 3, width] -> rows [3, heads, width]
    return x.reshape(*x.shape[:-1], 3, 3, 4).swapaxes(-3, -2).reshape(x.shape).T

  ours = {
    "in_proj_weight": in_torchs_order(params["qkv"]["kernel"]),
    "in_proj_bias": in_torchs_order(params["qkv"]["bias"]),
    "out_proj.weight": params["proj"]["kernel"].T,
    "out_proj.bias": params["proj"]["bias"],
  }
  theirs.load_state_dict({name: torch.tensor(x) for name, x in ours.items()})
  y = torch.tensor(tokens)
  expected = theirs(y.mean(dim=1, keepdim=True), y, y)[0][:, 0]
  weight = rng.normal(size=expected.shape)
  (expected * torch.tensor(weight)).sum().backward()
  assert relative(jit(pool.apply)({"params": params}, tokens), expected.detach()) < 1e-9
  grads = jit(jax.grad(lambda p: (pool.apply({"params": p}, tokens) * weight).sum()))(params)
  norm = np.sqrt(sum((p.grad**2).sum().item() for p in theirs.parameters()))
  for found, torchs in (
    (in_torchs_order(grads["qkv"]["kernel"]), theirs.in_proj_weight),
    (in_torchs_order(grads["qkv"]["bias"]), theirs.in_proj_bias),
    (grads["proj"]["kernel"].T, theirs.out_proj.weight),
    (grads["proj"]["bias"], theirs.out_proj.bias),
  ):
    assert np.abs(found - torchs.grad.numpy()).max() < 1e-8 * norm


def test_film_is_its_formula_and_starts_as_the_identity():
  rng = np.random.default_rng(0)
  tokens, covariates = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 2))
  covariates[0, 1] = covariates[2] = np.nan
  film = pooling.FiLM(jnp.float64)
  fresh = init(film, jax.random.key(0), tokens, covariates)
  np.testing.assert_array_equal(film.apply(fresh, tokens, covariates), tokens)
  variables = randomised(fresh)
  p = variables["params"]["fc"]
  for b in range(3):
    known = [0.0 if np.isnan(c) else c for c in covariates[b]]
    scale, shift = np.split(
      np.array([*known, *np.isnan(covariates[b])]) @ p["kernel"] + p["bias"], 2
    )
    out = film.apply(variables, tokens, covariates)[b]
    np.testing.assert_allclose(out, tokens[b] * (1 + scale) + shift, rtol=1e-12)
  unknown, mean = (film.apply(variables, tokens, np.full((3, 2), value)) for value in (np.nan, 0.0))
  assert relative(unknown, mean) > 1e-2
  grads = jit(jax.grad(lambda v: (film.apply(v, tokens, covariates) ** 2).sum()))(fresh)
  assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.reported("CardiacNets' covariates acted before the blocks and without ReLU")
def test_gated_film_is_cardiacnets_formula():
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  tokens, covariates = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 6))
  film = pooling.GatedFiLM(jnp.float64)
  variables = init(film, jax.random.key(0), tokens, covariates)
  fc = variables["params"]["fc"]
  for x in (fc["kernel"], fc["bias"]):  # as torch.nn.Linear starts
    assert 0.5 / 6**0.5 < np.abs(x).max() <= 1 / 6**0.5
  variables = randomised(variables)
  fc = variables["params"]["fc"]
  fcs = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU()).double()
  weight, bias = (torch.tensor(np.array(x)) for x in (fc["kernel"].T, fc["bias"]))
  fcs.load_state_dict({"0.weight": weight, "0.bias": bias})
  gamma, beta = fcs(torch.tensor(covariates)).chunk(2, dim=-1)
  assert {(gamma == 0).any().item(), (gamma > 0).any().item()} == {True}  # the ReLU is seen at work
  expected = gamma[:, None] * torch.tensor(tokens) + beta[:, None]
  assert relative(film.apply(variables, tokens, covariates), expected.detach()) < 1e-12
  unknown = np.where(np.arange(6) % 2, np.nan, covariates)
  found, mean = (film.apply(variables, tokens, x) for x in (unknown, np.nan_to_num(unknown)))
  np.testing.assert_array_equal(found, mean)


# -------------------------------------------------------------------------------------------------------------
# registry

SPEC = dict(fn="video_vit", view="cine_slice", planes=4, size="test", patch=(2, 8, 8))
SIZES = {
  "slow_resnet": slow_resnet.SIZES,
  "resnet": plane_resnet.SIZES,
  "video_vit": video_vit.SIZES,
}


def complete(**changes):
  """SPEC with changes; of another tower without what only a video transformer has."""
  spec = SPEC | changes
  if spec["fn"] != "video_vit" and "patch" not in changes:
    del spec["patch"]
  return towers.complete_entry("x", spec)


@pytest.mark.parametrize(
  "fn, size, dtype, out",
  [
    *((fn, size, "bfloat16", jnp.float32) for fn, sizes in SIZES.items() for size in sizes),
    *((fn, "test", dtype, dtype) for fn in SIZES for dtype in ("float32", "float64")),
  ],
)
def test_backbones_are_called_alike(fn, size, dtype, out):
  class Tower(nn.Module):
    def setup(self):
      self.backbone = towers.build(complete(fn=fn, size=size), dtype=jnp.dtype(dtype))

    def __call__(self, *args):
      return self.backbone(*args)

  x = jax.ShapeDtypeStruct((2, 4, 16, 16), jnp.dtype(out))
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))

  def init(key, x, rows, keys):
    return Tower().init_with_output(key, x, rows, True, keys)

  (tokens, features), variables = jax.eval_shape(init, jax.random.key(0), x, jnp.ones(2), keys)
  numbers = SIZES[fn][size]
  if fn == "video_vit":
    width = numbers["width"]
  else:
    width = numbers["widths"][-1] * (4 if numbers["block"] is resnet.Bottleneck else 1)
  assert (features.shape, features.dtype) == ((2, width), out)
  assert tokens.ndim == 3 and (tokens.shape[::2], tokens.dtype) == ((2, width), out)
  assert list(variables["params"]) == ["backbone"]
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))


def test_a_video_tower_has_a_decoder_where_it_hides_patches():
  x, keys = jnp.zeros((2, 4, 16, 24)), jax.random.split(jax.random.key(0), 2)

  def init(m):
    return jax.eval_shape(lambda key: m.init(key, x, keys, method="reconstruct"), jax.random.key(0))

  assert "decoder" in init(towers.build(complete(mask_ratio=0.5)))["params"]
  plain = towers.build(complete())
  variables = jax.eval_shape(lambda key: plain.init(key, x), jax.random.key(0))
  assert "decoder" not in variables["params"]


def check(change):
  spec = complete(**{"mask_ratio": 0.5} | change)
  towers.build(spec).check("config.model.towers.x", (4, 16, 24))


@pytest.mark.parametrize(
  "change, says",
  [
    (
      dict(fn="swin"),
      ".fn is 'swin'; expected one of ecg_vit, st_mem, xresnet1d, s4, slow_resnet,",
    ),
    (dict(size="r50"), ".size is 'r50'; expected one of test, demo, small, base"),
    (dict(fn="resnet"), " sets mask_ratio, which resnet does not take; its parameters are size"),
    (dict(fn="slow_resnet", drop_path=0.1), " sets drop_path, mask_ratio, which slow_resnet does"),
    (dict(patch=(2, 8, 7)), "does not divide the input of 4 x 16 x 24"),
    (dict(patch=(3, 8, 8)), "does not divide the input of 4 x 16 x 24"),
    (dict(patch=(8, 8)), ".patch is (8, 8); expected three"),
    (dict(patch=(0, 8, 8)), ".patch is (0, 8, 8); expected three"),
    (dict(mask_ratio=1.0), ".mask_ratio is 1.0 of 12 patches"),
    (dict(mask_ratio=0.99), ".mask_ratio is 0.99 of 12 patches"),
    (dict(mask_ratio=-0.1), ".mask_ratio is -0.1 of 12 patches"),
    (dict(view="front"), ".view is 'front'; expected one of ed_volume"),
    (dict(planes=None), " does not set planes, how many of cine_slice the tower sees"),
  ],
)
def test_mistakes_of_a_config_are_one_line(change, says):
  with pytest.raises(UserError) as error:
    check(change)
  message = str(error.value)
  assert f"config.model.towers.x{says}" in message or says in message
  assert "\n" not in message


@pytest.mark.parametrize("change", [{}, dict(mask_ratio=0), dict(mask_ratio=0.9)])
def test_sound_configs_pass(change):
  check(change)


def test_a_tower_names_its_own_parameters_only():
  spec = towers.complete_entry("x", dict(fn="slow_resnet", view="ed_volume", planes=6, size="r50"))
  assert spec == dict(
    fn="slow_resnet", view="ed_volume", planes=6, width=0, frozen=False, size="r50"
  )
  towers.build(spec).check("config.model.towers.x", (4, 16, 24))
