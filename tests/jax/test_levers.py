"""What saves memory and time must not change the numbers: masked views, and the kernels of our
own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import difference, drawn
from scipy import stats

from mmcl_jax import configuration, models
from mmcl_jax.errors import UserError
from mmcl_jax.models import kernels, mae, vit
from mmcl_jax.models.towers import ecg_vit

# The tests' time is compilation, and neither numbers nor memory depend on how hard LLVM tries.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


TOWER = dict(fn="ecg_vit", view="ecg", size="test", patch=10)


def pretrained(train=True, **changes):
  """A model with one ECG tower, random variables, a batch and its keys."""
  c = configuration.defaults(4, 6).model
  c.projection.update(hidden=8, width=4)
  c.towers.ecg = TOWER | {"mask_ratio": 0.5} | changes
  model = models.build(c, 40)
  rng = np.random.default_rng(0)
  batch = {
    "ecg": rng.normal(size=(4, 12, 40)).astype(np.float32),
    "conditions": rng.normal(size=(4, 2)).astype(np.float32),
    "cmr": {},
    **{name: np.ones(4, np.float32) for name in ("mask", "has_ecg", "has_cmr")},
  }
  keys = jax.random.split(jax.random.key(0), 4)
  return (
    model,
    drawn(jax.eval_shape(lambda key: model.init(key, batch, keys), jax.random.key(0))),
    batch,
    keys,
  )


@pytest.mark.parametrize(
  "changes", [{}, dict(pool="cls", drop_path=0.4), dict(pool="attention", head=6, film=True)]
)
def test_masked_view_is_the_embedding_of_the_patches_that_the_decoder_gets(changes):
  model, variables, batch, keys = pretrained(masked_view=True, **changes)

  def by_hand(model, ecg):
    mask_keys, path_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    keep, restore, mask = mae.random_mask(mask_keys, 48, 0.5)
    visible = model.ecg.tokens(ecg, keep, path_keys, batch["conditions"])
    embedding = model.ecg.pooled(visible)
    return {
      "ecg_tokens": visible[:, 1:],
      "ecg_embedding": embedding,
      "reconstruction": model.ecg.decode(visible, restore),
      "ecg_projection": model.head["ecg"](model.ecg.features(embedding)),
      "patch_mask": mask.reshape(4, 12, 4),
    }

  def both(variables):
    return (
      model.apply(variables, batch, keys, True, mutable=["batch_stats"])[0],
      model.apply(variables, batch["ecg"], method=by_hand),
    )

  found, expected = jit(both)(variables)
  assert found["ecg_tokens"].shape == (4, 24, 16)
  assert difference(found, expected) < 1e-6


def test_masked_view_sees_everything_in_evaluation_and_hidden_patches_nowhere_in_training():
  model, variables, batch, keys = pretrained(masked_view=True)
  plain = pretrained()[0]
  run = jit(
    lambda batch: [
      m.apply(variables, batch, keys, train) for train in (False, True) for m in (plain, model)
    ]
  )
  all_of_it, too, unmasked, seen = run(batch)
  jax.tree.map(np.testing.assert_array_equal, too, all_of_it)
  assert difference(seen["reconstruction"], unmasked["reconstruction"]) < 1e-6
  assert np.abs(unmasked["ecg_embedding"] - seen["ecg_embedding"]).max() > 1e-3
  hidden = np.asarray(seen["patch_mask"]).repeat(10, axis=2) > 0
  *_, changed = run(batch | {"ecg": np.where(hidden, np.float32(9), batch["ecg"])})
  jax.tree.map(np.testing.assert_array_equal, changed, seen)


@pytest.mark.parametrize(
  "again, changes, passes",
  [
    (False, {}, (2, 1)),
    (True, {}, (2, 1)),
    (False, dict(siamese=True), (3, 2)),
    (True, dict(siamese=True, film=True), (3, 2)),
  ],
)
def test_masked_view_takes_one_pass_less_and_makes_the_same_outputs(
  monkeypatch, again, changes, passes
):
  calls, real = [], ecg_vit.EcgViT.tokens
  monkeypatch.setattr(
    ecg_vit.EcgViT, "tokens", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs)
  )
  made = []
  for masked_view, expected in zip((False, True), passes):
    model, variables, batch, keys = pretrained(masked_view=masked_view, **changes)
    batch |= {"again": {"ecg": batch["ecg"], "cmr": {}}} if again else {}
    calls.clear()
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    outputs, _ = jax.eval_shape(apply, variables, batch, keys)
    assert len(calls) == expected
    for found in (outputs, outputs.get("again", {})):
      found.pop("ecg_tokens", None)
    made.append(outputs)
  assert made[0] == made[1]


def test_second_augmentation_has_masks_of_its_own():
  model, variables, batch, keys = pretrained(masked_view=True)
  run = jit(lambda batch: model.apply(variables, batch, keys, True))
  one, two = run(batch), run(batch | {"again": {"ecg": batch["ecg"], "cmr": {}}})
  assert difference({name: two[name] for name in one}, one) < 1e-5
  assert (np.abs(two["again"]["ecg_embedding"] - one["ecg_embedding"]).max(axis=1) > 1e-3).all()


@pytest.mark.parametrize(
  "change, says",
  [
    (
      lambda c: c.update(remat="all"),
      "config.model.remat is 'all'; expected one of none, blocks, dots",
    ),
    (
      lambda c: c.towers.ecg.update(masked_view=True),
      "needs config.model.towers.ecg.mask_ratio above 0",
    ),
  ],
)
def test_mistakes_of_a_config_are_one_line(change, says):
  c = configuration.defaults(8, 6).model
  c.towers.ecg = TOWER
  change(c)
  with pytest.raises(UserError) as error:
    models.build(c, 40)
  assert says in str(error.value) and "\n" not in str(error.value)


def test_a_config_of_the_earlier_form_is_refused_in_one_line(tmp_path):
  c = configuration.defaults(8, 6).model
  del c.towers
  c.ecg, c.cmr = dict(size="test", patch=10), {}
  with pytest.raises(UserError, match="config.model has no towers; .* train again") as error:
    models.build(c, 40)
  assert "\n" not in str(error.value)
  (tmp_path / "config.json").write_text(f'{{"model": {c.to_json()}}}')
  with pytest.raises(UserError, match="another version of mmcl_jax .* train again") as error:
    configuration.load(str(tmp_path))
  assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------------
# kernels


def plain_attention(q, k, v):
  weights = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1]), axis=-1)
  return jnp.einsum("bhnm,bmhd->bnhd", weights, v)


def plain_self_attention(qkv, heads):
  """Columns [heads, 3, width]."""
  qkv = qkv.reshape(*qkv.shape[:2], heads, 3, -1)
  return plain_attention(*jnp.moveaxis(qkv, 3, 0)).reshape(*qkv.shape[:2], -1)


ORDER = np.argsort(np.random.default_rng(5).random((3, 7)), axis=1)
FORMS = {  # ours, the same written out, shapes of the arguments
  "linear": (
    kernels.linear,
    lambda x, w, b: jnp.einsum("bni,io->bno", x, w) + b,
    ((3, 5, 4), (4, 6), (6,)),
  ),
  "gelu": (kernels.gelu, lambda x: x * jax.scipy.stats.norm.cdf(x), ((3, 50),)),
  "attention": (kernels.attention, plain_attention, ((2, 7, 3, 4),) * 3),
  "own_attention": (kernels.own_attention, plain_attention, ((2, 7, 3, 4),) * 3),
  "self_attention": (
    functools.partial(kernels.self_attention, heads=3),
    functools.partial(plain_self_attention, heads=3),
    ((2, 7, 36),),
  ),
  "pooling": (kernels.attention, plain_attention, ((2, 1, 3, 4), (2, 7, 3, 4), (2, 7, 3, 4))),
  "convolve": (
    lambda x, w: kernels.convolve(
      x, w, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    ),
    lambda x, w: sum(
      jnp.einsum(
        "bhwc,co->bhwo",
        jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))[:, i : i + 7 : 2, j : j + 6 : 2],
        w[i, j],
      )
      for i in range(3)
      for j in range(3)
    ),
    ((2, 7, 6, 3), (3, 3, 3, 4)),
  ),
  "permute": (
    lambda x: kernels.permute(x, ORDER),
    lambda x: jnp.stack([row[i] for row, i in zip(x, ORDER)]),
    ((3, 7, 4),),
  ),
}


@pytest.mark.parametrize(
  "dtype, bound", [("float32", 1e-6), ("float64", 1e-12), ("bfloat16", 5e-2)]
)
def test_kernels_and_their_gradients_are_the_functions_written_out(dtype, bound):
  """In float64 at the numbers of the dtype. Under vmap and jax.checkpoint too, as each of them is
  used."""
  rng = np.random.default_rng(0)
  args = {
    name: [rng.normal(size=shape) for shape in shapes] for name, (_, _, shapes) in FORMS.items()
  }

  def of(f, args):
    """f, and the gradients of a sum that weighs its values unequally."""

    def loss(*args):
      return (
        (y := f(*args)).astype(jnp.float64) * jnp.cos(jnp.arange(y.size)).reshape(y.shape)
      ).sum()

    return f(*args), *jax.grad(loss, argnums=tuple(range(len(args))))(*args)

  def ours(args):
    def again(x):
      return jnp.stack([x, x])

    found = {}
    for name, x in args.items():
      form = FORMS[name][0]
      mapped = jax.vmap(lambda *x, form=form: of(form, x))(*map(again, x))
      found[name] = (
        of(form, x),
        of(jax.checkpoint(form), x),
        jax.tree.map(lambda x: x[1], mapped),
      )
    return found

  with jax.enable_x64(True):
    args = jax.tree.map(lambda x: jnp.asarray(x, dtype), args)
    found = jit(ours)(args)
    exact = jax.tree.map(lambda x: x.astype(jnp.float64), args)
    expected = jit(lambda args: {name: of(FORMS[name][1], x) for name, x in args.items()})(exact)
  assert all(x.dtype == dtype for x in jax.tree.leaves(found))
  far = {name: max(difference(one, expected[name]) for one in found[name]) for name in FORMS}
  assert max(far.values()) < bound, far


def test_gelu_is_exact_in_its_tails():
  x = np.linspace(-6, 6, 4001, dtype=np.float32)
  y, slope = jit(lambda x: (kernels.gelu(x), jax.grad(lambda x: kernels.gelu(x).sum())(x)))(x)
  z = x.astype(np.float64)
  assert np.abs(y - z * stats.norm.cdf(z)).max() < 1e-6
  assert np.abs(slope - (stats.norm.cdf(z) + z * stats.norm.pdf(z))).max() < 1e-6


def test_large_logits_do_not_overflow():
  q = jnp.full((1, 4, 1, 4), 200.0)
  value, grads = jit(jax.value_and_grad(lambda q: kernels.own_attention(q, q, q).sum()))(q)
  assert value == 16 * 200.0 and np.isfinite(grads).all()


def block_loss(params, x):
  return (vit.Block(2).apply({"params": params}, x) ** 2).sum()


def lowered(platform):
  x = jnp.ones((2, 5, 16))
  params = jax.eval_shape(lambda key: vit.Block(2).init(key, x), jax.random.key(0))["params"]
  return (
    jax.jit(jax.grad(block_loss)).trace(params, x).lower(lowering_platforms=(platform,)).as_text()
  )


def test_what_helps_a_cpu_alone_is_in_no_other_program(monkeypatch):
  """Lowered here for each platform: the barrier, and the two gradients that our own attention has
  as [B, H, D, N]."""

  def products(text):
    return [
      line
      for line in text.splitlines()
      if "dot_general" in line and line.endswith("tensor<2x2x8x5xf32>")
    ]

  def marks(text):
    return ("optimization_barrier" in text, len(products(text)) == 2)

  assert marks(lowered("cpu")) == (True, True)
  assert marks(lowered("tpu")) == marks(lowered("cuda")) == (False, False)
  monkeypatch.setattr(kernels, "OWN", set())
  assert marks(lowered("cpu")) == (False, False)


def test_rows_are_flattened_on_a_cpu_alone():
  """Elsewhere no product of a linear has them, forwards or backwards: on a TPU they are a copy."""
  args = [jnp.ones(shape) for shape in FORMS["linear"][2]]

  def loss(*args):
    return (kernels.linear(*args) ** 2).sum()

  traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(*args)
  flat = {
    platform: "tensor<15x" in traced.lower(lowering_platforms=(platform,)).as_text()
    for platform in ("cpu", "tpu", "cuda")
  }
  assert flat == {"cpu": True, "tpu": False, "cuda": False}


@pytest.mark.parametrize("off", sorted(kernels.OWN))
def test_every_kernel_of_our_own_can_be_taken_out(monkeypatch, off):
  ours = FORMS[off][0]
  args = [jnp.ones(shape) for shape in FORMS[off][2]]

  # a new function: a new trace
  def text():
    return jax.jit(jax.grad(lambda args: ours(*args).sum())).lower(args).as_text()

  before = text()
  monkeypatch.setattr(kernels, "OWN", kernels.OWN - {off})
  assert text() != before


def test_gradient_of_a_permutation_is_no_scatter():
  text = (
    jax.jit(jax.grad(lambda x: (kernels.permute(x, ORDER) ** 2).sum()))
    .lower(jnp.ones((3, 7, 4)))
    .as_text()
  )
  assert "stablehlo.gather" in text and "stablehlo.scatter" not in text
