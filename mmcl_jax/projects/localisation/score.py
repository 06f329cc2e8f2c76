"""How well image maps find the heart, where a cohort has labels.

Letters: B records, Q queries, S structures, N pixels, R bootstrap draws.
"""

import math

import numpy as np

from mmcl_jax.data import schema
from mmcl_jax.evaluators import statistics
from mmcl_jax.evaluators.retrieval import TIE
from mmcl_jax.models.cmr_tower import select_view
from mmcl_jax.projects.localisation.maps import enlarge

STRUCTURES = {"heart": ("LV", "MYO", "RV"), "LV": ("LV",), "MYO": ("MYO",)}
# the trained towers, asked with the ECG of another person; the untrained model
CONTROLS = ("another_ecg", "untrained")


def score(towers, source, maps: dict, weights: np.ndarray) -> dict:
  """How well the image maps find the heart.

  Args:
    towers: entries of the CMR towers in config.model.towers.
    source: B records with labels.
    maps: of `make_maps`, their rows in the same order, and of the untrained model
      untrained_map/TOWER.
    weights: [R, B] of the bootstrap.

  Returns:
    {TOWER/PHASE: {STRUCTURE: `summary`}}, of those views and phases whose labels show a heart.
  """
  shares = {}
  for i in range(len(source)):
    record = source[i]
    for name, spec in towers.items():
      # own ECG, CONTROLS
      trained = maps[f"map/{name}"][i]
      untrained = maps[f"untrained_map/{name}"][i, :1]
      cells = np.concatenate([trained, untrained])
      for phase, row in shares_of(spec, record, cells).items():
        shares.setdefault(f"{name}/{phase}", []).append(row)
  scores = {}
  for name, rows in shares.items():
    rows = np.stack(rows)  # [B, 4, S]
    by_structure = {}
    for s, structure in enumerate(STRUCTURES):
      by_structure[structure] = summary(rows[:, :, s], weights)
    if by_structure["heart"]["n"]:
      scores[name] = by_structure
  return scores


def shares_of(spec, record: dict, cells: np.ndarray) -> dict[str, np.ndarray]:
  """{phase: shares [Q + 1, S]} of the relevant pixels of one record inside each structure, the last
  row by chance; cells: the maps [Q, Z', H', W'] of a tower."""
  view = schema.VIEWS[spec.view]
  seen = select_view({view: record[view][None]}, spec)[0]
  relevance = enlarge(cells, spec, seen.shape)
  shares = {}
  for phase, (planes, labels) in truth(spec, record["labels"]).items():
    inside = []
    for names in STRUCTURES.values():
      values = [schema.LABELS[name] for name in names]
      of_structure = np.isin(labels, values)
      inside.append(of_structure.ravel())
    inside = np.stack(inside)
    chance = np.where(inside.any(axis=1), inside.mean(axis=1), np.nan)
    share = top_share(relevance[:, planes].reshape(len(relevance), -1), inside)
    shares[phase] = np.concatenate([share, chance[None]])
  return shares


def truth(spec, labels: np.ndarray) -> dict:
  """{phase: (planes, labels [planes, H, W])} of what a tower sees, from labels [2, Z, H, W];
  `planes`: a slice of its own.

  A cine's slice is the middle one of those that show the LV at ED and at ES, as it was cut. Views
  of which no plane is labelled give {}.
  """
  if schema.VIEWS[spec.view] == "ed_es_volumes":
    seen = select_view({"ed_es_volumes": labels[None]}, spec)[0]
    return {spec.view[:2]: (slice(None), seen)}
  moments = {"three_frames": {"ed": 0, "es": 2}, "cine_slice": {"ed": 0}}.get(spec.view, {})
  has_lv = (labels == schema.LABELS["LV"]).any(axis=(2, 3)).all(axis=0)
  slices = np.flatnonzero(has_lv)
  middle = slices[len(slices) // 2] if len(slices) else 0  # no LV: nothing to find in any slice
  labelled = {}
  for phase, plane in moments.items():
    of_phase = labels[schema.PHASES.index(phase)]
    labelled[phase] = slice(plane, plane + 1), of_phase[[middle]]
  return labelled


def top_share(relevance: np.ndarray, inside: np.ndarray) -> np.ndarray:
  """The share of the most relevant tenth of the pixels that lies inside each structure.

  Args:
    relevance: [Q, N].
    inside: bool [S, N].

  Returns:
    [Q, S]; NaN where there is no such structure, or relevance is NaN.
  """
  weight = top_tenth(relevance)
  share = weight @ inside.T / weight.sum(axis=1, keepdims=True)
  return np.where(inside.any(axis=1), share, np.nan)


def top_tenth(relevance: np.ndarray) -> np.ndarray:
  """[Q, N] -> weights [Q, N] of the most relevant tenth of the pixels: 1, and less where several
  tie for the last places.

  They share those, so that a map that says nothing gets what chance gets. NaN where relevance is
  NaN.
  """
  pixels = relevance.shape[1]
  places = math.ceil(pixels / 10)
  last = np.partition(relevance, pixels - places, axis=1)[:, [pixels - places]]
  above = relevance > last + TIE
  tied = np.abs(relevance - last) <= TIE
  left = places - above.sum(axis=1, keepdims=True)
  share = left / np.maximum(tied.sum(axis=1, keepdims=True), 1)
  return np.where(np.isfinite(last), above + tied * share, np.nan)


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
  trained, *controls, chance = shares.T.astype(np.float64)
  value, ci = mean_and_interval(trained, weights)
  scores = {"value": value, "ci": ci}
  for name, control in zip(CONTROLS, controls):
    scores[name], scores[f"{name}_ci"] = mean_and_interval(control, weights)
    difference = mean_and_interval(trained - control, weights)
    scores[f"minus_{name}"], scores[f"minus_{name}_ci"] = difference
  scores["chance"], _ = mean_and_interval(chance, weights)
  scores["n"] = int(np.isfinite(trained).sum())
  return scores


def mean_and_interval(x: np.ndarray, weights: np.ndarray) -> tuple[float, list[float]]:
  """Mean of the known values of x [B], and its interval by weights [R, B] of the bootstrap."""
  known = np.isfinite(x)
  count = weights @ known
  total = weights @ np.where(known, x, 0)
  draws = np.full(len(weights), np.nan)
  np.divide(total, count, out=draws, where=count > 0)
  mean = float(x[known].mean()) if known.any() else np.nan
  return mean, statistics.interval(draws).tolist()
