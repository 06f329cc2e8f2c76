"""What sources of CMR alone share: the plan of patients with a short-axis cine, and its records."""

import functools

import numpy as np

from mmcl_jax.data import schema
from mmcl_jax.data.preprocess import cmr
from mmcl_jax.data.readers import tables
from mmcl_jax.data.sources import Item, Plan, by_hash
from mmcl_jax.data.ukb_fields import disease_codes


def plan_of(options, identify, patients, shape, read, source, numbers, steps) -> Plan:
  """The Plan of a cohort of CMR alone: {participant: (what the reader takes, more texts that
  identify)}."""
  codes = disease_codes(getattr(options, "codes", None))
  withdrawn = getattr(options, "withdrawn", None)
  gone = tables.withdrawn(withdrawn) if withdrawn else set()
  items, rejected = [], []
  for name, (entry, *more) in patients.items():
    item = Item(identify(name), 0, entry, (name, *more))
    if name in gone:
      rejected.append((item, "the participant has withdrawn"))
    else:
      items.append(item)
  items.sort(key=by_hash)
  info = {
    "source": source,
    "phenotypes": schema.PHENOTYPES,
    "phenotypes_from": "segmentation",
    "diseases": list(codes),
    "covariates": schema.COVARIATES,
    "cmr_shape": shape._asdict(),
    "source_labels": numbers,
  }
  return Plan(items, functools.partial(read, shape, tuple(codes)), info, steps, rejected)


def record_of(cine, shape, diseases, covariates):
  """(record, flags) of a short-axis cine without ECG."""
  fields, phenotypes, flags = cmr.to_record(cine, shape)
  record = {
    "has_ecg": np.False_,
    "has_cmr": np.True_,
    "ecg": np.zeros((len(schema.LEADS), schema.ECG_SAMPLES), np.float32),
    **fields,
    "phenotypes": np.array([phenotypes[name] for name in schema.PHENOTYPES], np.float32),
    "diseases": diseases,
    "covariates": covariates,
  }
  return record, flags
