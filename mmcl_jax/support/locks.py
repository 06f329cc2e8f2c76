"""One writer at a time: a lock file that says who holds it, free again however its holder ends.

The kernel frees the lock of a process that dies, on network file systems with its lease.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import time

from mmcl_jax.errors import UserError, writing
from mmcl_jax.support import files

ENOTSUPP = 524  # the kernel's own, which autofs and NFS let through; errno has no name for it
# What file systems without locks say.
UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, ENOTSUPP}


@contextlib.contextmanager
def held(path, doing: str, flag: str):
  """Holds the lock file `path`, which goes when the lock is given back.

  Args:
    path: of the lock file, in a folder that exists.
    doing: what its holder does, for the message, such as "another run is training in W".
    flag: of the program, which names another place to write to, such as "--workdir".

  Raises:
    UserError: another process holds it; the line says which host and process, and since when.
  """
  path = pathlib.Path(path)
  file = take(path, doing, flag)
  try:
    yield
  finally:
    with contextlib.suppress(OSError):
      # else its folder was replaced or renamed, and what is there is another's
      if os.path.samestat(os.fstat(file), os.stat(path)):
        path.unlink()
    os.close(file)


@contextlib.contextmanager
def workdir_held(workdir: str):
  """Holds WORKDIR/lock while a run trains; a workdir that was made for it and is still empty at the
  end goes again."""
  folder = pathlib.Path(os.path.abspath(workdir))
  made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
  try:
    with contextlib.ExitStack() as lock:
      with writing(workdir):
        folder.mkdir(parents=True, exist_ok=True)
        doing = f"another run is training in {workdir}"
        lock.enter_context(held(folder / "lock", doing, "--workdir"))
      yield
  finally:
    with contextlib.suppress(OSError):  # not empty: there is a run
      for parent in made:
        parent.rmdir()


def take(path: pathlib.Path, doing: str, flag: str) -> int:
  """The open, locked file. Opened again where its holder removed it in between: the name would be
  free for a third."""
  while True:
    file = files.opened(path, os.O_RDWR)
    try:
      free = locked(file, path.parent)
    except OSError:
      os.close(file)
      raise
    if not free:
      holder = os.read(file, 200).decode(errors="replace").strip()
      os.close(file)
      raise UserError(
        f"{doing} ({holder or 'it has just begun'}); wait for it, stop it, or take another {flag}"
      )
    if path.exists() and os.path.samestat(os.fstat(file), os.stat(path)):
      since = time.strftime("%Y-%m-%d %H:%M:%S")
      text = f"host {socket.gethostname()}, process {os.getpid()}, since {since}\n"
      os.truncate(file, 0)
      os.pwrite(file, text.encode(), 0)
      return file
    os.close(file)


def locked(file: int, where) -> bool:
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
