"""Weights of a file of torch.save (.pth, .pt, .ckpt) or safetensors: arrays by key, nothing of the file is executed."""

import os
import pathlib
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from mmcl_jax.data.readers import mmcl_pt
from mmcl_jax.errors import BadRecord, UserError

WRAPPERS = ("model", "state_dict", "model_state_dict", "model_state")  # where checkpoints keep their weights


class Weights(NamedTuple):
  """state: key -> array; beside: names of what else the file holds; metadata: of a safetensors file, text by name."""

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
      head = file.read(9)
    if head[8:] == b"{":  # after the length of the header, 64 bits
      with safetensors.safe_open(path, "np") as file:
        return Weights({key: file.get_tensor(key) for key in file.keys()}, [], file.metadata() or {})
    tree = mmcl_pt.load_checkpoint(path)
  except BadRecord as error:
    raise UserError(f"{path}: {error}; expected a file of torch.save (.pth, .pt, .ckpt) or safetensors") from None
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror or error}") from None
  except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:  # also a type that NumPy lacks
    raise UserError(f"{path} is no safetensors file, or a damaged one ({error})") from None
  return find(tree, path)


def find(tree, path) -> Weights:
  """The state dict of what torch.save wrote: the whole, or under one of WRAPPERS."""
  holds = lambda x: isinstance(x, dict) and any(isinstance(value, np.ndarray) for value in x.values())
  found = [name for name in WRAPPERS if isinstance(tree, dict) and holds(tree.get(name))]
  if len(found) > 1:
    raise UserError(f"{path} holds weights under {' and '.join(found)}; save the one that is wanted alone")
  state = tree[found[0]] if found else tree
  if not holds(state):
    raise UserError(f"{path} holds no weights, neither plain nor under {', '.join(WRAPPERS)}; was a whole model saved? "
                    "Save its model.state_dict() instead")
  beside = [str(key) for x in ([tree, state] if found else [tree]) for key, value in x.items()
            if not isinstance(value, np.ndarray) and key not in found]
  return Weights({str(key): value for key, value in state.items() if isinstance(value, np.ndarray)}, beside, {})


def save(state: dict[str, np.ndarray], path, metadata: dict[str, str]) -> None:
  """Writes a safetensors file, whole or not at all."""
  path = pathlib.Path(path)
  partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
  whole = {key: np.asarray(x, order="C") for key, x in state.items()}
  try:
    safetensors.numpy.save_file(whole, partial, {"format": "pt"} | metadata)
    os.replace(partial, path)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"cannot write {path}: {error}") from None
  finally:
    partial.unlink(missing_ok=True)
