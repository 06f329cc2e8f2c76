"""Files of torch.save, without torch and without running what their pickles ask for.

Since torch 1.6 such a file is a zip of stored (not compressed) members: `NAME/data.pkl`, a pickle
of the structure, and `NAME/data/KEY`, the bytes of each storage. The pickle is read by Python's own
unpickler with all opcodes cut out that torch does not write, and only the callables of CALLS, which
are functions of this file. Storages are not read but mapped: memory is taken by what is used.
Format:
https://pytorch.org/docs/stable/notes/serialization.html

Data (`load`) may hold nothing else. A checkpoint (`load_checkpoint`) also holds objects of programs
that are not here, such as argparse.Namespace: nothing of theirs is run or kept, and INERT stands in
their place.
"""

import io
import math
import mmap
import pickle
import re
import zipfile
from collections import OrderedDict
from typing import NamedTuple

import ml_dtypes
import numpy as np

from mmcl_jax.data.readers.files import bad_record, check_file
from mmcl_jax.errors import BadRecord

MAX_PICKLE_BYTES = 64 * 2**20
# opcodes of a pickle, some 10 s and 700 MB; a tensor takes about 40: 200,000 tensors
MAX_STEPS = 8_000_000
# entries of a list that a call copies: a pickle may ask for copies of one again and again
MAX_COPIED = 64
MAX_MEMBERS = 300_000
MAX_DIRECTORY_BYTES = 100 * MAX_MEMBERS  # of the zip; read before members can be counted
# the magic number of files before torch 1.6, pickled
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

DTYPES = {
  name: np.dtype(name)
  for name in (
    "float64",
    "float32",
    "float16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "complex64",
    "complex128",
    "bool",
  )
}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
STORAGES = {
  "DoubleStorage": "float64",
  "FloatStorage": "float32",
  "HalfStorage": "float16",
  "BFloat16Storage": "bfloat16",
  "LongStorage": "int64",
  "IntStorage": "int32",
  "ShortStorage": "int16",
  "CharStorage": "int8",
  "ByteStorage": "uint8",
  "BoolStorage": "bool",
  "ComplexFloatStorage": "complex64",
  "ComplexDoubleStorage": "complex128",
  "UntypedStorage": "uint8",
}


def load(path):
  """What torch.load would give, with read-only np.ndarray for tensors, mapped from the file.

  Lists, tuples, dicts, OrderedDicts, numbers, strings, None and bools are themselves; torch.Size is
  a tuple, a dtype or a device a string ("torch.float32", "cuda:0"); a Parameter is its tensor.
  bfloat16 is ml_dtypes.bfloat16.

  Raises:
    BadRecord: not such a file, damaged, or a pickle that holds or would run anything else. Errors
      of disk and memory pass.
  """
  return _load(path, _Unpickler)


def load_checkpoint(path):
  """The same of a checkpoint, in which INERT stands for every object but those above, and for sets.

  Raises:
    BadRecord: not such a file, or damaged. Errors of disk and memory pass.
  """
  return _load(path, _CheckpointUnpickler)


def _load(path, unpickler):
  check_file(path, "a file of torch.save (.pt, .pth, .ckpt)")
  # Damaged pickles and archives fail in many ways, and name members in doing so.
  with bad_record("not a file of torch.save, or a damaged one"), open(path, "rb") as file:
    if file.read(len(LEGACY)) == LEGACY:
      raise BadRecord("torch's format from before 1.6; load it in torch and save it again")
    if not zipfile.is_zipfile(file):
      raise BadRecord("not a file of torch.save: no zip archive")
    return unpickler(_Archive(file)).load()


class _Archive:
  """Members of the zip by name, as slices of the mapped file."""

  def __init__(self, file):
    self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if (size := zipfile._EndRecData(file)[zipfile._ECD_SIZE]) > MAX_DIRECTORY_BYTES:
      raise BadRecord(
        f"an archive whose directory has {size} bytes; expected at most {MAX_DIRECTORY_BYTES}"
      )
    with zipfile.ZipFile(file) as archive:
      if len(archive.filelist) > MAX_MEMBERS:
        raise BadRecord(
          f"an archive of {len(archive.filelist)} members; expected at most {MAX_MEMBERS}"
        )
      self.members = {info.filename: info for info in archive.filelist}
    roots = [
      name[: -len("data.pkl")] for name in self.members if re.fullmatch(r"[^/]+/data\.pkl", name)
    ]
    if len(roots) != 1:
      raise BadRecord(f"an archive with {len(roots)} structures (NAME/data.pkl); expected one")
    self.root = roots[0]
    if (
      f"{self.root}byteorder" in self.members
      and self.array("byteorder", np.uint8).tobytes() != b"little"
    ):
      raise BadRecord("written on a big-endian machine; expected little-endian values")

  def array(self, name, dtype):
    """A member as an array [n] over the mapped file."""
    info = self.members.get(self.root + name)
    if info is None:
      raise BadRecord("a storage that the structure names is not in the archive")
    if (
      info.compress_type != zipfile.ZIP_STORED
      or info.flag_bits & 1
      or info.file_size != info.compress_size
    ):
      raise BadRecord("compressed or encrypted members; torch stores them as they are")
    header = self.bytes[info.header_offset : info.header_offset + 30]
    start = (
      info.header_offset
      + 30
      + int.from_bytes(header[26:28], "little")
      + int.from_bytes(header[28:30], "little")
    )
    if header[:4] != b"PK\x03\x04" or start + info.file_size > len(self.bytes):
      raise BadRecord("a member lies outside the file: it is cut off or damaged")
    dtype = np.dtype(dtype)
    return np.frombuffer(self.bytes, dtype, info.file_size // dtype.itemsize, start)


class _Call(NamedTuple):
  """Stands for a callable that a pickle may name; only these are ever called."""

  run: object


class _Type(NamedTuple):
  """Stands for a type of storage."""

  dtype: str


class _Storage(NamedTuple):
  """A storage; a type of its own so that no tensor can be laid over a tensor, whose strides are
  another's."""

  values: np.ndarray  # [n]


class _Inert:
  """Stands for an object of a program that is not here: called, changed or filled, it stays what it
  is."""

  def __repr__(self):
    return "INERT"


INERT = _Inert()
# keys of dicts; the hash of nested tuples may take for ever
PLAIN = (str, bytes, int, float, bool, type(None))


def _size(axes):
  if len(axes) > MAX_COPIED:
    raise BadRecord(f"a size of {len(axes)} axes; expected at most {MAX_COPIED}")
  return tuple(axes)


def _ordered(pairs=()):
  if len(pairs) > MAX_COPIED:  # torch makes it empty and fills it in
    raise BadRecord(f"an OrderedDict of {len(pairs)} pairs at once; expected at most {MAX_COPIED}")
  return OrderedDict((_key(key), value) for key, value in pairs)


def _key(key):
  if type(key) not in PLAIN:
    raise BadRecord(f"a dict with a {type(key).__name__} for a key; expected text or a number")
  return key


def _device(kind, index=None):
  if type(kind) is not str or type(index) not in (int, type(None)):
    raise BadRecord("a device whose description is not in form")
  return kind if index is None else f"{kind}:{index}"


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
  """An array over a storage, checked: `size` and `stride` in values, each value within the
  storage."""
  counts = all(type(n) is int and n >= 0 for n in (*size, *stride, offset))
  if not counts or not isinstance(storage, _Storage) or len(size) != len(stride):
    raise BadRecord("a tensor whose layout is not in form")
  values = storage.values
  if 0 in size:
    return np.empty(size, values.dtype)
  last = offset + sum((n - 1) * step for n, step in zip(size, stride))
  # the second: a small file must not stand for a large array
  if last >= len(values) or math.prod(size) > len(values):
    raise BadRecord(f"a tensor reaches outside its storage of {len(values)} values")
  strides = [step * values.itemsize for step in stride]
  return np.lib.stride_tricks.as_strided(values[offset:], size, strides, writeable=False)


def _tensor_of(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
  """The same over a storage of bytes, for dtypes without a storage type of their own; `offset` in
  values."""
  if not isinstance(dtype, str) or (name := dtype.removeprefix("torch.")) not in DTYPES:
    raise BadRecord(
      f"a tensor of {dtype[:40]!r}, which has no like here"
      if isinstance(dtype, str)
      else "a tensor whose dtype is not in form"
    )
  return _tensor(_Storage(storage.values.view(DTYPES[name])), offset, size, stride)


def _parameter(tensor, requires_grad, hooks):
  return tensor


CALLS = {
  ("torch._utils", "_rebuild_tensor_v2"): _Call(_tensor),
  ("torch._utils", "_rebuild_tensor_v3"): _Call(_tensor_of),
  ("torch._utils", "_rebuild_parameter"): _Call(_parameter),
  ("torch", "Size"): _Call(_size),
  ("torch", "device"): _Call(_device),
  ("collections", "OrderedDict"): _Call(_ordered),
}


class _Counted(dict):
  """What to do for each opcode, MAX_STEPS times in all: one byte may stand for a list or a dict."""

  left = MAX_STEPS

  def __getitem__(self, code):
    self.left -= 1
    if self.left < 0:
      raise BadRecord(
        f"a structure of more than {MAX_STEPS} steps; expected at most some 200,000 tensors"
      )
    return super().__getitem__(code)


# the one in Python: the one in C takes memory by sizes that a pickle claims
def _handlers(opcodes: str) -> dict:
  """Code -> what pickle does at it, of opcodes by their names."""
  handlers = {}
  for name in opcodes.split():
    code = getattr(pickle, name)[0]
    handlers[code] = pickle._Unpickler.dispatch[code]
  return handlers


class _Unpickler(pickle._Unpickler):
  """Reads the structure of an archive."""

  OPCODES = (
    "PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL BINPERSID REDUCE BUILD BINPUT LONG_BINPUT MEMOIZE "
    "BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "
    "SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT "
    "SETITEM SETITEMS"
  )
  dispatch = _handlers(OPCODES)

  def __init__(self, archive):
    self.archive = archive
    structure = archive.array("data.pkl", np.uint8)
    if len(structure) > MAX_PICKLE_BYTES:
      raise BadRecord(f"a structure of {len(structure)} bytes; expected at most {MAX_PICKLE_BYTES}")
    super().__init__(io.BytesIO(structure))
    self.dispatch = _Counted(self.dispatch)

  def find_class(self, module, name):
    if module in ("torch", "torch.storage") and name in STORAGES:
      return _Type(STORAGES[name])
    if module == "torch" and name in DTYPES:
      return f"torch.{name}"
    if (module, name) not in CALLS:
      raise BadRecord(
        f"a pickle that would run {f'{module}.{name}'[:80]!r}; expected tensors, lists and dicts"
      )
    return CALLS[module, name]

  def load_reduce(self):
    arguments = self.stack.pop()
    call = self.stack.pop()
    if not isinstance(call, _Call):
      raise BadRecord("a pickle that would run what is no function of torch")
    self.append(call.run(*arguments))

  def load_build(self):
    # attributes, such as _metadata of a state_dict: nobody needs them, and setting them could do
    # harm
    self.stack.pop()
    if not isinstance(self.stack[-1], OrderedDict):
      raise BadRecord("a pickle that would set attributes")

  def load_setitem(self):
    value = self.stack.pop()
    key = self.stack.pop()
    self.fill([key, value])

  def load_setitems(self):
    self.fill(self.pop_mark())

  def fill(self, items):
    for i in range(0, len(items), 2):
      self.stack[-1][_key(items[i])] = items[i + 1]

  dispatch |= {
    pickle.REDUCE[0]: load_reduce,
    pickle.BUILD[0]: load_build,
    pickle.SETITEM[0]: load_setitem,
    pickle.SETITEMS[0]: load_setitems,
  }

  def persistent_load(self, identifier):
    kind, storage, key, _, count = identifier
    if (
      kind != "storage"
      or not isinstance(storage, _Type)
      or not re.fullmatch(r"\w{1,64}", key, re.ASCII)
    ):
      raise BadRecord("a storage whose description is not in form")
    values = self.archive.array(f"data/{key}", DTYPES[storage.dtype])
    if type(count) is not int or len(values) != count:
      says = f"a {type(count).__name__}"
      if type(count) in (int, str):
        says = str(count)[:20]
      raise BadRecord(f"a storage of {len(values)} values; the structure says {says}")
    return _Storage(values)


class _CheckpointUnpickler(_Unpickler):
  """Reads the weights of a checkpoint, and nothing of the objects beside them."""

  OPCODES = "NEWOBJ NEWOBJ_EX EMPTY_SET ADDITEMS FROZENSET BINBYTES SHORT_BINBYTES POP POP_MARK"
  dispatch = _Unpickler.dispatch | _handlers(OPCODES)

  def find_class(self, module, name):
    try:
      return super().find_class(module, name)
    except BadRecord:
      return INERT

  def load_reduce(self):
    if self.stack[-2] is INERT:
      self.stack.pop()
    else:
      super().load_reduce()

  def load_build(self):
    self.stack.pop()

  def load_newobj(self):
    self.stack[-2:] = [INERT]

  def load_newobj_ex(self):
    self.stack[-3:] = [INERT]

  def fill(self, items):
    if self.stack[-1] is INERT:
      return
    kept = []  # entries under a tuple, or under a class, are no weights
    for key, value in zip(items[::2], items[1::2]):
      if type(key) in PLAIN:
        kept += [key, value]
    super().fill(kept)

  def load_append(self):
    self.extend([self.stack.pop()])

  def load_appends(self):
    self.extend(self.pop_mark())

  def extend(self, items):
    if self.stack[-1] is not INERT:
      self.stack[-1].extend(items)

  def load_empty_set(self):
    self.append(INERT)

  def load_frozenset(self):
    self.pop_mark()
    self.append(INERT)

  def load_additems(self):
    self.pop_mark()

  def load_bytearray8(self):  # Python's own takes as much memory as the pickle claims
    self.read(int.from_bytes(self.read(8), "little"))
    self.append(INERT)

  dispatch |= {
    getattr(pickle, name.upper())[0]: method
    for name, method in (
      ("reduce", load_reduce),
      ("build", load_build),
      ("newobj", load_newobj),
      ("newobj_ex", load_newobj_ex),
      ("append", load_append),
      ("appends", load_appends),
      ("empty_set", load_empty_set),
      ("frozenset", load_frozenset),
      ("additems", load_additems),
      ("bytearray8", load_bytearray8),
    )
  }
