"""Entries of config.evaluators, what they return, and what is refused."""

import pytest
from ml_collections import ConfigDict

from mmcl_jax import evaluators
from mmcl_jax.errors import UserError
from mmcl_jax.evaluators.base import Result, Score, merged, numbers


def test_two_evaluators_that_return_one_name_are_one_line():
  results = {"config.evaluators.a": Result({"x": 1}), "config.evaluators.b": Result({"x": 2})}
  with pytest.raises(UserError, match="evaluators.b and config.evaluators.a both return metrics"):
    merged(results)


@pytest.mark.parametrize(
  "entries, words",
  [
    ({"a": {"fn": "nope"}}, r"evaluators.a.fn is 'nope'; expected one of losses, probes"),
    ({"a": {"fn": "nowhere:f"}}, "cannot be imported .*PYTHONPATH"),
    ({"a": {"every": 3}}, r"evaluators.a has the keys \['every'\]; expected fn, every"),
    ({"a": {"fn": "phenotypes", "drawn": 3}}, "sets drawn, which phenotypes does not take"),
    (["losses"], r"config.evaluators is \['losses'\]; expected entries such as config.evaluators"),
    ("losses", "config.evaluators is 'losses'; expected entries such as"),
  ],
)
def test_evaluators_that_there_are_not_are_one_line(entries, words):
  config = ConfigDict({"evaluators": entries, "every": {"evaluate": 3}})
  with pytest.raises(UserError, match=words):
    evaluators.build(config)


def test_an_evaluator_that_returns_no_result_is_one_line():
  run = evaluators.checked(lambda context: {"x": 1}, {}, "config.evaluators.a", "mine:f")
  with pytest.raises(
    UserError, match="config.evaluators.a: mine:f returned dict; expected .*Result"
  ):
    run(None)


def test_numbers_go_to_the_log_by_their_path():
  metrics = {"a": 1, "b": {"c": Score(0.5, (0.1, 0.9)), "d": [1, 2], "e": True}, "f": "words"}
  assert numbers(metrics) == {"a": 1.0, "b/c": 0.5}
