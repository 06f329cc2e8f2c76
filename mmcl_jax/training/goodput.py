"""Goodput: the share of a run's wall time that was training, and what the rest went to.

    WORKDIR/goodput.jsonl      a line each time that `mmcl train` ends in order:
                               {"from": step, "to": step, KIND: seconds, ...}

Each moment counts as one of KINDS: compiling, the first call of the step; loading, all before the
first batch is asked for; saving, where the loop waits for a checkpoint (or a profile); evaluating,
with what evaluators compile; waiting_for_data, until a batch has come, unless the devices are still
busy with the step before by then; training, all else.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable

from mmcl_jax.support import files

KINDS = ("training", "compiling", "loading", "saving", "evaluating", "waiting_for_data")


class Goodput:
  """Accounts for wall time from when it is made.

  Args:
    clock: () -> seconds.
  """

  def __init__(self, clock: Callable[[], float]):
    self.clock = clock
    self.seconds = dict.fromkeys(KINDS, 0.0)
    self.kind, self.since = "loading", clock()

  def switch(self, kind: str) -> str:
    """Time counts as `kind` from now on; what it counted as until now."""
    now = self.clock()
    self.seconds[self.kind] += now - self.since
    before, self.kind, self.since = self.kind, kind, now
    return before

  @contextlib.contextmanager
  def on(self, kind: str, unless: Callable[[], bool] | None = None):
    """Time within counts as `kind`; as what it counted before where `unless()` holds at its end."""
    before = self.switch(kind)
    try:
      yield
    finally:
      if unless is not None and unless():
        self.kind = before
      self.switch(before)

  def stepping(self) -> float:
    """Seconds of training and of waiting for data so far: those that steps take."""
    self.switch(self.kind)
    return self.seconds["training"] + self.seconds["waiting_for_data"]

  def shares(self) -> dict[str, float]:
    """Of all time so far, by kind; they add up to 1."""
    self.switch(self.kind)
    total = sum(self.seconds.values())
    return {kind: x / total if total else 0.0 for kind, x in self.seconds.items()}

  def write(self, workdir: str, start: int, end: int) -> None:
    """Adds its line to the workdir's goodput.jsonl."""
    file = pathlib.Path(workdir) / "goodput.jsonl"
    seconds = {kind: round(x, 3) for kind, x in self.seconds.items()}
    with open(files.opened(file, os.O_WRONLY | os.O_APPEND), "a") as lines:
      lines.write(json.dumps({"from": start, "to": end, **seconds}) + "\n")


def describe(shares: dict[str, float], seconds: float) -> str:
  """A line such as `goodput 91.0%: of 1:02:03 training 91.0%, compiling 4.0%, ...`."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  parts = []
  for kind, share in shares.items():
    words = kind.replace("_", " ")
    parts.append(f"{words} {share:.1%}")
  useful = shares["training"]
  return f"goodput {useful:.1%}: of {hours}:{minutes:02d}:{rest:02d} {', '.join(parts)}"
