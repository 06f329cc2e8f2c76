"""Stages that start from earlier ones: what is carried over, what is not, and that nothing of it
goes unsaid."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mmcl_jax.errors import UserError
from mmcl_jax.training import initialise, parallel, state as state_lib

WIDTH, LEADS = 4, 12


def a_config(
  init_from=None,
  init_except=(),
  frozen=(),
  freeze=(),
  towers=("ed", "es"),
  view="ed_volume",
  profile="minimal",
):
  return ConfigDict(
    dict(
      init_from={"ecg": "", "cmr_ed": "", "cmr_es": ""} | (init_from or {}),
      init_except=init_except,
      freeze=freeze,
      model=dict(
        fn="pretrainer", towers={name: dict(frozen=name in frozen, view=view) for name in towers}
      ),
      data=dict(ecg_profile=profile),
      optimizer=dict(rates=(), layer_decay=1.0),
    )
  )


def variables(seed, towers=("ed", "es"), decoder=False, columns=2, patch=3):
  """An ECG tower with learned positions, CMR towers with batch statistics, a head and a
  temperature; random numbers."""
  rng = np.random.default_rng(seed)

  def x(*shape):
    return rng.normal(size=shape).astype(np.float32)

  def dense(inputs):
    return {"kernel": x(inputs, WIDTH), "bias": x(WIDTH)}

  ecg = {
    "patch_embed": dense(patch),
    "cls_token": x(1, 1, WIDTH),
    "pos_embed": x(1, 1 + LEADS * columns, WIDTH),
  }
  if decoder:
    ecg["decoder"] = {"embed": dense(WIDTH), "mask_token": x(1, 1, WIDTH)}

  def tower():
    return {
      "backbone": {
        "stem": {"kernel": x(2, WIDTH)},
        "norm": {"bn": {"scale": x(WIDTH), "bias": x(WIDTH)}},
      },
      "fc": dense(WIDTH),
    }

  def moving():
    return {"backbone": {"norm": {"bn": {"mean": x(WIDTH), "var": x(WIDTH)}}}}

  params = {"ecg": ecg, "head_ecg": {"fc1": dense(WIDTH)}, "log_scale": x()}
  params |= {f"cmr_{name}": tower() for name in towers}
  return {"params": params, "batch_stats": {f"cmr_{name}": moving() for name in towers}}


def a_state(seed=0, **kwargs):
  made = jax.tree.map(jnp.asarray, variables(seed, **kwargs))
  return state_lib.TrainState(
    jnp.int32(0), made["params"], made["batch_stats"], {"mu": jnp.ones(3)}
  )


def carry(state, workdirs, earlier=None, **kwargs):
  """load_pretrained from {workdir: variables}; `earlier`: arguments of the config of all of
  them."""

  def load(workdir):
    towers = [
      module.removeprefix("cmr_")
      for module in workdirs[workdir]["params"]
      if module.startswith("cmr_")
    ]
    return workdirs[workdir] | {"config": a_config(towers=towers, **earlier or {})}

  return initialise.load_pretrained(state, a_config(**kwargs), load)


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_named_modules_are_loaded_and_all_else_stays():
  state, first, second = a_state(), variables(1), variables(2)
  new, report = carry(
    state, {"W1": first, "W2": second}, init_from={"ecg": "W1", "cmr_es": "W2", "log_scale": "W2"}
  )
  for source, modules in ((first, ["ecg"]), (second, ["cmr_es", "log_scale"])):
    for module in modules:
      same(new.params[module], source["params"][module])
  same(new.statistics["cmr_es"], second["batch_stats"]["cmr_es"])
  for module in ("cmr_ed", "head_ecg"):
    same(new.params[module], state.params[module])
  same(new.statistics["cmr_ed"], state.statistics["cmr_ed"])
  same((new.step, new.opt_state), (state.step, state.opt_state))

  # Everything accounted for: the report names every leaf of the model, and says of each what the
  # arrays say.
  origins = {path: origin.split(" ")[-1] for path, origin in report.origin.items()}
  expected = {"ecg": "W1", "cmr_es": "W2", "log_scale": "W2"}

  def names(tree):
    return [state_lib.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

  paths = names(state.params) + ["batch_stats/" + path for path in names(state.statistics)]
  assert origins == {
    path: expected.get(path.removeprefix("batch_stats/").split("/")[0], "fresh") for path in paths
  }
  assert report.left_over == {}


def test_all_fresh():
  state = a_state()
  new, report = carry(state, {})
  same(new, state)
  assert set(report.origin.values()) == {"fresh"}


def test_dtype_and_sharding_are_those_of_the_model():
  state, source = a_state(), variables(1)
  mesh = parallel.make_mesh(-1, 1)
  state = jax.device_put(
    state, parallel.shardings(state, ((r"patch_embed/kernel", (None, "model")),), mesh)
  )
  source["params"]["ecg"] = jax.tree.map(np.float16, source["params"]["ecg"])
  new, _ = carry(state, {"W": source}, init_from={"ecg": "W"})
  for old, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
    assert (old.dtype, old.sharding) == (leaf.dtype, leaf.sharding)
  assert new.params["ecg"]["patch_embed"]["kernel"].sharding.spec == P(None, "model")


def test_two_towers_from_one_do_not_share_memory():
  """The step donates its buffers; the source's arrays must stay as they are."""
  source = variables(1, towers=("volume",))
  before = jax.tree.map(np.copy, source)
  new, report = carry(
    a_state(), {"W": source}, init_from={"cmr_ed": "W", "cmr_es": "W", "ecg": "W"}
  )
  same(new.params["ecg"], source["params"]["ecg"])
  for tower in ("cmr_ed", "cmr_es"):
    same(new.params[tower], source["params"]["cmr_volume"])
    same(new.statistics[tower], source["batch_stats"]["cmr_volume"])
  assert report.origin["cmr_es/fc/kernel"] == "loaded from W (cmr_volume)"
  jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(new)
  same(source, before)


def test_another_tower_is_taken_only_where_there_is_one():
  with pytest.raises(
    UserError, match="config.init_from.cmr_ed is W, which has no cmr_ed; it has cmr_a, cmr_b, ecg"
  ):
    carry(a_state(), {"W": variables(1, towers=("a", "b"))}, init_from={"cmr_ed": "W"})
  with pytest.raises(UserError, match="has no head_ecg"):
    source = variables(1)
    del source["params"]["head_ecg"]
    carry(a_state(), {"W": source}, init_from={"head_ecg": "W"})


def test_its_own_name_goes_before_the_only_other_tower():
  source = variables(1, towers=("ed", "es"))
  new, _ = carry(a_state(), {"W": source}, init_from={"cmr_es": "W"})
  same(new.params["cmr_es"], source["params"]["cmr_es"])


def test_every_left_over_and_every_lack_is_listed():
  source = variables(1, decoder=True, patch=5)
  del (
    source["params"]["ecg"]["cls_token"],
    source["batch_stats"]["cmr_ed"]["backbone"]["norm"]["bn"]["mean"],
  )
  with pytest.raises(UserError) as raised:
    carry(a_state(), {"W": source}, init_from={"ecg": "W", "cmr_ed": "W"})
  text = str(raised.value)
  for found in (
    "ecg/decoder/embed/kernel (4, 4) of W is not in this model",
    "ecg/decoder/embed/bias (4,) of W is not",
    "ecg/decoder/mask_token (1, 1, 4) of W is not",
    "ecg/cls_token (1, 1, 4) is not in W",
    "batch_stats/cmr_ed/backbone/norm/bn/mean (4,) is not in W",
    "ecg/patch_embed/kernel is (5, 4) in W and (3, 4) here",
  ):
    assert found in text
  assert text.count(";") == 5 and "\n" not in text and "head_ecg" not in text


def test_what_is_named_stays_behind_or_fresh():
  state, source = a_state(), variables(1, decoder=True, patch=5)
  del source["params"]["ecg"]["cls_token"]
  new, report = carry(
    state,
    {"W": source},
    init_from={"ecg": "W"},
    init_except=("^ecg/decoder/", "cls_token$", "^ecg/patch_embed/kernel"),
  )
  same(new.params["ecg"]["pos_embed"], source["params"]["ecg"]["pos_embed"])
  same(new.params["ecg"]["patch_embed"]["bias"], source["params"]["ecg"]["patch_embed"]["bias"])
  same(new.params["ecg"]["cls_token"], state.params["ecg"]["cls_token"])
  assert report.origin["ecg/cls_token"] == "fresh (config.init_except)"
  same(new.params["ecg"]["patch_embed"]["kernel"], state.params["ecg"]["patch_embed"]["kernel"])
  assert report.left_over == {
    "ecg/decoder/embed/kernel": "(4, 4) in W",
    "ecg/decoder/embed/bias": "(4,) in W",
    "ecg/decoder/mask_token": "(1, 1, 4) in W",
    "ecg/patch_embed/kernel": "(5, 4) in W",
  }


def test_the_description_counts_and_names_what_was_left():
  source = variables(1, decoder=True)
  _, report = carry(
    a_state(),
    {"W": source},
    init_from={"ecg": "W"},
    freeze=("^head_ecg/",),
    init_except=("^ecg/decoder/mask", "^ecg/decoder/embed"),
  )
  lines = initialise.describe(report).splitlines()
  numbers = 3 * WIDTH + WIDTH + WIDTH + (1 + 2 * LEADS) * WIDTH
  assert f"ecg: 4 arrays of {numbers} numbers loaded from W" in lines
  # kernels 8 + 16, bias 4, and four of batch norm
  assert "cmr_ed: 7 arrays of 44 numbers fresh" in lines
  assert "head_ecg: 2 arrays of 20 numbers fresh, and frozen so" in lines
  assert lines[-1].startswith("left behind: ecg/decoder/embed/bias (4,) in W, ") and len(lines) == 6


def test_a_tower_of_another_view_is_taken_by_its_own_name_only():
  """A tower of the only other name stands for this one because it looked at the same; of the same
  name, it is said."""
  other = dict(view="es_volume")
  _, report = carry(a_state(), {"W": variables(1)}, earlier=other, init_from={"cmr_ed": "W"})
  assert (
    report.origin["cmr_ed/fc/kernel"]
    == "loaded from W (which looked at es_volume, here at ed_volume)"
  )
  with pytest.raises(
    UserError, match=r"W \(cmr_a\), a tower that looked at es_volume, this one looks at ed_volume"
  ):
    carry(a_state(), {"W": variables(1, towers=("a",))}, earlier=other, init_from={"cmr_ed": "W"})
  _, report = carry(a_state(), {"W": variables(1)}, earlier=other, init_from={"ecg": "W"})
  assert report.origin["ecg/cls_token"] == "loaded from W"


def test_another_profile_of_the_ecgs_is_said():
  _, report = carry(
    a_state(),
    {"W": variables(1)},
    earlier=dict(profile="mmcl"),
    init_from={"ecg": "W", "cmr_ed": "W"},
  )
  assert (
    report.origin["ecg/cls_token"]
    == "loaded from W (whose ECGs had the profile mmcl, these have minimal)"
  )
  assert report.origin["cmr_ed/fc/kernel"] == "loaded from W"


# -- Positions --


def test_a_ramp_along_time_stays_a_ramp_in_its_row():
  """Row l holds 100 l, 100 l + 1, 100 l + 2, ...: 4 columns become 7 at steps of one half, and 3 at
  steps of 3/2."""
  row = 100.0 * np.arange(LEADS)[:, None] + np.arange(4)
  before = np.concatenate([[-7.0], row.ravel()])[None, :, None] * np.array([1.0, -2.0])
  for columns, step in ((7, 0.5), (3, 1.5)):
    after = initialise.resize_positions(before.astype(np.float32), 1 + LEADS * columns)
    hand = 100.0 * np.arange(LEADS)[:, None] + step * np.arange(columns)
    hand = np.concatenate([[-7.0], hand.ravel()])[None, :, None] * np.array([1.0, -2.0])
    np.testing.assert_allclose(after, hand, rtol=1e-6, atol=1e-5)
    assert after.dtype == np.float32


def test_a_cubic_is_met_exactly():
  """The not-a-knot spline through a cubic polynomial is that polynomial."""

  def cubic(t):
    return 0.5 * t**3 - 2 * t**2 + t - 3

  before = np.concatenate([[0.0], np.tile(cubic(np.arange(6)), LEADS)])[None, :, None]
  after = initialise.resize_positions(before, 1 + LEADS * 11)
  np.testing.assert_allclose(after[0, 1:, 0], np.tile(cubic(np.arange(11) / 2), LEADS), atol=1e-12)


def test_rows_do_not_leak():
  rng = np.random.default_rng(0)
  before = rng.normal(size=(1, 1 + LEADS * 5, 3))
  changed = before.copy()
  changed[:, 1 + 5 * 4 : 1 + 5 * 5] += 1  # lead 4
  a, b = (
    initialise.resize_positions(x, 1 + LEADS * 8)[0, 1:].reshape(LEADS, 8, 3)
    for x in (before, changed)
  )
  np.testing.assert_allclose(b[4] - a[4], 1, atol=1e-12)
  np.testing.assert_array_equal(np.delete(a, 4, axis=0), np.delete(b, 4, axis=0))
  np.testing.assert_array_equal(initialise.resize_positions(before, 1 + LEADS * 5), before)


def test_positions_of_another_length_are_carried_over():
  state, source = a_state(columns=4), variables(1, columns=2)
  new, report = carry(state, {"W": source}, init_from={"ecg": "W"})
  old, found = source["params"]["ecg"]["pos_embed"], new.params["ecg"]["pos_embed"]
  rows, places = old[0, 1:].reshape(LEADS, 2, WIDTH), np.arange(4)[:, None] / 3
  # through two points the spline is their line
  line = (1 - places) * rows[:, :1] + places * rows[:, 1:]
  np.testing.assert_allclose(found[0, 1:], line.reshape(-1, WIDTH), rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(found[:, 0], old[:, 0])
  assert report.origin["ecg/pos_embed"] == "loaded from W, interpolated from 2 to 4 columns a lead"


@pytest.mark.parametrize(
  "shape", [(1, 30, WIDTH), (1, 1 + LEADS * 4, WIDTH + 1), (1, 1 + LEADS, WIDTH)]
)
def test_positions_that_are_no_rows_of_leads_are_an_error(shape):
  source = variables(1)
  source["params"]["ecg"]["pos_embed"] = np.zeros(shape, np.float32)
  text = f"ecg/pos_embed is {shape} in W and (1, 25, 4) here (expected 1 + 12 n"
  with pytest.raises(UserError, match=re.escape(text)):
    carry(a_state(), {"W": source}, init_from={"ecg": "W"})


# -- Mistakes --


@pytest.mark.parametrize(
  "case, text",
  [
    (
      dict(init_from={"signal": "W"}),
      "names signal; this model has the modules cmr_ed, cmr_es, ecg, head_ecg,",
    ),
    (
      dict(init_from={"ecg": "W"}, init_except=("^ecg/decoder/",)),
      "'^ecg/decoder/', which matches no parameter of",
    ),
    (
      dict(init_from={"ecg": "W"}, init_except=("^head_ecg/",)),
      "'^head_ecg/', which matches no parameter of ecg",
    ),
    (dict(init_from={"ecg": "W"}, init_except="^ecg/"), "expected a tuple of regexes"),
    (
      dict(init_except=("^ecg/decoder/",)),
      "earlier stage, and config.init_from (cmr_ed, cmr_es, ecg) names none",
    ),
    (
      dict(frozen=("ed",)),
      "model.towers.ed.frozen would freeze random weights (5 arrays, such as cmr_ed/backbone/",
    ),
    (
      dict(init_from={"cmr_es": "W"}, frozen=("ed", "es")),
      "give config.init_from.cmr_ed the workdir",
    ),
    (
      dict(init_from={"cmr_ed": "W"}, frozen=("ed",), init_except=("cmr_ed/backbone/.*/mean",)),
      "would freeze random weights (1 arrays, such as batch_stats/cmr_ed/backbone/norm/bn/mean)",
    ),
  ],
)
def test_mistakes_are_one_line(case, text):
  with pytest.raises(UserError, match=re.escape(text)) as raised:
    carry(a_state(), {"W": variables(1)}, **case)
  assert "\n" not in str(raised.value)


def test_a_frozen_tower_that_is_loaded_is_fine():
  source = variables(1)
  new, _ = carry(
    a_state(),
    {"W": source},
    init_from={"cmr_ed": "W"},
    frozen=("ed",),
    init_except=("^cmr_ed/fc/",),
  )
  same(new.params["cmr_ed"]["backbone"], source["params"]["cmr_ed"]["backbone"])


def test_other_attention_heads_of_the_same_width_are_an_error():
  """Shapes fit, but the columns of queries, keys and values lie head by head."""
  kernels = ("ecg/block0/qkv/kernel", "ecg/decoder/block0/qkv/kernel", "ecg/pool/qkv/kernel")

  def config(heads, decoder_heads):
    size = dict(width=8, depth=1, heads=heads, decoder=(8, 1, decoder_heads))
    return ConfigDict(dict(model=dict(towers=dict(ecg=dict(fn="ecg_vit", size=size)))))

  def troubles(here, there):
    taken = dict.fromkeys([("params", path) for path in (*kernels, "ecg/cls_token")], 0)
    transfer = initialise.Transfer(taken, {}, {}, [])
    return initialise.other_heads(transfer, config(*here), config(*there), "W")

  assert troubles((2, 4), (2, 4)) == []
  assert troubles((2, 4), (2, 8)) == [f"{kernels[1]} has 8 attention heads in W and 4 here"]
  assert troubles((2, 4), (4, 4)) == [
    f"{kernel} has 4 attention heads in W and 2 here" for kernel in (kernels[0], kernels[2])
  ]


def test_what_load_says_comes_through():
  def load(workdir):
    raise UserError(f"{workdir} has no checkpoint")

  with pytest.raises(UserError, match="W9 has no checkpoint"):
    initialise.load_pretrained(a_state(), a_config(init_from={"ecg": "W9"}), load)
