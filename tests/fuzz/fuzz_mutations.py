"""Damage to files, from a seeded generator: of bytes, of text, and inside zips, gzip streams, JSON,
arrays, tables."""

import gzip
import io
import json
import random
import re
import struct
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# bytes at either end, where formats keep their structure: half of the damage falls there
HEAD = 1024
DEEP = 100_000  # levels of nesting
MAX_TEXT = 2**17  # bytes in which words and numbers are looked for
DATE = (1980, 1, 1, 0, 0, 0)  # of zip members, so that a seed has the same bytes in every run
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
WORD = re.compile(rb"[\w./+-]{2,}")
NUMBERS = (
  b"0",
  b"-1",
  b"1",
  b"2",
  b"-0.0",
  b"nan",
  b"inf",
  b"-inf",
  b"1e308",
  b"1e-308",
  b"1e999",
  b"65536",
  str(2**31).encode(),
  str(2**32 - 1).encode(),
  str(2**63 - 1).encode(),
  str(-(2**63)).encode(),
  b"9" * 40,
  b"9" * 5000,
  b"0x10",
  b"1_0",
  b"",
  b"1.5",
)
INTEGERS = (
  0,
  1,
  -1,
  2,
  127,
  255,
  2**15 - 1,
  2**16 - 1,
  2**31 - 1,
  -(2**31),
  2**32 - 1,
  2**63 - 1,
  -(2**63),
)
SNIPPETS = (
  b"\0",
  b"\xff\xfe",
  b"\xef\xbb\xbf",
  b'"',
  b"'",
  b",",
  b";",
  b"\n",
  b"\r",
  b"\t",
  b"=",
  b"<",
  b"&",
  b"]]>",
  b"{",
  b"}",
  b"[",
  b"]",
  b"%s%n",
  b"\xc3\x28",
  b"\xed\xa0\x80",
  "é\u202e".encode(),
  b" " * 5000,
  b"A" * 70_000,
  b"\n" * 3000,
)
NESTS = (
  b"[" * DEEP,
  b'{"a":' * DEEP,
  b"<a>" * DEEP,
  b"(" * DEEP,
  b"[[" * 400 + b"]]" * 400,
  b"-" * 5000 + b"1",
  b"[a" + b".a" * 5000,
)
VALUES = (
  None,
  True,
  False,
  0,
  -1,
  1,
  10**30,
  1e308,
  float("nan"),
  float("inf"),
  "",
  "nan",
  "x" * 5000,
  "\ud800",
  [],
  {},
  [[]],
  [None],
  {"": None},
  [1, "a"],
  {"a": {"a": 1}},
)
DTYPES = ("<f8", "<f4", "<i8", "<u1", "<c16", "<U3", "|S2", "|b1", ">f8", "<M8[D]", "<f2")


def bomb(name: bytes) -> bytes:
  """A document type whose entities expand to 10 ** 12 letters."""
  entities = b"".join(
    b'<!ENTITY e%d "%s">' % (i, b"&e%d;" % (i - 1) * 10 if i else b"ha") for i in range(12)
  )
  return b"<!DOCTYPE %s [%s]>" % (name, entities)


def external(path: str) -> bytes:
  """A document type that would read a file."""
  return f'<!DOCTYPE CardiologyXML [<!ENTITY x SYSTEM "file://{path}">]>'.encode()


def damaged(rng: random.Random, name: str, data: bytes, other: bytes, escapes: list[str]) -> bytes:
  """A file with one to three pieces of damage.

  Args:
    name: of the file; its suffix tells the format.
    other: the same file of another seed, to splice with.
    escapes: path-like texts, some of which lead to the canary.
  """
  for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
    data = once(rng, name, data, other, escapes)
  return data


def once(rng, name, data, other, escapes) -> bytes:
  inside = INSIDE.get(format_of(name, data))
  if inside and rng.random() < 0.7:
    try:
      return inside(rng, data, other, escapes)
    except Exception:  # earlier damage: it is not of its format any more
      pass
  if is_text(data) and rng.random() < 0.7:
    return rng.choice(TEXT)(rng, data, escapes)
  if rng.random() < 0.15:
    return in_place(rng, data)
  return rng.choice(BYTES)(rng, data, other)


def format_of(name: str, data: bytes) -> str:
  """ "" where nothing is known of the format."""
  if data[:2] == b"\x1f\x8b":
    return "gzip"
  if data[:4] == b"PK\x03\x04":
    return "zip"
  if data[:4] == b"PAR1":
    return "parquet"
  if data[:6] == b"\x93NUMPY":
    return "npy"
  if name.endswith(".safetensors"):
    return "safetensors"
  return "json" if name.endswith(".json") else ""


def is_text(data: bytes) -> bool:
  return b"\0" not in data[:4096]


def place(rng, length: int) -> int:
  """A position in a file: near its beginning, near its end, or anywhere."""
  near = rng.randrange(min(HEAD, length) + 1)
  return rng.choice((near, length - near, rng.randrange(length + 1), rng.randrange(length + 1)))


# Bytes


def flip(rng, data, other):
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 8))):
    at = place(rng, len(data) - 1) if data else 0
    data[at : at + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1])
  return bytes(data)


def overwrite(rng, data, other):
  at, length = place(rng, len(data)), rng.choice((1, 2, 4, 8, 64, 1000))
  return (
    data[:at]
    + rng.choice((rng.randbytes(length), bytes(length), b"\xff" * length))
    + data[at + length :]
  )


def integer(rng, data, other):
  """A number that a format may take for a size."""
  at, size = place(rng, len(data)), rng.choice((2, 4, 8))
  value = rng.choice(INTEGERS) % 2 ** (8 * size)
  return (
    data[:at] + value.to_bytes(size, rng.choice(("little", "little", "big"))) + data[at + size :]
  )


def truncate(rng, data, other):
  return data[: place(rng, len(data))]


def insert(rng, data, other):
  at = place(rng, len(data))
  return data[:at] + rng.randbytes(rng.choice((1, 4, 64, 5000))) + data[at:]


def duplicate(rng, data, other):
  at, length = place(rng, len(data)), rng.choice((1, 16, 200, 5000))
  return data[:at] + data[at : at + length] * rng.choice((2, 2, 50)) + data[at + length :]


def remove(rng, data, other):
  at, length = place(rng, len(data)), rng.choice((1, 4, 64, 1000))
  return data[:at] + data[at + length :]


def splice(rng, data, other):
  at = place(rng, len(data))
  return data[:at] + other[rng.choice((at, place(rng, len(other)))) :]


def in_place(rng, data):
  """A number in text becomes another of as many characters, so that stated lengths stay right."""
  found = list(NUMBER.finditer(data[:MAX_TEXT]))
  if not found:
    return data
  match = rng.choice(found)
  size = len(match[0])
  new = rng.choice(
    (b"9" * size, b"0" * size, *(text.ljust(size) for text in (b"-1", b"nan", b"inf", b"1e99")))
  )
  return data[: match.start()] + new[:size] + data[match.end() :]


BYTES = (flip, flip, overwrite, integer, integer, truncate, insert, duplicate, remove, splice)


# Text


def number(rng, data, escapes):
  found = list(NUMBER.finditer(data[:MAX_TEXT]))
  if not found:
    return data + rng.choice(NUMBERS)
  match = rng.choice(found)
  return data[: match.start()] + rng.choice(NUMBERS) + data[match.end() :]


def word(rng, data, escapes):
  """A word becomes a path, or another word of the file."""
  found = list(WORD.finditer(data[:MAX_TEXT]))
  if not found:
    return data + rng.choice(escapes).encode()
  match = rng.choice(found[:40]) if rng.random() < 0.5 else rng.choice(found)
  new = rng.choice(escapes).encode() if rng.random() < 0.5 else rng.choice(found)[0]
  return data[: match.start()] + new + data[match.end() :]


def snippet(rng, data, escapes):
  at = place(rng, len(data))
  return data[:at] + rng.choice(SNIPPETS) + data[at:]


def nest(rng, data, escapes):
  """Nesting without end, or entities that expand without end or lead elsewhere, after a tag where
  there are tags."""
  if b"<?xml" in data[:100] and rng.random() < 0.6:
    declaration = data.index(b"?>") + 2 if b"?>" in data else 0
    new = rng.choice((bomb(b"CardiologyXML"), external(rng.choice(escapes))))
    body = data[declaration:].replace(b"<Age", rng.choice((b"&e11;", b"&x;")) + b"<Age", 1)
    return data[:declaration] + new + body
  at = place(rng, len(data))
  return data[:at] + rng.choice(NESTS) + data[at:]


def lines(rng, data, escapes):
  """Lines doubled, dropped or moved."""
  rows = data.split(b"\n")
  i, j = rng.randrange(len(rows)), rng.randrange(len(rows))
  if (kind := rng.randrange(4)) == 0:
    rows.insert(i, rows[j])
  elif kind == 1:
    del rows[i]
  elif kind == 2:
    rows[i], rows[j] = rows[j], rows[i]
  else:
    rows[i] = rows[i] * 50
  return b"\n".join(rows)


TEXT = (number, number, number, word, word, snippet, lines, nest)


# Inside formats


def in_gzip(rng, data, other, escapes):
  content, theirs = gzip.decompress(data), gzip.decompress(other)
  return gzip.compress(once(rng, "", content, theirs, escapes), 1, mtime=0)


def in_zip(rng, data, other, escapes):
  """A member damaged, renamed, doubled, dropped, or compressed in another way."""
  members = unzipped(data)
  theirs = {info.filename: content for info, content in unzipped(other)}
  i = rng.randrange(len(members))
  info, content = members[i]
  if (kind := rng.random()) < 0.7:
    members[i] = (
      info,
      once(rng, info.filename, content, theirs.get(info.filename, content), escapes),
    )
  elif kind < 0.8:
    info.filename = rng.choice(
      (rng.choice(escapes), rng.choice(members)[0].filename, "a" * 3000, "\\x", "C:\\x")
    )
  elif kind < 0.85:
    members.append((zipfile.ZipInfo(rng.choice(escapes), DATE), content))
  elif kind < 0.9:
    del members[i]
  elif kind < 0.95:
    info.compress_type = rng.choice(
      (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    )
  else:
    members[i] = info, bytes(2**24)  # compresses to nothing
  return zipped(members)


def unzipped(data: bytes) -> list[tuple[zipfile.ZipInfo, bytes]]:
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    return [(info, archive.read(info)) for info in archive.infolist()]


def zipped(members) -> bytes:
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as archive:
    for info, content in members:
      fresh = zipfile.ZipInfo(info.filename, DATE)
      fresh.compress_type, fresh.external_attr = info.compress_type, info.external_attr
      archive.writestr(fresh, content, compresslevel=1)
  return buffer.getvalue()


def in_json(rng, data, other, escapes):
  tree = json.loads(data)
  return json.dumps(changed(rng, tree, escapes)).encode()


def changed(rng, tree, escapes):
  """A JSON tree with one node, at any depth, replaced, dropped, doubled or renamed."""
  path, node = [], tree
  while isinstance(node, (dict, list)) and node and (not path or rng.random() < 0.8):
    key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    path.append((node, key))
    node = node[key]
  new = rng.choice(
    (rng.choice(VALUES), rng.choice(VALUES), rng.choice(escapes), [node], {"a": node}, str(node))
  )
  if isinstance(node, (int, float)) and rng.random() < 0.5:
    new = rng.choice((-node, node + 1, node * 10**6, node / 3, float("nan"), 0))
  if not path:
    return new
  parent, key = path[-1]
  if (kind := rng.random()) < 0.2:
    del parent[key]
  elif kind < 0.3 and isinstance(parent, dict):
    parent[rng.choice((*escapes, "", "x", str(key) + "_"))] = parent.pop(key)
  elif kind < 0.4 and isinstance(parent, list):
    parent.extend([node] * rng.choice((1, 1, 1000)))
  else:
    parent[key] = new
  return tree


def in_safetensors(rng, data, other, escapes):
  """The header changed and its length stated anew."""
  (length,) = struct.unpack("<Q", data[:8])
  header = in_json(rng, data[8 : 8 + length], other, escapes)
  return struct.pack("<Q", len(header)) + header + data[8 + length :]


def in_npy(rng, data, other, escapes):
  """An array of another type, shape or content, in a whole file."""
  array = np.load(io.BytesIO(data), allow_pickle=False)
  kind = rng.randrange(6)
  if kind == 0:
    array = array.astype(rng.choice(DTYPES)) if array.dtype.kind in "biuf" else array[:-1]
  elif kind == 1:
    array = array.reshape(
      rng.choice(((-1,), (1, *array.shape), (*array.shape, 1), (array.size, 1)))
    )
  elif kind == 2:
    part = rng.choice((slice(0), slice(1), slice(None, -1), slice(None, None, -1)))
    array = array[part] if array.ndim else array[None]
  elif kind == 3:
    array = array.T
  elif kind == 4 and array.dtype.kind in "fiu" and array.size:
    array = array.copy()
    bad = (
      rng.choice((np.nan, np.inf, -np.inf, 1e38))
      if array.dtype.kind == "f"
      else rng.choice((0, 1, 127))
    )
    array[tuple(rng.choice((slice(None), rng.randrange(n))) for n in array.shape)] = bad
  else:
    array = np.concatenate([array] * 2, rng.randrange(array.ndim)) if array.ndim else array[None]
  buffer = io.BytesIO()
  np.save(buffer, array)
  return buffer.getvalue()


def in_parquet(rng, data, other, escapes):
  """A table whose columns are of other types, names or number, in a whole file."""
  table = pq.read_table(io.BytesIO(data))
  i, kind = rng.randrange(table.num_columns), rng.randrange(6)
  column, name = table.column(i), table.column_names[i]
  if kind == 0:
    texts = [None if x is None else str(x) for x in column.to_pylist()]
    given, n = (lambda make: [None if x is None else make(x) for x in texts]), len(texts)
    new = rng.choice(
      (
        pa.array(texts, pa.string()),
        pa.array(given(str.encode), pa.binary()),
        pa.array(given(lambda x: [x])),
        pa.array(texts).dictionary_encode(),
        pa.nulls(n),
        pa.array([{"a": x} for x in texts]),
        pa.array([7] * n, pa.timestamp("ns")),
        pa.array([2**62] * n),
        pa.array([x is None for x in texts]),
        pa.array([1e300] * n),
      )
    )
    table = table.set_column(i, name, new)
  elif kind == 1:
    table = table.rename_columns(
      [rng.choice((*escapes, "eid", "")) if x == name else x for x in table.column_names]
    )
  elif kind == 2:
    table = table.remove_column(i)
  elif kind == 3:
    table = table.append_column(name, column)
  elif kind == 4:
    table = pa.concat_tables([table] * rng.choice((2, 30)))
  else:
    table = table.slice(0, rng.choice((0, 1)))
  buffer = io.BytesIO()
  pq.write_table(table, buffer, compression=rng.choice(("snappy", "none", "zstd")))
  return buffer.getvalue()


INSIDE = {
  "gzip": in_gzip,
  "zip": in_zip,
  "json": in_json,
  "safetensors": in_safetensors,
  "npy": in_npy,
  "parquet": in_parquet,
}


def settled(data: bytes) -> bytes:
  """A seed without the times at which archives were written, so that it has the same bytes in every
  run."""
  if data[:4] == b"PK\x03\x04":
    return zipped(unzipped(data))
  return gzip.compress(gzip.decompress(data), 1, mtime=0) if data[:2] == b"\x1f\x8b" else data
