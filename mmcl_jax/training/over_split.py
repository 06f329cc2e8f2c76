"""A jitted function over every record of a split, the same arrays on every host."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from mmcl_jax.data import pipeline
from mmcl_jax.training import parallel


def over_split(
  function,
  variables,
  source,
  *,
  mesh,
  batch: int,
  fields: tuple[str, ...] = (),
  also: tuple[str, ...] = (),
  threads: int = 2,
  title: str = "",
) -> dict[str, np.ndarray]:
  """What `function` gives for every record, in the split's order.

  Args:
    function: jitted (variables, batch) -> {name: [B, ...]}.
    source: records of one split.
    batch: rows at a time, rounded up to the mesh.
    fields: stored CMR fields to read.
    also: names of the record to return beside, where it has them.
    title: shown with progress, rate and ETA; nothing is shown without one.

  Returns:
    {name: [N, ...]} without padding.
  """
  batch = -(-batch // mesh.shape["data"]) * mesh.shape["data"]
  batches = pipeline.one_pass(
    source,
    batch=batch,
    fields=fields,
    also=also,
    host=jax.process_index(),
    hosts=jax.process_count(),
    threads=threads,
  )
  parts = []
  for rows in tqdm(
    batches,
    title,
    -(-len(source) // batch),
    unit_scale=batch,
    unit="record",
    mininterval=1,
    disable=not title or jax.process_index() > 0,
  ):
    rows = parallel.to_global(rows, mesh)
    found = function(variables, rows) | {
      name: rows[name] for name in (*also, "index") if name in rows
    }
    many = jax.process_count() > 1
    parts.append(
      multihost_utils.process_allgather(found, tiled=True) if many else jax.device_get(found)
    )
  whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  order = np.argsort(whole.pop("index"), kind="stable")[: len(source)]  # padding comes last
  return {name: x[order] for name, x in whole.items()}
