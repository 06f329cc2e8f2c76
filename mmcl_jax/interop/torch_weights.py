"""PyTorch weights -> (model, variables), and back: see `load`, `state_dict`, `save`."""

import collections
from typing import Any, NamedTuple

import jax
import numpy as np

from mmcl_jax import models
from mmcl_jax.data import schema
from mmcl_jax.errors import UserError
from mmcl_jax.interop import modules, naming, recognise, torch_files
from mmcl_jax.models import inputs, pretrainer, towers, vit
from mmcl_jax.support.tree import flatten_variables, unflatten_variables
from mmcl_jax.training import state as state_lib


StateDict = dict[str, np.ndarray]  # by PyTorch's keys
Place = tuple[str, str]  # of a variable: its collection, params or batch_stats, and its path


class Loaded(NamedTuple):
  """What `read` gives; `report` is for people."""

  model: pretrainer.Pretrainer
  variables: dict[str, Any]
  report: list[str]


def load(path, **options):
  """A model and its variables from PyTorch weights.

  Understood, plain or inside checkpoints: the MMCL files, timm's ViT, MAE with its decoder,
  ST-MEM's encoder, torchvision's ResNet-18 and -50 (also as nn.Sequential), PyTorchVideo's
  slow_r50, Lightning checkpoints of several towers with projection heads, and what `save` wrote.
  Sizes and options are read off keys and shapes.

  Args:
    path: a file of torch.save or safetensors; weights only, nothing in it is executed.
    tower: which tower to take of a file with several ("ecg", "image", ...), or how to call the only
    CMR encoder.
    heads, decoder_heads: attention heads, where no published encoder has this width and depth.
    pool: mean | attention | cls, where it is not what the keys tell (fc_norm: mean; head and norm
      alone: cls).
    samples: length of the ECGs that it is for, where positions are fixed and it is not the one it
      was trained on.
    view: which view a CMR encoder looks at (schema.VIEWS).
    ignore: regexes of keys that shall be left out.
    dtype: "float32" (default) or "float64", of the variables and of the computation.

  Returns:
    model: a flax module; model.config is the config.model that builds it, model.samples its ECG
      length.
    variables: params and batch_stats, host arrays; model.apply(variables, ...) as in
      models.pretrainer.

  Raises:
    UserError: not such a file, or one that does not fit: every missing, superfluous and misshapen
      key is listed.
  """
  return read(path, **options)[:2]


def read(path, dtype: str = "float32", **options) -> Loaded:
  """`load` with a report: what was recognised, loaded, left at identity and ignored."""
  options = modules.Options(**options)
  options.check()
  weights = torch_files.read(path)
  recognised = recognise.recognise(weights.state, weights.metadata, options, path)
  recognised.config.dtype = dtype
  model = models.build(recognised.config, recognised.samples)
  variables, troubles = fill(model, recognised, dtype)
  if troubles:
    raise UserError(
      f"{path} does not fit. Recognised: {'; '.join(recognised.notes)}. Troubles: "
      f"{'; '.join(troubles)}. Leave keys out by --ignore=REGEX; what is missing cannot be made up"
    )
  return Loaded(model, unflatten_variables(variables), report(path, weights, recognised, variables))


def fill(model, recognised: recognise.Recognised, dtype: str) -> tuple[dict, list[str]]:
  """(collection, path) -> array of every variable, and what stands against that: every key that
  does not fit."""
  theirs = recognised.modules.theirs
  arrays = {}
  for module, keys in recognised.modules.arrays.items():
    for key, x in keys.items():
      arrays[f"{module}.{key}"] = x
  expected = shapes(model, recognised.covariates)
  names = dict(naming.names(expected, model.config))
  variables, troubles = {}, collections.defaultdict(list)
  for place, shape in expected.items():
    _, path = place
    if path in recognised.fresh:
      variables[place] = fresh(path, shape, dtype)
      continue
    name = names[place]
    key = their_key(recognised.modules, name.key)
    x = arrays.pop(name.key, None)
    if x is None:
      troubles["missing"].append(f"{key} {name.shape}")
    elif x.shape != name.shape:
      troubles["of another shape"].append(f"{key} {x.shape}, expected {name.shape}")
    elif x.dtype.kind != "f" and x.dtype.name != "bfloat16":
      troubles["of another type"].append(f"{key} {x.dtype}, expected floating-point numbers")
    else:
      with np.errstate(over="ignore"):  # what becomes infinite is reported below
        x = name.to_ours(x.astype(dtype), shape)
      variables[place] = x
      if not np.isfinite(x).all():
        troubles["not finite"].append(key)
  for key, x in arrays.items():
    troubles["not expected"].append(f"{theirs[key]} {x.shape}")
  all_troubles = list(recognised.troubles)
  for what, keys in troubles.items():
    if keys:
      all_troubles.append(f"{what}: {', '.join(keys)}")
  return variables, all_troubles


def their_key(split: modules.Modules, key: str) -> str:
  """The file's key for one of ours, MODULE.KEY; where it has none, what it would be called."""
  module, _, within = key.partition(".")
  prefix = split.prefixes.get(module, f"{module}.")
  return split.theirs.get(key, prefix + within)


def report(path, weights, recognised: recognise.Recognised, variables) -> list[str]:
  """What was recognised, loaded, left at identity and ignored: lines for people."""
  loaded = [x for (_, place), x in variables.items() if place not in recognised.fresh]
  size = sum(x.size for x in loaded)
  lines = [*recognised.notes, f"{len(loaded)} arrays of {size:,} numbers loaded from {path}"]
  if recognised.fresh:
    values = [f"{name} = {value}" for name, value in recognised.fresh.items()]
    lines.append(f"left at identity: {', '.join(values)}")
  for what, keys in recognised.modules.ignored.items():
    lines.append(f"ignored, {what}: {', '.join(keys)}")
  if weights.beside:
    lines.append(f"ignored, beside the weights: {', '.join(weights.beside)}")
  return lines


def fresh(path: str, shape, dtype) -> np.ndarray:
  """What a parameter is set to that leaves its module the identity (a LayerNorm: without scale;
  slices: their mean)."""
  if path.endswith("/fc1/kernel"):  # relu(x) - relu(-x) = x
    positive = np.eye(*shape, dtype=dtype)
    negative = np.eye(*shape, k=shape[1] // 2, dtype=dtype)
    return positive - negative
  if path.endswith("/fc2/kernel"):
    identity = np.eye(shape[0] // 2, shape[1], dtype=dtype)
    return np.concatenate([identity, -identity])
  if path.endswith("/slice_pool/kernel"):
    return np.full(shape, 1 / shape[0], dtype)
  if path.endswith("/scale"):
    return np.ones(shape, dtype)
  return np.zeros(shape, dtype)


def shapes(model, covariates: int) -> dict[Place, tuple[int, ...]]:
  """(collection, path) -> shape of the model's variables; nothing is computed. covariates: how many
  FiLM takes."""
  records = record_shapes(model.config, model.samples, covariates)
  example = inputs.model_input(model.config, model.samples, records, targets=0, rows=1)
  variables = jax.eval_shape(lambda: state_lib.variables(model, example))
  return {place: leaf.shape for place, leaf in flatten_variables(variables).items()}


def record_shapes(config, samples: int, covariates: int) -> dict[str, list[int]]:
  """Shapes of the records of a cohort that the model of `config` can read; it has no labels."""
  return {
    "ecg": [len(schema.LEADS), samples],
    "phenotypes": [0],
    "diseases": [0],
    "covariates": [covariates],
    **image_shapes(config),
  }


def image_shapes(config) -> dict[str, list[int]]:
  """Stored field -> a shape that has the planes which the CMR towers see; how large images are is
  the cohort's."""
  shapes = {}
  for spec in towers.cmr(config).values():
    field = schema.VIEWS[spec.view]
    planes = spec.planes
    if field in shapes:
      planes = max(planes, shapes[field][-3])
    shapes[field] = [planes, 64, 64]
    if field == "ed_es_volumes":
      shapes[field] = [len(schema.PHASES), planes, 64, 64]
  return shapes


def state_dict(model, variables, tower: str | None = None) -> StateDict:
  """The weights under PyTorch's keys.

  Args:
    model, variables: as `load` returns them, or of a run (training.restore.load_run).
    tower: "ecg": the encoder, for strict=True of timm's VisionTransformer (global_pool "avg", with
      fc_norm, or "token"); "ecg_mae": the masked autoencoder with its decoder, as in He et al.
      2022; a CMR tower: torchvision's ResNet, `fc` its Linear, or PyTorchVideo's slow_r50 without
      its last block, beside `temporal_mlp` (Linear over slices) and `fc`; None: all of them and the
      projection heads, each key with its module in front (`ecg.`, `cmr_NAME.`, `head_NAME.`).

  Returns:
    key -> array; num_batches_tracked, which nothing here counts, is 0.

  Raises:
    UserError: a tower that is not there, or for which there is no PyTorch layout.
  """
  return export(model, variables, tower)[0]


def export(model, variables, tower: str | None = None) -> tuple[StateDict, list[str]]:
  """`state_dict`, and which parameters it leaves out."""
  c = model.config
  check_tower(c, tower)
  flat, shape_of = {}, {}
  for place, x in flatten_variables(variables).items():
    flat[place] = np.asarray(x)
    shape_of[place] = flat[place].shape
  names = dict(naming.names(shape_of, c))
  state = {}
  for place, name in names.items():
    state[name.key] = name.to_torch(flat[place])
    if name.key.endswith(".running_mean"):
      batch_norm = name.key.removesuffix("running_mean")
      state[f"{batch_norm}num_batches_tracked"] = np.zeros((), np.int64)
  if "ecg" in c.towers:
    state |= fixed_positions(model, flat["params", "ecg/patch_embed/kernel"].dtype)
  module, unwanted = module_of(c, tower)
  exported, taken = {}, set()
  for key, x in state.items():
    within = key.removeprefix(module)
    if key.startswith(module) and not within.startswith(unwanted):
      exported[within] = x
      taken.add(key)
  left_out = []
  for collection, path in flat:
    name = names.get((collection, path))
    if name is None or name.key not in taken:
      left_out.append(path)
  return exported, left_out


def module_of(c, tower: str | None) -> tuple[str, tuple[str, ...]]:
  """(what the keys of a tower begin with, what those within it begin with that are left out)."""
  if tower is None:
    return "", ()
  if tower == "ecg_mae":
    return "ecg.", ("fc_norm.", "attention_pool.", "head.")
  if tower != "ecg":
    return f"cmr_{tower}.", ()
  if c.towers.ecg.get("pool", "cls") == "cls":
    return "ecg.", ("decoder_", "mask_token")
  return "ecg.", ("decoder_", "mask_token", "norm.")  # the last is the decoder's


def check_tower(c, tower: str | None) -> None:
  """Is the tower there, and is there a PyTorch layout of it?"""
  ecg = c.towers.get("ecg", {})
  choices = list(c.towers)
  if ecg.get("mask_ratio"):
    choices.append("ecg_mae")
  if tower not in (None, *choices):
    raise UserError(f"--tower={tower}; this model has {', '.join(choices)}")
  for name in c.towers if tower is None else [tower.removesuffix("_mae")]:
    if name == "ecg" and ecg.get("film") and not ecg.film_after:
      raise UserError(
        "the ECG encoder is modulated by covariates (config.model.towers.ecg.film), for which "
        "PyTorch's ViTs have no layer; train one without"
      )
    if c.towers[name].fn not in modules.LAYOUTS:
      raise UserError(
        f"the tower {name} ({c.towers[name].fn}) has no PyTorch layout here; name another --tower, "
        f"one of {', '.join(modules.LAYOUTS)}"
      )


def fixed_positions(model, dtype) -> StateDict:
  """The sine-cosine positions, which PyTorch keeps among the weights."""
  c = model.config.towers.ecg
  if c.fn != "ecg_vit":
    return {}
  size = vit.sized(c.size, c.decoder)
  columns = model.samples // c.patch
  positions = {}
  if c.positions == "sincos":
    table = recognise.table(columns, size["width"])
    positions["ecg.pos_embed"] = table.astype(dtype)
  if c.mask_ratio:
    width, _, _ = size["decoder"]
    table = recognise.table(columns, width)
    positions["ecg.decoder_pos_embed"] = table.astype(dtype)
  return positions


def save(model, variables, path, tower: str | None = None) -> list[str]:
  """Writes `state_dict` as safetensors, whole or not at all; returns which parameters are left out.

  Its metadata tells the attention heads, which no weight does.
  """
  state, left_out = export(model, variables, tower)
  metadata = {}
  ecg = model.config.towers.get("ecg")
  if ecg and tower in (None, "ecg", "ecg_mae"):
    size = vit.sized(ecg.size, ecg.get("decoder", ()))
    metadata["heads"] = str(size["heads"])
    if ecg.get("mask_ratio"):
      _, _, heads = size["decoder"]
      metadata["decoder_heads"] = str(heads)
  torch_files.save(state, path, metadata)
  return left_out
