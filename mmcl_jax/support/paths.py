"""Every path that a user names is read here, once, where flags and configs are read."""

import os
import re

from mmcl_jax.errors import UserError

# gs://bucket/x, gs:/bucket/x (what pathlib makes of it), host:/x. A folder of such a name is
# ./gs:/bucket/x.
ADDRESS = re.compile(r"\s*[\w.+@-]+:/")


def local(text: str) -> str:
  """The path as the system takes it: `~` and `~user` are home folders, which a shell leaves alone
  in --flag=~/x.

  Raises:
    UserError: the path is empty, an address (gs://, s3://, https://, host:/), or of the home of
      nobody.
  """
  if not text.strip():
    raise UserError(f"a path is {text!r}; expected the name of a file or folder")
  if ADDRESS.match(text):
    raise UserError(
      f"{text} is an address, not a file or folder of this machine; mount the bucket or the file "
      "system "
      "and give the path where it is mounted (docs/multi_host.md)"
    )
  path = os.path.expanduser(text)
  if path.startswith("~"):
    raise UserError(
      f"{text}: there is no user {path.partition('/')[0][1:]!r} with a home folder here; a file of "
      "this "
      f"name is ./{text}"
    )
  return path
