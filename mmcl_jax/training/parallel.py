"""Devices: the mesh, which parameter lies where, and host arrays becoming global ones.

Axes are Auto, so the partitioner places the collectives; the model and the objectives are written for the global batch.
"""

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from mmcl_jax.errors import UserError


def make_mesh(data: int, model: int) -> Mesh:
  """Mesh with axes `data` (batch) and `model` (tensor parallelism); -1 takes the devices that are left."""
  devices = jax.device_count()
  if model < 1 or (data < 1 and data != -1):
    raise UserError(f"config.mesh is data={data}, model={model}; expected positive numbers, or data=-1 for all devices")
  if data == -1:
    data = max(devices // model, 1)
  if data * model != devices:
    raise UserError(f"config.mesh asks for data={data} x model={model} = {data * model} devices, there are {devices}; "
                    "set config.mesh.data=-1 or a mesh of that size")
  return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def check_batch(batch: int, mesh: Mesh) -> None:
  shards = mesh.shape["data"]
  if batch < 1 or batch % shards:
    raise UserError(f"config.batch is {batch}, which does not divide over {shards} devices of the mesh's data axis; "
                    f"take {max(batch // shards, 1) * shards} or {(batch // shards + 1) * shards}")


def shardings(tree, rules, mesh: Mesh):
  """Sharding of every leaf: the first rule whose regex is found in the leaf's path decides; none means replicated.

  Args:
    tree: arrays or ShapeDtypeStructs. A path reads like `params/ecg/block0/qkv/kernel`.
    rules: (regex, spec) pairs; spec names a mesh axis or None a dimension, e.g. (None, "model").
  """
  def place(path, leaf):
    name = "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
    for regex, spec in rules:
      if not re.search(regex, name):
        continue
      unknown = [axis for axis in spec if axis is not None and axis not in mesh.shape]
      if unknown or len(spec) > leaf.ndim:
        raise UserError(f"config.sharding rule {regex!r} gives {tuple(spec)} to {name} of shape {leaf.shape}; expected at "
                        f"most {leaf.ndim} entries out of {tuple(mesh.shape)} and None")
      for axis, length in zip(spec, leaf.shape):
        if axis is not None and length % mesh.shape[axis]:
          raise UserError(f"config.sharding rule {regex!r} splits {name} of shape {leaf.shape} over {mesh.shape[axis]} "
                          f"devices of {axis!r}, which does not divide {length}")
      return NamedSharding(mesh, P(*spec))
    return NamedSharding(mesh, P())

  return jax.tree_util.tree_map_with_path(place, tree)


def to_global(batch: dict[str, np.ndarray], mesh: Mesh):
  """This host's rows -> global arrays, rows split over the data axis."""
  sharding = NamedSharding(mesh, P("data"))
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
