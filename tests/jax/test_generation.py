"""What generates CMR: the tokenizer, the segmenter and the flow, each against a case whose answer
is known."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import tiny_config
from scipy import integrate
from scipy.stats import norm

from mmcl_jax import models, objectives
from mmcl_jax.data import measure
from mmcl_jax.errors import UserError
from mmcl_jax.evaluators import statistics
from mmcl_jax.models import inputs
from mmcl_jax.projects.generation import (
  evaluator as generation,
  generator,
  images,
  mar,
  model as generation_model,
  sampling,
  scores,
  segmenter,
  tokenizer,
)
from mmcl_jax.training import cohorts, parallel, state as state_lib, step as step_lib

KEYS = jax.random.split(jax.random.key(5), 3)


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# -- Tokenizer --


@pytest.fixture(scope="module")
def tokens():
  model = tokenizer.Tokenizer(16, 1, 2, (2, 4, 8), channels=3)
  stacks = jax.nn.sigmoid(normal(3, 2, 4, 8, 16))
  variables = jax.jit(model.init)(jax.random.key(0), stacks)
  return types.SimpleNamespace(model=model, stacks=stacks, variables=variables)


def test_a_token_is_one_place_at_both_phases(tokens):
  """Without attention (no block) a latent hangs on the voxels of its patch, at ED and at ES, and on
  no others; so back."""
  model = tokens.model.clone(depth=0)

  def encode(x):
    return model.apply(tokens.variables, x, method="encode")[0]

  def decode(z):
    return model.apply(tokens.variables, z, (4, 8, 16), method="decode")

  token = (1 * 2 + 0) * 2 + 1  # of 2 x 2 x 2: slices 2 and 3, rows 0 to 3, columns 8 to 15
  place = np.zeros((4, 8, 16), bool)
  place[2:4, 0:4, 8:16] = True
  slope = jax.grad(lambda x: encode(x)[0, token].sum())(tokens.stacks)
  assert np.array_equal(slope[0] != 0, [place, place]) and not slope[1:].any()
  z = encode(tokens.stacks)
  changed = decode(z.at[0, token].add(1.0)) != decode(z)
  assert np.array_equal(changed[0], [place, place]) and not changed[1:].any()


def test_latents_are_drawn_by_the_row_s_own_key(tokens):
  mean, log_variance = normal(3, 8, 3), normal(3, 8, 3, seed=1)
  drawn = tokenizer.draw(mean, log_variance, KEYS)
  np.testing.assert_allclose(
    tokenizer.draw(mean[1:2], log_variance[1:2], KEYS[1:2])[0], drawn[1], rtol=1e-6
  )
  many = jax.vmap(lambda key: tokenizer.draw(mean[:1], log_variance[:1], key[None])[0])(
    jax.random.split(jax.random.key(0), 20_000)
  )
  np.testing.assert_allclose(many.mean(axis=0), mean[0], atol=0.06)
  np.testing.assert_allclose(many.var(axis=0), np.exp(log_variance[0]), rtol=0.06)


def test_evaluation_takes_the_mean_and_training_draws(tokens):
  def run(keys):
    return tokens.model.apply(tokens.variables, tokens.stacks, keys)

  fixed, drawn = run(None), run(KEYS)
  assert np.array_equal(fixed["latent_mean"], drawn["latent_mean"])
  again = tokens.model.apply(tokens.variables, fixed["latent_mean"], (4, 8, 16), method="decode")
  np.testing.assert_allclose(again, fixed["reconstruction"], atol=1e-6)
  assert np.abs(drawn["reconstruction"] - fixed["reconstruction"]).max() > 0.01


# -- Segmenter --


def test_segmenter_sees_slices_alone_and_labels_every_voxel():
  model = segmenter.Segmenter(segmenter.SIZES["test"], 4)
  stacks = jax.nn.sigmoid(normal(2, 2, 3, 16, 24))
  variables = jax.jit(model.init)(jax.random.key(0), stacks)
  run = jax.jit(lambda x: model.apply(variables, x))
  found = run(stacks)
  assert found.shape == (2, 2, 3, 16, 24, 4)
  alone = run(jnp.broadcast_to(stacks[1:, 1:, 2:], stacks.shape))
  np.testing.assert_allclose(alone[0, 0, 0], found[1, 1, 2], atol=1e-5)


def test_the_four_labels_of_a_cell_lie_where_its_pixels_do():
  """Of a bright square of 2 x 2 pixels, one cell, the last layer's cell answers at those pixels, in
  their order."""
  model = segmenter.Segmenter(segmenter.SIZES["test"], 4)
  stacks = jnp.zeros((1, 1, 1, 16, 16))
  variables = jax.jit(model.init)(jax.random.key(0), stacks)
  # what the last layer says, whatever it sees: pixel, then label
  cells = jnp.arange(16.0).reshape(4, 4)
  flat = jax.tree.map(jnp.zeros_like, variables)
  flat["params"]["labels"]["bias"] = cells.reshape(-1)
  found = model.apply(flat, stacks)[0, 0, 0]
  for y in range(16):
    for x in range(16):
      assert np.array_equal(found[y, x], cells[2 * (y % 2) + x % 2])


# -- Flow --


@pytest.mark.parametrize("each_token", [False, True])
def test_a_place_on_the_line_and_its_velocity_lead_to_both_ends(each_token):
  latents, keys = normal(4000, 2, 3), jax.random.split(jax.random.key(1), 4000)
  x, time, velocity, kept = generator.interpolate(latents, keys, 0.25, each_token)
  assert ((time > 0) & (time < 1)).all() and time.shape == ((4000, 2) if each_token else (4000,))
  assert not each_token or abs(np.corrcoef(time.T)[0, 1]) < 0.05
  t = time.reshape(4000, -1, 1)
  np.testing.assert_allclose(x + (1 - t) * velocity, latents, atol=1e-5)
  noise = x - t * velocity
  assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
  assert abs((noise * latents).mean()) < 0.02  # independent of where it leads
  odds = np.log(time / (1 - time))
  assert abs(odds.mean()) < 0.05 and abs(odds.std() - 1) < 0.05  # logit-normal
  assert set(np.unique(kept)) == {0, 1} and abs(kept.mean() - 0.75) < 0.03


def test_heun_follows_a_flow_that_scipy_follows():
  def field(x, t):
    return np.stack([x[..., 1] * np.cos(3 * t), -x[..., 0] + t], axis=-1)

  x = normal(5, 2, 2)
  exact = [
    [
      integrate.solve_ivp(lambda t, y: field(y, t), (0, 1), start, rtol=1e-10, atol=1e-10).y[:, -1]
      for start in row
    ]
    for row in x
  ]

  def velocity(x, time):
    return jnp.stack([x[..., 1] * jnp.cos(3 * time[:, None]), -x[..., 0] + time[:, None]], axis=-1)

  errors = [
    np.abs(generator.integrate(velocity, x, steps) - np.array(exact)).max() for steps in (8, 16, 64)
  ]
  assert errors[2] < 2e-3 and errors[0] / errors[1] > 3  # second order


def test_one_point_is_reached_in_one_step():
  """Of a single latent the velocity at x and t is (latent - x) / (1 - t): the line is straight,
  whatever the steps."""
  latent = normal(1, 4, 3)

  def velocity(x, time):
    return (latent - x) / (1 - time)[:, None, None]

  for count in (1, 2, 7):
    np.testing.assert_allclose(
      generator.integrate(velocity, normal(6, 4, 3, seed=2), count),
      jnp.broadcast_to(latent, (6, 4, 3)),
      atol=1e-5,
    )


def test_guidance():
  x, asked = normal(2, 1, 1), []

  def velocity(given):
    return (asked.append(given), x * (3.0 if given else 1.0))[1]

  for guidance, factor, given in ((0.0, 1.0, [0.0]), (1.0, 3.0, [1.0]), (2.5, 6.0, [0.0, 1.0])):
    np.testing.assert_allclose(generator.guided(velocity, guidance), factor * x, rtol=1e-5)
    assert asked == given == list(generator.given_values(guidance))
    asked.clear()


@pytest.fixture(scope="module")
def flow():
  """A transformer whose zero layers have learned something."""
  model = generator.Generator(16, 2, 2, channels=3)
  inputs = normal(3, 8, 3), jnp.array([0.1, 0.5, 0.9]), normal(3, 5, 6, seed=1), jnp.ones(3)
  variables = jax.jit(lambda: model.init(jax.random.key(0), *inputs, (2, 2, 2)))()
  leaves, structure = jax.tree.flatten(variables)
  learned = jax.tree.unflatten(
    structure, [x + 0.3 * normal(*x.shape, seed=i) for i, x in enumerate(leaves)]
  )
  run = jax.jit(
    lambda variables, *inputs: model.apply(variables, *inputs[:4], (2, 2, 2), *inputs[4:])
  )
  return types.SimpleNamespace(run=run, fresh=variables, learned=learned, inputs=inputs)


def test_a_fresh_generator_stands_still(flow):
  assert not flow.run(flow.fresh, *flow.inputs).any()


def test_a_withheld_ecg_has_no_say(flow):
  x, time, tokens, given = flow.inputs

  def run(tokens, given):
    return flow.run(flow.learned, x, time, tokens, given)

  other = tokens[::-1]
  given = jnp.array([1.0, 0.0, 1.0])
  apart = np.abs(run(tokens, given) - run(other + 1, given)).max(axis=(1, 2))
  assert apart[0] > 0.01 and apart[2] > 0.01 and apart[1] == 0
  assert np.abs(run(tokens, given) - run(tokens, jnp.ones(3)))[1].max() > 0.01


def test_covariates_have_a_say_with_and_without_an_ecg(flow):
  x, time, tokens, _ = flow.inputs
  given = jnp.array([1.0, 0.0, 1.0])
  fc = {"kernel": normal(4, 16, seed=7), "bias": normal(16, seed=8)}
  learned = {"params": flow.learned["params"] | {"covariates": fc}}

  def run(covariates):
    return flow.run(learned, x, time, tokens, given, covariates)

  known, unknown = normal(3, 2, seed=2), jnp.full((3, 2), jnp.nan)
  for others in (known + 1, unknown):
    assert np.abs(run(known) - run(others)).max(axis=(1, 2)).min() > 1e-5
  # the mean is not "unknown"
  assert np.abs(run(jnp.zeros((3, 2))) - run(unknown)).max(axis=(1, 2)).min() > 1e-5


def test_time_and_place_are_told(flow):
  x, time, tokens, given = flow.inputs

  def run(x, time):
    return flow.run(flow.learned, x, time, tokens, given)

  assert np.abs(run(x, time) - run(x, time + 0.05)).max(axis=(1, 2)).min() > 1e-3
  same = run(jnp.broadcast_to(x[:, :1], x.shape), time)
  assert np.abs(same - same[:, :1])[:, 1:].max(axis=2).min() > 1e-3  # equal tokens at other places


# -- Masked autoregression --


def test_training_hides_what_drawing_does_not_know_yet():
  hidden = np.asarray(mar.hide(jax.random.split(jax.random.key(3), 4000), 40))
  # something to learn in every row
  assert set(np.unique(hidden)) == {0, 1} and hidden.any(axis=1).all()
  # share hidden before each of many rounds, one as likely as another
  rounds = 1 - mar.known_after(100_000, 1000)[:-1] / 100_000
  quantiles = np.linspace(0.05, 0.95, 10)
  np.testing.assert_allclose(
    np.quantile(hidden.mean(axis=1) - 0.5 / 40, quantiles),
    np.quantile(rounds, quantiles),
    atol=0.04,
  )
  assert np.ptp(hidden.mean(axis=0)) < 0.06  # everywhere alike


def test_tokens_become_known_like_a_cosine():
  # 8 (1 - cos(pi i / 8)) = 0, 0.6, 2.3, 4.9, 8
  assert mar.known_after(8, 4).tolist() == [0, 1, 2, 5, 8]
  assert mar.known_after(5, 5).tolist() == [0, 1, 2, 3, 4, 5]
  large = mar.known_after(432, 16)
  assert large[[0, 1, 8, 16]].tolist() == [0, 2, 127, 432] and np.diff(large).min() > 0


@pytest.fixture(scope="module")
def places():
  """Noise and order of three hearts of twelve tokens."""
  return types.SimpleNamespace(noise=normal(3, 12, 2), order=normal(3, 12, seed=4).argsort(axis=1))


def towards(x, time, told):
  """The velocity to the point `told`."""
  return (told - x) / (1 - time)[..., None]


def test_every_token_is_drawn_once_of_its_own_noise(places):
  def stay(x, time, told):
    return jnp.zeros_like(x)

  for rounds in (1, 5, 12, 99):
    found = mar.draw(
      lambda latents, hidden: hidden, stay, places.noise, places.order, steps=2, rounds=rounds
    )
    np.testing.assert_array_equal(found, places.noise)


def test_tokens_are_drawn_in_their_order(places):
  def known(latents, hidden):
    return jnp.broadcast_to((1 - hidden).sum(axis=1)[:, None, None], (3, 12, 1))

  found = mar.draw(known, towards, places.noise, places.order, steps=2, rounds=5)
  turns = mar.known_after(12, 5)
  for heart, order in zip(found, places.order):
    for rank, place in enumerate(order):
      np.testing.assert_allclose(
        heart[place], turns[np.searchsorted(turns, rank, side="right") - 1], atol=1e-5
      )


def test_later_tokens_follow_the_first(places):
  """Tokens that are all alike: the first is any, the others are it. The told points of hidden
  tokens must be of known ones."""

  def tell(latents, hidden):
    known = 1 - hidden[..., None]
    mean = (latents * known).sum(axis=1, keepdims=True) / jnp.maximum(
      known.sum(axis=1, keepdims=True), 1
    )
    return {
      "mean": jnp.broadcast_to(mean, latents.shape),
      "any": jnp.broadcast_to(known.max(axis=1, keepdims=True), (3, 12, 1)),
    }

  def alike(x, time, told):
    return told["any"] * towards(x, time, told["mean"])

  found = mar.draw(tell, alike, places.noise, places.order, steps=3, rounds=6)
  first = np.take_along_axis(places.noise, places.order[:, :1, None], axis=1)
  np.testing.assert_allclose(found, np.broadcast_to(first, found.shape), atol=1e-5)


@pytest.fixture(scope="module")
def masked(cohort):
  """A masked generator with covariates in its model, whose parameters are random, all of them."""
  c = generating(cohort.path)
  c.model.generator.masked = c.model.generator.covariates = True
  model = models.build(c.model, c.data.samples)
  batch = jax.tree.map(
    lambda x: jnp.ones(x.shape, x.dtype), inputs.example(c, cohort.info["shapes"], 1, 2)
  )
  variables = jax.jit(lambda: model.init(jax.random.key(0), batch, KEYS[:2]))()
  leaves, structure = jax.tree.flatten(variables)
  variables = jax.tree.unflatten(
    structure, [x + 0.2 * normal(*x.shape, seed=i) for i, x in enumerate(leaves)]
  )
  shape = batch["cmr"]["ed_es_volumes"].shape[2:]
  return types.SimpleNamespace(
    config=c,
    model=model,
    variables=variables,
    batch=batch,
    shape=shape,
    latents=generation_model.noise_shape(c.model, shape)[0],
    channels=c.model.tokenizer.channels,
  )


@pytest.fixture(scope="module")
def drawn(masked):
  """(guidance, conditions) -> hearts, two of each of two recordings."""
  c, known = masked.config, masked.batch["conditions"]
  ecg, noise = (
    normal(2, 12, c.data.samples),
    normal(2, 2, *generation_model.noise_shape(c.model, masked.shape), seed=1),
  )
  make = functools.cache(
    lambda guidance: jax.jit(sampling.make_generate(masked.model, c, masked.shape, 2, guidance))
  )
  return lambda guidance, conditions=known: np.asarray(
    make(guidance)(masked.variables, ecg, noise, conditions)
  )


def test_guidance_of_tokens_goes_over_into_none(drawn):
  """With 1 and 0 one look is taken, with all others two: next to 1 and 0 they must agree."""
  own, any_heart = drawn(1.0), drawn(0.0)
  assert np.abs(own - any_heart).max() > 0.05 and np.abs(own[0] - own[1]).max() > 0.05
  np.testing.assert_allclose(drawn(1 + 1e-6), own, atol=1e-3)
  np.testing.assert_allclose(drawn(1e-6), any_heart, atol=1e-3)


def test_the_hearts_of_a_recording_know_its_own_covariates(masked, drawn):
  others = masked.batch["conditions"].at[1].add(1.0)
  apart = np.abs(drawn(1.0, others) - drawn(1.0)).max(axis=(2, 3, 4, 5))  # [recording, heart]
  assert (apart[0] == 0).all() and (apart[1] > 1e-3).all()


def test_a_hidden_token_is_not_looked_at_in_training(masked):
  tokens, latents = normal(2, 4, 16), normal(2, masked.latents, masked.channels)
  flow = jax.jit(
    lambda latents: masked.model.apply(
      masked.variables, masked.batch, tokens, latents, KEYS[:2], True, method="flow"
    )
  )
  found = flow(latents)
  hidden = np.asarray(found["hidden"][0]) > 0
  assert hidden.sum() > 1 and not hidden.all()

  def changed(place):
    return np.abs(flow(latents.at[0, place].add(1.0))["velocity"] - found["velocity"])[0].max(
      axis=1
    )

  secret, seen = np.flatnonzero(hidden)[0], np.flatnonzero(~hidden)[0]
  others = hidden & (np.arange(len(hidden)) != secret)
  assert (
    (changed(secret)[others] == 0).all()
    and changed(secret)[secret] > 0
    and (changed(seen)[hidden] > 1e-6).all()
  )


def test_covariates_are_withheld_by_a_chance_of_their_own(masked):
  """Rows whose velocity does not hang on covariates lost them, a tenth; the ECG is lost to
  others."""
  count = 400
  batch = {
    name: jnp.ones((count, *masked.batch[name].shape[1:])) for name in ("has_ecg", "conditions")
  }
  batch["cmr"] = masked.batch["cmr"]  # of which it wants the shape
  tokens, latents = normal(count, 4, 16), normal(count, masked.latents, masked.channels)
  keys = jax.random.split(jax.random.key(9), count)
  flow = jax.jit(
    lambda conditions, tokens: masked.model.apply(
      masked.variables,
      batch | {"conditions": conditions},
      tokens,
      latents,
      keys,
      True,
      method="flow",
    )["velocity"]
  )
  start = flow(batch["conditions"], tokens)

  def lost(*inputs):
    return np.abs(flow(*inputs) - start).max(axis=(1, 2)) == 0

  no_covariates, no_ecg = (
    lost(batch["conditions"] + 1, tokens),
    lost(batch["conditions"], tokens + normal(count, 4, 16, seed=1)),
  )
  assert (
    0.05 < no_covariates.mean() < 0.15
    and 0.05 < no_ecg.mean() < 0.15
    and (no_covariates & no_ecg).mean() < 0.04
  )


def test_only_hidden_tokens_are_learned_and_only_the_others_looked_at():
  model = mar.MaskedGenerator(16, 1, 2, channels=3)
  latents, hidden = normal(2, 8, 3), jnp.array([[1, 1, 0, 1, 0, 1, 1, 1], [1] * 8], jnp.float32)
  inputs = normal(2, 5, 6, seed=1), jnp.ones(2), (2, 2, 2)

  def whole(m, latents):
    return m.token(latents, jnp.full((2, 8), 0.3), m.condition(latents, hidden, *inputs))

  leaves, structure = jax.tree.flatten(
    jax.jit(lambda: model.init(jax.random.key(0), latents, method=whole))()
  )
  learned = jax.tree.unflatten(
    structure, [x + 0.3 * normal(*x.shape, seed=i) for i, x in enumerate(leaves)]
  )
  told = jax.jit(lambda latents: model.apply(learned, latents, hidden, *inputs, method="condition"))

  def at(place):
    return np.abs(told(latents.at[0, place].add(1.0)) - told(latents)).max(axis=2)

  assert not at(0).any() and (at(2)[0] > 1e-4).all() and not at(2)[1].any()
  made = {"velocity": latents, "target": normal(2, 8, 3, seed=3), "hidden": hidden}
  loss = objectives.find("flow_matching", "")(
    {"generator": made}, {"mask": jnp.ones(2), "has_cmr": jnp.ones(2)}
  )
  squared = np.square(np.subtract(made["velocity"], made["target"])).mean(axis=2)
  np.testing.assert_allclose(
    loss.values, [squared[0][[0, 1, 3, 5, 6, 7]].mean(), squared[1].mean()], rtol=1e-5
  )


# -- In the model and its loop --


def generating(cohort_path):
  c = tiny_config(cohort_path)
  c.model.towers = {"ecg": dict(fn="ecg_vit", view="ecg", size="test", patch=100)}
  with c.unlocked():
    c.model.fn = "generation"
    c.model.tokenizer = dict(size="test", patch=(6, 16, 16), channels=4)
    c.model.segmenter = dict(size="test")
    c.model.generator = dict(size="test", dropout=0.1, masked=False, covariates=False)
    c.objectives = dict(flow=dict(fn="flow_matching", weight=1.0))
  return c


@pytest.mark.parametrize(
  "changes, words",
  [
    (
      dict(tokenizer=dict(size="huge", patch=(6, 16, 16), channels=4)),
      "model.tokenizer.size is 'huge'; expected one of test",
    ),
    (
      dict(tokenizer=dict(size="test", patch=(6, 16, 16))),
      "model.tokenizer has patch, size; expected size, patch and channels",
    ),
    (
      dict(tokenizer=dict(size="test", patch=(5, 16, 16), channels=4)),
      "patch is .5, 16, 16.; expected divisors of the cohort's 12 slices",
    ),
    (
      dict(tokenizer=dict(size="test", patch=(6, 16), channels=4)),
      "patch is .6, 16.; expected divisors",
    ),
    (dict(segmenter=dict(size="huge")), "model.segmenter is .'size': 'huge'.; expected"),
    (
      dict(generator=dict(size="huge", dropout=0.1, masked=False, covariates=False)),
      "model.generator.size is 'huge'",
    ),
    (
      dict(generator=dict(size="test")),
      "model.generator has size; expected size, dropout, masked and covariates",
    ),
    (dict(tokenizer={}), "it needs model.tokenizer and model.towers.ecg"),
  ],
)
def test_mistakes_in_the_config_are_named(cohort, changes, words):
  c = generating(cohort.path)
  with c.unlocked():
    for name, value in changes.items():
      c.model[name] = value
  with pytest.raises(UserError, match=words):
    models.build(c.model, c.data.samples)
    models.check(c.model, cohort.info["shapes"])


def test_a_cohort_without_covariates_is_refused_by_a_model_that_takes_them(cohort):
  c = generating(cohort.path)
  c.model.generator.covariates, c.model.segmenter = True, {}
  cohorts.check(cohort, [], c)
  nothing = dict.fromkeys(cohort.info["covariates"])
  unknown = cohort._replace(
    info=cohort.info
    | {"train_statistics": cohort.info["train_statistics"] | {"covariates": nothing}}
  )
  with pytest.raises(UserError, match="model.generator.covariates=True asks for covariates"):
    cohorts.check(unknown, [], c)
  c.model.generator.covariates = False
  cohorts.check(unknown, [], c)


def test_what_the_model_reads(cohort):
  c = generating(cohort.path)
  assert models.fields(c.model) == ("ed_es_volumes", "labels")
  c.model.segmenter = {}
  assert models.fields(c.model) == ("ed_es_volumes",)


# -- Running mean of the parameters --


def test_average_is_the_weighted_mean_of_the_parameters_so_far():
  decay, params = 0.9, {"a": jnp.ones(3), "b": {"c": jnp.zeros((2, 2))}}
  tx = optax.chain(optax.sgd(0.1), state_lib.keep_average(decay))
  state, history = tx.init(params), []
  # nothing taken in
  assert jax.tree.all(jax.tree.map(np.array_equal, state_lib.averaged(params, state), params))
  for step in range(5):
    slope = np.sin(step + 1)
    gradient = jax.tree.map(lambda x, slope=slope: jnp.full_like(x, slope), params)
    updates, state = tx.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    history.append(params)
  weights = decay ** np.arange(4, -1, -1)
  expected = jax.tree.map(lambda *x: np.average(x, axis=0, weights=weights), *history)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5),
    state_lib.averaged(params, state),
    expected,
  )


# -- Scores --


def test_psnr_and_ssim_by_their_formulas():
  rng = np.random.default_rng(0)
  x = rng.random((2, 3, 16, 18)).astype(np.float32)
  y = np.clip(x + rng.normal(0, [[[[0.05]]], [[[0.3]]]], x.shape), 0, 1).astype(np.float32)
  np.testing.assert_allclose(
    images.psnr(x, y),
    [20 * np.log10(1 / np.sqrt(np.mean((a - b) ** 2, dtype=float))) for a, b in zip(x, y)],
    rtol=1e-5,
  )
  window = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))
  window = np.outer(window, window) / window.sum() ** 2
  for i in range(2):
    found = []
    for a, b in zip(x[i].astype(float), y[i].astype(float)):
      for r in range(5, 11):
        for c in range(5, 13):
          p, q = a[r - 5 : r + 6, c - 5 : c + 6], b[r - 5 : r + 6, c - 5 : c + 6]

          def mean(z):
            return (window * z).sum()

          cov = mean((p - mean(p)) * (q - mean(q)))
          found.append(
            (2 * mean(p) * mean(q) + 1e-4)
            * (2 * cov + 9e-4)
            / (mean(p) ** 2 + mean(q) ** 2 + 1e-4)
            / (mean((p - mean(p)) ** 2) + mean((q - mean(q)) ** 2) + 9e-4)
          )
    assert images.ssim(x, y)[i] == pytest.approx(np.mean(found), rel=1e-6)
  np.testing.assert_allclose(images.ssim(x, x), 1)


def test_dice():
  a, b = np.array([[1, 1, 2, 0], [0, 0, 0, 0]]), np.array([[1, 0, 2, 1], [2, 0, 0, 0]])
  np.testing.assert_array_equal(images.dice(a, b, 1), [0.5, np.nan])
  np.testing.assert_array_equal(images.dice(a, b, 2), [1.0, 0.0])


def test_crps_of_a_normal_distribution():
  """Against its closed form (Gneiting & Raftery 2007), and by all pairs; another distribution costs
  more."""
  rng = np.random.default_rng(1)
  y, samples = rng.normal(size=(400, 2)), rng.normal(size=(400, 32, 2))
  by_pairs = [
    [np.abs(s - t).mean() - np.abs(s[:, None] - s).sum() / (2 * 32 * 31) for s, t in zip(row.T, at)]
    for row, at in zip(samples, y)
  ]
  np.testing.assert_allclose(statistics.crps(y, samples), by_pairs, rtol=1e-10)
  z = rng.normal(size=(1, 20_000, 1))
  exact = y[:, :1] * (2 * norm.cdf(y[:, :1]) - 1) + 2 * norm.pdf(y[:, :1]) - 1 / np.sqrt(np.pi)
  np.testing.assert_allclose(statistics.crps(y[:, :1], z), exact, atol=0.02)
  assert statistics.crps(y, samples).mean() < min(
    statistics.crps(y, 0.5 * samples).mean(), statistics.crps(y, samples + 0.5).mean()
  )
  np.testing.assert_allclose(statistics.crps(y, samples[:, :1]), np.abs(y - samples[:, 0]))


def test_phenotypes_on_the_device_are_those_of_the_readers():
  rng = np.random.default_rng(2)
  labels, spacing = (
    rng.integers(0, 4, (3, 2, 4, 8, 8)).astype(np.uint8),
    np.array([[8, 1.5, 1.2], [10, 2, 2], [6, 1, 1]], np.float32),
  )
  found = scores.measure(np.asarray(scores.volumes(jnp.asarray(labels), jnp.asarray(spacing))))
  for i in range(3):
    expected = measure.phenotypes(labels[i], spacing[i], np.nan)
    np.testing.assert_allclose(
      found[i], [expected[name] for name in generation.PHENOTYPES], rtol=1e-5
    )
  labels[0, :, :][labels[0] == 3] = 0
  missing = scores.measure(np.asarray(scores.volumes(jnp.asarray(labels), jnp.asarray(spacing))))[0]
  assert np.isnan(missing[4:]).all() and np.isfinite(missing[:4]).all()


def test_copies_are_told_from_draws():
  rng = np.random.default_rng(3)
  train, real, fresh = (rng.normal(size=(n, 8)) for n in (500, 300, 300))
  honest, copied = (scores.memorisation(x, real, train) for x in (fresh, train[:300] + 0.01))
  assert (
    honest["closer"] < 0.05
    and copied["closer"] == 1
    and copied["nearest_drawn"] < 0.1 < honest["nearest_real"]
  )


def test_what_is_frozen_has_no_running_mean(cohort):
  c = tiny_config(cohort.path)
  c.freeze, c.optimizer.ema, c.optimizer.warmup = ("^a/",), 0.5, 0
  params = {"a": {"kernel": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}}
  tx = state_lib.optimizer(c, params)
  state = tx.init(params)
  for _ in range(2):
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    params = optax.apply_updates(params, updates)
  found = state_lib.averaged(params, state)
  assert np.array_equal(found["a"]["kernel"], params["a"]["kernel"])
  assert (found["b"]["kernel"] > params["b"]["kernel"]).all() and (found["b"]["kernel"] < 1).all()
  # two moments and a mean of b; three counts
  assert sum(x.size for x in jax.tree.leaves(state)) == 3 * 2 + 3


def test_what_objectives_ask_for_is_found_without_a_state_in_memory(cohort):
  """As `mmcl compile` does it, whose state is shapes alone, with a running mean among them."""
  c = generating(cohort.path)
  c.optimizer.ema = 0.9
  model = models.build(c.model, c.data.samples)
  example, mesh = (
    inputs.example(c, cohort.info["shapes"], 0, 2),
    parallel.make_mesh(data=-1, model=1),
  )
  state, _ = state_lib.abstract(
    model, state_lib.optimizer_for(model, example, c), example, 0, mesh, ()
  )
  step_lib.check_outputs(model, objectives.build(c.objectives), example, state)
  c.objectives = dict(mine=dict(fn="mae", weight=1.0))
  with pytest.raises(UserError, match="asks for 'reconstruction'"):
    step_lib.check_outputs(model, objectives.build(c.objectives), example, state)


def test_somebody_else_s_ecg():
  subject = np.array([[1, 0], [1, 0], [2, 0], [1, 1], [1, 1]])
  assert generation.another(subject).tolist() == [2, 2, 3, 0, 0]
  assert generation.another(subject[:2]) is None and generation.another(subject[:1]) is None


def test_hearts_that_lack_a_chamber_count_as_the_others_of_their_kind():
  x = np.array([[[1.0, np.nan], [np.nan, np.nan]], [[3.0, np.nan], [5.0, np.nan]]])
  np.testing.assert_array_equal(
    scores.filled(x), [[[1, np.nan], [3, np.nan]], [[3, np.nan], [5, np.nan]]]
  )
  np.testing.assert_allclose(scores.sd(x)[:, 0], [0, np.sqrt(2)])


def test_dice_is_of_hearts_that_somebody_has_labelled():
  truth = np.zeros((2, 2, 1, 2, 2), np.uint8)
  truth[0] = [[[[1, 2], [3, 0]]]]
  labels = np.stack([truth[0], truth[0]])
  found = scores.picture_scores(None, labels, None, truth)
  assert found == {"dice_LV": 1, "dice_MYO": 1, "dice_RV": 1}
  assert np.isnan(scores.picture_scores(None, labels, None, np.zeros_like(truth))["dice_LV"])
