"""A user's mistake is one line and status 2."""

import pytest

from mmcl_jax import cli


def error_of(call, capsys):
  """The one line of a user's mistake."""
  with pytest.raises(SystemExit) as caught:
    cli.run(lambda _: call(), [])
  assert caught.value.code == 2
  (line,) = [
    line for line in capsys.readouterr().err.splitlines() if line.startswith("mmcl: error:")
  ]
  return line
