"""Sources without UK Biobank: WFDB databases with their tables, ACDC and M&Ms."""

import argparse
import builtins
import csv
import errno
import functools
import os
import pickle
from pathlib import Path

import nibabel
import numpy as np
import pytest
import wfdb as physionet
from hypothesis import given, settings, strategies as st

from common import ROOT
from mmcl_jax.data import schema
from mmcl_jax.data.preprocess import cmr
from mmcl_jax.data.readers import (
  dicom_ecg,
  files,
  mmcl_pt,
  nifti,
  ukb_cmr_dicom,
  ukb_ecg_xml,
  wfdb as wfdb_files,
)
from mmcl_jax.data.sources import acdc, mnms, wfdb
from mmcl_jax.data.ukb_fields import disease_codes
from mmcl_jax.errors import BadRecord, UserError

REAL = ROOT.parent / "shared/realdata"
DISEASES = tuple(disease_codes())
MALE, FEMALE = 1.0, 0.0
T = np.arange(5000) / 500
BEAT = np.exp(-((((T + 0.5) % 1 - 0.5) / 0.04) ** 2))  # 1 Hz; smooth enough for 100 Hz

identify = functools.partial(schema.subject_hash, salt=b"test")
hypothesis = functools.partial(settings, deadline=None, derandomize=True)


def options(*inputs, **more):
  return argparse.Namespace(input=[str(path) for path in inputs], **more)


def record(folder, name, size=1.0, rate=500, comments=()):
  """A recording whose lead I peaks at `size` mV."""
  folder.mkdir(parents=True, exist_ok=True)
  relative = {"I": 1, "II": 1.5, "V1": -1, "V2": 1, "V3": 2, "V4": 1.5, "V5": 1.2, "V6": 1}
  leads = {lead: size * peak * BEAT[:: 500 // rate] for lead, peak in relative.items()}
  physionet.wrsamp(
    name,
    fs=rate,
    units=["mV"] * 8,
    sig_name=list(leads),
    p_signal=np.stack(list(leads.values()), 1),
    fmt=["16"] * 8,
    adc_gain=[1000] * 8,
    baseline=[0] * 8,
    comments=list(comments),
    write_dir=str(folder),
  )


def table(path, *rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "w", newline="") as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
  return str(path)


def known(record):
  """The diseases that are not NaN."""
  assert len(record["diseases"]) == len(DISEASES)
  return {name: x for name, x in zip(DISEASES, record["diseases"].tolist()) if x == x}


def covariates(record):
  return {name: x for name, x in zip(schema.COVARIATES, record["covariates"].tolist()) if x == x}


def by_name(plan):
  """The items in the order of their participants and visits; the plan's own is by hash."""
  order = [(*item.subject[::-1].tolist(), item.visit) for item in plan.items]
  assert order == sorted(order)
  return sorted(plan.items, key=lambda item: (item.private[0], item.visit))


# PTB-XL


def ptb_xl(folder, *rows, hr=True, lr=True):
  """Rows (number, patient, cells) as PTB-XL lays them out; recording `number` peaks at number / 10
  mV in lead I."""
  cells = []
  for number, patient, more in rows:
    names = {
      "filename_lr": f"records100/00000/{number:05d}_lr",
      "filename_hr": f"records500/00000/{number:05d}_hr",
    }
    for wanted, name, rate in ((lr, names["filename_lr"], 100), (hr, names["filename_hr"], 500)):
      if wanted:
        record(folder / Path(name).parent, Path(name).name, number % 1000 / 10, rate)
    cells.append(
      {
        "ecg_id": number,
        "patient_id": f"{patient}.0",
        "age": "60.0",
        "sex": "0",
        "height": "",
        "weight": "",
        "scp_codes": "{'NORM': 100.0, 'SR': 0.0}",
        "recording_date": "1990-01-01 10:00:00",
        "strat_fold": 1,
        **more,
        **names,
      }
    )
  return table(folder / "ptbxl_database.csv", *cells)


@pytest.mark.reported("decimal commas in a table of ECGs cost a covariate, without a word")
@pytest.mark.parametrize(
  "cells, words",
  [
    ({"age": "60,5"}, "'age'.*'99,9'.*years.*decimal sign"),
    ({"sex": "w"}, "'sex'.*expected 0 for male, 1 for female"),
    ({"height": "1.80"}, "'height'.*'9.99'.*cm"),
    ({"scp_codes": "NORM"}, "'scp_codes'.*'NORM'.*a dict"),
  ],
)
def test_a_column_of_ptb_xl_that_is_lost_stops(tmp_path, cells, words):
  rows = [(number, number, cells) for number in (1, 2, 3)]
  with pytest.raises(
    UserError, match=f"ptbxl_database.csv: 3 of the 3 filled cells of the column {words}"
  ):
    wfdb.plan(options(tmp_path, tables=[ptb_xl(tmp_path, *rows, lr=False)]), identify)
  wfdb.plan(options(tmp_path, tables=[ptb_xl(tmp_path, *rows[:2], (3, 3, {}), lr=False)]), identify)


def test_ptb_xl(tmp_path):
  path = ptb_xl(
    tmp_path,
    (11, 407, {"recording_date": "1991-05-06 07:08:09", "sex": "1", "age": "300.0"}),
    (3, 15, {"scp_codes": "{'IMI': 80.0, 'AFIB': 0.0}", "height": "181.0", "weight": "77.0"}),
    (
      5,
      407,
      {
        "recording_date": "1993-05-06 07:08:09",
        "sex": "1",
        "age": "88.0",
        "height": "6",
        "weight": "-3",
      },
    ),
  )
  record(tmp_path / "records500/00000", "00099_hr")
  made = wfdb.plan(options(tmp_path, tables=[path]), identify)

  # three recordings, each once and at 500 Hz; a patient's visits by date, not by row
  found = {item.key[0].split("/")[-1]: item for item in made.items}
  assert set(found) == {"00011_hr.hea", "00003_hr.hea", "00005_hr.hea"}
  assert {name: item.visit for name, item in found.items()} == {
    "00011_hr.hea": 0,
    "00003_hr.hea": 0,
    "00005_hr.hea": 1,
  }
  np.testing.assert_array_equal(found["00011_hr.hea"].subject, identify("407"))
  np.testing.assert_array_equal(found["00005_hr.hea"].subject, identify("407"))
  np.testing.assert_array_equal(found["00003_hr.hea"].subject, identify("15"))
  assert {"407", "00011_hr", "00011_lr"} <= set(found["00011_hr.hea"].private)
  assert made.steps == {
    "recordings on disk": 7,
    "in no table, left out": 1,
    "copies of a recording, left out": 3,
    "recordings with a row in a table": 3,
    "of these only at 100 Hz": 0,
    "participants": 2,
    "rows without a recording on disk": 0,
    "rows without a participant or a file name": 0,
  }

  read = {
    name: pickle.loads(pickle.dumps(made.read))(pickle.loads(pickle.dumps(item)))
    for name, item in found.items()
  }
  for name, size in (("00011_hr.hea", 1.1), ("00003_hr.hea", 0.3), ("00005_hr.hea", 0.5)):
    one = read[name][0]
    assert one["ecg"].shape == (12, 5000) and one["ecg"].dtype == np.float32
    np.testing.assert_allclose(one["ecg"][0], size * BEAT, atol=0.001)
    assert one["has_ecg"] and not one["has_cmr"] and one["phenotypes"].shape == (0,)
    assert set(one) == {"has_ecg", "has_cmr", "ecg", "phenotypes", "diseases", "covariates"}
  assert covariates(read["00003_hr.hea"][0]) == {
    "sex": MALE,
    "age": 60,
    "height": 181,
    "weight": 77,
  }
  assert covariates(read["00011_hr.hea"][0]) == {"sex": FEMALE, "age": 90}
  assert [name for name in read if "age above 89, taken as 90" in read[name][1]] == ["00011_hr.hea"]
  # a height of 6 cm is none
  assert covariates(read["00005_hr.hea"][0]) == {"sex": FEMALE, "age": 88}
  assert known(read["00003_hr.hea"][0]) == {"MI": 1, "AF": 1, "LVH": 0}
  assert known(read["00005_hr.hea"][0]) == {"MI": 0, "AF": 0, "LVH": 0}


@pytest.mark.parametrize(
  "cell,expected",
  [
    ("{'SR': 0.0}", {"MI": 0, "AF": 0, "LVH": 0}),
    ("{'LVH': 100.0, 'AFLT': 0.0}", {"MI": 0, "AF": 1, "LVH": 1}),
    ("{'ASMI': 50.0}", {"MI": 1, "AF": 0, "LVH": 0}),
    # too unlikely to say yes, too likely to say no
    ("{'ASMI': 35.0, 'LVH': 15.0}", {"AF": 0}),
    ("{'ASMI': 35.0, 'IMI': 100.0}", {"MI": 1, "AF": 0, "LVH": 0}),
    ("{'INJAS': 100.0, 'VCLVH': 0.0}", {"AF": 0}),
    ("{'VCLVH': 0.0, 'LVH': 100.0}", {"MI": 0, "AF": 0, "LVH": 1}),
    ("{}", {}),
    ("", {}),
  ],
)
def test_scp_statements(tmp_path, cell, expected):
  made = wfdb.plan(
    options(tmp_path, tables=[ptb_xl(tmp_path, (1, 1, {"scp_codes": cell}), lr=False)]), identify
  )
  read, flags = made.read(made.items[0])
  assert known(read) == expected and flags == ("limb leads derived",)


@pytest.mark.parametrize(
  "cell",
  [
    "__import__('os').system('touch {canary}')",
    "{{'IMI': __import__('pathlib').Path('{canary}').touch()}}",
    "{{'IMI': open('{canary}', 'w')}}",
    "['IMI']",
    "{{'IMI': '100'}}",
    "{{1: 2}}",
    "'" * 3,
    "-" * 4999 + "1",
    "[" * 4000,
    "{{'IMI': 1" + "0" * 4500 + "}}",
    "{{'IMI': 100.0, '" + "x" * 5000 + "': 0}}",
  ],
)
def test_a_hostile_cell_runs_nothing_and_costs_only_the_diseases(tmp_path, cell):
  canary = tmp_path / "canary"
  path = ptb_xl(tmp_path, (1, 17, {"scp_codes": cell.format(canary=canary)}), lr=False)
  made = wfdb.plan(options(tmp_path, tables=[path]), identify)
  read, flags = made.read(made.items[0])
  assert not canary.exists()
  assert known(read) == {} and covariates(read) == {"sex": MALE, "age": 60}
  assert [flag for flag in flags if "diseases unknown" in flag]
  assert not [flag for flag in flags if "IMI" in flag or "17" in flag]


def test_only_100_hz_is_taken_where_there_is_no_500(tmp_path):
  path = ptb_xl(tmp_path, (4, 1, {}), (7, 2, {}), hr=False)
  record(tmp_path / "records500/00000", "00004_hr", 0.4)
  made = wfdb.plan(options(tmp_path, tables=[path]), identify)
  assert [Path(item.key[0]).name for item in by_name(made)] == ["00004_hr.hea", "00007_lr.hea"]
  assert (
    made.steps["of these only at 100 Hz"] == 1
    and made.steps["copies of a recording, left out"] == 1
  )
  np.testing.assert_allclose(
    made.read(by_name(made)[1])[0]["ecg"][0, :4900], 0.7 * BEAT[:4900], atol=0.003
  )


def test_a_recording_that_lies_twice_is_taken_once_where_the_table_says(tmp_path):
  path = ptb_xl(tmp_path, (4, 1, {}), lr=False)
  record(tmp_path / "a copy", "00004_hr", 9)
  for inputs in ([tmp_path], [tmp_path / "a copy", tmp_path], [tmp_path, tmp_path]):
    made = wfdb.plan(options(*inputs, tables=[path]), identify)
    assert len(made.items) == 1 and "records500/00000" in made.items[0].key[0]
    assert (
      made.steps["recordings on disk"] == 2 and made.steps["copies of a recording, left out"] == 1
    )
  # flat folders are found by name
  made = wfdb.plan(options(tmp_path / "a copy", tables=[path]), identify)
  assert len(made.items) == 1 and "a copy" in made.items[0].key[0]


def test_visits_do_not_depend_on_what_is_on_disk(tmp_path):
  path = ptb_xl(tmp_path, (1, 5, {"recording_date": "1990-01-01 00:00:00"}), (2, 5, {}))
  for file in tmp_path.rglob("00001_*"):
    file.unlink()
  made = wfdb.plan(options(tmp_path, tables=[path]), identify)
  assert [item.visit for item in made.items] == [1]
  assert made.steps["rows without a recording on disk"] == 1


def test_a_broken_recording_is_a_bad_record_without_ids(tmp_path):
  path = ptb_xl(tmp_path, (10012, 67890, {}), lr=False)
  (tmp_path / "records500/00000/10012_hr.dat").write_bytes(b"")
  made = wfdb.plan(options(tmp_path, tables=[path]), identify)
  with pytest.raises(BadRecord) as caught:
    made.read(made.items[0])
  assert set(made.items[0].private) == {"67890", "10012_hr", "10012_lr"}
  assert not [text for text in made.items[0].private if text in str(caught.value)]


# MIMIC-IV-ECG


def mimic(folder, *rows):
  """Rows (study, subject, time, cells of the diagnosis table or None) -> paths of both tables."""
  lists, codes = [], []
  for i, (study, subject, time, more) in enumerate(rows):
    path = f"files/p{subject[:4]}/p{subject}/s{study}/{study}"
    record(folder / Path(path).parent, study, (i + 1) / 10)
    lists.append(
      {"subject_id": subject, "study_id": study, "file_name": study, "ecg_time": time, "path": path}
    )
    if more is not None:
      codes.append(
        {
          "file_name": f"mimic-iv-ecg-1.0/{path}",
          "study_id": study,
          "subject_id": subject,
          "ecg_time": time,
          "gender": "F",
          "age": "52.0",
          "all_diag_hosp": "[]",
          "all_diag_all": "[]",
        }
        | more
      )
  return [
    table(folder / "record_list.csv", *lists),
    table(folder / "records_w_diag_icd10.csv", *codes),
  ]


def test_mimic(tmp_path):
  tables = mimic(
    tmp_path,
    (
      "4002",
      "100032",
      "2180-08-06 09:07:00",
      {"all_diag_hosp": "['I2510', 'I480', 'I5023']", "all_diag_all": "['I10']"},
    ),
    ("4001", "100032", "2180-07-23 08:44:00", {}),
    (
      "4003",
      "100117",
      "2110-01-01 00:00:00",
      {"all_diag_all": "['I214', 'I517']", "gender": "M", "age": "91"},
    ),
    (
      "4004",
      "100119",
      "2110-01-01 00:00:00",
      {"all_diag_hosp": "['Z9581']", "gender": "missing", "age": ""},
    ),
    ("4005", "100120", "2110-01-01 00:00:00", None),
    ("4006", "100121", "2110-01-01 00:00:00", {"all_diag_hosp": "nonsense"}),
  )
  orders = [tables, tables[::-1]]
  for order in orders:
    made = wfdb.plan(options(tmp_path, tables=order), identify)
    found = {Path(item.key[0]).stem: item for item in made.items}
    assert set(found) == {"4001", "4002", "4003", "4004", "4005", "4006"}
    assert [found[name].visit for name in ("4001", "4002", "4003")] == [0, 1, 0]
    np.testing.assert_array_equal(found["4001"].subject, found["4002"].subject)
    np.testing.assert_array_equal(found["4001"].subject, identify("100032"))
    assert made.steps["participants"] == 5 and made.steps["recordings on disk"] == 6
    read = {name: made.read(item) for name, item in found.items()}
    np.testing.assert_allclose(read["4003"][0]["ecg"][0], 0.3 * BEAT, atol=0.001)
    none = dict.fromkeys(DISEASES, 0)
    assert known(read["4002"][0]) == none | {"CAD": 1, "AF": 1, "HF": 1, "hypertension": 1}
    assert known(read["4001"][0]) == {}  # no stay is linked: nothing is known
    # of an emergency department: excludes nothing
    assert known(read["4003"][0]) == {"MI": 1, "CAD": 1, "LVH": 1}
    assert known(read["4004"][0]) == none
    assert known(read["4005"][0]) == known(read["4006"][0]) == {}
    assert covariates(read["4001"][0]) == {"sex": FEMALE, "age": 52}
    assert covariates(read["4003"][0]) == {"sex": MALE, "age": 91}
    assert covariates(read["4004"][0]) == covariates(read["4005"][0]) == {}
    assert [
      name for name, (_, flags) in read.items() if any("ICD-10" in flag for flag in flags)
    ] == ["4006"]


def test_tables_that_contradict_each_other(tmp_path):
  tables = mimic(tmp_path, ("4001", "100032", "2180-07-23 08:44:00", {"subject_id": "100999"}))
  with pytest.raises(UserError) as caught:
    wfdb.plan(options(tmp_path, tables=tables), identify)
  assert "another participant" in str(caught.value) and "100" not in str(caught.value).replace(
    str(tmp_path), ""
  )


def test_rows_without_a_participant_or_a_name_are_counted(tmp_path):
  path = ptb_xl(tmp_path, (1, 5, {}), (2, 5, {"patient_id": ""}), lr=False)
  made = wfdb.plan(options(tmp_path, tables=[path]), identify)
  assert len(made.items) == 1
  assert (
    made.steps["rows without a participant or a file name"] == 1
    and made.steps["in no table, left out"] == 1
  )


# CinC and folders without a table


def test_cinc_headers(tmp_path):
  normal = "Dx: 426783006"
  for name, comments in {
    "HR00001": ["Age: 59", "Sex: Female", "Dx: 164865005,164873001"],
    "HR00002": ["Age: NaN", "Sex: Unknown", normal],
    "E00001": ["Age: 300", "Sex: M", normal],
    "E00002": ["Dx: 164889003, 57054005"],
    "A0001": [normal],
    "X1": [],
    "JS00001": ["Dx: 55827005,164890007"],
  }.items():
    record(tmp_path / "g1", name, comments=comments)
  made = wfdb.plan(options(tmp_path), identify)
  read = {Path(item.key[0]).stem: made.read(item)[0] for item in made.items}
  assert made.steps["without a table: every record counts as its own subject"] == len(read) == 7
  assert {item.visit for item in made.items} == {0}
  assert len({item.subject.tobytes() for item in made.items}) == 7
  (item,) = (item for item in made.items if "HR00001" in item.private)
  np.testing.assert_array_equal(item.subject, identify("HR00001"))
  assert covariates(read["HR00001"]) == {"sex": FEMALE, "age": 59}
  assert covariates(read["HR00002"]) == {} and covariates(read["E00001"]) == {"sex": MALE}
  assert known(read["HR00001"]) == {"MI": 1, "AF": 0, "LVH": 1}
  assert known(read["HR00002"]) == {"MI": 0, "AF": 0, "LVH": 0}
  # Georgia hardly codes infarction: no code says nothing
  assert known(read["E00001"]) == {"AF": 0, "LVH": 0}
  assert known(read["E00002"]) == {"MI": 1, "AF": 1, "LVH": 0}
  assert known(read["A0001"]) == {"AF": 0}
  assert known(read["JS00001"]) == {"AF": 1}  # high voltage is not yet hypertrophy
  assert known(read["X1"]) == {}


def test_without_a_table_names_that_recur_are_people_of_their_own(tmp_path):
  for person in ("ann", "ben"):
    record(tmp_path / person, "ecg")
  record(tmp_path, "00001_hr")
  record(tmp_path, "00001_lr", rate=100)
  made = wfdb.plan(options(tmp_path), identify)
  people = {identify(name).tobytes() for name in ("ann/ecg", "ben/ecg", "00001_hr")}
  assert {item.subject.tobytes() for item in made.items} == people and len(made.items) == 3
  assert made.steps["copies at 100 Hz, left out"] == 1
  made = wfdb.plan(options(tmp_path / "ann", tmp_path / "ben"), identify)
  assert {item.subject.tobytes() for item in made.items} == people - {
    identify("00001_hr").tobytes()
  }


@pytest.mark.reported(
  "prepare passed over records in capitals and files of other kinds without a word"
)
def test_capitals_and_files_of_other_kinds(tmp_path):
  decomposed = "Mu\u0308ller"
  for name in ("A1", "A2"):
    record(tmp_path, name)
  for suffix in ("hea", "dat"):
    (tmp_path / f"A2.{suffix}").rename(tmp_path / f"A2.{suffix.upper()}")
    (tmp_path / f"A1.{suffix}").rename(tmp_path / f"{decomposed}.{suffix}")
  (tmp_path / f"{decomposed}.hea").write_text(
    (tmp_path / f"{decomposed}.hea").read_text().replace("A1", "M\u00fcller")
  )
  for name in ("b.scp", "c.edf", "d.edf", "e.xml", "A2.atr"):
    (tmp_path / name).write_bytes(b"")
  made = wfdb.plan(options(tmp_path), identify)
  assert {item.private[0] for item in made.items} == {"A2", "M\u00fcller"} and made.steps[
    "recordings on disk"
  ] == 2
  assert made.steps["files of other kinds, passed over: .edf 2, .scp 1, .xml 1"] == 4
  assert all(len(made.read(item)[0]["ecg"]) == 12 for item in made.items)


def test_user_errors(tmp_path):
  (tmp_path / "a.scp").write_bytes(b"")
  with pytest.raises(UserError, match="no WFDB header .* found .scp 1"):
    wfdb.plan(options(tmp_path), identify)
  with pytest.raises(UserError, match="nowhere is neither"):
    wfdb.plan(options(tmp_path / "nowhere"), identify)
  path = ptb_xl(tmp_path, (1, 1, {}), lr=False)
  # or patients would leak between splits
  with pytest.raises(UserError, match="ptbxl_database.csv.*--tables"):
    wfdb.plan(options(tmp_path), identify)
  with pytest.raises(UserError, match="columns"):
    wfdb.plan(options(tmp_path, tables=[table(tmp_path / "other.csv", {"a": 1})]), identify)
  for wrong in (tmp_path / "absent.csv", tmp_path, tmp_path / "records500/00000/00001_hr.dat"):
    with pytest.raises(UserError):
      wfdb.plan(options(tmp_path, tables=[str(wrong)]), identify)
  record(tmp_path / "elsewhere", "other")
  with pytest.raises(UserError, match="none of the 1 recordings"):
    wfdb.plan(options(tmp_path / "elsewhere", tables=[path]), identify)


@pytest.mark.skipif(not REAL.exists(), reason="no real recordings here")
def test_real_cinc_recordings():
  made = wfdb.plan(options(REAL / "ecg/cinc2021_wfdb"), identify)
  read = [made.read(item)[0] for item in made.items]
  assert len(read) == 30
  sex, age, *_ = np.stack([one["covariates"] for one in read]).T
  assert (sex == FEMALE).sum() == 19 and (sex == MALE).sum() == 11
  assert age.min() == 19 and age.max() == 86
  stated = np.stack([one["diseases"] for one in read])
  assert np.nansum(stated[:, DISEASES.index("LVH")]) == 2  # 164873001 stands in two headers
  assert all(np.abs(one["ecg"]).max() > 0.2 for one in read)


@pytest.fixture(scope="module")
def one_recording(tmp_path_factory):
  folder = tmp_path_factory.mktemp("fuzz")
  return folder, ptb_xl(folder, (1, 1, {}), lr=False)


cells = st.one_of(
  st.text(max_size=40),
  st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
      st.lists(inner, max_size=3)
      | st.dictionaries(st.sampled_from(["IMI", "LVH"]) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
  ).map(repr),
)


@hypothesis(max_examples=80)
@given(cell=cells, age=st.text(max_size=8) | st.floats().map(str), sex=st.text(max_size=3))
def test_any_cell_makes_a_record_or_a_user_error(one_recording, cell, age, sex):
  folder, _ = one_recording
  try:
    path = table(
      folder / "fuzzed.csv",
      {
        "patient_id": "8",
        "filename_hr": "00001_hr",
        "filename_lr": "",
        "scp_codes": cell,
        "age": age,
        "sex": sex,
      },
    )
  except UnicodeEncodeError:
    return
  try:
    made = wfdb.plan(options(folder, tables=[path]), identify)
  except UserError:
    return
  (item,) = made.items
  read, _ = made.read(item)
  assert set(known(read).values()) <= {0, 1} and set(known(read)) <= {"MI", "AF", "LVH"}
  assert all(0 <= x <= 120 for x in covariates(read).values())


@hypothesis(max_examples=40)
@given(content=st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_any_file_as_a_table_is_a_user_error(one_recording, content):
  folder, _ = one_recording
  (folder / "random.csv").write_bytes(content)
  with pytest.raises(UserError):
    wfdb.plan(options(folder, tables=[str(folder / "random.csv")]), identify)


# ACDC and M&Ms

PIXEL_MM, SLICE_MM, SLICES, SIDE, FRAMES = 2.0, 10.0, 8, 64, 10
VOXEL_ML = PIXEL_MM**2 * SLICE_MM / 1000


def labels(pool):
  """uint8 [Z, H, W] in schema.LABELS: a heart that tapers from the first slice on; LV of radius
  `pool` in pixels."""
  y, x = np.mgrid[:SIDE, :SIDE]
  stack = np.zeros((SLICES, SIDE, SIDE), np.uint8)
  for z in range(SLICES):
    size = 1 - 0.08 * z
    stack[z][(np.hypot(y - 32, x - 20) < 9 * size) & (x < 30)] = schema.LABELS["RV"]
    stack[z][np.hypot(y - 32, x - 34) < 13 * size] = schema.LABELS["MYO"]
    stack[z][np.hypot(y - 32, x - 34) < pool * size] = schema.LABELS["LV"]
  return stack


# ED 0, ES 5
BEATING = np.stack([labels(9 - 4 * np.sin(np.pi * frame / FRAMES)) for frame in range(FRAMES)])


def write_nifti(path, volume):
  """Writes [F, Z, H, W] or [Z, H, W] as [X, Y, Z(, T)]."""
  path.parent.mkdir(parents=True, exist_ok=True)
  image = nibabel.Nifti1Image(np.ascontiguousarray(volume.T), None)
  image.header.set_zooms((PIXEL_MM, PIXEL_MM, SLICE_MM, 0.09)[: volume.ndim])
  image.header.set_xyzt_units("mm", "sec")
  nibabel.save(image, path)


def images():
  noise = np.random.default_rng(0).normal(20, 3, BEATING.shape)
  return (noise + np.choose(BEATING, (60, 200, 90, 190))).astype(np.int16)


def acdc_patient(folder, group="NOR", height="181.0", weight="77.0", cine=True):
  folder.mkdir(parents=True)
  (folder / "Info.cfg").write_text(
    f"ED: 1\nES: 6\nGroup: {group}\nHeight: {height}\nNbFrame: {FRAMES}\nWeight: {weight}\n"
  )
  if cine:
    write_nifti(folder / f"{folder.name}_4d.nii.gz", images())
  for frame in (0, 5):
    write_nifti(folder / f"{folder.name}_frame{frame + 1:02d}.nii.gz", images()[frame])
    theirs = np.choose(BEATING[frame], (0, 3, 2, 1)).astype(np.uint8)  # ACDC: RV 1, MYO 2, LV 3
    write_nifti(folder / f"{folder.name}_frame{frame + 1:02d}_gt.nii.gz", theirs)


def check_heart(read):
  """The volumes against counted voxels."""
  measured = dict(zip(schema.PHENOTYPES, read["phenotypes"].tolist()))
  for name, structure, frame in (("LVEDV", "LV", 0), ("LVESV", "LV", 5), ("RVEDV", "RV", 0)):
    assert measured[name] == pytest.approx(
      VOXEL_ML * np.sum(BEATING[frame] == schema.LABELS[structure]), rel=1e-5
    )
  assert measured["LVM"] == pytest.approx(
    1.05 * VOXEL_ML * np.sum(BEATING[0] == schema.LABELS["MYO"]), rel=1e-5
  )
  assert read["has_cmr"] and not read["has_ecg"]
  assert (
    read["ecg"].shape == (12, 5000) and read["ecg"].dtype == np.float32 and not read["ecg"].any()
  )
  assert read["ed_es_volumes"].shape == read["labels"].shape == (2, 12, 64, 64)


def test_acdc(tmp_path):
  patients = {
    "patient001": ("NOR",),
    "patient002": ("MINF", "0.0", "-1"),
    "patient003": ("DCM",),
    "patient004": ("HCM",),
    "patient005": ("RV",),
    "patient006": ("",),
  }
  for name, about in patients.items():
    acdc_patient(tmp_path / "training" / name, *about)
  acdc_patient(tmp_path / "again" / "patient001")
  made = acdc.plan(options(tmp_path / "training", tmp_path / "again"), identify)
  assert made.steps == {"folders of patients": 7, "patients": 6}
  assert [item.private for item in by_name(made)] == [(name,) for name in sorted(patients)]
  assert "training" in str(by_name(made)[0].key)
  np.testing.assert_array_equal(by_name(made)[2].subject, identify("patient003"))
  read = [
    pickle.loads(pickle.dumps(made.read))(pickle.loads(pickle.dumps(item)))
    for item in by_name(made)
  ]
  for one, flags in read:
    check_heart(one)
    assert one["cine_slice"].shape == (25, 64, 64)
    assert not any("patient" in flag for flag in flags)
  assert [known(one) for one, _ in read] == [
    dict.fromkeys(schema.DISEASES, 0),
    {"MI": 1},
    {"CM": 1},
    {"CM": 1},
    {},
    {},
  ]
  assert covariates(read[0][0]) == {"height": 181, "weight": 77} and covariates(read[1][0]) == {}


def test_acdc_without_a_cine_keeps_no_cine_of_anyone(tmp_path):
  acdc_patient(tmp_path / "patient001")
  acdc_patient(tmp_path / "patient002", cine=False)
  made = acdc.plan(options(tmp_path), identify)
  assert made.steps["patients without a _4d file, so no record has a cine_slice"] == 1
  assert made.info["cmr_shape"]["frames"] == 0
  first, second = (made.read(item)[0] for item in made.items)
  assert "cine_slice" not in first
  layouts = [{name: (x.shape, x.dtype) for name, x in one.items()} for one in (first, second)]
  assert layouts[0] == layouts[1]
  check_heart(second)
  shape = cmr.Shape(frames=0)
  # nothing is lost that was not asked for
  assert len(acdc.plan(options(tmp_path, shape=shape), identify).steps) == 2


def test_a_broken_acdc_patient_is_a_bad_record(tmp_path):
  acdc_patient(tmp_path / "patient001")
  (tmp_path / "patient001/patient001_4d.nii.gz").write_bytes(b"no gzip")
  acdc_patient(tmp_path / "patient002")
  (tmp_path / "patient002/Info.cfg").write_text("ES: 99999")
  made = acdc.plan(options(tmp_path), identify)
  for item in made.items:
    with pytest.raises(BadRecord) as caught:
      made.read(item)
    assert "patient0" not in str(caught.value)
  for wrong, words in (
    (tmp_path / "patient001/patient001_4d.nii.gz", "Info.cfg"),
    (tmp_path / "nowhere", "no file or folder"),
  ):
    with pytest.raises(UserError, match=words):
      acdc.plan(options(wrong), identify)


@pytest.mark.skipif(not REAL.exists(), reason="no real images here")
def test_real_acdc_style_heart():
  made = acdc.plan(options(REAL / "cmr/acdc_style"), identify)
  (item,) = made.items
  read, _ = made.read(item)
  measured = dict(zip(schema.PHENOTYPES, read["phenotypes"].tolist()))
  assert measured["LVEDV"] == pytest.approx(161.5, abs=0.1)  # the sum of its slice labels
  assert measured["LVESV"] == pytest.approx(51.4, abs=0.1)
  # its height and weight are placeholders
  assert covariates(read) == {} and "cine_slice" not in read


MNMS_TABLE = "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv"


def mnms_study(root, code, part="Training/Labeled", **cells):
  write_nifti(root / part / code / f"{code}_sa.nii.gz", images())
  marked = np.where(np.isin(np.arange(FRAMES), (0, 5))[:, None, None, None], BEATING, 0).astype(
    np.uint8
  )
  write_nifti(root / part / code / f"{code}_sa_gt.nii.gz", marked)
  return {
    "": 0,
    "External code": code,
    "VendorName": "Siemens",
    "Vendor": "A",
    "Centre": 1,
    "ED": 0,
    "ES": 5,
    "Age": 55,
    "Pathology": "NOR",
    "Sex": "F",
    "Height": 165,
    "Weight": 60,
  } | cells


def test_mnms(tmp_path):
  rows = [
    mnms_study(tmp_path, "B2C3D4"),
    mnms_study(tmp_path, "A1B2C3", "Testing", Pathology="HCM", Sex="M", Height="nan", Age=""),
    mnms_study(tmp_path, "C3D4E5", "Validation", Pathology="LVNC"),
    mnms_study(tmp_path, "D4E5F6", Pathology="IHD"),
    mnms_study(tmp_path, "E5F6G7", Pathology="HHD"),
  ]
  table(tmp_path / MNMS_TABLE, *rows)
  made = mnms.plan(options(tmp_path), identify)
  assert made.steps == {"patients of the table with a cine": 5}
  assert [item.private[0] for item in by_name(made)] == [
    "A1B2C3",
    "B2C3D4",
    "C3D4E5",
    "D4E5F6",
    "E5F6G7",
  ]
  np.testing.assert_array_equal(by_name(made)[0].subject, identify("A1B2C3"))
  read = [
    pickle.loads(pickle.dumps(made.read))(pickle.loads(pickle.dumps(item)))[0]
    for item in by_name(made)
  ]
  for one in read:
    check_heart(one)
    assert one["cine_slice"].shape == (25, 64, 64)
  assert covariates(read[0]) == {"sex": MALE, "weight": 60}
  assert covariates(read[1]) == {"sex": FEMALE, "age": 55, "height": 165, "weight": 60}
  assert [known(one) for one in read] == [
    {"CM": 1},
    dict.fromkeys(schema.DISEASES, 0),
    {"CM": 1},
    {"CAD": 1},
    {},
  ]


def test_mnms_user_errors(tmp_path):
  with pytest.raises(UserError):
    mnms.plan(options(tmp_path), identify)
  (tmp_path / MNMS_TABLE).write_text("External code,ED\nA1B2C3,0\n")
  with pytest.raises(UserError, match="no column"):
    mnms.plan(options(tmp_path), identify)
  row = mnms_study(tmp_path / "elsewhere", "A1B2C3")
  table(tmp_path / MNMS_TABLE, row)
  with pytest.raises(UserError, match="no patient"):
    mnms.plan(options(tmp_path), identify)


def test_the_withdrawn_are_rejected_by_every_source(tmp_path):
  ecg, acdc_folder, mnms_folder = tmp_path / "ecg", tmp_path / "acdc", tmp_path / "mnms"
  path = ptb_xl(ecg, (1, 407, {}), (2, 15, {}), (3, 407, {}), lr=False)
  acdc_patient(acdc_folder / "patient001")
  acdc_patient(acdc_folder / "patient002")
  table(
    mnms_folder / MNMS_TABLE, mnms_study(mnms_folder, "A1B2C3"), mnms_study(mnms_folder, "B2C3D4")
  )
  (tmp_path / "gone").write_text("407\npatient002\nB2C3D4\n")
  for made, kept, rejected in (
    (wfdb.plan(options(ecg, tables=[path], withdrawn=str(tmp_path / "gone")), identify), "15", 2),
    (acdc.plan(options(acdc_folder, withdrawn=str(tmp_path / "gone")), identify), "patient001", 1),
    (mnms.plan(options(mnms_folder, withdrawn=str(tmp_path / "gone")), identify), "A1B2C3", 1),
  ):
    assert [item.private[0] for item in made.items] == [kept] and len(made.rejected) == rejected
    assert {reason for _, reason in made.rejected} == {"the participant has withdrawn"}


@pytest.mark.parametrize(
  "read, name",
  [
    (ukb_ecg_xml.read, "a.xml"),
    (nifti.read, "a.nii.gz"),
    (ukb_cmr_dicom.read, "a.zip"),
    (mmcl_pt.load, "a.pt"),
    (dicom_ecg.read, "a.dcm"),
    (wfdb_files.read, "a.hea"),
  ],
)
def test_a_failing_disk_says_nothing_of_a_file(tmp_path, monkeypatch, read, name):
  """Nobody may be left out for good because a disk or a network failed once."""
  (tmp_path / name).write_bytes(b"\x1f\x8bgarbage")
  with pytest.raises(BadRecord):
    read(tmp_path / name)

  def fail(*args, **kwargs):
    raise OSError(errno.EIO, "Input/output error")

  for module, function in ((os, "lstat"), (builtins, "open")):
    if (name, function) == ("a.zip", "open"):  # which opens by another way
      continue
    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
      patch.setattr(module, function, fail)
      read(tmp_path / name)
    assert error.value.errno == errno.EIO


def test_a_folder_that_cannot_be_listed_ends_the_run(tmp_path, monkeypatch):
  (tmp_path / "10").mkdir()
  monkeypatch.setattr(
    os,
    "scandir",
    lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error", str(path))),
  )
  with pytest.raises(UserError, match="--input: cannot read .* \\(Input/output error\\)"):
    list(files.walk([tmp_path]))
