"""CMR readers: UK Biobank's DICOM zips, ukbb_cardiac folders, ACDC and M&Ms, on the same heart and
on hostile files."""

import gzip
import io
import stat
import struct
import tracemalloc
import zipfile

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings, strategies as st
from pydicom.uid import (
  DeflatedExplicitVRLittleEndian,
  ExplicitVRBigEndian,
  ExplicitVRLittleEndian,
  JPEG2000Lossless,
)

from common import ROOT
from mmcl_jax.data.readers import acdc, mnms, nifti, ukb_cmr_dicom, ukbb_cardiac
from mmcl_jax.data.readers.cine import assemble
from mmcl_jax.errors import BadRecord, UserError

REAL = ROOT.parent / "shared/realdata/cmr"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no real samples here")
FUZZ = settings(max_examples=100, deadline=None, derandomize=True, database=None)

SHAPE = FRAMES, SLICES, ROWS, COLUMNS = 6, 4, 16, 20
SPACING, STEP_MS, ED, ES = (10.0, 1.5, 1.25), 40.0, 0, 3
NAME = "DEMO0001"  # must never be told


def heart():
  """(images int16, labels uint8 in schema.LABELS), both [F, Z, H, W]; no two frames, slices, rows
  or columns alike."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 2000, SHAPE).astype(np.int16)
  labels = np.zeros(SHAPE, np.uint8)
  for f, z in np.ndindex(FRAMES, SLICES):
    labels[f, z, 3:12, 2:6] = 3  # RV left of the LV in the image
    labels[f, z, 3 + z % 2 : 12, 6:15] = 2
    labels[f, z, 6 : 9 + f % 2, 8 + z % 2 : 12] = 1
  return images, labels


IMAGES, LABELS = heart()
PHASE_LABELS = np.where(np.isin(np.arange(FRAMES), (ED, ES))[:, None, None, None], LABELS, 0)


def save(path, voxels, numbers=None, spacing=SPACING, dtype=None, frame_s=STEP_MS / 1000):
  """Writes [F, Z, H, W] (one frame: 3-D) as a NIfTI of [X, Y, Z, T]; `numbers` renumbers labels LV,
  MYO, RV."""
  if numbers:
    voxels = np.array((0, *numbers), np.uint8)[voxels]
  array = np.stack([np.stack([image.T for image in frame], -1) for frame in voxels], -1)
  single = len(voxels) == 1
  image = nibabel.Nifti1Image(
    array[..., 0] if single else array, np.diag([*spacing[::-1], 1]), dtype=dtype
  )
  image.header.set_xyzt_units("mm", "sec")
  image.header["pixdim"][4] = 0 if single else frame_s
  path.parent.mkdir(parents=True, exist_ok=True)
  nibabel.save(image, path)
  return path


def phase(voxels, frame):
  return voxels[frame : frame + 1]


def write_ukbb(folder, images=IMAGES, labels=LABELS):
  save(folder / "sa.nii.gz", images)
  save(folder / "seg_sa.nii.gz", labels)
  for name, frame in (("ED", ED), ("ES", ES)):
    save(folder / f"sa_{name}.nii.gz", phase(images, frame))
    save(folder / f"seg_sa_{name}.nii.gz", phase(labels, frame))
  return folder


def write_acdc(folder, cine=True):
  folder.mkdir(parents=True)
  lines = (
    f"ED: {ED + 1}",
    f"ES: {ES + 1}",
    "Group: DCM",
    "Height: 170.0",
    f"NbFrame: {FRAMES}",
    "Weight: 0.0",
  )
  (folder / "Info.cfg").write_text("\n".join(lines))
  if cine:
    save(folder / f"{folder.name}_4d.nii.gz", IMAGES)
  for frame in (ED, ES):
    save(folder / f"{folder.name}_frame{frame + 1:02d}.nii.gz", phase(IMAGES, frame))
    save(folder / f"{folder.name}_frame{frame + 1:02d}_gt.nii.gz", phase(LABELS, frame), (3, 2, 1))
  return folder


MNMS_HEADER = ",External code,VendorName,Vendor,Centre,ED,ES,Age,Pathology,Sex,Height,Weight"


def write_mnms(root, rows=(f"0,A0S9V9,Siemens,A,1,{ED},{ES},50,HCM,M,180.0,",)):
  for code, part, labels in (
    ("A0S9V9", "Training/Labeled", PHASE_LABELS),
    ("B1", "Training/Unlabeled", 0 * LABELS),
  ):
    save(root / part / code / f"{code}_sa.nii.gz", IMAGES)
    save(root / part / code / f"{code}_sa_gt.nii.gz", labels, (1, 2, 3))
  table = root / "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv"
  table.write_text("\n".join((MNMS_HEADER, *rows)))
  return root


def dicom(image, slice_number, frame, **changes):
  """One file of a study as a pydicom Dataset; `changes` set (or, with None, remove) tags."""
  data = pydicom.Dataset()
  data.file_meta = pydicom.dataset.FileMetaDataset()
  data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
  data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
  data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{slice_number}.{frame + 1}"
  data.PatientName, data.PatientID = NAME, NAME
  data.SeriesInstanceUID, data.SeriesNumber = f"1.2.3.{slice_number}", slice_number
  data.TriggerTime, data.InstanceNumber = str(frame * STEP_MS), frame + 1
  data.NominalInterval, data.CardiacNumberOfImages = str(int(FRAMES * STEP_MS)), FRAMES
  data.ImageOrientationPatient = [0.6, 0.8, 0, 0, 0, -1]  # normal (-0.8, 0.6, 0)
  data.ImagePositionPatient = [f"{-8.0 * slice_number:g}", f"{6.0 * slice_number:g}", "3"]
  data.PixelSpacing, data.SliceThickness = [SPACING[1], SPACING[2]], "8"
  data.Rows, data.Columns = image.shape
  data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
  data.PixelRepresentation, data.SamplesPerPixel, data.PhotometricInterpretation = (
    0,
    1,
    "MONOCHROME2",
  )
  data.add_new("PixelData", "OW", image.astype("<u2").tobytes())
  for tag, value in changes.items():
    if value is None:
      del data[tag]
    elif tag == "syntax":
      data.file_meta.TransferSyntaxUID = value
    else:
      setattr(data, tag, value)
  return data


def encoded(data):
  buffer = io.BytesIO()
  data.save_as(buffer, enforce_file_format=True)
  return buffer.getvalue()


HEADER = "filename,patientid,studyid,date,series discription,seriesid"


def file_name(slice_number, frame):
  # in a slice not in the order of frames
  return f"1.2.{slice_number}.{(7 * frame) % 10}{frame}.dcm"


def study(change=lambda z, f: {}, drop=(), series="CINE_segmented_SAX_b{}", date="Aug 30, 2015"):
  """([manifest line], {file name: bytes}) of the heart, unordered; `change(slice from 1, frame)`
  alters tags."""
  lines, files = [HEADER], {}
  for z, f in np.random.default_rng(1).permutation([*np.ndindex(SLICES, FRAMES)]):
    if (z + 1, f) not in drop:
      name = file_name(z + 1, f)
      files[name] = encoded(dicom(IMAGES[f, z], int(z + 1), int(f), **change(z + 1, f)))
      lines.append(f"{name},{NAME},study,{date},{series.format(z + 1)},{z + 1}")
  return lines, files


def pack(path, lines, files, manifest="manifest.csv"):
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, data in files.items():
      archive.writestr(name, data)
    archive.writestr(manifest, "\n".join(lines))
  return path


@pytest.fixture(scope="module")
def plain():
  return study()


def rejects(read, path, *words):
  with pytest.raises(BadRecord) as caught:
    read(path)
  message = str(caught.value)
  assert not any(private in message for private in ("\n", NAME, "/", "1.2."))
  for word in words:
    assert word in message, message


def same(cine, images=IMAGES, labels=None):
  np.testing.assert_array_equal(cine.images, images)
  assert cine.images.dtype in (np.int16, np.uint16, np.float32)
  np.testing.assert_allclose(cine.spacing, SPACING, rtol=1e-6)
  if labels is None:
    assert cine.labels is None and cine.labelled == () and cine.convention == ""
  else:
    assert cine.labels.dtype == np.uint8
    np.testing.assert_array_equal(cine.labels, labels)
    assert cine.labelled == tuple(np.flatnonzero(labels.any(axis=(1, 2, 3))))


# One heart, four layouts


def test_one_heart_is_the_same_from_all_sources(tmp_path, plain):
  ukbb = ukbb_cardiac.read(write_ukbb(tmp_path / "ukbb"))
  same(ukbb, labels=LABELS)
  assert (ukbb.ed, ukbb.es, ukbb.flags) == (ED, ES, ()) and ukbb.frame_s == pytest.approx(
    STEP_MS / 1000
  )
  (patient,) = acdc.find(write_acdc(tmp_path / "acdc/training/patient001").parents[1])
  from_acdc = acdc.read(patient)
  same(from_acdc, labels=PHASE_LABELS)
  assert (from_acdc.ed, from_acdc.es, from_acdc.flags) == (ED, ES, ())
  from_mnms = mnms.read(mnms.find(write_mnms(tmp_path / "mnms"))[0])
  same(from_mnms, labels=PHASE_LABELS)
  assert (from_mnms.ed, from_mnms.es, from_mnms.flags) == (ED, ES, ())
  zipped = ukb_cmr_dicom.read(pack(tmp_path / "a.zip", *plain), tmp_path / "ukbb/seg_sa.nii.gz")
  same(zipped, labels=LABELS)
  assert zipped.flags == () and zipped.frame_s == pytest.approx(STEP_MS / 1000)
  assert from_acdc.convention == "RV 1, MYO 2, LV 3"
  assert ukbb.convention == from_mnms.convention == zipped.convention == "LV 1, MYO 2, RV 3"


@real
def test_real_zip_is_the_real_nifti():
  zipped = ukb_cmr_dicom.read(REAL / "bivme_patient1_ukb20209/DEMO0001_20209_2_0.zip")
  image = nibabel.load(REAL / "bivme_patient1/sa.nii.gz")
  np.testing.assert_array_equal(zipped.images, np.asarray(image.dataobj).transpose(3, 2, 1, 0))
  np.testing.assert_allclose(zipped.spacing, image.header.get_zooms()[2::-1], rtol=2e-7)
  assert zipped.frame_s == pytest.approx(float(image.header.get_zooms()[3]), rel=1e-7)
  assert zipped.flags == () and zipped.labels is None and zipped.images.dtype == np.uint16


@real
def test_real_folders_agree():
  folder = REAL / "bivme_patient1"
  cine = ukbb_cardiac.read(folder)
  assert (cine.ed, cine.es, cine.flags, cine.labelled) == (0, 9, (), tuple(range(25)))
  zipped = ukb_cmr_dicom.read(
    REAL / "bivme_patient1_ukb20209/DEMO0001_20209_2_0.zip", folder / "seg_sa.nii.gz"
  )
  np.testing.assert_array_equal(zipped.labels, cine.labels)
  phases = acdc.read(acdc.find(REAL / "acdc_style")[0])
  np.testing.assert_array_equal(phases.labels, cine.labels[[0, 9]])
  np.testing.assert_array_equal(phases.images, cine.images[[0, 9]])
  assert phases.spacing == cine.spacing and phases.flags == ("no cine, ED and ES only",)
  # formats.md: these labels sum to 161.5 and 51.4 ml of LV
  volumes = (cine.labels == 1).sum(axis=(1, 2, 3)) * np.prod(cine.spacing) / 1000
  np.testing.assert_allclose(volumes[[0, 9]], [161.5, 51.4], atol=0.1)
  assert volumes.argmin() == 9


# ukbb_cardiac


def test_ukbb_labels_of_two_frames_find_their_frames(tmp_path):
  folder = write_ukbb(tmp_path)
  (folder / "seg_sa.nii.gz").unlink()
  same(ukbb_cardiac.read(folder), labels=PHASE_LABELS)
  save(folder / "label_sa_ES.nii.gz", np.where(phase(LABELS, ES) == 3, 0, phase(LABELS, ES)))
  save(folder / "label_up_sa_ES.nii.gz", np.repeat(phase(LABELS, ES), 4, axis=3))
  cine = ukbb_cardiac.read(folder)  # a reader's labels go before the network's
  assert cine.labelled == (ES,) and set(np.unique(cine.labels)) == {0, 1, 2}


def test_ukbb_without_cine(tmp_path):
  folder = write_ukbb(tmp_path)
  (folder / "sa.nii.gz").unlink()
  cine = ukbb_cardiac.read(folder)
  same(cine, IMAGES[[ED, ES]], LABELS[[ED, ES]])
  assert (cine.ed, cine.es, cine.flags) == (0, 1, ("no cine, ED and ES only",)) and np.isnan(
    cine.frame_s
  )
  (folder / "sa_ES.nii.gz").unlink()
  rejects(ukbb_cardiac.read, folder, "no sa.nii.gz")


def test_ukbb_parts_that_do_not_fit(tmp_path):
  folder = write_ukbb(tmp_path)
  save(folder / "sa_ES.nii.gz", phase(IMAGES, ES) + 1)
  rejects(ukbb_cardiac.read, folder, "sa_ES.nii.gz is no frame")
  (folder / "sa_ES.nii.gz").unlink()
  assert ukbb_cardiac.read(folder).es is None
  (folder / "seg_sa.nii.gz").unlink()
  rejects(ukbb_cardiac.read, folder, "seg_sa_ES.nii.gz without")
  save(folder / "seg_sa.nii.gz", LABELS[:, :, :, 1:])
  rejects(ukbb_cardiac.read, folder, "6 x 4 x 16 x 19", "6 x 4 x 16 x 20")
  save(folder / "seg_sa.nii.gz", LABELS[:-1])  # one frame less
  rejects(ukbb_cardiac.read, folder, "5 x 4 x 16 x 20")
  save(folder / "seg_sa.nii.gz", 0 * LABELS)
  assert ukbb_cardiac.read(folder).flags == ("the segmentation holds no labels",)
  save(folder / "seg_sa.nii.gz", LABELS, (1, 2, 4))
  rejects(ukbb_cardiac.read, folder, "labels from 0 to 4")
  save(folder / "seg_sa.nii.gz", LABELS.astype(np.float32) / 2)
  rejects(ukbb_cardiac.read, folder, "whole")


# ACDC and M&Ms


def test_acdc_frames_count_from_one(tmp_path):
  folder = write_acdc(tmp_path / "patient001", cine=False)
  cine = acdc.read(folder)
  same(cine, IMAGES[[ED, ES]], LABELS[[ED, ES]])
  assert (cine.ed, cine.es, cine.flags) == (0, 1, ("no cine, ED and ES only",))
  save(folder / "patient001_4d.nii.gz", np.roll(IMAGES, 1, axis=0))
  flags = acdc.read(folder).flags
  assert flags == tuple(
    f"the file of {p} is not frame {n} of the cine" for p, n in (("ED", ED + 1), ("ES", ES + 1))
  )
  for lines in (
    "ED: 0\nES: 4",
    "ED: 1",
    "ED: x\nES: 4",
    "ED: 1\nES: 7",
    "ED: 4\nES: 4",
    "ED: 1\nES: -2",
    "\n",
  ):
    (folder / "Info.cfg").write_text(lines)
    rejects(acdc.read, folder, "E")
  (folder / "Info.cfg").unlink()
  rejects(acdc.read, folder, "Info.cfg")


def test_acdc_about(tmp_path):
  folder = write_acdc(tmp_path / "patient001", cine=False)
  about = acdc.about(folder)
  assert about["group"] == "DCM" and about["height_cm"] == 170 and np.isnan(about["weight_kg"])
  (folder / "Info.cfg").write_text("Group: someone\nHeight: nan")
  about = acdc.about(folder)
  assert about["group"] == "" and np.isnan(about["height_cm"]) and np.isnan(about["weight_kg"])


def test_mnms_frames_count_from_zero_and_rows_without_files_are_left_out(tmp_path):
  root = write_mnms(
    tmp_path,
    (
      f"0,A0S9V9,Siemens,A,1,{ED + 1},{ES + 1},50,HCM,M,180.0,",
      "1,B1,GE,C,4,,,N/A,NOR,F,,70",
      "2,../../x,GE,C,4,0,1,30,NOR,F,,70",
      "3,C2,GE,C,4,0,1,30,NOR,F,,70",
    ),
  )
  studies = mnms.find(root)
  assert [study.folder.name for study in studies] == ["A0S9V9", "B1"]
  cine = mnms.read(studies[0])
  assert (cine.ed, cine.es) == (ED + 1, ES + 1)
  assert cine.flags == (
    f"labels in frames {ED}, {ES}; the table names {ED + 1}, {ES + 1} (counted from 0)",
  )
  about = mnms.about(studies[0])
  assert about == {
    "age": 50,
    "sex": 1,
    "height": 180,
    "weight": pytest.approx(np.nan, nan_ok=True),
    "pathology": "HCM",
    "vendor": "Siemens",
    "centre": "1",
  }
  unlabelled = mnms.read(studies[1])
  same(unlabelled)
  assert (unlabelled.ed, unlabelled.es) == (None, None) and "no labels" in unlabelled.flags[0]
  about = mnms.about(studies[1])
  assert about["sex"] == 0 and np.isnan(about["age"]) and about["weight"] == 70


def test_mnms_tables_that_cannot_be_read(tmp_path):
  root = write_mnms(tmp_path)
  table = next(root.glob("*.csv"))
  table.write_text(MNMS_HEADER.replace("ES", "XX") + "\n")
  rejects(mnms.find, root, "column ES")
  table.write_text(MNMS_HEADER + "\n0,A0S9V9,Siemens\n")
  rejects(mnms.find, root, "line 2")
  table.write_text(MNMS_HEADER + "\n0,A0S9V9,Siemens,A,1,0,3.5,50,HCM,M,180.0,\n")
  rejects(mnms.read, mnms.find(root)[0], "ES")
  table.unlink()
  with pytest.raises(UserError, match="0 files"):
    mnms.find(root)


# NIfTI


@pytest.mark.parametrize(
  "dtype,result",
  [
    ("uint8", "int16"),
    (">i2", "int16"),
    ("uint16", "uint16"),
    ("int32", "float32"),
    ("float64", "float32"),
    ("float32", "float32"),
  ],
)
def test_nifti_types(tmp_path, dtype, result):
  voxels = (IMAGES % 200).astype(dtype)
  volume = nifti.read(save(tmp_path / "a.nii.gz", voxels))
  assert volume.voxels.dtype == np.dtype(result) and volume.voxels.dtype.isnative
  np.testing.assert_array_equal(volume.voxels, voxels)


def edited(path, edit, out=None):
  """The file with its decompressed bytes changed by `edit(bytearray) -> bytes`."""
  out = out or path
  out.write_bytes(gzip.compress(bytes(edit(bytearray(gzip.decompress(path.read_bytes()))))))
  return out


def field(offset, form, *values):
  def edit(data):
    struct.pack_into("<" + form, data, offset, *values)
    return data

  return edit


def test_nifti_scaling_and_units_are_nibabels(tmp_path):
  # scl_slope, scl_inter
  path = edited(save(tmp_path / "a.nii.gz", IMAGES), field(112, "2f", 0.5, -7))
  volume = nifti.read(path)
  np.testing.assert_array_equal(
    volume.voxels.transpose(3, 2, 1, 0), nibabel.load(path).get_fdata(dtype=np.float32)
  )
  np.testing.assert_array_equal(volume.voxels, IMAGES / 2 - 7)
  edited(path, field(123, "B", 1 | 16))  # metre, ms
  edited(path, field(76, "5f", 1, 0.00125, 0.0015, 0.01, 40))
  volume = nifti.read(path)
  np.testing.assert_allclose((*volume.spacing, volume.frame_s), (*SPACING, 0.04), rtol=1e-6)
  # 1,000 s is no step of a cine
  assert np.isnan(nifti.read(edited(path, field(92, "f", 1e6))).frame_s)


@pytest.mark.reported("labels of scaled integers were refused")
def test_scaled_labels_are_whole_numbers(tmp_path):
  path = save(tmp_path / "a.nii.gz", LABELS.astype(np.int16) * 10_000)
  labels = nifti.read_labels(
    edited(path, field(112, "2f", 1.0000123e-4, 2e-6)), ukbb_cardiac.NUMBERS
  )
  np.testing.assert_array_equal(labels, LABELS)
  rejects(
    lambda path: nifti.read_labels(path, ukbb_cardiac.NUMBERS),
    edited(path, field(112, "2f", 1.01e-4, 0)),
    "whole numbers",
  )


@pytest.mark.reported("NIfTI-2, a fifth axis of 1 and negative pixel sizes were refused")
@pytest.mark.parametrize(
  "kind,order",
  [
    (nibabel.Nifti1Image, "<"),
    (nibabel.Nifti1Image, ">"),
    (nibabel.Nifti2Image, "<"),
    (nibabel.Nifti2Image, ">"),
  ],
)
def test_nifti_of_other_writers(tmp_path, kind, order):
  header = kind.header_class(endianness=order)
  affine = np.diag([*SPACING[::-1], 1])
  for name in ("a.nii", "a.nii.gz"):
    image = kind(IMAGES.transpose(3, 2, 1, 0)[..., None], affine, header)
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][1:5] = -SPACING[2], -SPACING[1], SPACING[0], STEP_MS / 1000
    nibabel.save(image, tmp_path / name)
    volume = nifti.read(tmp_path / name)
    np.testing.assert_array_equal(volume.voxels, IMAGES)
    assert volume.spacing == pytest.approx(SPACING) and volume.frame_s == pytest.approx(
      STEP_MS / 1000
    )


@pytest.mark.reported("a stack without labels that runs from apex to base stayed upside down")
@pytest.mark.parametrize(
  "apex,expected",
  [
    ([-0.7, 0.5, -0.5], True),
    ([0.7, -0.5, 0.5], False),
    ([0, 0, -1], None),
    ([0, 0, 1], None),
    ([-0.1, 0.95, 0], None),
  ],
)
def test_the_affine_tells_base_and_apex(tmp_path, apex, expected):
  """Third columns of NIfTI affines, to the right, front and head; (0, 0, z) is what writers leave
  that know nothing."""
  affine = np.eye(4)
  affine[:3, 2] = 8 * np.array(apex)
  image = nibabel.Nifti1Image(IMAGES.transpose(3, 2, 1, 0), affine)
  for codes in ((1, 0), (0, 1), (1, 1)):
    image.header["sform_code"], image.header["qform_code"] = codes
    if codes[1]:
      rotation = np.linalg.qr(affine[:3, [2, 0, 1]])[0][:, [1, 2, 0]]
      image.set_qform(
        np.block([[rotation * np.sign(rotation[:, 2] @ apex), np.zeros((3, 1))], [0, 0, 0, 1]]),
        codes[1],
      )
      image.set_sform(affine, codes[0])
    nibabel.save(image, tmp_path / "a.nii.gz")
    assert nifti.read(tmp_path / "a.nii.gz").base_first is expected
  image.header["sform_code"] = image.header["qform_code"] = 0
  nibabel.save(image, tmp_path / "a.nii.gz")
  assert nifti.read(edited(tmp_path / "a.nii.gz", field(252, "2h", 0, 0))).base_first is None
  # no rotation
  assert (
    nifti.read(edited(tmp_path / "a.nii.gz", field(252, "2h3f", 1, 0, 9, 9, 9))).base_first is None
  )


def test_every_reader_passes_on_what_the_geometry_tells(tmp_path, monkeypatch):
  ukbb, patient, root = (
    write_ukbb(tmp_path / "ukbb"),
    write_acdc(tmp_path / "patient001"),
    write_mnms(tmp_path / "mnms"),
  )
  study_of_code = mnms.find(root)[0]
  two = write_acdc(tmp_path / "patient002", cine=False)
  assert acdc.read(patient).base_first is None
  monkeypatch.setattr(nifti, "_base_first", lambda header: False)
  for found in (
    ukbb_cardiac.read(ukbb),
    acdc.read(patient),
    acdc.read(two),
    mnms.read(study_of_code),
  ):
    assert found.base_first is False
  # towards the right and to the back
  assert ukb_cmr_dicom.read(pack(tmp_path / "a.zip", *study())).base_first is False

  def moved(z, f):
    return {"ImagePositionPatient": [f"{8.0 * z:g}", f"{-6.0 * z:g}", "3"]}

  assert ukb_cmr_dicom.read(pack(tmp_path / "b.zip", *study(moved))).base_first is True
  where = {"ImagePositionPatient": None, "SpacingBetweenSlices": "8"}
  assert ukb_cmr_dicom.read(pack(tmp_path / "c.zip", *study(lambda z, f: where))).base_first is None


@real
def test_labels_and_geometry_agree_on_the_real_heart():
  for cine in (
    ukbb_cardiac.read(REAL / "bivme_patient1"),
    acdc.read(REAL / "acdc_style/patient901"),
    ukb_cmr_dicom.read(REAL / "bivme_patient1_ukb20209/DEMO0001_20209_2_0.zip"),
  ):
    assert cine.base_first is True
    if cine.labels is not None:
      areas = np.count_nonzero(cine.labels[cine.ed or 0], axis=(1, 2))
      assert areas[:2].sum() > areas[-2:].sum()


def test_nifti_extensions_are_skipped(tmp_path):
  path = tmp_path / "a.nii"
  image = nibabel.Nifti1Image(IMAGES.transpose(3, 2, 1, 0), np.eye(4))
  image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"x" * 100))
  nibabel.save(image, path)
  np.testing.assert_array_equal(nifti.read(path).voxels, IMAGES)


@pytest.mark.parametrize(
  "edit,words",
  [
    (field(40, "5h", 4, 32767, 32767, 32767, 32767), ["32767"]),
    (field(40, "5h", 4, 1024, 1024, 256, 256), ["voxels; expected at most"]),
    (field(40, "5h", 4, 20, 16, 0, 6), ["0"]),
    (field(40, "5h", 4, 20, -16, 4, 6), ["-16"]),
    (field(40, "6h", 5, 20, 16, 4, 3, 2), ["3 or 4 axes"]),
    (field(40, "h", 2), ["3 or 4 axes"]),
    (field(40, "5h", 4, 20, 16, 4, 7), ["bytes that its header announces"]),
    (field(40, "5h", 4, 20, 16, 4, 5), ["more than"]),
    (field(70, "2h", 32, 64), ["complex"]),
    (field(70, "2h", 128, 24), ["RGB"]),
    (field(70, "2h", 1536, 128), ["float128"]),
    (field(70, "h", 77), ["NIfTI"]),
    (field(80, "f", 0), ["spacing"]),
    (field(88, "f", np.nan), ["spacing"]),
    (field(88, "f", np.inf), ["spacing"]),
    (field(108, "f", 3e38), ["start at"]),
    (field(108, "f", np.nan), ["NIfTI"]),
    (field(108, "f", 0), ["start at"]),
    (field(112, "2f", 1, np.inf), ["NIfTI"]),
    (field(112, "2f", 1e30, 0), ["intensities"]),
    (field(123, "B", 7), ["NIfTI"]),
    (field(344, "4s", b"ni1\0"), ["NIfTI-1"]),
    (lambda data: data[:200], ["200 bytes"]),
    (lambda data: data[:-1], ["header announces"]),
    (lambda data: data + b"\0", ["more than"]),
    (lambda data: b"", ["0 bytes"]),
  ],
)
def test_nifti_headers_that_claim_too_much(tmp_path, edit, words):
  rejects(nifti.read, edited(save(tmp_path / "a.nii.gz", IMAGES), edit), *words)


def test_nifti_nan_truncation_and_folders(tmp_path):
  voxels = IMAGES.astype(np.float32)
  voxels[2, 1, 3, 4] = np.nan
  rejects(nifti.read, save(tmp_path / "a.nii.gz", voxels), "nan")
  path = save(tmp_path / "b.nii.gz", IMAGES)
  whole = path.read_bytes()
  for size in (len(whole) // 2, len(whole) - 4):
    path.write_bytes(whole[:size])
    rejects(nifti.read, path, "ends early")
  (tmp_path / "link.nii.gz").symlink_to(path)
  path.write_bytes(whole[:-8] + bytes(8))  # its checksum
  rejects(nifti.read, path, "BadGzipFile")
  rejects(nifti.read, tmp_path, "a folder")
  rejects(nifti.read, tmp_path / "link.nii.gz", "BadGzipFile")
  path.unlink()
  rejects(nifti.read, tmp_path / "link.nii.gz", "a link to a file that is not there")
  rejects(nifti.read, tmp_path / "none.nii.gz", "no such file")


def test_nifti_bomb_takes_no_memory(tmp_path):
  """A file that expands to 1 GiB behind a small header, and one whose extension does."""
  path = save(tmp_path / "a.nii.gz", IMAGES)
  data = gzip.decompress(path.read_bytes())
  zeros = gzip.compress(bytes(2**24), 1) * 64
  tracemalloc.start()
  for head in (data, bytes(field(108, "f", 2**30)(bytearray(data)))):
    path.write_bytes(gzip.compress(head) + zeros)
    rejects(nifti.read, path)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**24, peak


# The zip of DICOM files: what is found in it


@pytest.mark.parametrize(
  "manifest,edit",
  [
    ("manifest.cvs", lambda line: line),
    ("manifest.csv", lambda line: line.replace("Aug 30, 2015", '"Aug 30, 2015"')),
    ("manifest.csv", lambda line: line.replace("Aug 30, 2015", "garbage")),
    ("manifest.csv", lambda line: line.replace("Aug 30, 2015", "")),
    ("manifest.csv", lambda line: line.replace("discription", "description")),
    ("manifest.csv", lambda line: line.replace("filename", "\ufefffilename") + "\r"),
  ],
)
def test_manifests_as_they_occur(tmp_path, plain, manifest, edit):
  lines, files = plain
  other = [
    'x.dcm,p,s,"Aug 30, 2015",CINE_segmented_SAX_InlineVF,9',
    "y.dcm,p,s,,Inline_VF_Results,9",
    "z.dcm,p,s,,CINE_segmented_SAX_b1_InlineVF,9",
    "w.dcm,p,s,,CINE_segmented_LAX_2Ch,9",
  ]
  report = encoded(dicom(IMAGES[0, 0], 99, 0))  # what InlineVF leaves beside the images
  files = files | {f"{letter}.dcm": report for letter in "wxyz"}
  cine = ukb_cmr_dicom.read(
    pack(tmp_path / "a.zip", [edit(line) for line in lines] + other, files, manifest)
  )
  same(cine)
  assert cine.flags == ()


@pytest.mark.parametrize(
  "edit,words",
  [
    (lambda lines: [], ["no columns"]),
    (
      lambda lines: [lines[0].replace("series disc", "sequence disc"), *lines[1:]],
      ["series discription"],
    ),
    (lambda lines: [*lines[:3], "a,b,c", *lines[3:]], ["line 4", "3 fields"]),
    (lambda lines: [*lines[:3], lines[3] + ",,,", *lines[4:]], ["line 4"]),
    (lambda lines: [line for line in lines if "SAX_b3" not in line], ["series b3 is missing"]),
    (lambda lines: [line for line in lines if "SAX_b1" not in line], ["series b1 is missing"]),
    (lambda lines: [line.replace("SAX_b1", "SAX_b0") for line in lines], ["b1 is missing"]),
    (lambda lines: [line.replace("SAX", "LAX") for line in lines], ["no short-axis cine"]),
    (lambda lines: [line.replace("1.2.3.", "9.") for line in lines], ["series b3"]),
  ],
)
def test_manifests_that_do_not_tell(tmp_path, plain, edit, words):
  lines, files = plain
  rejects(ukb_cmr_dicom.read, pack(tmp_path / "a.zip", edit(lines), files), *words)


def test_slices_sort_by_number(tmp_path):
  """b10 comes after b9: three times the heart, stacked."""
  lines, files = [HEADER], {}
  for z, f in np.ndindex(12, FRAMES):
    files[f"{z}_{f}"] = encoded(dicom(IMAGES[f, z % SLICES] + z, z + 1, f))
    lines.append(f"{z}_{f},{NAME},s,Aug 30, 2015,CINE_segmented_SAX_b{z + 1},1")
  cine = ukb_cmr_dicom.read(pack(tmp_path / "a.zip", lines, files))
  np.testing.assert_array_equal(
    cine.images, np.stack([IMAGES[:, z % SLICES] + z for z in range(12)], axis=1)
  )


def test_one_mixed_series(tmp_path):
  mixed = dict(series="CINE_segmented_SAX")
  segmentation = save(tmp_path / "seg.nii.gz", LABELS)
  one = lambda z, f: {"SeriesInstanceUID": "1.2.9", "SeriesNumber": 1}  # noqa: E731
  for change in (one, lambda z, f: {}):
    path = pack(tmp_path / "a.zip", *study(change, **mixed))
    cine = ukb_cmr_dicom.read(path, segmentation)
    same(cine, labels=LABELS)
    assert cine.flags == ("one series of all slices, split by their position",)
  # file names that run from the other end, and names in no order
  back = lambda z, f: one(z, f) | {"ImagePositionPatient": [8.0 * z, -6.0 * z, 3]}  # noqa: E731
  same(ukb_cmr_dicom.read(pack(path, *study(back, **mixed)), segmentation), labels=LABELS)
  place = {1: 2, 2: 1, 3: 3, 4: 4}
  jumbled = lambda z, f: one(z, f) | {"ImagePositionPatient": [-8.0 * place[z], 6.0 * place[z], 3]}  # noqa: E731
  pack(path, *study(jumbled, **mixed))
  np.testing.assert_array_equal(ukb_cmr_dicom.read(path).images[:, [1, 0, 2, 3]], IMAGES)
  rejects(
    lambda path: ukb_cmr_dicom.read(path, segmentation), path, "segmentation cannot be placed"
  )
  rejects(
    ukb_cmr_dicom.read,
    pack(path, *study(lambda z, f: one(z, f) | {"ImagePositionPatient": None}, **mixed)),
    "position",
  )


def repeated(uid, number, frames=FRAMES, shift=100):
  """The study with slice 2 acquired once more, brighter by `shift`."""
  lines, files = study()
  for f in range(frames):
    files[f"again{f}"] = encoded(
      dicom(IMAGES[f, 1] + shift, 2, f, SeriesInstanceUID=uid, SeriesNumber=number)
    )
    lines.append(f"again{f},{NAME},s,Aug 30, 2015,CINE_segmented_SAX_b2,7")
  return lines, files


def test_a_slice_acquired_twice(tmp_path):
  segmentation, path = save(tmp_path / "seg.nii.gz", LABELS), tmp_path / "a.zip"
  last = IMAGES.copy()
  last[:, 1] += 100
  flags = ("series b2 was acquired 2 times, the last complete one is taken",)
  for uid, number, frames, images in (
    ("1.2.3.9", 20, FRAMES, last),
    ("1.2.3.1.9", 20, FRAMES, last),
    ("1.2.3.9", 1, FRAMES, IMAGES),
    ("1.2.3.9", 20, 3, IMAGES),
  ):
    pack(path, *repeated(uid, number, frames))
    cine = ukb_cmr_dicom.read(path)
    same(cine, images)
    assert cine.flags == flags
  # complete but for what may be filled
  cine = ukb_cmr_dicom.read(pack(path, *repeated("1.2.3.9", 20, FRAMES - 2)))
  np.testing.assert_array_equal(cine.images[:, 1], IMAGES[[0, 1, 2, 3, 3, 3], 1] + 100)
  assert cine.flags == (*flags, "missing frames filled by the one before: series b2 (2)")
  pack(path, *repeated("1.2.3.9", 20))
  same(ukb_cmr_dicom.read(path, segmentation), last, LABELS)
  pack(path, *repeated("1.2.3.1.9", 20))  # the converter takes the last UID, not the last series
  rejects(lambda path: ukb_cmr_dicom.read(path, segmentation), path, "acquired 2 times")
  # same series, same UID: what belongs together is not known
  lines, files = repeated("1.2.3.2", 2)
  rejects(ukb_cmr_dicom.read, pack(path, lines, files), "12 images of 6 frames")


@pytest.mark.parametrize("frames", [(4,), (5,), (0,), (1, 2), (0, 5)])
def test_missing_frames_repeat_the_one_before(tmp_path, frames):
  segmentation = save(tmp_path / "seg.nii.gz", LABELS)
  path = pack(tmp_path / "a.zip", *study(drop={(2, f) for f in frames}))
  images, source, kept = (
    IMAGES.copy(),
    list(range(FRAMES)),
    [f for f in range(FRAMES) if f not in frames],
  )
  for f in range(FRAMES):
    source[f] = max([k for k in kept if k <= f], default=kept[0])
  images[:, 1] = IMAGES[source, 1]
  cine = ukb_cmr_dicom.read(path, segmentation)
  np.testing.assert_array_equal(cine.images, images)
  assert cine.flags == (f"missing frames filled by the one before: series b2 ({len(frames)})",)
  assert cine.frame_s == pytest.approx(STEP_MS / 1000)
  # the converter writes its files one after the other: frame k of the segmentation is the k-th file
  expected = LABELS.copy()
  expected[:, 1] = LABELS[[kept.index(s) for s in source], 1]
  np.testing.assert_array_equal(cine.labels, expected)


def test_too_many_missing_frames(tmp_path):
  path = pack(tmp_path / "a.zip", *study(drop={(2, 1), (2, 3), (2, 4)}))
  rejects(ukb_cmr_dicom.read, path, "series b2 has 3 images of 6 frames")
  lines, files = study()
  del files[file_name(4, 2)]  # listed, not there
  assert "series b4 (1)" in ukb_cmr_dicom.read(pack(path, lines, files)).flags[0]


def test_time(tmp_path):
  path = tmp_path / "a.zip"
  cine = ukb_cmr_dicom.read(
    pack(path, *study(lambda z, f: {"TriggerTime": str((30 + 2 * z) * f + 5)}))
  )
  same(cine)
  assert cine.frame_s == pytest.approx(0.035)  # the mean of 32, 34, 36, 38 ms
  for trigger in (None, "0"):
    tags = {"TriggerTime": trigger}
    cine = ukb_cmr_dicom.read(pack(path, *study(lambda z, f, tags=tags: tags)))
    same(cine)
    assert cine.frame_s == pytest.approx(STEP_MS / 1000)  # NominalInterval / CardiacNumberOfImages
    assert (
      cine.flags[0] == "series b1 has no distinct trigger times, its frames go by InstanceNumber"
    )
  cine = ukb_cmr_dicom.read(
    pack(path, *study(lambda z, f: {"TriggerTime": None, "NominalInterval": None}))
  )
  assert np.isnan(cine.frame_s)
  rejects(
    ukb_cmr_dicom.read,
    pack(path, *study(lambda z, f: {"TriggerTime": None, "InstanceNumber": 1})),
    "order",
  )
  cine = ukb_cmr_dicom.read(
    pack(path, *study(lambda z, f: {"CardiacNumberOfImages": None}, drop={(3, 2)}))
  )
  assert [flag.split(" ")[0] for flag in cine.flags] == ["CardiacNumberOfImages", "missing"]
  for count in (50, 9999, 10**9):
    tags = {"CardiacNumberOfImages": count}
    rejects(ukb_cmr_dicom.read, pack(path, *study(lambda z, f, tags=tags: tags)), str(f"{count:g}"))


def at(z_mm, x=0.0, y=0.0):
  """Position at a distance along the normal (-0.8, 0.6, 0), moved in the plane along the row (0.6,
  0.8, 0)."""
  return [round(-0.8 * z_mm + 0.6 * x, 6), round(0.6 * z_mm + 0.8 * x, 6), y]


def test_slice_distances(tmp_path):
  path = tmp_path / "a.zip"

  def moved(*mm, **others):
    return pack(path, *study(lambda z, f: {"ImagePositionPatient": at(mm[z - 1])} | others))

  assert ukb_cmr_dicom.read(moved(0, 10.1, 20, 30)).flags == ()
  cine = ukb_cmr_dicom.read(moved(0, 10.5, 20, 30))
  assert cine.spacing[0] == pytest.approx(10) and cine.flags == ("slices lie 9.5 to 10.5 mm apart",)
  assert ukb_cmr_dicom.read(moved(30, 20, 10, 0)).spacing[0] == pytest.approx(10)
  rejects(ukb_cmr_dicom.read, moved(0, 10, 30, 40), "10.0 to 20.0 mm", "evenly")
  rejects(ukb_cmr_dicom.read, moved(0, 10, 20, 10), "one direction")
  rejects(ukb_cmr_dicom.read, moved(7, 7, 7, 7), "0.0 mm")
  assert ukb_cmr_dicom.read(moved(0, 10, 20, 30, SpacingBetweenSlices="12")).spacing[
    0
  ] == pytest.approx(10)

  shifted = study(lambda z, f: {"ImagePositionPatient": at(10 * z, 3 * (z == 2))})
  assert (
    ukb_cmr_dicom.read(pack(path, *shifted))
    .flags[0]
    .endswith("by up to 3.0 mm from one to the next")
  )
  tilted = study(lambda z, f: {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]} if z == 2 else {})
  rejects(ukb_cmr_dicom.read, pack(path, *tilted), "parallel")
  skewed = study(lambda z, f: {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]})
  rejects(ukb_cmr_dicom.read, pack(path, *skewed), "perpendicular")
  several = study(lambda z, f: {"ImagePositionPatient": at(10 * z + f % 2)})
  rejects(ukb_cmr_dicom.read, pack(path, *several), "series b1 holds images of several positions")


def test_slice_distance_without_positions(tmp_path):
  path, gone = tmp_path / "a.zip", {"ImagePositionPatient": None}
  cine = ukb_cmr_dicom.read(pack(path, *study(lambda z, f: gone)))
  assert cine.spacing[0] == 8 and cine.flags == ("slice distance taken from SliceThickness",)
  cine = ukb_cmr_dicom.read(pack(path, *study(lambda z, f: gone | {"SpacingBetweenSlices": "10"})))
  assert cine.spacing[0] == 10 and cine.flags == ("slice distance taken from SpacingBetweenSlices",)
  rejects(
    ukb_cmr_dicom.read,
    pack(path, *study(lambda z, f: gone | {"SliceThickness": None})),
    "no slice positions",
  )


@pytest.mark.parametrize(
  "change,words",
  [
    ({"PixelSpacing": None}, ["PixelSpacing"]),
    ({"PixelSpacing": ["1.4", "1.4"]}, ["PixelSpacing"]),
    ({"Rows": 65535, "Columns": 65535}, ["of series b2", "65535 x 65535"]),
    ({"Rows": 0}, ["of series b2"]),
    ({"Rows": 20, "Columns": 16}, ["size"]),
    ({"PixelRepresentation": 1}, ["type"]),
    ({"BitsAllocated": 32}, ["grey"]),
    ({"SamplesPerPixel": 3}, ["grey"]),
    ({"NumberOfFrames": 2**31 - 1}, ["grey"]),
    ({"PixelData": None}, ["of series b2", "AttributeError"]),
    ({"BitsAllocated": 8}, ["640 bytes"]),
    ({"syntax": JPEG2000Lossless}, ["of series b2", "compressed"]),
  ],
)
def test_an_image_that_does_not_fit(tmp_path, plain, change, words):
  lines, files = plain
  data = dicom(IMAGES[0, 1], 2, 0)
  for tag, value in change.items():
    if tag == "syntax":
      data.file_meta.TransferSyntaxUID = value
      data["PixelData"].VR = "OB"
      data.PixelData = pydicom.encaps.encapsulate([bytes(8)])
    elif value is None:
      del data[tag]
    else:
      setattr(data, tag, value)
  rejects(
    ukb_cmr_dicom.read,
    pack(tmp_path / "a.zip", lines, files | {file_name(2, 0): encoded(data)}),
    *words,
  )


def test_pixels_of_other_kinds(tmp_path):
  path = tmp_path / "a.zip"
  cine = ukb_cmr_dicom.read(pack(path, *study(lambda z, f: {"PixelRepresentation": 1})))
  assert cine.images.dtype == np.int16
  same(cine)
  big = {"syntax": ExplicitVRBigEndian}
  same(
    ukb_cmr_dicom.read(
      pack(path, *study(lambda z, f: big | {"PixelData": IMAGES[f, z - 1].astype(">u2").tobytes()}))
    )
  )
  eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
  cine = ukb_cmr_dicom.read(
    pack(
      path,
      *study(lambda z, f: eight | {"PixelData": (IMAGES[f, z - 1] % 256).astype("u1").tobytes()}),
    )
  )
  same(cine, IMAGES % 256)


# The zip: what it may do to us


def test_hostile_members(tmp_path, plain):
  lines, files = plain
  path = tmp_path / "a.zip"

  def with_entry(name, data=b"", mode=0, **entry):
    pack(path, lines, files)
    with zipfile.ZipFile(path, "a") as archive:
      info = zipfile.ZipInfo(name)
      info.external_attr = mode << 16
      for key, value in entry.items():
        setattr(info, key, value)
      archive.writestr(info, data)
    return path

  before = sorted(tmp_path.parent.rglob("*"))
  for name in ("../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:\\evil"):
    rejects(ukb_cmr_dicom.read, with_entry(name), "out of its folder")
  rejects(
    ukb_cmr_dicom.read, with_entry("link", b"/etc/passwd", stat.S_IFLNK | 0o777), "symbolic link"
  )
  rejects(
    ukb_cmr_dicom.read, with_entry("x", bytes(99), compress_type=zipfile.ZIP_LZMA), "method 14"
  )
  with pytest.warns(UserWarning):
    with_entry(next(iter(files)))
  rejects(ukb_cmr_dicom.read, path, "same name")
  many = {f"{n}": b"" for n in range(ukb_cmr_dicom.MAX_MEMBERS + 1)}
  rejects(ukb_cmr_dicom.read, pack(path, lines, many), "members")
  rejects(
    ukb_cmr_dicom.read,
    pack(path, lines, {"n" * 60000 + str(n): b"" for n in range(20)}),
    "directory",
  )
  pack(path, lines, files)
  data = bytearray(path.read_bytes())
  data[data.rindex(b"PK\1\2") + 8] |= 1
  path.write_bytes(data)
  rejects(ukb_cmr_dicom.read, path, "encrypted")
  assert set(tmp_path.parent.rglob("*")) - set(before) <= {path}


def test_bombs_take_no_memory(tmp_path, plain):
  """A member of 1 GiB, the same with a false size in the directory, and a deflated DICOM file."""
  lines, files = plain
  name, path = next(iter(files)), tmp_path / "a.zip"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
    archive.writestr("manifest.csv", "\n".join(lines))
    with archive.open(name, "w") as stream:
      for _ in range(64):
        stream.write(bytes(2**24))
  honest = path.read_bytes()
  lying = honest.replace(struct.pack("<L", 2**30), struct.pack("<L", 100))
  assert lying != honest
  deflated = encoded(
    dicom(IMAGES[0, 0], 1, 0, syntax=DeflatedExplicitVRLittleEndian, PixelData=bytes(2**26))
  )
  assert len(deflated) < 2**18
  tracemalloc.start()
  for data, words in ((honest, ["file", "has more than"]), (lying, [])):
    path.write_bytes(data)
    rejects(ukb_cmr_dicom.read, path, *words)
  rejects(ukb_cmr_dicom.read, pack(path, lines, files | {name: deflated}), "deflated")
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**24, peak


def test_all_images_together_are_bounded(tmp_path, plain, monkeypatch):
  monkeypatch.setattr(ukb_cmr_dicom, "MAX_IMAGE_BYTES", 5 * len(SMALL))
  rejects(ukb_cmr_dicom.read, pack(tmp_path / "a.zip", *plain), "the images take more than")


def test_sequences_in_sequences_without_end(tmp_path, plain):
  """pydicom goes down one Python call a level."""
  start = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, 2**32 - 1) + struct.pack(
    "<HHL", 0xFFFE, 0xE000, 2**32 - 1
  )
  files = plain[1] | {file_name(1, 0): SMALL[: SMALL.index(b"\x18\x00\x50\x00")] + start * 10_000}
  rejects(
    ukb_cmr_dicom.read, pack(tmp_path / "a.zip", plain[0], files), "series b1", "RecursionError"
  )


def test_files_that_are_no_zip(tmp_path, plain):
  path = pack(tmp_path / f"{NAME}.zip", *plain)
  whole = path.read_bytes()
  for data in (b"", b"PK", whole[:-30], whole[: len(whole) // 2], whole[1000:], bytes(1000)):
    path.write_bytes(data)
    rejects(ukb_cmr_dicom.read, path, "zip")
  rejects(ukb_cmr_dicom.read, tmp_path, "a folder")
  rejects(ukb_cmr_dicom.read, pack(path, plain[0], plain[1], "list.csv"), "manifest")
  huge = [*plain[0], "x" * ukb_cmr_dicom.MAX_MEMBER_BYTES]
  rejects(ukb_cmr_dicom.read, pack(path, huge, plain[1]), "the manifest has more than")


def test_nothing_of_the_person_is_told(tmp_path):
  cine = ukb_cmr_dicom.read(pack(tmp_path / f"{NAME}.zip", *study(drop={(1, 1)})))
  assert NAME not in repr(cine._replace(images=None)) and "2015" not in repr(cine.flags)


def test_contract():
  images = IMAGES[:, :, :8, :8]
  for spacing, word in (((0, 1, 1), "slices"), ((10, 11, 1), "rows"), ((10, 1, np.nan), "columns")):
    rejects(lambda spacing: assemble(images, spacing), spacing, word)
  rejects(lambda es: assemble(images, SPACING, ed=0, es=es), 6, "frame 7 of 6")
  rejects(lambda es: assemble(images, SPACING, ed=3, es=es), 3, "same frame")
  rejects(lambda images: assemble(images, SPACING), images * 0, "empty")


# Fuzz: whatever the bytes, a Cine or a BadRecord


def mutations(size):
  """A few (position, byte) to change, and where to cut (or not)."""
  return st.tuples(
    st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, 255)), min_size=1, max_size=8),
    st.one_of(st.none(), st.integers(0, size)),
  )


def mutated(data, mutation):
  data = bytearray(data)
  for position, value in mutation[0]:
    data[position] = value
  return bytes(data[: mutation[1]])


def survives(read, *args):
  try:
    read(*args)
  except BadRecord as error:
    assert "\n" not in str(error) and NAME not in str(error)


SMALL = encoded(dicom(IMAGES[0, 0], 1, 0))
MANIFEST = "\n".join(study()[0][:6])


@FUZZ
@given(mutation=mutations(len(SMALL) - 2 * ROWS * COLUMNS))
def test_fuzz_dicom(tmp_path_factory, plain, mutation):
  lines, files = plain
  path = tmp_path_factory.getbasetemp() / "fuzz.zip"
  survives(
    ukb_cmr_dicom.read, pack(path, lines, files | {file_name(1, 0): mutated(SMALL, mutation)})
  )


@FUZZ
@given(data=st.data())
def test_fuzz_zip(tmp_path_factory, plain, data):
  path = tmp_path_factory.getbasetemp() / "fuzz.zip"
  lines, files = plain
  kept = dict(list(files.items())[:4])
  whole = pack(path, lines[:5], kept).read_bytes()
  directory = whole.index(b"PK\1\2")
  offset = data.draw(st.sampled_from([0, directory]))
  tail = mutated(whole[offset:], data.draw(mutations(len(whole) - offset)))
  path.write_bytes(whole[:offset] + tail)
  survives(ukb_cmr_dicom.read, path)


@FUZZ
@given(mutation=mutations(len(MANIFEST)), text=st.text(max_size=40))
def test_fuzz_manifest(tmp_path_factory, plain, mutation, text):
  path = tmp_path_factory.getbasetemp() / "fuzz.zip"
  manifest = mutated(MANIFEST.encode(), mutation) + text.encode("utf-8", "surrogatepass")
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in list(plain[1].items())[:6]:
      archive.writestr(name, content)
    archive.writestr("manifest.csv", manifest)
  survives(ukb_cmr_dicom.read, path)


@settings(FUZZ, max_examples=200)
@given(data=st.data())
def test_fuzz_nifti(tmp_path_factory, data):
  folder = tmp_path_factory.getbasetemp() / "fuzz"
  if not folder.exists():
    write_ukbb(folder)
  path, out = folder / "seg_sa.nii.gz", folder / "fuzz.nii.gz"
  if data.draw(st.booleans()):
    edited(path, lambda raw: mutated(raw, data.draw(mutations(352))), out)
  else:
    out.write_bytes(mutated(path.read_bytes(), data.draw(mutations(path.stat().st_size))))
  survives(nifti.read, out)
  survives(nifti.read_labels, out, ukbb_cardiac.NUMBERS)


@FUZZ
@given(data=st.data())
def test_fuzz_acdc_and_mnms_text(tmp_path_factory, data):
  root = tmp_path_factory.getbasetemp() / "text"
  if not root.exists():
    write_acdc(root / "patient001", cine=False)
    write_mnms(root / "mnms")
    (root / "config").write_bytes((root / "patient001/Info.cfg").read_bytes())
    (root / "table").write_bytes(next((root / "mnms").glob("*.csv")).read_bytes())
  config, table = (root / "config").read_bytes(), (root / "table").read_bytes()
  (root / "patient001/Info.cfg").write_bytes(mutated(config, data.draw(mutations(len(config)))))
  survives(acdc.read, root / "patient001")
  survives(acdc.about, root / "patient001")
  next((root / "mnms").glob("*.csv")).write_bytes(mutated(table, data.draw(mutations(len(table)))))
  try:
    for each in mnms.find(root / "mnms"):
      mnms.about(each)
      survives(mnms.read, each)
  except BadRecord:
    pass
