"""Processes that read for a program: signals that ask it to end are left to it, and none of them
outlives it; whether a process of this machine runs."""

import contextlib
import multiprocessing
import os
import signal
import threading

# Schedulers and a terminal that is closed send these to every process of a program, as Ctrl-C does
# with SIGINT.
ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (signal.SIGINT, *ENDS)


@contextlib.contextmanager
def signals_blocked():
  """Processes started within never get SIGNALS but SIGTERM, by which pools end them; this thread
  gets them later."""
  # which a process inherits
  before = signal.pthread_sigmask(signal.SIG_BLOCK, set(SIGNALS) - {signal.SIGTERM})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exit_with_parent() -> None:
  """First call of a reading process: it waits on pipes that it also holds open, and would outlive a
  killed parent."""
  parent = multiprocessing.parent_process()

  def wait_and_exit():
    parent.join()
    os._exit(1)

  threading.Thread(target=wait_and_exit, daemon=True).start()


def alive(process: str) -> bool:
  """Is there a process of this number on this machine?"""
  try:
    os.kill(int(process), 0)
  except (ProcessLookupError, ValueError):
    return False
  except PermissionError:
    pass
  return True
