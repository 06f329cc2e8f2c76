"""One run at a time in a workdir: WORKDIR/lock, held while training runs and free again however it
ends."""

import contextlib
import os
import pathlib
import socket
import time

from mmcl_jax import files
from mmcl_jax.errors import UserError, writing
from mmcl_jax.training import distributed


@contextlib.contextmanager
def held(workdir: str):
  """Holds the lock of `workdir`, which is made if absent; what was made and is still empty at the
  end goes again.

  Of several hosts the first one holds it for all. The kernel frees the lock of a process that dies,
  on network file systems with its lease.

  Raises:
    UserError: another run holds it; says which host and process, and since when.
  """
  if distributed.here.index:
    yield
    return
  folder = pathlib.Path(os.path.abspath(workdir))
  made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
  with writing(workdir):
    folder.mkdir(parents=True, exist_ok=True)
    file = take(folder / "lock", workdir)
  try:
    yield
  finally:
    with contextlib.suppress(OSError):
      # else the folder was replaced: another run's
      if os.path.samestat(os.fstat(file), os.stat(folder / "lock")):
        (folder / "lock").unlink()
    os.close(file)
    with contextlib.suppress(OSError):  # not empty: there is a run
      for parent in made:
        parent.rmdir()


def take(path: pathlib.Path, workdir: str) -> int:
  """The open, locked file. Opened again where its holder removed it in between: the name would be
  free for a third."""
  while True:
    file = files.opened(path, os.O_RDWR)
    try:
      free = files.locked(file, workdir)
    except OSError:
      os.close(file)
      raise
    if not free:
      holder = os.read(file, 200).decode(errors="replace").strip()
      os.close(file)
      raise UserError(
        f"another run is training in {workdir} ({holder or 'it has just begun'}); wait for it, stop it, or take "
        "another --workdir"
      )
    if path.exists() and os.path.samestat(os.fstat(file), os.stat(path)):
      os.truncate(file, 0)
      os.pwrite(
        file,
        f"host {socket.gethostname()}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode(),
        0,
      )
      return file
    os.close(file)


def alive(process: str) -> bool:
  """Is there a process of this number on this machine?"""
  try:
    os.kill(int(process), 0)
  except (ProcessLookupError, ValueError):
    return False
  except PermissionError:
    pass
  return True
