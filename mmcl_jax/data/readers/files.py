"""What every reader begins with: a plain file, opened with care, and one kind of error for what is
wrong with it.

A disk, a network or memory that fails (mmcl_jax.errors.is_environment) says nothing of a file: such
errors pass through all readers as they are, so that nobody is left out for good by what may go well
another time.
"""

import contextlib
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from mmcl_jax.data.readers.kinds import (
  BYTE_ORDER_MARKS,
  HEAD_BYTES,
  POINTER_BYTES,
  POINTERS,
  Kind,
  expect,
  refusal,
  tell,
)
from mmcl_jax.errors import BadRecord, UserError, is_environment


def present(path) -> bool:
  """Whether anything has this name, be it a folder or a broken link: whoever opens it judges.
  OSErrors pass."""
  try:
    os.lstat(path)
  except (OSError, ValueError) as error:  # ValueError: a name that none can have
    if is_environment(error):
      raise
    return False
  return True


def beside(folder, name: str) -> Path | None:
  """The file of that name in a folder, or the only one that differs in letter case or Unicode form
  alone; else None.

  Files that went through Windows or macOS are named so beside headers that kept their names.
  OSErrors of the disk pass.
  """
  if present(path := Path(folder, name)):
    return path
  try:
    names = os.listdir(folder)
  except (FileNotFoundError, NotADirectoryError):
    return None
  alike = [other for other in names if plain(other) == plain(name)]
  return Path(folder, alike[0]) if len(alike) == 1 else None


def plain(name: str) -> str:
  """A file's name without the differences that `beside` passes over."""
  return unicodedata.normalize("NFC", name).casefold()


def check_file(path, kind: str):
  """BadRecord unless `path` is a regular file; `kind` says what was expected, such as "a DICOM ECG
  (.dcm)".

  A link stands for the file that it leads to: DataLad, Snakemake and Nextflow stage data as links.
  The pointers that Git LFS and git-annex leave in a file's place are refused.
  """
  if not present(path):
    raise BadRecord(f"no such file; expected {kind}")
  try:
    about = os.stat(path)
  except OSError as error:
    if is_environment(error) or not os.path.islink(path):
      raise
    raise BadRecord(
      "a link to a file that is not there (of git-annex or DataLad: `datalad get` fetches it)"
    ) from error
  if not stat.S_ISREG(about.st_mode):  # opening a pipe would wait for its writer
    raise BadRecord(
      f"{'a folder' if stat.S_ISDIR(about.st_mode) else 'no regular file'}; expected {kind}"
    )
  if about.st_size <= POINTER_BYTES:
    actual = tell(head(path))
    if actual in POINTERS:
      raise BadRecord(refusal(actual, kind))


def head(path) -> bytes:
  """The first bytes of a file, enough for kinds.tell; OSErrors pass. Only for what is a regular
  file."""
  with open(path, "rb") as file:
    return file.read(HEAD_BYTES)


def text(data: bytes) -> str:
  """A text in UTF-16 with its mark, or in UTF-8; BadRecord for others."""
  try:
    return data.decode("utf-16" if data.startswith(BYTE_ORDER_MARKS) else "utf-8-sig")
  except UnicodeDecodeError as error:
    raise BadRecord("a text neither in UTF-8 nor in UTF-16") from error


def read_bytes(path, most: int, kind: str, *readable: Kind) -> bytes:
  """The whole of a regular file of at most `most` bytes; BadRecord for anything else.

  So it is where the file begins as what is known and not among `readable`: the reason names it.
  """
  check_file(path, kind)
  with open(path, "rb") as file:
    data = file.read(most + 1)
  expect(data, kind, *readable)
  if len(data) > most:
    raise BadRecord(f"more than {most} bytes; expected {kind}, which is smaller")
  return data


@contextlib.contextmanager
def bad_record(why: str):
  """Turns whatever a format's library raises into a BadRecord; its text may name files and people
  and is left out.

  Errors of the environment pass, also from under the library's own, as zipfile's "not a zip file"
  where reading fails.
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
  """All files under the inputs (files, and folders at any depth), sorted within each input, each
  once.

  Links to files are listed as files; so are links to folders, which are not followed unless they
  are inputs. Folders .git are left out: git-annex keeps there what its links lead to. What cannot
  be listed ends the run: passed over, it would leave people out unseen.
  Raises UserError, which names `flag`, for an input that does not exist and a folder that cannot be
  listed.
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
    listed = (
      [(os.path.dirname(start), [], [os.path.basename(start)])]
      if single
      else os.walk(start, onerror=refuse)
    )
    for folder, folders, names in listed:
      if (real := os.path.realpath(folder)) in seen:
        folders.clear()  # with all below it
        continue
      folders[:] = sorted(name for name in folders if name != ".git")
      links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
      for name in sorted(names + links):
        if (file := os.path.join(real, name)) not in seen:
          yield os.path.join(folder, name)
      seen.add(file if single else real)
