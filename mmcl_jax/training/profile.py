"""A trace of some steps by JAX's profiler, for TensorBoard and xprof.

    WORKDIR/profile/plugins/profile/TIME/HOST.xplane.pb

The first host alone traces: all run the same program, and a trace slows its host down.
"""

import pathlib

import jax

from mmcl_jax.errors import UserError, one_line
from mmcl_jax.support import files


def check(config) -> None:
  """Does the run have the steps that config.profile asks for?"""
  entry = config.profile
  if entry.steps and entry.first > config.steps:
    raise UserError(
      f"config.profile.first is {entry.first}, and the run ends with step {config.steps}; expected "
      "a step of it, or config.profile.steps=0 for no profile"
    )


class Profile:
  """Traces `steps` steps from the step `first` on, as the log numbers them; none where either is
  0.

  Args:
    entry: config.profile.
  """

  def __init__(self, entry, workdir: str):
    self.folder = pathlib.Path(workdir) / "profile"
    self.steps = range(0)
    if entry.first and jax.process_index() == 0:
      self.steps = range(entry.first, entry.first + entry.steps)
    self.began = None  # step that the trace began with, while it runs

  def begin(self, step: int) -> None:
    """Begins the trace if `step`, the next one, is among those to trace."""
    if step in self.steps and self.began is None:
      files.no_links(self.folder)
      jax.profiler.start_trace(self.folder)
      self.began = step

  def step(self, step: int):
    """A context in which what is given to the devices counts as `step` in a trace."""
    return jax.profiler.StepTraceAnnotation("train", step_num=step)

  def end(self, step: int, state, over: bool = False) -> None:
    """Writes the trace if `step`, which computes `state`, is the last to trace or the run is
    over."""
    if self.began is None or (step + 1 in self.steps and not over):
      return
    jax.block_until_ready(state)
    try:
      jax.profiler.stop_trace()
    except Exception as error:  # whatever the profiler makes of a disk that is full
      raise UserError(
        f"cannot write the profile to {self.folder}: {one_line(error)[:200]}; make room, or set "
        "config.profile.steps=0; the same command goes on from the last checkpoint"
      ) from None
    print(
      f"profile of steps {self.began} to {step}: {self.folder}; open it with "
      f"xprof --logdir={self.folder}, or TensorBoard and its profile plugin",
      flush=True,
    )
    self.began = None
