"""Devices: the mesh, which parameter lies where, and host arrays becoming global ones.

Axes are Auto, so the partitioner places the collectives; the model and the objectives are written
for the global batch.

`config.sharding` says what is split, by rules (regex, spec) on the paths of parameters, statistics
and optimiser. A spec gives a mesh axis or None to every dimension, or is a word:

  fsdp         the longest dimension that the data axis divides, over `data`; arrays of less than
               FSDP_FROM numbers stay whole. (('.*', 'fsdp'),) is ZeRO-3, (('^opt_state/', 'fsdp'),)
                 ZeRO-1 (Rajbhandari et al. 2020)
  tensor       the matrices of transformer blocks, over `model` (TENSOR; Megatron-LM, Shoeybi et al.
               2019), for heads that the model axis divides
  tensor+fsdp  the same matrices over both axes

The first rule that finds an array decides about it. A word leaves what it does not split to the
rules that follow, so (('.*', 'tensor'), ('.*', 'fsdp')) splits blocks over `model` and the rest
over `data`.
"""

import dataclasses
import itertools
import math
import re

import jax
import numpy as np
from clu import parameter_overview
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from mmcl_jax.errors import UserError
from mmcl_jax.training import backend

WORDS = ("fsdp", "tensor", "tensor+fsdp")
FSDP_FROM = 2**16  # numbers; what is smaller costs more time to gather than it takes room
# parameter of a transformer block -> axes: heads and hidden units over `model`, one sum at the end
# of each half, and one of the gradient at its beginning
TENSOR = (
  (r"block\d+/(qkv|fc1)/kernel$", (None, "model")),
  (r"block\d+/(qkv|fc1)/bias$", ("model",)),
  (r"block\d+/(proj|fc2)/kernel$", ("model", None)),
)


def make_mesh(data: int, model: int, devices=None) -> Mesh:
  """Mesh with axes `data` (batch) and `model` (tensor parallelism); -1 takes the devices that are
  left.

  A row of the mesh computes one part of the batch, and lies on the one host that feeds it. `data`
  goes through one slice after the other, so that what neighbours exchange seldom crosses the slow
  network between slices.

  Args:
    devices: to build it of; None: all that there are.

  Raises:
    UserError: such a mesh cannot be built of these devices.
  """
  devices = backend.devices() if devices is None else devices
  if model < 1 or (data < 1 and data != -1):
    raise UserError(
      f"config.mesh is data={data}, model={model}; expected positive numbers, or data=-1 for all "
      "devices"
    )
  if data != -1 and data * model != len(devices):
    raise UserError(
      f"config.mesh asks for data={data} x model={model} = {data * model} devices, there are "
      f"{len(devices)}; set config.mesh.data=-1 or a mesh of that size"
    )
  hosts = grouped(devices, slice_and_host)
  check_hosts(hosts, model)
  groups = hosts
  if model == 1:
    groups = [in_a_ring(of_slice) for of_slice in grouped(devices, slice_of)]
  order = np.array([device for group in groups for device in group])
  return Mesh(
    order.reshape(-1, model),
    ("data", "model"),
    axis_types=(AxisType.Auto, AxisType.Auto),
  )


def check_hosts(hosts: list[list], model: int) -> None:
  """Raises a UserError where `model` devices do not divide the devices of each host."""
  for host in hosts:
    first = host[0]
    if len(host) % model:
      same_node = [other for other in hosts if slice_of(other[0]) == slice_of(first)]
      advice = ""
      if first.platform == "gpu" and len(same_node) > 1:
        advice = "; one process a node has all of its GPUs (docs/multi_host.md)"
      raise UserError(
        f"config.mesh asks for model={model} devices a part of the batch, which must "
        f"be on one host, and host {first.process_index} has {len(host)}; expected "
        f"config.mesh.model to divide {len(host)}{advice}"
      )


def slice_and_host(device) -> tuple[int, int]:
  return slice_of(device), device.process_index


def slice_of(device) -> int:
  """Devices of one slice share a fast network: of TPUs, or of a node's GPUs. 0: JAX tells none."""
  return getattr(device, "slice_index", 0)


def grouped(devices, key) -> list[list]:
  """Devices alike in `key`, in its order, each group in the order of `devices`."""
  in_order = sorted(devices, key=key)
  return [list(group) for _, group in itertools.groupby(in_order, key)]


def in_a_ring(devices: list) -> list:
  """Devices of one slice, neighbours in its network one after the other where JAX knows how."""
  try:
    return list(mesh_utils.create_device_mesh((len(devices),), devices))
  except (AssertionError, NotImplementedError):  # only some of its chips, or two devices a chip
    return devices


def check_batch(batch: int, mesh: Mesh) -> None:
  shards = mesh.shape["data"]
  if batch < 1 or batch % shards:
    below = max(batch // shards, 1) * shards
    above = (batch // shards + 1) * shards
    raise UserError(
      f"config.batch is {batch}, which does not divide over {shards} devices of the mesh's data "
      f"axis; take {below} or {above}"
    )


def shardings(tree, rules, mesh: Mesh):
  """Sharding of every leaf: the first rule of `config.sharding` that finds it decides; none means
  replicated.

  Args:
    tree: arrays or ShapeDtypeStructs, such as a TrainState. A path reads like
      `params/ecg/block0/qkv/kernel`, that of a moment of the optimiser
        `opt_state/.../mu/ecg/block0/qkv/kernel`.
    rules: (regex, spec) pairs; spec names a mesh axis or None a dimension, or is a word (see the
      module).

  Raises:
    UserError: a rule is malformed, does not fit an array that it finds, or decides nothing.
  """
  rules = check_rules(rules)
  used = set()  # numbers of the rules that have decided something

  def place(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for i, (regex, spec) in enumerate(rules):
      if not re.search(regex, name):
        continue
      axes = axes_of(spec, name, leaf.shape, mesh)
      if axes is not None:
        used.add(i)
        check_fit(axes, name, leaf.shape, mesh, regex)
        return NamedSharding(mesh, P(*axes))
    return NamedSharding(mesh, P())

  placed = jax.tree_util.tree_map_with_path(place, tree)
  for i in range(len(rules)):
    if i not in used:
      raise UserError(decides_nothing(tree, rules, i, mesh))
  return placed


def check_heads(where, heads: dict[str, int], mesh: Mesh) -> None:
  """Raises a UserError where a `qkv` is split over `model` and a device would get part of a head.

  Args:
    where: shardings of the parameters.
    heads: path of a module with a `qkv`, such as `ecg/block0` -> how many heads it has.
  """
  devices = mesh.shape["model"]
  for path, sharding in jax.tree_util.tree_leaves_with_path(where):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    module, found, _ = name.partition("/qkv/")
    if found and "model" in sharding.spec and heads[module] % devices:
      raise UserError(
        f"config.sharding splits {name} over config.mesh.model={devices} devices, and {module} has "
        f"{heads[module]} attention heads; expected config.mesh.model to divide them"
      )


def axes_of(spec, name: str, shape: tuple[int, ...], mesh: Mesh) -> tuple | None:
  """Mesh axes a dimension of the array; None where a word does not split it, and leaves it to the
  rules that follow."""
  if not isinstance(spec, str):
    return spec
  axes = (None,) * len(shape)
  if spec.startswith("tensor"):
    axes = tensor_axes(name)
    if axes is None or spec == "tensor":
      return axes
  free = []  # the dimensions that the data axis can split
  for i, length in enumerate(shape):
    if axes[i] is None and length % mesh.shape["data"] == 0:
      free.append(i)
  if not free or math.prod(shape) < FSDP_FROM:
    return axes if any(axes) else None
  longest = max(free, key=lambda i: shape[i])  # the first of equals
  return (*axes[:longest], "data", *axes[longest + 1 :])


def tensor_axes(name: str) -> tuple | None:
  """Mesh axes of a matrix of a transformer block (TENSOR); None: it is none."""
  for regex, axes in TENSOR:
    if re.search(regex, name):
      return axes
  return None


def check_rules(rules) -> list[tuple[str, tuple | str]]:
  pairs = []
  for rule in rules if isinstance(rules, (tuple, list)) else [rules]:
    if not is_rule(rule):
      raise UserError(
        f"config.sharding is {rules!r}; expected pairs of a regex and a spec, mesh axes or None a "
        f"dimension or one of the words {', '.join(WORDS)}, such as (('.*', 'fsdp'),) or "
        "(('qkv/kernel', (None, 'model')),)"
      )
    regex, spec = rule
    try:
      re.compile(regex)
    except re.error as error:
      raise UserError(f"config.sharding has {regex!r}, which is no regex: {error}") from None
    pairs.append((regex, spec if isinstance(spec, str) else tuple(spec)))
  return pairs


def is_rule(rule) -> bool:
  if not isinstance(rule, (tuple, list)) or len(rule) != 2:
    return False
  regex, spec = rule
  if isinstance(spec, str):
    return isinstance(regex, str) and spec in WORDS
  return isinstance(regex, str) and isinstance(spec, (tuple, list))


def check_fit(axes: tuple, name: str, shape: tuple[int, ...], mesh: Mesh, regex: str) -> None:
  named = [axis for axis in axes if axis is not None]
  unknown = [axis for axis in named if not isinstance(axis, str) or axis not in mesh.shape]
  if unknown or len(set(named)) < len(named) or len(axes) > len(shape):
    raise UserError(
      f"config.sharding rule {regex!r} gives {axes} to {name} of shape {shape}; expected at most "
      f"{len(shape)} entries out of {tuple(mesh.shape)} and None, no axis twice"
    )
  for axis, length in zip(axes, shape):
    if axis is not None and length % mesh.shape[axis]:
      raise UserError(
        f"config.sharding rule {regex!r} splits {name} of shape {shape} over {mesh.shape[axis]} "
        f"devices of {axis!r}, which does not divide {length}"
      )


def decides_nothing(tree, rules, i: int, mesh: Mesh) -> str:
  """Why rule i has nothing to decide."""
  regex, spec = rules[i]
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    leaves[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
  matching = [name for name in leaves if re.search(regex, name)]
  matrices = [name for name in matching or leaves if leaves[name].ndim > 1] or list(leaves)
  apart = max(len(matrices) // 3, 1)
  examples = f"{', '.join(matrices[::apart][:3])}, ..."
  where = f"config.sharding rule {regex!r}"
  if not matching:
    return f"{where} matches nothing; correct or remove it; paths are such as {examples}"
  if all(axes_of(spec, name, leaves[name].shape, mesh) is None for name in matching):
    wanted = "matrix of a transformer block"
    if spec == "fsdp":
      wanted = (
        f"array of at least {FSDP_FROM:,} numbers with a dimension that {mesh.shape['data']} "
        "devices divide"
      )
    return (
      f"{where} finds no {wanted} for {spec!r} to split, only what {examples} are; correct or "
      "remove it"
    )
  return (
    f"{where} has nothing left to decide: rules before it take all that it finds, such as "
    f"{examples}; put it first, or remove it"
  )


@dataclasses.dataclass
class Row:
  """A line of `table`; `bytes` on each device."""

  parameter: str
  shape: tuple[int, ...]
  dtype: str
  sharding: tuple
  bytes: int


def table(tree, where, most: int | None = None) -> str:
  """Which array lies where, and what a device holds of it: clu's table, and sums of every part of
  the tree.

  Args:
    tree: a TrainState of arrays or ShapeDtypeStructs.
    where: its shardings.
    most: rows, those that take most of a device; None: all, in the order of the tree.
  """
  rows = []
  sums = {}  # top of the tree -> numbers, bytes, bytes on each device
  total = np.zeros(3, np.int64)
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  for (path, leaf), sharding in zip(leaves, jax.tree.leaves(where), strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    itemsize = leaf.dtype.itemsize
    on_device = math.prod(sharding.shard_shape(leaf.shape)) * itemsize
    rows.append(Row(name, leaf.shape, str(leaf.dtype), tuple(sharding.spec), on_device))
    sizes = np.array([leaf.size, leaf.size * itemsize, on_device])
    top, _, _ = name.partition("/")
    sums[top] = sums.get(top, 0) + sizes
    total += sizes
  lines = []
  for top, (numbers, size, on_device) in [*sums.items(), ("all", total)]:
    lines.append(
      f"{top}: {numbers:,} numbers of {size:,} bytes, {on_device:,} bytes on each device"
    )
  if most is not None:
    rows = sorted(rows, key=lambda row: -row.bytes)[:most]
  return "\n".join([parameter_overview.make_table(rows), *lines])


def to_global(batch: dict[str, np.ndarray], mesh: Mesh):
  """This host's rows -> global arrays, rows split over the data axis."""
  sharding = NamedSharding(mesh, P("data"))
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
