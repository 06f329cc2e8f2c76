"""The programs' own files: written whole or not at all, never through a link; locks; archives read
within bounds.

A workdir or a cohort may come from a stranger, or lie where others can write: a link there, in
place of a file that is written, would lead to any other file of the user.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import stat
import zipfile

import numpy as np

from mmcl_jax.errors import UserError

ENOTSUPP = 524  # the kernel's own, which autofs and NFS let through; errno has no name for it
# of the arrays of an archive: predictions of a million people for a hundred phenotypes take 0.8 GB
MOST_BYTES = 2**30
# What file systems without locks say.
UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, ENOTSUPP}


def opened(path, flags: int) -> int:
  """The descriptor of a file to append to or to lock, made if absent; a UserError if it is a link
  or no plain file."""
  with contextlib.suppress(FileNotFoundError):
    about = os.lstat(path)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
      what = "a symbolic link" if stat.S_ISLNK(about.st_mode) else "no file of its own"
      raise UserError(
        f"{path} is {what}, and what is written to it would go elsewhere; expected a plain file: "
        "remove it"
      )
  # O_NOFOLLOW, O_NONBLOCK: should it become a link or a pipe just now.
  return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def new(path, mode: str = "w", **options):
  """A new file open for writing, in place of what had its name; of a link the target stays as it
  is."""
  with contextlib.suppress(FileNotFoundError):
    os.unlink(path)
  return open(path, mode.replace("w", "x"), **options)


@contextlib.contextmanager
def replaced(path, mode: str = "w", **options):
  """An open file that takes the place of `path` once it is whole."""
  path = pathlib.Path(path)
  partial = path.with_name(f".{path.name}.partial")
  try:
    with new(partial, mode, **options) as file:
      yield file
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def no_links(*folders) -> None:
  """Raises a UserError where one of these folders, or anything in them, is a symbolic link."""
  for folder in folders:
    found = [folder]
    for parent, inner, names in os.walk(folder):
      found += [os.path.join(parent, name) for name in (*inner, *names)]
    if link := next(filter(os.path.islink, found), None):
      raise UserError(
        f"{link} is a symbolic link, and what is written there would go elsewhere; expected a file or "
        "folder of its own: put what it leads to in its place, or remove it"
      )


def locked(file: int, where: str) -> bool:
  """Takes the lock of an open file until it is closed; False where another process holds it.

  On a file system without locks a line names `where`, and it is as if nobody held it. Other errors
  of disk and network are raised.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    if error.errno not in UNSUPPORTED:
      raise
    print(
      f"{where} is on a file system without locks; make sure that nothing else writes to it",
      flush=True,
    )
  return True


def arrays(path) -> dict[str, np.ndarray]:
  """The arrays of an .npz by name.

  A damaged one raises errors of zlib, zipfile and NumPy alike, one too large ValueError. A small
  file may unfold to any size, and a pickle may run anything: none is read.
  """
  if not zipfile.is_zipfile(path):
    raise ValueError("it is no archive of arrays")
  with np.load(path, allow_pickle=False) as found:
    if (size := sum(member.file_size for member in found.zip.infolist())) > MOST_BYTES:
      raise ValueError(f"its arrays take {size:,} bytes, at most {MOST_BYTES:,} are read")
    return {name: np.asarray(x) for name, x in found.items()}
