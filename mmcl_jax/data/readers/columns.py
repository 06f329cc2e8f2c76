"""Columns of CSV, TSV and Parquet files, in batches: memory does not grow with a file, unwanted
columns are not kept.

pyarrow parses. Its messages quote cells, so none is passed on: a table is a user's own, and what
fails is a UserError with the file's name and no content.
"""

import contextlib
import csv
import datetime
import errno
import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from mmcl_jax.data.readers.files import head
from mmcl_jax.data.readers.kinds import GZIP, PARQUET, UTF_16, tell
from mmcl_jax.errors import UserError

MAX_HEADER_BYTES = 4 * 2**20  # 20,000 columns with descriptive names take 2 MB
# of a CSV at a time, read some blocks ahead; the header and each row must fit
BLOCK_BYTES = 4 * 2**20
BATCH_CELLS = 2_000_000  # of a Parquet file at a time
MISSING = [
  "",
  "NA",
  "N/A",
  "NaN",
  "nan",
  "NULL",
  "null",
  "None",
  "none",
  "<NA>",
  "Do not know",
  "Prefer not to answer",
]
# a column is lost where this share of its filled cells is dropped, and at least so many
LOST, FEWEST_LOST = 0.9, 3
DATES = np.array(["1930-01-01", "2036-12-31"], "datetime64[D]")
"""Dates that can be: UK Biobank writes 1900 to 1909 and 2037 where one is unknown or withheld."""


def header(path) -> list[str]:
  """The names of a file's columns. Raises UserError where it cannot be read."""
  path = Path(path)
  try:
    if _is_parquet(path):
      return pa.parquet.read_schema(path).names
    line, _ = _header_line(path)
    return next(csv.reader([line], delimiter=_delimiter(line), strict=True), [])
  except Exception as error:
    raise unreadable(path, error) from None


def batches(path, names: list[str]) -> Iterator[pa.RecordBatch]:
  """The columns `names` of a file, some rows at a time; a CSV's cells are strings, null where one
  of MISSING."""
  path = Path(path)
  try:
    if _is_parquet(path):
      with pa.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(max(1, BATCH_CELLS // len(names)), columns=names)
      return
    line, encoding = _header_line(path)
    parse = pa.csv.ParseOptions(delimiter=_delimiter(line), newlines_in_values=True)
    convert = pa.csv.ConvertOptions(
      include_columns=names,
      column_types=dict.fromkeys(names, pa.string()),
      null_values=MISSING,
      strings_can_be_null=True,
    )
    read = pa.csv.ReadOptions(block_size=BLOCK_BYTES, encoding=encoding)
    with _stream(path) as stream, pa.csv.open_csv(stream, read, parse, convert) as reader:
      yield from map(_with_points, reader) if parse.delimiter == ";" else reader
  except Exception as error:  # pyarrow's are many
    if match := re.match(
      r"CSV parse error: (?:Row #\d+: )?Expected (\d+) columns, got (\d+)", str(error)
    ):
      raise UserError(
        f"{path}: a row has {match[2]} cells; expected {match[1]}, as in the header: is it cut "
        "off, or a text not quoted?"
      ) from None
    raise unreadable(path, error) from None


def texts(column: pa.Array) -> np.ndarray:
  """A column as object [n] of str without blanks at the ends; "" where missing. Whole numbers have
  no ".0"."""
  if column.null_count == len(column):
    return np.full(len(column), "", object)
  if pa.types.is_dictionary(column.type):
    column = column.dictionary_decode()
  if pa.types.is_floating(column.type):  # what pandas makes of whole numbers with gaps
    values = column.to_numpy(zero_copy_only=False)
    return np.array([_number_text(value) for value in values], object)
  if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
    cells = []
    for cell in column.to_pylist():
      cells.append("" if cell is None else json.dumps(cell, default=str))
    return np.array(cells, object)
  trimmed = pc.utf8_trim_whitespace(column.cast(pa.string()))
  missing = pc.is_in(trimmed, pa.array(MISSING))
  cells = pc.if_else(missing, "", trimmed).fill_null("")
  return np.asarray(cells.to_pylist(), object)


def _number_text(value):
  if np.isnan(value):
    return ""
  if value == np.round(value):
    return f"{value:.0f}"
  return repr(float(value))


def numbers(
  column: pa.Array, name: str, problems: Counter, words: dict[str, str] | None = None
) -> np.ndarray:
  """A column as float64 [n], NaN where missing; other text is NaN too and counted in `problems`.

  `words`: what stands for a number, in small letters.
  """
  if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
    with contextlib.suppress(pa.ArrowInvalid):
      column = column.cast(pa.float64())  # fast, and fails at the first text that is no number
  kinds = pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean
  if any(is_kind(column.type) for is_kind in kinds):
    floats = column.cast(pa.float64(), safe=False)
    values = floats.to_numpy(zero_copy_only=False).astype(np.float64)
    given = ~np.isnan(values)
  else:
    cells = texts(column)
    given = cells != ""
    if words:
      cells = np.array([words.get(text.lower(), text) for text in cells], object)
    values = np.full(len(cells), np.nan)
    values[given] = pd.to_numeric(pd.Series(cells[given], dtype=object), errors="coerce")
  values = np.where(np.isfinite(values), values, np.nan)
  count(problems, f"{name}: not a number", np.sum(given & np.isnan(values)))
  return values


def days(cells: np.ndarray, name: str, problems: Counter) -> np.ndarray:
  """Texts YYYY-MM-DD (what follows is left out) as datetime64[D] [n]; NaT where missing.

  What is not a date, or is after today, is NaT too and counted in `problems`.
  """
  earliest, latest = DATES
  dates = np.full(len(cells), np.datetime64("NaT"), "datetime64[D]")
  given = cells != ""
  if given.any():
    beginnings = pd.Series([text[:10] for text in cells[given]])
    parsed = pd.to_datetime(beginnings, format="%Y-%m-%d", errors="coerce")
    parsed = parsed.to_numpy("datetime64[D]")
    possible = (parsed >= earliest) & (parsed <= latest)
    parsed[~possible] = np.datetime64("NaT")
    dates[given] = parsed
  not_dates = given & np.isnat(dates)
  count(problems, f"{name}: not a date from {earliest} to {latest}", np.sum(not_dates))
  late = dates > np.datetime64(datetime.date.today())
  count(problems, f"{name}: after today", np.sum(late))
  dates[late] = np.datetime64("NaT")
  return dates


DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")


class Kept:
  """How many of a column's filled cells were understood and how many were dropped, over the batches
  of a file."""

  def __init__(self, expected: str):
    self.expected = expected
    self.understood = 0
    self.dropped = 0
    self.example = ""

  def add(
    self,
    understood: int,
    dropped: int,
    cells: Iterable[str],
  ) -> None:
    """`cells`: some of those dropped, and empty ones."""
    self.understood += understood
    self.dropped += dropped
    if not dropped:
      return
    for cell in cells:  # the first one, or the first with a decimal comma
      if DECIMAL_COMMA.fullmatch(self.example):
        return
      if cell and (not self.example or DECIMAL_COMMA.fullmatch(cell)):
        self.example = cell


def watched(
  kept: Kept, problems: Counter, column: pa.Array | np.ndarray, read: Callable
) -> np.ndarray:
  """read(column) [n], which is empty, NaN or NaT where a cell is missing or dropped, and counts in
  `problems` what it drops."""
  before = problems.total()
  values = read(column)
  without = values == "" if values.dtype.kind == "U" else np.isnan(values)
  dropped = min(problems.total() - before, int(without.sum()))  # some are counted under two names
  cells = ()
  if dropped:
    cells = column if isinstance(column, np.ndarray) else texts(column)
    cells = cells[without]
  kept.add(int(np.sum(~without)), dropped, cells)
  return values


def lost(dropped: int, filled: int) -> bool:
  """Is a column lost as a whole, of which so many filled cells are dropped?"""
  return dropped >= FEWEST_LOST and dropped >= LOST * filled


def check_kept(path, kept: dict[str, Kept]) -> None:
  """Raises a UserError for a column that is written in another way: nearly all that stands in it
  was dropped, or it has commas.

  Whole numbers have no decimal comma, so that some cells of such a column are understood.
  """
  for name, column in kept.items():
    filled = column.dropped + column.understood
    comma = ""
    if DECIMAL_COMMA.fullmatch(column.example):
      comma = "; is its comma a decimal sign? write it as a point"
    if lost(column.dropped, filled) or comma and column.dropped >= FEWEST_LOST:
      # what a cell is like, not whose it is
      form = re.sub(r"\d", "9", " ".join(column.example.split())[:20])
      raise UserError(
        f"{path}: {column.dropped} of the {filled} filled cells of {name} are not understood, such "
        f"as {form!r} (digits shown as 9); expected {column.expected}{comma}. Put them so, or "
        "leave the column out"
      )


def count(problems, what, times):
  if times:
    problems[what] += int(times)


def _is_parquet(path):
  return tell(head(path)) is PARQUET


def _stream(path):
  """The bytes of a text, out of its gzip if it is packed, as ukbNNNNN.tab.gz often is."""
  return pa.input_stream(str(path), compression="gzip" if tell(head(path)) is GZIP else None)


def _header_line(path):
  """(the first line of a table, the encoding of the whole)."""
  with open(path, "rb") as file, gzip.GzipFile(fileobj=file) as unpacked:
    line = (unpacked if tell(head(path)) is GZIP else file).readline(MAX_HEADER_BYTES)
  kind = tell(line)
  if kind is UTF_16:
    return line.decode("utf-16", "ignore"), "utf-16"  # what is ignored is half of the line's end
  if kind:
    raise ValueError(kind.name)
  if len(line) == MAX_HEADER_BYTES:
    raise ValueError("its first line is not that of a table")
  return line.decode("utf-8-sig"), "utf-8"


def _delimiter(line):
  if "\t" in line:
    return "\t"
  return ";" if line.count(";") > line.count(",") else ","


def _with_points(batch):
  """Cells separated by semicolons, as spreadsheets write them where the decimal sign is a comma:
  140,5 becomes 140.5."""
  columns = [
    pc.replace_substring_regex(column, r"^(\s*[-+]?\d+),(\d+\s*)$", r"\1.\2")
    for column in batch.columns
  ]
  return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def unreadable(
  path, error, expected="CSV or TSV with a header (UTF-8, UTF-16; also in gzip), or Parquet"
) -> UserError:
  """What to tell of a file that failed with `error`: where disk or memory failed, that, and else
  what was expected."""
  number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
  if number == errno.ENOENT:
    return UserError(f"{path}: no such file; expected {expected}")
  if number == errno.EISDIR:
    return UserError(f"{path} is a folder; expected a file: {expected}")
  if number:  # in the system's words: those of pyarrow quote
    return UserError(f"{path} cannot be read: {os.strerror(number)}")
  if isinstance(error, UnicodeDecodeError):
    reason = "a text in another encoding"
  elif isinstance(error, OSError | EOFError):  # of gzip
    reason = "damaged or cut short"
  else:
    reason = str(error) if type(error) is ValueError else type(error).__name__
  return UserError(f"{path} cannot be read as a table ({reason}); expected {expected}")
