"""Every number of a config has its range, and one outside of it is refused before any work."""

import importlib.util
import inspect
import itertools
import re

import pytest
from ml_collections import ConfigDict

from common import ROOT
from mmcl_jax import configuration, objectives, ranges, registry, train
from mmcl_jax.errors import UserError
from mmcl_jax.models import towers

RECIPES = sorted(file.stem for file in (ROOT / "configs").glob("*.py"))
# arguments of recipes beside the size
CHOICES = ("arm", "view", "stage", "kind", "start", "task", "targets", "encoder")
OUTSIDE = float("nan"), float("inf"), -float("inf"), -2, 1e40, 2**63, True, None, "1"


def recipes():
  """Every recipe at every size with every value of its other arguments, and what all of them begin
  with."""
  yield "defaults", configuration.defaults(8, 6)
  for name in RECIPES:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"configs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source = inspect.getsource(module.get_config)
    variants = [""]
    for choice in CHOICES:
      if re.search(rf"parse_arg\(.*\b{choice}=", source):
        variants += [f",{choice}={value}" for value in values_of(module, choice)]
    for size, variant in itertools.product(module.SIZES, variants):
      yield f"{name}:size={size}{variant}", module.get_config(f"size={size}{variant}")


def values_of(module, choice):
  """The values that a recipe's argument may have, out of the line in which it refuses all
  others."""
  with pytest.raises(UserError) as refused:
    module.get_config(f"{choice}=none_of_these")
  return re.split(", | or ", str(refused.value).partition("expected ")[2].removeprefix("one of "))


def numbers(config):
  return {
    path: value
    for path, value in ranges.leaves(config.to_dict())
    if isinstance(value, (int, float)) and not isinstance(value, bool)
  }


@pytest.fixture(scope="module")
def configs():
  found = dict(recipes())
  for config in found.values():
    config.model = towers.complete(config.model)
  return found


def test_every_number_of_every_recipe_has_a_range_and_is_in_it(configs):
  assert len(configs) > 60
  for name, config in configs.items():
    without = [path for path in numbers(config) if ranges.of(path, config) is None]
    assert not without, f"{name}: mmcl_jax/ranges.py says nothing of {without}"
    ranges.check(config)


def test_every_number_of_a_built_in_objective_has_a_range():
  for name in objectives.BUILT_IN:
    config = ConfigDict(dict(objectives=dict(x=dict(fn=name))))
    for parameter in inspect.signature(objectives.find(name, "")).parameters.values():
      if isinstance(parameter.default, (int, float)) and not isinstance(parameter.default, bool):
        expected = ranges.of(f"objectives.x.{parameter.name}", config)
        assert expected and expected.holds(parameter.default), f"{name}.{parameter.name}"


def test_every_number_of_a_built_in_tower_has_a_range():
  for name, path in towers.BUILT_IN.items():
    config = ConfigDict(dict(model=dict(towers=dict(x=dict(fn=name)))))
    for parameter in registry.parameters(registry.resolve(path, {}, "fn"), without=towers.GIVEN):
      if isinstance(parameter.default, (int, float)) and not isinstance(parameter.default, bool):
        expected = ranges.of(f"model.towers.x.{parameter.name}", config)
        assert expected and expected.holds(parameter.default), f"{name}.{parameter.name}"


def changed(config, path, value):
  """A copy of the config with another value at `path`, which may go through lists."""
  tree = config.to_dict()
  keys = [int(key) if key.isdigit() else key for key in re.findall(r"[^.\[\]]+", path)]

  def put(node, keys):
    if not keys:
      return value
    if isinstance(node, dict):
      return node | {keys[0]: put(node[keys[0]], keys[1:])}
    return [*node[: keys[0]], put(node[keys[0]], keys[1:]), *node[keys[0] + 1 :]]

  return type(config)(put(tree, keys))


@pytest.mark.reported(
  "optimizer.learning_rate=-1 trained uphill without a word",
  "seed=-1 and workers=-1 ended in tracebacks",
)
def test_every_number_outside_its_range_is_one_line(configs):
  """Every path of every recipe once, with every value that no rule allows there."""
  seen = set()
  for config in configs.values():
    for path in numbers(config).keys() - seen:
      seen.add(path)
      expected = ranges.of(path, config)
      for value in OUTSIDE:
        if expected.holds(value):
          continue
        with pytest.raises(UserError) as refused:
          ranges.check(changed(config, path, value))
        assert str(refused.value) == f"config.{path} is {value!r}; expected {expected.words}"


@pytest.mark.parametrize(
  "path, refused, allowed",
  [
    ("optimizer.learning_rate", (-1.0, -1e-9, float("nan")), (0.0, 1.0)),
    ("optimizer.b1", (1.0, 1 - 1e-9, -0.1), (0.0, 0.999)),  # 1 - 1e-9 is 1 in float32
    ("optimizer.ema", (1.0, -0.1), (0.0, 0.999)),
    ("optimizer.clip", (-1.0, float("inf")), (0.0, 1)),
    ("optimizer.layer_decay", (0.0, 1.5), (0.75, 1.0)),
    ("seed", (-1, 2**32, 1.0, True), (0, 2**32 - 1)),
    ("batch", (0, -8, 8.0), (1,)),
    ("steps", (0, 2**31), (1,)),
    ("keep", (0,), (1,)),
    ("every.save", (0,), (1,)),
    ("every.save_minutes", (-1.0,), (0.0, 0.5)),
    ("loader.workers", (-1, 0.5), (0,)),
    ("loader.threads", (0,), (1,)),
    ("bad_rows", (-1,), (0,)),
    ("stop_after", (-1,), (0,)),
    ("mesh.data", (0, -2), (-1, 4)),
    ("model.towers.ecg.mask_ratio", (1.0, -0.1), (0.0, 0.8)),
    ("model.towers.ed.planes", (0, 6.0), (6,)),
    ("model.max_scale", (0.0,), (100.0,)),
    ("augment.ecg.time_flip", (1.1, -0.1), (0.0, 1.0)),
    ("objectives.dual_phase.temperature", (0.0, -0.1, 1e-50), (0.07,)),  # 1e-50 is 0 in float32
    ("objectives.dual_phase.weight", (-1.0, float("nan")), (0.0, 2)),
  ],
)
def test_ranges_end_where_they_should(configs, path, refused, allowed):
  config = configs["joint:size=test"]
  for value in allowed:
    ranges.check(changed(config, path, value))
  for value in refused:
    with pytest.raises(UserError, match=re.escape(f"config.{path} is {value!r}; expected ")):
      ranges.check(changed(config, path, value))


def test_entries_of_lists_and_schedules_are_looked_at(configs):
  config = configs["joint:size=test"].copy_and_resolve_references()
  config.data.mix, config.optimizer.rates = (("a", 0.3), ("b", 1.0)), (("^ecg/", 0.0),)
  with pytest.raises(
    UserError,
    match=re.escape("config.data.mix[1][1] is 1.0; expected a number above 0 and below 1"),
  ):
    ranges.check(config)
  config.data.mix = ()
  with pytest.raises(
    UserError, match=re.escape("config.optimizer.rates[0][1] is 0.0; expected a number above 0")
  ):
    ranges.check(config)
  config.optimizer.rates = ()
  with config.unlocked():
    config.objectives.dual_phase = dict(
      fn="my_module:my_loss",
      weight=dict(steps=(0, 10), values=(0.0, float("inf"))),
      temperature=-1.0,
    )
  with pytest.raises(
    UserError, match=re.escape("config.objectives.dual_phase.weight.values[1] is inf; expected")
  ):
    ranges.check(config)
  config.objectives.dual_phase.weight.values = (0.0, 1.0)
  ranges.check(config)  # the parameters of a loss of one's own are not ours to judge


def test_it_is_the_first_thing_that_training_looks_at(config, tmp_path):
  config.data.cohort, config.optimizer.b2 = "nowhere", 1.0
  with pytest.raises(
    UserError, match="config.optimizer.b2 is 1.0; expected a number from 0 to below 1"
  ):
    train.train(config, str(tmp_path / "w"))
  assert not (tmp_path / "w").exists()
