"""Parts that a config chooses by name: losses, evaluators, towers, readers, sources, augmentations.

A part is a function or class, written `"name"` where it is built in and
`"package.module:attribute"` where it is the user's own. A table `{name: "module:attribute"}` lists
the built-in ones; nothing is imported before it is asked for.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from mmcl_jax.errors import UserError


def resolve(fn: str, built_in: Mapping[str, str], where: str) -> Callable:
  """The part that `fn` names.

  Args:
    fn: a name of `built_in`, or "package.module:attribute".
    built_in: name -> "package.module:attribute".
    where: the key or flag that says `fn`, for messages, such as "config.objectives.mae.fn".

  Raises:
    UserError: `fn` is neither, or cannot be imported; the message lists what is built in.
  """
  path = built_in.get(fn, fn) if isinstance(fn, str) else ""
  module, _, attribute = path.partition(":")
  if not module or not attribute:
    raise UserError(
      f"{where} is {fn!r}; expected one of {', '.join(built_in)}, or 'package.module:function'"
    )
  if os.getcwd() not in sys.path:  # where a module of the user's own may be
    sys.path.append(os.getcwd())
  try:
    part = importlib.import_module(module)
    for name in attribute.split("."):
      part = getattr(part, name)
  except (ImportError, AttributeError) as error:
    raise UserError(
      f"{where} is {fn!r}, which cannot be imported ({error}); is its folder the current one, "
      "or on PYTHONPATH?"
    ) from None
  return part


def first_parameter(part: Any) -> str | None:
  """The name of the first parameter of `part`; None where it has none, is a built-in function of
  Python or cannot be called.

  The config of a workdir may come from somebody else: by this name a part is known to have been
  written as one, and nothing else is called.
  """
  try:
    names = list(inspect.signature(part).parameters)
  except (TypeError, ValueError):
    return None
  return names[0] if names else None


def parameters(
  part: Callable, passed: int = 0, without: Collection[str] = ()
) -> list[inspect.Parameter]:
  """What a config may set of `part`: all but the `passed` first and those named in `without`."""
  known = list(inspect.signature(part).parameters.values())[passed:]
  return [parameter for parameter in known if parameter.name not in without]


def check_parameters(
  part: Callable,
  given: Mapping[str, Any],
  where: str,
  fn: str,
  passed: int = 0,
  without: Collection[str] = (),
) -> None:
  """Raises a UserError for a name in `given` that `part` does not take, or one that it lacks.

  Args:
    part: what `resolve` returned.
    given: parameters from the config.
    where: the config's entry, for messages, such as "config.objectives.mae".
    fn: how the config names `part`.
    passed: how many of its first positional arguments the program passes itself.
    without: names of further arguments that the program passes itself.
  """
  known = parameters(part, passed, without)
  if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
    return
  names = [parameter.name for parameter in known]
  unknown = sorted(set(given) - set(names))
  if unknown:
    raise UserError(
      f"{where} sets {', '.join(unknown)}, which {fn} does not take; its parameters are "
      f"{', '.join(names) or 'none'}"
    )
  lacking = [
    parameter.name
    for parameter in known
    if parameter.default is parameter.empty and parameter.name not in given
  ]
  if lacking:
    raise UserError(f"{where} does not set {', '.join(lacking)}, which {fn} needs")
