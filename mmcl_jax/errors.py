"""The two errors a user meets. Both carry one line: what was found, where, what was expected, what
to do."""

import contextlib
import errno
import os
import tempfile

OF_A_PATH = {
  errno.ENOENT,
  errno.ENOTDIR,
  errno.EISDIR,
  errno.ELOOP,
  errno.ENAMETOOLONG,
  errno.EINVAL,
}


class UserError(Exception):
  """Something the user can put right; the programs print it as one line and exit with 2."""


class DamagedRecord(UserError):
  """A record of a cohort whose bytes are not those that were written: training may leave it out
  (config.bad_rows)."""


class BadRecord(ValueError):
  """One recording or study that cannot be read; a batch of records goes on without it and reports
  the reason."""


def is_environment(error: BaseException) -> bool:
  """Whether a disk, a network or memory failed, which may go well another time: no reason to leave
  a person out.

  OSErrors that tell of a path (OF_A_PATH), and those without errno, such as gzip's, tell of the
  file instead.
  """
  if isinstance(error, OSError):
    return error.errno is not None and error.errno not in OF_A_PATH
  return isinstance(error, MemoryError)


def printable(text) -> str:
  """Text with a blank for each unprintable character (terminal escapes, direction marks,
  surrogates) but line ends.

  Names come from tables, cohorts and workdirs that a stranger may have made.
  """
  text = str(text)
  return (
    text
    if text.isprintable()
    else "".join(c if c.isprintable() or c == "\n" else " " for c in text)
  )


def one_line(text) -> str:
  return " ".join(printable(text).split())


@contextlib.contextmanager
def writing(out):
  """Turns what a folder or a disk refuses into a UserError."""
  try:
    yield
  except (BrokenPipeError, ConnectionError, TimeoutError):  # of a terminal or a network
    raise
  except OSError as error:
    raise UserError(f"cannot write to {out}: {error.strerror or error}") from error


def check_writable(folder) -> None:
  """Raises a UserError if a folder cannot be written to or made: to be called before the work, not
  after it."""
  there = os.path.abspath(folder)
  while not os.path.lexists(there):
    there = os.path.dirname(there)
  with writing(folder):
    tempfile.TemporaryFile(dir=there).close()
