"""Raw UK Biobank data of synthetic hearts, for tests of the way in, laid out as on the Research
Analysis Platform.

    python tests/helpers/raw_ukb.py --out=raw --subjects=48

    raw/Bulk/Electrocardiogram/Resting/NN/{eid}_20205_{instance}_{array}.xml
    raw/Bulk/Heart MRI/Short axis/NN/{eid}_20209_{instance}_{array}.zip
    raw/Segmentations/{eid}_{instance}/seg_sa.nii.gz      as ukbb_cardiac writes them
    raw/tables/{phenotypes.csv,covariates.tsv,outcomes.parquet}, raw/withdrawn.csv

Every visit is a synthetic heart, so what must come out is known: see `Visit` and `heart`. Chosen
subjects carry a fault (raw_ukb_faults.py). Names, places and dates of birth are invented and
planted where the real ones stand, to see that none gets through.
"""

import argparse
import concurrent.futures
import hashlib
import io
import json
import multiprocessing
import pathlib
import re
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import nibabel
import numpy as np
import pandas as pd
import pydicom

from mmcl_jax.data import measure, schema
from mmcl_jax.data.synthetic import cmr, ecg, population

# name, given name, hospital, date of birth
PLANTED = ("Quillfeather", "Ottoline", "Bartleby", "19370429")
RESOLUTION_UV = 5
SYSTOLE = int(cmr.EJECTED.argmax())  # the frame of least volume among cmr.FRAMES
# columns on either side: rows and columns differ, so that a transposed image shows
PAD = 8
ISOCENTRE = np.array([-93.0, -61.5, 40.25])  # mm, of the first pixel of the basal slice
# along a row, down a column; normal to the apex
ROW, COLUMN = np.array([0.8, 0.0, 0.6]), np.array([-0.36, -0.8, 0.48])
FIELDS = {
  "LVEDV": 24100,
  "LVESV": 24101,
  "LVSV": 24102,
  "LVEF": 24103,
  "LVCO": 24104,
  "LVM": 24105,
  "RVEDV": 24106,
  "RVESV": 24107,
  "RVSV": 24108,
  "RVEF": 24109,
  "WT": 24140,
  "Ecc": 24157,
}
ALL_FIELDS = range(24100, 24182)
CODES = {
  "HF": "I500",
  "CM": "I420",
  "MI": "I219",
  "AF": "I489",
  "CAD": "I251",
  "SCD": "I469",
  "PH": "I272",
  "LVH": "I517",
}
OTHER_CODES = ("E119", "Z824", "K219")


class Visit(NamedTuple):
  """One visit as it must come out if nothing is wrong with its files."""

  eid: str
  instance: int  # 2 = imaging visit, 3 = repeat
  index: int  # of the synthetic subject
  es: int  # frame of least volume; ED is frame 0
  phenotypes: dict[str, float]  # as in the table, to two decimals
  covariates: dict[str, float]
  diseases: dict[str, float]
  fault: str = ""  # name in FAULTS


class Truth(NamedTuple):
  """What was written: `visits`, and how to draw the hearts again."""

  folder: str
  seed: int
  frames: int
  grid: cmr.Grid
  visits: list[Visit]

  def heart(self, visit: Visit) -> "Heart":
    return heart(self.seed, visit.index, visit.instance, self.frames, self.grid)


class Heart(NamedTuple):
  """The signals of one visit."""

  ecg: np.ndarray  # int [12, 5000], units of RESOLUTION_UV
  images: np.ndarray  # uint16 [F, Z, H, W], base to apex
  labels: np.ndarray  # uint8 [F, Z, H, W] in schema.LABELS
  es: int
  traits: dict[str, float]


def eid(index: int) -> str:
  """An id that is nobody's: a word, or for every third subject eight digits (real ones have
  seven)."""
  return str(73_841_000 + index) if index % 3 == 2 else f"DEMO{index:04d}"


def has_repeat(index: int) -> bool:
  return index % 7 == 3


def traits(seed: int, index: int, instance: int) -> dict[str, float]:
  """The subject as in `population.draw`; by the repeat visit the heart has grown and the person
  aged."""
  drawn = {name: values[0] for name, values in population.draw(seed, [index]).items()}
  diseased = {
    name: float(drawn[name] or (index + i) % 9 == 0) for i, name in enumerate(schema.DISEASES)
  }
  if instance == 3:
    drawn |= {name: drawn[name] * 1.1 for name in ("LVEDV", "LVESV", "RVEDV", "RVESV", "LVM")}
    drawn |= {"age": drawn["age"] + 3, "weight": drawn["weight"] + 1}
  rounded = {
    "age": round(drawn["age"]),
    "height": round(drawn["height"], 1),
    "weight": round(drawn["weight"], 1),
  }
  return drawn | diseased | rounded


def heart(seed: int, index: int, instance: int, frames: int, grid: cmr.Grid) -> Heart:
  """Draws the ECG and the cine of one visit; the volumes fall from frame 0 to `es` and rise
  again."""
  subject = traits(seed, index, instance)
  millivolts = ecg.ecg(subject, population.generator(seed, index, 10 + instance))
  images, labels = cmr.cine_stack(subject, population.generator(seed, index, 20 + instance), grid)
  es = round(SYSTOLE / cmr.FRAMES * frames)
  chosen = np.rint(np.interp(np.arange(frames), [0, es, frames], [0, SYSTOLE, cmr.FRAMES])).astype(
    int
  )
  sides = (0, 0), (0, 0), (0, 0), (PAD, PAD)
  images = np.pad(images[chosen].astype(np.uint16) * 8, sides, "symmetric")  # 12 bits
  samples = np.rint(millivolts * 1000 / RESOLUTION_UV).astype(int)
  return Heart(samples, images, np.pad(labels[chosen], sides), es, subject)


# Where things stand.


def ecg_path(folder, participant: str, instance: int, array: int = 0) -> pathlib.Path:
  bulk = pathlib.Path(folder, "Bulk/Electrocardiogram/Resting", participant[:2])
  return bulk / f"{participant}_20205_{instance}_{array}.xml"


def cmr_path(folder, participant: str, instance: int, array: int = 0) -> pathlib.Path:
  bulk = pathlib.Path(folder, "Bulk/Heart MRI/Short axis", participant[:2])
  return bulk / f"{participant}_20209_{instance}_{array}.zip"


def segmentation_path(folder, participant: str, instance: int) -> pathlib.Path:
  return pathlib.Path(folder, "Segmentations", f"{participant}_{instance}", "seg_sa.nii.gz")


# ECG.


def write_xml(path: pathlib.Path, samples: np.ndarray, participant: str, heart_rate: float) -> None:
  """A resting ECG as GE CardioSoft exports it: int [12, 5000] in RESOLUTION_UV."""
  texts = [list(map(str, lead)) for lead in samples.tolist()]

  def waveforms(count):
    lines = (
      (
        lead,
        (",\n\t\t\t".join(",".join(text[i : min(i + 500, count)]) for i in range(0, count, 500))),
      )
      for lead, text in zip(schema.LEADS, texts)
    )
    return "".join(
      f'<WaveformData lead="{lead}">\n\t\t\t{text}</WaveformData>\n' for lead, text in lines
    )

  # Blocks of one second, each of twelve leads; the recording is repeated to 27 s.
  seconds = (text[i % 10 * 500 : i % 10 * 500 + 500] for i in range(27) for text in texts)
  head = f"""<?xml version="1.0" encoding="ISO-8859-1"?>
<CardiologyXML>
<ObservationType>RestECG</ObservationType>
<ObservationDateTime><Hour>9</Hour><Minute>5</Minute><Second>7</Second>
<Day>1</Day><Month>3</Month><Year>2016</Year></ObservationDateTime>
<ClinicalInfo><DeviceInfo><Desc>CardioSoft</Desc><SoftwareVer>V6.73</SoftwareVer><AnalysisVer>12SL V21</AnalysisVer>
</DeviceInfo></ClinicalInfo>
<PatientInfo><PID>{participant}</PID>
<Name><FamilyName>{PLANTED[0]}-Démo</FamilyName><GivenName>{PLANTED[1]}</GivenName></Name>
<Age units="YEARS">62</Age><BirthDateTime>{PLANTED[3]}</BirthDateTime><Gender>FEMALE</Gender></PatientInfo>
<FilterSetting><CubicSpline>No</CubicSpline><Filter50Hz>Yes</Filter50Hz><Filter60Hz>No</Filter60Hz>
<LowPass units="Hz">100</LowPass><HighPass units="Hz">0.01</HighPass></FilterSetting>
<Interpretation><Diagnosis><DiagnosisText>Sinus rhythm, reported at {PLANTED[2]}</DiagnosisText></Diagnosis>
</Interpretation>
<RestingECGMeasurements><VentricularRate units="BPM">{heart_rate:.0f}</VentricularRate><PQInterval units="ms"/>
<MedianSamples><NumberOfLeads>12</NumberOfLeads><SampleRate units="Hz">500</SampleRate>
<ChannelSampleCountTotal>600</ChannelSampleCountTotal><Resolution units="uVperLsb">{RESOLUTION_UV}</Resolution>
<FirstValid units="Sample">0</FirstValid><LastValid units="Sample">593</LastValid>
"""
  strip = f"""</MedianSamples></RestingECGMeasurements>
<StripData><NumberOfLeads>12</NumberOfLeads><SampleRate units="Hz">500</SampleRate>
<ChannelSampleCountTotal>5000</ChannelSampleCountTotal><Resolution units="uVperLsb">{RESOLUTION_UV}</Resolution>
"""
  disclosure = f"""</StripData>
<FullDisclosure><NumberOfChannels>12</NumberOfChannels><SampleRate units="Hz">500</SampleRate>
<Resolution units="uVperLsb">{RESOLUTION_UV}</Resolution><LeadOrder>{",".join(schema.LEADS)}</LeadOrder>
<FullDisclosureData>
"""
  text = (
    head
    + waveforms(600)
    + strip
    + waveforms(5000)
    + disclosure
    + ",\n".join(map(",".join, seconds))
    + "</FullDisclosureData></FullDisclosure>\n</CardiologyXML>\n"
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(text.encode("iso-8859-1"))


# CMR.


def uid(*what) -> str:
  """A DICOM UID of its own for `what`, always 44 characters; what sorts later under one study was
  made later."""
  return f"2.25.1{int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=15).digest()) % 10**38:038d}"


# The tags that vary within a study, each with a text that occurs nowhere else and leaves room for
# any value.
VARYING = {
  "SOPInstanceUID": "2.25.2" + "1" * 38,
  "SeriesInstanceUID": "2.25.3" + "1" * 38,
  "SeriesDescription": "S" * 32,
  "SeriesNumber": "7" * 11,
  "InstanceNumber": "8" * 11,
  "TriggerTime": "5.25".ljust(16, "5"),
  "ImagePositionPatient": "\\".join(c * 12 for c in "123"),
  "SliceLocation": "6.25".ljust(16, "6"),
}


def template(
  shape: tuple[int, int], pixel_mm: tuple[float, float], slice_mm: float, **tags
) -> tuple[bytes, dict]:
  """One encoded image of a study, and the places of what VARYING and the pixels overwrite.

  Encoding 100 images with pydicom takes seconds, copying bytes milliseconds.
  """
  data = pydicom.Dataset()
  data.SpecificCharacterSet = "ISO_IR 100"
  data.ImageType = ["ORIGINAL", "PRIMARY", "M", "RETRO", "NORM", "DIS2D"]
  data.SOPClassUID = pydicom.uid.MRImageStorage
  data.StudyDate, data.Modality, data.Manufacturer = "20160301", "MR", "SIEMENS"
  data.InstitutionName, data.PatientBirthDate = f"{PLANTED[2]} Infirmary", PLANTED[3]
  data.PatientName = f"{PLANTED[0]}^{PLANTED[1]}"
  data.SliceThickness, data.SpacingBetweenSlices = slice_mm - 2, slice_mm
  data.PixelSpacing, data.ImageOrientationPatient = (
    list(pixel_mm),
    [f"{x:.4f}" for x in (*ROW, *COLUMN)],
  )
  data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
  data.Rows, data.Columns = shape
  data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
  for name, value in tags.items():
    setattr(data, name, value)
  for name, value in VARYING.items():
    data.add_new(
      name, pydicom.datadict.dictionary_VR(name), value.split("\\") if "\\" in value else value
    )
  data.PixelData = b"\0" * (2 * shape[0] * shape[1])
  data.file_meta = pydicom.dataset.FileMetaDataset()
  data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
  data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
  data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
  buffer = io.BytesIO()
  with pydicom.config.disable_value_validation():
    data.save_as(buffer, enforce_file_format=True)
  encoded = buffer.getvalue()
  places = {
    name: [found.start() for found in re.finditer(re.escape(value.encode()), encoded)]
    for name, value in VARYING.items()
  }
  assert all(
    len(found) == (2 if name == "SOPInstanceUID" else 1) for name, found in places.items()
  ), places
  return encoded, places


def dicom(made: tuple[bytes, dict], pixels: np.ndarray, **tags) -> bytes:
  """The template with this image, uint16 [H, W], and these values of VARYING."""
  encoded, places = bytearray(made[0]), made[1]
  for name, value in tags.items():
    text = value.ljust(len(VARYING[name]), "\0" if name.endswith("UID") else " ").encode()
    for place in places[name]:
      encoded[place : place + len(text)] = text
  encoded[-pixels.size * 2 :] = pixels.astype("<u2").tobytes()
  return bytes(encoded)


def series_of(
  participant: str,
  instance: int,
  images: np.ndarray,
  grid: cmr.Grid,
  rr_ms: float,
  flipped: bool,
  take=2,
) -> list[tuple[str, str, int, bytes]]:
  """[(file name, series description, series number, DICOM bytes)] of a short-axis stack, uint16 [F,
  Z, H, W]."""
  frames, slices = images.shape[:2]
  normal = np.cross(ROW, COLUMN)
  study = uid(participant, instance)
  made = template(
    images.shape[2:],
    grid.spacing[1:],
    grid.spacing[0],
    PatientID=participant,
    StudyInstanceUID=study,
    CardiacNumberOfImages=frames,
    NominalInterval=round(rr_ms),
  )
  files = []
  for b, z in enumerate(reversed(range(slices)) if flipped else range(slices), 1):
    position = "\\".join(f"{x:.4f}".ljust(12) for x in ISOCENTRE + z * grid.spacing[0] * normal)
    description, number = f"CINE_segmented_SAX_b{b}", 10 * b + take
    series = f"2.25.{take}{uid(study, b)[6:]}"  # sorts by `take`
    for f in range(frames):
      name = uid(study, b, f, take)
      files.append(
        (
          f"{name}.dcm",
          description,
          number,
          dicom(
            made,
            images[f, z],
            SOPInstanceUID=name,
            SeriesInstanceUID=series,
            SeriesDescription=description,
            SeriesNumber=str(number),
            InstanceNumber=str(f + 1),
            TriggerTime=f"{f * rr_ms / frames:.1f}",
            ImagePositionPatient=position,
            SliceLocation=f"{z * grid.spacing[0]:.2f}",
          ),
        )
      )
  return files


def inline_vf(participant: str, instance: int) -> list:
  """The scanner's own analysis, which travels in the same zip."""
  study = uid(participant, instance)
  made = template((32, 48), (1.0, 1.0), 8.0, PatientID=participant, StudyInstanceUID=study)
  return [
    (
      f"{uid(study, name)}.dcm",
      name,
      90,
      dicom(
        made,
        np.zeros((32, 48)),
        SOPInstanceUID=uid(study, name),
        SeriesInstanceUID=uid(study, name, "series"),
        SeriesDescription=name,
        SeriesNumber="90",
        InstanceNumber="1",
        TriggerTime="0",
        ImagePositionPatient="\\".join(["0".ljust(12)] * 3),
        SliceLocation="0",
      ),
    )
    for name in ("CINE_segmented_SAX_InlineVF", "CINE_segmented_SAX_Inline_VF_Results")
  ]


def write_zip(
  path: pathlib.Path,
  participant: str,
  files: list,
  rng: np.random.Generator,
  manifest="manifest.csv",
  date="Mar 01, 2016",
) -> None:
  """DICOM files in no order, with a manifest in another; its dates hold a comma and no quotes."""
  lines = [
    f"{name},{participant},study,{date},{description},{number}"
    for name, description, number, _ in files
  ]
  text = "\n".join(
    ["filename,patientid,studyid,date,series discription,seriesid", *rng.permutation(lines), ""]
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
    for i in rng.permutation(len(files)):
      z.writestr(files[i][0], files[i][3])
    if manifest:
      z.writestr(manifest, text)


def write_segmentation(
  path: pathlib.Path, labels: np.ndarray, grid: cmr.Grid, frame_s: float, flipped: bool, dtype
) -> None:
  """seg_sa.nii.gz: [X, Y, Z, T] in RAS, slices in the order of their series."""
  if flipped:
    labels = labels[:, ::-1]
  slice_mm, row_mm, column_mm = grid.spacing
  normal = np.cross(ROW, COLUMN) * (-1 if flipped else 1)
  first = ISOCENTRE + (np.cross(ROW, COLUMN) * slice_mm * (labels.shape[1] - 1) if flipped else 0)
  affine = np.eye(4)
  affine[:3] = np.stack([ROW * column_mm, COLUMN * row_mm, normal * slice_mm, first], axis=1)
  affine[:2] *= -1
  image = nibabel.Nifti1Image(labels.transpose(3, 2, 1, 0).astype(dtype), affine)
  image.header["pixdim"][4] = frame_s
  image.header.set_xyzt_units("mm", "sec")
  image.header.set_sform(affine, code=1)
  path.parent.mkdir(parents=True, exist_ok=True)
  nibabel.save(image, path)


# Tables, each in another of the styles that are about.


def rows_of(visits: list[Visit]) -> dict[str, list[dict]]:
  """Rows of one subject by table; "withdrawn" is the list of those who want to be forgotten."""
  participant, index = visits[0].eid, visits[0].index
  # Of most fields a synthetic heart knows nothing; these fall with the field, as maxima and minima
  # of a volume must.
  others = {field: round(30 + index % 7 - (field - 24100) / 50, 2) for field in ALL_FIELDS}
  phenotypes, covariates = (
    {"eid": participant},
    {"f.eid": participant, "f.31.0.0": int(visits[0].covariates["sex"])},
  )
  for visit in visits:
    measured = others | {FIELDS[name]: x for name, x in visit.phenotypes.items()}
    phenotypes |= {f"{field}-{visit.instance}.0": x for field, x in measured.items()}
    covariates |= {
      f"f.{field}.{visit.instance}.0": visit.covariates[name]
      for field, name in ((21003, "age"), (50, "height"), (21002, "weight"))
    }
    covariates[f"f.53.{visit.instance}.0"] = f"{2014 + visit.instance}-03-01"
  codes = [CODES[name] for name, x in visits[0].diseases.items() if x] + [OTHER_CODES[index % 3]]
  dates = {f"p41280_a{i}": f"{2008 + (3 * i + index) % 15}-06-1{i}" for i in range(len(codes))}
  return {
    "phenotypes": [phenotypes],
    "covariates": [covariates],
    "outcomes": [{"eid": participant, "p41270": codes} | dates],
    "withdrawn": [],
  }


def write_tables(folder: pathlib.Path, rows: dict[str, list[dict]]) -> None:
  tables = folder / "tables"
  tables.mkdir(exist_ok=True)
  order = ["eid", *(f"{field}-{instance}.0" for field in ALL_FIELDS for instance in (2, 3))]
  pd.DataFrame(rows["phenotypes"], columns=order).to_csv(tables / "phenotypes.csv", index=False)
  pd.DataFrame(rows["covariates"]).to_csv(tables / "covariates.tsv", index=False, sep="\t")
  pd.DataFrame(rows["outcomes"]).to_parquet(tables / "outcomes.parquet")
  (folder / "withdrawn.csv").write_text("".join(f"{row['eid']}\n" for row in rows["withdrawn"]))


# The cohort.


def write_visit(
  folder: str, seed: int, index: int, instance: int, frames: int, grid: cmr.Grid
) -> Visit:
  """Writes the files of one visit, whole and right."""
  drawn = heart(seed, index, instance, frames, grid)
  participant, rng, flipped = (
    eid(index),
    population.generator(seed, index, 30 + instance),
    is_flipped(index),
  )
  rate = float(drawn.traits["heart_rate"])
  write_xml(ecg_path(folder, participant, instance), drawn.ecg, participant, rate)
  files = series_of(participant, instance, drawn.images, grid, 60_000 / rate, flipped)
  write_zip(
    cmr_path(folder, participant, instance),
    participant,
    files + inline_vf(participant, instance),
    rng,
  )
  write_segmentation(
    segmentation_path(folder, participant, instance),
    drawn.labels,
    grid,
    60 / rate / frames,
    flipped,
    np.uint8 if index % 2 else np.int16,
  )
  measured = measure.phenotypes(drawn.labels[[0, drawn.es]], np.array(grid.spacing), rate)
  return Visit(
    participant,
    instance,
    index,
    drawn.es,
    {name: round(x, 2) for name, x in measured.items()},
    {name: float(drawn.traits[name]) for name in schema.COVARIATES},
    {name: float(drawn.traits[name]) for name in schema.DISEASES},
  )


def is_flipped(index: int) -> bool:
  """Whether the first series of this subject's studies is the apex instead of the base."""
  return index % 4 == 1


def _write_visit(job):
  return write_visit(*job)


class Case(NamedTuple):
  """What a fault may spoil: the files of a subject's first visit, and the rows of `rows_of`."""

  folder: pathlib.Path
  visit: Visit
  frames: int
  grid: cmr.Grid
  rows: dict[str, list[dict]]

  @property
  def ecg(self) -> pathlib.Path:
    return ecg_path(self.folder, self.visit.eid, 2)

  @property
  def cmr(self) -> pathlib.Path:
    return cmr_path(self.folder, self.visit.eid, 2)

  @property
  def segmentation(self) -> pathlib.Path:
    return segmentation_path(self.folder, self.visit.eid, 2)


class Fault(NamedTuple):
  """`apply` spoils a case; afterwards `report` (a regular expression) stands in its reason or among
  its flags."""

  name: str
  apply: Callable[[Case], None]
  report: str = ""  # "": nothing is wrong, and nothing is said
  lost: bool = False  # the record; else it is kept, with a flag


def write(
  folder,
  subjects: int,
  seed: int = 0,
  frames: int = 10,
  slices: int = 10,
  size: int = 88,
  faults: tuple[Fault, ...] = (),
  processes: int = 1,
) -> Truth:
  """Writes a cohort; subject k carries fault k. Subjects with a fault have one visit, of the others
  some have two.

  Args:
    folder: to fill.
    subjects: number of them, at least that of faults.
    frames, slices, size: of every cine; size = image rows (columns are 2 * PAD more), 2 mm each.
    processes: that write; the files are the same for any number.
  """
  folder, grid = pathlib.Path(folder), cmr.Grid(slices, size, (10.0, 2.0, 2.0))
  jobs = [
    (str(folder), seed, index, instance, frames, grid)
    for index in range(subjects)
    for instance in ((2, 3) if has_repeat(index) and index >= len(faults) else (2,))
  ]
  if processes == 1:
    visits = [write_visit(*job) for job in jobs]
  else:
    with concurrent.futures.ProcessPoolExecutor(
      processes, multiprocessing.get_context("spawn")
    ) as pool:
      visits = list(pool.map(_write_visit, jobs, chunksize=4))
  tables = {}
  for index in range(subjects):
    rows = rows_of([visit for visit in visits if visit.index == index])
    if index < len(faults):
      faults[index].apply(Case(folder, visits[index], frames, grid, rows))
      visits[index] = visits[index]._replace(fault=faults[index].name)
    for table, own in rows.items():
      tables.setdefault(table, []).extend(own)
  write_tables(folder, tables)
  return Truth(str(folder), seed, frames, grid, visits)


def save(truth: Truth) -> None:
  """Keeps the truth beside the files, for `load`."""
  text = json.dumps(truth._asdict() | {"visits": [visit._asdict() for visit in truth.visits]})
  pathlib.Path(truth.folder, "truth.json").write_text(text)


def load(folder) -> Truth:
  found = json.loads(pathlib.Path(folder, "truth.json").read_text())
  grid = cmr.Grid(*found["grid"][:2], tuple(found["grid"][2]))
  return Truth(**found | {"grid": grid, "visits": [Visit(**visit) for visit in found["visits"]]})


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", required=True)
  parser.add_argument("--subjects", type=int, default=48)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--frames", type=int, default=10)
  args = parser.parse_args()
  save(write(args.out, args.subjects, args.seed, args.frames))


if __name__ == "__main__":
  main()
