"""Frozen CMR towers run once: their features, in evaluation mode and without augmentation, are kept
beside the cohort.

    COHORT.cache/FINGERPRINT/SPLIT.npy     float32 [N, F], one row a record of the split, in its
      order

The fingerprint is of the cohort, of what in the tower's config its features hang on, and of its
weights, so that another tower or cohort never meets old features. Where nothing can be written
beside the cohort, WORKDIR/features takes its place.
"""

import hashlib
import json
import os
import pathlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmcl_jax import models
from mmcl_jax.data import pipeline
from mmcl_jax.errors import UserError
from mmcl_jax.models import inference
from mmcl_jax.support import files
from mmcl_jax.training.over_split import over_split

VERSION = 1  # of what a tower makes of an image; raise it when that changes
# keys of a tower's entry that its features do not depend on
NOT_DECIDING = ("width", "frozen", "mask_ratio", "drop_path")


def fingerprint(cohort, name: str, config, variables) -> str:
  """128 bits of the cohort, the tower `name` of `config` (config.model) and its weights."""
  spec = config.towers[name].to_dict()
  deciding = sorted((key, x) for key, x in spec.items() if key not in NOT_DECIDING)
  facts = [VERSION, cohort.fingerprint, config.dtype, deciding]
  digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16)
  for collection in ("params", "batch_stats"):
    backbone = variables[collection].get(f"cmr_{name}", {}).get("backbone", {})
    for path, leaf in jax.tree_util.tree_leaves_with_path(backbone):
      digest.update(jax.tree_util.keystr(path).encode() + on_host(leaf).tobytes())
  return digest.hexdigest()


def on_host(leaf) -> np.ndarray:
  """A parameter on the host, wherever its parts lie."""
  if not getattr(leaf, "is_fully_replicated", True):
    leaf = multihost_utils.process_allgather(leaf, tiled=True)
  return np.asarray(leaf)


def with_features(
  cohort, split: str, model, variables, mesh, workdir: str, batch: int, threads: int = 2
):
  """The records of a split with the features of all frozen towers; runs the towers whose features
  are not kept yet.

  Args:
    workdir: of the run, for features that cannot be kept beside the cohort.
    batch: rows at a time.

  Returns:
    the split's source as it is where no tower is frozen, else pipeline.WithFeatures.
  """
  frozen = models.frozen(model.config)
  source = cohort.splits[split]
  if not frozen or not len(source):
    return source
  root = folder(cohort, workdir)
  places = {
    name: root / fingerprint(cohort, name, model.config, variables) / f"{split}.npy"
    for name in frozen
  }
  # One host may have what another lacks, and all must run the towers together or not at all.
  lacking = np.array([not kept(file, len(source)) for file in places.values()])
  somewhere = lacking
  if jax.process_count() > 1:
    somewhere = multihost_utils.process_allgather(lacking).any(axis=0)
  if run := [name for name, absent in zip(places, somewhere) if absent]:
    fields = models.fields(model.config, only=run)
    features = over_split(
      jax.jit(inference.make_features(model, run)),
      variables,
      source,
      mesh=mesh,
      batch=batch,
      fields=fields,
      also=("mask",),
      threads=threads,
      title=f"frozen towers ({', '.join(run)}), {split}",
    )
    # records that cannot be read today: features of nothing must not be those of tomorrow
    complete = features["mask"].all()
    if not complete:
      places |= {name: places[name].with_name(f"{split}-incomplete.npy") for name in run}
    # host 0 first: where the folder is shared, the others find the files there
    for turn_of_host_0 in (True, False):
      my_turn = (jax.process_index() == 0) is turn_of_host_0
      for name in run:
        if my_turn and not (complete and kept(places[name], len(source))):
          write(places[name], features[name].astype(np.float32))
      multihost_utils.sync_global_devices(f"features of {split}")
  return pipeline.WithFeatures(source, {name: str(file) for name, file in places.items()})


def folder(cohort, workdir: str) -> pathlib.Path:
  beside = pathlib.Path(f"{os.path.abspath(cohort.path)}.cache")
  files.no_links(beside, pathlib.Path(workdir) / "features")
  try:
    beside.mkdir(exist_ok=True)
    if os.access(beside, os.W_OK | os.X_OK):
      return beside
  except OSError:
    pass
  if jax.process_index() == 0:
    print(
      f"{beside} cannot be written; features of frozen towers go to {workdir}/features", flush=True
    )
  return pathlib.Path(workdir) / "features"


def kept(file: pathlib.Path, rows: int) -> bool:
  """Is the file there and whole? Mapped, and never a pickle."""
  try:
    features = np.load(file, mmap_mode="r", allow_pickle=False)
    return features.dtype == np.float32 and features.ndim == 2 and len(features) == rows
  except (OSError, ValueError, EOFError):
    return False


def write(file: pathlib.Path, features: np.ndarray) -> None:
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    # several runs may train on a cohort
    with files.atomic(file, "wb", shared=True) as f:
      np.save(f, features)
  except OSError as error:
    raise UserError(
      f"cannot write the features of a frozen tower to {file}: {error.strerror or error}; make "
      "room, or set "
      "config.model.towers.NAME.frozen=False to run the tower in every step"
    ) from None
