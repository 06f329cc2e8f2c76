"""Plain PyTorch models with the published key names, written from the architectures' descriptions:
the tests' oracle.

ViT: timm's keys (Dosovitskiy et al. 2021), pooled as MMCL does (Turgut et al. 2025).
MaskedAutoencoder: He et al. 2022.
ResNet: torchvision's keys (He et al. 2016, stride on the 3x3). SlowResNet: PyTorchVideo's keys
(Feichtenhofer et al. 2019), pooled over slices as the dual-phase system does (Alvarez-Florez et al.
2026). Head: lightly's SimCLR projection head. Losses by the formulas of these papers.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

LEADS = 12


def sincos(rows, columns, width):
  """Fixed positions [1, 1 + rows * columns, width], zeros for CLS; half the width for the column,
  half for the row.

  As in MAE's and MMCL's code, where the column's half is the first.
  """
  frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))

  def encode(position):
    return torch.cat(
      [torch.sin(position[:, None] * frequency), torch.cos(position[:, None] * frequency)], dim=1
    )

  row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
  column = torch.arange(columns, dtype=torch.float64).repeat(rows)
  table = torch.cat([encode(column), encode(row)], dim=1)
  return torch.cat([torch.zeros(1, width, dtype=torch.float64), table])[None]


class Attention(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.qkv = nn.Linear(width, 3 * width)
    self.proj = nn.Linear(width, width)

  def forward(self, x):
    B, N, D = x.shape
    q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / math.sqrt(D // self.heads)).softmax(dim=-1)
    return self.proj((weights @ v).transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.fc1 = nn.Linear(width, 4 * width)
    self.fc2 = nn.Linear(4 * width, width)

  def forward(self, x):
    return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.norm1 = nn.LayerNorm(width, eps=1e-6)
    self.attn = Attention(width, heads)
    self.norm2 = nn.LayerNorm(width, eps=1e-6)
    self.mlp = Mlp(width)

  def forward(self, x):
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
  def __init__(self, width, patch):
    super().__init__()
    self.proj = nn.Conv2d(1, width, (1, patch), (1, patch))

  def forward(self, ecg):
    """ecg [B, L, T] -> [B, L * T / patch, D], lead by lead."""
    return self.proj(ecg[:, None]).flatten(2).mT


class ViT(nn.Module):
  """pool: mean | attention | cls. norms: which of `norm` and `fc_norm` it has; what pooling does not use is idle."""

  def __init__(
    self,
    width,
    depth,
    heads,
    patch,
    samples,
    pool="mean",
    norms=("fc_norm",),
    head=0,
    trained=False,
    covariates=0,
  ):
    super().__init__()
    self.pool = pool
    if covariates:  # CardiacNets' modulation
      self.fcs = nn.Sequential(nn.Linear(covariates, 2 * width), nn.ReLU())
    self.patch_embed = PatchEmbed(width, patch)
    self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
    self.pos_embed = nn.Parameter(sincos(LEADS, samples // patch, width))
    if trained:  # no longer the fixed table
      self.pos_embed.data += 0.1 * torch.randn(self.pos_embed.shape)
    self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
    if pool == "attention":
      self.attention_pool = nn.MultiheadAttention(width, heads, batch_first=True)
    for name in norms:
      setattr(self, name, nn.LayerNorm(width, eps=1e-6))
    if head:
      self.head = nn.Linear(width, head)

  def tokens(self, ecg, covariates=None):
    x = self.patch_embed(ecg)
    x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
    for block in self.blocks:
      x = block(x)
    if covariates is not None:
      gain, shift = self.fcs(covariates)[:, None].chunk(2, dim=2)
      x = gain * x + shift
    return x

  def embed(self, tokens):
    if self.pool == "cls":
      return self.norm(tokens)[:, 0]
    x = tokens[:, 1:]
    if self.pool == "attention":
      x = self.attention_pool(x.mean(dim=1, keepdim=True), x, x)[0]
    x = x.mean(dim=1)
    return self.fc_norm(x) if hasattr(self, "fc_norm") else F.layer_norm(x, x.shape[-1:], eps=1e-6)

  def forward(self, ecg):
    """embedding [B, D]."""
    return self.embed(self.tokens(ecg))


class MaskedAutoencoder(ViT):
  def __init__(self, width, depth, heads, patch, samples, decoder, norms=("norm",)):
    super().__init__(width, depth, heads, patch, samples, norms=norms)
    decoder_width, decoder_depth, decoder_heads = decoder
    self.decoder_embed = nn.Linear(width, decoder_width)
    self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
    self.decoder_pos_embed = nn.Parameter(
      sincos(LEADS, samples // patch, decoder_width), requires_grad=False
    )
    self.decoder_blocks = nn.ModuleList(
      [Block(decoder_width, decoder_heads) for _ in range(decoder_depth)]
    )
    self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
    self.decoder_pred = nn.Linear(decoder_width, patch)

  def reconstruct(self, ecg, keep):
    """keep [B, M]: the visible patches, in any order. Returns [B, L, T]."""
    B = len(ecg)
    x = self.patch_embed(ecg) + self.pos_embed[:, 1:]
    N = x.shape[1]
    x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))
    x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1), x], dim=1)
    for block in self.blocks:
      x = block(x)
    x = self.decoder_embed(self.norm(x))
    patches = self.mask_token.expand(B, N, -1).scatter(
      1, keep[:, :, None].expand(-1, -1, x.shape[2]), x[:, 1:]
    )
    x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
    for block in self.decoder_blocks:
      x = block(x)
    return self.decoder_pred(self.decoder_norm(x))[:, 1:].reshape(B, LEADS, -1)


class PreNorm(nn.Module):
  def __init__(self, width, fn):
    super().__init__()
    self.norm = nn.LayerNorm(width)
    self.fn = fn

  def forward(self, x):
    return self.fn(self.norm(x))


class StMemAttention(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.to_qkv = nn.Linear(width, 3 * width)
    self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

  def forward(self, x):
    q, k, v = (
      part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.to_qkv(x).chunk(3, dim=2)
    )
    return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class StMemMlp(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.net = nn.Sequential(
      nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.0), nn.Linear(4 * width, width)
    )

  def forward(self, x):
    return self.net(x)


class StMem(nn.Module):
  """ST-MEM's encoder (Na et al. 2024), by its keys: every lead between two separators, and told by
  an embedding."""

  def __init__(self, width, depth, heads, patch, samples, head=0):
    super().__init__()
    self.depth, self.patch = depth, patch
    self.to_patch_embedding = nn.Sequential(
      nn.Identity(), nn.LayerNorm(patch), nn.Linear(patch, width), nn.LayerNorm(width)
    )
    self.pos_embedding = nn.Parameter(torch.zeros(1, samples // patch + 2, width))
    self.sep_embedding = nn.Parameter(torch.zeros(width))
    self.lead_embeddings = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(LEADS))
    for i in range(depth):
      block = nn.Module()
      block.attn, block.ff = (
        PreNorm(width, StMemAttention(width, heads)),
        PreNorm(width, StMemMlp(width)),
      )
      self.add_module(f"block{i}", block)
    self.norm = nn.LayerNorm(width)
    if head:
      self.head = nn.Linear(width, head)

  def tokens(self, ecg):
    """ecg [B, L, T] -> of the patches [B, N, D], lead by lead."""
    leads = []
    for i, lead in enumerate(ecg.unbind(1)):
      x = self.to_patch_embedding(lead.unflatten(1, (-1, self.patch)))
      separator = self.sep_embedding.expand(len(x), 1, -1)
      leads.append(
        torch.cat([separator, x, separator], dim=1) + self.pos_embedding + self.lead_embeddings[i]
      )
    x = torch.cat(leads, dim=1)
    for i in range(self.depth):
      block = getattr(self, f"block{i}")
      x = x + block.attn(x)
      x = x + block.ff(x)
    return torch.cat([lead[:, 1:-1] for lead in x.chunk(LEADS, dim=1)], dim=1)

  def forward(self, ecg):
    """embedding [B, D]."""
    return self.norm(self.tokens(ecg).mean(dim=1))


class Bottleneck(nn.Module):
  def __init__(self, into, width, stride):
    super().__init__()
    out = 4 * width
    self.conv1 = nn.Conv2d(into, width, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
    self.bn2 = nn.BatchNorm2d(width)
    self.conv3 = nn.Conv2d(width, out, 1, bias=False)
    self.bn3 = nn.BatchNorm2d(out)
    if stride > 1 or into != out:
      self.downsample = nn.Sequential(
        nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)
      )

  def forward(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    y = F.relu(self.bn2(self.conv2(y)))
    return F.relu(
      self.bn3(self.conv3(y)) + (self.downsample(x) if hasattr(self, "downsample") else x)
    )


class Basic(nn.Module):
  def __init__(self, into, width, stride):
    super().__init__()
    self.conv1 = nn.Conv2d(into, width, 3, stride, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
    self.bn2 = nn.BatchNorm2d(width)
    if stride > 1 or into != width:
      self.downsample = nn.Sequential(
        nn.Conv2d(into, width, 1, stride, bias=False), nn.BatchNorm2d(width)
      )

  def forward(self, x):
    y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
    return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class ResNet(nn.Module):
  """stages: (width, blocks) each; classes 0: no fc."""

  def __init__(self, stem, block, stages, channels=3, classes=0):
    super().__init__()
    self.conv1 = nn.Conv2d(channels, stem, 7, 2, 3, bias=False)
    self.bn1 = nn.BatchNorm2d(stem)
    self.relu = nn.ReLU()
    self.maxpool = nn.MaxPool2d(3, 2, 1)
    into, self.depth = stem, len(stages)
    for i, (width, blocks) in enumerate(stages):
      layers = []
      for j in range(blocks):
        layers.append(block(into, width, 2 if i and not j else 1))
        into = width * (4 if block is Bottleneck else 1)
      setattr(self, f"layer{i + 1}", nn.Sequential(*layers))
    self.avgpool = nn.AdaptiveAvgPool2d(1)
    if classes:
      self.fc = nn.Linear(into, classes)

  def forward(self, image):
    x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
    for i in range(self.depth):
      x = getattr(self, f"layer{i + 1}")(x)
    x = self.avgpool(x).flatten(1)
    return self.fc(x) if hasattr(self, "fc") else x

  def sequential(self):
    """The children in nn.Sequential, without fc: conv1 is `0`, bn1 `1`, layer1 to layer4 `4` to
    `7`."""
    return nn.Sequential(*(child for name, child in self.named_children() if name != "fc"))


def conv3d(into, out, span=1, side=1, stride=1):
  return nn.Conv3d(
    into,
    out,
    (span, side, side),
    (1, stride, stride),
    (span // 2, side // 2, side // 2),
    bias=False,
  )


class Stem(nn.Module):
  def __init__(self, channels, width):
    super().__init__()
    self.conv = conv3d(channels, width, side=7, stride=2)
    self.norm = nn.BatchNorm3d(width)

  def forward(self, x):
    return F.max_pool3d(F.relu(self.norm(self.conv(x))), (1, 3, 3), (1, 2, 2), (0, 1, 1))


class Branch2(nn.Module):
  def __init__(self, into, width, stride, span):
    super().__init__()
    self.conv_a = conv3d(into, width, span=span)
    self.norm_a = nn.BatchNorm3d(width)
    self.conv_b = conv3d(width, width, side=3, stride=stride)
    self.norm_b = nn.BatchNorm3d(width)
    self.conv_c = conv3d(width, 4 * width)
    self.norm_c = nn.BatchNorm3d(4 * width)

  def forward(self, x):
    x = F.relu(self.norm_b(self.conv_b(F.relu(self.norm_a(self.conv_a(x))))))
    return self.norm_c(self.conv_c(x))


class ResBlock(nn.Module):
  def __init__(self, into, width, stride, span):
    super().__init__()
    if stride > 1 or into != 4 * width:
      self.branch1_conv = conv3d(into, 4 * width, stride=stride)
      self.branch1_norm = nn.BatchNorm3d(4 * width)
    self.branch2 = Branch2(into, width, stride, span)

  def forward(self, x):
    skip = self.branch1_norm(self.branch1_conv(x)) if hasattr(self, "branch1_conv") else x
    return F.relu(skip + self.branch2(x))


class ResStage(nn.Module):
  def __init__(self, into, width, blocks, stride, span):
    super().__init__()
    self.res_blocks = nn.ModuleList(
      [ResBlock(4 * width if j else into, width, 1 if j else stride, span) for j in range(blocks)]
    )

  def forward(self, x):
    for block in self.res_blocks:
      x = block(x)
    return x


class SlowResNet(nn.Module):
  """stages: (width, blocks, span) each; slices 0: the mean over slices; fc 0: none; volumes in [-1,
  1]."""

  def __init__(self, stem, stages, channels=1, slices=0, fc=0):
    super().__init__()
    blocks, into = [Stem(channels, stem)], stem
    for i, (width, depth, span) in enumerate(stages):
      blocks.append(ResStage(into, width, depth, 2 if i else 1, span))
      into = 4 * width
    self.blocks = nn.ModuleList(blocks)
    if slices:
      self.temporal_mlp = nn.Linear(slices, 1)
    if fc:
      self.fc = nn.Linear(into, fc)

  def forward(self, volume):
    """volume [B, channels, Z, H, W] -> [B, F]."""
    for block in self.blocks:
      volume = block(volume)
    x = volume.mean(dim=(3, 4))
    x = self.temporal_mlp(x)[..., 0] if hasattr(self, "temporal_mlp") else x.mean(dim=2)
    return self.fc(x) if hasattr(self, "fc") else x


class Head(nn.Module):
  """Linear - ReLU - Linear; norm: batch norm after each Linear, which then have no bias."""

  def __init__(self, into, hidden, width, norm=False):
    super().__init__()
    normed = [
      nn.Linear(into, hidden, bias=False),
      nn.BatchNorm1d(hidden),
      nn.ReLU(),
      nn.Linear(hidden, width, bias=False),
      nn.BatchNorm1d(width),
    ]
    self.layers = nn.Sequential(
      *(normed if norm else [nn.Linear(into, hidden), nn.ReLU(), nn.Linear(hidden, width)])
    )

  def forward(self, x):
    return self.layers(x)


def randomise(model, seed=0):
  """Draws every parameter and statistic anew, so that no fresh 0 or 1 hides a mistake; fixed tables
  stay."""
  generator = torch.Generator().manual_seed(seed)

  def draw(x):
    return torch.randn(x.shape, generator=generator, dtype=torch.float64)

  with torch.no_grad():
    for name, x in model.state_dict().items():
      if name.endswith("pos_embed") or not x.is_floating_point():
        continue
      if name.endswith("running_var") or x.ndim == 1 and name.endswith("weight"):
        x.copy_(1 + 0.3 * torch.tanh(draw(x)))
      else:
        x.copy_(draw(x) / (math.sqrt(x[0].numel()) if x.ndim > 1 else 5))
  return model


# ---- losses


def ncc(x, y, eps):
  """Mean over recordings and leads of 1 / (T - 1) sum_t zscore(x)_t zscore(y)_t; x, y [B, L, T]."""

  def z(a):
    return (a - a.mean(dim=-1, keepdim=True)) / (a.var(dim=-1, keepdim=True) + eps).sqrt()

  return ((z(x) * z(y)).sum(dim=-1) / (x.shape[-1] - 1)).mean()


def mmcl_mae_loss(x, y, weight=0.1, eps=1e-8):
  """(1 - w) mean over all patches of the squared error + w (1 - NCC)."""
  return (1 - weight) * ((x - y) ** 2).mean() + weight * (1 - ncc(x, y, eps))


def masked_mse(x, y, hidden):
  """Mean squared error of the hidden patches (He et al. 2022); hidden [B, L, T / patch]."""
  error = ((x - y) ** 2).view(*hidden.shape, -1).mean(dim=-1)
  return (error * hidden).sum() / hidden.sum()


def clip_loss(a, b, temperature, b_to_a):
  """b_to_a CE(each b among all a) + (1 - b_to_a) CE(each a among all b), of cosines over the
  temperature."""
  logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / temperature
  own = torch.arange(len(a))
  return b_to_a * F.cross_entropy(logits.T, own) + (1 - b_to_a) * F.cross_entropy(logits, own)


def three_pair_loss(ecg, ed, es, temperature, weights):
  pairs = (ecg, ed), (ecg, es), (ed, es)
  return sum(w * clip_loss(a, b, temperature, 0.5) for w, (a, b) in zip(weights, pairs)) / sum(
    weights
  )
