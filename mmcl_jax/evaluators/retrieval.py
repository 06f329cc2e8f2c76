"""Retrieval across modalities: given a subject's ECG, where does the subject's own CMR rank among
all, and back.

Letters: N rows (recordings with both an ECG and a CMR), P phases, E projection width.
"""

import numpy as np

from mmcl_jax.evaluators.base import Result, Table
from mmcl_jax.evaluators.context import Context
from mmcl_jax.reports import figures

DEPTHS = (1, 5, 10)
TIE = 1e-6  # cosines nearer than this are equal: it covers the rounding of float32 products
BLOCK_SCORES = 2**22  # scores held at a time


def retrieval(context: Context) -> Result:
  """Retrieval over the scored split, of a run with ECG and CMR towers on a cohort with both."""
  if why := context.why_unpaired():
    context.say(f"no retrieval: {why}")
    return Result()
  features = context.features(context.split)
  pairs = features["has_cmr"] > 0
  if not pairs.any():  # an ECG and a CMR, not only the one here, the other there
    return Result()
  results, ranks_of_pairs = evaluate(
    features["ecg_projection"][pairs],
    features["cmr_projection"][pairs],
    features["subject"][pairs],
  )
  figure = figures.retrieval_ranks(ranks_of_pairs, context.note)
  figure.set_label("Retrieval: share answered within the first k")
  scores = results["ecg_to_cmr"]
  context.say(
    f"retrieval of the CMR by its ECG: R@10 {scores['r@10']:.3f} (chance "
    f"{scores['chance_r@10']:.3f}, {scores['n_candidates']} candidates)"
  )
  return Result({"retrieval": results}, [table(results, context.split)], {"retrieval": figure})


def evaluate(
  ecg: np.ndarray,
  cmr: np.ndarray,
  subject: np.ndarray,
) -> tuple[dict, dict]:
  """Retrieval over the whole split, in both directions.

  Args:
    ecg: [N, E].
    cmr: [N, P, E]; the score of a pair is its cosine, averaged over phases.
    subject: [N, 2]; rows of one subject are correct answers for each other.

  Returns:
    {'ecg_to_cmr': ..., 'cmr_to_ecg': ...}, each {r@1, r@5, r@10, median_rank, n_candidates,
    chance_r@10}; and the same directions, each with the ranks [N] behind it, of `ranks`.
  """
  of_directions = ranks(ecg, cmr, subject)
  results = {}
  for direction, of_rows in of_directions.items():
    results[direction] = summary(of_rows, subject)
  return results, of_directions


def ranks(ecg: np.ndarray, cmr: np.ndarray, subject: np.ndarray) -> dict:
  """{direction: int [N]}: rank (1 = first) of each row's best correct answer among the rows of
  other subjects."""
  ecg = unit(ecg)
  cmr = unit(cmr).mean(axis=1)  # the mean of cosines is the product with the mean of unit vectors
  _, person = np.unique(subject, axis=0, return_inverse=True)
  person = person.ravel()
  return {
    "ecg_to_cmr": ranks_of_queries(ecg, cmr, person),
    "cmr_to_ecg": ranks_of_queries(cmr, ecg, person),
  }


def summary(of_rows: np.ndarray, subject: np.ndarray) -> dict:
  """Recall at each depth, and what shuffled answers would get, of ranks [N]."""
  n = len(of_rows)
  recall = {}
  for depth in DEPTHS:
    recall[f"r@{depth}"] = float(np.mean(of_rows <= depth))
  return {
    **recall,
    "median_rank": float(np.median(of_rows)),
    "n_candidates": n,
    "chance_r@10": chance(subject, 10),
  }


def chance(subject: np.ndarray, depth: int) -> float:
  """Recall at a depth of answers in a random order."""
  n = len(subject)
  _, person, rows = np.unique(subject, axis=0, return_inverse=True, return_counts=True)
  others = n - rows[person.ravel()]
  # the first places, drawn without replacement, all go to other subjects with probability `missed`
  places = np.arange(min(depth, n))
  others_left = np.maximum(others[:, None] - places, 0)
  missed = np.prod(others_left / (n - places), axis=1)
  return float(np.mean(1 - missed))


def unit(x: np.ndarray) -> np.ndarray:
  """Vectors of length 1 along the last axis; a zero vector stays zero and so scores 0 against
  all."""
  x = np.asarray(x, np.float64)
  length = np.linalg.norm(x, axis=-1, keepdims=True)
  x = x / np.maximum(length, 1e-12)
  return x.astype(np.float32)


def ranks_of_queries(queries, gallery, person):
  """Ranks [N] by blocks of queries. Not below counts as above, so ties (a collapsed encoder) and
  NaN never help."""
  block = max(1, BLOCK_SCORES // max(1, len(gallery)))
  rank = np.empty(len(queries), np.int64)
  for start in range(0, len(queries), block):
    rows = slice(start, start + block)
    scores = queries[rows] @ gallery.T
    own = person[rows, None] == person
    own_scores = np.where(own, scores, -np.inf)
    best = own_scores.max(axis=1, keepdims=True)
    below = scores < best - TIE
    ahead = ~own & ~below
    rank[rows] = 1 + ahead.sum(axis=1)
  return rank


def table(results: dict, split: str = "test") -> Table:
  """Recall, median rank and chance of both directions."""
  columns = list(next(iter(results.values())))
  head = ["direction"]
  for column in columns:
    head.append(column.replace("_", " "))
  rows = []
  for direction, scores in results.items():
    row = [direction.replace("_", " ")]
    for column in columns:
      value = scores[column]
      row.append(f"{value:,.3g}" if isinstance(value, float) else f"{value:,}")
    rows.append(row)
  return Table(f"Retrieval over the {split} split", head, rows)
