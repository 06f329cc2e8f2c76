"""What goes wrong in raw cohorts, one small function each, for tests.raw_ukb to plant.

A fault takes a whole, right case and spoils its files or rows. FAULTS says what must be reported of
each, and whether the record is lost; that nothing else is lost is for the test to see.
"""

import io
import os
import pathlib
import re
import zipfile
from collections.abc import Callable

import nibabel
import numpy as np
import pydicom

import raw_ukb
from raw_ukb import Case, Fault


# ECG files.


def in_strip(change: Callable[[str], str]):
  """A fault that changes the text of the ten-second strip, not the median beat nor the full
  disclosure."""

  def apply(case: Case):
    head, start, rest = case.ecg.read_text("iso-8859-1").partition("<StripData>")
    strip, end, tail = rest.partition("</StripData>")
    changed = change(strip)
    assert changed != strip
    case.ecg.write_text(head + start + changed + end + tail, "iso-8859-1")

  return apply


def replacing(old: str, new: str):
  return in_strip(lambda strip: strip.replace(old, new))


def in_lead(lead: str, change: Callable[[list[str]], list[str]]):
  """A fault that changes the samples of the leads whose name matches."""

  def spoil(match):
    return match[1] + ",".join(change(re.sub(r"\s", "", match[2]).split(","))) + match[3]

  return in_strip(lambda strip: re.sub(rf'(lead="{lead}">)([^<]*)(<)', spoil, strip))


def without(lead: str):
  return in_strip(
    lambda strip: re.sub(rf'<WaveformData lead="{lead}">[^<]*</WaveformData>', "", strip).replace(
      "<NumberOfLeads>12", "<NumberOfLeads>11"
    )
  )


def swapped(strip: str) -> str:
  """I is called II, and II is called I."""
  return (
    strip.replace('lead="I"', 'lead="?"')
    .replace('lead="II"', 'lead="I"')
    .replace('lead="?"', 'lead="II"')
  )


def too_slow(case: Case):
  in_lead(r"\w+", lambda samples: samples[::20])(case)
  replacing('<SampleRate units="Hz">500', '<SampleRate units="Hz">25')(case)
  replacing("Total>5000", "Total>250")(case)


def four_thousand(case: Case):
  in_lead(r"\w+", lambda samples: samples[:4000])(case)
  replacing("Total>5000", "Total>4000")(case)


def exercise(case: Case):
  case.ecg.write_bytes(case.ecg.read_bytes().replace(b"RestECG", b"ExerciseECG"))


def entity_bomb(case: Case):
  entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "ha"}">' for i in range(12))
  text = case.ecg.read_text("iso-8859-1")
  text = text.replace("<CardiologyXML>", f"<!DOCTYPE CardiologyXML [{entities}]><CardiologyXML>")
  case.ecg.write_text(text.replace("Sinus rhythm", "&e11;"), "iso-8859-1")


def cut(path: pathlib.Path, share: float):
  os.truncate(path, int(share * path.stat().st_size))


def link(case: Case):
  elsewhere = case.folder / "elsewhere.xml"
  case.ecg.rename(elsewhere)
  case.ecg.symlink_to(elsewhere.resolve())


def second_recording(case: Case):
  """A second recording of the same visit: another person's trace under array 1."""
  rng = np.random.default_rng(0)
  noise = rng.integers(-40, 40, (12, 5000))
  raw_ukb.write_xml(raw_ukb.ecg_path(case.folder, case.visit.eid, 2, 1), noise, case.visit.eid, 60)


# CMR zips.


def rezip(change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]):
  """A fault that changes the members of a study's zip, in the order of their series and frames."""

  def apply(case: Case):
    with zipfile.ZipFile(case.cmr) as z:
      members = [(name, z.read(name)) for name in z.namelist()]
    members.sort(key=lambda member: place_of(member[1]))
    with zipfile.ZipFile(case.cmr, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
      for name, content in change(members):
        z.writestr(name, content)

  return apply


def place_of(content: bytes) -> tuple[int, int]:
  """(series b, frame) of a DICOM file, from 1; (0, 0) of any other."""
  series = re.search(rb"CINE_segmented_SAX_b(\d+)", content[:4096])
  if content[128:132] != b"DICM" or not series:
    return 0, 0
  return int(series[1]), int(
    pydicom.dcmread(io.BytesIO(content), specific_tags=["InstanceNumber"]).InstanceNumber
  )


def dropping(*places: tuple[int, int | None]):
  """A fault that loses these (series, frame); the frame None is all of them. The manifest goes on
  naming them."""

  def lost(place):
    return place in places or (place[0], None) in places

  return rezip(lambda members: [member for member in members if not lost(place_of(member[1]))])


def dropping_series(*numbers: int):
  """A fault that loses whole series, in the manifest too."""

  def change(members):
    kept = [(name, content) for name, content in members if place_of(content)[0] not in numbers]
    lost = "|".join(map(str, numbers))
    return [
      (
        name,
        re.sub(rf".*CINE_segmented_SAX_b({lost}),.*\n".encode(), b"", content)
        if name.startswith("manifest")
        else content,
      )
      for name, content in kept
    ]

  return rezip(change)


def renaming(old: str, new: str | None):
  return rezip(
    lambda members: [
      (new if name == old else name, content) for name, content in members if new or name != old
    ]
  )


def in_manifest(old: bytes, new: bytes):
  def change(members):
    assert any(name == "manifest.csv" and old in content for name, content in members)
    return [
      (name, content.replace(old, new) if name == "manifest.csv" else content)
      for name, content in members
    ]

  return rezip(change)


def in_image(place: tuple[int, int], change: Callable[[bytes], bytes]):
  """A fault in one DICOM file."""
  return rezip(
    lambda members: [
      (name, change(content) if place_of(content) == place else content)
      for name, content in members
    ]
  )


def edited(change: Callable[[pydicom.Dataset], None]):
  def apply(content):
    data, out = pydicom.dcmread(io.BytesIO(content)), io.BytesIO()
    change(data)
    data.save_as(out)
    return out.getvalue()

  return apply


def fewer_rows(data):
  data.Rows -= 4
  data.PixelData = data.PixelData[: 2 * data.Rows * data.Columns]


def compressed(data):
  data.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(200)])
  data["PixelData"].VR = "OB"
  data.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless


def climbing(members):
  return [
    ("../../../climbed.dcm" if i == 0 else name, content)
    for i, (name, content) in enumerate(members)
  ]


def five_slices(case: Case):
  dropping_series(*range(6, case.grid.slices + 1))(case)
  relabelled(lambda labels: labels[:, :, :5])(case)


def one_frame(case: Case):
  """A frame of b2 was never sent; ukbb_cardiac closes the gap and repeats the last, and so does its
  segmentation."""
  gap = case.visit.es + 2
  dropping((2, gap + 1))(case)
  order = [*range(gap), *range(gap + 1, case.frames), case.frames - 1]

  def closed(labels):
    labels[:, :, 1] = labels[:, :, 1][..., order]
    return labels

  relabelled(closed)(case)


def many_frames(case: Case):
  dropping(*((b, f) for b in (1, 2, 3) for f in range(3, case.frames + 1)))(case)


def repeated_series(case: Case):
  """Series b2 was taken twice; the first, spoilt one was left in the zip."""
  with zipfile.ZipFile(case.cmr) as z:
    manifest = z.read("manifest.csv").decode()
  files = raw_ukb.series_of(
    case.visit.eid,
    2,
    np.full(
      (case.frames, case.grid.slices, case.grid.size, case.grid.size + 2 * raw_ukb.PAD),
      100,
      np.uint16,
    ),
    case.grid,
    900,
    raw_ukb.is_flipped(case.visit.index),
    take=1,
  )
  files = [file for file in files if file[1] == "CINE_segmented_SAX_b2"]
  lines = "".join(
    f"{name},{case.visit.eid},study,Mar 01, 2016,{description},{number}\n"
    for name, description, number, _ in files
  )
  rezip(
    lambda members: (
      [
        (name, (manifest + lines).encode() if name == "manifest.csv" else content)
        for name, content in members
      ]
      + [(name, content) for name, _, _, content in files]
    )
  )(case)


# Segmentations.


def relabelled(change: Callable[[np.ndarray], np.ndarray]):
  def apply(case: Case):
    image = nibabel.load(case.segmentation)
    nibabel.save(
      nibabel.Nifti1Image(change(np.asarray(image.dataobj)), image.affine, image.header),
      case.segmentation,
    )

  return apply


# Files and rows.


def upper_case(case: Case):
  for path in (case.ecg, case.cmr):
    path.rename(path.with_suffix(path.suffix.upper()))


def other_field(case: Case):
  """A long-axis zip (20208) and an exercise ECG (6025) in the folders of the others, with nothing
  readable in them."""
  for path, old, new in ((case.cmr, "_20209_", "_20208_"), (case.ecg, "_20205_", "_6025_")):
    path.with_name(path.name.replace(old, new)).write_bytes(b"not for us")


def in_row(table: str, **values):
  def apply(case: Case):
    row = case.rows[table][0]
    assert values.keys() <= row.keys()
    row |= values

  return apply


def withdraw(case: Case):
  case.rows["withdrawn"].append({"eid": f'"{case.visit.eid}"'})


def withdraw_number(case: Case):
  """As pandas writes a number that once stood beside a gap."""
  assert case.visit.eid.isdigit()
  case.rows["withdrawn"].append({"eid": f"{case.visit.eid}.0"})


def in_no_table(case: Case):
  for rows in case.rows.values():
    rows.clear()


def contradiction(case: Case):
  row = case.rows["covariates"][0]
  case.rows["covariates"].append(row | {"f.50.2.0": row["f.50.2.0"] + 20})


def bad_diagnosis_date(case: Case):
  case.rows["outcomes"][0]["p41280_a0"] = "soon"


def text_sex(case: Case):
  row = case.rows["covariates"][0]
  row["f.31.0.0"] = ["Female", "Male"][row["f.31.0.0"]]


FAULTS = (
  # the ECG
  Fault("ECG empty", lambda case: case.ecg.write_bytes(b""), "an empty file", lost=True),
  Fault("ECG cut", lambda case: cut(case.ecg, 0.5), "not well-formed XML", lost=True),
  Fault("ECG with an entity bomb", entity_bomb, "document type or entities", lost=True),
  Fault("ECG of an exercise", exercise, "ObservationType is not RestECG", lost=True),
  Fault(
    "ECG with a text among samples",
    in_lead("II", lambda samples: ["abc", *samples[1:]]),
    "a sample of lead II is not a number",
    lost=True,
  ),
  Fault(
    "ECG with NaN",
    in_lead("V5", lambda samples: [*samples[:-1], "NaN"]),
    "a sample of lead V5 is not a number",
    lost=True,
  ),
  Fault("ECG without V3", without("V3"), "no lead V3", lost=True),
  Fault("ECG without aVF", without("aVF"), "limb leads derived"),
  Fault(
    "ECG with a lead twice", replacing('lead="V2"', 'lead="V1"'), "lead V1 occurs twice", lost=True
  ),
  Fault(
    "ECG with swapped leads",
    in_strip(swapped),
    "lead III, aVL, aVF cannot belong to I and II",
    lost=True,
  ),
  Fault(
    "ECG with a constant lead",
    in_lead("V4", lambda samples: ["7"] * len(samples)),
    "flat lead V4",
    lost=True,
  ),
  Fault("ECG of 8 s", four_thousand, "8.00 s long; expected at least 10 s", lost=True),
  Fault("ECG at 25 Hz", too_slow, "sampled at 25 Hz; expected 50 to 20000", lost=True),
  Fault(
    "ECG in another unit",
    replacing("uVperLsb", "mVperLsb"),
    "Resolution is not in uVperLsb",
    lost=True,
  ),
  Fault(
    "ECG of absurd voltage",
    replacing(f">{raw_ukb.RESOLUTION_UV}</Resolution>", ">5000</Resolution>"),
    r"reaches .* mV: are its gain and unit right",
    lost=True,
  ),
  Fault("ECG twice", second_recording, "1 further ECG of the same visit left out"),
  Fault("ECG is a link", link),
  Fault("ECG absent", lambda case: case.ecg.unlink(), "no ECG of this visit", lost=True),
  # the CMR
  Fault("CMR absent", lambda case: case.cmr.unlink(), "no CMR of this visit", lost=True),
  Fault("zip cut", lambda case: cut(case.cmr, 0.9), "BadZipFile", lost=True),
  Fault(
    "zip without manifest", renaming("manifest.csv", None), "no manifest.csv in the zip", lost=True
  ),
  Fault("zip with manifest.cvs", renaming("manifest.csv", "manifest.cvs")),
  Fault("zip with garbage for dates", in_manifest(b"Mar 01, 2016", b"?? 99, ''")),
  Fault("zip that climbs", rezip(climbing), "leads out of its folder", lost=True),
  # 64 MB, which a zip holds in 64 kB
  Fault(
    "zip bomb",
    in_image((1, 1), lambda content: bytes(2**26)),
    "of series b1 has more than",
    lost=True,
  ),
  Fault(
    "DICOM of garbage",
    in_image((4, 2), lambda content: content[::-1]),
    "of series b4 is no DICOM image",
    lost=True,
  ),
  Fault(
    "DICOM compressed",
    in_image((5, 1), edited(compressed)),
    "of series b5 is compressed",
    lost=True,
  ),
  Fault(
    "DICOM of another size",
    in_image((2, 3), edited(fewer_rows)),
    "images differ in size",
    lost=True,
  ),
  Fault("series missing", dropping_series(3), "series b3 is missing", lost=True),
  Fault("series twice", repeated_series, "series b2 was acquired 2 times"),
  Fault("five slices", five_slices, "5 slices", lost=True),
  Fault("frame missing", one_frame, "missing frames.* b2"),
  Fault("frames missing", many_frames, "series b1 has 2 images", lost=True),
  # its segmentation
  Fault(
    "segmentation in another convention",
    relabelled(lambda labels: np.array([0, 3, 2, 1], labels.dtype)[labels]),
    "label map looks wrong",
    lost=True,
  ),
  Fault(
    "segmentation of another shape",
    relabelled(lambda labels: labels[:, :, :-1]),
    "labels of .* voxels for images of",
    lost=True,
  ),
  Fault("segmentation empty", relabelled(np.zeros_like), "segmentation holds no labels"),
  Fault("segmentation absent", lambda case: case.segmentation.unlink(), "no segmentation"),
  # names and rows
  Fault("file names in upper case", upper_case),
  Fault("withdrawn, a number", withdraw_number, "withdrawn", lost=True),
  Fault("files of other fields", other_field),
  Fault("withdrawn, a word", withdraw, "withdrawn", lost=True),
  Fault("in no table", in_no_table, "this visit is not in the tables"),
  Fault("contradicting rows", contradiction, "two rows of one participant disagree", lost=True),
  Fault(
    "LVEF of 140 %", in_row("phenotypes", **{"24103-2.0": 140}), "in the tables: LVEF: outside"
  ),
  Fault("garbage for a date of diagnosis", bad_diagnosis_date, "in the tables: 41280: not a date"),
  Fault(
    "garbage for a date of visit",
    in_row("covariates", **{"f.53.2.0": "3rd of March"}),
    "in the tables: date of visit: not a date",
  ),
  Fault("sex in words", text_sex),
)
