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
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from mmcl_jax import models
from mmcl_jax.data import pipeline
from mmcl_jax.data.preprocess import ecg as preprocess_ecg
from mmcl_jax.evaluators import statistics
from mmcl_jax.evaluators.base import Result, Table, interval, number
from mmcl_jax.evaluators.context import Context
from mmcl_jax.models import inputs, towers
from mmcl_jax.models.cmr_tower import select_view
from mmcl_jax.projects.localisation import drawings
from mmcl_jax.projects.localisation.maps import (
  enlarge,
  integrated_gradients,
  make_ecg_maps,
  make_maps,
  make_slopes,
  standardiser_of,
)
from mmcl_jax.projects.localisation.score import score, top_tenth, truth
from mmcl_jax.training.over_split import over_split

MOST = 256  # recordings scored: the first of test that have both ECG and CMR
SHOWN = 2  # of them drawn


def localisation(context: Context, draws: int = 1000, seed: int = 0) -> Result:
  """Scores and explains the split of a run with ECG and CMR towers on a cohort with both.

  Args:
    context: with the split that is scored.
    draws, seed: of the bootstrap over subjects.
  """
  if reason := context.why_unpaired():
    context.say(f"no localisation: {reason}")
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
  for name, spec in towers.cmr(run.model.config).items():
    if not hasattr(towers.build(spec), "feature_map"):
      say(f"no localisation: the tower {name} ({spec.fn}) has no feature map")
      return {}, []
  source = paired(cohort.splits[split], MOST)
  if not len(source):
    say(f"no localisation: no {split} recording of {cohort.path} has both an ECG and a CMR")
    return {}, []
  maps = maps_of_split(run, untrained, source, batch, f"localise {split}")
  results = {}
  if "labels" in cohort.info["shapes"]:
    weights = statistics.bootstrap_weights(maps["subject"], draws, seed)
    results["cosine"] = score(towers.cmr(run.config.model), source, maps, weights)
  tower = towers.build(run.model.config.towers.ecg)
  if not hasattr(tower, "locate") or not hasattr(tower, "attention_map"):
    say(f"no relevance maps of the ECG: the tower {type(tower).__name__} has no patches")
    return results, []
  shown = min(SHOWN, len(source))
  first = pipeline.Rows(source, list(range(shown)))
  maps = {name: x[:shown] for name, x in maps.items()}
  results["completeness"], examples = explain(run, first, maps)
  return results, examples


def say(text: str) -> None:
  if jax.process_index() == 0:
    print(text)


def paired(source, most: int) -> pipeline.Rows:
  """The first records with both an ECG and a CMR."""
  places = []
  silent = jax.process_index() > 0
  for i in tqdm(range(len(source)), "look for pairs", unit="record", delay=3, disable=silent):
    record = source[i]
    if record["has_ecg"] and record["has_cmr"]:
      places.append(i)
      if len(places) == most:
        break
  return pipeline.Rows(source, places)


def maps_of_split(run, untrained, source, batch: int, title: str) -> dict[str, np.ndarray]:
  """`make_maps` of all records of `source`, by the run and, as untrained_NAME, before training."""
  maps = jax.jit(make_maps(run))

  def both(pair, rows):
    trained, fresh = pair
    made = maps(trained, rows)
    for name, x in maps(fresh, rows).items():
      made[f"untrained_{name}"] = x
    return made

  return over_split(
    both,
    (run.state.variables, untrained),
    source,
    mesh=run.mesh,
    batch=batch,
    fields=models.fields(run.config.model),
    also=("subject",),
    title=title,
  )


def explain(run, source, maps: dict) -> tuple[dict, list[dict]]:
  """What the figures show, of all records of `source` in one batch.

  Args:
    maps: of `make_maps`, their rows in the same order.

  Returns:
    completeness: {TOWER or "ecg": {gain, sum, error}}: of each record, what the cosine gains over
      that of an input of zeros and the sum of the integrated gradients, which should be the same;
        the largest difference of the two.
    examples: of each record, {"ecg": {seen [L, T], cosine, attention, gradients [L, patches],
      rate_hz}, "towers": {TOWER: {seen, labels, cosine, top (of the most relevant tenth), gradients
        [P, H, W]}}}; labels are 0 where there are none.
  """
  config = run.config
  specs = towers.cmr(run.config.model)
  standardiser = standardiser_of(run)

  def jitted(function):
    return jax.jit(function, out_shardings=NamedSharding(run.mesh, PartitionSpec()))

  def to_float(rows):
    return inputs.to_float(rows, standardiser)

  fields = models.fields(config.model)
  rows = next(pipeline.one_pass(source, batch=len(source), fields=fields))
  batch = jitted(to_float)(rows)
  of_ecg = jax.device_get(jitted(make_ecg_maps(run))(run.state.variables, batch, maps))
  slopes = jitted(make_slopes(run))

  def at(share):
    return jax.device_get(slopes(run.state.variables, batch, maps, share))

  cmr = jax.device_get(batch["cmr"])
  seen = {name: select_view(cmr, spec) for name, spec in specs.items()}
  samples = of_ecg["cosine"].shape[2] * config.model.towers.ecg.patch
  seen["ecg"] = jax.device_get(batch["ecg"])[:, :, :samples]
  gradients = integrated_gradients(lambda share: at(share)[1], seen, "integrated gradients")
  (end, _), (start, _) = at(1.0), at(0.0)
  sums = completeness(start, end, gradients)
  # of every patch
  gradients["ecg"] = gradients["ecg"].reshape(*of_ecg["cosine"].shape, -1).sum(axis=-1)

  rate_hz = preprocess_ecg.rate_hz(config.data.ecg_profile)
  examples = []
  for i in range(len(source)):
    ecg = {name: x[i] for name, x in of_ecg.items()}
    ecg |= {"seen": seen["ecg"][i], "gradients": gradients["ecg"][i], "rate_hz": rate_hz}
    shown = {}
    for name, spec in specs.items():
      cells = maps[f"map/{name}"][i, 0]
      labels = source[i].get("labels")
      shown[name] = example(spec, seen[name][i], cells, gradients[name][i], labels)
    examples.append({"ecg": ecg, "towers": shown})
  return sums, examples


def completeness(start: dict, end: dict, gradients: dict) -> dict[str, dict]:
  """Of each input, what its cosine gains from start to end beside the sum of its gradients."""
  sums = {}
  for name, x in gradients.items():
    gain = end[name] - start[name]
    total = x.reshape(len(x), -1).sum(axis=1)
    error = float(np.abs(gain - total).max())
    sums[name] = {"gain": gain.tolist(), "sum": total.tolist(), "error": error}
  return sums


def example(spec, seen, cells, gradients, labels) -> dict:
  """What the figure of one recording shows of one tower, see `explain`.

  Args:
    spec: entry of the tower in config.model.towers.
    seen, gradients: [P, H, W].
    cells: the cosine at the cells of its feature map.
    labels: of the record, [2, Z, H, W], or None.
  """
  shown = np.zeros(seen.shape, np.uint8)
  if labels is not None:
    for planes, of_phase in truth(spec, labels).values():
      shown[planes] = of_phase
  near = enlarge(cells, spec, shown.shape)
  top = top_tenth(near.reshape(1, -1)).reshape(near.shape) > 0
  return {"seen": seen, "labels": shown, "cosine": near, "gradients": gradients, "top": top}


# --------------------------------------------------------------------------------------------------
# tables


def tables(results: dict) -> list[Table]:
  """Where the image maps point, where the cohort has labels; and whether gradients add up."""
  shown = []
  if results.get("cosine"):
    shown.append(inside_table(results["cosine"]))
  if "completeness" in results:
    shown.append(completeness_table(results["completeness"]))
  return shown


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
    for structure, scores in structures.items():
      row = [place, structure, f"{scores['n']:,}"]
      for name in columns:
        ci = "ci" if name == "value" else f"{name}_ci"
        row.append(interval(scores[name], scores[ci]))
      rows.append([*row, number(scores["chance"])])
  title = "Localisation: share of the tenth of the pixels nearest to the ECG that lies inside"
  head = ["tower / phase", "inside", "n", *columns.values(), "by chance"]
  return Table(title, head, rows)


def completeness_table(completeness: dict) -> Table:
  """Of each recording shown: what the cosine gains over an input of zeros, and what integrated
  gradients account for."""
  rows = []
  for name, input_ in completeness.items():
    for i, (gain, total) in enumerate(zip(input_["gain"], input_["sum"]), 1):
      rows.append([name, str(i), f"{gain:.4f}", f"{total:.4f}"])
  head = ["input", "recording", "gain of the cosine", "sum of the gradients"]
  return Table("Integrated gradients: do they add up?", head, rows)
