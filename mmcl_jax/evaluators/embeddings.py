"""Runs the towers over a whole split and gathers what the probes need, the same arrays on every host."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from mmcl_jax.data import pipeline
from mmcl_jax.training import parallel

LABELS = ("subject", "phenotypes", "diseases", "covariates", "ecg_parameters")


def collect(embed, variables, source, *, mesh, batch: int, views: tuple[str, ...] = (), threads: int = 2,
            title: str = "") -> dict[str, np.ndarray]:
  """Embeddings and labels of every recording that has an ECG, in cohort order.

  Args:
    embed: jitted (variables, batch) -> {name: [B, ...]} (training.steps.make_embed).
    source: records of one split.
    views: CMR views to read; without any, CMR towers are left out.
    title: shown with progress, rate and ETA; nothing is shown without one.

  Returns:
    {name: [N, ...]}: what `embed` gives, the LABELS that are there, and has_cmr.
  """
  batch = -(-batch // mesh.shape["data"]) * mesh.shape["data"]
  batches = pipeline.one_pass(source, batch=batch, views=views, host=jax.process_index(), hosts=jax.process_count(),
                              threads=threads)
  parts = []
  for rows in tqdm(batches, title, -(-len(source) // batch), unit_scale=batch, unit="recording", mininterval=1,
                   disable=not title or jax.process_index() > 0):
    rows = parallel.to_global(rows, mesh)
    found = embed(variables, rows) | {name: rows[name] for name in LABELS if name in rows}
    found |= {name: rows[name] for name in ("index", "mask", "has_ecg", "has_cmr")}
    many = jax.process_count() > 1
    parts.append(multihost_utils.process_allgather(found, tiled=True) if many else jax.device_get(found))
  whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  kept = np.flatnonzero((whole.pop("mask") * whole.pop("has_ecg")) > 0)
  order = kept[np.argsort(whole.pop("index")[kept], kind="stable")]
  return {name: x[order] for name, x in whole.items()}
