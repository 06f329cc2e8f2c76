"""The UK Biobank source on the one real heart there is: three formats of it give one record, with
the known volumes."""

import shutil
import types

import numpy as np
import pytest
from common import ROOT

from mmcl_jax import prepare
from mmcl_jax.data import cohort as cohort_lib, schema
from mmcl_jax.data.preprocess import cmr as preprocess_cmr, ecg as preprocess_ecg
from mmcl_jax.data.readers import wfdb
from mmcl_jax.data.sources import acdc, ukb
from mmcl_jax.errors import UserError

REAL = ROOT.parent / "shared/realdata"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the shared real data are not here")


def options(*inputs, **changes):
  wanted = dict(
    input=list(map(str, inputs)),
    tables=[],
    segmentations=None,
    withdrawn=None,
    diseases="any",
    codes=None,
    censored=None,
    shape=preprocess_cmr.Shape(),
  )
  return types.SimpleNamespace(**wanted | changes)


def identify(participant):
  return schema.subject_hash(participant, b"salt")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
  """The real ECG and the real heart as UK Biobank would name the files of one visit."""
  folder = tmp_path_factory.mktemp("raw")
  for name, source in {
    "ecg/DEMO0001_20205_2_0.xml": "ecg/cardiosoft_style/DEMO0001_20205_2_0.xml",
    "cmr/NN/DEMO0001_20209_2_0.zip": "cmr/bivme_patient1_ukb20209/DEMO0001_20209_2_0.zip",
    "seg/DEMO0001_2/seg_sa.nii.gz": "cmr/bivme_patient1/seg_sa.nii.gz",
    "nifti/DEMO0001_2/sa.nii.gz": "cmr/bivme_patient1/sa.nii.gz",
    "nifti/DEMO0001_2/seg_sa.nii.gz": "cmr/bivme_patient1/seg_sa.nii.gz",
  }.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(REAL / source, folder / name)
  return folder


@pytest.fixture(scope="module")
def record(raw):
  plan = ukb.plan(options(raw / "ecg", raw / "cmr", segmentations=str(raw / "seg")), identify)
  return plan.read(plan.items[0])


def test_volumes_of_the_real_heart_and_what_is_flagged(record):
  found, flags = record
  values = dict(zip(schema.PHENOTYPES, found["phenotypes"]))
  assert [values[name] for name in ("LVEDV", "LVESV", "LVEF")] == pytest.approx(
    [161.5, 51.4, 68.2], abs=0.05
  )
  assert values["LVM"] == pytest.approx(79, abs=0.5)
  assert values["LVCO"] == pytest.approx((161.46 - 51.38) * 60 / (25 * 0.0332) / 1000, rel=0.01)
  assert "CMR: the largest LV volume is at frame 24, ED is taken at frame 0" in flags


def test_the_ecg_is_the_wfdb_record_that_the_xml_was_made_from(record):
  whole = wfdb.read(REAL / "ecg/cinc2021_wfdb/HR06000.hea")
  error = np.abs(record[0]["ecg"] - preprocess_ecg.to_standard(whole.ecg_mv, whole.rate_hz)).max(
    axis=1
  )
  assert error[[0, 1, *range(6, 12)]].max() <= 0.0025 + 1e-6 and error[2:6].max() <= 0.01


def test_zip_nifti_folder_and_acdc_give_one_record(record, raw):
  folders = ukb.plan_folders(options(raw / "ecg", raw / "nifti"), identify)
  other, _ = folders.read(folders.items[0])
  assert record[0].keys() == other.keys()
  # NIfTI keeps spacing in float32: that moves an intensity by 1 of 255 at most
  for name, value in record[0].items():
    atol = 1 if name in ("ed_es_volumes", "cine_slice") else 0
    np.testing.assert_allclose(
      value.astype(float), other[name].astype(float), rtol=1e-6, atol=atol, err_msg=name
    )
  challenge = acdc.plan(options(REAL / "cmr/acdc_style"), identify)
  third, _ = challenge.read(challenge.items[0])
  np.testing.assert_array_equal(third["ed_es_volumes"], other["ed_es_volumes"])
  np.testing.assert_array_equal(third["labels"], other["labels"])
  # two frames do not tell the heart rate
  without_rate = [name != "LVCO" for name in schema.PHENOTYPES]
  np.testing.assert_array_equal(
    third["phenotypes"][without_rate], other["phenotypes"][without_rate]
  )
  assert np.isnan(third["phenotypes"][without_rate.index(False)])


def test_one_kind_of_file_alone_is_a_cohort_of_its_own(raw):
  ecg, cmr = (ukb.plan(options(raw / name), identify) for name in ("ecg", "cmr"))
  for plan, has in ((ecg, (True, False)), (cmr, (False, True))):
    found, flags = plan.read(plan.items[0])
    assert (bool(found["has_ecg"]), bool(found["has_cmr"])) == has and (
      "ed_es_volumes" in found
    ) == has[1]
  assert "CMR: ES from images, no segmentation" in flags


def test_the_same_person_at_another_visit_is_no_partner(raw, tmp_path):
  shutil.copyfile(raw / "ecg/DEMO0001_20205_2_0.xml", tmp_path / "DEMO0001_20205_3_0.xml")
  plan = ukb.plan(options(tmp_path, raw / "cmr"), identify)
  assert plan.items == [] and sorted((item.visit, why) for item, why in plan.rejected) == [
    (2, "no ECG of this visit"),
    (3, "no CMR of this visit"),
  ]


def test_the_program_makes_a_cohort_that_names_nobody(raw, tmp_path, capsys):
  prepare.main(
    [
      "ukb",
      f"--input={raw / 'ecg'}",
      f"{raw / 'cmr'}",
      f"--segmentations={raw / 'seg'}",
      "--split=1,0,0",
      f"--out={tmp_path / 'c'}",
      "--processes=1",
    ]
  )
  cohort = cohort_lib.load(str(tmp_path / "c"))
  assert cohort.info["counts"] == {"train": 1, "val": 0, "test": 0}
  printed = "".join(capsys.readouterr())
  files = [f for f in (tmp_path / "c").rglob("*") if f.is_file()]
  assert "DEMO0001" not in printed and not [f for f in files if b"DEMO0001" in f.read_bytes()]
  assert "DEMO0001" in (tmp_path / "c.private/participants.csv").read_text()


def test_segmentations_that_are_nowhere_are_a_mistake(raw):
  with pytest.raises(UserError, match="--segmentations: no file or folder /nowhere"):
    ukb.plan(options(raw / "ecg", segmentations="/nowhere"), identify)
  with pytest.raises(UserError, match="0 folders ID_VISIT with seg_sa.nii.gz"):
    ukb.plan(options(raw / "ecg", raw / "cmr", segmentations=str(raw / "ecg")), identify)


def test_tables_of_other_people_are_a_mistake(raw, tmp_path):
  (tmp_path / "t.csv").write_text("eid,31-0.0\nDEMO0002,1\n")
  with pytest.raises(UserError, match="ids those of another application"):
    ukb.plan(options(raw / "ecg", raw / "cmr", tables=[str(tmp_path / "t.csv")]), identify)


def test_the_second_recording_of_a_visit_stands_in_for_a_bad_first(raw, tmp_path):
  shutil.copyfile(raw / "ecg/DEMO0001_20205_2_0.xml", tmp_path / "DEMO0001_20205_2_1.xml")
  (tmp_path / "DEMO0001_20205_2_0.xml").write_text("<CardiologyXML>")
  plan = ukb.plan(options(tmp_path), identify)
  _, flags = plan.read(plan.items[0])
  assert len(plan.items) == 1 and any(
    "ECG number 1 of 2 of the same visit not used" in flag for flag in flags
  )


def test_overlapping_inputs_count_once(raw):
  plan = ukb.plan(options(raw, raw / "ecg"), identify)
  assert len(plan.items) == 1 and not plan.rejected and len(plan.items[0].key.ecg) == 1
