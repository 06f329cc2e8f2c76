"""The contract of an evaluator: `fn(context, **parameters) -> Result`.

The same function runs while training, on the validation split, and in `mmcl evaluate`, on the test
split: `context.split` says which (evaluators/context.py).
"""

from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from mmcl_jax.errors import UserError


class Score(NamedTuple):
  """A metric with its 95 % interval; {value, ci} in results.json, its value in the log."""

  value: float
  ci: tuple[float, float]


class Table(NamedTuple):
  """A table of text: `head` names the columns, each of `rows` has as many cells; `note` stands
  below."""

  title: str
  head: list[str]
  rows: list[list[str]]
  note: str = ""


class Result(NamedTuple):
  """What an evaluator returns; all of it may be empty.

  metrics: name -> number, Score, or nested dict of these: entries of results.json. While training,
    every number goes to the log as validation/NAME, or validation/NAME/.../NAME.
  tables: for the report, the first one of all evaluators also for the terminal.
  figures: name -> figure, saved as NAME.png; figure.get_label() is its title in the report.
  predictions: name -> array [N, ...] of the scored split, for predictions.npz.
  arrays: name -> what NAME.npz holds, for files that other programs read.
  texts: file name -> content of a text file.
  """

  metrics: dict[str, Any] = {}
  tables: list[Table] = []
  figures: dict[str, Figure] = {}
  predictions: dict[str, np.ndarray] = {}
  arrays: dict[str, dict[str, np.ndarray]] = {}
  texts: dict[str, str] = {}


def merged(results: dict[str, Result]) -> Result:
  """The results of several evaluators as one; UserError where two give the same name.

  Args:
    results: "config.evaluators.NAME" -> its result.
  """
  together = Result({}, [], {}, {}, {}, {})
  owner = {}
  for where, result in results.items():
    together.tables.extend(result.tables)
    for kind in ("metrics", "figures", "predictions", "arrays", "texts"):
      entries = getattr(result, kind)
      for name in entries:
        if (kind, name) in owner:
          raise UserError(
            f"{where} and {owner[kind, name]} both return {kind} of the name {name!r}; rename one"
          )
        owner[kind, name] = where
      getattr(together, kind).update(entries)
  return together


def numbers(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
  """Every number of nested metrics by its path, "NAME/NAME"; of a Score its value. What is no
  number is left out."""
  by_path = {}
  for name, value in metrics.items():
    if isinstance(value, Score):
      value = value.value
    if isinstance(value, dict):
      by_path |= numbers(value, f"{prefix}{name}/")
    elif isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
      by_path[f"{prefix}{name}"] = float(value)
  return by_path


def number(value: float | None) -> str:
  """A cell of a table: three decimals, or a dash for what is not known."""
  if value is None or not np.isfinite(value):
    return "-"
  return f"{value:z.3f}"


def interval(value: float | None, ci) -> str:
  """A cell of a table: a number with its interval."""
  if number(value) == "-":
    return "-"
  low, high = ci
  return f"{number(value)} [{number(low)}, {number(high)}]"
