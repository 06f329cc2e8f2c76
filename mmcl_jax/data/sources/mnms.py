"""M&Ms: short-axis cine from several centres and vendors, a cohort of CMR alone.

    mmcl prepare mnms --input=OpenDataset --out=COHORT

Pathologies: Campello et al., IEEE TMI 2021;40:3543, doi 10.1109/TMI.2021.3090082.
"""

from mmcl_jax.data import schema
from mmcl_jax.data.preprocess import cmr
from mmcl_jax.data.readers import mnms as reader, tables
from mmcl_jax.data.sources import Item, Plan, cmr_alone, labels
from mmcl_jax.errors import BadRecord, UserError

TAKES = ("input", "withdrawn", "codes", "split", "slices", "size", "pixel_mm", "frames")
# others, such as HHD, AHS and ARV, are no disease of the schema, nor do they exclude one
PATHOLOGIES = {
  "NOR": dict.fromkeys(schema.DISEASES, 0.0),
  "DCM": {"CM": 1.0},
  "HCM": {"CM": 1.0},
  "LVNC": {"CM": 1.0},  # non-compaction: ICD-10 I42.8
  "IHD": {"CAD": 1.0},
}


def plan(options, identify) -> Plan:
  """`options`: `input` (folders that hold the table, such as OpenDataset); may have shape, codes,
  withdrawn."""
  patients = {}
  for start in options.input:
    try:
      for study in reader.find(start):
        patients[tables.canonical(study.folder.name)] = study, study.folder.name
    except BadRecord as error:
      raise UserError(f"--input {start}: {error}") from None
  if not patients:
    raise UserError(
      f"--input {' '.join(map(str, options.input))}: no patient of the table has a folder CODE "
      "with CODE_sa.nii.gz"
    )
  return cmr_alone.plan_of(
    options,
    identify,
    patients,
    getattr(options, "shape", cmr.Shape()),
    read,
    "M&Ms",
    reader.NUMBERS,
    {"patients of the table with a cine": len(patients)},
  )


def read(shape: cmr.Shape, diseases: tuple[str, ...], item: Item):
  """(record, flags) of a patient; BadRecord where the images cannot be read or used."""
  about = reader.about(item.key)
  covariates = labels.covariates(
    about["sex"], age=about["age"], height=about["height"], weight=about["weight"]
  )
  states = labels.diseases(PATHOLOGIES.get(about["pathology"].upper(), {}), diseases)
  return cmr_alone.record_of(reader.read(item.key), shape, states, covariates)
