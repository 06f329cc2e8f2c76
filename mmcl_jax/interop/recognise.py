"""The config of the model that a state dict is of, told by its keys and shapes."""

import collections
import re
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mmcl_jax import configuration
from mmcl_jax.data import schema
from mmcl_jax.errors import UserError
from mmcl_jax.interop.modules import LAYOUTS, OF_ECG, Modules, Options, split
from mmcl_jax.models import vit
from mmcl_jax.models.resnet import Bottleneck
from mmcl_jax.models.towers import resnet, slow_resnet

L = len(schema.LEADS)
MAX_DEPTH, MAX_WIDTH = 200, 16384  # beyond them it is no model but a way to take memory
# Width and blocks -> attention heads, of published encoders: our sizes; MMCL's and CardiacNets'
# small, medium, big and huge (ECGEncoder.py); timm's ViT-Ti and ViT-S. The same of decoders: ours,
# and that of MMCL's big.
HEADS = {(size["width"], size["depth"]): size["heads"] for size in vit.SIZES.values()} | {
  (512, 4): 8,
  (640, 6): 8,
  (768, 8): 8,
  (1280, 32): 16,
  (192, 12): 3,
  (384, 12): 6,
}
DECODER_HEADS = {size["decoder"][:2]: size["decoder"][2] for size in vit.SIZES.values()} | {
  (256, 4): 8,
  (512, 8): 16,
}


class Recognised(NamedTuple):
  """What a state dict is recognised as.

  Attributes:
    config: of the model.
    samples: of an ECG.
    modules: the arrays that are to become its variables.
    fresh: paths of parameters that the file does not have -> what they are set to.
    troubles: what makes it unusable.
    notes: lines for the user.
    covariates: how many the ECG encoder takes (FiLM).
  """

  config: ConfigDict
  samples: int
  modules: Modules
  fresh: dict[str, str]
  troubles: list[str]
  notes: list[str]
  covariates: int = 0


def recognise(
  state: dict[str, np.ndarray], metadata: dict[str, str], options: Options, path
) -> Recognised:
  """Raises UserError where no layout is known, or where the user must say more."""
  c = configuration.defaults(batch=32, steps=1)
  modules = split(state, options, path)
  recognised = Recognised(c.model, options.samples or c.data.samples, modules, {}, [], [])
  widths = {}
  for module, kind in modules.kinds.items():
    if kind in OF_ECG:
      of_kind = ecg if kind == "ecg_vit" else st_mem
      spec, samples, width = of_kind(recognised, metadata, options)
      widths["ecg"] = width
      c.model.towers.ecg = {"fn": kind, "view": "ecg", **spec}
      covariates = last_axis(modules.arrays["ecg"], r"^fcs\.0\.weight$")
      recognised = recognised._replace(samples=samples, covariates=covariates)
    else:
      name = module.removeprefix("cmr_")
      spec, widths[name] = cmr(recognised, kind, name, options)
      c.model.towers[name] = spec
  c.model.projection.update(projection(recognised, widths, path))
  return recognised


def common(values, default):
  """The most frequent value: one misshapen array must not decide how all others are read."""
  counts = collections.Counter(values)
  if not counts:
    return default
  ((value, _),) = counts.most_common(1)
  return value


def last_axis(keys, regex: str) -> int:
  """The length of the last axis that most keys of this form have; 0: there is none."""
  lengths = []
  for key, x in keys.items():
    if x.ndim and re.search(regex, key):
      lengths.append(x.shape[-1])
  return common(lengths, 0)


def count(keys, regex: str) -> int:
  """One more than the largest number that the regex's group finds."""
  total = 0
  for key in keys:
    if match := re.search(regex, key):
      number = int(match[1][:9])
      total = max(total, number + 1)
  if total > MAX_DEPTH:
    raise UserError(f"the file numbers {total} blocks; expected at most {MAX_DEPTH}")
  return total


# ---- the ECG encoder


def ecg(recognised: Recognised, metadata, options: Options) -> tuple[dict, int, int]:
  """Config of the ECG tower, its samples, the width that its projection head sees. Takes out what
  are fixed tables."""
  keys = recognised.modules.arrays["ecg"]
  decodes = any(key.startswith(("decoder_", "mask_token")) for key in keys)
  width, depth, heads = transformer(
    keys,
    "",
    r"cls_token|pos_embed|norm\.weight|fc_norm\.weight",
    options,
    metadata,
  )
  size = {"width": width, "depth": depth, "heads": heads}
  if decodes:
    size["decoder"] = transformer(
      keys,
      "decoder_",
      r"decoder_embed\.bias|mask_token|decoder_norm\.weight",
      options,
      metadata,
    )
    recognised.notes.append(
      "mask ratio 0.8, which the file does not say (config.model.towers.ecg.mask_ratio)"
    )
  named = named_size(size)
  patch = last_axis(keys, r"^patch_embed\.proj\.weight$")
  patch = patch or last_axis(keys, r"^decoder_pred\.bias$") or 100
  spec = {
    "size": named or size,
    "patch": patch,
    "mask_ratio": 0.8 if decodes else 0.0,
    "head": 0,
  }
  spec["positions"], samples = positions(recognised, width, patch, options)
  if "decoder_pos_embed" in keys:
    decoder_positions(recognised, size["decoder"][0])
  spec["pool"] = pooling(recognised, decodes, options)
  if "fcs.0.weight" in keys:
    spec |= {"film": True, "film_after": True}
    covariates = last_axis(keys, "fcs.0.weight")
    recognised.notes.append(
      f"its tokens are modulated by {covariates} covariates, standardised, in the file's order"
    )
  if "head.weight" in keys:
    spec |= timm_head(recognised, spec["pool"])
  recognised.notes.insert(0, ecg_note(spec, size, samples))
  if spec.get("head_norm"):
    recognised.notes.append(
      "its head sees the embedding through fc_norm once more, as in MMCL's code for fine-tuning"
    )
  return spec, samples, spec["head"] or width


def timm_head(recognised: Recognised, pool: str) -> dict:
  """head and head_norm of the ECG tower whose file has timm's `head`."""
  keys = recognised.modules.arrays["ecg"]
  width = len(keys["head.weight"])
  projection_head = recognised.modules.arrays.get("head_ecg", {})
  first = projection_head.get("layers.0.weight")
  if first is not None and first.shape[-1] != width:
    # as in MMCL
    recognised.modules.ignore("ecg", "head., which the projection head passes by", "head.")
    return {}
  fine_tuned = not projection_head and "fcs.0.weight" not in keys
  return {"head": width, "head_norm": pool == "attention" and fine_tuned}


def ecg_note(spec: dict, size: dict, samples: int) -> str:
  """What the user is told of the ECG encoder."""
  architecture, decoder = "ViT", ""
  if "decoder" in size:
    architecture = "MAE"
    decoder = ", decoder {} wide, {} blocks, {} heads".format(*size["decoder"])
  name = named_size(size) or "of its own"
  note = (
    f"ECG encoder: {architecture} with timm's keys, {size['width']} wide, {size['depth']} blocks, "
    f"{size['heads']} heads{decoder} (size {name}), patches of {spec['patch']} samples, {samples} "
    f"samples, {spec['positions']} positions, pool {spec['pool']}"
  )
  if spec["head"]:
    note += f", head {spec['head']}"
  return note


def named_size(size: dict) -> str | None:
  """The name in vit.SIZES of the size with these numbers."""
  for name, numbers in vit.SIZES.items():
    if size.items() <= numbers.items():
      return name
  return None


def transformer(keys, prefix: str, others: str, options: Options, metadata) -> tuple[int, int, int]:
  """Width, depth and heads of the blocks under a prefix; `others` are further keys that are as wide
  as they.

  A fused qkv does not tell its heads: they are given, told by the metadata of our own files, or
  those of the published encoder of this width and depth. Of the width alone they would be a guess:
  768 has 12 heads in ViT-B, 8 in MMCL's big.
  """
  of_blocks = rf"{prefix}blocks\.\d+\.(norm1|norm2|attn\.proj)\.(weight|bias)"
  width = last_axis(keys, rf"^({others}|{of_blocks})$")
  if not 0 < width <= MAX_WIDTH or width % 4:
    raise UserError(
      f"{prefix}blocks are {width} wide; expected a multiple of 4 (sin-cos positions), at most "
      f"{MAX_WIDTH}"
    )
  what, flag, published = "encoder", "heads", HEADS
  if prefix:
    what, flag, published = "decoder", "decoder_heads", DECODER_HEADS
  depth = count(keys, rf"^{prefix}blocks\.(\d+)\.")
  stated = getattr(options, flag) or stated_heads(metadata, flag)
  heads = stated or published.get((width, depth))
  if not heads:
    sizes = []
    for (wide, blocks), number in sorted(published.items()):
      sizes.append(f"{wide} wide, {blocks} blocks: {number}")
    raise UserError(
      f"the weights do not tell how many attention heads {depth} blocks of a width of {width} "
      f"have, and no published {what} has this width and depth ({'; '.join(sizes)}); give it with "
      f"--{flag}=, in Python {flag}="
    )
  if heads < 1 or width % heads:
    raise UserError(f"{flag} is {heads}, which does not divide the width of {width}")
  return width, depth, heads


def stated_heads(metadata, flag: str) -> int:
  """Heads as our own files state them; 0 where they do not."""
  text = metadata.get(flag, "")
  return int(text) if re.fullmatch(r"\d{1,4}", text) else 0


def st_mem(recognised: Recognised, metadata, options: Options) -> tuple[dict, int, int]:
  """`ecg` of ST-MEM's encoder. Its heads are 64 wide; the decoder of a whole autoencoder is left
  out."""
  recognised.modules.ignore(
    "ecg",
    "ST-MEM's decoder, which works lead by lead",
    "to_decoder_embedding.",
    "mask_embedding",
    "decoder_",
  )
  keys = recognised.modules.arrays["ecg"]
  width = last_axis(keys, r"^(sep_embedding|lead_embeddings\.\d+|norm\.weight)$")
  heads = options.heads or stated_heads(metadata, "heads") or width // 64
  if not 0 < width <= MAX_WIDTH or not heads or width % heads:
    raise UserError(
      f"ST-MEM's blocks are {width} wide with {heads} heads; expected heads that divide a width of "
      f"at most {MAX_WIDTH}, give them with --heads="
    )
  depth = count(keys, r"^block(\d+)\.")
  patch = last_axis(keys, r"^to_patch_embedding\.2\.weight$")
  x, columns = keys.get("pos_embedding"), 0
  if x is not None and x.ndim == 3:
    columns = x.shape[1] - 2
  if columns < 1 or not patch:
    raise UserError(
      "ST-MEM's pos_embedding is not (1, 2 + patches of a lead, width), or "
      "to_patch_embedding.2.weight is missing; was the file cut off?"
    )
  samples = columns * patch
  if options.samples not in (None, samples):
    raise UserError(
      f"ST-MEM's encoder has positions for {samples} samples, --samples={options.samples} are "
      "others"
    )
  size = {"width": width, "depth": depth, "heads": heads}
  named = named_size(size)
  head = len(keys["head.weight"]) if "head.weight" in keys else 0
  note = (
    f"ECG encoder: ST-MEM, {width} wide, {depth} blocks, {heads} heads (size "
    f"{named or 'of its own'}), patches of {patch} samples, {samples} samples"
  )
  recognised.notes.append(f"{note}, head {head}" if head else note)
  spec = {"size": named or size, "patch": patch, "head": head}
  return spec, samples, head or width


def table(columns: int, width: int) -> np.ndarray:
  """Fixed positions with those of the CLS token, which are 0: [1, 1 + L columns, width]."""
  of_patches = vit.sincos_2d(L, columns, width)
  return np.pad(of_patches, ((1, 0), (0, 0)))[None]


def has_positions(x, width: int) -> bool:
  """Is x [1, 1 + L n, width]?"""
  if x.ndim != 3:
    return False
  count, length, last = x.shape
  return count == 1 and last == width and length > L and length % L == 1


def is_table(x, width: int) -> bool:
  """Is x the fixed table, to 1e-5?"""
  if not has_positions(x, width):
    return False
  fixed = table(x.shape[1] // L, width)
  return np.abs(x - fixed).max() < 1e-5


def positions(recognised: Recognised, width: int, patch: int, options: Options) -> tuple[str, int]:
  """ "sincos" or "learned", and how many samples the encoder sees."""
  keys = recognised.modules.arrays["ecg"]
  theirs = recognised.modules.theirs
  x = keys.get("pos_embed")
  if x is None or not has_positions(x, width):
    what = "missing: pos_embed"
    if x is not None:
      what = f"of another shape: {theirs['ecg.pos_embed']} {x.shape}"
    recognised.troubles.append(f"{what}, expected (1, 1 + {L} n, {width})")
    keys.pop("pos_embed", None)
    return "sincos", 50 * patch
  samples = x.shape[1] // L * patch
  if is_table(x, width):
    del keys["pos_embed"]
    return "sincos", options.samples or samples
  if options.samples not in (None, samples):
    raise UserError(
      f"the encoder has learned positions for {samples} samples, --samples={options.samples} are "
      "others; convert it as it is, and let config.init_from interpolate them for a later stage"
    )
  recognised.notes.append(
    "positions of its own (trained): a later stage takes them with "
    "--config.model.towers.ecg.positions=learned"
  )
  return "learned", samples


def decoder_positions(recognised: Recognised, width: int) -> None:
  """Takes the decoder's fixed table out."""
  modules = recognised.modules
  x = modules.arrays["ecg"].pop("decoder_pos_embed")
  if not is_table(x, width):
    recognised.troubles.append(
      f"of another value: {modules.theirs['ecg.decoder_pos_embed']} {x.shape}, expected the "
      f"fixed sin-cos table of (1, 1 + {L} n, {width}), the only one that the decoder has"
    )


def pooling(recognised: Recognised, decodes: bool, options: Options) -> str:
  """mean, attention or cls; takes out what that does not use."""
  keys = recognised.modules.arrays["ecg"]
  ignore = recognised.modules.ignore

  def has(beginning):
    return any(key.startswith(beginning) for key in keys)

  pool = "mean"
  if has("attention_pool."):
    pool = "attention"
  elif "head.weight" in keys and not has("fc_norm.") and not decodes:
    pool = "cls"
  pool = options.pool or pool
  if pool == "cls":
    ignore("ecg", "the pooling that --pool=cls does not use", "fc_norm.", "attention_pool.")
    return pool
  if not decodes:
    ignore("ecg", f"norm of the CLS token, which {pool} pooling does not use", "norm.")
  if pool == "mean":
    ignore("ecg", "the pooling that --pool=mean does not use", "attention_pool.")
  if not has("fc_norm."):
    recognised.fresh.update({"ecg/fc_norm/scale": "1", "ecg/fc_norm/bias": "0"})
    recognised.notes.append(
      f"fc_norm is not in the file: identity after {pool} pooling (--pool=cls takes the CLS token "
      "instead)"
    )
  return pool


# ---- CMR encoders


def cmr(recognised: Recognised, kind: str, name: str, options: Options) -> tuple[dict, int]:
  """Config of a CMR tower, and the width of its embedding."""
  keys = recognised.modules.arrays[f"cmr_{name}"]
  slow = kind == "slow_resnet"
  if slow:
    stem, axes, channels = "blocks.0.conv.weight", 5, 1
    first = r"blocks\.{}\.res_blocks\.\d+\.branch2\.(conv_a|norm_a)\."
  else:
    stem, axes, channels = "conv1.weight", 4, 3
    first = r"layer{}\.\d+\.(conv1|bn1)\."
  size = match_size(keys, slow, stem, first, name)
  x = keys.get(stem)
  if x is not None and x.ndim == axes:
    channels = x.shape[1]
  planes = channels
  if slow:
    if channels > 1:
      keys[stem] = x.sum(axis=1, keepdims=True)
      recognised.notes.append(
        f"cmr_{name}: the stem's {channels} input channels are summed to one, the same for a grey "
        "image"
      )
    planes = slices(recognised, name)
  numbers = (slow_resnet.SIZES if slow else resnet.SIZES)[size]
  view = options.view or default_view(name, slow, planes)
  if view not in schema.VIEWS:
    raise UserError(f"--view={view}; expected one of {', '.join(schema.VIEWS)}")
  features = numbers["widths"][-1]
  if numbers["block"] is Bottleneck:
    features *= 4
  width = last_axis(keys, r"^fc\.bias$")
  if not width and "fc.weight" in keys:
    width = len(keys["fc.weight"])
  layout, _ = LAYOUTS[kind]
  what = "slices" if slow else "channels"
  note = (
    f"CMR encoder {name}: {layout}, size {size}, {planes} {what} seen of the view {view}, "
    f"{features} features"
  )
  recognised.notes.append(f"{note}, a Linear to {width} after them" if width else note)
  spec = {
    "fn": kind,
    "size": size,
    "view": view,
    "planes": planes,
    "width": width,
    "frozen": False,
  }
  return spec, width or features


def slices(recognised: Recognised, name: str) -> int:
  """How many slices a slow ResNet sees; without its Linear over them it takes their mean."""
  keys = recognised.modules.arrays[f"cmr_{name}"]
  pool = keys.get("temporal_mlp.weight")
  planes = 6
  if pool is not None and pool.ndim == 2:
    planes = pool.shape[-1]
  if not any(key.startswith("temporal_mlp.") for key in keys):
    recognised.fresh[f"cmr_{name}/backbone/slice_pool/kernel"] = "1 / planes"
    recognised.fresh[f"cmr_{name}/backbone/slice_pool/bias"] = "0"
    recognised.notes.append(
      f"cmr_{name}: the Linear over slices is not in the file: the mean over {planes} of them"
    )
  return planes


def match_size(keys, slow: bool, stem: str, first: str, name: str) -> str:
  """The size (SIZES of resnet or slow_resnet) with this stem, kind of block and widths of stages.

  Args:
    stem: key of the first convolution.
    first: regex, with the stage to be filled in, of the layers that are as wide as their stage.
  """
  sizes = resnet.SIZES
  stages = count(keys, r"^layer(\d+)\.")
  if slow:
    sizes = slow_resnet.SIZES
    stages = count(keys, r"^blocks\.(\d+)\.")
  widths = []
  for stage in range(1, stages):
    of_stage = re.compile(first.format(stage))
    lengths = [x.shape[0] for key, x in keys.items() if of_stage.match(key) and x.ndim]
    widths.append(common(lengths, 0))
  channels = len(keys[stem]) if stem in keys and keys[stem].ndim else 0
  bottleneck = slow or any(re.match(r"layer\d\.\d+\.conv3\.", key) for key in keys)
  described = []
  for size, numbers in sizes.items():
    same_block = (numbers["block"] is Bottleneck) == bottleneck
    same_stem = channels in (0, numbers["stem"])
    if same_block and same_stem and list(numbers["widths"]) == widths:
      return size
    channels_of_size = numbers["stem"], *numbers["widths"]
    described.append(f"{size}: {', '.join(map(str, channels_of_size))}")
  blocks = "bottleneck" if bottleneck else "basic"
  raise UserError(
    f"the encoder {name} has a stem of {channels} channels, {blocks} blocks and stages of "
    f"{', '.join(map(str, widths)) or 'no'} channels; expected one of these sizes: "
    f"{'; '.join(described)}"
  )


def default_view(name: str, slow: bool, planes: int) -> str:
  if f"{name}_volume" in schema.VIEWS:
    return f"{name}_volume"
  if slow:
    return "ed_volume"
  return "three_frames" if planes == 3 else "cine_slice"


# ---- projection heads


def projection(recognised: Recognised, widths: dict[str, int], path) -> dict:
  """config.model.projection, which all towers share: as in the file, or, where it has no head, the
  identity.

  Args:
    widths: tower -> width of what its head sees.
  """
  arrays = recognised.modules.arrays
  strange = []
  for module, keys in arrays.items():
    if module.startswith("head_") and module.removeprefix("head_") not in widths:
      strange += [recognised.modules.theirs[f"{module}.{key}"] for key in keys]
  if strange:
    raise UserError(
      f"{path} has {', '.join(sorted(strange)[:5])}, a projection head of no encoder in it; leave "
      "it out with --ignore=REGEX"
    )
  sizes = {}
  for name in widths:
    if keys := arrays.get(f"head_{name}"):
      sizes[name] = head_size(keys)
  if not sizes:
    width = max(widths.values())
    for name in widths:
      for layer in ("fc1", "fc2"):
        recognised.fresh[f"head_{name}/{layer}/kernel"] = "(1, -1)"
        recognised.fresh[f"head_{name}/{layer}/bias"] = "0"
    recognised.notes.append(
      "no projection head in the file: the projections are the embeddings as they are"
    )
    return dict(hidden=2 * width, width=width, norm=False)
  own = sizes.get("ecg")
  of_cmr = [size for name, size in sizes.items() if name != "ecg"]
  size, *others = of_cmr or [own]
  ecg_differs = False
  if own is not None:
    ecg_differs = own | {"hidden": size["hidden"]} != size
  if ecg_differs or any(other != size for other in others):
    shown = []
    for name, head in sizes.items():
      norm = ", batch norm" if head["norm"] else ""
      shown.append(f"{name} {head['hidden']}, {head['width']}{norm}")
    raise UserError(
      f"{path} has projection heads of different sizes ({', '.join(shown)}), and one run has them "
      "alike, but for the hidden width of the ECG's; convert one tower at a time with --tower=NAME"
    )
  shown = [f"{name} {head['hidden']} to {head['width']}" for name, head in sizes.items()]
  norm = ", with batch norm" if size["norm"] else ""
  recognised.notes.append(f"projection heads: {'; '.join(shown)}{norm}")
  ecg_hidden = own["hidden"] if own and own != size else 0
  return size | {"ecg_hidden": ecg_hidden}


def head_size(keys) -> dict:
  norm = any(key.startswith(("layers.1.", "layers.4.")) for key in keys)

  def rows(key):
    if key in keys and keys[key].ndim:
      return len(keys[key])
    return 1

  return dict(
    hidden=rows("layers.0.weight"),
    width=rows("layers.3.weight" if norm else "layers.2.weight"),
    norm=norm,
  )
