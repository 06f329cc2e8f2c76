"""ACDC: short-axis cine of patients in five groups, a cohort of CMR alone.

    mmcl prepare acdc --input=ACDC/database/training --out=COHORT

Groups and their definition: Bernard et al., IEEE TMI 2018;37:2514, doi 10.1109/TMI.2018.2837502.
"""

from mmcl_jax.data import schema
from mmcl_jax.data.preprocess import cmr
from mmcl_jax.data.readers import acdc as reader, tables
from mmcl_jax.data.sources import Item, Plan, cmr_alone, labels
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
  folders, patients = [], {}
  for start in options.input:
    folders += reader.find(start)
  for folder in folders:
    name = tables.canonical(folder.resolve().name)
    patients.setdefault(name, folder)
  if not patients:
    given = " ".join(map(str, options.input))
    raise UserError(
      f"--input {given}: no patient's folder, with Info.cfg; expected "
      "ACDC's database/training or database/testing"
    )
  shape = getattr(options, "shape", cmr.Shape())
  still = []  # folders without a cine
  for folder in patients.values():
    cine = folder / f"{folder.resolve().name}_4d.nii.gz"
    if not cine.is_file():
      still.append(folder)
  steps = {"folders of patients": len(folders), "patients": len(patients)}
  if still and shape.frames:
    shape = shape._replace(frames=0)
    steps["patients without a _4d file, so no record has a cine_slice"] = len(still)
  patients = {name: (folder,) for name, folder in patients.items()}
  return cmr_alone.plan_of(options, identify, patients, shape, read, "ACDC", reader.NUMBERS, steps)


def read(shape: cmr.Shape, diseases: tuple[str, ...], item: Item):
  """(record, flags) of a patient; BadRecord where the images cannot be read or used."""
  about = reader.about(item.key)
  covariates = labels.covariates(height=about["height_cm"], weight=about["weight_kg"])
  states = labels.diseases(GROUPS.get(about["group"], {}), diseases)
  return cmr_alone.record_of(reader.read(item.key), shape, states, covariates)
