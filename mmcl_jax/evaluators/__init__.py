"""Evaluators: what is measured of a run, chosen by the config alone.

    config.evaluators.NAME = dict(fn="retrieval", every=0, **parameters)
    config.evaluators.NAME = dict(fn="my_package.my_module:function", every=0, **parameters)

An evaluator is `fn(context, **parameters) -> Result` (evaluators/base.py). All of them run in `mmcl
evaluate`. One with `every` above 0 also runs while training, on the validation split, after that
many steps and at the end; -1, or no `every`, is config.every.evaluate, and 0 is not in training.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mmcl_jax import registry
from mmcl_jax.errors import UserError
from mmcl_jax.evaluators.base import Result, numbers

BUILT_IN = {
  "losses": "mmcl_jax.evaluators.losses:losses",
  "probes": "mmcl_jax.evaluators.probes:probes",
  "phenotypes": "mmcl_jax.evaluators.phenotypes:phenotypes",
  "diseases": "mmcl_jax.evaluators.diseases:diseases",
  "low_data": "mmcl_jax.evaluators.low_data:low_data",
  "survival": "mmcl_jax.evaluators.survival:survival",
  "retrieval": "mmcl_jax.evaluators.retrieval:retrieval",
  "generation": "mmcl_jax.projects.generation.evaluator:generation",
  "localisation": "mmcl_jax.projects.localisation.evaluator:localisation",
  "training_curves": "mmcl_jax.evaluators.training_curves:training_curves",
  "reconstruction": "mmcl_jax.evaluators.reconstruction:reconstruction",
  "data": "mmcl_jax.evaluators.data:data",
}


class Evaluator(NamedTuple):
  name: str
  every: int  # steps between two evaluations while training; 0: none
  run: Callable  # context -> Result, parameters bound


def build(config) -> list[Evaluator]:
  """`config.evaluators`, in the order of BUILT_IN and then by name, which is that of the report.

  Raises:
    UserError: an entry that names no function, or a parameter that it does not take; the message
      lists what exists.
  """
  try:
    entries = {name: dict(entry) for name, entry in config.evaluators.items()}
  except (AttributeError, TypeError, ValueError):
    raise UserError(
      f"config.evaluators is {config.evaluators!r}; expected entries such as "
      "config.evaluators.retrieval = dict(fn='retrieval', every=0)"
    ) from None
  places = {fn: place for place, fn in enumerate(BUILT_IN)}

  def order(name):
    return places.get(entries[name].get("fn"), len(places)), name

  evaluators = []
  for name in sorted(entries, key=order):
    evaluators.append(from_entry(name, entries[name], config.every.evaluate))
  return evaluators


def in_training(config) -> list[Evaluator]:
  """Those of `build` that run while training."""
  evaluators = [evaluator for evaluator in build(config) if evaluator.every]
  for evaluator in evaluators:
    fn = config.evaluators[evaluator.name].fn
    if fn == "probes" and not config.model.towers:
      raise UserError(
        f"config.evaluators.{evaluator.name} is 'probes', and this model has no embedding to "
        "probe; "
        f"set config.evaluators.{evaluator.name}.every=0"
      )
  return evaluators


def scores(evaluators: list[Evaluator], context) -> Iterator[dict[str, float]]:
  """What each of them adds to the log while training: {"validation/NAME": number}."""
  for evaluator in evaluators:
    by_path = numbers(evaluator.run(context).metrics)
    yield {f"validation/{path}": value for path, value in by_path.items()}


def from_entry(name: str, entry: dict, default: int) -> Evaluator:
  """The evaluator of an entry of config.evaluators; `default`: its `every` where that is -1."""
  where = f"config.evaluators.{name}"
  if "fn" not in entry:
    raise UserError(
      f"{where} has the keys {sorted(entry)}; expected fn, every and the parameters of fn"
    )
  fn = entry.pop("fn")
  every = entry.pop("every", -1)
  function = find(fn, f"{where}.fn")
  registry.check_parameters(function, entry, where, fn, passed=1)
  return Evaluator(name, default if every == -1 else every, checked(function, entry, where, fn))


def find(fn: str, where: str) -> Callable:
  """The evaluator that `fn` names.

  The config of a workdir, which may come from somebody else, names evaluators too, so no function
  is accepted that was not written as one: its first parameter must be called `context`.
  """
  function = registry.resolve(fn, BUILT_IN, where)
  if registry.first_parameter(function) != "context":
    raise UserError(
      f"{where} is {fn!r}, whose first parameter is not `context`; expected an evaluator, "
      "(context, **parameters) -> Result"
    )
  return function


def checked(function: Callable, parameters: dict, where: str, fn: str) -> Callable:
  """context -> `function(context, **parameters)`, which must be a Result."""

  @functools.wraps(function)
  def run(context):
    result = function(context, **parameters)
    if not isinstance(result, Result):
      raise UserError(
        f"{where}: {fn} returned {type(result).__name__}; expected mmcl_jax.evaluators.base.Result"
      )
    return result

  return run
