"""Processes that read for a program: a signal that asks the program to end is its alone to hear, and none outlives it."""

import contextlib
import multiprocessing
import os
import signal
import threading

# Schedulers and a terminal that is closed send these to every process of a program, as Ctrl-C does with SIGINT.
ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (signal.SIGINT, *ENDS)


@contextlib.contextmanager
def unheard():
  """Processes that begin within never hear SIGNALS, but SIGTERM, by which pools end theirs; for this thread they wait."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, set(SIGNALS) - {signal.SIGTERM})  # which a process inherits
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
  """The first call of a reading process: it waits on pipes that it also holds open, and would outlive a parent that was killed."""
  parent = multiprocessing.parent_process()
  threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
