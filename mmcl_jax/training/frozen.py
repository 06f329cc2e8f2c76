"""Frozen CMR towers run once: their features, in evaluation mode and without augmentation, are kept beside the cohort.

    COHORT.cache/FINGERPRINT/SPLIT.TOWER.npy     float32 [N, F], one row a record of the split, in its order

The fingerprint is of the cohort, the tower's config and its weights, so another tower or cohort never meets old features.
"""

import hashlib
import json
import os
import pathlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmcl_jax.data import pipeline
from mmcl_jax.models import pretrainer
from mmcl_jax.training import inference, steps


def fingerprint(cohort, name: str, spec, variables) -> str:
  """128 bits of the cohort, the tower's config and its weights."""
  digest = hashlib.blake2b(json.dumps([cohort.fingerprint, spec.to_dict()], sort_keys=True).encode(), digest_size=16)
  for collection in ("params", "batch_stats"):
    backbone = variables[collection].get(f"cmr_{name}", {}).get("backbone", {})
    for path, leaf in jax.tree_util.tree_leaves_with_path(backbone):
      digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
  return digest.hexdigest()


def with_features(cohort, split: str, model, variables, mesh, batch: int, threads: int = 2):
  """The records of a split with the features of all frozen towers; runs the towers where no features are kept yet.

  Args:
    batch: rows at a time.

  Returns:
    the split's source as it is where no tower is frozen, else pipeline.WithFeatures.
  """
  frozen = {name: spec for name, spec in model.config.cmr.items() if spec.frozen}
  source = cohort.splits[split]
  if not frozen or not len(source):
    return source
  root = pathlib.Path(f"{str(cohort.path).rstrip('/')}.cache")
  files = {name: root / fingerprint(cohort, name, spec, variables) / f"{split}.{name}.npy" for name, spec in frozen.items()}
  if not all(file.is_file() for file in files.values()):
    found = inference.over_split(jax.jit(steps.make_features(model)), variables, source, mesh=mesh, batch=batch,
                                 fields=pretrainer.fields(model.config), threads=threads, title=f"frozen towers, {split}")
    if jax.process_index() == 0:
      for name, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
        with open(partial, "wb") as f:
          np.save(f, found[name].astype(np.float32))
        partial.rename(file)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"features of {split}")
  return pipeline.WithFeatures(source, {name: str(file) for name, file in files.items()})
