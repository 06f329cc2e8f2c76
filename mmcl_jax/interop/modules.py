"""Which module each key of a state dict belongs to, and which published layout an encoder's keys
follow."""

import collections
import re
from typing import NamedTuple

import numpy as np

from mmcl_jax.errors import UserError

# Keys that no module of ours takes, and what they are. They are told, never dropped silently.
IGNORED = (
  (r"(^|\.)num_batches_tracked$", "counters of batches"),
  (
    r"(^|\.)(classifier|classifier_criterion|criterion\w*|output_layer|ecg_predict)\.",
    "classifiers and losses",
  ),
  (r"^(online_network\.)?(projector|predictor)\.(?!layers\.)", "siamese heads"),
  (r"^target_network\.", "the target network"),
)
# Prefix -> module; "*" is the only encoder of a file, head_* its projection head.
MODULES = (
  (r"(encoder_ecg|ecg_encoder|ECG_encoder|ecg)\.", "ecg"),
  (r"CMR_encoder1\.", "cmr_sax"),
  (r"CMR_encoder2\.", "cmr_lax"),
  (r"encoder_imaging\.", "cmr_image"),
  (r"cmr_encoder(_diastole)?\.", "cmr_ed"),
  (r"cmr_encoder_systole\.", "cmr_es"),
  (r"(projection_head|projector)_ecg\.", "head_ecg"),
  (r"(projection_head|projector)_imaging\.", "head_image"),
  (r"(projection_head|projector)_(diastole|cmr)\.", "head_ed"),
  (r"(projection_head|projector)_systole\.", "head_es"),
  (r"(projection_head|projector)\.", "head_*"),
  (r"(?P<ours>(cmr|head)_\w+)\.", ""),
  (r"(online_network\.)?", "*"),
)
# Keys that are idle where the file has others: what a key begins with -> what the others begin
# with, and what it is.
IDLE = (
  (
    "projection_head_cmr.",
    "projection_head_diastole.",
    "a head that the dual-phase system's three-pair model neither trains nor uses",
  ),
  ("temporal_mlp.", "cmr_encoder.", "a second name of an encoder's Linear over slices"),
)
LAYOUTS = {  # kind -> what it is called, and keys that tell of it
  "ecg_vit": ("a ViT with timm's keys", r"^blocks\.\d+\.attn\.qkv\.weight$"),
  "st_mem": ("ST-MEM's encoder", r"^block\d+\.attn\.fn\.to_qkv\.weight$"),
  "slow_resnet": ("a slow ResNet with PyTorchVideo's keys", r"(^|\.)res_blocks\.\d+\.branch2\."),
  "resnet": ("a ResNet with torchvision's keys", r"^(layer[1-4]|[4-7])\.\d+\.conv\d\.weight$"),
}
OF_ECG = ("ecg_vit", "st_mem")
# What an encoder without a name is called.
DEFAULT = {"ecg_vit": "ecg", "st_mem": "ecg", "slow_resnet": "ed", "resnet": "image"}
# the children of a ResNet in nn.Sequential; a slow ResNet without `blocks`, and its last block, a
# Linear
RENAMED = {
  "ecg_vit": (),
  "st_mem": (),
  "resnet": (
    (r"^0\.", "conv1."),
    (r"^1\.", "bn1."),
    (r"^([4-7])\.", lambda m: f"layer{int(m[1]) - 3}."),
  ),
  "slow_resnet": ((r"^(\d)\.", r"blocks.\1."), (r"^blocks\.5\.proj\.", "fc.")),
}


class Options(NamedTuple):
  """What a file does not say, or the user wants otherwise; see torch_weights.load."""

  tower: str | None = None
  heads: int | None = None
  decoder_heads: int | None = None
  pool: str | None = None
  samples: int | None = None
  view: str | None = None
  ignore: tuple[str, ...] = ()

  def check(self) -> None:
    for name in ("heads", "decoder_heads", "samples"):
      if getattr(self, name) is not None and getattr(self, name) < 1:
        raise UserError(f"--{name}={getattr(self, name)}; expected at least 1")
    for regex in self.ignore:
      try:
        re.compile(regex)
      except re.error as error:
        raise UserError(f"--ignore={regex} is no regex: {error}") from None


class Modules(NamedTuple):
  """arrays: module -> {key within it: array}; kinds: encoder -> its layout, in the file's order.

  theirs: "MODULE.KEY" -> the file's key; prefixes: module -> what the file writes in front of its
  keys; ignored: what it is -> keys of the file.
  """

  arrays: dict[str, dict[str, np.ndarray]]
  kinds: dict[str, str]
  theirs: dict[str, str]
  prefixes: dict[str, str]
  ignored: dict[str, list[str]]

  def ignore(self, module: str, what: str, *beginnings: str) -> None:
    """Takes out the keys of a module that begin so, and keeps account of them."""
    for key in [key for key in self.arrays[module] if key.startswith(beginnings)]:
      self.ignored[what].append(self.theirs[f"{module}.{key}"])
      del self.arrays[module][key]


def split(state: dict[str, np.ndarray], options: Options, path) -> Modules:
  """Raises UserError where a key belongs to no module, or the user must say which tower is
  wanted."""
  modules = leave_others(assign(state, options, path), options)
  for module in modules.arrays:
    if not module.startswith("head_"):
      modules.kinds[module] = layout(modules, module, path)
  return check(call(modules, options, path), options, path)


def leave_others(modules: Modules, options: Options) -> Modules:
  """Takes out the encoders beside a named one that is wanted, which may be of any layout, and their
  heads."""
  towers = {module: module.removeprefix("cmr_").removeprefix("head_") for module in modules.arrays}
  encoders = {tower for module, tower in towers.items() if not module.startswith("head_")}
  if options.tower in encoders:
    for module, tower in towers.items():
      if tower in encoders and tower != options.tower:
        modules.ignore(module, "other towers", "")
        del modules.arrays[module]
  return modules


def assign(state, options, path) -> Modules:
  """Every key to its module, kinds still unknown. A key may stand twice where its arrays are
  equal."""
  modules = Modules(collections.defaultdict(dict), {}, {}, {}, collections.defaultdict(list))
  plains = {key: without_wrappers(key) for key in state}
  idle = []
  for beginning, others, what in IDLE:
    if any(plain.startswith(others) for plain in plains.values()):
      idle.append((beginning, what))
  for key, array in state.items():
    plain = plains[key]
    reasons = [f"--ignore={regex}" for regex in options.ignore if re.search(regex, key)]
    reasons += [what for beginning, what in idle if plain.startswith(beginning)]
    reasons += [what for regex, what in IGNORED if re.search(regex, plain)]
    if reasons:
      modules.ignored[reasons[0]].append(key)
      continue
    module, rest = module_and_rest(plain)
    arrays = modules.arrays[module]
    if rest in arrays and not np.array_equal(arrays[rest], array):
      raise UserError(
        f"{path} has {modules.theirs[f'{module}.{rest}']} and {key}, which both are "
        f"{module}.{rest} and differ; leave one out with --ignore=REGEX"
      )
    arrays[rest], modules.theirs[f"{module}.{rest}"] = array, key
    modules.prefixes.setdefault(module, key.removesuffix(rest))
  return modules


def without_wrappers(key: str) -> str:
  """A key without what DistributedDataParallel and torch.compile put into it."""
  names = [name for name in key.split(".") if name not in ("module", "_orig_mod")]
  return ".".join(names)


def module_and_rest(key: str) -> tuple[str, str]:
  """The module that a key belongs to, by the first of MODULES that fits (the last fits all), and
  the key within it."""
  fitting = ((re.match(regex, key), module) for regex, module in MODULES)
  match, module = next((match, module) for match, module in fitting if match)
  within = re.sub(r"^(model|encoder|backbone)\.", "", key[match.end() :])
  return module or match["ours"], within


def layout(modules: Modules, module: str, path) -> str:
  """Tells the kind of an encoder, and brings its keys to the names that `naming` knows."""
  keys = modules.arrays[module]
  kind = layout_of(keys)
  if kind is None:
    shown = sorted(modules.theirs[f"{module}.{key}"] for key in keys)
    more = f" and {len(shown) - 5} more keys" if len(shown) > 5 else ""
    others = []
    for other in modules.arrays:
      if not other.startswith("head_") and other != module:
        others.append(other.removeprefix("cmr_"))
    advice = ""
    if others:
      advice = f"take another encoder alone with --tower=, one of {', '.join(others)}, or "
    raise UserError(
      f"{path} has {', '.join(shown[:5])}{more}, which no layout explains; expected "
      f"{', '.join(text for text, _ in LAYOUTS.values())}; {advice}leave out with --ignore=REGEX "
      "what is no encoder"
    )
  for key in list(keys):
    renamed = key
    for pattern, text in RENAMED[kind]:
      renamed = re.sub(pattern, text, renamed)
    if renamed != key:
      keys[renamed] = keys.pop(key)
      modules.theirs[f"{module}.{renamed}"] = modules.theirs.pop(f"{module}.{key}")
  return kind


def layout_of(keys) -> str | None:
  """The first of LAYOUTS whose regex one of the keys matches."""
  for kind, (_, regex) in LAYOUTS.items():
    if any(re.search(regex, key) for key in keys):
      return kind
  return None


def call(modules: Modules, options: Options, path) -> Modules:
  """Gives the only encoder of a file its name, and its head the same."""
  if len(modules.kinds) != 1:
    return modules
  ((module, kind),) = modules.kinds.items()
  default = DEFAULT[kind] if module == "*" else module.removeprefix("cmr_")
  tower = options.tower or default
  if (kind in OF_ECG) != (tower == "ecg"):
    what, advice = "a CMR", "give it another with --tower=NAME"
    if kind in OF_ECG:
      what, advice = "an ECG", "leave --tower out"
    raise UserError(f"{path} holds {what} encoder, which the name {tower} is not for; {advice}")
  if not re.fullmatch(r"\w+", tower):
    raise UserError(f"--tower={tower}; expected a name of letters, digits and underscores")
  renamed = {
    module: "ecg" if kind in OF_ECG else f"cmr_{tower}",
    "head_*": f"head_{tower}",
    f"head_{default}": f"head_{tower}",
  }

  def by_new_name(by_module):
    return {renamed.get(module, module): value for module, value in by_module.items()}

  theirs = {}
  for key, their_key in modules.theirs.items():
    module, _, rest = key.partition(".")
    theirs[f"{renamed.get(module, module)}.{rest}"] = their_key
  return Modules(
    arrays=by_new_name(modules.arrays),
    kinds=by_new_name(modules.kinds),
    theirs=theirs,
    prefixes=by_new_name(modules.prefixes),
    ignored=modules.ignored,
  )


def check(modules: Modules, options: Options, path) -> Modules:
  """`modules`, whose encoders are what they are named, with the tower that the user wants among
  them."""
  strange = []
  for module, kind in modules.kinds.items():
    if module == "*" or (kind in OF_ECG) != (module == "ecg"):
      strange += [modules.theirs[f"{module}.{key}"] for key in modules.arrays[module]]
  if not modules.kinds or strange:
    shown = ", ".join(sorted(strange)[:5]) or "no encoder"
    raise UserError(
      f"{path} holds {shown}; expected an encoder of the ECG (a "
      "ViT), encoders of CMR (ResNets), or both under names such as encoder_ecg. and "
      "encoder_imaging.; leave out with --ignore=REGEX what is none of them"
    )
  towers = [module.removeprefix("cmr_") for module in modules.kinds]
  if options.tower and options.tower not in towers:
    raise UserError(
      f"{path} holds the towers {', '.join(towers)}; --tower={options.tower} is none of them"
    )
  return modules
