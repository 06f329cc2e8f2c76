"""Localisation against what is known: identities of pooling, hand-made towers, NumPy, integrals in
closed form."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import tiny_config
from ml_collections import ConfigDict

from mmcl_jax import models
from mmcl_jax.data import schema
from mmcl_jax.evaluators import statistics
from mmcl_jax.models import inputs, kernels, towers, vit
from mmcl_jax.models.cmr_tower import select_view
from mmcl_jax.models.towers import ecg_vit, video_vit
from mmcl_jax.projects.localisation import drawings, evaluator, maps, score
from mmcl_jax.training import parallel, restore

SPECS = {
  "resnet": dict(fn="resnet", view="cine_slice", size="test", planes=3),
  "slow": dict(fn="slow_resnet", view="cine_slice", size="test", planes=4),
  "vit": dict(fn="video_vit", view="cine_slice", size="test", planes=4, patch=(2, 8, 8)),
}


def randomised(tree, seed=0):
  """The same shapes with numbers of which none is the neutral one; variances above 0."""
  leaves, form = jax.tree.flatten(tree)
  rng = np.random.default_rng(seed)

  def draw(x):
    return np.float32(rng.uniform(0.5, 1.5, x.shape) * rng.choice((0.3, 0.9), x.shape))

  return jax.tree.unflatten(form, [draw(x) for x in leaves])


# the towers, where they look


@pytest.mark.parametrize("kind", SPECS)
def test_features_are_the_mean_of_the_feature_map_and_cells_lie_where_it_says(kind):
  shape = (SPECS[kind]["planes"], 24, 40) if kind == "vit" else (SPECS[kind]["planes"], 21, 45)
  model = towers.build(SPECS[kind])
  x = jax.random.uniform(jax.random.key(0), (2, *shape))

  def both(key):
    variables = model.init(key, x, jnp.ones(2), False)
    if kind == "slow":  # slices of unlike weight, one below 0
      pool = variables["params"]["slice_pool"]
      variables["params"]["slice_pool"] = {
        "kernel": jnp.array([0.7, -0.2, 0.1, 0.6])[:, None],
        "bias": pool["bias"] + 0.3,
      }
    return model.apply(variables, x, jnp.ones(2), False)[1], model.apply(
      variables, x, method="feature_map"
    )

  features, cells = jax.jit(both)(jax.random.key(1))
  np.testing.assert_allclose(cells.mean(axis=(1, 2, 3)), features, rtol=1e-4, atol=1e-5)
  assert np.std(cells, axis=(2, 3)).max() > 0.01
  assert tuple(len(at) for at in model.centres(*shape)) == cells.shape[1:4]


def test_a_resnet_s_cell_is_in_the_middle_of_all_pixels_that_reach_it():
  model = towers.build(SPECS["slow"])
  x = jax.random.uniform(jax.random.key(0), (8, 4, 64, 72))

  def reach(key):
    variables = model.init(key, x, jnp.ones(8), False)
    return jax.grad(lambda x: model.apply(variables, x, method="feature_map")[:, :, 5, 7].sum())(x)

  seen = np.abs(jax.jit(reach)(jax.random.key(1))).max(axis=(0, 1)) > 0
  centres = model.centres(4, 64, 72)
  for axis, cell in ((0, 5), (1, 7)):
    pixels = np.flatnonzero(seen.any(axis=1 - axis))
    assert (pixels[0] + pixels[-1]) / 2 == centres[1 + axis][cell]


def test_a_patch_lies_where_its_pixels_do():
  model = towers.build(SPECS["vit"])
  places = np.stack(np.meshgrid(*map(np.arange, (4, 24, 40)), indexing="ij"))  # [3, T, H, W]
  middle = np.asarray(video_vit.patchify(places, (2, 8, 8))).mean(axis=2).reshape(3, 2, 3, 5)
  for axis, at in enumerate(model.centres(4, 24, 40)):
    along = np.moveaxis(middle[axis], axis, -1)
    np.testing.assert_allclose(along, np.broadcast_to(at, along.shape))


@pytest.mark.parametrize("pool", ecg_vit.POOLS)
def test_a_token_is_embedded_as_if_all_were_like_it(pool):
  tower = ecg_vit.EcgViT(dict(width=16, depth=0, heads=2), samples=40, patch=10, pool=pool)
  tokens = jax.random.normal(jax.random.key(0), (2, 48, 16))
  p = randomised(
    jax.eval_shape(lambda: tower.init(jax.random.key(1), jnp.zeros((1, 12, 40))))["params"]
  )
  found = tower.apply({"params": p}, tokens, method="locate")
  z, norm = np.asarray(tokens, np.float64), p["norm" if pool == "cls" else "fc_norm"]
  if pool == "attention":  # alone, a token has all of the attention: what is left is its value

    def dense(z, q):
      return z @ q["kernel"] + q["bias"]

    _, _, value = kernels.split_qkv(dense(z, p["pool"]["qkv"]), 2)
    z = dense(value.reshape(z.shape), p["pool"]["proj"])
  z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6) * norm[
    "scale"
  ] + norm["bias"]
  np.testing.assert_allclose(found, z, rtol=1e-3, atol=1e-4)


# maps of a tower made by hand

ECG = dict(fn="ecg_vit", view="ecg", size="test")


def by_hand():
  """A model whose cells say how bright their 8 x 8 pixels are, (b, 1 - b), and whose ECG says what
  is asked for: the first two samples of lead I."""

  def apply(variables, x, *args, method, **options):
    if method == "encode_ecg":
      return {"ecg_projection": x[:, 0, :2], "ecg_embedding": x[:, 0, :2]}
    planes = select_view(x if method == "locate_cmr" else x["cmr"], spec)
    b = planes.reshape(*planes.shape[:2], 4, 8, 4, 8).mean(axis=(3, 5))
    cells = jnp.stack([b, 1 - b], axis=-1)
    return (
      {"hand": cells}
      if method == "locate_cmr"
      else {"hand": {"projection": cells.mean(axis=(1, 2, 3))}}
    )

  spec = ConfigDict(
    dict(
      fn="video_vit",
      size="test",
      view="es_volume",
      planes=2,
      patch=(1, 8, 8),
    )
  )
  config = ConfigDict(
    dict(
      model=dict(fn="pretrainer", towers=dict(hand=spec.to_dict(), ecg=ECG)), data=dict(samples=20)
    )
  )
  return SimpleNamespace(
    model=SimpleNamespace(apply=apply, config=config.model), config=config, standardiser=None
  ), spec


def test_the_map_finds_a_planted_patch_and_another_ecg_does_not():
  """Three people with a bright patch in the second plane at ES; the second one's ECG asks for dark
  places."""
  run, spec = by_hand()
  # the last is padding
  records, subject = [], np.array([[1, 0], [2, 0], [3, 0], [0, 0]], np.uint32)
  corners = [(8, 16), (24, 0), (0, 24)]
  for row, column in corners:
    volumes, labels = np.full((2, 4, 32, 32), 50, np.uint8), np.zeros((2, 4, 32, 32), np.uint8)
    volumes[1, 2, row : row + 8, column : column + 8] = 250
    labels[1, 2, row + 2 : row + 6, column + 2 : column + 6] = schema.LABELS["LV"]
    labels[0, 2] = schema.LABELS["MYO"]  # ED: another tower's
    records.append({"ed_es_volumes": volumes, "labels": labels})
  asks = np.zeros((4, 12, 20), np.int16)
  asks[0, 0, 0] = asks[2, 0, 0] = asks[1, 0, 1] = 100
  rows = {
    "ecg": asks,
    "ecg_scale": np.ones(4, np.float32),
    "subject": subject,
    "mask": np.array([1, 1, 1, 0], np.uint8),
    "has_ecg": np.ones(4, np.uint8),
    "has_cmr": np.ones(4, np.uint8),
    "cmr": {
      "ed_es_volumes": np.stack(
        [r["ed_es_volumes"] for r in records] + [np.zeros((2, 4, 32, 32), np.uint8)]
      )
    },
  }
  found = {name: np.asarray(x)[:3] for name, x in jax.jit(maps.make_maps(run))(None, rows).items()}
  assert found["map/hand"].shape == (3, 2, 2, 4, 4)
  b = 250 / 255
  assert found["map/hand"][0, 0, 1, 1, 2] == pytest.approx(b / np.hypot(b, 1 - b), rel=1e-5)
  assert np.isnan(found["map/hand"][0, 1]).all()  # beside it is padding, nobody's ECG
  near = maps.enlarge(found["map/hand"][2, 0], spec, (2, 32, 32))
  assert (
    np.unravel_index(near.argmax(), near.shape)[0] == 1
    and near[1, 3:5, 27:29].min() > near[1, :, :16].max()
  )

  found["untrained_map/hand"] = np.zeros((3, 2, 2, 4, 4))  # says nothing
  scores = score.score({"hand": spec}, records, found, np.ones((5, 3)))
  assert list(scores) == ["hand/es"]
  heart = scores["hand/es"]["heart"]
  chance = 16 / 2048
  share = 16 / 205  # all 16 pixels among the most relevant tenth
  # the second person's ECG asks for dark places
  assert heart["value"] == pytest.approx(2 * share / 3) and heart["n"] == 3
  # the first's ECG finds the second's heart, the second's not the third's
  assert heart["another_ecg"] == pytest.approx(share / 2)
  assert heart["minus_another_ecg"] == pytest.approx(0) and heart[
    "minus_untrained"
  ] == pytest.approx(2 * share / 3 - chance)
  assert heart["untrained"] == pytest.approx(chance) == heart["chance"]
  assert scores["hand/es"]["LV"]["value"] == heart["value"] and scores["hand/es"]["MYO"]["n"] == 0
  assert (
    np.isnan(scores["hand/es"]["MYO"]["value"]) and np.isnan(scores["hand/es"]["MYO"]["ci"]).all()
  )


def test_enlarging_is_linear_between_the_centres_and_flat_outside():
  spec = dict(fn="video_vit", view="cine_slice", size="test", patch=(1, 2, 4))
  rows, columns = np.arange(3) * 2 + 0.5, np.arange(2) * 4 + 1.5
  cells = (10 * rows[:, None] + columns)[None]
  clipped = 10 * np.clip(np.arange(6), 0.5, 4.5)[:, None] + np.clip(np.arange(8), 1.5, 5.5)
  np.testing.assert_allclose(maps.enlarge(cells, spec, (1, 6, 8)), clipped[None])


# the score


def test_top_tenth_by_hand():
  relevance = np.array(
    [np.arange(20.0), np.zeros(20), [5, 5, 5, 7] + [0] * 16, [9] * 20, [np.nan] + [1] * 19]
  )
  weight = score.top_tenth(relevance)
  np.testing.assert_allclose(weight[0], [0] * 18 + [1, 1])
  np.testing.assert_allclose(weight[1], 0.1)
  np.testing.assert_allclose(weight[2], [1 / 3, 1 / 3, 1 / 3, 1] + [0] * 16)
  np.testing.assert_allclose(weight[:4].sum(axis=1), 2)
  assert np.isnan(score.top_tenth(np.full((1, 20), np.nan))).all()
  # a tenth of 11, rounded up
  np.testing.assert_allclose(score.top_tenth(np.arange(11.0)[None]).sum(), 2)
  inside = np.zeros((3, 20), bool)
  inside[0, 3], inside[1, :10] = True, True
  share = score.top_share(relevance[:4], inside)
  np.testing.assert_allclose(share[:, 0], [0, 0.05, 0.5, 0.05])
  np.testing.assert_allclose(share[:, 1], [0, 0.5, 1, 0.5])
  assert np.isnan(share[:, 2]).all()  # nothing to find


def test_top_share_is_the_slow_count():
  rng = np.random.default_rng(0)
  relevance, inside = rng.normal(size=(3, 237)), rng.random((2, 237)) < 0.3
  for q, found in enumerate(score.top_share(relevance, inside)):
    best = np.argsort(-relevance[q])[:24]
    np.testing.assert_allclose(found, inside[:, best].mean(axis=1))


def test_a_summary_is_the_mean_over_those_who_are_known_and_its_differences_are_paired():
  rng = np.random.default_rng(0)
  shares = rng.random((40, 4))
  shares[:5, 1], shares[30:, 0] = np.nan, np.nan
  subject = np.stack([np.arange(40) // 2, np.zeros(40)], axis=1)
  weights = statistics.bootstrap_weights(subject, 300, 0)
  found = score.summary(shares, weights)
  assert found["n"] == 30 and found["value"] == pytest.approx(shares[:30, 0].mean())
  assert found["minus_another_ecg"] == pytest.approx((shares[5:30, 0] - shares[5:30, 1]).mean())
  draws = [np.repeat(shares[:, 0] - shares[:, 2], w.astype(int)) for w in weights]
  np.testing.assert_allclose(
    found["minus_untrained_ci"], np.percentile([np.nanmean(d) for d in draws], [2.5, 97.5])
  )
  empty = score.summary(np.full((40, 4), np.nan), weights)
  assert empty["n"] == 0 and np.isnan([empty["value"], *empty["ci"], empty["chance"]]).all()


def test_the_labels_of_a_cine_are_of_the_slice_it_shows(cohort):
  """By the images: of all slices at ED, the one that looks like the first frame."""
  spec = ConfigDict(dict(view="cine_slice", planes=5))
  for i in range(5):
    record = cohort.splits["test"][i]
    ((phase, (planes, known)),) = score.truth(spec, record["labels"]).items()
    assert phase == "ed" and planes == slice(0, 1)
    alike = [
      np.corrcoef(record["cine_slice"][0].ravel(), plane.ravel())[0, 1]
      for plane in record["ed_es_volumes"][0]
    ]
    np.testing.assert_array_equal(known[0], record["labels"][0, np.argmax(alike)])


def test_labels_follow_the_view():
  labels = np.zeros((2, 6, 4, 4), np.uint8)
  labels += (
    np.arange(6, dtype=np.uint8)[:, None, None]
    + 10 * np.arange(2, dtype=np.uint8)[:, None, None, None]
  )

  def truth(view, planes=2):
    return score.truth(ConfigDict(dict(view=view, planes=planes)), labels)

  ((planes, known),) = truth("es_volume").values()
  assert planes == slice(None) and list(known[:, 0, 0]) == [12, 13]
  ((planes, known),) = truth("ed_slice").values()
  assert list(known[:, 0, 0]) == [2] and truth("lax") == {}
  labels[:, 1:5, 0, 0] = schema.LABELS["LV"]
  frames = truth("three_frames")
  assert {phase: (planes, known[0, 1, 1]) for phase, (planes, known) in frames.items()} == {
    "ed": (slice(0, 1), 3),
    "es": (slice(2, 3), 13),
  }
  labels[:] = 0
  assert not truth("cine_slice")["ed"][1].any()


# the whole model


@pytest.fixture(scope="module")
def run(cohort):
  """A Run as from a checkpoint: the joint recipe at its smallest, one tower frozen, with parameters
  of which none is neutral."""
  config = tiny_config(cohort.path)
  config.model.towers.es.frozen = True
  model = models.build(config.model, config.data.samples)
  example = inputs.example(config, cohort.info["shapes"], 0, 1)
  shapes = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0),
      jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example),
      jax.random.split(jax.random.key(0), 1),
    )
  )
  rng = np.random.default_rng(0)

  def draw(path, x):
    return np.float32(
      rng.uniform(0.5, 1.5, x.shape)
      if path[-1].key in ("scale", "var")
      else rng.normal(0, 0.3, x.shape)
    )

  params = jax.tree_util.tree_map_with_path(
    draw, {name: shapes[name] for name in ("params", "batch_stats")}
  )
  return restore.Run(
    config, model, parallel.make_mesh(-1, 1), 0, SimpleNamespace(variables=params), None, {}
  )


@pytest.fixture(scope="module")
def evaluated(run, cohort):
  with jax.set_mesh(run.mesh):
    return evaluator.evaluate(run, randomised(run.state.variables, 1), cohort, batch=8, draws=50)


def test_chance_is_the_share_of_the_labels_and_all_of_test_is_scored(evaluated, cohort):
  results, test = evaluated[0]["cosine"], cohort.splits["test"]
  assert list(results) == ["ed/ed", "es/es"]
  for p, name in enumerate(results):
    # the middle 6 of 12 slices
    labels = np.stack([test[i]["labels"][p, 3:9] for i in range(len(test))])
    for structure, values in (("heart", (1, 2, 3)), ("LV", (1,)), ("MYO", (2,))):
      found = results[name][structure]
      assert found["n"] == len(test)
      assert found["chance"] == pytest.approx(np.isin(labels, values).mean(axis=(1, 2, 3)).mean())
      assert 0 <= found["ci"][0] <= found["value"] <= found["ci"][1] <= 1


def test_integrated_gradients_are_complete_and_explain_the_model_s_own_cosine(
  run, evaluated, cohort
):
  """The gains against the cosines that the model itself gives; completeness to 2 % of the gain and
  0.0001."""
  completeness = evaluated[0]["completeness"]
  assert set(completeness) == {"ecg", "ed", "es"}
  records = [cohort.splits["test"][i] for i in range(2)]
  signal = np.stack([r["ecg"] * np.float32(r["ecg_scale"]) for r in records])
  volumes = np.stack([r["ed_es_volumes"] for r in records]).astype(np.float32) / 255

  @jax.jit
  def project(ecg, volumes):
    batch = {"mask": jnp.ones(2), "has_cmr": jnp.ones(2), "cmr": {"ed_es_volumes": volumes}}
    windows = [
      run.model.apply(run.state.variables, ecg[:, :, 500 * w : 500 * (w + 1)], method="encode_ecg")
      for w in range(10)
    ]
    towers = run.model.apply(run.state.variables, batch, method="encode_cmr")
    return (
      sum(w["ecg_projection"] for w in windows) / 10,
      towers["ed"]["projection"],
      towers["es"]["projection"],
    )

  def cosine(a, b):
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

  (ecg, *towers), (flat_ecg, *flat_towers) = (
    project(signal, volumes),
    project(0 * signal, 0 * volumes),
  )
  gains = {
    name: cosine(ecg, z) - cosine(ecg, flat)
    for name, z, flat in zip(("ed", "es"), towers, flat_towers)
  }
  gains["ecg"] = np.mean([cosine(ecg, z) - cosine(flat_ecg, z) for z in towers], axis=0)
  for name, found in completeness.items():
    np.testing.assert_allclose(found["gain"], gains[name], atol=1e-5)
    # ten times what the sum may be off by
    assert np.abs(found["gain"]).min() > 0.001, found
    np.testing.assert_allclose(found["sum"], found["gain"], rtol=0.02, atol=1e-4)
    assert found["error"] == pytest.approx(np.abs(np.subtract(found["sum"], found["gain"])).max())


def test_the_ecg_s_map_is_that_of_every_window_by_itself(run, evaluated, cohort):
  record = cohort.splits["test"][1]
  signal = (record["ecg"] * np.float32(record["ecg_scale"]))[None]
  windows = signal.reshape(12, 10, 500).swapaxes(0, 1)

  @jax.jit
  def direct(windows, volumes):
    batch = {"mask": jnp.ones(1), "has_cmr": jnp.ones(1), "cmr": {"ed_es_volumes": volumes}}
    towers = run.model.apply(run.state.variables, batch, method="encode_cmr")
    return (
      run.model.apply(run.state.variables, windows, method="locate_ecg"),
      [z["projection"][0] for z in towers.values()],
      maps.attention_map(run.model, run.state.variables, windows),
    )

  tokens, towers, attention = direct(
    windows, record["ed_es_volumes"][None].astype(np.float32) / 255
  )

  def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  # [window, lead, patch]
  near = np.mean([unit(tokens) @ unit(z) for z in towers], axis=0).reshape(10, 12, 5)
  shown = evaluated[1][1]["ecg"]
  np.testing.assert_allclose(shown["cosine"][7, 12], near[2, 7, 2], atol=1e-5)
  np.testing.assert_allclose(shown["cosine"], near.swapaxes(0, 1).reshape(12, 50), atol=1e-5)
  np.testing.assert_allclose(
    shown["attention"], np.reshape(attention, (10, 12, 5)).swapaxes(0, 1).reshape(12, 50), atol=1e-5
  )
  np.testing.assert_allclose(shown["seen"], signal[0], rtol=1e-6)


@pytest.mark.parametrize("pool, scan", [("mean", False), ("cls", True), ("attention", False)])
def test_attention_is_the_softmax_of_the_model_s_own_parameters(run, pool, scan):
  config = ConfigDict(run.config.model.to_dict())
  config.towers = {"ecg": config.towers.ecg.to_dict() | dict(pool=pool, mask_ratio=0.0)}
  config.scan = scan
  model = models.build(config, 500)
  signal = jax.random.normal(jax.random.key(0), (2, 12, 500))
  variables = {
    "params": randomised(
      jax.eval_shape(lambda: model.init(jax.random.key(0), signal[:1], method="encode_ecg"))[
        "params"
      ]
    )
  }
  params = variables["params"]["ecg"]

  @jax.jit
  def both(variables):
    return (
      maps.attention_map(model, variables, signal),
      model.bind(variables).ecg.tokens(signal)[:, 1:],
    )

  found, tokens = both(variables)
  x = (
    np.asarray(signal, np.float64).reshape(2, 60, 100) @ params["patch_embed"]["kernel"]
    + params["patch_embed"]["bias"]
  )
  x = x + ecg_vit.sincos_positions(60, 16)
  x = np.concatenate([np.broadcast_to(params["cls_token"], (2, 1, 16)), x], axis=1)

  def norm(z, q):
    return (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6) * q[
      "scale"
    ] + q["bias"]

  block = params["block0"]
  y, dense = (
    (np.asarray(tokens), params["pool"]["qkv"])
    if pool == "attention"
    else (norm(x, block["norm1"]), block["qkv"])
  )
  q, k, _ = (y @ dense["kernel"] + dense["bias"]).reshape(2, -1, 2, 3, 8).transpose(3, 0, 2, 1, 4)
  q = {"attention": q.mean(axis=2, keepdims=True), "cls": q[:, :, :1], "mean": q[:, :, 1:]}[pool]
  e = q @ k.swapaxes(-1, -2) / np.sqrt(8)
  rows = np.exp(e - e.max(-1, keepdims=True))
  rows /= rows.sum(-1, keepdims=True)
  ours = vit.attention_weights(*(np.float32(x.swapaxes(1, 2)) for x in (q, k)))
  np.testing.assert_allclose(ours, rows, atol=1e-4)
  np.testing.assert_allclose(ours.sum(axis=-1), 1, rtol=1e-5)
  expected = rows.mean(axis=(1, 2)) if pool == "attention" else rows.mean(axis=(1, 2))[:, 1:]
  np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-4)
  assert (found.sum(axis=1) <= 1 + 1e-5).all() and (
    pool != "attention" or np.allclose(found.sum(axis=1), 1, atol=1e-5)
  )


def test_integrated_gradients_of_a_function_whose_integral_is_known():
  """f(x, y) = sin(x) + x y^2: along (s x, s y) the integral of x df/dx is sin(x) + x y^2 / 3, of y
  df/dy 2 x y^2 / 3."""
  x, y = np.array([0.7, -2.0]), np.array([1.5, 0.3])

  def slope(share):
    return {"x": np.cos(share * x) + (share * y) ** 2, "y": 2 * share**2 * x * y}

  found = maps.integrated_gradients(slope, {"x": x, "y": y})
  np.testing.assert_allclose(found["x"], np.sin(x) + x * y**2 / 3, atol=2e-4)
  np.testing.assert_allclose(found["y"], 2 * x * y**2 / 3, atol=2e-4)
  linear = maps.integrated_gradients(lambda share: np.array([3.0, -1.0]), x)
  np.testing.assert_allclose(linear, [2.1, 2.0], rtol=1e-12)


def test_nobody_with_both_is_a_line_and_no_result(run, cohort, capsys):
  blank = [dict(cohort.splits["test"][i], has_cmr=np.bool_(False)) for i in range(3)]
  assert evaluator.evaluate(run, None, cohort._replace(splits={"test": blank}), batch=8) == (
    {},
    [],
  )
  assert "no localisation" in capsys.readouterr().out


def test_figures_draw_what_was_found(evaluated):
  _, examples = evaluated
  figures = drawings.relevance(examples, "a note")
  assert list(figures) == [
    "relevance_cmr_1",
    "relevance_ecg_1",
    "relevance_cmr_2",
    "relevance_ecg_2",
  ]
  towers, heart = examples[0]["towers"], figures["relevance_cmr_1"]
  assert len(heart.axes) == 2 * 2 * 6
  hatched = [any(c.get_gid() == "top" for c in axes.collections) for axes in heart.axes]
  contoured = [any(c.get_gid() == "LV" for c in axes.collections) for axes in heart.axes]
  rows = np.reshape([*hatched, *contoured], (2, 2, 6, 2))  # what, tower, plane, (cosine, gradients)
  for t, tower in enumerate(towers.values()):
    np.testing.assert_array_equal(rows[0, t, :, 0], tower["top"].any(axis=(1, 2)))
    assert not rows[0, t, :, 1].any()
    np.testing.assert_array_equal(rows[1, t, :, 1], (tower["labels"] == 1).any(axis=(1, 2)))
    top, cosine = tower["top"], tower["cosine"]
    assert top.sum() >= np.ceil(top.size / 10) and cosine[top].min() >= cosine[~top].max() - 2e-6
  page = figures["relevance_ecg_2"].axes[0]
  strips = {image.get_gid(): np.asarray(image.get_array())[0] for image in page.images}
  assert len(strips) == 36
  np.testing.assert_array_equal(strips["V1 attention"], examples[1]["ecg"]["attention"][6])
  assert all("a note" in [text.get_text() for text in figure.texts] for figure in figures.values())
