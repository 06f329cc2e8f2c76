"""Signals that ask a program to end: Ctrl-C, and those of schedulers and of a terminal that is
closed (processes.ENDS).

They end a program as Ctrl-C does, cleaning up; training saves first (`stops`). Python handles a
signal only between two of its own instructions, so one that comes while XLA compiles may wait for
minutes: `watched` answers it.
"""

import contextlib
import os
import signal
import stat
import sys
import threading
import time

from mmcl_jax.support.processes import ENDS, SIGNALS
from mmcl_jax.training import distributed

BUSY_S = 1.0  # a signal that Python has not handled for so long came during a computation

heard = -float("inf")  # when Python heard the last one, time.monotonic()


@contextlib.contextmanager
def handled(handler):
  """Within, `handler(signum, frame)` gets all of SIGNALS but those that were ignored when the
  program began (nohup)."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def hear(signum, frame):
    global heard
    heard = time.monotonic()
    handler(signum, frame)

  before = {}
  for signum in SIGNALS:
    previous = signal.getsignal(signum)
    if previous not in (signal.SIG_IGN, None):
      before[signum] = previous
  for signum in before:
    signal.signal(signum, hear)
  try:
    yield
  finally:
    for signum, previous in before.items():
      signal.signal(signum, previous)


def interrupt(signum, frame):
  """Ends a program in order; a second Ctrl-C ends it at once, other signals find it ending
  already."""
  for other in ENDS:
    signal.signal(other, lambda *_: None)
  signal.signal(signal.SIGINT, lambda *_: end_at_once())
  if signum == signal.SIGHUP:
    for stream in (1, 2):
      # the terminal, to which nothing can be written any more
      if stat.S_ISCHR(os.fstat(stream).st_mode):
        mute(stream)
  raise KeyboardInterrupt(signum)


def ending() -> None:
  """From here on a second Ctrl-C ends the program at once, also while Python shuts down."""
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, lambda *_: end_at_once())


def mute(stream: int) -> None:
  os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def end_at_once():
  say("interrupted; the same command goes on from what is saved")
  if distributed.this_host.count > 1:
    distributed.abort_all(130, "interrupted at once")
  os._exit(130)


@contextlib.contextmanager
def stops():
  """For training: within, only a second Ctrl-C ends anything; yields a function that tells whether
  a signal has come.

  Output that cannot be written (a closed terminal, `| head`) counts as one: the run shall save, not
  fail.
  """
  came = threading.Event()

  def asked(signum, frame):
    if signum == signal.SIGINT and came.is_set():
      raise KeyboardInterrupt(signum)
    came.set()
    say("asked to stop: the next step is the last, then a checkpoint; Ctrl-C again ends at once")

  streams = sys.stdout, sys.stderr
  sys.stdout, sys.stderr = (Output(stream, came.set) for stream in streams)
  try:
    with handled(asked):
      yield came.is_set
  finally:
    sys.stdout, sys.stderr = streams


class Output:
  """A standard stream that outlives its reader: the first failure calls `lost`, and all later text
  is dropped."""

  def __init__(self, stream, lost):
    self.stream, self.lost = stream, lost

  def write(self, text):
    return self.attempt(self.stream.write, text)

  def flush(self):
    self.attempt(self.stream.flush)

  def attempt(self, call, *args):
    try:
      return call(*args)
    except OSError:
      mute(self.stream.fileno())
      self.lost()

  def __getattr__(self, name):
    return getattr(self.stream, name)


@contextlib.contextmanager
def watched():
  """Within, a signal that Python cannot handle for BUSY_S is answered; a second Ctrl-C then ends
  all at once."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  reading_end, writing_end = os.pipe()
  os.set_blocking(writing_end, False)
  # a byte, the signal's number, from outside Python
  before = signal.set_wakeup_fd(writing_end, warn_on_full_buffer=False)
  threading.Thread(target=watch, args=(reading_end,), daemon=True).start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    os.close(writing_end)


def watch(reading_end: int) -> None:
  """Answers the signals that come through the pipe and that Python has not handled by then."""
  interrupts = 0
  while received := os.read(reading_end, 1):
    came = time.monotonic()
    (number,) = received
    if number == signal.SIGINT:
      interrupts += 1
    time.sleep(BUSY_S)
    if number not in SIGNALS or heard > came - BUSY_S / 2:
      continue
    if number == signal.SIGINT and interrupts > 1:
      end_at_once()
    say("asked to stop: waits for what is computed or compiled now; Ctrl-C again ends at once")
  os.close(reading_end)


def say(text: str) -> None:
  with contextlib.suppress(OSError):
    print(f"\nmmcl: {text}", file=sys.stderr, flush=True)
