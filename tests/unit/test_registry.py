"""Parts by name: what is found, what is refused, and in which words."""

import pytest

from mmcl_jax import registry
from mmcl_jax.errors import UserError

BUILT_IN = {"join": "os.path:join", "ordered": "collections:OrderedDict.fromkeys"}


def scale(values, by, shift=0.0):
  return [by * value + shift for value in values]


def test_a_name_or_a_path_gives_the_part():
  import os.path

  assert registry.resolve("join", BUILT_IN, "config.x.fn") is os.path.join
  assert registry.resolve("os.path:split", BUILT_IN, "config.x.fn") is os.path.split
  assert list(registry.resolve("ordered", BUILT_IN, "config.x.fn")("ab")) == ["a", "b"]


@pytest.mark.parametrize("fn", ["joins", "", "os.path", ":join", "os.path:", None, 3])
def test_an_unknown_name_lists_what_exists(fn):
  with pytest.raises(UserError, match=r"config\.x\.fn is .*; expected one of join, ordered, or 'p"):
    registry.resolve(fn, BUILT_IN, "config.x.fn")


@pytest.mark.parametrize("fn", ["no_such_module:f", "os.path:no_such_function"])
def test_what_cannot_be_imported_says_so(fn):
  with pytest.raises(UserError, match=r"config\.x\.fn is .* cannot be imported .*PYTHONPATH"):
    registry.resolve(fn, BUILT_IN, "config.x.fn")


def test_parameters_go_by_the_signature():
  registry.check_parameters(scale, {"by": 2}, "config.x", "scale", passed=1)
  registry.check_parameters(lambda **anything: anything, {"by": 2}, "config.x", "any")
  with pytest.raises(
    UserError, match=r"config\.x sets bye, which scale does not take; .* by, shif"
  ):
    registry.check_parameters(scale, {"bye": 2, "by": 1}, "config.x", "scale", passed=1)
  with pytest.raises(UserError, match=r"config\.x does not set by, which scale needs"):
    registry.check_parameters(scale, {"shift": 2}, "config.x", "scale", passed=1)
