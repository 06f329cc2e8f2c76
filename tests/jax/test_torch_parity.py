"""Our models and losses against PyTorch with the same weights, through files: in float64 to 1e-9,
gradients to 1e-8.

float32 is held to bounds of its own; what was measured stands beside them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the parity tests need torch: pip install '.[torch]'")

import torch_models as published
from mmcl_jax import objectives
from mmcl_jax.interop import torch_weights
from mmcl_jax.models import heads
from mmcl_jax.objectives import contrastive, mae

B, L, PATCH, SAMPLES = 3, 12, 20, 100
WIDE = (32, 2, 4)  # width, blocks, heads: 8 channels a head
DECODER = (24, 2, 3)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def relative(found, expected):
  """Largest difference, relative to the largest expected value."""
  found, expected = (
    np.asarray(found, np.float64),
    np.asarray(expected.detach() if hasattr(expected, "detach") else expected, np.float64),
  )
  assert found.shape == expected.shape
  return np.abs(found - expected).max() / np.abs(expected).max()


def through_a_file(net, path, dtype="float64", **options):
  """Random weights, saved by torch and loaded here: the torch model, ours, its variables."""
  net = published.randomise(net.double()).eval()
  torch.save(net.state_dict(), path)
  return net, *torch_weights.load(path, dtype=dtype, **options)


def gradient_error(model, grads, net, unseen=()):
  """Largest difference of a gradient, relative to the global norm; all of torch's with a gradient
  are compared."""
  ours = torch_weights.state_dict(model, {"params": grads, "batch_stats": {}}, None)
  ours = {key.partition(".")[2]: x for key, x in ours.items()}
  theirs = {name: p.grad.numpy() for name, p in net.named_parameters() if p.grad is not None}
  compared = set(theirs) - set(unseen)
  assert compared <= set(ours)
  norm = np.sqrt(sum((g**2).sum() for g in theirs.values()))
  return max(np.abs(np.asarray(ours[name]) - theirs[name]).max() for name in compared) / norm


def ecgs(dtype=np.float64, seed=1):
  return np.random.default_rng(seed).normal(size=(B, L, SAMPLES)).astype(dtype)


POOLS = {
  "mean": ("mean", ("fc_norm",)),
  "attention": ("attention", ("fc_norm",)),
  "cls": ("cls", ("norm",)),
}


def vit(pool, tmp_path, dtype="float64", trained=False):
  width, depth, heads_ = WIDE
  kind, norms = POOLS[pool]
  net = published.ViT(width, depth, heads_, PATCH, SAMPLES, kind, norms, trained=trained)
  return through_a_file(net, tmp_path / "vit.pth", dtype, heads=heads_, pool=pool)


@pytest.mark.parametrize("trained", [False, True])  # positions: the fixed table, and others
@pytest.mark.parametrize("pool", POOLS)
def test_vit_encoder(pool, trained, tmp_path):
  """Measured: tokens and embedding 9e-16, gradients 9e-17 of the norm."""
  net, model, variables = vit(pool, tmp_path, trained=trained)
  assert model.config.towers.ecg.positions == ("learned" if trained else "sincos")
  x, rng = ecgs(), np.random.default_rng(2)
  a, b = rng.normal(size=(B, 60, WIDE[0])), rng.normal(size=(B, WIDE[0]))

  def loss(params):
    out = model.apply({"params": params}, x, method="encode_ecg")
    return (out["ecg_tokens"] * a).sum() + 10 * (out["ecg_embedding"] * b).sum(), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
  tokens = net.tokens(torch.tensor(x))
  embedding = net.embed(tokens)
  ((tokens[:, 1:] * torch.tensor(a)).sum() + 10 * (embedding * torch.tensor(b)).sum()).backward()
  assert relative(out["ecg_tokens"], tokens[:, 1:]) < 1e-9
  assert relative(out["ecg_embedding"], embedding) < 1e-9
  assert relative(out["ecg_projection"], embedding) < 1e-9  # no head in the file: the identity
  assert gradient_error(model, grads, net, unseen=() if trained else ("pos_embed",)) < 1e-8


def test_vit_encoder_in_float32(tmp_path):
  """Measured on a CPU: tokens 2.1e-7, embedding 1.5e-7 of the largest value."""
  net, model, variables = vit("mean", tmp_path, "float32")
  x = ecgs(np.float32)
  out = jax.jit(functools.partial(model.apply, method="encode_ecg"))(variables, x)
  tokens = net.tokens(torch.tensor(x).double())
  assert out["ecg_tokens"].dtype == jnp.float32
  assert relative(out["ecg_tokens"], tokens[:, 1:]) < 5e-6
  assert relative(out["ecg_embedding"], net.embed(tokens)) < 5e-6


def masked(tmp_path, dtype="float64"):
  width, depth, heads_ = WIDE
  net = published.MaskedAutoencoder(width, depth, heads_, PATCH, SAMPLES, DECODER)
  net, model, variables = through_a_file(
    net, tmp_path / "mae.pth", dtype, heads=heads_, decoder_heads=DECODER[2]
  )
  order = np.argsort(np.random.default_rng(3).random((B, 60)), axis=1)
  keep, restore = order[:, :12], np.argsort(order, axis=1)
  hidden = (restore >= 12).astype(np.float64).reshape(B, L, -1)

  def run(params, x):
    return model.apply({"params": params}, x, method=lambda m, x: m.ecg.fill_in(x, keep, restore))

  return net, model, variables, run, torch.tensor(keep), hidden


def test_masked_autoencoder_with_a_given_mask(tmp_path):
  """Prediction, loss and NCC as in MMCL's code (all patches, w = 0.1), masked MSE as in He et al.
  2022, and gradients.

  Measured: prediction 8e-16, losses 3e-16, gradients 8e-17 of the norm; 8e-12 where 1e-12 is added
  to variances, as MMCL does, not 1e-8.
  """
  net, model, variables, run, keep, hidden = masked(tmp_path)
  x = ecgs()
  batch = {"ecg": x, "mask": np.ones(B), "has_ecg": np.ones(B)}

  def loss(params):
    outputs = {"reconstruction": run(params, x), "patch_mask": hidden}
    found = mae.mae(outputs, batch, region="all", ncc_weight=0.1)
    return objectives.mean(found), (
      outputs["reconstruction"],
      found.metrics["ncc"],
      objectives.mean(mae.mae(outputs, batch, region="masked")),
    )

  (value, (y, ncc, masked_mse)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    variables["params"]
  )
  theirs = net.reconstruct(torch.tensor(x), keep)
  expected = published.mmcl_mae_loss(torch.tensor(x), theirs)
  expected.backward()
  assert relative(y, theirs) < 1e-9
  assert relative(value, expected) < 1e-9
  assert relative(ncc, published.ncc(torch.tensor(x), theirs, eps=1e-8)) < 1e-9
  assert (
    relative(masked_mse, published.masked_mse(torch.tensor(x), theirs, torch.tensor(hidden))) < 1e-9
  )
  assert relative(value, published.mmcl_mae_loss(torch.tensor(x), theirs, eps=1e-12)) < 1e-9
  assert gradient_error(model, grads, net, unseen=("pos_embed",)) < 1e-8


def test_masked_autoencoder_in_float32(tmp_path):
  """Measured on a CPU: 2.3e-7 of the largest value."""
  net, _, variables, run, keep, _ = masked(tmp_path, "float32")
  x = ecgs(np.float32)
  assert (
    relative(jax.jit(run)(variables["params"], x), net.reconstruct(torch.tensor(x).double(), keep))
    < 5e-6
  )


STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))


def resnet50():
  return published.ResNet(64, published.Bottleneck, STAGES), (2, 3, 24, 24), "image"


def slow_r50():
  stages = tuple((width, blocks, span) for (width, blocks), span in zip(STAGES, (1, 1, 3, 3)))
  return published.SlowResNet(64, stages, slices=4, fc=10), (2, 4, 24, 24), "ed"


@pytest.mark.parametrize("build", [resnet50, slow_r50])
def test_resnets_of_50_layers(build, tmp_path):
  """Evaluation mode, small images. Measured: ResNet-50 2e-15, gradients 2e-17 of the norm, float32
  6e-7; slow_r50 3e-15, 1e-16, 7e-7."""
  net, shape, tower = build()
  net, model, variables = through_a_file(net, tmp_path / "net.pth")
  x = np.random.default_rng(4).random(shape)

  def embed(params, model, statistics, x):
    variables = {"params": params, "batch_stats": statistics}
    y = model.apply(
      variables,
      x,
      method=lambda m, x: m.cmr[tower].embed(m.cmr[tower].features(x, jnp.ones(len(x)))),
    )
    return (y**2).sum(), y

  (_, y), grads = jax.jit(
    jax.value_and_grad(
      lambda params: embed(params, model, variables["batch_stats"], x), has_aux=True
    )
  )(variables["params"])
  # ours takes [0, 1] to [-1, 1] itself
  theirs = net(torch.tensor(2 * x[:, None] - 1 if build is slow_r50 else x))
  (theirs**2).sum().backward()
  assert relative(y, theirs) < 1e-9
  assert gradient_error(model, grads, net) < 1e-8
  model, variables = torch_weights.load(tmp_path / "net.pth")
  _, y = jax.jit(
    lambda variables, x: embed(variables["params"], model, variables["batch_stats"], x)
  )(variables, np.float32(x))
  assert y.dtype == jnp.float32 and relative(y, theirs) < 1e-5


@pytest.mark.parametrize("norm, train", [(False, False), (True, False), (True, True)])
def test_projection_heads(norm, train):
  """Measured: 4e-16, running statistics too."""
  net = published.randomise(published.Head(10, 14, 6, norm).double()).train(train)
  ours = heads.Projection(14, 6, norm)
  state = {key: x.numpy().copy() for key, x in net.state_dict().items()}
  last = "layers.3" if norm else "layers.2"
  params = {
    "fc1": {"kernel": state["layers.0.weight"].T},
    "fc2": {"kernel": state[f"{last}.weight"].T},
  }
  statistics = {}
  if norm:
    for name, key in (("norm1", "layers.1"), ("norm2", "layers.4")):
      params[name] = {"scale": state[f"{key}.weight"], "bias": state[f"{key}.bias"]}
      statistics[name] = {"mean": state[f"{key}.running_mean"], "var": state[f"{key}.running_var"]}
  else:
    params["fc1"]["bias"], params["fc2"]["bias"] = state["layers.0.bias"], state[f"{last}.bias"]
  x, w = np.random.default_rng(5).normal(size=(8, 10)), np.random.default_rng(6).normal(size=(8, 6))

  def loss(params):
    y, changed = ours.apply(
      {"params": params, "batch_stats": statistics}, x, None, train, mutable=["batch_stats"]
    )
    return (y * w).sum(), (y, changed)

  (_, (y, changed)), grads = jax.value_and_grad(loss, has_aux=True)(params)
  theirs = net(torch.tensor(x))
  (theirs * torch.tensor(w)).sum().backward()
  assert relative(y, theirs) < 1e-9
  norm_of = np.sqrt(sum((p.grad.numpy() ** 2).sum() for p in net.parameters()))
  pairs = [
    (grads["fc1"]["kernel"].T, net.layers[0].weight),
    (grads["fc2"]["kernel"].T, net.layers[-2 if norm else -1].weight),
  ]
  pairs += (
    [(grads["norm1"]["scale"], net.layers[1].weight), (grads["norm2"]["bias"], net.layers[4].bias)]
    if norm
    else [(grads["fc1"]["bias"], net.layers[0].bias), (grads["fc2"]["bias"], net.layers[2].bias)]
  )
  assert max(np.abs(np.asarray(g) - p.grad.numpy()).max() for g, p in pairs) < 1e-8 * norm_of
  if train:
    for name, key in (("norm1", "layers.1"), ("norm2", "layers.4")):
      assert (
        relative(changed["batch_stats"][name]["mean"], net.state_dict()[f"{key}.running_mean"])
        < 1e-9
      )
      assert (
        relative(changed["batch_stats"][name]["var"], net.state_dict()[f"{key}.running_var"]) < 1e-9
      )


def test_a_head_of_one_linear():
  net = published.randomise(torch.nn.Linear(10, 6).double())
  params = {"fc": {"kernel": net.weight.detach().numpy().T, "bias": net.bias.detach().numpy()}}
  x = np.random.default_rng(5).normal(size=(8, 10))
  assert relative(heads.Projection(0, 6).apply({"params": params}, x), net(torch.tensor(x))) < 1e-12


def projections(dtype=np.float64):
  rng = np.random.default_rng(7)
  return {name: rng.normal(size=(16, 9)).astype(dtype) for name in ("ecg", "ed", "es")}


BATCH = {
  "subject": np.stack([np.arange(16), np.zeros(16)], axis=1).astype(np.uint32),
  "mask": np.ones(16),
  "has_ecg": np.ones(16),
  "has_cmr": np.ones(16),
}
LOSSES = {
  "clip": (
    lambda o, b: contrastive.clip(o, b, a="ecg", b="ed", b_to_a=0.75, temperature=0.1),
    lambda p: published.clip_loss(p["ecg"], p["ed"], 0.1, 0.75),
  ),
  "three_pairs": (
    lambda o, b: contrastive.dual_phase(o, b, 1.0, 2.0, 0.5, temperature=0.07),
    lambda p: published.three_pair_loss(p["ecg"], p["ed"], p["es"], 0.07, (1.0, 2.0, 0.5)),
  ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype, bound", [(np.float64, 1e-9), (np.float32, 1e-6)])
def test_contrastive_losses(name, dtype, bound):
  """Measured: the same number in float64, 1.3e-8 in float32."""
  ours, theirs = LOSSES[name]
  values = projections(dtype)

  def outputs(p):
    return {
      "ecg_projection": p["ecg"],
      "cmr": {view: {"projection": p[view]} for view in ("ed", "es")},
    }

  value, grads = jax.value_and_grad(lambda p: objectives.mean(ours(outputs(p), BATCH)))(
    jax.tree.map(jnp.asarray, values)
  )
  tensors = {
    key: torch.tensor(x, dtype=torch.float64, requires_grad=True) for key, x in values.items()
  }
  expected = theirs(tensors)
  expected.backward()
  assert value.dtype == dtype or dtype == np.float32
  assert relative(value, expected) < bound
  norm = np.sqrt(sum((x.grad.numpy() ** 2).sum() for x in tensors.values() if x.grad is not None))
  for key, x in tensors.items():
    theirs_grad = np.zeros(x.shape) if x.grad is None else x.grad.numpy()
    assert np.abs(np.asarray(grads[key], np.float64) - theirs_grad).max() < 10 * bound * norm
