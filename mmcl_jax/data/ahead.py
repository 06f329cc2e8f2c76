"""Raw ECG files read and normalised, in order, by processes that stay ahead of whoever uses
them."""

import collections
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from mmcl_jax.data.preprocess.ecg import normalise, to_standard
from mmcl_jax.data.readers import read_ecg
from mmcl_jax.errors import BadRecord, UserError
from mmcl_jax.support.processes import exit_with_parent, signals_blocked

TEXTS = ("path", "status", "reason", "flags")
MOST_READERS = 32  # about 190 MiB each
# so begins a reason that may be gone another time: a disk, a network or memory failed
LATER = "could not be read now"


def read_ahead(
  paths: Iterable[str], profile: str, ahead: int, own: Mapping[str, str] | None = None
) -> Iterator[tuple[dict[str, str], np.ndarray | None]]:
  """Yields `read` of every path, in their order; at most `ahead` recordings, or two a process, are
  read and waiting."""
  pool, waiting = readers(), collections.deque()
  ahead = max(ahead, 2 * processes())
  try:
    for path in paths:
      with signals_blocked():
        waiting.append(pool.submit(read, path, profile, own))
      if len(waiting) == ahead:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  except BrokenProcessPool:
    raise UserError(
      f"a reading process died, as when memory runs out, at {path} or one of the {ahead} "
      "recordings before it; the same command goes on from what is saved"
    ) from None
  finally:
    pool.shutdown(cancel_futures=True)


def processes() -> int:
  return min(len(os.sched_getaffinity(0)), MOST_READERS)


def readers() -> Executor:
  """A process a core, up to MOST_READERS: parsing holds Python's lock, so that two threads read
  hardly more than one."""
  context = multiprocessing.get_context("spawn")  # fork is unsafe beside JAX's threads
  return ProcessPoolExecutor(processes(), context, exit_with_parent)


def read(
  path: str, profile: str, own: Mapping[str, str] | None = None
) -> tuple[dict[str, str], np.ndarray | None]:
  """One recording by `profile` (preprocess.ecg); what is wrong with it never raises.

  `own`: readers from outside, as of `read_ecg`.

  Returns:
    TEXTS: `status` ok or rejected with its `reason`; remarks in `flags`. All are UTF-8, which a
    file's name need not be. float32 [12, samples of the profile], None where rejected.
  """
  ecg, reason, flags = None, "", ()
  try:
    recording = read_ecg(path, own)
    ecg = normalise(to_standard(recording.ecg_mv, recording.rate_hz), profile)
    flags = recording.flags
  except BadRecord as error:
    reason = str(error)
  except (OSError, MemoryError) as error:
    reason = f"{LATER} ({getattr(error, 'strerror', '') or type(error).__name__})"
  except Exception as error:  # a reader's own mistake: one recording must not cost a long run
    reason = f"unexpected {type(error).__name__}: {error}"
  status = "rejected" if ecg is None else "ok"
  texts = {"path": path, "status": status, "reason": " ".join(reason.split())}
  texts["flags"] = "; ".join(flags)
  for name, text in texts.items():
    texts[name] = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
  return texts, ecg
