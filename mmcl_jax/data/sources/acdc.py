"""ACDC: short-axis cine of patients in five groups, a cohort of CMR alone.

    mmcl prepare acdc --input=ACDC/database/training --out=COHORT

Groups and their definition: Bernard et al., IEEE TMI 2018;37:2514, doi 10.1109/TMI.2018.283 7502.
"""

import functools

import numpy as np

from mmcl_jax.data import schema
from mmcl_jax.data.preprocess import cmr
from mmcl_jax.data.readers import acdc as reader, tables
from mmcl_jax.data.sources import Item, Plan, labels
from mmcl_jax.data.ukb_fields import disease_codes
from mmcl_jax.errors import UserError

TAKES = ("input", "withdrawn", "codes", "split", "slices", "size", "pixel_mm", "frames")
GROUPS = {
  "NOR": dict.fromkeys(schema.DISEASES, 0.0),
  "MINF": {"MI": 1.0},  # after an infarction, with reduced ejection fraction
  "DCM": {"CM": 1.0},
  "HCM": {"CM": 1.0},
  "RV": {},  # of abnormal volume or function, from several causes
}


def plan(options, identify) -> Plan:
  """`options`: `input` (folders that hold patients, at any depth); may have shape, codes,
  withdrawn."""
  folders, patients = [folder for start in options.input for folder in reader.find(start)], {}
  for folder in folders:
    patients.setdefault(tables.canonical(folder.resolve().name), folder)
  if not patients:
    raise UserError(
      f"--input {' '.join(map(str, options.input))}: no patient's folder, with Info.cfg; expected ACDC's "
      "database/training or database/testing"
    )
  shape = getattr(options, "shape", cmr.Shape())
  still = [
    folder
    for folder in patients.values()
    if not (folder / f"{folder.resolve().name}_4d.nii.gz").is_file()
  ]
  steps = {"folders of patients": len(folders), "patients": len(patients)}
  if still and shape.frames:
    shape = shape._replace(frames=0)
    steps["patients without a _4d file, so no record has a cine_slice"] = len(still)
  return plan_of(
    options,
    identify,
    {name: (folder,) for name, folder in patients.items()},
    shape,
    read,
    "ACDC",
    reader.NUMBERS,
    steps,
  )


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
  # of hashes: not the order of participants
  items.sort(key=lambda item: item.subject[::-1].tolist())
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


def read(shape: cmr.Shape, diseases: tuple[str, ...], item: Item):
  """(record, flags) of a patient; BadRecord where the images cannot be read or used."""
  about = reader.about(item.key)
  covariates = labels.covariates(height=about["height_cm"], weight=about["weight_kg"])
  return record_of(
    reader.read(item.key),
    shape,
    labels.diseases(GROUPS.get(about["group"], {}), diseases),
    covariates,
  )


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
