"""Weights of a file of torch.save (.pth, .pt, .ckpt) or safetensors: arrays by key, nothing of the
file is executed."""

import json
import math
import mmap
import os
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from mmcl_jax.data.readers import mmcl_pt
from mmcl_jax.errors import BadRecord, UserError
from mmcl_jax.support import files

# of a file: 4 billion weights, or 1.3 billion with the moments of Adam
MAX_BYTES = 16 * 2**30
# of a safetensors file; a tensor takes about 100 bytes: 160,000 tensors
MAX_HEADER_BYTES = 16 * 2**20
MAX_AXES = 64  # as NumPy's
DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "BOOL": np.bool_,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
}
# where checkpoints keep their weights
WRAPPERS = ("model", "state_dict", "model_state_dict", "model_state")


class Weights(NamedTuple):
  """state: key -> array; beside: names of what else the file holds; metadata: of a safetensors
  file, text by name."""

  state: dict[str, np.ndarray]
  beside: list[str]
  metadata: dict[str, str]


def read(path) -> Weights:
  """The weights of a file; its format is told by its first bytes.

  Raises:
    UserError: not such a file, a damaged one, or one without weights.
  """
  path = os.path.realpath(path)
  try:
    with open(path, "rb") as file:
      size = os.fstat(file.fileno()).st_size
      if size > MAX_BYTES:
        raise BadRecord(f"{size / 2**30:,.0f} GiB; at most {MAX_BYTES // 2**30} GiB are read")
      if file.read(9)[8:] == b"{":  # after the length of the header, 64 bits
        return read_safetensors(file)
    return find(mmcl_pt.load_checkpoint(path), path)
  except BadRecord as error:
    raise UserError(
      f"{path}: {error}; expected a file of torch.save (.pth, .pt, .ckpt) or safetensors"
    ) from None
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def read_safetensors(file) -> Weights:
  """The arrays of a safetensors file, mapped: what a header claims takes no memory.

  Format: https://huggingface.co/docs/safetensors, 8 bytes with the length of a JSON header, the
  header, the values.

  Raises:
    BadRecord: damaged, or a tensor of a type without an equivalent in NumPy.
  """
  content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  start = 8 + int.from_bytes(content[:8], "little")
  if start > min(len(content), 8 + MAX_HEADER_BYTES):
    raise BadRecord(
      f"no safetensors file, or a damaged one: a header of {start - 8:,} bytes, the file has "
      f"{len(content):,}; at most {MAX_HEADER_BYTES:,} are read"
    )
  state, end = {}, start
  try:
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__", {})
    for key, entry in sorted(header.items(), key=_offsets):
      dtype = _dtype(key, entry["dtype"])
      shape = entry["shape"]
      if len(shape) > MAX_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the shape of {key[:80]!r} is not in form")
      begin, count = end, math.prod(shape)
      end += count * dtype.itemsize
      offsets = [begin - start, end - start]
      if entry["data_offsets"] != offsets or end > len(content):
        raise ValueError(
          f"the place of {key[:80]!r} does not match its shape, or is outside the file"
        )
      state[key] = np.frombuffer(content, dtype, count, begin).reshape(shape)
  except BadRecord:
    raise
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise BadRecord(f"no safetensors file, or a damaged one ({error})") from None
  return filled(state, [], metadata if isinstance(metadata, dict) else {})


def _offsets(item):
  _, entry = item
  return entry["data_offsets"]


def _dtype(key, name):
  if name not in DTYPES:
    raise BadRecord(
      f"{key[:80]!r} is of the type {str(name)[:20]!r}, which is not read; save it as float32"
    )
  return np.dtype(DTYPES[name])


def find(tree, path) -> Weights:
  """The state dict of what torch.save wrote: the whole, or under one of WRAPPERS."""

  def holds(x):
    return isinstance(x, dict) and any(isinstance(value, np.ndarray) for value in x.values())

  wrappers = []
  if isinstance(tree, dict):
    wrappers = [name for name in WRAPPERS if holds(tree.get(name))]
  if len(wrappers) > 1:
    raise UserError(
      f"{path} holds weights under {' and '.join(wrappers)}; save the one that is wanted alone"
    )
  state = tree[wrappers[0]] if wrappers else tree
  if not holds(state):
    raise UserError(
      f"{path} holds no weights, neither plain nor under {', '.join(WRAPPERS)}; was a whole model "
      "saved? Save its model.state_dict() instead"
    )
  beside = []
  for entries in (tree, state) if wrappers else (tree,):
    for key, value in entries.items():
      if not isinstance(value, np.ndarray) and key not in wrappers:
        beside.append(str(key))
  arrays = {}
  for key, value in state.items():
    if isinstance(value, np.ndarray):
      arrays[str(key)] = value
  return filled(arrays, beside, {})


def filled(state: dict[str, np.ndarray], beside: list[str], metadata: dict[str, str]) -> Weights:
  """Arrays without a value, whose shapes may announce anything, count as something beside the
  weights."""
  weights = {key: x for key, x in state.items() if x.size}
  if not weights:
    raise BadRecord("no tensor in it has a value")
  empty = [key for key in state if key not in weights]
  return Weights(weights, beside + empty, metadata)


def save(state: dict[str, np.ndarray], path, metadata: dict[str, str]) -> None:
  """Writes a safetensors file, whole or not at all."""
  arrays = {key: np.asarray(x, order="C") for key, x in state.items()}
  try:
    with files.atomic(path, "wb") as file:
      safetensors.numpy.save_file(arrays, file.name, {"format": "pt"} | metadata)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"cannot write {path}: {error}") from None
