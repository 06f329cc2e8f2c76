"""Files of torch.save, without torch and without running what their pickles ask for.

Since torch 1.6 such a file is a zip of stored (not compressed) members: `NAME/data.pkl`, a pickle of the structure, and
`NAME/data/KEY`, the bytes of each storage. The pickle is read by Python's own unpickler with all opcodes cut out that
torch does not write, and only the callables of CALLS, which are functions of this file. Storages are not read but
mapped: memory is taken by what is used. Format: https://pytorch.org/docs/stable/notes/serialization.html
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

MAX_PICKLE_BYTES = 64 * 2**20  # a tensor takes about 200 bytes: 300,000 tensors
MAX_COPIED = 64                # entries of a list that a call copies: a pickle may ask for copies of one again and again
MAX_MEMBERS = 300_000
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of files before torch 1.6, pickled

DTYPES = {name: np.dtype(name) for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8",
                                            "uint16", "uint32", "uint64", "complex64", "complex128", "bool")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
STORAGES = {"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
            "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
            "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
            "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8"}


def load(path):
  """What torch.load would give, with read-only np.ndarray for tensors, mapped from the file.

  Lists, tuples, dicts, OrderedDicts, numbers, strings, None and bools are themselves; torch.Size is a tuple, a dtype or
  a device a string ("torch.float32", "cuda:0"); a Parameter is its tensor. bfloat16 is ml_dtypes.bfloat16.

  Raises:
    BadRecord: not such a file, damaged, or a pickle that holds or would run anything else. Errors of disk and memory pass.
  """
  check_file(path, "a file of torch.save (.pt)")
  # Damaged pickles and archives fail in many ways, and name members in doing so.
  with bad_record("not a file of torch.save, or a damaged one"), open(path, "rb") as file:
    if file.read(len(LEGACY)) == LEGACY:
      raise BadRecord("torch's format from before 1.6; load it in torch and save it again")
    if not zipfile.is_zipfile(file):
      raise BadRecord("not a file of torch.save: no zip archive")
    return _Unpickler(_Archive(file)).load()


class _Archive:
  """Members of the zip by name, as slices of the mapped file."""

  def __init__(self, file):
    self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with zipfile.ZipFile(file) as archive:
      if len(archive.filelist) > MAX_MEMBERS:
        raise BadRecord(f"an archive of {len(archive.filelist)} members; expected at most {MAX_MEMBERS}")
      self.members = {info.filename: info for info in archive.filelist}
    roots = [name[:-len("data.pkl")] for name in self.members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(roots) != 1:
      raise BadRecord(f"an archive with {len(roots)} structures (NAME/data.pkl); expected one")
    self.root = roots[0]
    if f"{self.root}byteorder" in self.members and self.array("byteorder", np.uint8).tobytes() != b"little":
      raise BadRecord("written on a big-endian machine; expected little-endian values")

  def array(self, name, dtype):
    """A member as an array [n] over the mapped file."""
    info = self.members.get(self.root + name)
    if info is None:
      raise BadRecord("a storage that the structure names is not in the archive")
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
      raise BadRecord("compressed or encrypted members; torch stores them as they are")
    header = self.bytes[info.header_offset:info.header_offset + 30]
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
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
  """A storage; a type of its own so that no tensor can be laid over a tensor, whose strides are another's."""
  values: np.ndarray  # [n]


def _size(axes):
  if len(axes) > MAX_COPIED:
    raise BadRecord(f"a size of {len(axes)} axes; expected at most {MAX_COPIED}")
  return tuple(axes)


def _ordered(pairs=()):
  if len(pairs) > MAX_COPIED:  # torch makes it empty and fills it in
    raise BadRecord(f"an OrderedDict of {len(pairs)} pairs at once; expected at most {MAX_COPIED}")
  return OrderedDict(pairs)


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
  """An array over a storage, checked: `size` and `stride` in values, each value within the storage."""
  whole = all(type(n) is int and n >= 0 for n in (*size, *stride, offset))
  if not whole or not isinstance(storage, _Storage) or len(size) != len(stride):
    raise BadRecord("a tensor whose layout is not in form")
  values = storage.values
  if 0 in size:
    return np.empty(size, values.dtype)
  last = offset + sum((n - 1) * step for n, step in zip(size, stride))
  if last >= len(values) or math.prod(size) > len(values):  # the second: a small file must not stand for a large array
    raise BadRecord(f"a tensor reaches outside its storage of {len(values)} values")
  strides = [step * values.itemsize for step in stride]
  return np.lib.stride_tricks.as_strided(values[offset:], size, strides, writeable=False)


def _tensor_of(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
  """The same over a storage of bytes, for dtypes without a storage type of their own; `offset` in values."""
  if not isinstance(dtype, str) or (name := dtype.removeprefix("torch.")) not in DTYPES:
    raise BadRecord(f"a tensor of {str(dtype)[:40]!r}, which has no like here")
  return _tensor(_Storage(storage.values.view(DTYPES[name])), offset, size, stride)


CALLS = {
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Call(_tensor_of),
    ("torch._utils", "_rebuild_parameter"): _Call(lambda tensor, requires_grad, hooks: tensor),
    ("torch", "Size"): _Call(_size),
    ("torch", "device"): _Call(lambda kind, index=None: str(kind) if index is None else f"{kind}:{index}"),
    ("collections", "OrderedDict"): _Call(_ordered),
}


class _Unpickler(pickle._Unpickler):  # the one in Python: the one in C takes memory by sizes that a pickle claims
  """Reads the structure of an archive."""

  OPCODES = (
      "PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL BINPERSID REDUCE BUILD BINPUT LONG_BINPUT MEMOIZE BINGET "
      "LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
      "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS")
  dispatch = {code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in OPCODES.split())}

  def __init__(self, archive):
    self.archive = archive
    structure = archive.array("data.pkl", np.uint8)
    if len(structure) > MAX_PICKLE_BYTES:
      raise BadRecord(f"a structure of {len(structure)} bytes; expected at most {MAX_PICKLE_BYTES}")
    super().__init__(io.BytesIO(structure))

  def find_class(self, module, name):
    if module in ("torch", "torch.storage") and name in STORAGES:
      return _Type(STORAGES[name])
    if module == "torch" and name in DTYPES:
      return f"torch.{name}"
    if (module, name) not in CALLS:
      raise BadRecord(f"a pickle that would run {f'{module}.{name}'[:80]!r}; expected tensors, lists and dicts")
    return CALLS[module, name]

  def load_reduce(self):
    arguments, call = self.stack.pop(), self.stack.pop()
    if not isinstance(call, _Call):
      raise BadRecord("a pickle that would run what is no function of torch")
    self.append(call.run(*arguments))

  def load_build(self):
    self.stack.pop()  # attributes, such as _metadata of a state_dict: nobody needs them, and setting them could do harm
    if not isinstance(self.stack[-1], OrderedDict):
      raise BadRecord("a pickle that would set attributes")

  dispatch |= {pickle.REDUCE[0]: load_reduce, pickle.BUILD[0]: load_build}

  def persistent_load(self, identifier):
    kind, storage, key, _, count = identifier
    if kind != "storage" or not isinstance(storage, _Type) or not re.fullmatch(r"\w{1,64}", key, re.ASCII):
      raise BadRecord("a storage whose description is not in form")
    values = self.archive.array(f"data/{key}", DTYPES[storage.dtype])
    if type(count) is not int or len(values) != count:
      raise BadRecord(f"a storage of {len(values)} values; the structure says {str(count)[:20]}")
    return _Storage(values)
