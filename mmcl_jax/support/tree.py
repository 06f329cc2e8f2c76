"""Nested dicts as flat ones, and back."""

from typing import Any


def flatten(tree: dict[str, Any], separator: str = ".") -> dict[str, Any]:
  """{"a": {"b": 1}} -> {"a.b": 1}; an empty dict is a leaf."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict) and value:
      for path, leaf in flatten(value, separator).items():
        flat[f"{name}{separator}{path}"] = leaf
    else:
      flat[name] = value
  return flat


def flatten_variables(variables: dict[str, Any]) -> dict[tuple[str, str], Any]:
  """{(collection, path): leaf} of a Flax model's params and batch_stats; "/" joins a path."""
  flat = {}
  for collection in ("params", "batch_stats"):
    for path, leaf in flatten(variables.get(collection, {}), "/").items():
      flat[collection, path] = leaf
  return flat


def unflatten_variables(flat: dict[tuple[str, str], Any]) -> dict[str, Any]:
  """The other way round."""
  variables = {"params": {}, "batch_stats": {}}
  for (collection, path), leaf in flat.items():
    node = variables[collection]
    *parents, last = path.split("/")
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return variables
