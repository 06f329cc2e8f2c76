"""AdamW against torch and NumPy, and which parameters are frozen, decayed and slowed down."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import python
from ml_collections import ConfigDict

from mmcl_jax.errors import UserError
from mmcl_jax.training import checkpoint, parallel, state as state_lib

DEPTH = 2


def a_config(
  freeze=(), frozen=False, rates=(), layer_decay=1.0, clip=0.0, warmup=3, steps=12, l2=False
):
  return ConfigDict(
    dict(
      steps=steps,
      freeze=freeze,
      model=dict(towers=dict(ed=dict(frozen=frozen))),
      optimizer=dict(
        learning_rate=0.02,
        warmup=warmup,
        b1=0.9,
        b2=0.95,
        weight_decay=0.3,
        clip=clip,
        rates=rates,
        layer_decay=layer_decay,
        l2=l2,
        ema=0.0,
      ),
    )
  )


def variables(seed=0, dtype=np.float32):
  """Parameters of an ECG tower of DEPTH blocks with a decoder, a CMR tower and a head, and batch
  statistics."""
  rng = np.random.default_rng(seed)

  def x(*shape):
    return rng.normal(size=shape).astype(dtype)

  def dense():
    return {"kernel": x(3, 2), "bias": x(2)}

  def norm():
    return {"scale": x(2), "bias": x(2)}

  def block():
    return {"norm1": norm(), "qkv": dense()}

  ecg = {
    "patch_embed": dense(),
    "cls_token": x(1, 1, 2),
    "pos_embed": x(1, 25, 2),
    "norm": norm(),
    "fc_norm": norm(),
    "decoder": {"mask_token": x(1, 1, 2), "block0": block()},
  }
  ecg |= {f"block{i}": block() for i in range(DEPTH)}
  params = {
    "ecg": ecg,
    "cmr_ed": {"backbone": {"stem": {"kernel": x(3, 3, 1, 2)}, "bn": norm()}, "fc": dense()},
    "head_ecg": {"fc1": dense(), "norm1": {"bn": norm()}},
    "log_scale": x(),
  }

  def moving():
    return {"bn": {"mean": x(2), "var": x(2)}}

  return params, {"cmr_ed": {"backbone": moving()}, "head_ecg": {"norm1": moving()}}


def flat(tree):
  return {
    state_lib.path_name(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def rate(step, warmup, steps):
  """Multiple of the peak learning rate, written from its definition."""
  return (
    step / warmup
    if step < warmup
    else 0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup)))
  )


def numpy_adamw(params, grads, config, frozen, factor):
  """{path: array}, several {path: gradient} -> parameters after them, float64; frozen, factor:
  functions of a path."""
  c, p = config.optimizer, {path: np.float64(x) for path, x in params.items()}
  m, v = ({path: np.zeros_like(x) for path, x in p.items()} for _ in range(2))
  for step, g in enumerate(grads):
    g = {path: np.float64(x) for path, x in g.items() if not frozen(path)}
    norm = np.sqrt(sum((x**2).sum() for x in g.values()))
    for path, x in g.items():
      x = x * min(1, c.clip / norm) if c.clip else x
      m[path] = c.b1 * m[path] + (1 - c.b1) * x
      v[path] = c.b2 * v[path] + (1 - c.b2) * x**2
      direction = (
        m[path] / (1 - c.b1 ** (step + 1)) / (np.sqrt(v[path] / (1 - c.b2 ** (step + 1))) + 1e-8)
      )
      decay = c.weight_decay * p[path] * path.endswith("kernel")
      p[path] = p[path] - c.learning_rate * rate(step, c.warmup, config.steps) * factor(path) * (
        direction + decay
      )
  return p


def run(config, params, grads):
  """Parameters after these gradients by the package, and the optimiser's state."""
  tx = state_lib.optimizer(config, params)
  params, opt_state = jax.tree.map(jnp.asarray, params), tx.init(params)
  update = jax.jit(tx.update)
  for g in grads:
    updates, opt_state = update(g, opt_state, params)
    params = optax.apply_updates(params, updates)
  return params, opt_state


def some_gradients(params, count, seed=1):
  rng = np.random.default_rng(seed)

  def gradient(scale):
    return jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(x.dtype), params)

  return [gradient(10.0 ** (i % 3 - 1)) for i in range(count)]


# -- Against torch --


def error_against_torch(dtype, l2=False):
  """Largest difference after 20 clipped gradients, relative to the tensor's scale; torch has groups
  for the factors."""
  import torch

  config = a_config(
    clip=1.0, warmup=5, steps=20, rates=(("^cmr_ed/", 0.1),), layer_decay=0.65, l2=l2
  )
  c, (params, _) = config.optimizer, variables(dtype=dtype)
  grads = some_gradients(params, 20)
  theirs = {path: torch.tensor(x, requires_grad=True) for path, x in flat(params).items()}

  def factor(path):
    return 0.1 if path.startswith("cmr_ed/") else expected_factor(path, 0.65)

  def decays(path):
    return l2 or path.endswith("kernel")

  kind = torch.optim.Adam if l2 else torch.optim.AdamW
  tx = kind(
    [
      dict(
        params=[x],
        lr=c.learning_rate * factor(path),
        weight_decay=c.weight_decay if decays(path) else 0.0,
      )
      for path, x in theirs.items()
    ],
    betas=(c.b1, c.b2),
    eps=1e-8,
  )
  schedule = torch.optim.lr_scheduler.LambdaLR(tx, lambda step: rate(step, c.warmup, config.steps))
  for g in map(flat, grads):
    norm = np.sqrt(sum((np.float64(x) ** 2).sum() for x in g.values()))
    for path, x in theirs.items():
      x.grad = torch.tensor(np.asarray(g[path] * min(1, c.clip / norm), dtype))
    tx.step()
    schedule.step()
  ours, theirs = (
    flat(run(config, params, grads)[0]),
    {path: x.detach().numpy() for path, x in theirs.items()},
  )
  assert all(x.dtype == dtype for x in ours.values())
  assert all(np.abs(theirs[path] - x).max() > 1e-4 for path, x in flat(params).items())
  return max(np.abs(ours[path] - x).max() / np.abs(x).max() for path, x in theirs.items())


@pytest.mark.reported("MMCL's Adam with L2 was AdamW")
def test_adamw_adam_with_l2_and_schedule_are_those_of_torch():
  pytest.importorskip("torch")
  assert error_against_torch(np.float32) < 3e-6  # measured 6e-7
  assert error_against_torch(np.float32, l2=True) < 3e-6  # measured 7e-7
  code = (
    "import jax, numpy; jax.config.update('jax_enable_x64', True)\n"
    "import test_optimizer; print(test_optimizer.error_against_torch(numpy.float64))"
  )
  assert float(python(code)) < 1e-7  # measured 2e-9: the schedule is computed in float32


@pytest.mark.reported("what MMCL's Adam with L2 does to a weight was asserted, not computed")
@pytest.mark.parametrize("l2", [True, False])
def test_l2_takes_off_as_much_more_as_the_gradient_is_below_one(l2):
  """docs/recipes.md: over a run AdamW leaves exp(-w sum of rates) of a weight that gradients do not
  move, Adam's L2 exp(-w / rms sum of rates), where w / rms is small."""
  rms, decay, steps = 0.1, 0.003, 4000
  config = a_config(steps=steps, warmup=1, l2=l2)
  config.optimizer.update(learning_rate=0.02, weight_decay=decay, b2=0.999)
  params = {"ecg": {"block0": {"kernel": np.ones((40, 50), np.float32)}}}
  tx = state_lib.optimizer(config, params)

  def step(carry, key):
    params, opt_state = carry

    def noise(x):
      """Each row with its opposite, so that the mean weight does not wander with the draws."""
      half = jax.random.normal(key, (x.shape[0] // 2, x.shape[1]))
      return rms * jnp.concatenate([half, -half])

    updates, opt_state = tx.update(jax.tree.map(noise, params), opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), None

  keys = jax.random.split(jax.random.key(0), steps)
  (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
  rates = sum(0.02 * rate(i, 1, steps) for i in range(steps))
  left = np.exp(-decay * rates / (rms if l2 else 1))
  assert params["ecg"]["block0"]["kernel"].mean() == pytest.approx(left, rel=0.05)


# -- Against NumPy --


def expected_factor(path, decay):
  """By hand for DEPTH = 2: layers 0, 1, 2 and 3."""
  for prefix, power in (
    ("patch_embed/", 3),
    ("cls_token", 3),
    ("pos_embed", 3),
    ("block0/", 2),
    ("block1/", 1),
  ):
    if path.startswith(f"ecg/{prefix}"):
      return decay**power
  return 1.0


@pytest.mark.parametrize(
  "case",
  [
    dict(),
    dict(clip=0.5),
    dict(layer_decay=0.5),
    dict(rates=(("^ecg/block1", 0.1), ("^ecg/", 10.0))),
    dict(
      rates=(("kernel$", 0.3),),
      layer_decay=0.75,
      clip=1.0,
      frozen=True,
      freeze=("^ecg/block0/", "cls_token"),
    ),
  ],
)
def test_updates_are_their_formula(case):
  config, (params, _) = a_config(**case), variables()
  grads = some_gradients(params, 8)

  def frozen(path):
    return (
      path.startswith("cmr_ed/backbone/")
      and config.model.towers.ed.frozen
      or any(re.search(regex, path) for regex in config.freeze)
    )

  def factor(path):
    first = [f for regex, f in config.optimizer.rates if re.search(regex, path)][:1]
    return expected_factor(path, config.optimizer.layer_decay) * (first[0] if first else 1.0)

  found = flat(run(config, params, grads)[0])
  wanted = numpy_adamw(flat(params), map(flat, grads), config, frozen, factor)
  for path, before in flat(params).items():
    if frozen(path):
      assert found[path].tobytes() == before.tobytes(), path
    else:
      np.testing.assert_allclose(found[path], wanted[path], rtol=2e-5, atol=2e-6, err_msg=path)
      assert not np.array_equal(found[path], before), path


def test_frozen_parameters_cost_no_moments_and_leave_the_norm_alone():
  params, _ = variables()
  config = a_config(freeze=("^ecg/",), frozen=True, clip=1.0)
  grads = some_gradients(params, 4)
  wild = [g | {"ecg": jax.tree.map(lambda x: x * np.float32(1e20), g["ecg"])} for g in grads]
  wild[2]["ecg"]["cls_token"][:] = np.nan
  first, second = run(config, params, grads), run(config, params, wild)
  jax.tree.map(np.testing.assert_array_equal, first, second)
  moments = [path for path in flat(first[1]) if "/mu/" in path or "/nu/" in path]
  assert len(moments) == 2 * len(
    [path for path in flat(params) if not path.startswith(("ecg/", "cmr_ed/backbone/"))]
  )
  assert not any("ecg/" in path.replace("head_ecg/", "") or "backbone" in path for path in moments)


def test_no_gradient_reaches_frozen_parameters():
  params, _ = variables()
  treatment = state_lib.treatments(a_config(freeze=("^ecg/",)), params)

  def square(p):
    return sum((x**2).sum() for x in jax.tree.leaves(state_lib.stop_frozen(p, treatment)))

  for path, gradient in flat(jax.grad(square)(params)).items():
    np.testing.assert_array_equal(
      gradient, 0 if path.startswith("ecg/") else 2 * flat(params)[path], err_msg=path
    )


def test_the_state_survives_a_checkpoint_and_is_sharded_by_rule(tmp_path):
  """Masked moments are saved, restored and placed like any others."""
  params, _ = variables()
  config = a_config(freeze=("^ecg/",))
  tx = state_lib.optimizer(config, params)
  mesh = parallel.make_mesh(-1, 1)
  state = state_lib.TrainState(
    jnp.int32(3), params, {}, run(config, params, some_gradients(params, 1))[1]
  )
  shapes = jax.eval_shape(lambda: state)
  where = parallel.shardings(shapes, ((r"head_ecg/fc1/kernel", (None, "model")),), mesh)
  split = [
    path
    for path, s in flat(jax.tree.map(lambda s: str(s.spec), where)).items()
    if "model" in str(s)
  ]
  assert len(split) == 3  # the parameter and its two moments
  checkpoints = checkpoint.Checkpoints(str(tmp_path), keep=1)
  checkpoints.save(3, jax.device_put(state, where), data={}, meta={})
  checkpoints.close()
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
  )
  found, _, _ = checkpoint.restore(str(tmp_path), 3, abstract)
  assert jax.tree.structure(found) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, found, state)
  updates, _ = tx.update(params, found.opt_state, params)
  assert np.isfinite(flat(updates)["log_scale"]) and not flat(updates)["ecg/cls_token"].any()


# -- Who is treated how --


def test_only_kernels_decay():
  params, _ = variables()
  decayed = {path for path, t in state_lib.treatments(a_config(), params).items() if t.decayed}
  assert decayed == {path for path in flat(params) if path.endswith("/kernel")}
  assert not decayed & {
    "ecg/pos_embed",
    "ecg/cls_token",
    "ecg/decoder/mask_token",
    "log_scale",
    "ecg/norm/scale",
  }


def test_layers_of_the_ecg_tower():
  params, _ = variables()
  found = state_lib.treatments(a_config(layer_decay=0.5), jax.eval_shape(lambda: params))
  assert {path: t.factor for path, t in found.items()} == {
    path: expected_factor(path, 0.5) for path in flat(params)
  }
  assert found["ecg/decoder/block0/qkv/kernel"].factor == found["ecg/fc_norm/scale"].factor == 1.0


def test_the_first_rate_that_matches_counts():
  params, _ = variables()
  found = state_lib.treatments(
    a_config(rates=(("^ecg/block1/", 0.1), ["^ecg/", 0.2]), layer_decay=0.5), params
  )
  assert found["ecg/block1/qkv/bias"].factor == pytest.approx(0.1 * 0.5)
  assert found["ecg/block0/qkv/bias"].factor == pytest.approx(0.2 * 0.25)
  assert found["ecg/norm/bias"].factor == 0.2 and found["head_ecg/fc1/kernel"].factor == 1.0


def test_a_frozen_tower_is_its_backbone():
  params, statistics = variables()
  found = state_lib.treatments(a_config(frozen=True), params, statistics)
  assert {path for path, t in found.items() if t.frozen} == {
    "cmr_ed/backbone/stem/kernel",
    "cmr_ed/backbone/bn/scale",
    "cmr_ed/backbone/bn/bias",
  }


@pytest.mark.parametrize(
  "case, text",
  [
    (
      dict(freeze=("^ecg_encoder/",)),
      "'^ecg_encoder/', which matches no parameter; parameters are cmr_ed/",
    ),
    (dict(freeze="^ecg/"), "expected a tuple of regexes"),
    (dict(freeze=("ecg(",)), "which is no regex"),
    (dict(freeze=("backbone/stem",)), "set config.model.towers.ed.frozen=True"),
    (dict(freeze=("^cmr_ed/",)), "batch statistics of cmr_ed/backbone would go on changing"),
    (dict(freeze=("^head_ecg/norm1",)), "leave it out of config.freeze"),
    (
      dict(rates=(("^nothing", 0.1),)),
      "config.optimizer.rates has '^nothing', which matches no trained parameter",
    ),
    (
      dict(rates=(("^ecg/", 0.1), ("^ecg/block0", 0.2))),
      "'^ecg/block0', which matches no trained parameter",
    ),
    (dict(rates=(("^ecg/", 0.1),), freeze=("^ecg/",)), "matches no trained parameter"),
    (dict(rates=("^ecg/", 0.1)), "expected pairs of a regex and a positive factor"),
  ],
)
def test_mistakes_are_one_line(case, text):
  params, statistics = variables()
  with pytest.raises(UserError, match=re.escape(text)) as raised:
    state_lib.optimizer(a_config(**case), params, statistics)
  assert "\n" not in str(raised.value)


def test_what_may_be_frozen_beside_batch_statistics():
  params, statistics = variables()
  found = state_lib.treatments(
    a_config(freeze=("^cmr_ed/fc/", "^head_ecg/fc1/"), frozen=True), params, statistics
  )
  assert sum(t.frozen for t in found.values()) == 7
  # says it twice
  everything = state_lib.treatments(a_config(freeze=("^cmr_ed/",), frozen=True), params, statistics)
  assert sum(t.frozen for t in everything.values()) == 5


def test_something_must_be_left_to_train():
  with pytest.raises(UserError, match="leave no parameter to train"):
    state_lib.optimizer(a_config(freeze=("^(ecg|head|log)", "fc"), frozen=True), variables()[0])


def test_layer_decay_needs_an_ecg_tower():
  params = {name: x for name, x in variables()[0].items() if name != "ecg"}
  with pytest.raises(UserError, match="no ECG tower"):
    state_lib.optimizer(a_config(layer_decay=0.5), params)
