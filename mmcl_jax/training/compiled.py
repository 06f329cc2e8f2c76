"""What a compiled step costs, read off the compiler's own text and tables: collectives, loops,
memory, operations.

Everything is per device unless it says otherwise. Nothing here runs the step.
"""

import collections
import math
import re
from typing import NamedTuple

import jax
import numpy as np
from jax.interpreters import partial_eval

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
    once = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}.get(
      self.kind, share
    )
    return self.count * self.bytes * once


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
    bits = BITS.get(dtype) if dtype in BITS else int(re.search(r"\d+", dtype)[0])
    total += -(-math.prod(int(n.lstrip("<=")) for n in shape.split(",") if n) * bits // 8)
  return total


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """The computations of a compiled module, name -> instructions, and which one is the entry."""
  found, entry, here = {}, "", None
  for line in text.splitlines():
    if header := COMPUTATION.match(line):
      here = found.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif here is not None and (one := INSTRUCTION.match(line)):
      # The type comes first; it may hold spaces and layouts such as {1,0:T(8,128)}, whose letters
      # are capital.
      operation = OPERATION.search(one[2])
      if operation:
        here.append(
          Instruction(one[1], one[2][: operation.start()], operation[1], one[2][operation.end() :])
        )
  return found, entry


def executions(
  modules: dict[str, list[Instruction]], entry: str
) -> tuple[dict[str, int], list[Loop]]:
  """How often every computation runs in one step, and the loops. A loop of unknown length counts
  once."""
  times, loops = collections.Counter({entry: 1}), []
  for name in reversed(modules):  # the text defines what is called before what calls
    for one in modules[name]:
      trips = 1
      if one.operation == "while":
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.rest)
        trips = int(known[1]) if known else 1
        loops.append(Loop(one.name, trips if known else 0))
      # they name what their async-start has run
      if one.operation in ("async-update", "async-done"):
        continue
      called = [callee for _, callee in CALLED.findall(one.rest)]
      called += [
        callee.strip(" %") for group in CALLED_LIST.findall(one.rest) for callee in group.split(",")
      ]
      for callee in called:
        if callee in modules:
          times[callee] += times[name] * trips
  return times, loops


def group_size(rest: str, everyone: int) -> int:
  """Devices of one replica group: `{{0,1},{2,3}}`, `[4,2]<=[8]`, `mesh['a'=4,'b'=2] {'a'}`, the
  last perhaps with device_ids before the axes; everyone where none is given."""
  if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
    return found[1].count(",") + 1
  if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
    return int(found[2])
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    # 'a':(2)4 is a part of the axis, of size 4
    parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
    return math.prod(int(part) if part else sizes[name] for name, part in parts)
  return everyone


def read(text: str) -> tuple[list[Collective], list[Loop]]:
  """Collectives and loops of a compiled step's text; what stands in a loop counts as often as it
  runs."""
  modules, entry = computations(text)
  times, loops = executions(modules, entry)
  partitions = re.search(r"num_partitions=(\d+)", text)
  everyone, counts = int(partitions[1]) if partitions else 1, collections.Counter()
  for name, instructions in modules.items():
    started = {}
    for one in instructions:
      kind = one.operation.removesuffix("-start").removesuffix("-done")
      if kind not in KINDS or not times[name]:
        continue
      # its type also holds operands; that of its -done is the result alone
      if one.operation.endswith("-start"):
        started[one.name] = group_size(one.rest, everyone)
        continue
      operand = re.search(r"%?([\w.\-]+)\)", one.rest)
      group = (
        started[operand[1]] if one.operation.endswith("-done") else group_size(one.rest, everyone)
      )
      size = shape_bytes(one.result)
      # a TPU's reduce-scatter: a fusion that keeps a slice
      if kind == "all-reduce" and "all-reduce-scatter" in name:
        kind = "reduce-scatter"
      elif kind == "reduce-scatter":
        size *= group
      counts[kind, size, group] += times[name]
  return [
    Collective(kind, count, size, group) for (kind, size, group), count in sorted(counts.items())
  ], loops


def by_kind(found: list[Collective]) -> dict[str, dict[str, int]]:
  """{kind: count, bytes (of the arrays exchanged), sent (by a device)}."""
  total = {}
  for one in found:
    kind = total.setdefault(one.kind, {"count": 0, "bytes": 0, "sent": 0})
    kind["count"] += one.count
    kind["bytes"] += one.count * one.bytes
    kind["sent"] += int(one.sent)
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
  found = compiled.cost_analysis()
  return {
    "flops": float(found.get("flops", 0)),
    "bytes_accessed": float(found.get("bytes accessed", 0)),
  }


def matmul_flops(jaxpr) -> int:
  """FLOPs of the matrix products and convolutions of a traced step, in all devices together; 2 a
  multiply-add.

  Unlike the compiler's count it is of the step as written: loops count as often as they run,
  nothing that is computed twice because it is not split. What no output needs counts for nothing;
  what remat computes again counts again. A `while` of unknown length counts once.

  Args:
    jaxpr: `jax.jit(step).trace(...).jaxpr`.
  """
  needed, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
  return flops_of(needed)


def flops_of(jaxpr) -> int:
  """matmul_flops of all that stands in a jaxpr."""
  total = 0
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      total += (
        2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
      )
    elif name == "conv_general_dilated":
      kernel, numbers = eqn.invars[1].aval, params["dimension_numbers"]
      # multiply-adds of one output; in groups already divided
      taps = kernel.size // kernel.shape[numbers.rhs_spec[0]]
      # dilation puts zeros in between
      total += 2 * eqn.outvars[0].aval.size * taps // math.prod(params["lhs_dilation"])
    else:
      inner = [flops_of(sub) for value in params.values() for sub in subjaxprs(value)]
      if name == "scan":
        total += params["length"] * sum(inner)
      elif name == "shard_map":
        # newly_manual_axes in jax 0.10
        axes = next(found for key, found in params.items() if key.endswith("manual_axes"))
        total += math.prod(params["mesh"].shape[axis] for axis in axes) * sum(inner)
      else:
        total += max(inner, default=0) if name == "cond" else sum(inner)
  return total


def subjaxprs(value) -> list:
  values = value if isinstance(value, (tuple, list)) else [value]
  return [x for x in values if hasattr(getattr(x, "jaxpr", x), "eqns")]


def arrays(tree) -> int:
  """Numbers in all arrays (or shapes) of a tree."""
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
