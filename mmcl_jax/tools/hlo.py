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
BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128, "bf16": 16}

COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{\s*$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([^\s=]+) = (.+)$")
OPERATION = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
CALLED = re.compile(
  r"(body|condition|to_apply|calls|true_computation|false_computation)=%?([^\s,}]+)"
)
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
  rest: str  # operands and attributes


def shape_bytes(text: str) -> int:
  """Bytes of all arrays in a type such as `(f32[8,16]{1,0}, bf16[3]{0})`."""
  total = 0
  for dtype, shape in re.findall(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<=]*)\]", text):
    bits = BITS[dtype] if dtype in BITS else int(re.search(r"\d+", dtype)[0])
    elements = math.prod(int(length.lstrip("<=")) for length in shape.split(",") if length)
    total += math.ceil(elements * bits / 8)
  return total


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
        here.append(Instruction(name, result, operation[1], rest))
  return modules, entry


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
        count = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
        trips = int(count[1]) if count else 1
        loops.append(Loop(instruction.name, trips if count else 0))
      # they name what their async-start has run
      if instruction.operation in ("async-update", "async-done"):
        continue
      for callee in called_by(instruction.rest):
        if callee in modules:
          times[callee] += times[name] * trips
  return times, loops


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
  for name, instructions in modules.items():
    if times[name]:
      for exchange in exchanges(name, instructions, everyone):
        counts[exchange] += times[name]
  collectives = []
  for (kind, size, group), count in sorted(counts.items()):
    collectives.append(Collective(kind, count, size, group))
  return collectives, loops


def exchanges(
  name: str, instructions: list[Instruction], everyone: int
) -> Iterator[tuple[str, int, int]]:
  """(kind, bytes, group) of every exchange in the computation `name`, see Collective."""
  groups = {}  # of what has started, by its name
  for instruction in instructions:
    operation, rest = instruction.operation, instruction.rest
    kind = operation.removesuffix("-start").removesuffix("-done")
    if kind not in KINDS:
      continue
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
