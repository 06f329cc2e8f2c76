"""Early stopping: training ends when validation has gained nothing for long enough.

A score to stop on is a loss, so lower is better, and there is no other rule for the direction.
"""

import math
from typing import NamedTuple

from mmcl_jax.errors import UserError


class Best(NamedTuple):
  """Step and loss of the best evaluation so far, None where no loss was finite, and the evaluations
  in a row since."""

  step: int | None = None
  loss: float | None = None
  since: int = 0


def judged(best: Best, step: int, loss: float) -> Best:
  """The best after one more evaluation. Equal is no better, and neither is what is not finite."""
  better = math.isfinite(loss) and (best.loss is None or loss < best.loss)
  return Best(step, loss) if better else best._replace(since=best.since + 1)


def over(best: Best, patience: int) -> bool:
  """Has nothing been gained for `patience` evaluations? 0: never."""
  return 0 < patience <= best.since


def check(config) -> None:
  """Is there such a score as config.stop_on?"""
  known = [f"validation/{name}" for name in sorted(config.objectives)]
  if config.stop_after and config.stop_on not in known:
    raise UserError(
      f"config.stop_on is {config.stop_on!r}; expected a loss on validation, of which lower is better: "
      f"{', '.join(known)}"
    )
  watching = []
  for entry in config.evaluators.values():
    if entry.get("every", -1) != 0:
      watching.append(str(entry.get("fn")))
  if config.stop_after and "losses" not in watching:
    raise UserError(
      f"config.stop_on is {config.stop_on}, which the evaluator 'losses' computes while training; "
      f"config.evaluators has {', '.join(watching) or 'nothing'} with an `every` that is not 0"
    )
