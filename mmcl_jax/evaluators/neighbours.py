"""Phenotypes and diseases by neighbours: what the nearest people of the train split had, on
average.

From the ECG embedding it is the k-NN probe. From an ECG to the CMR of others in the shared space of
the projections it is zero-shot: nothing was fitted to a label.

Letters: N queries, M people of the gallery, D features, K labels, G numbers of neighbours.
"""

import numpy as np

NEIGHBOURS = (1, 3, 10, 30, 100, 300)
BLOCK_SCORES = 2**22  # scores held at a time


def predict(
  gallery: np.ndarray, labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray, test: np.ndarray
) -> dict[str, np.ndarray]:
  """Mean label of the k people of the gallery of highest product with a query; of each label, k is
  chosen on validation.

  Args:
    gallery: [M, D] of train; of unit vectors the product is the cosine.
    labels: [M, K], NaN = unknown: the mean is over those who are known, and over the gallery where
    nobody is.
    val, val_labels, test: [N, D], [N, K], [N, D].

  Returns:
    predictions [N, K] of `val` and `test`, with the k of least squared error; ties (no label there)
      to the most neighbours.
  """
  # [G, N, K] each
  said = {"val": means(gallery, labels, val), "test": means(gallery, labels, test)}
  error = np.nansum((said["val"] - val_labels) ** 2, axis=1)
  best = len(error) - 1 - np.argmin(error[::-1], axis=0)
  return {split: np.take_along_axis(x, best[None, None], axis=0)[0] for split, x in said.items()}


def means(gallery: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
  """Mean label [G, N, K] of the nearest NEIGHBOURS, as many as the gallery has."""
  known = np.isfinite(labels)
  values = np.where(known, labels, 0.0).astype(np.float64)
  everybody = values.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
  most, depths = min(NEIGHBOURS[-1], len(gallery)), np.minimum(NEIGHBOURS, len(gallery))
  found = np.empty((len(depths), len(queries), labels.shape[1]))
  block = max(1, BLOCK_SCORES // max(len(gallery), most * labels.shape[1]))
  for start in range(0, len(queries), block):
    scores = queries[start : start + block] @ gallery.T
    # ties by the order of the gallery
    nearest = np.argsort(-scores, axis=1, kind="stable")[:, :most]
    for g, depth in enumerate(depths):
      count = known[nearest[:, :depth]].sum(axis=1)
      total = values[nearest[:, :depth]].sum(axis=1)
      found[g, start : start + block] = np.where(count > 0, total / np.maximum(count, 1), everybody)
  return found
