"""Maps of where a CMR and an ECG agree: cosines, attention, integrated gradients.

Letters: B rows, L leads, T samples, N tokens, E projection width; see evaluator.
"""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from mmcl_jax.models import inference, inputs, towers as tower_lib
from mmcl_jax.models.cmr_tower import select_view
from mmcl_jax.objectives.contrastive import normalise

STEPS = 64  # of the integral from zeros to the input


def cosine(a, b):
  """Of vectors along the last axis."""
  return (normalise(a) * normalise(b)).sum(axis=-1)


def make_maps(run):
  """(variables, batch) -> the cosines of all cells of every CMR tower, and the projections behind
  them.

  Returns: map/TOWER [B, 2, Z', H', W'], asked with the own ECG and with that of another person, NaN
  where the batch has nobody else's beside (so it depends on the batch, and on the hosts); ecg [B,
  E] and cmr/TOWER [B, E].
  """
  model, standardiser = run.model, standardiser_of(run)
  embed_ecg = inference.make_embed_ecg(model, run.config.data.samples)

  def maps(variables, rows):
    batch = inputs.to_float(rows, standardiser)
    own = embed_ecg(variables, batch["ecg"], batch.get("conditions"))["ecg_projection"]
    other = jnp.where(of_another(batch)[:, None], next_row(own), jnp.nan)
    asked = normalise(jnp.stack([own, other], axis=1))  # [B, 2, E]
    made = {"ecg": own}
    for name, tower in model.apply(variables, batch, method="encode_cmr").items():
      made[f"cmr/{name}"] = tower["projection"]
    for name, cells in model.apply(variables, batch["cmr"], method="locate_cmr").items():
      made[f"map/{name}"] = jnp.einsum(
        "bzhwe,bqe->bqzhw", normalise(cells), asked, precision="highest"
      )
    return made

  return maps


def standardiser_of(run):
  """What standardises the covariates of an ECG tower with FiLM; None for one without."""
  return run.standardiser if run.config.model.towers.ecg.get("film") else None


def next_row(x):
  """Of every row the next one, of the last the first."""
  return jnp.roll(x, 1, axis=0)


def of_another(batch):
  """bool [B]: whether the next row is of another person, and not padding."""
  differs = (batch["subject"] != next_row(batch["subject"])).any(axis=-1)
  return differs & (next_row(batch["mask"]) > 0)


def enlarge(cells: np.ndarray, spec, shape) -> np.ndarray:
  """Values [..., Z', H', W'] at the cells of a tower -> [..., *shape], of the planes, rows and
  columns that it sees.

  Linear between the centres of the cells, constant beyond the outermost; spec: of the tower, as in
  config.model.towers.
  """
  centres = tower_lib.build(spec).centres(*shape)
  weights = [interpolation(length, at) for length, at in zip(shape, centres)]
  return np.einsum("...zhw,Zz,Hh,Ww->...ZHW", cells, *weights, optimize=True)


def interpolation(length: int, centres) -> np.ndarray:
  """Matrix [length, cells] of linear interpolation between values at `centres`."""
  columns = []
  for cell in np.eye(len(centres)):
    columns.append(np.interp(np.arange(length), centres, cell))
  return np.stack(columns, axis=1)


def open_model(model):
  """The same network, whose insides can be captured, and which lets gradients through frozen
  towers."""
  config = ConfigDict(model.config.to_dict() | {"remat": "none", "scan": False})
  for spec in tower_lib.cmr(config).values():
    spec.frozen = False
  return model.clone(config=config)


def attention_map(model, variables, ecg, conditions=None):
  """[B, N]: what each patch of the ECG gets of the attention that ends in the embedding, as the ECG
  tower's `attention_map` says."""

  def is_qkv(module, method):
    return module.name == "qkv" and method == "__call__"

  _, captured = open_model(model).apply(
    variables,
    ecg,
    conditions,
    method="encode_ecg",
    mutable=["intermediates"],
    capture_intermediates=is_qkv,
  )
  qkv = {}
  for name, layer in captured["intermediates"]["ecg"].items():
    qkv[name] = layer["qkv"]["__call__"][0]
  return tower_lib.build(model.config.towers.ecg).attention_map(qkv)


def integrated_gradients(slope, x, title: str = ""):
  """Attributions like x, a tree of arrays, for a function's rise on the straight way from zeros to
  x; midpoint rule.

  Args:
    slope: share -> the function's gradient at share * x, like x.
    title: shown with progress; nothing is shown without one.
  """
  total = jax.tree.map(lambda x: np.zeros(np.shape(x)), x)
  silent = not title or jax.process_index() > 0
  for i in tqdm(range(STEPS), title, unit="step", mininterval=1, disable=silent):
    total = jax.tree.map(np.add, total, slope((i + 0.5) / STEPS))
  return jax.tree.map(lambda x, sum_: np.asarray(x, np.float64) * sum_ / STEPS, x, total)


def make_ecg_maps(run):
  """(variables, batch, projections) -> cosine and attention of each patch of the ECG, [B, L,
  patches]; projections as of `make_maps`."""
  model = run.model
  towers = tower_lib.cmr(run.config.model)
  samples = run.config.data.samples

  def maps(variables, batch, projections):
    B, L, _ = batch["ecg"].shape
    windows, conditions = inputs.windows(batch["ecg"], batch.get("conditions"), samples)

    def of_leads(x):
      """Patches of windows [B W, N] -> of each lead, over all windows [B, L, patches]."""
      by_lead = x.reshape(B, -1, L, x.shape[1] // L).swapaxes(1, 2)
      return by_lead.reshape(B, L, -1)

    tokens = model.apply(variables, windows, conditions, method="locate_ecg")
    near = 0.0
    for name in towers:
      z = jnp.repeat(projections[f"cmr/{name}"], len(windows) // B, axis=0)
      near = near + cosine(tokens, z[:, None])
    attention = attention_map(model, variables, windows, conditions)
    return {"cosine": of_leads(near / len(towers)), "attention": of_leads(attention)}

  return maps


def make_slopes(run):
  """(variables, batch, projections, share) -> cosines {TOWER: [B], ecg: [B]} at `share` of the way
  from zeros to the input, and their gradients there, {TOWER: [B, P, H, W], ecg: [B, L, T]}, of what
  is seen of it.

  The other modality stays as it is (projections, as of `make_maps`); the ECG's cosine is the mean
  over towers.
  """
  model = open_model(run.model)
  samples = run.config.data.samples
  towers = tower_lib.cmr(run.config.model)
  embed_ecg = inference.make_embed_ecg(model, samples)

  def slopes(variables, batch, projections, share):
    def of_tower(cmr, name):
      outputs = model.apply(variables, batch | {"cmr": cmr}, only=(name,), method="encode_cmr")
      near = cosine(outputs[name]["projection"], projections["ecg"])
      return near.sum(), near

    def of_ecg(ecg):
      z = embed_ecg(variables, ecg, batch.get("conditions"))["ecg_projection"]
      near = sum(cosine(z, projections[f"cmr/{name}"]) for name in towers) / len(towers)
      return near.sum(), near

    near, slope = {}, {}
    ecg, cmr = jax.tree.map(lambda x: share * x, (batch["ecg"], batch["cmr"]))
    (_, near["ecg"]), gradient = jax.value_and_grad(of_ecg, has_aux=True)(ecg)
    slope["ecg"] = gradient[:, :, : gradient.shape[2] // samples * samples]
    for name, spec in towers.items():
      (_, near[name]), gradient = jax.value_and_grad(of_tower, has_aux=True)(cmr, name)
      slope[name] = select_view(gradient, spec)
    return near, slope

  return slopes
