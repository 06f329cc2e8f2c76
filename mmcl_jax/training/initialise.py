"""A stage that starts from earlier ones: modules taken from their checkpoints, every parameter
accounted for."""

import collections
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.interpolate import CubicSpline

from mmcl_jax import models
from mmcl_jax.data import schema
from mmcl_jax.errors import UserError
from mmcl_jax.models import towers, vit
from mmcl_jax.support.tree import flatten_variables
from mmcl_jax.training import state as state_lib

FRESH = "fresh"
# ECG towers whose `size` says how many attention heads they have
WITH_HEADS = ("ecg_vit", "st_mem")
Key = tuple[str, str]  # of a leaf: its collection, params or batch_stats, and its path


class Report(NamedTuple):
  """Where everything came from. Paths are those of this model; batch statistics stand under
  `batch_stats/`.

  origin: path of every parameter and statistic -> "loaded from W...", "fresh", "fresh
  (config.init_except)", ...
  shapes: path -> shape, of the same.
  left_over: path -> what an earlier stage has there and this one does not take.
  """

  origin: dict[str, str]
  shapes: dict[str, tuple[int, ...]]
  left_over: dict[str, str]


def load_pretrained(
  state: state_lib.TrainState, config, load: Callable[[str], dict[str, Any]]
) -> tuple[state_lib.TrainState, Report]:
  """Loads the modules that `config.init_from` names from the workdirs it gives; the optimiser
  starts fresh.

  A module is a top-level name of the parameters (`ecg`, `cmr_ed`, `head_ecg`); a workdir's only CMR
  tower serves for any CMR tower. `ecg/pos_embed` of another length is interpolated
  (`resize_positions`).

  Args:
    state: a fresh state; its dtypes and shardings stay.
    load: workdir -> {"params", "batch_stats"} of its best or last checkpoint, host arrays, and its
      "config".

  Returns:
    state, Report.

  Raises:
    UserError: a parameter or statistic that has no counterpart of its shape and that no regex of
      `config.init_except` names (all of them are listed), a module or regex that matches nothing,
      regexes but no workdir, a tower of another view under another name, or random weights in a
        frozen tower.
  """
  target = flatten_variables({"params": state.params, "batch_stats": state.statistics})
  wanted = {module: workdir for module, workdir in config.init_from.items() if workdir}
  excepted = state_lib.regexes(config.init_except, "config.init_except")
  check_wanted(config, wanted, excepted, modules_of(target))
  stages, loaded = {}, {}
  for workdir in dict.fromkeys(wanted.values()):
    stages[workdir] = load(workdir)
    loaded[workdir] = flatten_variables(stages[workdir])

  transfer = Transfer({}, dict.fromkeys(target, FRESH), {}, [])
  paths = set()
  for module, workdir in wanted.items():
    source, where = module_of(loaded[workdir], module, workdir)
    where += difference(config, stages[workdir]["config"], module, where, workdir)
    here = {key: leaf for key, leaf in target.items() if top(key) == module}
    take_module(transfer, source, here, where, excepted)
    if module == "ecg":
      transfer.troubles.extend(other_heads(transfer, config, stages[workdir]["config"], where))
    paths |= {path for _, path in source.keys() | here.keys()}
  if transfer.troubles:
    raise UserError(
      f"config.init_from: {'; '.join(transfer.troubles)}. Make the configs agree, or name in "
      "config.init_except, by regex, what shall be left behind there and start fresh here"
    )
  check_excepted(excepted, paths, wanted)
  origin = transfer.origin
  check_frozen(config, origin)
  note_frozen(config, state.params, origin)
  state = state.replace(
    params=replaced(state.params, "params", transfer.new),
    statistics=replaced(state.statistics, "batch_stats", transfer.new),
  )
  shapes = {label(key): leaf.shape for key, leaf in target.items()}
  origins = {label(key): text for key, text in origin.items()}
  return state, Report(origins, shapes, transfer.left_over)


class Transfer(NamedTuple):
  """What is taken over so far.

  Attributes:
    new: leaf -> array that it is set to.
    origin: leaf of this model -> where it comes from, as of Report.
    left_over: as of Report.
    troubles: what stands against it.
  """

  new: dict[Key, np.ndarray]
  origin: dict[Key, str]
  left_over: dict[str, str]
  troubles: list[str]


def take_module(transfer: Transfer, source, here, where: str, excepted) -> None:
  """Takes the leaves of a module from an earlier stage, and keeps account of them in `transfer`.

  Args:
    source, here: leaves of the module in the earlier stage, `where`, and in this model.
    excepted: regexes of config.init_except.
  """
  for key in sorted(source.keys() | here.keys()):
    _, path = key
    if any(re.search(regex, path) for regex in excepted):
      if key in here:
        transfer.origin[key] = f"{FRESH} (config.init_except)"
      if key in source:
        transfer.left_over[label(key)] = f"{source[key].shape} in {where}"
      continue
    trouble = mismatch(key, source, here, where)
    if trouble:
      transfer.troubles.append(trouble)
      continue
    transfer.new[key], how = fitted(source[key], here[key].shape)
    transfer.origin[key] = f"loaded from {where}{how}"


def check_wanted(config, wanted: dict[str, str], excepted, modules: list[str]) -> None:
  unknown = [module for module in wanted if module not in modules]
  if unknown:
    raise UserError(
      f"config.init_from names {', '.join(unknown)}; this model has the modules "
      f"{', '.join(modules)}"
    )
  if excepted and not wanted:
    raise UserError(
      f"config.init_except is {excepted}, so this recipe goes on from an earlier stage, and "
      f"config.init_from ({', '.join(config.init_from)}) names none; give its workdir, such as "
      "--config.init_from.ecg=W, or set init_except=() to start from nothing"
    )


def check_excepted(excepted, paths: set[str], wanted: dict[str, str]) -> None:
  """Every regex of config.init_except must match one of the `paths`, of this model's modules or the
  earlier stages'."""
  for regex in excepted:
    if not any(re.search(regex, path) for path in paths):
      workdirs = dict.fromkeys(wanted.values())
      raise UserError(
        f"config.init_except has {regex!r}, which matches no parameter of {', '.join(wanted)}, "
        f"neither here nor in {', '.join(workdirs)}; correct or remove it"
      )


def mismatch(key: Key, source, here, where: str) -> str | None:
  """Why a leaf cannot be taken over, or None.

  Args:
    source, here: leaves of the module in the earlier stage, `where`, and in this model.
  """
  if key not in here:
    return f"{label(key)} {source[key].shape} of {where} is not in this model"
  if key not in source:
    return f"{label(key)} {here[key].shape} is not in {where}"
  old = source[key].shape
  new = here[key].shape
  positions = key == ("params", "ecg/pos_embed")
  if old == new or (positions and resizable(old, new)):
    return None
  note = ""
  if positions:
    note = f" (expected 1 + {len(schema.LEADS)} n positions, n > 1, of one width)"
  return f"{label(key)} is {old} in {where} and {new} here{note}"


def fitted(leaf: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
  """A leaf of an earlier stage in the shape that this model has, and how it was changed, ""
  where it was not. Only positions of another length are."""
  if leaf.shape == shape:
    return leaf, ""
  before = columns(leaf.shape)
  after = columns(shape)
  how = f", interpolated from {before} to {after} columns a lead"
  return resize_positions(leaf, shape[1]), how


def replaced(tree, collection: str, new: dict[Key, np.ndarray]):
  """The tree with the leaves of `new`, in its dtypes and shardings."""

  def leaf(path, old):
    key = collection, state_lib.path_name(path)
    if key not in new:
      return old
    # A copy of its own: the step donates its buffers, and two modules may come from one array.
    return jax.device_put(np.array(new[key], old.dtype), old.sharding)

  return jax.tree_util.tree_map_with_path(leaf, tree)


def describe(report: Report) -> str:
  """A line for every module and origin, with counts and sizes, and one for what was left behind."""
  groups = collections.defaultdict(list)
  for path, origin in report.origin.items():
    groups[path.removeprefix("batch_stats/").split("/")[0], origin].append(path)

  lines = []
  for (module, origin), paths in sorted(groups.items()):
    size = sum(int(np.prod(report.shapes[path])) for path in paths)
    lines.append(f"{module}: {len(paths)} arrays of {size:,} numbers {origin}")
  if report.left_over:
    left_behind = [f"{path} {text}" for path, text in sorted(report.left_over.items())]
    lines.append(f"left behind: {', '.join(left_behind)}")
  return "\n".join(lines)


def label(key: Key) -> str:
  collection, path = key
  return path if collection == "params" else f"{collection}/{path}"


def modules_of(leaves) -> list[str]:
  """The modules that some leaves belong to, sorted."""
  return sorted({top(key) for key in leaves})


def top(key: Key) -> str:
  """The module that a leaf belongs to."""
  _, path = key
  return path.split("/")[0]


def module_of(source, module: str, workdir: str):
  """The module's leaves under this model's name for it, and how to call where they lie."""
  modules = modules_of(source)
  cmr_towers = [name for name in modules if name.startswith("cmr_")]
  name, where = module, workdir  # in the earlier stage
  if module not in modules and module.startswith("cmr_") and len(cmr_towers) == 1:
    (name,) = cmr_towers
    where = f"{workdir} ({name})"
  if name not in modules:
    raise UserError(
      f"config.init_from.{module} is {workdir}, which has no {module}; it has {', '.join(modules)}"
    )
  leaves = {}
  for key, leaf in source.items():
    collection, path = key
    if top(key) == name:
      leaves[collection, module + path.removeprefix(name)] = np.asarray(leaf)
  return leaves, where


def difference(config, earlier, module: str, where: str, workdir: str) -> str:
  """What an encoder looked at in the earlier stage, where that is something else than here; ""
  where it is the same."""
  profile_before = earlier.data.ecg_profile
  profile = config.data.ecg_profile
  if module == "ecg" and profile_before != profile:
    return f" (whose ECGs had the profile {profile_before}, these have {profile})"
  if not module.startswith("cmr_"):
    return ""
  name = module.removeprefix("cmr_")
  there = name if where == workdir else next(iter(towers.cmr(earlier.model)))
  before = earlier.model.towers[there].view
  here = config.model.towers[name].view
  if before == here:
    return ""
  if where != workdir:
    raise UserError(
      f"config.init_from.{module} is {where}, a tower that looked at {before}, this one looks at "
      f"{here}; give the workdir of a tower of that view, or call the tower there {name}"
    )
  return f" (which looked at {before}, here at {here})"


def other_heads(transfer: Transfer, config, earlier, where: str) -> list[str]:
  """What is taken of the ECG encoder and has other attention heads here than in the earlier stage,
  and so other columns of queries, keys and values (vit.split_qkv)."""
  spec, before = (one.model.towers.get("ecg", {}) for one in (config, earlier))
  if not {spec.get("fn"), before.get("fn")} <= set(WITH_HEADS):
    return []
  troubles = []
  for key in transfer.new:
    path = label(key)
    _, _, within = path.partition("/")
    if not re.fullmatch(r"ecg/.*\bqkv/kernel", path):
      continue
    there, here = vit.heads_of(within, before), vit.heads_of(within, spec)
    if there != here:
      troubles.append(f"{path} has {there} attention heads in {where} and {here} here")
  return troubles


def columns(shape) -> int:
  """Patches a lead of ecg/pos_embed [1, 1 + L n, D]."""
  return (shape[1] - 1) // len(schema.LEADS)


def resizable(old, new) -> bool:
  """Are both [1, 1 + L n, D] with one D, whole rows of L leads, and n of at least 2?"""
  if not len(old) == len(new) == 3:
    return False
  for shape in (old, new):
    patches = shape[1] - 1
    if patches % len(schema.LEADS) or columns(shape) < 2:
      return False
  return (old[0], old[2]) == (new[0], new[2])


def resize_positions(positions: np.ndarray, tokens: int) -> np.ndarray:
  """Position embeddings [1, 1 + L n, D] -> [1, tokens, D], interpolated along time within the row
  of each lead.

  A cubic spline (not-a-knot) through the n columns of a row, read at evenly spaced places from the
  first column to the last: nothing is extrapolated, and no lead's row touches another's. The class
  token's position is kept.
  """
  width = positions.shape[2]
  leads = len(schema.LEADS)
  n = columns(positions.shape)
  m = (tokens - 1) // leads
  if m == n:
    return positions
  cls = positions[:, :1]
  patches = positions[:, 1:]
  rows = patches.reshape(leads, n, width).astype(np.float64)
  spline = CubicSpline(np.arange(n), rows, axis=1)
  rows = spline(np.linspace(0, n - 1, m))  # [L, m, D]
  patches = rows.reshape(1, -1, width).astype(positions.dtype)
  return np.concatenate([cls, patches], axis=1)


def check_frozen(config, origin) -> None:
  """No tower is frozen at random weights, and no module has them that must be trained."""
  fresh = [key for key, text in origin.items() if text.startswith(FRESH)]
  for tower, spec in towers.cmr(config.model).items():
    within = f"cmr_{tower}/backbone/"
    backbone = [label(key) for key in fresh if key[1].startswith(within)]
    if spec.get("frozen") and backbone:
      raise UserError(
        f"config.model.towers.{tower}.frozen would freeze random weights ({len(backbone)} arrays, "
        f"such as {backbone[0]}); give config.init_from.cmr_{tower} the workdir of a stage that "
        "trained the tower, and nothing of its backbone to config.init_except"
      )
  modules = {top(key) for key in fresh}
  must = models.find(config.model).must_be_trained(config.model)
  random = [module for module in must if module in modules]
  if random:
    them = "them" if len(random) > 1 else "it"
    raise UserError(
      "this model would learn from, or be judged by, the random weights of "
      f"{' and '.join(random)}; give config.init_from.{random[0]} the workdir of a stage that "
      f"trained {them}"
    )


def note_frozen(config, params, origin: dict[Key, str]) -> None:
  """Adds to the origin of parameters that start fresh and are frozen that they stay as they are."""
  for path, treatment in state_lib.treatments(config, params).items():
    if treatment.frozen and origin["params", path].startswith(FRESH):
      origin["params", path] += ", and frozen so"
