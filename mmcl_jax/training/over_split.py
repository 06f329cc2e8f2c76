"""A jitted function over every record of a split, the same arrays on every host."""

import collections
import math

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
  batches = tqdm(
    batches,
    title,
    math.ceil(len(source) / batch),
    unit_scale=batch,
    unit="record",
    mininterval=1,
    disable=not title or jax.process_index() > 0,
  )
  results = collections.defaultdict(list)  # name -> of every batch
  for rows in batches:
    rows = parallel.to_global(rows, mesh)
    outputs = dict(function(variables, rows))
    for name in (*also, "index"):
      if name in rows:
        outputs[name] = rows[name]
    for name, x in on_host(outputs).items():
      results[name].append(x)
  joined = {name: np.concatenate(arrays) for name, arrays in results.items()}
  order = np.argsort(joined.pop("index"), kind="stable")[: len(source)]  # padding comes last
  return {name: x[order] for name, x in joined.items()}


def on_host(arrays):
  """The whole of arrays whose rows lie on several hosts, on each of them."""
  if jax.process_count() > 1:
    return multihost_utils.process_allgather(arrays, tiled=True)
  return jax.device_get(arrays)
