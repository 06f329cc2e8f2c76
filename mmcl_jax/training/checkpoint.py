"""Checkpoints: save, restore, latest. The only room that knows orbax.

    WORKDIR/config.json                     the run's config
    WORKDIR/checkpoints/STEP/state          orbax arrays, restorable on any mesh and any number of hosts
    WORKDIR/checkpoints/STEP/data           position in the data stream, JSON
    WORKDIR/checkpoints/STEP/meta/manifest.json   versions, cohort fingerprint, checksum of every file above

The manifest is written last and makes the step count: orbax itself keeps no checksum on array data and takes any
numbered folder for a checkpoint.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from mmcl_jax.errors import UserError

FORMAT = "mmcl_jax/2"


class Checkpoints:
  """The checkpoints of one workdir. `save` returns at once; `finish` waits and writes the manifest."""

  def __init__(self, workdir: str, keep: int):
    self.folder = pathlib.Path(os.path.abspath(workdir)) / "checkpoints"
    self.pending = None
    for step in unfinished(self.folder):  # of a run that was stopped while it saved
      if jax.process_index() == 0:
        shutil.rmtree(self.folder / str(step))
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True,
                                           enable_async_checkpointing=True)
    self.manager = ocp.CheckpointManager(self.folder, options=options)

  def save(self, step: int, state, data: dict[str, Any], meta: dict[str, Any]) -> None:
    """Starts to save `state` (pytree of arrays) and `data` (JSON) as `step`."""
    self.finish()
    self.manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)))
    self.pending = step, meta

  def poll(self) -> None:
    """Signs the save under way if it is on disk by now."""
    if self.pending is not None and not self.manager.is_saving_in_progress():
      self.finish()

  def finish(self) -> None:
    """Waits for the save under way, if any, and signs it."""
    if self.pending is None:
      return
    self.manager.wait_until_finished()
    (step, meta), self.pending = self.pending, None
    if jax.process_index() == 0:
      sign(self.folder / str(step), meta)

  def close(self) -> None:
    self.finish()
    self.manager.close()


def sign(folder: pathlib.Path, meta: dict[str, Any]) -> None:
  packages = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}
  whole = {"format": FORMAT, "packages": packages, **meta, "files": checksums(folder)}
  (folder / "meta").mkdir(exist_ok=True)
  partial = folder / "meta" / "manifest.json.partial"
  partial.write_text(json.dumps(whole, indent=1) + "\n")
  partial.rename(folder / "meta" / "manifest.json")


def checksums(folder: pathlib.Path) -> dict[str, str]:
  files = sorted(file for part in ("state", "data") for file in (folder / part).rglob("*") if file.is_file())
  return {str(file.relative_to(folder)): checksum(file) for file in files}


def checksum(file: pathlib.Path) -> str:
  with open(file, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def numbered(folder: pathlib.Path) -> list[int]:
  return sorted(int(d.name) for d in folder.glob("*") if d.name.isdigit() and d.is_dir()) if folder.is_dir() else []


def signed(folder: pathlib.Path, step: int) -> bool:
  return (folder / str(step) / "meta" / "manifest.json").is_file()


def steps(workdir: str) -> list[int]:
  """The steps that were saved whole, oldest first."""
  folder = pathlib.Path(workdir) / "checkpoints"
  return [step for step in numbered(folder) if signed(folder, step)]


def unfinished(folder: pathlib.Path) -> list[int]:
  return [step for step in numbered(folder) if not signed(folder, step)]


def latest(workdir: str) -> int | None:
  return max(steps(workdir), default=None)


def manifest(workdir: str, step: int) -> dict[str, Any]:
  """What was written about a step: format, packages, cohort fingerprint, record shapes, checksums."""
  known = steps(workdir)
  if step not in known:
    raise UserError(f"no checkpoint of step {step} in {workdir}; there are {', '.join(map(str, known)) or 'none'}")
  file = step_folder(workdir, step) / "meta" / "manifest.json"
  try:
    found = json.loads(file.read_text())
    if found["format"] != FORMAT:
      raise UserError(f"{file} says format {found['format']!r}, this program reads {FORMAT!r}; {way_out(workdir, step)}")
    return found
  except (ValueError, KeyError, TypeError):
    raise UserError(f"{file} is not readable; {way_out(workdir, step)}") from None


def step_folder(workdir: str, step: int) -> pathlib.Path:
  return pathlib.Path(os.path.abspath(workdir)) / "checkpoints" / str(step)


def way_out(workdir: str, step: int) -> str:
  others = [other for other in steps(workdir) if other != step]
  return f"remove {step_folder(workdir, step)} to use step {max(others)}" if others else f"remove {workdir} and train again"


def restore(workdir: str, step: int, abstract) -> tuple[Any, dict[str, Any], dict[str, Any]]:
  """Restores a step onto the shapes and shardings of `abstract`, after checking every file against the manifest.

  Every host checks its share of the files; an error on one ends all (training.distributed).

  Args:
    abstract: pytree of jax.ShapeDtypeStruct with shardings; any mesh, whatever the mesh that saved.

  Returns:
    state, data position, manifest.

  Raises:
    UserError: the step is absent, foreign, or a file of it is damaged; names the file and the way out.
  """
  folder, about = step_folder(workdir, step), manifest(workdir, step)
  for name, written in sorted(about["files"].items())[jax.process_index()::jax.process_count()]:
    there = (folder / name).is_file()
    if not there or checksum(folder / name) != written:
      state = "damaged: its checksum is not the one written when it was saved" if there else "missing"
      raise UserError(f"{folder / name} is {state}; {way_out(workdir, step)}")
  try:
    with ocp.CheckpointManager(folder.parent) as manager:
      items = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract),
                                                            data=ocp.args.JsonRestore()))
  except Exception as error:  # whatever orbax makes of arrays that do not fit
    raise UserError(f"{folder}/state does not fit this model ({type(error).__name__}: {str(error)[:300]}); was it saved "
                    "by another config?") from None
  return items["state"], items["data"], about
