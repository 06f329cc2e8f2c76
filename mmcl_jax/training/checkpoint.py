"""Checkpoints: save, restore, latest, and what is kept. The only room that knows orbax.

    WORKDIR/config.json                     the run's config
    WORKDIR/run                             a random name, which all its manifests repeat
    WORKDIR/checkpoints/STEP/state          orbax arrays, restorable on any mesh and any number of
    hosts WORKDIR/checkpoints/STEP/data           position in the data stream, JSON
    WORKDIR/checkpoints/STEP/people.npz     whom the run has learned from (training/people.py)
    WORKDIR/checkpoints/STEP/meta/manifest.json   versions, cohort fingerprint, checksum of every
                                            file above, its own step and run

The manifest is written last and makes the step count: orbax itself keeps no checksum on array data
and takes any numbered folder for a checkpoint. Older steps go only once a newer one counts. All of
this is done beside the training loop, by a thread of the first host.
"""

import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
from typing import Any, NotRequired, TypedDict

import jax
import numpy as np
import orbax.checkpoint as ocp

from mmcl_jax.errors import UserError
from mmcl_jax.support import files
from mmcl_jax.support.typed import wrong_entries

FORMAT = "mmcl_jax/5"
PEOPLE = "people.npz"


class Manifest(TypedDict):
  """meta/manifest.json: what is known of a step without its arrays. A run that was trained here
  has all but `origin`; converted weights (`mmcl convert`) have it, and not what comes after it."""

  format: str
  packages: dict[str, str]  # name -> version
  run: str
  step: int
  files: dict[str, str]  # file -> checksum
  sha256: str  # of the manifest without it
  cohort: NotRequired[str]  # fingerprint, "" of converted weights
  shapes: NotRequired[dict[str, list[int]]]  # of the fields of a record
  devices: NotRequired[int]
  standardiser: NotRequired[dict[str, Any]]  # see data.standardise.to_json
  config: NotRequired[dict[str, Any]]
  origin: NotRequired[str]  # where converted weights come from
  best: NotRequired[dict[str, float | None]]  # see monitor.Best
  skipped: NotRequired[dict[str, int]]  # see monitor.Skipped
  mixed: NotRequired[list[str]]  # fingerprints of the cohorts that are mixed in
  cohort_path: NotRequired[str]
  stages: NotRequired[dict[str, str]]  # module -> run that it started from
  spacing: NotRequired[
    list[float]
  ]  # mm along Z, H, W, where labels are read: of hearts in training


class Checkpoints:
  """The checkpoints of one workdir. `save` returns at once, while orbax writes; once it has, `poll`
  lets a thread sign the step, which reads back and hashes all of it; `finish` waits for both.

  `people`: {name: array}, kept as PEOPLE in every step; None: nobody knows them.
  """

  def __init__(self, workdir: str, keep: int, people: dict[str, Any] | None = None):
    workdir = pathlib.Path(os.path.abspath(workdir))
    self.people = people
    self.folder, self.keep = workdir / "checkpoints", keep
    self.config = workdir / "config.json"
    self.has_config = self.config.is_file()  # a workdir of converted weights has none
    self.pending = None  # (step, meta) that orbax writes
    self.signing = None  # what the thread does, a Future
    self.thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    files.no_links(self.folder)
    self.run = name_run(workdir) if jax.process_index() == 0 else ""
    for step in unfinished(self.folder):  # of a run that was stopped while it saved
      if jax.process_index() == 0:
        shutil.rmtree(self.folder / str(step))
    # Errors of a save are raised here again, in one line; the log would put the stack traces of
    # orbax's threads beside it.
    for name in ("absl", "asyncio"):
      logging.getLogger(name).addFilter(without_trace)
    options = ocp.CheckpointManagerOptions(
      create=True,
      cleanup_tmp_directories=True,
      enable_async_checkpointing=True,
    )
    self.manager = ocp.CheckpointManager(self.folder, options=options)

  def save(self, step: int, state, data: dict[str, Any], meta: dict[str, Any]) -> None:
    """Starts to save `state` (pytree of arrays) and `data` (JSON) as `step`; meta["best"] names the
    best step, if any."""
    self.finish()
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      data=ocp.args.JsonSave(data),
    )
    with self.saving(step):
      self.manager.save(step, args=items)
    self.pending = step, meta

  def poll(self) -> None:
    """Has the save under way signed if it is written by now; raises what went wrong with it."""
    if self.pending is not None and not self.manager.is_saving_in_progress():
      self.written()
    if self.signing is not None and self.signing.done():
      self.finish()

  def finish(self) -> None:
    """Waits until the save under way, if any, is signed."""
    if self.pending is not None:
      self.written()
    if self.signing is not None:
      signing, self.signing = self.signing, None
      signing.result()

  def written(self) -> None:
    """Waits until orbax has written the save under way, and lets the thread sign it."""
    (step, meta), self.pending = self.pending, None
    with self.saving(step):
      self.manager.wait_until_finished()
      self.check_there()  # before it counts
    if jax.process_index() == 0:
      self.signing = self.thread.submit(self.sign, step, meta)

  def sign(self, step: int, meta: dict[str, Any]) -> None:
    """Makes a step count, and drops old ones."""
    folder = self.folder / str(step)
    with self.saving(step):
      if self.people is not None:
        with files.atomic(folder / PEOPLE, "wb") as file:
          np.savez(file, **self.people)
      sign(folder, {"run": self.run, "step": step, **meta})
      self.drop_old(best_step(meta))

  def drop_old(self, best: int | None) -> None:
    """Removes all but the last `keep` steps and the best one."""
    for step in surplus(numbered(self.folder), self.keep, best):
      folder = self.folder / str(step)
      # first: half a step must not count
      (folder / "meta" / "manifest.json").unlink(missing_ok=True)
      shutil.rmtree(folder)

  def close(self) -> None:
    self.finish()
    self.manager.close()
    self.release()

  def release(self) -> None:
    """Waits until the thread has ended, also after an error: it writes to the workdir."""
    self.thread.shutdown()

  @contextlib.contextmanager
  def saving(self, step: int):
    """Turns whatever orbax makes of a disk that is full, gone or not ours into a UserError; no step
    counts half."""
    self.check_there()
    try:
      yield
    except UserError:
      raise
    except Exception as error:
      self.check_there()
      raise UserError(
        f"cannot save {self.folder / str(step)}: {reason(error)}; the same command goes on from "
        "the last checkpoint"
      ) from error

  def check_there(self) -> None:
    """A UserError where the workdir has gone: orbax would make it anew, and training go on in a
    folder of few steps."""
    config_lost = self.has_config and not self.config.is_file()
    if not self.folder.is_dir() or config_lost:
      raise UserError(
        f"{self.folder} is not there any more; bring the folder back, and the same command goes on "
        "from its last checkpoint"
      )


def name_run(folder: pathlib.Path) -> str:
  """The name of the run in a workdir; a new one gets one."""
  name = run_name(folder)
  if not name:
    name = secrets.token_hex(8)
    with files.atomic(folder / "run") as file:
      file.write(name + "\n")
  return name


def run_name(workdir) -> str:
  """The random name of the run in a workdir, "" where there is none yet."""
  file = pathlib.Path(workdir) / "run"
  return file.read_text(errors="replace").strip() if file.is_file() else ""


def without_trace(record: logging.LogRecord) -> bool:
  return not record.exc_info


def surplus(steps: list[int], keep: int, best: int | None) -> list[int]:
  """The steps that may go: all but the newest `keep` (at least 1), and the best."""
  return [step for step in sorted(steps)[:-keep] if step != best]


def best_step(meta: dict[str, Any]) -> int | None:
  """The step of the best evaluation by the time that a manifest was written; None: training did not
  look for it."""
  return (meta.get("best") or {}).get("step")


def reason(error: Exception) -> str:
  """Why a save failed: the system's own word for it, out of several lines of paths, where there is
  one."""
  number = getattr(error, "errno", None)
  if not number and (match := re.search(r"os_error_code='(\d+)'", str(error))):
    number = int(match[1])
  if number:
    return os.strerror(number)
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text[:200]}"


def sign(folder: pathlib.Path, meta: dict[str, Any]) -> None:
  """Writes a step's manifest, by which it counts."""
  files.sync_all(folder)  # a step that counts must be on disk
  packages = {}
  for name in ("jax", "flax", "optax", "orbax-checkpoint"):
    packages[name] = importlib.metadata.version(name)
  contents = {"format": FORMAT, "packages": packages, **meta, "files": checksums(folder)}
  contents["sha256"] = checksum_of(contents)
  (folder / "meta").mkdir(exist_ok=True)
  with files.atomic(folder / "meta" / "manifest.json") as file:
    file.write(json.dumps(contents, indent=1) + "\n")


def checksum_of(contents: dict[str, Any]) -> str:
  """Of a manifest without its own checksum, as JSON that does not depend on the order or the white
  space of the file."""
  rest = {name: x for name, x in contents.items() if name != "sha256"}
  text = json.dumps(rest, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def checksums(folder: pathlib.Path) -> dict[str, str]:
  """Of all files of a step but those in `meta`, by their path within it."""
  sums = {}
  for file in sorted(folder.rglob("*")):
    if file.is_file() and file.parent != folder / "meta":
      sums[str(file.relative_to(folder))] = checksum(file)
  return sums


def checksum(file: pathlib.Path) -> str:
  with open(file, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def numbered(folder: pathlib.Path) -> list[int]:
  """The numbers that name subfolders, in order; none where there is no such folder."""
  subfolders = [path for path in folder.glob("*") if path.name.isdigit() and path.is_dir()]
  return sorted(int(path.name) for path in subfolders)


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


def chosen(workdir: str) -> int | None:
  """The step to use where none is named: the best on validation, where training looked for it, else
  the last."""
  last = latest(workdir)
  best = None if last is None else best_step(manifest(workdir, last))
  return best if best in steps(workdir) else last


def manifest(workdir: str, step: int) -> Manifest:
  """What was written about a step; a UserError where it is damaged or of another step or run."""
  saved = steps(workdir)
  if step not in saved:
    there = ", ".join(map(str, saved)) or "none"
    raise UserError(f"no checkpoint of step {step} in {workdir}; there are {there}")
  file = step_folder(workdir, step) / "meta" / "manifest.json"
  try:
    contents = json.loads(file.read_text())
    if contents["format"] != FORMAT:
      raise UserError(
        f"{file} says format {contents['format']!r}, this program reads {FORMAT!r}; "
        f"{way_out(workdir, step)}"
      )
    if checksum_of(contents) != contents["sha256"]:
      raise UserError(
        f"{file} is damaged: its checksum is not the one that it names; {way_out(workdir, step)}"
      )
    if wrong := wrong_entries(contents, Manifest):
      raise UserError(
        f"{file} has no {', '.join(wrong)} in the form that `mmcl train` writes; "
        f"{way_out(workdir, step)}"
      )
    if contents["step"] != step:
      raise UserError(
        f"{file} is of step {contents['step']}: its folder was renamed or exchanged with another's;"
        f" give every step its own name again, or {way_out(workdir, step)}"
      )
    run = run_name(workdir)
    other = contents["run"]
    if run and run != other:  # none where only the checkpoints were copied
      raise UserError(
        f"{file} is of the run {other}, and {workdir}/run says {run}: the step was copied from "
        f"another run, or that file changed; put back what was there, or {way_out(workdir, step)}"
      )
    return contents
  except (ValueError, KeyError, TypeError, OSError, RecursionError):
    raise UserError(f"{file} is not readable; {way_out(workdir, step)}") from None


def step_folder(workdir: str, step: int) -> pathlib.Path:
  return pathlib.Path(os.path.abspath(workdir)) / "checkpoints" / str(step)


def way_out(workdir: str, step: int) -> str:
  """What to do about a step that cannot be used."""
  others = [other for other in steps(workdir) if other != step]
  if not others:
    return f"remove {workdir} and train again"
  return f"remove {step_folder(workdir, step)} to use step {max(others)}"


def check_files(workdir: str, step: int) -> Manifest:
  """The manifest of a step, once this host's share of its files is found as it was written; else a
  UserError."""
  folder = step_folder(workdir, step)
  about = manifest(workdir, step)
  listed = sorted(about["files"].items())
  for name, written in listed[jax.process_index() :: jax.process_count()]:
    file = folder / name
    if not file.is_file():
      raise UserError(f"{file} is missing; {way_out(workdir, step)}")
    if checksum(file) != written:
      raise UserError(
        f"{file} is damaged: its checksum is not the one written when it was saved; "
        f"{way_out(workdir, step)}"
      )
  return about


def restore(workdir: str, step: int, abstract) -> tuple[Any, dict[str, Any], Manifest]:
  """Restores a step onto the shapes and shardings of `abstract`, after checking every file against
  the manifest.

  Every host checks its share of the files; an error on one ends all (training.distributed).

  Args:
    abstract: pytree of jax.ShapeDtypeStruct with shardings; any mesh, whatever the mesh that saved.

  Returns:
    state, data position, manifest.

  Raises:
    UserError: the step is absent, foreign, or a file of it is damaged; names the file and the way
      out.
  """
  folder = step_folder(workdir, step)
  about = check_files(workdir, step)
  try:
    with ocp.CheckpointManager(folder.parent) as manager:
      args = ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract),
        data=ocp.args.JsonRestore(),
      )
      items = manager.restore(step, args=args)
  except Exception as error:  # whatever orbax makes of arrays that do not fit
    raise UserError(
      f"{folder}/state does not fit this model ({type(error).__name__}: {str(error)[:300]}); was "
      "it saved by another config?"
    ) from None
  return items["state"], items["data"], about
