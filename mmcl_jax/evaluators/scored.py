"""Where reports of a workdir lie, and how often its test split was scored.

A test split that is looked at again and again, to choose by it, is a validation split:
evaluation/scored.jsonl counts.
"""

import contextlib
import json
import os
import pathlib
import time

from mmcl_jax.support import files


def place(root: pathlib.Path, run, cohort) -> pathlib.Path:
  """ROOT/STEP for the run's own cohort, else ROOT/STEP-NAME, with part of the fingerprint if
  another cohort has that.

  Weights from elsewhere have no cohort: the first that they are evaluated on counts as theirs.
  """
  named = f"{run.step}-{pathlib.Path(cohort.path).resolve().name}"
  candidates = [named]
  if run.manifest["cohort"] in ("", cohort.fingerprint):
    candidates.insert(0, str(run.step))
  for name in candidates:
    # no results: none there, or one that is made anew
    with contextlib.suppress(OSError, ValueError, AttributeError):
      results = json.loads((root / name / "results.json").read_text())
      if results.get("cohort_fingerprint") != cohort.fingerprint:
        continue
    return root / name
  return root / f"{named}-{cohort.fingerprint[:8]}"


def scored_before(workdir: pathlib.Path, cohort) -> int:
  """How often the test split of this cohort was scored from this workdir so far, by
  evaluation/scored.jsonl.

  A test split that is looked at again and again, to choose by it, is a validation split. If this
  time cannot be counted, a line says so.
  """
  file = workdir / "evaluation" / "scored.jsonl"
  lines = []
  times = 0
  damaged = 0
  try:
    lines = file.read_bytes().splitlines() if file.exists() else []
    file.parent.mkdir(exist_ok=True)
    os.close(files.opened(file, os.O_WRONLY))
  except OSError as error:
    print(
      f"this scoring of the test split will not be counted: {file}: {error.strerror}", flush=True
    )
  for line in lines:
    try:
      times += json.loads(line)["cohort_fingerprint"] == cohort.fingerprint
    except (ValueError, KeyError, TypeError, RecursionError):
      damaged += 1
  if damaged:
    print(
      f"{file}: {damaged} lines cannot be read; what they say of earlier scorings is not counted",
      flush=True,
    )
  return times


def count_scoring(workdir: pathlib.Path, step: int, cohort) -> None:
  line = {
    "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    "step": step,
    "cohort_fingerprint": cohort.fingerprint,
  }
  path = workdir / "evaluation" / "scored.jsonl"
  with (
    contextlib.suppress(OSError),  # said by `scored_before`
    open(files.opened(path, os.O_WRONLY | os.O_APPEND), "a") as log,
  ):
    print(json.dumps(line), file=log)
