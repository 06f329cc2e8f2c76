"""A user's mistake ends a program with status 2 and one line."""

import re

import pytest

from mmcl_jax import cli


def error_of(main, flags, capsys, beside=False, **options) -> str:
  """Runs a program as the console does, which must end with status 2; returns its line of error.

  Args:
    beside: whether it may have said on stderr before what it found and how far it came; how it is
      used (argparse) it may always say.
    options: of cli.run.
  """
  with pytest.raises(SystemExit) as stop:
    cli.run(main, list(flags), **options)
  assert stop.value.code == 2
  lines = capsys.readouterr().err.strip().splitlines()
  errors = [line for line in lines if re.match(r"mmcl( \w+)?: error: ", line)]
  assert len(errors) == 1 and lines[-1] == errors[0], lines
  assert beside or lines == errors or lines[0].startswith("usage: "), lines
  return errors[0]
