"""JSON against a type: what a file holds is looked at before a program stumbles over it."""

import types
from typing import Any, NotRequired, get_args, get_origin, get_type_hints, is_typeddict


def fits(value, kind) -> bool:
  """Is a value of JSON of this type?

  Args:
    kind: str, int, float (which takes whole numbers, too), bool, None, Any, list[X], dict[str, X],
      X | Y, or a TypedDict. A bool is no number.
  """
  if kind is Any:
    return True
  if is_typeddict(kind):
    return isinstance(value, dict) and not wrong_entries(value, kind)
  origin = get_origin(kind)
  args = get_args(kind)
  if origin is types.UnionType:
    return any(fits(value, arg) for arg in args)
  if origin is list:
    (of_items,) = args
    return isinstance(value, list) and all(fits(item, of_items) for item in value)
  if origin is dict:
    _, of_values = args
    return isinstance(value, dict) and all(fits(entry, of_values) for entry in value.values())
  if kind is None or kind is types.NoneType:
    return value is None
  if kind in (int, float) and isinstance(value, bool):
    return False
  if kind is float:
    return isinstance(value, (int, float))
  return isinstance(value, kind)


def wrong_entries(content: dict[str, Any], kind) -> list[str]:
  """The names of the entries of a TypedDict that `content` lacks or that are of another type; more
  entries may be there."""
  wrong = []
  for name, hint in get_type_hints(kind, include_extras=True).items():
    required = get_origin(hint) is not NotRequired
    expected = hint if required else get_args(hint)[0]
    if name not in content:
      if required:
        wrong.append(name)
    elif not fits(content[name], expected):
      wrong.append(name)
  return wrong
