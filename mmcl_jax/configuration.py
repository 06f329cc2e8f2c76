"""Configs: reading a recipe with its overrides, keeping it beside the run, holding a later run to it."""

import json
import os
import pathlib
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from mmcl_jax.errors import UserError

# What a later run in the same workdir may change: none of it alters the numbers beyond float rounding.
FREE = ("mesh", "sharding", "loader", "every", "keep")


def parse_arg(arg: str | None, **defaults) -> ConfigDict:
  """`get_config`'s argument, such as `demo`, `base` or `size=base,batch=1024`, over typed defaults.

  A bare word sets `size`. Unknown names and values of another type are errors.
  """
  config = ConfigDict(defaults)
  for part in filter(None, (arg or "").split(",")):
    name, _, value = part.rpartition("=")
    name = name or "size"
    if name not in defaults:
      raise UserError(f"the config's argument sets {name!r}; it takes {', '.join(defaults)}")
    try:
      config[name] = type(defaults[name])(value)
    except ValueError:
      raise UserError(f"the config's argument sets {name}={value!r}; expected {type(defaults[name]).__name__}") from None
  return config


def from_flags(program: str, usage: str, argv: list[str], required: dict[str, str]) -> tuple[ConfigDict, flags.FlagValues]:
  """Reads `--config=FILE[:ARG]`, `--config.x.y=value` and the `required` flags (name -> help)."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "recipe, FILE.py[:ARGUMENT]; --config.x.y=V overrides",
                                  lock_config=True, flag_values=values, sys_argv=[program, *argv])
  for name, text in required.items():
    flags.DEFINE_string(name, None, text, flag_values=values)
  if "--help" in argv or "-h" in argv:
    print(f"{usage}\n\nflags:\n  --config=FILE.py[:ARGUMENT]  recipe; --config.x.y=VALUE overrides one of its values")
    print("\n".join(f"  --{name}=...  {text}" for name, text in required.items()))
    raise SystemExit(0)
  try:
    rest = values([program, *argv])[1:]
    config = values.config
  except UserError:
    raise
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
    raise UserError(f"{error} (see {program} --help)") from None
  missing = [name for name in ("config", *required) if getattr(values, name) is None]
  if missing or rest:
    raise UserError(f"{'missing --' + ', --'.join(missing) if missing else f'unexpected {rest}'}; {usage}")
  return config, values


def check_workdir(config: ConfigDict, workdir: str) -> None:
  """A workdir belongs to one config: raises a UserError where another one is kept there."""
  file = pathlib.Path(workdir) / "config.json"
  if not file.is_file():
    if any(pathlib.Path(workdir).glob("checkpoints/*")):
      raise UserError(f"{workdir} has checkpoints but no config.json, so it is not a whole workdir; take another --workdir")
    return
  kept, now = flatten(load(workdir).to_dict()), flatten(json.loads(config.to_json()))
  differing = [f"{key} was {kept.get(key)!r}, now {now.get(key)!r}" for key in sorted(kept.keys() | now.keys())
               if kept.get(key) != now.get(key) and key.split(".")[0] not in FREE
               and (key in kept or now[key])]  # a key that came with a later version, and is off, changes nothing
  if differing:
    raise UserError(f"{workdir} belongs to another config: {'; '.join(differing[:4])}"
                    f"{f' and {len(differing) - 4} more' if len(differing) > 4 else ''}; take another --workdir, or change only "
                    f"{', '.join(name + '.*' for name in FREE)}")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(tree, dict) or not tree:
    return {prefix.rstrip("."): tree}
  return {k: v for name, x in tree.items() for k, v in flatten(x, f"{prefix}{name}.").items()}


def save(config: ConfigDict, workdir: str) -> None:
  folder = pathlib.Path(workdir)
  partial = folder / f"config.json.partial-{os.getpid()}"
  partial.write_text(json.dumps(json.loads(config.to_json()), indent=1) + "\n")
  partial.rename(folder / "config.json")


def load(workdir: str) -> ConfigDict:
  """The config of a workdir."""
  file = pathlib.Path(workdir) / "config.json"
  if not file.is_file():
    raise UserError(f"{workdir} holds no config.json; expected the --workdir of an `mmcl train` run")
  try:
    return ConfigDict(json.loads(file.read_text()))
  except (ValueError, TypeError) as error:
    raise UserError(f"{file} is not readable as JSON ({error}); restore it, or train again in another workdir") from None
