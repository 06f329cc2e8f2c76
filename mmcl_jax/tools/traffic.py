"""What a compiled step moves through a device's memory, counted in the compiler's text."""

from mmcl_jax.tools.hlo import Instruction, arrays_of, called_by, computations, executions

# What a computation runs as its own instructions; those of a fusion are one.
RUNS = ("while", "conditional", "call", "async-start")
# What only names what lies in memory, or is counted where it starts or in what it runs.
FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "after-all",
  "partition-id",
  "replica-id",
  "opt-barrier",
  "domain",
  "async-update",
  *RUNS,
}
SLICES = ("slice", "dynamic-slice", "gather")


def hbm_bytes(text: str) -> int:
  """Bytes that a compiled step reads from a device's memory and writes to it.

  Every instruction reads its operands and writes its results once, padded to the tiles of their
  layout, unless they lie in VMEM. Of what it only slices it reads the slices, and of what it
  updates in place it writes the update. What stands in a loop counts as often as it runs; all
  branches of a conditional count.
  """
  modules, entry = computations(text)
  times, _ = executions(modules, entry)
  total = 0
  for name in run_by(modules, entry):
    scope = {instruction.name: instruction for instruction in modules[name]}
    moved = 0
    for instruction in modules[name]:
      moved += bytes_read(instruction, scope, modules) + bytes_written(instruction, scope, modules)
    total += times[name] * moved
  return total


def run_by(modules: dict[str, list[Instruction]], entry: str) -> set[str]:
  """The entry and all that it runs by RUNS."""
  found, ahead = set(), [entry]
  while ahead:
    name = ahead.pop()
    if name in found or name not in modules:
      continue
    found.add(name)
    for instruction in modules[name]:
      if instruction.operation in RUNS:
        ahead += called_by(instruction.rest)
  return found


def moves_nothing(instruction: Instruction) -> bool:
  operation = instruction.operation
  return (
    operation in FREE
    or operation.endswith("-done")
    or 'custom_call_target="AllocateBuffer"' in instruction.rest
  )


def bytes_read(instruction: Instruction, scope: dict[str, Instruction], modules) -> int:
  """Bytes of its operands, which `scope` names, that an instruction reads from HBM."""
  operation = instruction.operation
  # the type of a copy-start holds the source too, that of another start (all-gather) its operand
  started = operation.endswith("-start") and operation != "all-reduce-start"
  if started or moves_nothing(instruction):
    return 0
  total = 0
  for i, name in enumerate(instruction.operands):
    if name not in scope:
      continue
    whole = 0
    for array in arrays_of(scope[name].result):
      whole += array.padded_bytes if array.in_hbm else 0
    part = part_read(instruction, i, modules)
    total += whole if part is None else min(whole, part)
  return total


def part_read(instruction: Instruction, i: int, modules) -> int | None:
  """Bytes of its i-th operand that an instruction looks at; None: all."""
  if instruction.operation in SLICES and i == 0:
    return sum(array.padded_bytes for array in arrays_of(instruction.result))
  if instruction.operation == "dynamic-update-slice" and i == 0:
    return 0
  if instruction.operation == "fusion":
    body = modules[called_by(instruction.rest)[0]]
    for inner in body:
      if inner.operation == "parameter" and inner.operands == [str(i)]:
        return part_used(inner.name, body, modules)
  return None


def part_used(name: str, body: list[Instruction], modules) -> int | None:
  """Bytes of `name` that the body of a fusion looks at; None: all."""
  if name == body[-1].name:  # it is the result
    return None
  total = 0
  for user in body:
    for i, operand in enumerate(user.operands):
      if operand != name or user.operation == "parameter":
        continue
      if user.operation == "bitcast":
        part = part_used(user.name, body, modules)
      else:
        part = part_read(user, i, modules)
      if part is None:
        return None
      total += part
  return total


def bytes_written(instruction: Instruction, scope: dict[str, Instruction], modules) -> int:
  """Bytes that an instruction writes to HBM."""
  if moves_nothing(instruction):
    return 0
  made_by, inner = [instruction], scope
  if instruction.operation == "fusion":
    body = modules[called_by(instruction.rest)[0]]
    inner = {one.name: one for one in body}
    made_by = [body[-1]]
    if body[-1].operation == "tuple":
      made_by = [inner[name] for name in body[-1].operands]
  total = 0
  for i, array in enumerate(arrays_of(instruction.result)):
    if array.in_hbm:
      part = part_written(made_by[i], inner) if i < len(made_by) else None
      total += array.padded_bytes if part is None else min(array.padded_bytes, part)
  return total


def part_written(instruction: Instruction, scope: dict[str, Instruction]) -> int | None:
  """Bytes of an update in place; None: the instruction writes all of its result."""
  while instruction.operation == "bitcast" and instruction.operands[0] in scope:
    instruction = scope[instruction.operands[0]]
  if instruction.operation != "dynamic-update-slice":
    return None
  update = scope[instruction.operands[1]]
  return sum(array.padded_bytes for array in arrays_of(update.result))
