"""What every reader begins with: a plain file, opened with care, and one kind of error for what is wrong with it.

A disk, a network or memory that fails (mmcl_jax.errors.is_environment) says nothing of a file: such errors pass through
all readers as they are, so that nobody is left out for good by what may go well another time.
"""

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator

from mmcl_jax.errors import BadRecord, UserError, is_environment


def present(path) -> bool:
  """Whether anything has this name, be it a folder or a broken link: whoever opens it judges. OSErrors pass."""
  try:
    os.lstat(path)
  except (OSError, ValueError) as error:  # ValueError: a name that none can have
    if is_environment(error):
      raise
    return False
  return True


def check_file(path, kind: str):
  """BadRecord unless `path` is a regular file; `kind` says what was expected, such as "a DICOM ECG (.dcm)".

  Links are refused: in data of others they may lead to any file of this machine.
  """
  if not present(path):
    raise BadRecord(f"no such file; expected {kind}")
  mode = os.lstat(path).st_mode
  if stat.S_ISLNK(mode):
    raise BadRecord("a symbolic link; expected the file itself")
  if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
    raise BadRecord(f"{'a folder' if stat.S_ISDIR(mode) else 'no regular file'}; expected {kind}")


def read_bytes(path, most: int, kind: str) -> bytes:
  """The whole of a regular file of at most `most` bytes; BadRecord for anything else."""
  check_file(path, kind)
  with open(path, "rb") as file:
    data = file.read(most + 1)
  if len(data) > most:
    raise BadRecord(f"more than {most} bytes; expected {kind}, which is smaller")
  return data


@contextlib.contextmanager
def bad_record(why: str):
  """Turns whatever a format's library raises into a BadRecord; its text may name files and people and is left out.

  Errors of the environment pass, also from under the library's own, as zipfile's "not a zip file" where reading fails.
  """
  try:
    yield
  except BadRecord:
    raise
  except Exception as error:
    cause = error
    while cause is not None and not is_environment(cause):
      cause = cause.__context__
    if cause is error:
      raise
    if cause is not None:
      raise cause from None
    raise BadRecord(f"{why} ({type(error).__name__})") from error


def walk(inputs: Iterable[str | os.PathLike], flag: str = "--input") -> Iterator[str]:
  """All files under the inputs (files, and folders at any depth), sorted within each input, each once.

  Links to folders are not followed, unless they are inputs; links to files are listed, and readers refuse them. What
  cannot be listed ends the run: passed over, it would leave people out unseen.
  Raises UserError, which names `flag`, for an input that does not exist and a folder that cannot be listed.
  """
  def refuse(error):
    raise UserError(f"{flag}: cannot read {error.filename} ({error.strerror})") from None

  seen = set()  # real paths of folders listed already, and of files given by themselves
  for start in map(os.fspath, inputs):
    try:
      single = not stat.S_ISDIR(os.stat(start).st_mode)
    except (FileNotFoundError, NotADirectoryError):
      raise UserError(f"{flag}: no file or folder {start}") from None
    except OSError as error:
      refuse(error)
    listed = [(os.path.dirname(start), [], [os.path.basename(start)])] if single else os.walk(start, onerror=refuse)
    for folder, folders, names in listed:
      if (real := os.path.realpath(folder)) in seen:
        folders.clear()  # with all below it
        continue
      folders.sort()
      for name in sorted(names):
        if (file := os.path.join(real, name)) not in seen:
          yield os.path.join(folder, name)
      seen.add(file if single else real)
