"""What a compiled step costs, read off the compiler's own text and tables: collectives, loops,
memory, operations.

Everything is per device unless it says otherwise. Nothing here runs the step.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
# others end in their number of bits: f32, u8, s4
BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "bf16": 16}

# An array of a type, with its layout: f32[8,16]{1,0:T(8,128)S(1)}
ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<=]*)\](?:\{([^}]*)\})?")
COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) (?:\(.*)?\{\s*$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([^\s=]+) = (.+)$")
OPERATION = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
CALLED = re.compile(
  r"(body|condition|to_apply|calls|true_computation|false_computation)=%?([^\s,}]+)"
)
# What stands before the names of operands: types, with their layouts, and comments.
TYPES = re.compile(r"/\*.*?\*/|\[[^\]]*\]|\{[^}]*\}")
CALLED_LIST = re.compile(r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}")


class Collective(NamedTuple):
  """One kind of exchange of one size, `count` times a step.

  bytes: of the whole array that is exchanged, as one device holds it: what an all-gather gives,
    what a reduce-scatter takes, what the others give.
  group: devices that take part in one exchange.
  """

  kind: str
  count: int
  bytes: int
  group: int

  @property
  def sent(self) -> float:
    """Bytes that a device sends at the least, in all: of a ring, whose volume no algorithm beats
    (Patarasuk & Yuan 2009)."""
    share = (self.group - 1) / self.group
    if self.kind == "all-reduce":
      share *= 2
    elif self.kind in ("collective-permute", "collective-broadcast"):
      share = 1.0
    return self.count * self.bytes * share


class Loop(NamedTuple):
  """A loop of the compiled step; trips 0: the compiler does not know how often it runs."""

  name: str
  trips: int


class Instruction(NamedTuple):
  name: str
  result: str  # its type, as in the text
  operation: str
  operands: list[str]  # their names
  rest: str  # operands and attributes


class Array(NamedTuple):
  """An array of the compiled text."""

  dtype: str
  shape: tuple[int, ...]
  layout: str  # minor to major dimensions, tiles, memory: 1,0:T(8,128)S(1)

  @property
  def bytes(self) -> int:
    return self.of_elements(math.prod(self.shape))

  @property
  def padded_bytes(self) -> int:
    """What it takes in memory, where whole tiles lie."""
    order, _, more = self.layout.partition(":")
    minor_to_major = [int(dimension) for dimension in order.split(",") if dimension]
    tile = re.match(r"T\(([\d,]+)\)", more)
    lengths = list(self.shape)
    if tile:
      sides = [int(side) for side in tile[1].split(",")]
      for dimension, side in zip(minor_to_major, reversed(sides)):
        lengths[dimension] = math.ceil(lengths[dimension] / side) * side
    return self.of_elements(math.prod(lengths))

  @property
  def in_hbm(self) -> bool:
    """Not in another memory: S(1), VMEM, or further ones."""
    return re.search(r"S\([1-9]", self.layout) is None

  def of_elements(self, count: int) -> int:
    bits = BITS[self.dtype] if self.dtype in BITS else int(re.search(r"\d+", self.dtype)[0])
    return math.ceil(count * bits / 8)


def arrays_of(text: str) -> list[Array]:
  """The arrays of a type such as `(f32[8,16]{1,0}, bf16[3]{0})`."""
  found = []
  for dtype, lengths, layout in ARRAY.findall(text):
    shape = tuple(int(length.lstrip("<=")) for length in lengths.split(",") if length)
    found.append(Array(dtype, shape, layout))
  return found


def shape_bytes(text: str) -> int:
  """Bytes of all arrays in a type, without padding."""
  return sum(array.bytes for array in arrays_of(text))


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """The computations of a compiled module, name -> instructions, and which one is the entry."""
  modules, entry, here = {}, "", None
  for line in text.splitlines():
    if header := COMPUTATION.match(line):
      here = modules.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif here is not None and (assignment := INSTRUCTION.match(line)):
      name = assignment[1]
      value = assignment[2]
      # The type comes first; it may hold spaces and layouts such as {1,0:T(8,128)}, whose letters
      # are capital.
      if operation := OPERATION.search(value):
        result = value[: operation.start()]
        rest = value[operation.end() :]
        here.append(Instruction(name, result, operation[1], operands_of(rest), rest))
  return modules, entry


def operands_of(rest: str) -> list[str]:
  """Names in `%x, f32[8]{0} %y), attributes`, from behind an operation's opening parenthesis."""
  depth, inside = 1, ""
  for letter in rest:
    depth += (letter in "([{") - (letter in ")]}")
    if depth == 0:
      break
    inside += letter
  names = []
  for operand in re.sub(r"\([^()]*\)", "", TYPES.sub("", inside)).split(","):
    names += [word.lstrip("%") for word in operand.split()[-1:]]
  return names


def executions(
  modules: dict[str, list[Instruction]], entry: str
) -> tuple[dict[str, int], list[Loop]]:
  """How often every computation runs in one step, and the loops. A loop of unknown length counts
  once."""
  times = collections.Counter({entry: 1})
  loops = []
  for name in reversed(modules):  # the text defines what is called before what calls
    for instruction in modules[name]:
      trips = 1
      if instruction.operation == "while":
        known = trip_count(instruction, modules)
        trips = known or 1
        loops.append(Loop(instruction.name, known))
      # they name what their async-start has run
      if instruction.operation in ("async-update", "async-done"):
        continue
      for callee in called_by(instruction.rest):
        if callee in modules:
          times[callee] += times[name] * trips
  return times, loops


def trip_count(loop: Instruction, modules: dict[str, list[Instruction]]) -> int:
  """How often a `while` runs; 0: not known.

  As the compiler says, or else by a condition as JAX writes it, a counter below a constant: it
  starts at 0 and goes up by 1.
  """
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
    return int(known[1])
  condition = modules.get(re.search(r"condition=%?([^\s,}]+)", loop.rest)[1])
  if condition and condition[-1].operation == "compare" and "direction=LT" in condition[-1].rest:
    for instruction in condition:
      if instruction.name == condition[-1].operands[1] and instruction.operation == "constant":
        return int(instruction.operands[0])
  return 0


def called_by(rest: str) -> list[str]:
  """Names of the computations that an instruction calls, by its attributes."""
  names = [callee for _, callee in CALLED.findall(rest)]
  for group in CALLED_LIST.findall(rest):
    names += [callee.strip(" %") for callee in group.split(",")]
  return names


def group_size(rest: str, everyone: int) -> int:
  """Devices of one replica group: `{{0,1},{2,3}}`, `[4,2]<=[8]`, `mesh['a'=4,'b'=2] {'a'}`, the
  last perhaps with device_ids before the axes; everyone where none is given."""
  if first := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
    return first[1].count(",") + 1
  if grid := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
    return int(grid[2])
  if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    # 'a':(2)4 is a part of the axis, of size 4
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part) if part else sizes[name] for name, part in axes)
  return everyone


def read(text: str) -> tuple[list[Collective], list[Loop]]:
  """Collectives and loops of a compiled step's text; what stands in a loop counts as often as it
  runs."""
  modules, entry = computations(text)
  times, loops = executions(modules, entry)
  partitions = re.search(r"num_partitions=(\d+)", text)
  everyone = int(partitions[1]) if partitions else 1
  counts = collections.Counter()
  chains = set()
  for name, instructions in modules.items():
    if times[name]:
      for exchange in exchanges(name, instructions, everyone, chains):
        counts[exchange] += times[name]
  collectives = []
  for (kind, size, group), count in sorted(counts.items()):
    collectives.append(Collective(kind, count, size, group))
  return collectives, loops


def exchanges(
  name: str, instructions: list[Instruction], everyone: int, chains: set[str]
) -> Iterator[tuple[str, int, int]]:
  """(kind, bytes, group) of every exchange in the computation `name`, see Collective.

  Args:
    chains: channels of the chains that were counted, to which those of this computation are added.
      A TPU runs an exchange piece by piece beside the products of a chain of fusions, and each of
      them names it.
  """
  groups = {}  # of what has started, by its name
  for instruction in instructions:
    operation, rest = instruction.operation, instruction.rest
    kind = operation.removesuffix("-start").removesuffix("-done")
    if kind not in KINDS:
      continue
    if "chain_id=" in rest:
      channel = re.search(r"channel_id=(\d+)", rest)[1]
      if channel in chains:
        continue
      chains.add(channel)
    # its type also holds operands; that of its -done is the result alone
    if operation.endswith("-start"):
      groups[instruction.name] = group_size(rest, everyone)
      continue
    if operation.endswith("-done"):
      operand = re.search(r"%?([\w.\-]+)\)", rest)
      group = groups[operand[1]]
    else:
      group = group_size(rest, everyone)
    size = shape_bytes(instruction.result)
    # a TPU's reduce-scatter: a fusion that keeps a slice
    if kind == "all-reduce" and "all-reduce-scatter" in name:
      kind = "reduce-scatter"
    elif kind == "reduce-scatter":
      size *= group
    yield kind, size, group


# --------------------------------------------------------------------------------------------------
# products


def product_flops(text: str) -> int:
  """FLOPs of the matrix products and convolutions that a device computes; 2 a multiply-add.

  What stands in a loop counts as often as it runs, what meets padding or the zeros of a dilation
  counts for nothing. Kernels that the program calls (Pallas, cuDNN) are not seen.
  """
  modules, entry = computations(text)
  times, _ = executions(modules, entry)
  total = 0
  for name, instructions in modules.items():
    scope = {instruction.name: instruction for instruction in instructions}
    for instruction in instructions:
      if instruction.operation == "dot":
        total += times[name] * 2 * dot_products(instruction, scope)
      elif instruction.operation == "convolution":
        total += times[name] * 2 * convolution_products(instruction, scope)
  return total


def dot_products(instruction: Instruction, scope: dict[str, Instruction]) -> int:
  left = arrays_of(scope[instruction.operands[0]].result)[0]
  out = arrays_of(instruction.result)[0]
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
  dimensions = [int(one) for one in contracted[1].split(",") if one] if contracted else []
  return math.prod(out.shape) * math.prod(left.shape[one] for one in dimensions)


def convolution_products(instruction: Instruction, scope: dict[str, Instruction]) -> int:
  """Multiply-adds; a TPU's products of matrices are convolutions too, batches as windows."""
  x, kernel = (arrays_of(scope[name].result)[0] for name in instruction.operands[:2])
  out = arrays_of(instruction.result)[0]
  # b01f_01io->b01f: which dimension is what
  of_x, of_kernel, of_out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest).groups()
  count = kernel.shape[of_kernel.index("i")]
  count *= out.shape[of_out.index("b")] * out.shape[of_out.index("f")]
  for dimension in filter(str.isdigit, of_out):
    place = int(dimension)
    count *= meetings(
      x.shape[of_x.index(dimension)],
      kernel.shape[of_kernel.index(dimension)],
      out.shape[of_out.index(dimension)],
      stride=of_window(instruction.rest, "stride", place, 1),
      low=of_window(instruction.rest, "pad", place, 0),
      dilation=of_window(instruction.rest, "lhs_dilate", place, 1),
      kernel_dilation=of_window(instruction.rest, "rhs_dilate", place, 1),
    )
  return count


def of_window(rest: str, name: str, place: int, default: int) -> int:
  """A number of `window={size=3x3 stride=2x2 pad=0_1x0_1}`: of `name`, along the dimension `place`;
  of the padding that before the input."""
  found = re.search(rf"window={{[^}}]*\b{name}=([^ }}]+)", rest)
  return int(found[1].split("x")[place].split("_")[0]) if found else default


def meetings(
  length: int, size: int, out: int, stride: int, low: int, dilation: int, kernel_dilation: int
) -> int:
  """Pairs of an output and a place of the window, along one dimension, that see an element of the
  input."""
  at = np.arange(out)[:, None] * stride + np.arange(size) * kernel_dilation - low
  seen = (at >= 0) & (at <= (length - 1) * dilation) & (at % dilation == 0)
  return int(seen.sum())


# --------------------------------------------------------------------------------------------------


def by_kind(collectives: list[Collective]) -> dict[str, dict[str, int]]:
  """{kind: count, bytes (of the arrays exchanged), sent (by a device)}."""
  total = {}
  for exchange in collectives:
    kind = total.setdefault(exchange.kind, {"count": 0, "bytes": 0, "sent": 0})
    kind["count"] += exchange.count
    kind["bytes"] += exchange.count * exchange.bytes
    kind["sent"] += int(exchange.sent)
  return total


def memory(compiled) -> dict[str, int]:
  """Bytes in the memory of a device: arguments, output, aliased (output in the place of arguments),
  temporaries, code, total."""
  stats = compiled.memory_analysis()
  parts = {
    "arguments": stats.argument_size_in_bytes,
    "output": stats.output_size_in_bytes,
    "aliased": stats.alias_size_in_bytes,
    "temporaries": stats.temp_size_in_bytes,
    "code": stats.generated_code_size_in_bytes,
  }
  return parts | {"total": sum(parts.values()) - 2 * parts["aliased"]}


def memory_of_buffers(text: str) -> dict[str, int]:
  """`memory`, but for the code, from XLA's buffer assignment: the allocations in a device's own
  memory, `color 0`. Constants count as temporaries."""
  parts = {"arguments": 0, "output": 0, "aliased": 0, "temporaries": 0}
  for size, uses in re.findall(r"^allocation \d+: size (\d+)(.*):$", text, re.MULTILINE):
    if re.search(r", color [1-9]", uses):
      continue
    argument, output = ", parameter " in uses, ", maybe-live-out" in uses
    parts["arguments"] += int(size) if argument else 0
    parts["output"] += int(size) if output else 0
    parts["aliased"] += int(size) if argument and output else 0
    parts["temporaries"] += 0 if argument or output else int(size)
  return parts | {"total": sum(parts.values()) - 2 * parts["aliased"]}


def costs(compiled) -> dict[str, float]:
  """The compiler's FLOPs and bytes read and written; the body of a loop counts once, however often
  it runs."""
  analysis = compiled.cost_analysis()
  return {
    "flops": float(analysis.get("flops", 0)),
    "bytes_accessed": float(analysis.get("bytes accessed", 0)),
  }


def arrays(tree) -> int:
  """Numbers in all arrays (or shapes) of a tree."""
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
