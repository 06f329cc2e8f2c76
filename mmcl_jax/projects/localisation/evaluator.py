"""Where a CMR and an ECG agree: which places of the images and which moments of the ECG lie near
the other's embedding.

  image map    cosine of every cell of a CMR tower's last feature map, taken through the tower's own
               head as if it were the pooled vector, with the projection of the same person's ECG
                 (MMCL, Turgut et al. 2025)
  ECG map      cosine of every patch token, taken through the ECG's head likewise, with the CMR's
    projections; mean of towers
  attention    of the ECG tower's last block, or of its attention pool
  gradients    integrated gradients (Sundararajan et al., ICML 2017) of the cosine of both
               projections, from an input of zeros. They must sum to what the cosine gains
               (completeness); how far they do not is reported. It is far for a network without any
                 bias, whose cosine jumps as soon as the input is not zero

Where a cohort has labels, the image map is scored: which share of its most relevant tenth lies
inside the heart.
Letters: B rows, Q queries, S structures; P planes, H W pixels; L leads, T samples, N tokens or
pixels; E projection width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from mmcl_jax.data import pipeline, schema
from mmcl_jax.data.preprocess import ecg as preprocess_ecg
from mmcl_jax.evaluators import statistics
from mmcl_jax.evaluators.base import Result, Table, interval, number
from mmcl_jax.evaluators.context import Context
from mmcl_jax.evaluators.retrieval import TIE
from mmcl_jax.models import inference, inputs, pretrainer, towers as tower_lib
from mmcl_jax.objectives.contrastive import normalise
from mmcl_jax.projects.localisation import drawings
from mmcl_jax.training.over_split import over_split

STRUCTURES = {"heart": ("LV", "MYO", "RV"), "LV": ("LV",), "MYO": ("MYO",)}
# the trained towers, asked with the ECG of another person; the untrained model
CONTROLS = ("another_ecg", "untrained")
MOST = 256  # recordings scored: the first of test that have both ECG and CMR
SHOWN = 2  # of them drawn
STEPS = 64  # of the integral from zeros to the input


def localisation(context: Context, draws: int = 1000, seed: int = 0) -> Result:
  """Scores and explains the split of a run with ECG and CMR towers on a cohort with both.

  Args:
    context: with the split that is scored.
    draws, seed: of the bootstrap over subjects.
  """
  if why := context.why_unpaired():
    context.say(f"no localisation: {why}")
    return Result()
  with jax.set_mesh(context.run.mesh):
    results, examples = evaluate(
      context.run,
      context.untrained(),
      context.cohort,
      context.batch,
      draws,
      seed,
      context.split,
    )
  if not results:
    return Result()
  drawn = drawings.relevance(examples, context.note)
  for name, figure in drawn.items():
    _, kind, i = name.split("_")
    figure.set_label(f"Localisation in the {kind.upper()}, recording {i}")
  return Result({"localisation": results}, tables(results), drawn)


def evaluate(
  run, untrained, cohort, batch: int, draws: int = 1000, seed: int = 0, split: str = "test"
) -> tuple[dict, list[dict]]:
  """Scores the image maps of the test split and explains its first recordings; of a run with an ECG
  tower and CMR towers.

  Args:
    run: training.restore.Run.
    untrained: variables of the same model before any training: one draw of many, and other draws
      may look elsewhere.
    cohort: with the fields that the towers look at; scored where it has `labels`.
    batch: rows at a time.
    draws, seed: of the bootstrap over subjects.
    split: what is scored and explained.

  Returns:
    results: cosine as `score` gives it and completeness as `explain` does.
    examples: what `drawings.relevance` draws, one a recording.
    Both are empty, with a line that says so, where no recording of it has both ECG and CMR.
  """
  for name, spec in tower_lib.cmr(run.model.config).items():
    if not hasattr(tower_lib.build(spec), "feature_map"):
      if jax.process_index() == 0:
        print(f"no localisation: the tower {name} ({spec.fn}) has no feature map")
      return {}, []
  source = paired(cohort.splits[split], MOST)
  if not len(source):
    if jax.process_index() == 0:
      print(f"no localisation: no {split} recording of {cohort.path} has both an ECG and a CMR")
    return {}, []
  maps = jax.jit(make_maps(run))

  def both(pair, rows):
    return maps(pair[0], rows) | {f"untrained_{name}": x for name, x in maps(pair[1], rows).items()}

  found = over_split(
    both,
    (run.state.variables, untrained),
    source,
    mesh=run.mesh,
    batch=batch,
    fields=pretrainer.fields(run.config.model),
    also=("subject",),
    title=f"localise {split}",
  )
  results, first = {}, pipeline.Rows(source, list(range(min(SHOWN, len(source)))))
  if "labels" in cohort.info["shapes"]:
    weights = statistics.bootstrap_weights(found["subject"], draws, seed)
    results["cosine"] = score(tower_lib.cmr(run.config.model), source, found, weights)
  tower = tower_lib.build(run.model.config.towers.ecg)
  if not hasattr(tower, "locate") or not hasattr(tower, "attention_map"):
    if jax.process_index() == 0:
      print(f"no relevance maps of the ECG: the tower {type(tower).__name__} has no patches")
    return results, []
  results["completeness"], examples = explain(
    run, first, {name: x[: len(first)] for name, x in found.items()}
  )
  return results, examples


def paired(source, most: int) -> pipeline.Rows:
  """The first records with both an ECG and a CMR."""
  places = []
  for i in tqdm(
    range(len(source)), "look for pairs", unit="record", delay=3, disable=jax.process_index() > 0
  ):
    record = source[i]
    if record["has_ecg"] and record["has_cmr"]:
      places.append(i)
      if len(places) == most:
        break
  return pipeline.Rows(source, places)


# -----------------------------------------------------------------------------------------------------------------
# maps


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
  model, standardiser = (
    run.model,
    run.standardiser if run.config.model.towers.ecg.get("film") else None,
  )
  embed_ecg = inference.make_embed_ecg(model, run.config.data.samples)

  def maps(variables, rows):
    batch = inputs.to_float(rows, standardiser)
    own = embed_ecg(variables, batch["ecg"], batch.get("conditions"))["ecg_projection"]

    def beside(x):
      return jnp.roll(x, 1, axis=0)

    another = (batch["subject"] != beside(batch["subject"])).any(axis=-1) & (
      beside(batch["mask"]) > 0
    )
    asked = normalise(jnp.stack([own, jnp.where(another[:, None], beside(own), jnp.nan)], axis=1))

    def near(cells):
      return jnp.einsum("bzhwe,bqe->bqzhw", normalise(cells), asked, precision="highest")

    towers = model.apply(variables, batch, method="encode_cmr")
    cells = model.apply(variables, batch["cmr"], method="locate_cmr")
    return (
      {"ecg": own}
      | {f"cmr/{name}": tower["projection"] for name, tower in towers.items()}
      | {f"map/{name}": near(x) for name, x in cells.items()}
    )

  return maps


def enlarge(cells: np.ndarray, spec, shape) -> np.ndarray:
  """Values [..., Z', H', W'] at the cells of a tower -> [..., *shape], of the planes, rows and
  columns that it sees.

  Linear between the centres of the cells, constant beyond the outermost; spec: of the tower, as in
  config.model.towers.
  """
  centres = tower_lib.build(spec).centres(*shape)
  # [length, cells]
  matrices = [
    np.stack([np.interp(np.arange(length), at, one) for one in np.eye(len(at))], axis=1)
    for at, length in zip(centres, shape)
  ]
  return np.einsum("...zhw,Zz,Hh,Ww->...ZHW", cells, *matrices, optimize=True)


def in_sight(model):
  """The same network, whose insides can be captured, and which lets gradients through frozen
  towers."""
  config = ConfigDict(model.config.to_dict() | {"remat": "none", "scan": False})
  for spec in tower_lib.cmr(config).values():
    spec.frozen = False
  return model.clone(config=config)


def attention_map(model, variables, ecg, conditions=None):
  """[B, N]: what each patch of the ECG gets of the attention that ends in the embedding, as the ECG
  tower's `attention_map` says."""
  _, found = in_sight(model).apply(
    variables,
    ecg,
    conditions,
    method="encode_ecg",
    mutable=["intermediates"],
    capture_intermediates=lambda module, method: module.name == "qkv" and method == "__call__",
  )
  layers = found["intermediates"]["ecg"]
  tower = tower_lib.build(model.config.towers.ecg)
  return tower.attention_map({name: layer["qkv"]["__call__"][0] for name, layer in layers.items()})


def integrated_gradients(slope, x, title: str = ""):
  """Attributions like x, a tree of arrays, for a function's rise on the straight way from zeros to
  x; midpoint rule.

  Args:
    slope: share -> the function's gradient at share * x, like x.
    title: shown with progress; nothing is shown without one.
  """
  total = jax.tree.map(lambda x: np.zeros(np.shape(x)), x)
  for i in tqdm(
    range(STEPS), title, unit="step", mininterval=1, disable=not title or jax.process_index() > 0
  ):
    total = jax.tree.map(np.add, total, slope((i + 0.5) / STEPS))
  return jax.tree.map(lambda x, g: np.asarray(x, np.float64) * g / STEPS, x, total)


# ----------------------------------------------------------------------------------------------------------------
# score


def score(towers, source, found: dict, weights: np.ndarray) -> dict:
  """How well the image maps find the heart.

  Args:
    towers: entries of the CMR towers in config.model.towers.
    source: B records with labels.
    found: of `make_maps`, their rows in the same order, and of the untrained model
      untrained_map/TOWER.
    weights: [R, B] of the bootstrap.

  Returns:
    {TOWER/PHASE: {STRUCTURE: `summary`}}, of those views and phases whose labels show a heart.
  """
  shares = {}
  for i in range(len(source)):
    record = source[i]
    for name, spec in towers.items():
      seen = pretrainer.look(
        {schema.VIEWS[spec.view]: record[schema.VIEWS[spec.view]][None]}, spec
      )[0]
      # own ECG, CONTROLS
      cells = np.concatenate([found[f"map/{name}"][i], found[f"untrained_map/{name}"][i, :1]])
      relevance = enlarge(cells, spec, seen.shape)
      for phase, (planes, known) in truth(spec, record["labels"]).items():
        inside = np.stack(
          [np.isin(known, [schema.LABELS[part] for part in parts]) for parts in STRUCTURES.values()]
        )
        inside = inside.reshape(len(inside), -1)
        chance = np.where(inside.any(axis=1), inside.mean(axis=1), np.nan)
        share = top_share(relevance[:, planes].reshape(len(relevance), -1), inside)
        shares.setdefault(f"{name}/{phase}", []).append(np.concatenate([share, chance[None]]))
  whole = {
    name: {
      structure: summary(np.stack(rows)[:, :, s], weights) for s, structure in enumerate(STRUCTURES)
    }
    for name, rows in shares.items()
  }
  return {name: scores for name, scores in whole.items() if scores["heart"]["n"]}


def truth(spec, labels: np.ndarray) -> dict:
  """{phase: (planes, labels [planes, H, W])} of what a tower sees, from labels [2, Z, H, W];
  `planes`: a slice of its own.

  A cine's slice is the middle one of those that show the LV at ED and at ES, as it was cut. Views
  of which no plane is labelled give {}.
  """
  if schema.VIEWS[spec.view] == "ed_es_volumes":
    return {spec.view[:2]: (slice(None), pretrainer.look({"ed_es_volumes": labels[None]}, spec)[0])}
  moments = {"three_frames": {"ed": 0, "es": 2}, "cine_slice": {"ed": 0}}.get(spec.view, {})
  slices = np.flatnonzero((labels == schema.LABELS["LV"]).any(axis=(2, 3)).all(axis=0))
  middle = slices[len(slices) // 2] if len(slices) else 0  # no LV: nothing to find in any slice
  return {
    phase: (slice(plane, plane + 1), labels[schema.PHASES.index(phase), [middle]])
    for phase, plane in moments.items()
  }


def top_share(relevance: np.ndarray, inside: np.ndarray) -> np.ndarray:
  """The share of the most relevant tenth of the pixels that lies inside each structure.

  Args:
    relevance: [Q, N].
    inside: bool [S, N].

  Returns:
    [Q, S]; NaN where there is no such structure, or relevance is NaN.
  """
  weight = top_tenth(relevance)
  return np.where(inside.any(axis=1), weight @ inside.T / weight.sum(axis=1, keepdims=True), np.nan)


def top_tenth(relevance: np.ndarray) -> np.ndarray:
  """[Q, N] -> weights [Q, N] of the most relevant tenth of the pixels: 1, and less where several
  tie for the last places.

  They share those, so that a map that says nothing gets what chance gets. NaN where relevance is
  NaN.
  """
  pixels = relevance.shape[1]
  places = -(-pixels // 10)
  last = np.partition(relevance, pixels - places, axis=1)[:, [pixels - places]]
  above, tied = relevance > last + TIE, np.abs(relevance - last) <= TIE
  left = (places - above.sum(axis=1, keepdims=True)) / np.maximum(
    tied.sum(axis=1, keepdims=True), 1
  )
  return np.where(np.isfinite(last), above + tied * left, np.nan)


def summary(shares: np.ndarray, weights: np.ndarray) -> dict:
  """Means over recordings [R bootstrap draws for their intervals], of those where both sides of a
  difference are known.

  Args:
    shares: [B, 4] of the trained towers, the CONTROLS, and pixels at random; NaN = not known.
    weights: [R, B].

  Returns:
    value, ci, then for every control NAME, NAME_ci, minus_NAME, minus_NAME_ci (trained minus
      control); chance; n.
  """

  def mean(x):
    known = np.isfinite(x)
    total = weights @ known
    draws = np.divide(
      weights @ np.where(known, x, 0), total, out=np.full(len(weights), np.nan), where=total > 0
    )
    return float(x[known].mean()) if known.any() else np.nan, statistics.interval(draws).tolist()

  trained, *controls, chance = shares.T.astype(np.float64)
  found = dict(zip(("value", "ci"), mean(trained)))
  for name, control in zip(CONTROLS, controls):
    found |= dict(zip((name, f"{name}_ci"), mean(control)))
    found |= dict(zip((f"minus_{name}", f"minus_{name}_ci"), mean(trained - control)))
  return found | {"chance": mean(chance)[0], "n": int(np.isfinite(trained).sum())}


# -----------------------------------------------------------------------------------------------------------
# explanation


def explain(run, source, found: dict) -> tuple[dict, list[dict]]:
  """What the figures show, of all records of `source` in one batch.

  Args:
    found: of `make_maps`, their rows in the same order.

  Returns:
    completeness: {TOWER or "ecg": {gain, sum, error}}: of each record, what the cosine gains over
      that of an input of zeros and the sum of the integrated gradients, which should be the same;
        the largest difference of the two.
    examples: of each record, {"ecg": {seen [L, T], cosine, attention, gradients [L, patches],
      rate_hz}, "towers": {TOWER: {seen, labels, cosine, top (of the most relevant tenth), gradients
        [P, H, W]}}}; labels are 0 where there are none.
  """
  towers, config = tower_lib.cmr(run.config.model), run.config

  def jitted(f):
    return jax.jit(f, out_shardings=NamedSharding(run.mesh, PartitionSpec()))

  def to_float(rows):
    return inputs.to_float(rows, run.standardiser if config.model.towers.ecg.get("film") else None)

  fields = pretrainer.fields(config.model)
  rows = next(pipeline.one_pass(source, batch=len(source), fields=fields))
  batch = jitted(to_float)(rows)
  of_ecg = jax.device_get(jitted(make_ecg_maps(run))(run.state.variables, batch, found))
  slopes = jitted(make_slopes(run))

  def at(share):
    return jax.device_get(slopes(run.state.variables, batch, found, share))

  volumes = jax.device_get(batch["cmr"])
  seen = {name: pretrainer.look(volumes, spec) for name, spec in towers.items()}
  samples = of_ecg["cosine"].shape[2] * config.model.towers.ecg.patch
  seen["ecg"] = jax.device_get(batch["ecg"])[:, :, :samples]
  gradients = integrated_gradients(lambda share: at(share)[1], seen, "integrated gradients")
  (end, _), (start, _) = at(1.0), at(0.0)
  completeness = {}
  for name, x in gradients.items():
    gain, total = end[name] - start[name], x.reshape(len(x), -1).sum(axis=1)
    error = float(np.abs(gain - total).max())
    completeness[name] = {"gain": gain.tolist(), "sum": total.tolist(), "error": error}
  # of every patch
  gradients["ecg"] = gradients["ecg"].reshape(*of_ecg["cosine"].shape, -1).sum(axis=-1)

  rate_hz = preprocess_ecg.rate_hz(config.data.ecg_profile)
  examples = []
  for i in range(len(source)):
    ecg = {name: x[i] for name, x in of_ecg.items()}
    ecg |= {"seen": seen["ecg"][i], "gradients": gradients["ecg"][i], "rate_hz": rate_hz}
    shown = {}
    for name, spec in towers.items():
      cells = found[f"map/{name}"][i, 0]
      labels = source[i].get("labels")
      shown[name] = example(spec, seen[name][i], cells, gradients[name][i], labels)
    examples.append({"ecg": ecg, "towers": shown})
  return completeness, examples


def example(spec, seen, cells, gradients, labels) -> dict:
  """What the figure of one recording shows of one tower, see `explain`.

  Args:
    spec: entry of the tower in config.model.towers.
    seen, gradients: [P, H, W].
    cells: the cosine at the cells of its feature map.
    labels: of the record, [2, Z, H, W], or None.
  """
  known = np.zeros(seen.shape, np.uint8)
  if labels is not None:
    for planes, inside in truth(spec, labels).values():
      known[planes] = inside
  near = enlarge(cells, spec, known.shape)
  top = top_tenth(near.reshape(1, -1)).reshape(near.shape) > 0
  return {"seen": seen, "labels": known, "cosine": near, "gradients": gradients, "top": top}


def make_ecg_maps(run):
  """(variables, batch, found) -> cosine and attention of each patch of the ECG, [B, L, patches];
  found as of `make_maps`."""
  model, towers = run.model, tower_lib.cmr(run.config.model)

  def maps(variables, batch, found):
    B, L, _ = batch["ecg"].shape
    windows, conditions = inputs.windows(
      batch["ecg"], batch.get("conditions"), run.config.data.samples
    )

    # of a lead, over all windows
    def in_a_row(x):
      return x.reshape(B, -1, L, x.shape[1] // L).swapaxes(1, 2).reshape(B, L, -1)

    tokens = model.apply(variables, windows, conditions, method="locate_ecg")

    def each(z):
      return jnp.repeat(z, len(windows) // B, axis=0)[:, None]

    near = sum(cosine(tokens, each(found[f"cmr/{name}"])) for name in towers) / len(towers)
    return {
      "cosine": in_a_row(near),
      "attention": in_a_row(attention_map(model, variables, windows, conditions)),
    }

  return maps


def make_slopes(run):
  """(variables, batch, found, share) -> cosines {TOWER: [B], ecg: [B]} at `share` of the way from
  zeros to the input, and their gradients there, {TOWER: [B, P, H, W], ecg: [B, L, T]}, of what is
  seen of it.

  The other modality stays as it is (found, as of `make_maps`); the ECG's cosine is the mean over
  towers.
  """
  model, samples = in_sight(run.model), run.config.data.samples
  towers = tower_lib.cmr(run.config.model)
  embed_ecg = inference.make_embed_ecg(model, samples)

  def slopes(variables, batch, found, share):
    def of_tower(cmr, name):
      z = model.apply(variables, batch | {"cmr": cmr}, only=(name,), method="encode_cmr")[name][
        "projection"
      ]
      near = cosine(z, found["ecg"])
      return near.sum(), near

    def of_ecg(ecg):
      z = embed_ecg(variables, ecg, batch.get("conditions"))["ecg_projection"]
      near = sum(cosine(z, found[f"cmr/{name}"]) for name in towers) / len(towers)
      return near.sum(), near

    near, slope = {}, {}
    scaled = jax.tree.map(lambda x: share * x, {name: batch[name] for name in ("cmr", "ecg")})
    (_, near["ecg"]), g = jax.value_and_grad(of_ecg, has_aux=True)(scaled["ecg"])
    slope["ecg"] = g[:, :, : g.shape[2] // samples * samples]
    for name, spec in towers.items():
      (_, near[name]), g = jax.value_and_grad(of_tower, has_aux=True)(scaled["cmr"], name)
      slope[name] = pretrainer.look(g, spec)
    return near, slope

  return slopes


# ----------------------------------------------------------------------------------------------------------------
# tables


def tables(results: dict) -> list[Table]:
  """Where the image maps point, where the cohort has labels; and whether gradients add up."""
  found = []
  if results.get("cosine"):
    found.append(inside_table(results["cosine"]))
  if "completeness" in results:
    found.append(completeness_table(results["completeness"]))
  return found


def inside_table(cosine: dict) -> Table:
  columns = {
    "value": "share",
    "another_ecg": "another ECG",
    "untrained": "untrained, one draw",
    "minus_another_ecg": "minus another ECG",
    "minus_untrained": "minus untrained",
  }
  rows = []
  for place, structures in cosine.items():
    for structure, score in structures.items():
      row = [place, structure, f"{score['n']:,}"]
      for name in columns:
        row.append(interval(score[name], score["ci" if name == "value" else f"{name}_ci"]))
      rows.append([*row, number(score["chance"])])
  title = "Localisation: share of the tenth of the pixels nearest to the ECG that lies inside"
  head = ["tower / phase", "inside", "n", *columns.values(), "by chance"]
  return Table(title, head, rows)


def completeness_table(completeness: dict) -> Table:
  """Of each recording shown: what the cosine gains over an input of zeros, and what integrated
  gradients account for."""
  rows = []
  for name, found in completeness.items():
    for i, (gain, total) in enumerate(zip(found["gain"], found["sum"]), 1):
      rows.append([name, str(i), f"{gain:.4f}", f"{total:.4f}"])
  head = ["input", "recording", "gain of the cosine", "sum of the gradients"]
  return Table("Integrated gradients: do they add up?", head, rows)
