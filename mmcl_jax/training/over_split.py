"""A jitted function over every record of a split, the same arrays on every host."""

import collections
import math
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from tqdm import tqdm

from mmcl_jax.data import pipeline
from mmcl_jax.training import parallel

# rows that all hosts together hand to each other at once: what a device has room for
GATHERED_ROWS = 2**16


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

  A batch is fetched once the next one has been given to the devices, which so do not wait for the
  host. Each host fetches its own rows; all of them are exchanged at the end.

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
  results = collections.defaultdict(list)  # name -> this host's rows of every batch
  for rows, outputs in one_late(dispatched(function, variables, batches, mesh)):
    beside = {name: rows[name] for name in (*also, "index") if name in rows}
    for name, x in (own_rows(outputs) | beside).items():
      results[name].append(x)
  joined = {name: of_all_hosts(np.concatenate(arrays)) for name, arrays in results.items()}
  order = np.argsort(joined.pop("index"), kind="stable")[: len(source)]  # padding comes last
  return {name: x[order] for name, x in joined.items()}


def dispatched(function, variables, batches: Iterable[dict], mesh) -> Iterator[tuple[dict, dict]]:
  """(rows on the host, outputs on the devices, which may not be computed yet) of every batch."""
  split = NamedSharding(mesh, P("data"))
  for rows in batches:
    outputs = dict(function(variables, parallel.to_global(rows, mesh)))
    yield rows, jax.device_put(outputs, split)  # each row on its host, as `rows` are


def one_late(items: Iterable) -> Iterator:
  """The items, each of them once the one after it is there."""
  waiting = collections.deque()
  for item in items:
    waiting.append(item)
    if len(waiting) > 1:
      yield waiting.popleft()
  yield from waiting


def own_rows(arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
  """The rows of arrays, split over `data`, that lie on this host, in their order."""
  if jax.process_count() == 1:
    return jax.device_get(arrays)
  found = {}
  for name, x in arrays.items():
    shards = {}  # first row -> rows; devices of one row of the mesh have the same
    for shard in x.addressable_shards:
      shards[shard.index[0].start or 0] = shard.data
    found[name] = np.concatenate(jax.device_get([shards[first] for first in sorted(shards)]))
  return found


def of_all_hosts(rows: np.ndarray) -> np.ndarray:
  """Every host's rows, equally many, on each of them."""
  hosts = jax.process_count()
  if hosts == 1:
    return rows
  piece = max(GATHERED_ROWS // hosts, 1)
  gathered = []
  for first in range(0, len(rows), piece):
    gathered.append(multihost_utils.process_allgather(rows[first : first + piece], tiled=True))
  return np.concatenate(gathered)
