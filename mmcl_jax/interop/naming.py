"""Names and layouts of parameters: ours <-> timm (ViT, MAE), torchvision (ResNet), PyTorchVideo
(slow_r50), lightly.

A key has the name of its module in front (`ecg.blocks.0.attn.qkv.weight`,
`head_ecg.layers.0.weight`).

torch keeps kernels as [out, in, *window], we as [in, out] and [*window, in, out]. Our 3-D
convolutions are over the plane, [h, w, in, out], or over s slices, [s * in, out] with the slices'
channels one after the other. All of them are torch's numbers with the axes in the order *window,
in, out, and the axes of 1 left out.

Of the columns of a qkv, torch has all of the queries first, [3, heads, width], we all of the first
head, [heads, 3, width] (kernels.split_qkv).
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mmcl_jax.models import vit
from mmcl_jax.models.towers import slow_resnet


class Name(NamedTuple):
  """Where a leaf of ours stands in torch: its key, its shape there, that shape with the columns of
  a qkv as [3, heads, width], and the axes that bring this into our order."""

  key: str
  shape: tuple[int, ...]
  parts: tuple[int, ...]
  axes: tuple[int, ...]

  def to_ours(self, x: np.ndarray, shape) -> np.ndarray:
    ours = x.reshape(self.parts).transpose(self.axes)
    return np.ascontiguousarray(ours).reshape(shape)

  def to_torch(self, x: np.ndarray) -> np.ndarray:
    parts = x.reshape([self.parts[axis] for axis in self.axes])
    theirs = parts.transpose(np.argsort(self.axes))
    return np.ascontiguousarray(theirs).reshape(self.shape)


VIT = (  # timm, and MAE's decoder; attention_pool is MMCL's torch.nn.MultiheadAttention
  (r"^(decoder/)?block(\d+)/(qkv|proj)/", r"\1blocks/\2/attn/\3/"),
  (r"^(decoder/)?block(\d+)/(fc1|fc2)/", r"\1blocks/\2/mlp/\3/"),
  (r"^(decoder/)?block(\d+)/", r"\1blocks/\2/"),
  (r"^decoder/mask_token$", "mask_token"),
  (r"^decoder/", "decoder_"),
  (r"^patch_embed/", "patch_embed/proj/"),
  (r"^pool/qkv/kernel$", "attention_pool/in_proj_weight"),
  (r"^pool/qkv/bias$", "attention_pool/in_proj_bias"),
  (r"^pool/proj/", "attention_pool/out_proj/"),
  (r"^film/fc/", "fcs/0/"),  # CardiacNets
)
ST_MEM = (  # its own keys, after vit-pytorch's
  (r"^patch_norm/", "to_patch_embedding/1/"),
  (r"^patch_embed/", "to_patch_embedding/2/"),
  (r"^embed_norm/", "to_patch_embedding/3/"),
  (r"^pos_embed$", "pos_embedding"),
  (r"^sep_embed$", "sep_embedding"),
  (r"^lead_embed(\d+)$", r"lead_embeddings/\1"),
  (r"^(block\d+)/norm1/", r"\1/attn/norm/"),
  (r"^(block\d+)/qkv/", r"\1/attn/fn/to_qkv/"),
  (r"^(block\d+)/proj/", r"\1/attn/fn/to_out/0/"),
  (r"^(block\d+)/norm2/", r"\1/ff/norm/"),
  (r"^(block\d+)/fc1/", r"\1/ff/fn/net/0/"),
  (r"^(block\d+)/fc2/", r"\1/ff/fn/net/3/"),
)


def resnet_block(match: re.Match) -> str:
  """stage0_block1 -> layer1/1, by (stage, block)."""
  return f"layer{int(match[1]) + 1}/{match[2]}/"


def slow_resnet_block(match: re.Match) -> str:
  """stage0_block1 -> blocks/1/res_blocks/1, by (stage, block)."""
  return f"blocks/{int(match[1]) + 1}/res_blocks/{match[2]}/"


def slow_resnet_layer(match: re.Match) -> str:
  """conv1 -> branch2/conv_a, by (kind, number)."""
  letter = "abc"[int(match[2]) - 1]
  return f"/branch2/{match[1]}_{letter}/"


RESNET = (  # torchvision
  (r"^backbone/stem/", "conv1/"),
  (r"^backbone/stem_norm/", "bn1/"),
  (r"^backbone/stage(\d+)_block(\d+)/", resnet_block),
  (r"/norm(\d)/", r"/bn\1/"),
  (r"/skip/", "/downsample/0/"),
  (r"/skip_norm/", "/downsample/1/"),
)
SLOW = (  # PyTorchVideo; temporal_mlp is the dual-phase system's Linear over slices
  (r"^backbone/stem/", "blocks/0/conv/"),
  (r"^backbone/stem_norm/", "blocks/0/norm/"),
  (r"^backbone/slice_pool/", "temporal_mlp/"),
  (r"^backbone/stage(\d+)_block(\d+)/", slow_resnet_block),
  (r"/(conv|norm)(\d)/", slow_resnet_layer),
  (r"/skip/", "/branch1_conv/"),
  (r"/skip_norm/", "/branch1_norm/"),
)
HEAD = ((r"^fc1/", "layers/0/"), (r"^fc2/", "layers/2/"))  # lightly's SimCLRProjectionHead
NORMED_HEAD = (
  (r"^fc1/", "layers/0/"),
  (r"^norm1/", "layers/1/"),
  (r"^fc2/", "layers/3/"),
  (r"^norm2/", "layers/4/"),
)
LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def names(
  shapes: dict[tuple[str, str], tuple[int, ...]], config: ConfigDict
) -> Iterator[tuple[tuple[str, str], Name]]:
  """(collection, path) -> Name, of every leaf that the layouts know.

  Not known: read-outs of phenotypes (whose names no layout holds), siamese heads, FiLM before the
  blocks, video transformers, the learned temperature.

  Args:
    shapes: (collection, path) -> shape of the model's variables.
    config: config.model.
  """
  for (collection, path), shape in shapes.items():
    module, _, rest = path.partition("/")
    kind = ""
    if module.startswith("head_"):
      kind = "head"
    elif module == "ecg" or module.startswith("cmr_"):
      kind = config.towers[module.removeprefix("cmr_")].fn
    if kind == "head":
      rules = NORMED_HEAD if config.projection.norm else HEAD
    elif kind == "ecg_vit":
      film_before = rest.startswith("film/") and not config.towers.ecg.film_after
      if rest.startswith("siamese") or film_before:
        continue
      rules = VIT
    elif kind == "st_mem":
      rules = ST_MEM
    elif kind in ("resnet", "slow_resnet"):
      rules = RESNET if kind == "resnet" else SLOW
    else:
      continue
    theirs = rest
    for pattern, text in rules:
      theirs = re.sub(pattern, text, theirs)
    *layers, leaf = theirs.split("/")
    key = ".".join([module, *layers, LEAVES.get(leaf, leaf)])
    there = torch_shape(rest, shape, config, module, kind)
    parts = there
    axes = tuple(range(len(there)))
    if rest.endswith("/kernel"):
      axes = (*axes[2:], 1, 0)
    if "/qkv/" in rest:
      heads = vit.heads_of(rest, config.towers.ecg)
      parts = (3, heads, there[0] // (3 * heads), *there[1:])
      axes = (1, 0, 2) if rest.endswith("/bias") else (3, 1, 0, 2)
    yield (collection, path), Name(key, there, parts, axes)


def torch_shape(rest: str, shape, config, module: str, kind: str) -> tuple[int, ...]:
  """The shape that torch gives to our leaf `rest` of a module."""
  if not rest.endswith("/kernel"):
    return tuple(shape)
  into, out = shape[-2:]
  if rest == "patch_embed/kernel" and kind == "ecg_vit":
    return out, 1, 1, into  # one lead, `into` samples
  if not rest.startswith("backbone/") or rest.startswith("backbone/slice_pool/"):
    return out, into
  window = shape[:-2] or (1, 1)
  if kind == "resnet":
    return out, into, *window
  span = 1
  if match := re.match(r"backbone/stage(\d+)_block\d+/conv1/", rest):
    size = config.towers[module.removeprefix("cmr_")].size
    span = slow_resnet.SIZES[size]["spans"][int(match[1])]
  return out, into // span, span, *window
