"""The programs' own files: written whole or not at all, never through a link; archives read within
bounds.

A workdir or a cohort may come from a stranger, or lie where others can write: a link there, in
place of a file that is written, would lead to any other file of the user.

Whatever takes a name here is on disk before it does (`fsync` of files, and of the folder that holds
the name), so that a power failure leaves the old file or the new one.
"""

import contextlib
import errno
import os
import pathlib
import shutil
import socket
import stat
import zipfile

import numpy as np

from mmcl_jax.errors import UserError
from mmcl_jax.support.processes import alive

# of the arrays of an archive: predictions of a million people for a hundred phenotypes take 0.8 GB
MOST_BYTES = 2**30


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
def atomic(path, mode: str = "w", shared: bool = False, **options):
  """An open file that takes the place of `path` once it is whole.

  Args:
    path: the file. Until it is whole, it is called .NAME.partial beside it.
    mode, options: of `open`.
    shared: other processes may write the same file at the same time, so each has a temporary name
      of its own; those of processes of this machine that were killed are removed.
  """
  path = pathlib.Path(path)
  partial = own_name(path) if shared else path.with_name(f".{path.name}.partial")
  try:
    with new(partial, mode, **options) as file:
      yield file
    publish(partial, path)
  finally:
    partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path):
  """A new folder to write into, which takes the place of `path` once it is whole; what was there
  goes then, and stays where the writing fails."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = own_name(path)
  old = partial.with_name(f"{partial.name}.old")
  try:
    partial.mkdir()
    yield partial
    if path.exists():
      os.replace(path, old)  # a rename cannot put one full folder over another
    try:
      publish(partial, path)
    except OSError:
      if old.exists():
        os.replace(old, path)
      raise
  finally:
    shutil.rmtree(partial, ignore_errors=True)
    if path.exists():
      shutil.rmtree(old, ignore_errors=True)


def own_name(path: pathlib.Path) -> pathlib.Path:
  """A temporary name beside `path` that no other process uses and nothing has; what processes of
  this machine that were killed have left of `path` is removed."""
  here = f".{path.name}.{socket.gethostname()}."
  name = path.with_name(f"{here}{os.getpid()}")
  for abandoned in path.parent.glob(f"{here}*"):
    process = abandoned.name.removeprefix(here).partition(".")[0]
    if alive(process) and process != str(os.getpid()):
      continue
    if abandoned.is_dir() and not abandoned.is_symlink():
      shutil.rmtree(abandoned, ignore_errors=True)
    else:
      abandoned.unlink(missing_ok=True)
  return name


def publish(partial, path) -> None:
  """Gives a file or folder its name once all of it is on disk."""
  sync_all(partial)
  os.replace(partial, path)
  sync(os.path.dirname(os.path.abspath(path)))


def sync_all(path) -> None:
  """`sync` of a file, or of a folder and all that is in it."""
  for folder, _, names in os.walk(path):
    for name in names:
      sync(os.path.join(folder, name))
    sync(folder)
  if os.path.isfile(path):
    sync(path)


def sync(path) -> None:
  """Waits until a file, or the names in a folder, are on disk; some file systems sync no
  folders."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF):
      raise
  finally:
    os.close(descriptor)


def no_links(*folders) -> None:
  """Raises a UserError where one of these folders, or anything in them, is a symbolic link."""
  for folder in folders:
    paths = [folder]
    for parent, inner, names in os.walk(folder):
      paths += [os.path.join(parent, name) for name in (*inner, *names)]
    for path in paths:
      if os.path.islink(path):
        raise UserError(
          f"{path} is a symbolic link, and what is written there would go elsewhere; expected a "
          "file or folder of its own: put what it leads to in its place, or remove it"
        )


def arrays(path) -> dict[str, np.ndarray]:
  """The arrays of an .npz by name.

  A damaged one raises errors of zlib, zipfile and NumPy alike, one too large ValueError. A small
  file may unfold to any size, and a pickle may run anything: none is read.
  """
  if not zipfile.is_zipfile(path):
    raise ValueError("it is no archive of arrays")
  with np.load(path, allow_pickle=False) as archive:
    size = sum(member.file_size for member in archive.zip.infolist())
    if size > MOST_BYTES:
      raise ValueError(f"its arrays take {size:,} bytes, at most {MOST_BYTES:,} are read")
    return {name: np.asarray(x) for name, x in archive.items()}
