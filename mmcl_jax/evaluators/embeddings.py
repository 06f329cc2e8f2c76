"""Embeddings and labels of a whole split: what the probes need."""

import numpy as np

from mmcl_jax.training.over_split import over_split

LABELS = (
  "subject",
  "phenotypes",
  "diseases",
  "covariates",
  "ecg_parameters",
  "event_years",
  "followed_years",
  "has_ecg",
  "has_cmr",
)


def collect(
  embed,
  variables,
  source,
  *,
  mesh,
  batch: int,
  needs: str = "has_ecg",
  fields: tuple[str, ...] = (),
  threads: int = 2,
  title: str = "",
) -> dict[str, np.ndarray]:
  """Embeddings and labels of every record that has what the encoder reads, in the split's order.

  Args:
    embed: jitted (variables, batch) -> {name: [B, ...]} (models.inference.make_embed).
    needs: has_ecg, or has_cmr for an encoder of CMR alone.
    fields: stored CMR fields to read; without any, CMR towers are left out.
    source, mesh, batch, threads, title: see training.over_split.over_split.

  Returns:
    {name: [N, ...]}: what `embed` gives, the LABELS that are there, and `row`, the place in the
      split.
  """
  records = over_split(
    embed,
    variables,
    source,
    mesh=mesh,
    batch=batch,
    fields=fields,
    also=LABELS,
    threads=threads,
    title=title,
  )
  rows = np.flatnonzero(records[needs])
  kept = {name: x[rows] for name, x in records.items()}
  kept["row"] = rows
  return kept
