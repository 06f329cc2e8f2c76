"""Configs: reading a recipe with its overrides, keeping it beside the run, holding a later run to
it."""

import importlib.util
import json
import os
import pathlib
import traceback
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from mmcl_jax.errors import UserError
from mmcl_jax.models import towers
from mmcl_jax.support import files
from mmcl_jax.support.paths import local
from mmcl_jax.support.tree import flatten

# What a later run in the same workdir may change: none of it alters the numbers beyond float
# rounding. (Those of STOPPING do where training stops early, and may not change there.) Paths of
# cohorts and earlier stages may, too: see `differences`.
FREE = (
  "mesh",
  "sharding",
  "loader",
  "every",
  "evaluators",
  "writers",
  "profile",
  "keep",
  "per_device_batch",
  "bad_rows",
  "bad_steps",
)
STOPPING = ("every.evaluate", "evaluators.losses.every")

# Groups whose entries a recipe names itself.
OPEN = ("init_from", "augment.ecg", "augment.cmr", "objectives", "evaluators", "writers")


def parse_arg(arg: str | None, **names) -> ConfigDict:
  """Reads the argument of `get_config`, such as `demo` or `size=base,batch=1024`.

  A bare word sets `size`.

  Args:
    arg: what follows the colon in `--config=joint:ARG`; None or "": every name has its default.
    **names: name -> default, whose type a value must have, or name -> choices, a mapping or tuple
      of texts, of which the first is the default.

  Raises:
    UserError: for an unknown name, a value of another type or one that is no choice; the message
      lists what is known.
  """
  choices = {}
  values = {}
  for name, default in names.items():
    values[name] = default
    if isinstance(default, (Mapping, tuple)):
      choices[name] = tuple(default)
      values[name] = choices[name][0]
  config = ConfigDict(values)
  settings = (arg or "").split(",")
  for setting in filter(None, settings):
    name, _, value = setting.rpartition("=")
    name = name or "size"
    if name not in names:
      raise UserError(f"the config's argument sets {name!r}; it takes {', '.join(names)}")
    if name in choices and value not in choices[name]:
      raise UserError(
        f"the config's argument sets {name}={value!r}; expected one of {', '.join(choices[name])}"
      )
    try:
      config[name] = type(config[name])(value)
    except ValueError:
      raise UserError(
        f"the config's argument sets {name}={value!r}; expected {type(config[name]).__name__}"
      ) from None
  return config


def recipe(name: str, arg: str | None = None) -> ConfigDict:
  """The config of a recipe, ready to be changed: what a recipe of your own starts from.

      config = recipe("joint", "demo")
      config.objectives.spread = dict(fn="my_losses:spread", weight=0.1)

  Args:
    name: a recipe of this package, such as "joint", or the path of a Python file with a function
      `get_config(arg)`, such as "configs/joint.py".
    arg: the argument of `get_config`, such as "demo" or "size=base,batch=1024".

  Raises:
    UserError: there is no such recipe, or it does not run; the message says where.
  """
  path = recipe_path(name)
  spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(arg) if arg else module.get_config()
  except UserError:
    raise
  except Exception as error:  # of any kind: the file is the user's
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == spec.origin]
    where = path
    if lines:
      where = f"{path}, line {lines[-1]}"
    raise UserError(f"{where}: {type(error).__name__}: {error}") from None
  if not isinstance(config, ConfigDict):
    raise UserError(f"{path}: get_config returns {type(config).__name__}; expected a ConfigDict")
  # with every parameter of its towers, so that --config.model.towers.NAME.KEY=V can set them
  config.model = towers.complete(config.model)
  return config


def recipe_path(name: str) -> pathlib.Path:
  """The file of a recipe, which is one of this package or a path."""
  path = pathlib.Path(name)
  if path.suffix == ".py" and path.is_file():
    return path
  package = pathlib.Path(__file__).parent
  shipped = package / "configs"  # in a wheel (setup.py)
  if not shipped.is_dir():
    shipped = package.parent / "configs"  # in a checkout
  recipes = {file.stem: file for file in sorted(shipped.glob("*.py"))}
  if name not in recipes:
    raise UserError(
      f"there is no recipe {name}; expected the path of a Python file, or one of "
      f"{', '.join(recipes)}"
    )
  return recipes[name]


# Longer than a function should be, on purpose: a table of all keys, to be read from top to bottom.
def defaults(batch: int, steps: int) -> ConfigDict:
  """Every key that a recipe has (configs/), at a neutral value; a recipe states what it is about.

  Entries of `model.towers` and `objectives` are the recipe's: there are none here.

  Args:
    batch: global batch size; divisible by the devices of the data axis.
    steps: updates; a tenth of them is warm-up, and a third lies between two checkpoints.
  """
  c = ConfigDict()
  c.seed = 0  # of parameters, order of the data, augmentation and masks
  c.batch, c.steps = batch, steps
  # rows a device for which `mmcl compile` compiles; 0: those of c.batch. Training uses c.batch
  c.per_device_batch = 0
  # parts that a batch is computed in, one after the other; the gradient is that of the whole
  c.accumulation = 1
  c.init_from = dict(ecg="")  # module -> workdir of an earlier stage; "": starts fresh
  # regexes of parameters that are not carried over: left behind there, or fresh here
  c.init_except = ()
  # regexes of parameters that are not trained (CMR towers: model.towers.NAME.frozen)
  c.freeze = ()

  c.data = ConfigDict()
  c.data.cohort = ""  # folder made by `mmcl prepare`
  # further cohorts and their shares of a batch, e.g. (("ptbxl", 0.3),); may be ECG alone
  c.data.mix = ()
  # continue though people held out here train in data.mix or trained an earlier stage
  c.data.allow_seen = False
  # normalisation the cohort was prepared with; `mmcl embed` applies the same
  c.data.ecg_profile = "minimal"
  # samples the model sees at a time; longer recordings: the mean over windows
  c.data.samples = 5000
  c.data.targets = ()  # phenotypes that objectives may learn from; (): all of the cohort

  # fn: "standard" or "package.module:function" (mmcl_jax.augment); what follows are its parameters
  c.augment = ConfigDict()
  # sigmas: units of the normalised ECG
  c.augment.ecg = dict(
    fn="standard",
    phase_noise_strength=0.0,
    jitter_sigma=0.0,
    rescale_sigma=0.0,
    gain_noise_sigma=0.0,
    time_flip=0.0,
    sign_flip=0.0,  # flips: probabilities
    phase_noise_always=False,  # else to one ECG in two
  )
  # shift: share of the image's side
  c.augment.cmr = dict(fn="standard", rotation_deg=0.0, scale=0.0, shift=0.0, intensity_sigma=0.0)
  # a second augmentation of every row, for objectives that compare two (outputs.again)
  c.augment.twice = False

  c.model = ConfigDict()
  # "pretrainer", "generation" or "package.module:Class": a subclass of models.pretrainer.Pretrainer
  c.model.fn = "pretrainer"
  # name -> dict(fn, view, parameters of fn), of a CMR tower also planes, width and frozen; the
  # tower of the ECG is called ecg: see models/towers
  c.model.towers = {}
  c.model.regression = ()  # towers with a linear read-out of the targets, e.g. ("ecg",)
  c.model.classification = ()  # towers with a linear read-out of the cohort's diseases
  # Of every tower's head. hidden 0: one Linear; ecg_hidden: of the ECG's, 0: that of the others;
  # norm: with batch norm
  c.model.projection = dict(hidden=512, ecg_hidden=0, width=128, norm=False)
  # where a learned temperature starts; 0: the objective's fixed one
  c.model.learned_temperature = 0.0
  c.model.learned_bias = 0.0  # where a learned bias of the logits starts (siglip); 0: none
  c.model.max_scale = 100.0  # cap of a learned 1 / temperature
  c.model.dtype = "float32"  # of matrix products: float32 or bfloat16
  # computed again in the backward pass: none, blocks (all of them), dots (all but products)
  c.model.remat = "none"
  # loop over a transformer's blocks, not unrolled: compiles faster, same parameters
  c.model.scan = False
  c.objectives = ConfigDict()  # name -> dict(fn, weight, parameters of fn)

  c.optimizer = dict(
    learning_rate=1e-3,
    warmup=max(steps // 10, 1),
    b1=0.9,
    b2=0.95,
    weight_decay=0.05,
    clip=1.0,
    # rates: (regex, factor) pairs on the learning rate; layer_decay: of the ECG
    # tower
    rates=(),
    layer_decay=1.0,
    l2=False,  # Adam with L2 on all parameters; else AdamW, on kernels
    # what a running mean of the parameters keeps of itself a step, to evaluate by;
    # 0: none
    ema=0.0,
  )
  c.mesh = dict(data=-1, model=1)  # devices along each axis; -1: all that are left
  # (regex, spec) rules for parameters and optimiser (training/parallel.py); spec: a mesh axis or
  # None a dimension, or "fsdp", "tensor", "tensor+fsdp"; nothing matched: replicated
  c.sharding = ()
  # in which devices exchange gradients of matrices and convolutions: float32, or bfloat16 where
  # model.dtype is that (models/exchange.py)
  c.gradient_dtype = "float32"
  c.loader = dict(threads=2, buffer=4, workers=0)
  c.every = dict(
    log=10,
    evaluate=max(steps // 3, 1),
    save=max(steps // 3, 1),  # steps
    save_minutes=30.0,
  )  # saves after so many minutes without a save, too; 0: never
  # checkpoints kept, the newest; the best on validation stays beside them
  c.keep = 2
  # rows without a readable record or a signal that may be left out before training stops
  c.bad_rows = 0
  # steps in a row with a loss or gradient that is not finite that may be skipped before it stops
  c.bad_steps = 0
  # name -> dict(fn, every, parameters of fn); all run in `mmcl evaluate`. every: steps between two
  # evaluations on the validation split while training; -1: those of every.evaluate, 0: none
  c.evaluators = dict(
    losses=dict(fn="losses", every=-1),
    probes=dict(fn="probes", every=-1),
    phenotypes=dict(fn="phenotypes", every=0),
    diseases=dict(fn="diseases", every=0),
    low_data=dict(fn="low_data", every=0),
    survival=dict(fn="survival", every=0),
    retrieval=dict(fn="retrieval", every=0),
    generation=dict(fn="generation", every=0),
    localisation=dict(fn="localisation", every=0),
    training_curves=dict(fn="training_curves", every=0),
    reconstruction=dict(fn="reconstruction", every=0),
    data=dict(fn="data", every=0),
  )
  # name -> dict(fn, parameters of fn): where metrics are written (training/metrics.py)
  c.writers = dict(jsonl=dict(fn="jsonl"), tensorboard=dict(fn="tensorboard"))
  # steps that JAX's profiler traces, and the first of them; 0: none (training/profile.py)
  c.profile = dict(first=10, steps=0)
  # evaluations in a row without a better c.stop_on after which training ends; 0: never
  c.stop_after = 0
  # a loss on validation, such as "validation/phenotypes"; the step where it is best is kept
  c.stop_on = ""
  return c


class Path(flags.ArgumentParser):
  """Reads a flag that is a path."""

  def parse(self, argument: str) -> str:
    return local(argument)


class Recipe(flags.ArgumentParser):
  """Reads a flag that is a recipe, `NAME[:ARGUMENT]` or `FILE.py[:ARGUMENT]`."""

  def parse(self, argument: str) -> ConfigDict:
    name, _, arg = local(argument).partition(":")
    return recipe(name, arg).lock()


def from_flags(
  program: str,
  usage: str,
  argv: list[str],
  paths: dict[str, str],
  words: dict[str, str] | None = None,
) -> tuple[ConfigDict, flags.FlagValues]:
  """Reads `--config=RECIPE[:ARG]`, `--config.x.y=value` and required flags.

  Args:
    paths, words: name -> help of the flags that are paths, and of others.
  """
  values = flags.FlagValues()
  required = paths | (words or {})
  config_flags.DEFINE_config_file(
    "config",
    None,
    "recipe, NAME[:ARGUMENT] or FILE.py[:ARGUMENT]; --config.x.y=V overrides",
    lock_config=True,
    flag_values=values,
    sys_argv=[program, *argv],
  )
  values["config"].parser = Recipe()
  for name, text in required.items():
    parser = Path() if name in paths else flags.ArgumentParser()
    flags.DEFINE(parser, name, None, text, flag_values=values)
  if "--help" in argv or "-h" in argv:
    print(
      f"{usage}\n\nflags:\n  --config=NAME[:ARGUMENT]  recipe, such as joint:demo, or "
      "FILE.py[:ARGUMENT]; --config.x.y=VALUE overrides one of its values"
    )
    for name, text in required.items():
      print(f"  --{name}=...  {text}")
    raise SystemExit(0)
  try:
    rest = values([program, *argv])[1:]
    config = values.config
  except UserError:
    raise
  except (
    flags.Error,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    OSError,
    ImportError,
    SyntaxError,
  ) as error:
    raise UserError(f"{error} (see {program} --help)") from None
  missing = [name for name in ("config", *required) if getattr(values, name) is None]
  if missing:
    raise UserError(f"missing --{', --'.join(missing)}; {usage}")
  if rest:
    raise UserError(f"unexpected {rest}; {usage}")
  read_paths(config)
  return config, values


def read_paths(config: ConfigDict) -> None:
  """Passes the paths in a config through `local`; "" stands for none."""
  config.data.cohort = config.data.cohort and local(config.data.cohort)
  for module, workdir in config.init_from.items():
    config.init_from[module] = workdir and local(workdir)
  if isinstance(config.data.mix, tuple):
    config.data.mix = tuple(_with_local_path(entry) for entry in config.data.mix)


def _with_local_path(entry):
  """A pair (path, share) of data.mix; what is none is for whoever opens the cohorts to refuse."""
  if isinstance(entry, (tuple, list)) and entry and isinstance(entry[0], str):
    path, *rest = entry
    return local(path), *rest
  return entry


def check_workdir(config: ConfigDict, workdir: str) -> None:
  """A workdir belongs to one config: raises a UserError where another one is kept there."""
  file = pathlib.Path(workdir) / "config.json"
  begun = any(pathlib.Path(workdir).glob("checkpoints/*"))
  if not file.is_file():
    if begun:
      raise UserError(
        f"{workdir} has checkpoints but no config.json, so it is not a whole workdir; take another "
        "--workdir"
      )
    return
  kept = load(workdir)
  differing = differences(kept, config)
  if not begun:  # where it starts from still counts
    differing += _other_beginnings(kept, config)
  if not differing:
    return
  shown = "; ".join(differing[:4])
  if len(differing) > 4:
    shown += f" and {len(differing) - 4} more"
  free = ", ".join(f"{name}.*" for name in FREE)
  more_steps = ""
  if any(text.startswith("steps was") for text in differing):
    more_steps = f"; {longer(config, workdir)}"
  raise UserError(
    f"{workdir} belongs to another config: {shown}; take another --workdir, "
    f"or change only {free}{more_steps}"
  )


def _values(config):
  """{path: value} as JSON has them."""
  return flatten(json.loads(config.to_json()))


def _other_beginnings(kept, config):
  """The earlier stages (init_from) that differ, in words as of `differences`."""
  before = _values(kept)
  now = _values(config)
  differing = []
  for key in sorted(before.keys() & now.keys()):
    if not key.startswith("init_from."):
      continue
    earlier = before[key]
    later = now[key]
    if not earlier or not later:
      continue
    if os.path.realpath(str(earlier)) != os.path.realpath(str(later)):
      differing.append(f"{key} was {earlier!r}, now {later!r}")
  return differing


def longer(config: ConfigDict, workdir: str) -> str:
  """How to train beyond config.steps, which sets the learning rate's schedule and so cannot change
  within a run."""
  modules = []
  for module in config.init_from:
    tower = module.removeprefix("cmr_")
    if tower in config.model.towers or config.model.get(module):
      modules.append(module)
  if not modules:  # of a recipe whose parts no later stage takes over
    return "to train longer: another --workdir with more --config.steps, from the start"
  flags = " ".join(f"--config.init_from.{module}={workdir}" for module in modules)
  return (
    f"to train longer: another --workdir with {flags} and a --config.steps of its own; heads and "
    "optimiser begin anew"
  )


def differences(kept: ConfigDict, config: ConfigDict) -> list[str]:
  """What a later run may not change (all but FREE), in words: `optimizer.b1 was 0.9, now 0.8`.

  Paths are free: a cohort is known by the fingerprint that a checkpoint holds, and an earlier stage
  (init_from) is read at the first step alone.
  """
  before = _values(kept)
  now = _values(config)
  stops_early = before.get("stop_after")
  differing = []
  for key in sorted(before.keys() | now.keys()):
    earlier = before.get(key)
    later = now.get(key)
    if same(key, earlier, later):
      continue
    group, *_ = key.split(".")
    if group not in FREE or (key in STOPPING and stops_early):
      differing.append(f"{key} was {earlier!r}, now {later!r}")
  return differing


def same(key: str, before: Any, now: Any) -> bool:
  """Are two values of a config the same but for paths?"""
  if key == "data.cohort" or key.startswith("init_from."):
    return bool(before) == bool(now)
  if key == "data.mix" and before and now:
    return _shares(before) == _shares(now)
  return before == now


def _shares(mix):
  return [pair[1:] for pair in mix]


def as_text(config: ConfigDict) -> str:
  """What config.json holds."""
  values = json.loads(config.to_json())
  return json.dumps(values, indent=1) + "\n"


def save(config: ConfigDict, workdir: str) -> None:
  with files.atomic(pathlib.Path(workdir) / "config.json") as file:
    file.write(as_text(config))


def load(workdir: str) -> ConfigDict:
  """The config of a workdir."""
  file = pathlib.Path(workdir) / "config.json"
  if not file.is_file():
    raise UserError(
      f"{workdir} holds no config.json; expected the --workdir of an `mmcl train` run"
    )
  try:
    config = ConfigDict(json.loads(file.read_text()))
  # the last two: no object, nested without end
  except (ValueError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(
      f"{file} is not readable as JSON ({error}); restore it, or train again in another workdir"
    ) from None
  missing = lacking(config, defaults(batch=1, steps=1))
  if missing:
    raise UserError(
      f"{file} has no {', '.join(missing[:4])}, so another version of mmcl_jax wrote it, or it is "
      "damaged; restore it, or train again in another workdir"
    )
  return config


def lacking(config: ConfigDict, expected: ConfigDict, prefix: str = "") -> list[str]:
  """The keys of `expected` that `config` does not have; what is in groups of the recipe's own
  (OPEN) is not looked at."""
  names = []
  for name, value in expected.items():
    path = f"{prefix}{name}"
    if name not in config:
      names.append(path)
    elif isinstance(value, ConfigDict) and path not in OPEN:
      if isinstance(config[name], ConfigDict):
        names += lacking(config[name], value, f"{path}.")
      else:
        names.append(path)
  return names
