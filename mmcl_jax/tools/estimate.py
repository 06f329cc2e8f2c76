"""The least time of a compiled step, from the published peaks of what it is compiled for."""

import math
from typing import NamedTuple

from mmcl_jax.tools.hlo import Collective
from mmcl_jax.training.chips import Chip


class Latency(NamedTuple):
  """Seconds that an exchange takes however little it sends."""

  start: float
  hop: float  # from chip to chip of one slice, or of one node
  between: float  # from slice to slice, or from node to node


# TPU: about 1 us a hop (Austin et al. 2025, "How to Scale Your Model", "Sharded Matrices"); between
# slices an assumption.
TORUS = Latency(0.0, 1e-6, 10e-6)
# GPU: NCCL's own model of small messages (src/graph/tuning.cc, protocol LL): starting a ring, a hop
# of it over NVLink, a hop of a tree over the network.
SWITCH = Latency(6.6e-6, 0.6e-6, 5e-6)


class Network(NamedTuple):
  """How the chips of a step are joined.

  groups: slices, or nodes of GPUs; the slower network joins them.
  sides: of a slice's torus; of a node the number of its GPUs.
  model: devices of the mesh's model axis, which are neighbours in one group.
  """

  groups: int
  sides: tuple[int, ...]
  model: int


def estimate(
  chip: Chip,
  network: Network,
  flops: float,
  hbm_bytes: float,
  matmul_flops: float,
  collectives: list[Collective],
) -> dict:
  """Bounds from the published peaks: no step is faster than the slowest of compute, memory and
  network, each by itself.

  Args:
    flops: of the compiled step's products; what it calls as a kernel is not in them.
    matmul_flops: of the step as written, a device's share.

  Returns:
    compute_s, memory_s, network_s; step_s, the largest of them, and its name limited_by; mfu_bound,
    which is matmul_flops against the peak in step_s; and latency_s, what the hops of all exchanges
    take one after the other. That is not in step_s, since exchanges may overlap with other work.
  """
  seconds = {
    "compute": max(flops, matmul_flops) / chip.flops,
    "memory": hbm_bytes / chip.hbm,
    "network": sum(exchange_seconds(chip, network, one) for one in collectives),
  }
  slowest = max(seconds, key=seconds.get)
  return {f"{name}_s": value for name, value in seconds.items()} | {
    "latency_s": sum(one.count * latency(chip, network, one) for one in collectives),
    "step_s": seconds[slowest],
    "limited_by": slowest,
    "mfu_bound": matmul_flops / chip.flops / seconds[slowest],
  }


def groups_of(network: Network, collective: Collective) -> int:
  """Slices or nodes that one exchange spans: all, unless it is of as many devices as the model axis
  or one group has (XLA may divide what all exchange into such stages)."""
  each = math.prod(network.sides)
  of_all = (each * network.groups, each * network.groups // network.model)
  of_one = (network.model, each, each // network.model)
  if collective.group not in of_all and collective.group in of_one:
    return 1
  return network.groups if collective.group % network.groups == 0 else 1


def exchange_seconds(chip: Chip, network: Network, collective: Collective) -> float:
  """Least seconds of all exchanges of one kind and size, by what a device sends.

  Over several groups it goes in two stages: within each, then between devices of the same place in
  all groups, each with its share. What a neighbour sends to the next group it sends whole.
  """
  groups = groups_of(network, collective)
  if groups == 1:
    return collective.sent / chip.network
  each = collective.count * collective.bytes
  if collective.kind in ("collective-permute", "collective-broadcast"):
    return each / chip.network_between
  size = collective.group
  within = each * (size // groups - 1) * groups / size
  between = each * (groups - 1) / size
  if collective.kind == "all-reduce":
    within, between = 2 * within, 2 * between
  elif collective.kind.endswith("all-to-all"):  # every part has a place of its own to go to
    within, between = within / groups, between * size / groups
  return within / chip.network + between / chip.network_between


def latency(chip: Chip, network: Network, collective: Collective) -> float:
  """Seconds of one exchange that sends next to nothing, by its hops, one after the other."""
  if collective.group == 1:
    return 0.0
  of = TORUS if chip.dimensions else SWITCH
  if collective.kind in ("collective-permute", "collective-broadcast"):
    return of.start + (of.between if network.groups > 1 else of.hop)
  groups = groups_of(network, collective)
  sides = network.sides
  if collective.group == network.model > 1:
    sides = (network.model,)
  elif collective.group == groups:  # one device of each
    sides = ()
  hops = sum(farthest(chip, side) for side in sides)
  between = math.ceil(math.log2(groups))
  turns = 2 if collective.kind == "all-reduce" else 1  # gathers the sum, then spreads it
  return of.start + turns * (hops * of.hop + between * of.between)


def farthest(chip: Chip, side: int) -> int:
  """Hops to the farthest chip of a dimension.

  Half way round where the dimension is a ring: sides that are multiples of 4 on v4 and v5p, of 16
  on v5e and v6e (Cloud TPU documentation, "TPU configurations"). GPUs pass on in a ring of NCCL's,
  one way.
  """
  closed = {2: side == 16, 3: side % 4 == 0}.get(chip.dimensions, False)
  return side // 2 if closed else side - 1
