"""The two errors a user meets. Both carry one line: what was found, where, what was expected, what to do."""


class UserError(Exception):
  """Something the user can put right; the programs print it as one line and exit with 2."""


class BadRecord(ValueError):
  """One recording or study that cannot be read; a batch of records goes on without it and reports the reason."""
