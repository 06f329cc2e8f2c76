"""The published layouts in, through files of torch.save, and out again into PyTorch with
strict=True."""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import init
from ml_collections import ConfigDict

torch = pytest.importorskip(
  "torch", reason="the tests of PyTorch weights need torch: pip install '.[torch]'"
)

import torch_models as published
from mmcl_jax import configuration, models
from mmcl_jax.errors import UserError
from mmcl_jax.projects.localisation import maps
from mmcl_jax.interop import modules, recognise, torch_weights
from mmcl_jax.models.towers import st_mem

PATCH, SAMPLES, B = 20, 100, 2
TEST = (16, 1, 2)  # vit.SIZES["test"], and its decoder
RESNET = (4, published.Basic, ((4, 1), (8, 1)))  # resnet.SIZES["test"]
SLOW = (4, ((4, 1, 3),))  # slow_resnet.SIZES["test"]


class AttributeDict(dict):
  """As Lightning keeps hyper-parameters: a dict of a class that is not here."""


def vit(norms=("fc_norm",), **options):
  return (
    published.randomise(published.ViT(*TEST, PATCH, SAMPLES, norms=norms, **options)).float().eval()
  )


def autoencoder():
  return (
    published.randomise(published.MaskedAutoencoder(*TEST, PATCH, SAMPLES, TEST)).float().eval()
  )


def image(**options):
  return published.randomise(published.ResNet(*RESNET, **options)).eval()


def volume(**options):
  return published.randomise(published.SlowResNet(*SLOW, **options)).eval()


def head(into, hidden=10, width=6, norm=False, seed=0):
  return published.randomise(published.Head(into, hidden, width, norm), seed).eval()


def prefixed(prefix, net):
  return {prefix + key: x for key, x in net.state_dict().items()}


def saved(tmp_path, tree, name="x.pth"):
  torch.save(tree, tmp_path / name)
  return tmp_path / name


def close(found, expected, bound=2e-5):
  expected = expected.detach().double().numpy()
  assert found.shape == expected.shape
  np.testing.assert_allclose(found, expected, atol=bound * np.abs(expected).max(), rtol=0)


ECG = np.random.default_rng(0).normal(size=(B, 12, SAMPLES)).astype(np.float32)
IMAGE = np.random.default_rng(1).random((B, 3, 24, 24)).astype(np.float32)
VOLUME = np.random.default_rng(2).random((B, 5, 24, 24)).astype(np.float32)


def encode_ecg(model, variables, ecg=ECG):
  return jax.jit(functools.partial(model.apply, method="encode_ecg"))(variables, ecg)


def encode_cmr(model, variables, tower, planes):
  @jax.jit
  def run(variables, planes):
    def embed(m, planes):
      embedding = m.cmr[tower].embed(m.cmr[tower].features(planes, jnp.ones(len(planes))))
      return embedding, m.head[tower](embedding)

    return model.apply(variables, planes, method=embed)

  return run(variables, planes)


def reconstruct(model, variables, keep):
  restore = np.argsort(
    np.concatenate([keep, [np.setdiff1d(np.arange(60), row) for row in keep]], axis=1), axis=1
  )
  return jax.jit(lambda v: model.apply(v, method=lambda m: m.ecg.fill_in(ECG, keep, restore)))(
    variables
  )


KEEP = np.stack([np.random.default_rng(i).permutation(60)[:12] for i in range(B)])


# ---- the six published files


def test_signal_encoder_mdm(tmp_path):
  """A MAE checkpoint; its positions are recognised as the fixed ones."""
  net = autoencoder()
  optimizer = torch.optim.AdamW(net.parameters())
  path = saved(
    tmp_path,
    {
      "model": net.state_dict(),
      "optimizer": optimizer.state_dict(),
      "epoch": 399,
      "scaler": {"scale": 65536.0},
      "args": argparse.Namespace(model="mae_vit_tiny", mask_ratio=0.8),
    },
  )
  model, variables, report = torch_weights.read(path)
  c = model.config.towers.ecg
  assert (c.size, c.patch, c.pool, c.positions, model.samples) == (
    "test",
    PATCH,
    "mean",
    "sincos",
    SAMPLES,
  )
  assert "pos_embed" not in variables["params"]["ecg"]
  close(encode_ecg(model, variables)["ecg_embedding"], net(torch.tensor(ECG)))
  close(reconstruct(model, variables, KEEP), net.reconstruct(torch.tensor(ECG), torch.tensor(KEEP)))
  text = "\n".join(report)
  assert (
    "fc_norm is not in the file: identity after mean pooling" in text
    and "ecg/fc_norm/scale = 1" in text
  )
  assert "beside the weights: optimizer, epoch, scaler, args" in text


def test_signal_encoder_mdm_with_siamese_heads(tmp_path):
  """As MMCL's later code leaves it."""
  net = autoencoder()
  net.projector = torch.nn.Sequential(torch.nn.Linear(16, 8, bias=False), torch.nn.BatchNorm1d(8))
  net.predictor = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
  model, variables, report = torch_weights.read(saved(tmp_path, {"model": net.state_dict()}))
  close(reconstruct(model, variables, KEEP), net.reconstruct(torch.tensor(ECG), torch.tensor(KEEP)))
  assert any(
    line.startswith("ignored, siamese heads: projector.0.weight") and "predictor.0.weight" in line
    for line in report
  )
  assert any("projector.1.num_batches_tracked" in line for line in report)


@pytest.mark.parametrize(
  "norms, head_width",
  [(("norm",), 0), (("fc_norm",), 0), (("norm", "fc_norm"), 0), (("norm", "fc_norm"), 7)],
)
def test_signal_encoder_mmcl(tmp_path, norms, head_width):
  """Mean pooling, with fc_norm or without it (then a LayerNorm without scale), an idle `norm`, with
  a head or not."""
  net = vit(norms, head=head_width, trained=True)
  model, variables, report = torch_weights.read(saved(tmp_path, {"model": net.state_dict()}))
  found = encode_ecg(model, variables)
  close(found["ecg_tokens"], net.tokens(torch.tensor(ECG))[:, 1:])
  embedding = net(torch.tensor(ECG))
  close(found["ecg_embedding"], embedding)
  assert (
    model.config.towers.ecg.pool == "mean"
    and model.config.towers.ecg.head == head_width
    and not model.config.towers.ecg.mask_ratio
  )
  close(found["ecg_projection"], net.head(embedding) if head_width else embedding)
  assert any("norm of the CLS token" in line and "norm.weight" in line for line in report) == (
    "norm" in norms
  )
  assert any("left at identity: ecg/fc_norm" in line for line in report) == ("fc_norm" not in norms)


@pytest.mark.parametrize("form", ["sequential", "named", "prefixed"])
def test_image_encoders(tmp_path, form):
  """image_encoder_simclr and _mmcl: a ResNet in nn.Sequential under encoder_imaging.; torchvision's
  own names."""
  net = image(classes=5 if form == "named" else 0)
  state = {
    "sequential": prefixed("encoder_imaging.", net.sequential()),
    "named": net.state_dict(),
    "prefixed": prefixed("module.encoder_imaging.", net),
  }[form]
  model, variables, report = torch_weights.read(saved(tmp_path, {"state_dict": state, "epoch": 3}))
  spec = model.config.towers.image
  assert (spec.fn, spec.size, spec.view, spec.planes, spec.width) == (
    "resnet",
    "test",
    "three_frames",
    3,
    5 if form == "named" else 0,
  )
  embedding, projection = encode_cmr(model, variables, "image", IMAGE)
  close(embedding, net(torch.tensor(IMAGE)))
  close(projection, net(torch.tensor(IMAGE)))
  assert any("counters of batches" in line and "num_batches_tracked" in line for line in report)


def test_image_encoder_of_simclr_with_its_head(tmp_path):
  net, projection = image(), head(8, norm=True)
  state = prefixed("encoder_imaging.", net.sequential()) | prefixed("projection_head.", projection)
  state |= {
    "classifier.model.weight": torch.ones(2, 8),
    "classifier_criterion.weight": torch.ones(2),
  }
  model, variables, report = torch_weights.read(saved(tmp_path, {"state_dict": state}), tower="sax")
  embedding, projected = encode_cmr(model, variables, "sax", IMAGE)
  close(projected, projection(net(torch.tensor(IMAGE))))
  assert any(
    "classifiers and losses: classifier.model.weight, classifier_criterion.weight" in line
    for line in report
  )


def lightning(**changes):
  parts = dict(
    ecg=vit(("norm", "fc_norm"), head=2, trained=True),
    imaging=image(),
    head_ecg=head(16, seed=1),
    head_imaging=head(8, seed=2),
  )
  parts |= changes
  state = prefixed("encoder_ecg.", parts["ecg"]) | prefixed(
    "encoder_imaging.", parts["imaging"].sequential()
  )
  state |= prefixed("projection_head_ecg.", parts["head_ecg"]) | prefixed(
    "projection_head_imaging.", parts["head_imaging"]
  )
  state |= {
    "classifier.model.weight": torch.ones(2, 16),
    "classifier_criterion.weight": torch.ones(2),
  }
  return parts, {
    "epoch": 3,
    "global_step": 10,
    "pytorch-lightning_version": "1.6.4",
    "state_dict": state,
    "hyper_parameters": AttributeDict(lr=1),
    "callbacks": {AttributeDict: {"best_model_score": torch.tensor(1.0)}},
    "optimizer_states": [],
    "lr_schedulers": [],
  }


def test_lightning_checkpoint_gives_both_towers_and_both_heads(tmp_path):
  parts, tree = lightning()
  model, variables, report = torch_weights.read(saved(tmp_path, tree, "last.ckpt"))
  assert model.config.projection.to_dict() == dict(hidden=10, ecg_hidden=0, width=6, norm=False)
  assert model.config.towers.ecg.head == 0
  found = encode_ecg(model, variables)
  close(found["ecg_projection"], parts["head_ecg"](parts["ecg"](torch.tensor(ECG))))
  embedding, projection = encode_cmr(model, variables, "image", IMAGE)
  close(embedding, parts["imaging"](torch.tensor(IMAGE)))
  close(projection, parts["head_imaging"](parts["imaging"](torch.tensor(IMAGE))))
  assert any(
    "which the projection head passes by: encoder_ecg.head.weight" in line for line in report
  )
  assert not any("left at identity" in line for line in report)

  # one of them
  model, variables, report = torch_weights.read(tmp_path / "last.ckpt", tower="image")
  assert "ecg" not in model.config.towers and list(variables["params"]) == [
    "cmr_image",
    "head_image",
  ]
  assert any(
    "other towers: encoder_ecg.cls_token" in line and "projection_head_ecg.layers.0.weight" in line
    for line in report
  )


def test_heads_of_different_sizes_are_converted_one_at_a_time(tmp_path):
  _, tree = lightning(head_ecg=head(16, width=7))
  path = saved(tmp_path, tree)
  with pytest.raises(UserError, match="heads of different sizes .*--tower=NAME"):
    torch_weights.load(path)
  assert torch_weights.load(path, tower="ecg")[0].config.projection.width == 7


@functools.cache
def three_pairs():
  """The dual-phase system's modules by its names for them: heads of two hidden widths, and what it
  leaves unused."""
  parts = {
    "ecg_encoder": vit(("norm", "fc_norm"), head=9),
    "projection_head_ecg": head(9, hidden=12, norm=True, seed=1),
  }
  for i, phase in enumerate(("diastole", "systole"), start=2):
    parts[f"cmr_encoder_{phase}"] = published.randomise(
      published.SlowResNet(*SLOW, slices=5, fc=4), i
    ).eval()
    parts[f"projection_head_{phase}"] = head(4, norm=True, seed=i)
  parts["cmr_encoder"] = parts["cmr_encoder_diastole"]
  parts["temporal_mlp"] = parts["cmr_encoder_systole"].temporal_mlp
  parts["projection_head_cmr"] = head(4, norm=True, seed=9)  # as it was initialised
  return parts


def keys_of(parts, *names):
  return {key: x for name in names or parts for key, x in prefixed(f"{name}.", parts[name]).items()}


@pytest.mark.reported(
  "dual-phase checkpoints were refused, or loaded with an untrained head on the flags that the "
  "refusal advised"
)
def test_a_dual_phase_checkpoint_of_three_pairs(tmp_path):
  parts = three_pairs()
  model, variables, report = torch_weights.read(saved(tmp_path, {"model": keys_of(parts)}))
  assert model.config.projection.to_dict() == dict(hidden=10, ecg_hidden=12, width=6, norm=True)
  ecg = parts["ecg_encoder"]
  close(
    encode_ecg(model, variables)["ecg_projection"],
    parts["projection_head_ecg"](ecg.head(ecg(torch.tensor(ECG)))),
    5e-5,
  )
  for tower, phase in (("ed", "diastole"), ("es", "systole")):
    embedding = parts[f"cmr_encoder_{phase}"](torch.tensor(2 * VOLUME[:, None] - 1))
    found = encode_cmr(model, variables, tower, VOLUME)
    close(found[0], embedding, 5e-5)
    close(found[1], parts[f"projection_head_{phase}"](embedding), 5e-5)
  assert any(
    "neither trains nor uses: projection_head_cmr.layers.0.weight" in line for line in report
  )
  assert any(
    "second name of an encoder's Linear over slices: temporal_mlp." in line for line in report
  )
  state = torch_weights.state_dict(model, variables)
  assert state["head_ecg.layers.0.weight"].shape == (12, 9) and state[
    "head_ed.layers.0.weight"
  ].shape == (10, 4)


def test_a_dual_phase_checkpoint_of_one_pair(tmp_path):
  """There projection_head_cmr is the trained one."""
  parts = three_pairs()
  state = keys_of(
    parts,
    "ecg_encoder",
    "projection_head_ecg",
    "cmr_encoder",
    "temporal_mlp",
    "projection_head_cmr",
  )
  model, variables = torch_weights.load(saved(tmp_path, {"model": state}))
  embedding = parts["cmr_encoder"](torch.tensor(2 * VOLUME[:, None] - 1))
  close(
    encode_cmr(model, variables, "ed", VOLUME)[1], parts["projection_head_cmr"](embedding), 5e-5
  )


@pytest.mark.reported(
  "the logits of MMCL's fine-tuned encoders were not theirs, which pass fc_norm twice"
)
def test_the_head_of_a_fine_tuned_encoder(tmp_path):
  net = vit(("norm", "fc_norm"), pool="attention", head=4)
  model, variables, report = torch_weights.read(saved(tmp_path, {"model": net.state_dict()}))
  embedding = net(torch.tensor(ECG))
  found = encode_ecg(model, variables)
  close(found["ecg_embedding"], embedding)
  close(found["ecg_projection"][:, :4], net.head(net.fc_norm(embedding)))
  assert any("fc_norm once more" in line for line in report)


@pytest.mark.parametrize(
  "channels, slices, fc, blocks", [(1, 5, 4, True), (1, 0, 0, False), (3, 5, 0, True)]
)
def test_slow_resnet(tmp_path, channels, slices, fc, blocks):
  """PyTorchVideo's keys, also without `blocks`; a stem of three channels sees the grey image three
  times."""
  net = volume(channels=channels, slices=slices, fc=fc)
  state = {key if blocks else key.removeprefix("blocks."): x for key, x in net.state_dict().items()}
  model, variables, report = torch_weights.read(
    saved(tmp_path, {"model_state_dict": state}), tower="es"
  )
  spec = model.config.towers.es
  assert (spec.fn, spec.size, spec.view, spec.planes, spec.width) == (
    "slow_resnet",
    "test",
    "es_volume",
    slices or 6,
    fc,
  )
  planes = VOLUME if slices else np.concatenate([VOLUME, VOLUME[:, :1]], axis=1)
  theirs = net(torch.tensor(2 * planes - 1)[:, None].expand(-1, channels, -1, -1, -1))
  close(encode_cmr(model, variables, "es", planes)[0], theirs, 5e-5)
  assert any("mean over 6 of them" in line for line in report) == (not slices)
  assert any("summed to one" in line for line in report) == (channels == 3)


def test_dual_phase_pretraining_holds_its_encoder_twice(tmp_path):
  net = volume(slices=5, fc=4)
  own = {key: x for key, x in net.state_dict().items() if not key.startswith("blocks.")}
  twice = {
    f"{name}.{key.removeprefix('blocks.')}": x
    for name in ("model", "encoder")
    for key, x in net.state_dict().items()
    if key not in own
  }
  path = saved(
    tmp_path,
    {
      "model_state_dict": twice
      | own
      | {"output_layer.weight": torch.ones(3, 4), "output_layer.bias": torch.ones(3)}
    },
  )
  model, variables = torch_weights.load(path)
  close(
    encode_cmr(model, variables, "ed", VOLUME)[0], net(torch.tensor(2 * VOLUME[:, None] - 1)), 5e-5
  )
  twice["encoder.0.norm.bias"] = twice["encoder.0.norm.bias"] + 1
  with pytest.raises(
    UserError, match="model.0.norm.bias and encoder.0.norm.bias, which both are .*differ"
  ):
    torch_weights.load(saved(tmp_path, {"model_state_dict": twice | own}))


@pytest.mark.reported("ST-MEM's encoder, which CardioNets start from, was refused")
@pytest.mark.parametrize("head_width", [0, 5])
def test_st_mem(tmp_path, head_width):
  """The encoder alone or in its autoencoder, and out again."""
  net = published.randomise(published.StMem(*TEST, PATCH, SAMPLES, head_width)).float().eval()
  state = net.state_dict()
  if not head_width:
    state = prefixed("encoder.", net) | {
      key: x for key, x in state.items() if key.startswith("to_patch_embedding.")
    }
    state |= {
      "to_decoder_embedding.weight": torch.ones(8, 16),
      "mask_embedding": torch.ones(1, 1, 8),
      "decoder_blocks.0.attn.fn.to_qkv.weight": torch.ones(24, 8),
      "decoder_pos_embed": torch.ones(1, 7, 8),
    }
  path = saved(tmp_path, {"model": state})
  model, variables, report = torch_weights.read(path, heads=TEST[2])
  c = model.config.towers.ecg
  assert (c.fn, c.size, c.patch, c.head, model.samples) == (
    "st_mem",
    "test",
    PATCH,
    head_width,
    SAMPLES,
  )
  found = encode_ecg(model, variables)
  close(found["ecg_tokens"], net.tokens(torch.tensor(ECG)))
  close(found["ecg_embedding"], net(torch.tensor(ECG)))
  if head_width:
    close(found["ecg_projection"][:, :head_width], net.head(net(torch.tensor(ECG))))
  else:
    assert any("ST-MEM's decoder" in line and "mask_embedding" in line for line in report)
  into_torch(
    published.StMem(*TEST, PATCH, SAMPLES, head_width),
    torch_weights.state_dict(model, variables, "ecg"),
  )
  torch_weights.save(model, variables, tmp_path / "x.safetensors", "ecg")
  again, loaded = torch_weights.load(tmp_path / "x.safetensors")  # our own files tell the heads
  assert again.config == model.config
  np.testing.assert_array_equal(
    loaded["params"]["ecg"]["block0"]["qkv"]["kernel"],
    variables["params"]["ecg"]["block0"]["qkv"]["kernel"],
  )
  with pytest.raises(UserError, match="16 wide with 0 heads"):
    torch_weights.load(path)


@pytest.mark.reported("CardiacNets' encoder, modulated by covariates, was refused")
def test_cardiacnets_encoder(tmp_path):
  """Alone, and beside two encoders that no layout explains (Swin), when it is asked for; and out
  again."""
  V = 3
  build = functools.partial(
    published.ViT, *TEST, PATCH, SAMPLES, pool="cls", norms=("norm",), head=5, covariates=V
  )
  net = published.randomise(build()).float().eval()
  covariates = np.random.default_rng(3).normal(size=(B, V)).astype(np.float32)
  embedding = net.embed(net.tokens(torch.tensor(ECG), torch.tensor(covariates)))
  swin = {f"CMR_encoder{i}.layers.0.blocks.0.attn.qkv.weight": torch.ones(6, 2) for i in (1, 2)}
  for state, options in (
    (net.state_dict(), {}),
    (prefixed("ECG_encoder.", net) | swin, {"tower": "ecg"}),
  ):
    model, variables = torch_weights.load(saved(tmp_path, {"model": state}), **options)
    found = jax.jit(functools.partial(model.apply, method="encode_ecg"))(variables, ECG, covariates)
    close(found["ecg_embedding"], embedding)
    close(found["ecg_projection"][:, :5], net.head(embedding))
  refused(tmp_path / "x.pth", "take another encoder alone with --tower=, one of ecg")
  into_torch(build(), torch_weights.state_dict(model, variables, "ecg"))


def test_where_st_mem_looks():
  """Its attention falls on patches, lead by lead, and on separators, which are left out."""
  c = configuration.defaults(batch=2, steps=1).model
  c.towers.ecg = dict(fn="st_mem", view="ecg", size="test", patch=PATCH)
  model = models.build(c, SAMPLES)
  batch = {"ecg": jnp.asarray(ECG), "mask": jnp.ones(B), "has_ecg": jnp.ones(B)}
  variables = init(model, jax.random.key(0), batch, jax.random.split(jax.random.key(1), B))
  weights = maps.attention_map(model, variables, jnp.asarray(ECG))
  assert weights.shape == (B, 60) and (weights.sum(axis=1) < 1).all()  # separators have the rest
  sequence = jnp.arange(12 * 7).reshape(1, -1)
  assert st_mem.patches(sequence)[0, :6].tolist() == [1, 2, 3, 4, 5, 8]
  c.towers.ecg.mask_ratio = 0.5
  with pytest.raises(UserError, match="sets mask_ratio, which st_mem does not take"):
    models.build(c, SAMPLES)


# ---- published sizes


def test_sizes_are_read_off_shapes(tmp_path):
  for size, numbers, patch, samples in (
    ("tiny", (384, 3, 6), 100, 2500),
    (ConfigDict(dict(width=192, depth=12, heads=3)), (192, 12, 3), 50, 1000),
  ):
    net = published.ViT(*numbers, patch, samples)
    model, _ = torch_weights.load(saved(tmp_path, net.state_dict()))
    assert model.config.towers.ecg.size == size and (
      model.config.towers.ecg.patch,
      model.samples,
    ) == (
      patch,
      samples,
    )
    assert model.config.towers.ecg.positions == "sincos"
  mae = published.MaskedAutoencoder(384, 3, 6, 100, 2500, (256, 2, 8))
  assert torch_weights.load(saved(tmp_path, mae.state_dict()))[0].config.towers.ecg.size == "tiny"
  # fixed positions serve any length
  longer, _ = torch_weights.load(tmp_path / "x.pth", samples=5000)
  assert longer.samples == 5000
  net.pos_embed.data += 0.1
  assert (
    torch_weights.load(saved(tmp_path, net.state_dict()))[0].config.towers.ecg.positions
    == "learned"
  )
  with pytest.raises(UserError, match="learned positions for 1000 samples, --samples=2000"):
    torch_weights.load(tmp_path / "x.pth", samples=2000)


def test_heads_that_no_weight_tells(tmp_path):
  net = published.randomise(published.ViT(40, 1, 5, PATCH, SAMPLES)).float().eval()
  path = saved(tmp_path, net.state_dict())
  with pytest.raises(UserError, match="1 blocks of a width of 40 have.*--heads="):
    torch_weights.load(path)
  with pytest.raises(UserError, match="heads is 3, which does not divide the width of 40"):
    torch_weights.load(path, heads=3)
  model, variables = torch_weights.load(path, heads=5)
  close(encode_ecg(model, variables)["ecg_embedding"], net(torch.tensor(ECG)))
  torch_weights.save(model, variables, tmp_path / "x.safetensors", "ecg")
  again, _ = torch_weights.load(tmp_path / "x.safetensors")  # our own files tell them
  assert again.config.towers.ecg.size.heads == 5


@pytest.mark.reported(
  "MMCL's big encoder, 768 wide with 8 heads, was loaded with 12 and was 8 % off"
)
def test_heads_hang_on_width_and_depth(tmp_path):
  """768 wide: 8 heads at 8 blocks (MMCL's and CardiacNets' big), 12 at 12 (ViT-B); of 9 blocks
  nobody knows."""
  for depth, heads in ((8, 8), (12, 12)):
    state = published.ViT(768, depth, heads, PATCH, SAMPLES).state_dict()
    assert recognise.transformer(state, "", "cls_token", modules.Options(), {}) == (
      768,
      depth,
      heads,
    )
  state |= {key.replace("blocks.0", "blocks.12"): x for key, x in state.items()}
  with pytest.raises(
    UserError, match="13 blocks of a width of 768 .*768 wide, 8 blocks: 8; 768 wide, 12 blocks: 12"
  ):
    recognise.transformer(state, "", "cls_token", modules.Options(), {})


def test_pooling_is_read_off_keys_or_given(tmp_path):
  classifier = vit(("norm",), head=3, pool="cls")
  model, variables = torch_weights.load(saved(tmp_path, classifier.state_dict()))
  assert model.config.towers.ecg.pool == "cls"
  close(encode_ecg(model, variables)["ecg_embedding"], classifier(torch.tensor(ECG)))
  plain = vit(("norm",), pool="cls")
  model, variables = torch_weights.load(saved(tmp_path, plain.state_dict()), pool="cls")
  close(encode_ecg(model, variables)["ecg_embedding"], plain(torch.tensor(ECG)))
  attention = vit(("norm", "fc_norm"), pool="attention")
  model, variables = torch_weights.load(saved(tmp_path, attention.state_dict()))
  # what is asked for stands
  for pool, idle in (("cls", "fc_norm.weight"), ("mean", "attention_pool.in_proj_weight")):
    other, _, report = torch_weights.read(tmp_path / "x.pth", pool=pool)
    assert other.config.towers.ecg.pool == pool
    assert any(
      f"pooling that --pool={pool} does not use" in line and idle in line for line in report
    )
  assert model.config.towers.ecg.pool == "attention"
  close(encode_ecg(model, variables)["ecg_embedding"], attention(torch.tensor(ECG)))


# ---- out


def into_torch(net, state):
  assert set(state) == set(net.state_dict())
  net.load_state_dict({key: torch.tensor(x) for key, x in state.items()}, strict=True)
  return net.float().eval()


@pytest.mark.parametrize(
  "pool, norms", [("mean", ("fc_norm",)), ("attention", ("fc_norm",)), ("cls", ("norm",))]
)
@pytest.mark.parametrize("trained", [False, True])
def test_an_encoder_goes_out_and_is_loaded_strictly(tmp_path, pool, norms, trained):
  options = dict(norms=norms, pool=pool, head=4, trained=trained)
  net = vit(**options)
  model, variables = torch_weights.load(saved(tmp_path, net.state_dict()))
  again = into_torch(
    published.ViT(*TEST, PATCH, SAMPLES, **options),
    torch_weights.state_dict(model, variables, "ecg"),
  )
  for key, x in net.state_dict().items():
    np.testing.assert_allclose(
      again.state_dict()[key].double(),
      x.double(),
      atol=1e-6 if key == "pos_embed" else 0,
      rtol=0,
      err_msg=key,
    )


def test_an_autoencoder_goes_out_whole_or_as_an_encoder(tmp_path):
  net = autoencoder()
  model, variables = torch_weights.load(saved(tmp_path, net.state_dict()))
  state, left = torch_weights.export(model, variables, "ecg_mae")
  assert sorted(left) == ["ecg/fc_norm/bias", "ecg/fc_norm/scale"] + [
    f"head_ecg/fc{i}/{leaf}" for i in (1, 2) for leaf in ("bias", "kernel")
  ]
  again = into_torch(published.MaskedAutoencoder(*TEST, PATCH, SAMPLES, TEST), state)
  close(
    again.reconstruct(torch.tensor(ECG), torch.tensor(KEEP)).detach().numpy(),
    net.reconstruct(torch.tensor(ECG), torch.tensor(KEEP)),
  )
  state, left = torch_weights.export(model, variables, "ecg")
  encoder = into_torch(published.ViT(*TEST, PATCH, SAMPLES), state)
  close(encoder(torch.tensor(ECG)).detach().numpy(), net(torch.tensor(ECG)))
  assert "ecg/decoder/mask_token" in left and "ecg/norm/scale" in left


def test_resnets_go_out(tmp_path):
  for net, tower, fresh in (
    (image(classes=5), "image", published.ResNet(*RESNET, classes=5)),
    (volume(slices=5, fc=4), "ed", published.SlowResNet(*SLOW, slices=5, fc=4)),
  ):
    model, variables = torch_weights.load(saved(tmp_path, net.state_dict()))
    again = into_torch(fresh, torch_weights.state_dict(model, variables, tower))
    for key, x in net.state_dict().items():
      np.testing.assert_array_equal(again.state_dict()[key], x, err_msg=key)


@pytest.mark.parametrize(
  "build",
  [
    lambda: published.ResNet(
      64, published.Bottleneck, ((64, 3), (128, 4), (256, 6), (512, 3)), classes=10
    ),
    lambda: published.ResNet(64, published.Basic, ((64, 2), (128, 2), (256, 2), (512, 2))),
    lambda: published.SlowResNet(64, ((64, 3, 1), (128, 4, 1), (256, 6, 3), (512, 3, 3)), slices=6),
  ],
)
def test_published_resnets_there_and_back(tmp_path, build):
  net = build()
  model, variables = torch_weights.load(saved(tmp_path, net.state_dict()))
  state = torch_weights.state_dict(model, variables, next(iter(model.config.towers)))
  assert set(state) == set(net.state_dict())
  for key, x in net.state_dict().items():
    np.testing.assert_array_equal(state[key], x, err_msg=key)


def test_a_whole_model_goes_out_and_comes_back(tmp_path):
  _, tree = lightning()
  model, variables = torch_weights.load(saved(tmp_path, tree))
  torch_weights.save(model, variables, tmp_path / "x.safetensors")
  again, loaded, report = torch_weights.read(tmp_path / "x.safetensors")
  assert again.config == model.config and again.samples == model.samples
  assert jax.tree.structure(loaded) == jax.tree.structure(variables)
  jax.tree.map(np.testing.assert_array_equal, loaded, variables)
  assert not any("left at identity" in line for line in report)


def test_what_pytorch_has_no_layers_for(tmp_path):
  model, variables = torch_weights.load(saved(tmp_path, vit().state_dict()))
  with pytest.raises(UserError, match="--tower=ed; this model has ecg"):
    torch_weights.state_dict(model, variables, "ed")
  model.config.towers.ecg.film = True  # before the blocks
  with pytest.raises(UserError, match="modulated by covariates"):
    torch_weights.state_dict(model, variables, "ecg")


# ---- bad input


def refused(path, *words, **options):
  with pytest.raises(UserError) as caught:
    torch_weights.load(path, **options)
  text = str(caught.value)
  assert "\n" not in text
  for word in words:
    assert word in text, text


def test_every_missing_extra_and_misshapen_key_is_listed(tmp_path):
  state = vit().state_dict()
  del state["blocks.0.mlp.fc1.bias"], state["patch_embed.proj.bias"]
  state |= {"blocks.0.ls1.gamma": torch.ones(16), "reg_token": torch.ones(1, 4, 16)}
  state["blocks.0.attn.qkv.weight"] = torch.ones(48, 15)
  state["cls_token"] = torch.ones(1, 1, 17)
  state["pos_embed"] = torch.ones(1, 60, 16)
  state["blocks.0.norm2.bias"] = torch.ones(16, dtype=torch.int64)
  state["fc_norm.weight"] = torch.full((16,), float("nan"))
  refused(
    saved(tmp_path, {"model": state}),
    "missing: blocks.0.mlp.fc1.bias (64,), patch_embed.proj.bias (16,)",
    "not expected: blocks.0.ls1.gamma (16,), reg_token (1, 4, 16)",
    "blocks.0.attn.qkv.weight (48, 15), expected (48, 16)",
    "cls_token (1, 1, 17), expected (1, 1, 16)",
    "pos_embed (1, 60, 16), expected (1, 1 + 12 n, 16)",
    "blocks.0.norm2.bias int64, expected floating-point",
    "not finite: fc_norm.weight",
  )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_no_numbers(tmp_path, value):
  state = {key: x.double() for key, x in image().state_dict().items()}
  state["layer2.0.bn1.running_var"][2] = value
  refused(saved(tmp_path, state), "not finite: layer2.0.bn1.running_var")


def test_wrong_resnets(tmp_path):
  state = prefixed("encoder_imaging.", image().sequential())
  del state["encoder_imaging.5.0.conv2.weight"]
  state["encoder_imaging.1.running_mean"] = torch.ones(5)
  state["encoder_imaging.5.0.bn7.weight"] = torch.ones(5)
  refused(
    saved(tmp_path, state),
    "missing: encoder_imaging.layer2.0.conv2.weight (8, 8, 3, 3)",
    "encoder_imaging.1.running_mean (5,), expected (4,)",
    "encoder_imaging.5.0.bn7.weight (5,)",
  )
  net = published.ResNet(6, published.Bottleneck, ((4, 1), (8, 2)))
  refused(
    saved(tmp_path, net.state_dict()),
    "a stem of 6 channels, bottleneck blocks and stages of 4, 8 channels; expected one of these "
    "sizes: test: 4,",
  )


def test_what_is_no_encoder(tmp_path):
  refused(
    saved(tmp_path, {"a.weight": torch.ones(2), "b": torch.ones(2)}),
    "has a.weight, b, which no layout explains",
    "--ignore=REGEX",
  )
  refused(
    saved(tmp_path, torch.nn.Linear(2, 2)),
    "was a whole model saved? Save its model.state_dict() instead",
  )
  refused(saved(tmp_path, prefixed("projection_head_ecg.", head(4))), "holds no encoder")
  refused(
    saved(tmp_path, vit().state_dict()),
    "holds an ECG encoder, which the name ed is not for",
    tower="ed",
  )
  _, tree = lightning()
  refused(
    saved(tmp_path, tree), "holds the towers ecg, image; --tower=ed is none of them", tower="ed"
  )
  tree["state_dict"]["logit_scale"] = torch.tensor(1.0)
  refused(saved(tmp_path, tree), "logit_scale", "--ignore=REGEX")
  assert (
    torch_weights.load(tmp_path / "x.pth", ignore=("logit_scale",))[0].config.towers.ecg.size
    == "test"
  )
  state = vit().state_dict()
  state["blocks.99999.norm1.weight"] = torch.ones(16)
  refused(saved(tmp_path, state), "numbers 100000 blocks; expected at most 200")
  refused(saved(tmp_path, vit().state_dict()), "expected one of mean, attention, cls", pool="max")
  refused(tmp_path / "x.pth", "--samples=-100; expected at least 1", samples=-100)
  refused(tmp_path / "x.pth", "--ignore=( is no regex", ignore=("(",))
  refused(
    saved(tmp_path, image().state_dict()), "--view=side; expected one of ed_volume", view="side"
  )


def test_a_decoder_with_other_positions_is_refused(tmp_path):
  net = autoencoder()
  net.decoder_pos_embed.data[0, 5, 3] += 0.1
  refused(
    saved(tmp_path, net.state_dict()),
    "of another value: decoder_pos_embed (1, 61, 16), expected the fixed sin-cos table",
  )
  assert (
    torch_weights.load(tmp_path / "x.pth", ignore=("^decoder_", "^mask_token$"))[
      0
    ].config.towers.ecg.mask_ratio
    == 0
  )


def test_the_identity_of_a_head_holds_for_towers_of_two_widths():
  """A head that the file lacks passes embeddings on, whichever of the two is the narrower."""
  for width in (3, 4):
    fc1, fc2 = (
      torch_weights.fresh(f"head_ecg/{name}/kernel", shape, np.float64)
      for name, shape in (("fc1", (width, 8)), ("fc2", (8, 4)))
    )
    x = np.array([[1.0, -2.0, 3.0, -4.0]])[:, :width]
    np.testing.assert_array_equal((np.maximum(x @ fc1, 0) @ fc2)[:, :width], x)
