"""Model parts against independent forms of the same computation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import init
from jax import lax
from ml_collections import ConfigDict
from scipy import ndimage, stats
from scipy.special import erf

from mmcl_jax import configuration, models
from mmcl_jax.augment import cmr as augment_cmr, ecg as augment_ecg
from mmcl_jax.errors import UserError
from mmcl_jax.models import mae, resnet, vit
from mmcl_jax.models.cmr_tower import select_view
from mmcl_jax.models.towers import ecg_vit


def test_positions_are_the_published_formula():
  table = vit.sincos_2d(rows=3, columns=4, width=8)
  for token, row in enumerate(table):
    lead, time = token // 4, token % 4
    w = [1.0, 10000**-0.5]  # 10000^(-i / (width / 4))
    expected = [f(p * x) for p in (time, lead) for f in (np.sin, np.cos) for x in w]
    np.testing.assert_allclose(row, expected, rtol=1e-6)


def test_block_is_numpy_attention_and_mlp():
  block = vit.Block(heads=2)
  x = jax.random.normal(jax.random.key(0), (2, 5, 8))
  params = init(block, jax.random.key(1), x)["params"]
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

  def norm(z, q):
    return (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6) * q[
      "scale"
    ] + q["bias"]

  def dense(z, q):
    return z @ q["kernel"] + q["bias"]

  y = np.asarray(x, np.float64)
  q, k, v = dense(norm(y, p["norm1"]), p["qkv"]).reshape(2, 5, 2, 3, 4).transpose(3, 0, 2, 1, 4)
  logits = q @ k.swapaxes(-1, -2) / np.sqrt(4)
  attention = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  y = y + dense((attention @ v).transpose(0, 2, 1, 3).reshape(2, 5, 8), p["proj"])
  hidden = dense(norm(y, p["norm2"]), p["fc1"])
  y = y + dense(hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))), p["fc2"])
  np.testing.assert_allclose(block.apply({"params": params}, x), y, rtol=2e-5, atol=2e-5)


def test_mask_hides_the_right_share_and_belongs_to_the_sample():
  keys = jax.random.split(jax.random.key(0), 6)
  keep, restore, mask = mae.random_mask(keys, tokens=40, ratio=0.8)
  assert keep.shape == (6, 8) and (mask.sum(axis=1) == 32).all()
  for b in range(6):
    assert set(np.flatnonzero(mask[b] == 0)) == set(np.asarray(keep[b]))
    order = np.concatenate([keep[b], np.setdiff1d(np.arange(40), keep[b])])
    np.testing.assert_array_equal(
      order[restore[b]][np.asarray(mask[b]) == 0], np.flatnonzero(np.asarray(mask[b]) == 0)
    )
  permuted = mae.random_mask(keys[::-1], 40, 0.8)[2]
  np.testing.assert_array_equal(permuted, mask[::-1])
  assert not (mask[0] == mask[1]).all()


def ecg_tower(**changes):
  return ecg_vit.EcgViT(**(dict(size="test", samples=40, patch=10, mask_ratio=0.5) | changes))


def test_encoder_of_visible_tokens_sees_only_them():
  encoder = ecg_tower()
  x = jax.random.normal(jax.random.key(0), (2, 12, 40))
  variables = init(encoder, jax.random.key(1), x)

  @jax.jit
  def tokens(*args):
    return encoder.apply(variables, *args, method="tokens")

  keep = jnp.array([[0, 5, 47], [7, 2, 3]])
  seen = tokens(x, keep)
  hidden = (
    jnp.ones((2, 48)).at[jnp.arange(2)[:, None], keep].set(0).reshape(2, 12, 4).repeat(10, axis=2)
  )
  np.testing.assert_allclose(tokens(jnp.where(hidden > 0, 99.0, x), keep), seen, rtol=1e-6)
  everything = tokens(x, jnp.tile(jnp.arange(48), (2, 1)))
  np.testing.assert_allclose(everything, tokens(x), rtol=1e-5, atol=1e-6)


def test_learned_positions_start_as_the_fixed_ones_and_pools_differ_as_they_say():
  x = jax.random.normal(jax.random.key(0), (2, 12, 40))
  fixed, learned = ecg_tower(), ecg_tower(positions="learned")
  variables = init(learned, jax.random.key(1), x)
  params = dict(variables["params"])
  table = params.pop("pos_embed")
  assert table.shape == (1, 49, 16) and (table[:, 0] == 0).all()
  np.testing.assert_allclose(
    learned.apply(variables, x)[1], fixed.apply({"params": params}, x)[1], rtol=1e-5, atol=1e-6
  )
  moved = learned.apply(
    {"params": params | {"pos_embed": table.at[:, 0].add(1.0)}}, x, method="tokens"
  )
  assert not np.allclose(moved, learned.apply(variables, x, method="tokens"))
  by_cls = ecg_tower(pool="cls")
  cls = init(by_cls, jax.random.key(1), x)
  tokens = by_cls.apply(cls, x, method="tokens")
  z = np.asarray(tokens[:, 0], np.float64)
  expected = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(by_cls.apply(cls, x)[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.reported(
  "CardiacNets' covariates acted before the blocks and without ReLU",
  "CardiacNets' embedding was the mean token, not the class token",
)
def test_covariates_modulate_all_tokens_after_the_blocks_and_before_the_norm():
  x = jax.random.normal(jax.random.key(0), (2, 12, 40))
  covariates = jax.random.normal(jax.random.key(2), (2, 3))
  plain, tower = ecg_tower(pool="cls"), ecg_tower(pool="cls", film=True, film_after=True)
  variables = init(tower, jax.random.key(1), x, conditions=covariates)
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
  rest = {name: x for name, x in variables["params"].items() if name != "film"}
  before = np.asarray(plain.apply({"params": rest}, x, method="tokens"), np.float64)
  fc = p["film"]["fc"]
  gain, shift = np.split(np.maximum(covariates @ fc["kernel"] + fc["bias"], 0), 2, axis=1)
  after = gain[:, None] * before + shift[:, None]
  z = after[:, 0]
  expected = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
  tokens, embedding = tower.apply(variables, x, conditions=covariates)
  np.testing.assert_allclose(tokens, after[:, 1:], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(embedding, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.reported("CardiacNets' ECG encoder was trained without its dropout")
def test_dropout_is_timm_s_and_belongs_to_the_sample():
  keys = jax.random.split(jax.random.key(0), 400)
  x = vit.dropout(jnp.ones((400, 50)), keys, 0.25, 3)
  assert set(np.unique(x)) == {0.0, np.float32(1 / 0.75)}
  assert abs(float(x.mean()) - 1) < 4 * np.sqrt(0.25 / 0.75 / x.size)
  np.testing.assert_array_equal(vit.dropout(jnp.ones((400, 50)), keys[::-1], 0.25, 3), x[::-1])
  assert not (vit.dropout(jnp.ones((400, 50)), keys, 0.25, 4) == x).all()

  block, keys = vit.Block(heads=2, layer=5, dropout=0.4), keys[:2]
  x = jax.random.normal(jax.random.key(0), (2, 5, 8))
  variables = init(block, jax.random.key(1), x)
  np.testing.assert_array_equal(block.apply(variables, x), vit.Block(heads=2).apply(variables, x))
  p = variables["params"]

  def norm(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)

  def dense(x, name):
    return x @ p[name]["kernel"] + p[name]["bias"]

  def drop(x, i):
    return vit.dropout(x, keys, 0.4, 3 * 5 + i)

  q, k, v = jnp.moveaxis(dense(norm(x), "qkv").reshape(2, 5, 2, 3, 4), (3, 2), (0, 2))
  y = (jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2) @ v).swapaxes(1, 2).reshape(2, 5, 8)
  y = x + drop(dense(y, "proj"), 1)
  y = y + drop(dense(drop(nn.gelu(dense(norm(y), "fc1"), approximate=False), 2), "fc2"), 3)
  np.testing.assert_allclose(block.apply(variables, x, keys), y, rtol=1e-4, atol=1e-5)

  dropping, plain = ecg_tower(dropout=0.4), ecg_tower()
  ecgs = jax.random.normal(jax.random.key(0), (2, 12, 40))
  variables = init(plain, jax.random.key(1), ecgs)
  np.testing.assert_array_equal(dropping.apply(variables, ecgs)[1], plain.apply(variables, ecgs)[1])
  trained, steady = (
    tower.apply(variables, ecgs, None, True, keys)[1] for tower in (dropping, plain)
  )
  assert not np.allclose(trained, steady)


@pytest.mark.reported("MMCL's encoder started from scratch with MAE's weights and fixed positions")
def test_from_scratch_weights_and_positions_start_as_timm_has_them():
  x = jnp.zeros((2, 12, 40))
  size = dict(width=64, depth=2, heads=4)
  tower = ecg_tower(size=size, positions="learned", timm_start=True, mask_ratio=0.0)
  params = init(tower, jax.random.key(0), x)["params"]
  for leaf in (
    params["pos_embed"],
    params["block1"]["qkv"]["kernel"],
    params["block0"]["fc2"]["kernel"],
  ):
    assert stats.kstest(np.ravel(leaf), stats.norm(0, 0.02).cdf).pvalue > 1e-3
  assert np.abs(params["cls_token"]).max() < 1e-5
  assert not params["block0"]["fc1"]["bias"].any()
  uniform = stats.uniform(-(10**-0.5), 2 * 10**-0.5)  # a Conv over 10 samples, as torch starts it
  for leaf in params["patch_embed"].values():
    assert stats.kstest(np.ravel(leaf), uniform.cdf).pvalue > 1e-3


@pytest.mark.reported("the decoder of ecg_mae:base was 256 wide and 2 blocks deep, not 512 and 8")
def test_a_decoder_other_than_its_size_s():
  keys, x = jax.random.split(jax.random.key(0), 2), jnp.zeros((2, 12, 40))
  tower = ecg_tower(decoder=(24, 2, 3))
  params = jax.eval_shape(lambda: tower.init(jax.random.key(1), x, keys, method="reconstruct"))[
    "params"
  ]
  assert params["decoder"]["embed"]["kernel"].shape == (16, 24)
  assert {"block0", "block1"} == {name for name in params["decoder"] if name.startswith("block")}
  c = configuration.defaults(8, 6).model
  for decoder in ((24, 2), (26, 2, 2), (24, 2, 5)):
    c.towers.ecg = dict(fn="ecg_vit", view="ecg", size="test", patch=10, mask_ratio=0.5)
    c.towers.ecg.decoder = decoder
    with pytest.raises(UserError, match="config.model.towers.ecg.decoder is"):
      models.build(c, 40)


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


@pytest.mark.reported("SimSiam's heads had other widths, and a predictor without batch norm")
def test_two_views_go_through_the_published_siamese_heads(float64):
  """Projector 1024 wide, its last batch norm without scale; predictor 128 wide; each view by
  itself."""
  torch = pytest.importorskip("torch")
  tower, keys = (
    ecg_tower(siamese=True).clone(dtype=jnp.float64),
    jax.random.split(jax.random.key(0), 4),
  )
  x = jax.random.normal(jax.random.key(2), (4, 12, 40))
  variables = init(tower, jax.random.key(1), x, keys, method="reconstruct")
  params = variables["params"]
  other = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)

  def run(tower, x):
    views = [tower.encode_visible(x, seeds).tokens for seeds in (keys, other)]
    means = [tower.norm(view)[:, 1:].mean(axis=1) for view in views]
    return means, tower.reconstruct(x, keys, rows=jnp.ones(4), train=True)["siamese"]

  @jax.jit
  def apply(variables, x):
    return tower.apply(variables, x, method=run, mutable=["batch_stats"])

  (means, found), changed = apply(variables, x)

  def theirs(name, width, end):
    p = params[f"siamese_{name}"]
    assert {f"{layer}/{leaf}" for layer, leaves in p.items() for leaf in leaves} == {
      "fc1/kernel",
      "fc2/kernel",
      "norm1/scale",
      "norm1/bias",
    }
    into, out = (torch.nn.Linear(*sides, bias=False) for sides in ((16, width), (width, 16)))
    for layer, part in ((into, "fc1"), (out, "fc2")):
      layer.weight.data = torch.tensor(np.array(p[part]["kernel"].T, np.float64))
    return torch.nn.Sequential(
      into, torch.nn.BatchNorm1d(width), torch.nn.ReLU(), out, *end
    ).double()

  projector = theirs("projector", 1024, [torch.nn.BatchNorm1d(16, affine=False)])
  predictor = theirs("predictor", 128, [])
  for i, mean in enumerate(means):
    z = projector(torch.tensor(np.array(mean)))
    np.testing.assert_allclose(found["projection"][i], z.detach(), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found["prediction"][i], predictor(z).detach(), rtol=1e-9, atol=1e-9)
  running = changed["batch_stats"]["siamese_projector"]["norm2"]
  np.testing.assert_allclose(running["var"], projector[4].running_var, rtol=1e-6)


def test_decoder_puts_visible_patches_where_they_were():
  """Without blocks, each visible token passes through the linear layers alone and comes out at its
  own place."""
  decoder = mae.Decoder(width=4, depth=0, heads=1, patch=4)
  keep, restore, _ = mae.random_mask(jax.random.split(jax.random.key(0), 2), 12, 0.5)
  tokens = jnp.concatenate(
    [jnp.zeros((2, 1, 4)), jax.random.normal(jax.random.key(2), (2, 6, 4))], axis=1
  )
  params = decoder.init(jax.random.key(1), tokens, restore, 3)["params"]
  out = decoder.apply({"params": params}, tokens, restore, 3).reshape(2, 12, 4)
  position = vit.sincos_2d(3, 4, 4)

  def norm(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)

  for b in range(2):
    for i, place in enumerate(np.asarray(keep[b])):
      x = tokens[b, 1 + i] @ params["embed"]["kernel"] + position[place]
      np.testing.assert_allclose(
        out[b, place], norm(x) @ params["pred"]["kernel"], rtol=1e-4, atol=1e-5
      )


def test_drop_path_keeps_the_mean_and_belongs_to_the_sample():
  keys = jax.random.split(jax.random.key(0), 4000)
  x = vit.drop_path(jnp.ones((4000, 1)), keys, 0.25, layer=3)
  assert set(np.unique(x)) == {0.0, np.float32(1 / 0.75)}
  assert abs(float(x.mean()) - 1) < 4 * np.sqrt(0.25 / 0.75 / 4000)
  np.testing.assert_array_equal(vit.drop_path(jnp.ones((4000, 1)), keys[::-1], 0.25, 3), x[::-1])


@pytest.mark.parametrize("stride, span", [(1, 1), (2, 3)])
def test_bottleneck_is_the_3d_convolutions_it_stands_for(stride, span):
  block = resnet.Bottleneck(width=3, stride=stride, span=span, dtype=jnp.float32)
  x = jax.random.normal(jax.random.key(0), (2, 5, 8, 8, 4))
  rows = jnp.ones(2)
  variables = init(block, jax.random.key(1), x, rows, train=False)
  p = variables["params"] | {"norm3": {"scale": jnp.full(12, 0.7), "bias": jnp.full(12, 0.1)}}

  def conv(y, w, s, pad):
    return lax.conv_general_dilated(
      y, w, (1, s, s), pad, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )

  # fresh statistics: 0, 1
  def still(y, name):
    return y / np.sqrt(1 + 1e-5) * p[name]["scale"] + p[name]["bias"]

  flat = ((0, 0),) * 3
  # slices beside each other = kernel over slices
  w1 = p["conv1"]["kernel"].reshape(span, 1, 1, 4, 3)
  y = nn.relu(still(conv(x, w1, 1, ((span // 2,) * 2, (0, 0), (0, 0))), "norm1"))
  y = nn.relu(still(conv(y, p["conv2"]["kernel"][None], stride, ((0, 0), (1, 1), (1, 1))), "norm2"))
  y = still(conv(y, p["conv3"]["kernel"].reshape(1, 1, 1, 3, 12), 1, flat), "norm3")
  skip = still(conv(x, p["skip"]["kernel"].reshape(1, 1, 1, 4, 12), stride, flat), "skip_norm")
  out = block.apply({"params": p, "batch_stats": variables["batch_stats"]}, x, rows, train=False)
  np.testing.assert_allclose(out, nn.relu(skip + y), rtol=1e-4, atol=1e-5)


def test_max_pool_and_its_gradient_are_flax_s():
  x = jax.random.normal(jax.random.key(0), (2, 8, 6, 3))

  def theirs(x):
    return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))

  np.testing.assert_array_equal(resnet.max_pool(x), theirs(x))
  w = jax.random.normal(jax.random.key(1), theirs(x).shape)

  def gradient(f):
    return jax.grad(lambda x: (f(x) * w).sum())(x)

  grads = [gradient(f) for f in (resnet.max_pool, theirs)]
  np.testing.assert_allclose(*grads, rtol=1e-6)


def test_padding_rows_stay_out_of_the_batch_statistics():
  norm = resnet.BatchNorm(jnp.float32)
  x = jax.random.normal(jax.random.key(0), (4, 5, 3))
  variables = init(norm, jax.random.key(1), x, jnp.ones(4), train=False)
  rows = jnp.array([1.0, 1.0, 0.0, 1.0])
  y, changed = norm.apply(variables, x.at[2].set(1e3), rows, train=True, mutable=["batch_stats"])
  kept = np.asarray(x)[[0, 1, 3]].reshape(-1, 3)
  np.testing.assert_allclose(
    changed["batch_stats"]["mean"], 0.1 * kept.mean(0), rtol=1e-4, atol=1e-6
  )
  np.testing.assert_allclose(
    changed["batch_stats"]["var"], 0.9 + 0.1 * kept.var(0, ddof=1), rtol=1e-4
  )
  np.testing.assert_allclose(
    np.asarray(y)[[0, 1, 3]].reshape(-1, 3),
    (kept - kept.mean(0)) / np.sqrt(kept.var(0) + 1e-5),
    rtol=1e-3,
    atol=1e-4,
  )


def test_a_tower_sees_the_planes_that_it_names():
  cmr = {
    "ed_es_volumes": np.arange(2 * 10.0).reshape(1, 2, 10, 1, 1),
    "cine_slice": np.arange(25.0).reshape(1, 25, 1, 1),
    "three_frames": np.arange(3.0).reshape(1, 3, 1, 1),
  }

  def seen(view, planes):
    return list(select_view(cmr, ConfigDict(dict(view=view, planes=planes))).ravel())

  assert seen("ed_volume", 4) == [3, 4, 5, 6] and seen("es_volume", 4) == [13, 14, 15, 16]
  assert seen("ed_slice", 99) == [4] == seen("ed_volume", 1)
  assert seen("cine_slice", 5) == [0, 5, 10, 15, 20] and seen("cine_slice", 25) == list(range(25))
  assert seen("three_frames", 0) == [0, 1, 2]


def test_rotation_is_scipy_s_and_the_same_for_both_phases():
  key, cmr = jax.random.key(3), jax.random.uniform(jax.random.key(0), (2, 1, 16, 16))
  cmr = cmr.at[1].set(cmr[0])
  out = np.asarray(augment_cmr.affine(key, cmr, rotation_deg=30.0, scale=0.0, shift=0.0))
  np.testing.assert_array_equal(out[0], out[1])
  angle = np.deg2rad(30.0 * float(jax.random.uniform(key, (4,), minval=-1.0)[0]))
  turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
  offset = np.array([7.5, 7.5]) - turn @ np.array([7.5, 7.5])
  expected = ndimage.affine_transform(np.asarray(cmr[0, 0]), turn, offset, order=1, mode="nearest")
  np.testing.assert_allclose(out[0, 0], expected, atol=1e-4)


def test_phase_noise_keeps_the_power_spectrum_and_the_phase_between_leads():
  ecg = np.asarray(jax.random.normal(jax.random.key(0), (3, 500)))
  noisy = np.asarray(augment_ecg.phase_noise(jax.random.key(1), ecg, 0.5, probability=1.0))
  before, after = np.fft.rfft(ecg), np.fft.rfft(noisy)
  np.testing.assert_allclose(np.abs(after[:, :-1]), np.abs(before[:, :-1]), rtol=1e-2, atol=1e-2)
  turn = np.angle(after[:, 1:-1] / before[:, 1:-1])
  np.testing.assert_allclose(np.exp(1j * turn[0]), np.exp(1j * turn[1]), atol=1e-2)
  assert np.abs(turn).max() > 0.5


def test_crop_is_one_window_of_all_leads():
  ecg = jnp.arange(2 * 100.0).reshape(2, 100)
  starts = set()
  for i in range(50):
    window = np.asarray(augment_ecg.crop(jax.random.key(i), ecg, 90))
    np.testing.assert_array_equal(
      window, np.asarray(ecg)[:, int(window[0, 0]) : int(window[0, 0]) + 90]
    )
    starts.add(int(window[0, 0]))
  assert min(starts) == 0 and max(starts) == 10  # both ends are reached: 50 draws from 11 places
