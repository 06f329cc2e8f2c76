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
  gallery: np.ndarray,
  labels: np.ndarray,
  val: np.ndarray,
  val_labels: np.ndarray,
  test: np.ndarray,
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
  val_means = means(gallery, labels, val)  # [G, N, K]
  test_means = means(gallery, labels, test)
  squares = (val_means - val_labels) ** 2
  error = np.nansum(squares, axis=1)  # [G, K]
  from_deepest = np.argmin(error[::-1], axis=0)
  best = len(error) - 1 - from_deepest
  return {"val": with_depth(val_means, best), "test": with_depth(test_means, best)}


def with_depth(predictions: np.ndarray, depth: np.ndarray) -> np.ndarray:
  """Of predictions [G, N, K] those with each label's own number of neighbours, its place in
  NEIGHBOURS: depth [K] -> [N, K]."""
  return np.take_along_axis(predictions, depth[None, None], axis=0)[0]


def means(
  gallery: np.ndarray,
  labels: np.ndarray,
  queries: np.ndarray,
) -> np.ndarray:
  """Mean label [G, N, K] of the nearest NEIGHBOURS, as many as the gallery has."""
  labelled = np.isfinite(labels)
  values = np.where(labelled, labels, 0.0).astype(np.float64)
  gallery_count = labelled.sum(axis=0)
  gallery_total = values.sum(axis=0)
  gallery_mean = gallery_total / np.maximum(gallery_count, 1)
  people, label_count = labels.shape
  depths = np.minimum(NEIGHBOURS, people)
  deepest = depths[-1]
  averages = np.empty((len(depths), len(queries), label_count))
  block = max(1, BLOCK_SCORES // max(people, deepest * label_count))
  for start in range(0, len(queries), block):
    rows = slice(start, start + block)
    scores = queries[rows] @ gallery.T
    # ties by the order of the gallery
    order = np.argsort(-scores, axis=1, kind="stable")
    nearest = order[:, :deepest]
    for g, depth in enumerate(depths):
      neighbours = nearest[:, :depth]
      count = labelled[neighbours].sum(axis=1)
      total = values[neighbours].sum(axis=1)
      mean = total / np.maximum(count, 1)
      averages[g, rows] = np.where(count > 0, mean, gallery_mean)
  return averages
