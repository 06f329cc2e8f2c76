"""What a step can be compiled for: slices of TPUs, nodes of GPUs, simulated devices.

v4:AxBxC, v5p:AxBxC, v5e:AxB, v6e:AxB   chips of a TPU slice; 2xv5e:16x16, two such slices
h100:N, h200:N, h100:MxN                one node of N GPUs; M nodes of N
cpu:N                                   simulated devices
"""

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from mmcl_jax.errors import UserError
from mmcl_jax.tools import gpus
from mmcl_jax.training.chips import CHIPS, Chip

# chip -> how libtpu is told whether both cores of a chip are one device
TPUS = {"v4": "megacore", "v5e": "default", "v5p": "megacore", "v6e": "default"}
SLICES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # of v5e and v6e
LARGEST = {"v4": 4096, "v5p": 6144}  # chips of one job
MOST_GROUPS = 64  # slices or nodes
GPUS_A_NODE = 8
FIRST_JAX = (0, 12)  # that compiles for a GPU where there is none


class Target(NamedTuple):
  """What a step is compiled for.

  devices: none of which need exist.
  chip: None: a CPU.
  groups: slices, or nodes of GPUs.
  sides: of a slice's torus; of a node the number of its GPUs.
  """

  topology: str
  devices: list
  chip: Chip | None
  groups: int
  sides: tuple[int, ...]


def find(topology: str) -> Target:
  """The target that --topology names (see the module).

  It must be the first use of JAX's devices in this process: steps are traced with its CPU.

  Raises:
    UserError: there is no such topology, or its compiler is not installed.
  """
  parts = re.fullmatch(r"(?:([1-9]\d?)x)?([a-z]\w*):(\d{1,4}(?:x\d{1,3}){0,2})", topology)
  if not parts:
    raise UserError(unknown(topology))
  name, sides = parts[2], tuple(int(side) for side in parts[3].split("x"))
  groups = int(parts[1] or 1)
  if name in TPUS and is_slice(name, sides) and groups <= MOST_GROUPS:
    return tpu(topology, name, sides, groups)
  if parts[1] is None and name in gpus.NAMES and are_nodes(sides):
    return gpu(topology, name, *(1, *sides)[-2:])
  if parts[1] is None and name == "cpu" and len(sides) == 1 and sides[0] > 0:
    return Target(topology, simulated_devices(topology, sides[0]), None, 1, sides)
  raise UserError(unknown(topology))


def unknown(topology: str) -> str:
  slices = " ".join("x".join(map(str, sides)) for sides in SLICES)
  return (
    f"--topology is {topology!r}; expected v5e: or v6e: with one of {slices}, v4: or v5p: with "
    f"three sides of 1, 2 or multiples of 4 (v5p:8x8x8; up to {LARGEST['v4']:,} and "
    f"{LARGEST['v5p']:,} chips), several such slices (2xv5e:16x16), h100: or h200: with 1 to "
    f"{GPUS_A_NODE} GPUs or nodes x GPUs (h100:4x8), or cpu:N"
  )


def is_slice(name: str, sides: tuple[int, ...]) -> bool:
  if CHIPS[name].dimensions == 2:
    return sides in SLICES
  if len(sides) != 3 or math.prod(sides) > LARGEST[name]:
    return False
  return all(side in (1, 2) or (side and side % 4 == 0) for side in sides)


def are_nodes(sides: tuple[int, ...]) -> bool:
  """Whether sides are (GPUs,) or (nodes, GPUs)."""
  if len(sides) > 2:
    return False
  nodes = math.prod(sides[:-1])
  return 1 <= sides[-1] <= GPUS_A_NODE and 1 <= nodes <= MOST_GROUPS


def simulated_devices(topology: str, count: int) -> list:
  """`count` devices of the CPU, which must be the first that this process asks for."""
  jax.config.update("jax_platforms", "cpu")
  earlier = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{earlier} --xla_force_host_platform_device_count={count}"
  if len(jax.devices()) != count:
    raise UserError(
      f"--topology is {topology}, and this process has {len(jax.devices())} devices already; "
      "compile in a process of its own"
    )
  return jax.devices()


def tpu(topology: str, name: str, sides: tuple[int, ...], slices: int) -> Target:
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      f"--topology={topology} needs the TPU's compiler, libtpu, which is not installed; pip "
      "install 'mmcl-jax[tpu]' (no TPU is needed), or take --topology=cpu:8"
    )
  prepare_libtpu()
  # of the chips of a slice, a host has 2 x 2
  host = []
  for side, most in zip((*sides, 1)[:3], (2, 2, 1)):
    host.append(min(side, most))
  try:
    description = topologies.get_topology_desc(
      platform="tpu",
      topology_name=f"{name}:{'x'.join(map(str, sides))}",
      chip_config_name=TPUS[name],
      chips_per_host_bounds=tuple(host),
      num_slices=slices,
    )
  except Exception as error:  # libtpu has errors of its own for what it does not know
    raise UserError(f"--topology={topology}: libtpu refuses it: {error}") from None
  return Target(topology, description.devices, CHIPS[name], slices, sides)


def prepare_libtpu() -> None:
  """The step is traced with the CPU at hand; libtpu looks for no TPU, locks none, writes no log."""
  jax.config.update("jax_platforms", "cpu")
  # a program is read while it is compiled
  jax.config.update("jax_enable_compilation_cache", False)
  for variable, value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }.items():
    os.environ.setdefault(variable, value)


def gpu(topology: str, name: str, nodes: int, count: int) -> Target:
  """`count` GPUs in each of `nodes` nodes, each node a slice, as JAX sees them in a cluster."""
  plugin = importlib.util.find_spec("jax_cuda13_plugin")
  if plugin is None or jax.__version_info__ < FIRST_JAX:
    found = "" if plugin is None else " and its CUDA plugin"
    raise UserError(
      f"--topology={topology} needs jax {'.'.join(map(str, FIRST_JAX))} or later with its CUDA "
      f"plugin, and here is jax {jax.__version__}{found}; pip install 'mmcl-jax[cuda]' on Python "
      "3.12 or later (no GPU is needed), or take --topology=cpu:8"
    )
  jax.config.update("jax_platforms", "cpu")
  os.environ["XLA_FLAGS"] = f"{gpus.FLAGS} {os.environ.get('XLA_FLAGS', '')}"
  gpus.tell(setattr, gpus.HOPPER)
  description = topologies.get_topology_desc(
    platform="cuda",
    target_config=gpus.description(name),
    topology=f"{nodes}x1x{count}",
  )
  return Target(topology, description.devices, CHIPS[name], nodes, (count,))
