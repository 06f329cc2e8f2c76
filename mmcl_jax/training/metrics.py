"""Where metrics go: the writers that config.writers names, and the terminal.

A writer is a class `(workdir, start_step, **parameters)` with the methods write_scalars(step,
scalars), flush() and close() of clu's metric writers, made on the first process alone. clu's own
cannot be imported without TensorFlow; these need tensorboardX only.
"""

import contextlib
import json
import os
import pathlib
import sys
import time

from mmcl_jax import registry
from mmcl_jax.errors import UserError
from mmcl_jax.support import files

# tensorboardX loads torch where it is installed, seconds of start-up for tensors that it is never
# given.
without_torch = "torch" not in sys.modules
if without_torch:
  sys.modules["torch"] = None
import tensorboardX

if without_torch:
  del sys.modules["torch"]


BUILT_IN = {
  "jsonl": "mmcl_jax.training.metrics:JsonlWriter",
  "tensorboard": "mmcl_jax.training.metrics:TensorBoardWriter",
}
METHODS = ("write_scalars", "flush", "close")


class JsonlWriter:
  """metrics.jsonl, one line a call: {"step": ..., "name": value, ...}. A resumed run continues the
  file from the step that it starts at."""

  def __init__(self, workdir: str, start_step: int):
    file = pathlib.Path(workdir) / "metrics.jsonl"
    files.no_links(file)
    keep_before(file, start_step)
    # open until the run ends
    self.file = open(files.opened(file, os.O_WRONLY | os.O_APPEND), "a")  # noqa: SIM115

  def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
    self.file.write(
      json.dumps({"step": step, **{name: float(x) for name, x in scalars.items()}}) + "\n"
    )
    self.file.flush()

  def flush(self) -> None:
    self.file.flush()

  def close(self) -> None:
    self.file.close()


class TensorBoardWriter:
  """The folder tensorboard. Begins its file with the first number: of a run that is refused before
  that, Python 3.12 would print a trace at its exit."""

  def __init__(self, workdir: str, start_step: int):
    self.folder, self.writer = pathlib.Path(workdir) / "tensorboard", None
    files.no_links(self.folder)

  def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
    self.writer = self.writer or tensorboardX.SummaryWriter(str(self.folder))
    for name, x in scalars.items():
      self.writer.add_scalar(name, float(x), step)

  def flush(self) -> None:
    if self.writer:
      self.writer.flush()

  def close(self) -> None:
    if self.writer:
      self.writer.close()


class MultiWriter:
  """Passes every call to all writers."""

  def __init__(self, writers):
    self.writers = writers

  def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
    for writer in self.writers:
      writer.write_scalars(step, scalars)

  def flush(self) -> None:
    for writer in self.writers:
      writer.flush()

  def close(self) -> None:
    for writer in self.writers:
      writer.close()


def create_writer(entries, workdir: str, start_step: int, just_logging: bool) -> MultiWriter:
  """The writers of a run, of `entries` (config.writers); none on processes other than the first
  (`just_logging`, as in clu)."""
  if just_logging:
    return MultiWriter([])
  writers = []
  for writer, parameters in find(entries):
    writers.append(writer(workdir, start_step, **parameters))
  return MultiWriter(writers)


def find(entries) -> list[tuple[type, dict]]:
  """The writers that `entries` (config.writers) name, and their parameters, checked."""
  found = []
  for name, entry in entries.to_dict().items():
    where = f"config.writers.{name}"
    if "fn" not in entry:
      raise UserError(f"{where} has the keys {sorted(entry)}; expected fn and its parameters")
    fn = entry.pop("fn")
    writer = registry.resolve(fn, BUILT_IN, f"{where}.fn")
    missing = [method for method in METHODS if not hasattr(writer, method)]
    if missing:
      raise UserError(
        f"{where}.fn is {fn!r}, which has no {', '.join(missing)}; expected a class with "
        f"{', '.join(METHODS)}"
      )
    registry.check_parameters(writer, entry, where, fn, passed=2)
    found.append((writer, entry))
  return found


def read(file: pathlib.Path) -> list[dict]:
  """Records of a metrics.jsonl; a line that was cut off or damaged is left out."""
  records = []
  for line in file.read_bytes().splitlines() if file.is_file() else []:
    with contextlib.suppress(ValueError, RecursionError):
      record = json.loads(line)
      if isinstance(record, dict) and isinstance(record.get("step"), int):
        records.append(record)
  return records


def keep_before(file: pathlib.Path, start_step: int) -> None:
  """Drops records after the step a run resumes from: they will be written again."""
  records = [record for record in read(file) if record["step"] <= start_step]
  if file.is_file():
    with files.atomic(file) as kept:
      kept.writelines(json.dumps(record) + "\n" for record in records)


class Progress:
  """Lines such as `train 120/300  loss 3.21  2.1 steps/s  134 recordings/s  MFU 38.2%  ETA
  1:26`."""

  def __init__(self, start: int, end: int, batch: int):
    self.step, self.end, self.batch, self.time = start, end, batch, time.monotonic()

  def report(self, step: int, scalars: dict[str, float], utilisation: str) -> None:
    """Prints the line of a step; utilisation: such as `MFU 38.2%`, or empty."""
    now = time.monotonic()
    rate = (step - self.step) / max(now - self.time, 1e-9)
    left = round((self.end - step) / rate) if rate else 0
    values = "  ".join(f"{name} {x:.4g}" for name, x in scalars.items())
    recordings = rate * self.batch
    if utilisation:
      utilisation += "  "
    minutes, seconds = divmod(left, 60)
    print(
      f"train {step}/{self.end}  {values}  {rate:.2f} steps/s  {recordings:.0f} recordings/s  "
      f"{utilisation}ETA {minutes}:{seconds:02d}",
      flush=True,
    )
    self.step, self.time = step, now
