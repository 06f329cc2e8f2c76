"""What a state dict holds, told by its keys and shapes: which module each key belongs to, and the config of the model."""

import collections
import re
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mmcl_jax import configuration
from mmcl_jax.data import schema
from mmcl_jax.errors import UserError
from mmcl_jax.models import resnet, vit

L = len(schema.LEADS)
MAX_DEPTH, MAX_WIDTH = 200, 16384  # beyond them it is no model but a way to take memory

# Keys that no module of ours takes, and what they are. They are told, never silently dropped.
IGNORED = (
    (r"(^|\.)num_batches_tracked$", "counters of batches"),
    (r"(^|\.)(classifier|classifier_criterion|criterion\w*|output_layer|ecg_predict)\.", "classifiers and losses"),
    (r"^(online_network\.)?(projector|predictor)\.(?!layers\.)", "siamese heads"),
    (r"^target_network\.", "the target network"),
)
# Prefix -> module; "*" is the only encoder of a file, head_* its projection head.
MODULES = (
    (r"(encoder_ecg|ecg_encoder|ecg)\.", "ecg"),
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
LAYOUTS = (  # a key that tells of the layout, and what it is called
    (r"^blocks\.\d+\.attn\.qkv\.weight$", "vit", "a ViT with timm's keys"),
    (r"(^|\.)res_blocks\.\d+\.branch2\.", "slow_resnet", "a slow ResNet with PyTorchVideo's keys"),
    (r"^(layer[1-4]|[4-7])\.\d+\.conv\d\.weight$", "resnet", "a ResNet with torchvision's keys"),
)
HEADS = {width: heads for width, _, heads, *_ in vit.SIZES.values()} | {192: 3}  # of an encoder; a fused qkv does not tell
DECODER_HEADS = {size[3]: size[5] for size in vit.SIZES.values()}


class Options(NamedTuple):
  """What a file does not say, or the user wants otherwise; see torch_weights.load."""

  tower: str | None = None
  heads: int | None = None
  decoder_heads: int | None = None
  pool: str | None = None
  samples: int | None = None
  view: str | None = None
  ignore: tuple[str, ...] = ()


class Found(NamedTuple):
  """config: of the model; samples: of an ECG; state: our key (naming) -> array; theirs: our key -> the file's key; prefixes:
  module -> what the file writes in front of its keys.

  fresh: paths of parameters that the file does not have -> what they are set to; ignored: what it is -> keys of the file;
  troubles: what makes the file unusable; notes: what the user is told.
  """

  config: ConfigDict
  samples: int
  state: dict[str, np.ndarray]
  theirs: dict[str, str]
  prefixes: dict[str, str]
  fresh: dict[str, str]
  ignored: dict[str, list[str]]
  troubles: list[str]
  notes: list[str]


def recognise(state: dict[str, np.ndarray], metadata: dict[str, str], options: Options, path) -> Found:
  """Raises UserError where no layout is known, or where the user must say more."""
  ignored = collections.defaultdict(list)
  modules, theirs, prefixes = assign(state, ignored, options, path)
  kinds = {module: layout(keys, module, theirs, path) for module, keys in modules.items() if not module.startswith("head_")}
  modules, kinds, prefixes = called(modules, kinds, theirs, prefixes, options, path)
  modules, kinds = chosen(modules, kinds, theirs, ignored, options, path)

  c = configuration.defaults(batch=32, steps=1)
  found = Found(c.model, options.samples or c.data.samples, {}, theirs, prefixes, {}, ignored, [], [])
  widths = {}
  for module, kind in kinds.items():
    keys = modules[module]
    if kind == "vit":
      spec, samples, widths["ecg"] = ecg(keys, modules.get("head_ecg", {}), metadata, options, found)
      with c.ignore_type():  # a size is a name, or numbers
        c.model.ecg.update(spec)
      found = found._replace(samples=samples)
    else:
      name = module.removeprefix("cmr_")
      c.model.cmr[name], widths[name] = cmr(keys, kind, name, options, found)
  c.model.projection.update(projection(modules, widths, found, path))
  for module, keys in modules.items():
    found.state.update({f"{module}.{key}": array for key, array in keys.items()})
  return found


def assign(state, ignored, options, path):
  """state -> module -> {key within the module: array}; our key -> the file's key; module -> the file's prefix.

  A key may stand twice, if equal.
  """
  modules, theirs, prefixes = collections.defaultdict(dict), {}, {}
  for key, array in state.items():
    plain = ".".join(part for part in key.split(".") if part not in ("module", "_orig_mod"))  # of wrappers
    reasons = [f"--ignore={regex}" for regex in options.ignore if re.search(regex, key)]
    reasons += [what for regex, what in IGNORED if re.search(regex, plain)]
    if reasons:
      ignored[reasons[0]].append(key)
      continue
    match, module = next((found, module) for regex, module in MODULES if (found := re.match(regex, plain)))
    module = module or match["ours"]
    rest = re.sub(r"^(model|encoder|backbone)\.", "", plain[match.end():])
    if rest in modules[module] and not np.array_equal(modules[module][rest], array):
      raise UserError(f"{path} has {theirs[f'{module}.{rest}']} and {key}, which both are {module}.{rest} and differ; leave one "
                      "out with --ignore=REGEX")
    modules[module][rest], theirs[f"{module}.{rest}"] = array, key
    prefixes.setdefault(module, key.removesuffix(rest))
  return modules, theirs, prefixes


def layout(keys, module, theirs, path) -> str:
  """Tells the kind of an encoder, and brings its keys to the names that `naming` knows."""
  kind = next((kind for regex, kind, _ in LAYOUTS if any(re.search(regex, key) for key in keys)), None)
  if kind is None:
    shown = sorted(theirs[f"{module}.{key}"] for key in keys)
    raise UserError(f"{path} has {', '.join(shown[:5])}{f' and {len(shown) - 5} more keys' if len(shown) > 5 else ''}, which no "
                    f"layout explains; expected {', '.join(text for *_, text in LAYOUTS)}; leave out with --ignore=REGEX what "
                    "is no encoder")
  rules = {  # the children of a ResNet in nn.Sequential; a slow ResNet without `blocks`; its last block is a Linear
      "resnet": ((r"^0\.", "conv1."), (r"^1\.", "bn1."), (r"^([4-7])\.", lambda m: f"layer{int(m[1]) - 3}.")),
      "slow_resnet": ((r"^(\d)\.", r"blocks.\1."), (r"^blocks\.5\.proj\.", "fc.")),
  }.get(kind, ())
  for key in list(keys):
    renamed = key
    for pattern, text in rules:
      renamed = re.sub(pattern, text, renamed)
    if renamed != key:
      keys[renamed] = keys.pop(key)
      theirs[f"{module}.{renamed}"] = theirs.pop(f"{module}.{key}")
  return kind


def called(modules, kinds, theirs, prefixes, options, path):
  """Gives the only encoder of a file its name, and its head the same."""
  if len(kinds) != 1:
    return modules, kinds, prefixes
  (module, kind), = kinds.items()
  default = {"vit": "ecg", "slow_resnet": "ed", "resnet": "image"}[kind] if module == "*" else module.removeprefix("cmr_")
  tower = options.tower or default
  if (kind == "vit") != (tower == "ecg"):
    raise UserError(f"{path} holds {'an ECG' if kind == 'vit' else 'a CMR'} encoder, which the name {tower} is not for; "
                    f"{'leave --tower out' if kind == 'vit' else 'give it another with --tower=NAME'}")
  if not re.fullmatch(r"\w+", tower):
    raise UserError(f"--tower={tower}; expected a name of letters, digits and underscores")
  renamed = {module: "ecg" if kind == "vit" else f"cmr_{tower}", "head_*": f"head_{tower}", f"head_{default}": f"head_{tower}"}
  name = lambda module: renamed.get(module, module)
  for key in list(theirs):
    module, _, rest = key.partition(".")
    theirs[f"{name(module)}.{rest}"] = theirs.pop(key)
  return tuple({name(module): value for module, value in of.items()} for of in (modules, kinds, prefixes))


def chosen(modules, kinds, theirs, ignored, options, path):
  """The modules of the tower that the user wants, where a file holds several; every other key is ignored or a trouble."""
  wrong = [module for module, kind in kinds.items() if module == "*" or (kind == "vit") != (module == "ecg")]
  strange = sorted(theirs[f"{module}.{key}"] for module in wrong for key in modules[module])
  if not kinds or strange:
    raise UserError(f"{path} holds {'no encoder' if not kinds else ', '.join(strange[:5])}; expected an encoder of the ECG (a ViT), "
                    "encoders of CMR (ResNets), or both under names such as encoder_ecg. and encoder_imaging.; leave out with "
                    "--ignore=REGEX what is none of them")
  towers = [module.removeprefix("cmr_") for module in kinds]
  if options.tower and options.tower not in towers:
    raise UserError(f"{path} holds the towers {', '.join(towers)}; --tower={options.tower} is none of them")
  keep = [options.tower] if options.tower else towers
  for module in list(modules):
    tower = module.removeprefix("cmr_").removeprefix("head_")
    if tower not in keep and tower in towers:
      ignored["other towers"] += [theirs[f"{module}.{key}"] for key in modules.pop(module)]
      kinds.pop(module, None)
  return modules, kinds


# ---- encoders

def common(values, default):
  """The most frequent value: one misshapen array must not decide how all others are read."""
  values = list(values)
  return collections.Counter(values).most_common(1)[0][0] if values else default


def last_axis(keys, regex, default=0) -> int:
  return common((x.shape[-1] for key, x in keys.items() if re.search(regex, key) and x.ndim), default)


def count(keys, regex) -> int:
  """One more than the largest number that the regex's group finds."""
  number = max((int(found[1]) for key in keys if (found := re.search(regex, key)) and len(found[1]) < 6), default=-1) + 1
  if number > MAX_DEPTH:
    raise UserError(f"the file numbers {number} blocks; expected at most {MAX_DEPTH}")
  return number


def number_of_heads(width, given, known, metadata, what) -> int:
  """Given, told by the file's metadata (ours), or that of the published encoder of this width."""
  told = metadata.get(what, "")
  heads = given or (int(told) if re.fullmatch(r"\d{1,4}", told) else known.get(width))
  if not heads:
    raise UserError(f"the weights do not tell how many attention heads a width of {width} has, and no published encoder has this "
                    f"width ({', '.join(map(str, sorted(known)))}); give it with {what}= in Python or --{what}=")
  if heads < 1 or width % heads:
    raise UserError(f"{what} is {heads}, which does not divide the width of {width}")
  return heads


def transformer(keys, prefix, extra) -> tuple[int, int]:
  """Width and depth of the blocks under a prefix; `extra` are further keys as wide as them."""
  width = last_axis(keys, rf"^({extra}|{prefix}blocks\.\d+\.(norm1|norm2|attn\.proj)\.(weight|bias))$")
  if width % 4 or width > MAX_WIDTH:
    raise UserError(f"{prefix}blocks are {width} wide; expected at most {MAX_WIDTH}, and a width divisible by 4 for sin-cos positions")
  return width, count(keys, rf"^{prefix}blocks\.(\d+)\.")


def ecg(keys, head, metadata, options, found):
  """Config of the ECG tower, its samples, and the width that its projection head sees. Takes the fixed tables out of keys."""
  width, depth = transformer(keys, "", "cls_token|pos_embed|norm\\.weight|fc_norm\\.weight")
  decodes = any(key.startswith(("decoder_", "mask_token")) for key in keys)
  heads = number_of_heads(width, options.heads, HEADS, metadata, "heads")
  patch = last_axis(keys, r"^patch_embed\.proj\.weight$", 0) or last_axis(keys, r"^decoder_pred\.bias$", 100)
  size = [width, depth, heads]
  if decodes:
    decoder_width, decoder_depth = transformer(keys, "decoder_", "decoder_embed\\.bias|mask_token|decoder_norm\\.weight")
    size += [decoder_width, decoder_depth,
             number_of_heads(decoder_width, options.decoder_heads, DECODER_HEADS, metadata, "decoder_heads")]
    found.notes.append("mask ratio 0.8, which the file does not say (config.model.ecg.mask_ratio)")
  named = next((name for name, numbers in vit.SIZES.items() if list(numbers[:len(size)]) == size), None)
  spec = {"size": named or tuple(size), "patch": patch, "mask_ratio": 0.8 if decodes else 0.0, "head": 0}

  spec["positions"], samples = positions(keys, width, patch, options, found)
  if decodes and "decoder_pos_embed" in keys:
    decoder_positions(keys, decoder_width, found)
  spec["pool"] = pooling(keys, decodes, options, found)

  if "head.weight" in keys:
    out, into = len(keys["head.weight"]), head["layers.0.weight"].shape[-1] if "layers.0.weight" in head else None
    if into is None or into == out:
      spec["head"] = out
    else:  # the projection head sees the embedding, as in MMCL
      ignore(keys, found, "head., which the projection head passes by", "head.")
  found.notes.insert(0, f"ECG encoder: {'MAE' if decodes else 'ViT'} with timm's keys, {width} wide, {depth} blocks, {heads} heads"
                     + (f", decoder {size[3]} wide, {size[4]} blocks, {size[5]} heads" if decodes else "")
                     + f" (size {named or 'of its own'}), patches of {patch} samples, {samples} samples, {spec['positions']} "
                     f"positions, pool {spec['pool']}" + (f", head {spec['head']}" if spec["head"] else ""))
  return spec, samples, spec["head"] or width


def ignore(keys, found, what, *prefixes):
  for key in [key for key in keys if key.startswith(prefixes)]:
    found.ignored[what].append(found.theirs[f"ecg.{key}"])
    del keys[key]


def table(columns, width) -> np.ndarray:
  """Fixed positions with those of the CLS token, which are 0: [1, 1 + L columns, width]."""
  return np.pad(vit.sincos_2d(L, columns, width), ((1, 0), (0, 0)))[None]


def is_table(x, width, swap=False) -> bool:
  """Is x the fixed table, to 1e-5? swap: with its halves, lead and time, the other way round (MAE's code: time first)."""
  if x.ndim != 3 or x.shape[0] != 1 or x.shape[2] != width or x.shape[1] <= L or x.shape[1] % L != 1:
    return False
  expected = table(x.shape[1] // L, width)
  return np.abs(x - (np.roll(expected, width // 2, axis=2) if swap else expected)).max() < 1e-5


def positions(keys, width, patch, options, found):
  """"sincos" or "learned", and how many samples the encoder sees."""
  x = keys.get("pos_embed")
  if x is None or x.ndim != 3 or x.shape[0] != 1 or x.shape[2] != width or x.shape[1] <= L or x.shape[1] % L != 1:
    keys.pop("pos_embed", None)
    found.troubles.append(f"{'missing' if x is None else 'of another shape'}: ecg.pos_embed"
                          f"{'' if x is None else f' {x.shape}'}, expected (1, 1 + {L} n, {width})")
    return "sincos", options.samples or 50 * patch
  samples = x.shape[1] // L * patch
  if is_table(x, width):
    del keys["pos_embed"]
    return "sincos", options.samples or samples
  if options.samples not in (None, samples):
    raise UserError(f"the encoder has learned positions for {samples} samples, --samples={options.samples} are others; convert it as "
                    "it is, and let config.init_from interpolate them for a later stage")
  return "learned", samples


def decoder_positions(keys, width, found):
  """Takes the decoder's fixed table out; where its halves are the other way round, the channels of the decoder go with them.

  A transformer is the same under any order of the channels of its residual stream.
  """
  x = keys["decoder_pos_embed"]
  if is_table(x, width):
    del keys["decoder_pos_embed"]
  elif is_table(x, width, swap=True):
    del keys["decoder_pos_embed"]
    half = width // 2
    for key in keys:
      if key == "mask_token" or re.fullmatch(r"decoder_(blocks\.\d+\.(norm\d|attn\.proj|mlp\.fc2)|embed|norm)\.(weight|bias)", key):
        axis = 2 if key == "mask_token" else 0
      elif re.fullmatch(r"decoder_(blocks\.\d+\.(attn\.qkv|mlp\.fc1)|pred)\.weight", key):
        axis = 1
      else:
        continue
      if axis < keys[key].ndim and keys[key].shape[axis] == width:  # else it is misshapen, and will be told
        keys[key] = np.roll(keys[key], half, axis)
    found.notes.append("decoder: channels reordered, because its fixed positions have lead and time the other way round; it "
                       "computes the same")
  else:
    found.troubles.append(f"of another value: {found.theirs['ecg.decoder_pos_embed']} {x.shape}, expected the fixed sin-cos table of "
                          f"(1, 1 + {L} n, {width}), the only one that the decoder has")
    del keys["decoder_pos_embed"]


def pooling(keys, decodes, options, found) -> str:
  """mean, attention or cls, and what that leaves over."""
  attends = any(key.startswith("attention_pool.") for key in keys)
  has_norm = any(key.startswith("fc_norm.") for key in keys)
  classifies = not (attends or has_norm or decodes) and "head.weight" in keys
  pool = options.pool or ("attention" if attends else "cls" if classifies else "mean")
  if pool == "cls":
    ignore(keys, found, "the pooling that --pool=cls does not use", "fc_norm.", "attention_pool.")
    return pool
  if not decodes:
    ignore(keys, found, "norm of the CLS token, which is not used", "norm.")
  if pool == "mean":
    ignore(keys, found, "the pooling that --pool=mean does not use", "attention_pool.")
  if not has_norm:
    found.fresh.update({"ecg/fc_norm/scale": "1", "ecg/fc_norm/bias": "0"})
    found.notes.append(f"fc_norm is not in the file: identity after {pool} pooling (--pool=cls takes the CLS token instead)")
  return pool


def cmr(keys, kind, name, options, found):
  """Config of a CMR tower, and the width of its embedding."""
  if kind == "resnet":
    stem, known, stage = "conv1.weight", resnet.SIZES, "layer"
    width_of = lambda i: common((x.shape[0] for key, x in keys.items() if re.match(rf"layer{i}\.\d+\.(conv1|bn1)\.", key) and x.ndim), 0)
    bottleneck = any(re.match(r"layer\d\.\d+\.conv3\.", key) for key in keys)
  else:
    stem, known, stage = "blocks.0.conv.weight", resnet.SLOW_SIZES, "blocks."
    width_of = lambda i: common((x.shape[0] for key, x in keys.items()
                                 if re.match(rf"blocks\.{i}\.res_blocks\.\d+\.branch2\.(conv_a|norm_a)\.", key) and x.ndim), 0)
    bottleneck = True
  first = keys.get(stem, np.zeros((0, 0)))
  first = first if first.ndim == (4 if kind == "resnet" else 5) else np.zeros((0, 0))
  found_size = (first.shape[0], bottleneck, tuple(width_of(i) for i in range(1, count(keys, rf"^{re.escape(stage)}(\d+)\.") or 1)))
  match = [size for size, (channels, block, stages) in known.items()
           if (block is resnet.Bottleneck, tuple(width for width, *_ in stages)) == found_size[1:] and channels in (first.shape[0] or channels,)]
  if not match:
    raise UserError(f"the {name} encoder is a {kind} with a stem of {found_size[0]} channels, {'bottleneck' if bottleneck else 'basic'} "
                    f"blocks and stages of {', '.join(map(str, found_size[2]))} channels; expected one of {', '.join(known)} "
                    f"({'; '.join(f'{size}: {n}, {[width for width, *_ in stages]}' for size, (n, _, stages) in known.items())})")
  size, planes = match[0], first.shape[1] if kind == "resnet" and first.shape[1] else 3
  if kind == "slow_resnet":
    if first.shape[1] > 1:
      keys[stem] = first.sum(axis=1, keepdims=True)
      found.notes.append(f"cmr_{name}: the stem's {first.shape[1]} input channels are summed to one, which is the same for a grey image")
    pool = keys.get("temporal_mlp.weight")
    planes = pool.shape[-1] if pool is not None and pool.ndim == 2 else 6
    if not any(key.startswith("temporal_mlp.") for key in keys):
      found.fresh.update({f"cmr_{name}/backbone/slice_pool/kernel": "1 / planes", f"cmr_{name}/backbone/slice_pool/bias": "0"})
      found.notes.append(f"cmr_{name}: the Linear over slices is not in the file: the mean over {planes} of them")
  width = last_axis(keys, r"^fc\.bias$") or (len(keys["fc.weight"]) if "fc.weight" in keys else 0)
  channels = known[size][2][-1][0] * (4 if bottleneck else 1)
  view = options.view or default_view(name, kind, planes)
  if view not in schema.VIEWS:
    raise UserError(f"--view={view}; expected one of {', '.join(schema.VIEWS)}")
  found.notes.append(f"CMR encoder {name}: {next(text for _, k, text in LAYOUTS if k == kind)}, size {size}, {planes} "
                     f"{'slices' if kind == 'slow_resnet' else 'channels'} seen of the view {view}, {channels} features"
                     + (f", a Linear to {width} after them" if width else ""))
  return dict(kind=kind, size=size, view=view, planes=planes, width=width, patch=(1, 16, 16), mask_ratio=0.0, drop_path=0.0,
              frozen=False), width or channels


def default_view(name, kind, planes) -> str:
  if f"{name}_volume" in schema.VIEWS:
    return f"{name}_volume"
  return "three_frames" if kind == "resnet" and planes == 3 else "ed_volume" if kind == "slow_resnet" else "cine_slice"


# ---- projection heads

def projection(modules, widths, found, path) -> dict:
  """config.model.projection, which all towers share: as in the file, or, where it has none, the identity."""
  heads = {name: modules.get(f"head_{name}", {}) for name in widths}
  if strange := sorted(found.theirs[f"{module}.{key}"] for module in modules if module.startswith("head_")
                       and module.removeprefix("head_") not in widths for key in modules[module]):
    raise UserError(f"{path} has {', '.join(strange[:5])}, a projection head of no encoder in it; leave it out with --ignore=REGEX")
  if not any(heads.values()):
    width = max(widths.values())
    for name in widths:
      found.fresh.update({f"head_{name}/fc1/kernel": "(1, -1)", f"head_{name}/fc1/bias": "0", f"head_{name}/fc2/kernel": "(1, -1)",
                          f"head_{name}/fc2/bias": "0"})
    found.notes.append("no projection head in the file: the projections are the embeddings as they are")
    return dict(hidden=2 * width, width=width, norm=False)
  sizes = {}
  for name, keys in heads.items():
    if keys:
      norm = any(key.startswith(("layers.1.", "layers.4.")) for key in keys)
      last = "layers.3.weight" if norm else "layers.2.weight"
      sizes[name] = dict(hidden=len(keys.get("layers.0.weight", ())), width=len(keys.get(last, ())), norm=norm)
  if len({tuple(size.values()) for size in sizes.values()}) > 1:
    raise UserError(f"{path} has projection heads of different sizes ({', '.join(f'{name} {size}' for name, size in sizes.items())}), "
                    "one run has them alike; convert one tower at a time with --tower=NAME")
  size = next(iter(sizes.values()))
  found.notes.append(f"projection heads of {', '.join(sizes)}: {size['hidden']} to {size['width']}{', with batch norm' if size['norm'] else ''}")
  return size
