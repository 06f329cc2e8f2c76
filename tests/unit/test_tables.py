"""Tables of participants: fields, styles of columns, dates, diseases, plausibility, withdrawals;
expected by hand."""

import contextlib
import csv
import datetime
import errno
import gzip
import json
import os
import re
import types

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings, strategies as st

from mmcl_jax.data import schema, ukb_fields as ukb, units
from mmcl_jax.data.preprocess import cmr as preprocess_cmr
from mmcl_jax.data.readers import columns, tables
from mmcl_jax.data.sources import ukb as source
from mmcl_jax.errors import UserError

STYLES = {  # eid, column of a field with instances, of a field with arrays
  "24100-2.0": ("eid", "{f}-{i}.0", "{f}-0.{a}"),
  "f.24100.2.0": ("f.eid", "f.{f}.{i}.0", "f.{f}.0.{a}"),
  "p24100_i2": ("participant.eid", "p{f}_i{i}", "p{f}_a{a}"),
  "name_f24100_2_0": ("eid", "some_long_name_f{f}_{i}_0", "some_name_f{f}_0_{a}"),
}
# participant -> {(field, instance): cell, (field, "a", array): cell}
PEOPLE = {
  "DEMO0001": {
    (31, 0): "1",
    (34, 0): "1950",
    (52, 0): "6",
    (53, 2): "2015-06-16",
    (53, 3): "2019-06-16",
    (21003, 2): "65",
    (50, 2): "180.5",
    (12144, 2): "181",
    (12143, 2): "80.5",
    (24100, 2): "150.5",
    (24101, 2): "60.25",
    (24103, 2): "59.97",
    (24157, 2): "-22.3",
    (24100, 3): "140",
    (24140, 2): "5.7",
    (41270, "a", 0): "I259",
    (41280, "a", 0): "2014-01-01",
    (41270, "a", 1): "I48.0",
    (41280, "a", 1): "2015-06-16",
    (41270, "a", 2): "I500",
    (41280, "a", 2): "2015-06-17",
    (40001, 0): "I219",
    (40000, 0): "2020-06-16",
  },
  "DEMO0002": {
    (31, 0): "0",
    (53, 2): "2016-01-01",
    (21003, 2): "50",
    (21002, 2): "60",
    (24100, 2): "120",
    (41270, "a", 0): "E119",
    (41280, "a", 0): "2021-01-01",
  },
  "DEMO0003": {(31, 0): "0", (53, 2): "2016-01-01", (24101, 2): "40", (50, 2): "-1"},
}
CODES = ukb.disease_codes()


def cells_of(style):
  """({column: cells}, in the order of PEOPLE) in one of the four styles."""
  eid, single, array = STYLES[style]
  keys = sorted({key for person in PEOPLE.values() for key in person}, key=str)
  names = [
    array.format(f=key[0], a=key[2]) if key[1] == "a" else single.format(f=key[0], i=key[1])
    for key in keys
  ]
  # RAP leaves the only instance out
  names = [re.sub(r"(p(?:31|34|52))_i0", r"\1", name) for name in names]
  return {eid: list(PEOPLE)} | {
    name: [person.get(key, "") for person in PEOPLE.values()] for name, key in zip(names, keys)
  }


def write(path, cells, delimiter=","):
  with open(path, "w", newline="") as file:
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(cells)
    writer.writerows(zip(*cells.values()))
  return path


def one(tmp_path, name="x.csv", **cells):
  """A table of UK Biobank; cells by column, p24100_i2 and the like."""
  return write(tmp_path / name, cells)


def same(a, b):
  """Whatever the order of rows."""
  assert a.rows.keys() == b.rows.keys() and a.people.keys() == b.people.keys()
  for name in ("phenotypes", "problems", "rejected", "given", "dated", "censored"):
    assert getattr(a, name) == getattr(b, name)
  for key in a.rows:
    for mine, other in zip(tables.measured(a, *key), tables.measured(b, *key)):
      np.testing.assert_array_equal(mine, other)
    assert str(a.dates[a.rows[key]]) == str(b.dates[b.rows[key]])
  for name in a.people:
    assert tables.events(a, name) == tables.events(b, name)
    for column in ("deaths", "diagnosed"):
      assert str(getattr(a, column)[a.people[name]]) == str(getattr(b, column)[b.people[name]])


def test_the_82_fields():
  assert (
    list(ukb.CARDIAC) == list(range(24100, 24182))
    and len({x.name for x in ukb.CARDIAC.values()}) == 82
  )
  for field, name, unit in (
    (24100, "LVEDV", "ml"),
    (24103, "LVEF", "%"),
    (24104, "LVCO", "l/min"),
    (24105, "LVM", "g"),
    (24106, "RVEDV", "ml"),
    (24109, "RVEF", "%"),
    (24110, "LAVmax", "ml"),
    (24113, "LAEF", "%"),
    (24117, "RAEF", "%"),
    (24118, "AAo_max_area", "mm2"),
    (24120, "AAo_distensibility", "1e-3/mmHg"),
    (24123, "DAo_distensibility", "1e-3/mmHg"),
    (24124, "WT_1", "mm"),
    (24139, "WT_16", "mm"),
    (24140, "WT", "mm"),
    (24141, "Ecc_1", "%"),
    (24157, "Ecc", "%"),
    (24158, "Err_1", "%"),
    (24174, "Err", "%"),
    (24175, "Ell_1", "%"),
    (24180, "Ell_6", "%"),
    (24181, "Ell", "%"),
  ):
    assert ukb.CARDIAC[field][:2] == (name, unit)
  units = {field.name: field.unit for field in ukb.CARDIAC.values()}
  assert schema.PHENOTYPES.items() <= units.items()
  limits = {field.name: (field.low, field.high) for field in ukb.CARDIAC.values()}
  for name, (mean, sd) in ukb.POPULATION.items():
    assert (
      limits[name][0] < mean - 3 * np.nan_to_num(sd)
      and mean + 3 * np.nan_to_num(sd) < limits[name][1]
    )


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_columns_reads_the_same(tmp_path, style):
  table = tables.load([write(tmp_path / "x.csv", cells_of(style))])
  assert table.phenotypes == {"LVEDV": "ml", "LVESV": "ml", "LVEF": "%", "WT": "mm", "Ecc": "%"}
  phenotypes, covariates = tables.measured(table, "DEMO0001", 2)
  np.testing.assert_array_equal(phenotypes, np.float32([150.5, 60.25, 59.97, 5.7, -22.3]))
  # 12143 only where 21002 lacks
  np.testing.assert_array_equal(covariates, np.float32([1, 65, 180.5, 80.5]))
  phenotypes, covariates = tables.measured(table, "DEMO0001", 3)
  np.testing.assert_array_equal(phenotypes, np.float32([140, *[np.nan] * 4]))
  # born in mid-June 1950
  assert abs(covariates[1] - 69) < 0.05 and covariates[0] == 1 and np.isnan(covariates[2:]).all()
  np.testing.assert_array_equal(
    tables.measured(table, "DEMO0002", 2)[1], np.float32([0, 50, np.nan, 60])
  )
  assert tables.events(table, "DEMO0001") == [
    ("I259", datetime.date(2014, 1, 1)),
    ("I480", datetime.date(2015, 6, 16)),
    ("I500", datetime.date(2015, 6, 17)),
    ("I219", datetime.date(2020, 6, 16)),
  ]
  assert not table.rejected and table.censored == np.datetime64("2021-01-01")
  assert table.problems == {"age: missing, taken from month of birth and date of visit": 1}
  # -1 is "do not know", and no problem
  assert np.isnan(tables.measured(table, "DEMO0003", 2)[1][2])
  for participant, visit in (("DEMO0002", 3), ("DEMO0009", 2)):
    assert np.isnan(tables.measured(table, participant, visit)[0]).all()


@pytest.mark.reported("tables in gzip, in UTF-16 or with semicolons were not read")
def test_formats_and_files_read_the_same(tmp_path):
  cells = cells_of("24100-2.0")
  csv_file = write(tmp_path / "x.csv", cells)
  expected = tables.load([csv_file])
  same(tables.load([write(tmp_path / "x.tsv", cells, "\t")]), expected)
  # a byte order mark
  (tmp_path / "windows.csv").write_bytes(b"\xef\xbb\xbf" + csv_file.read_bytes())
  same(tables.load([tmp_path / "windows.csv"]), expected)
  for name, data in (
    ("x.tab.gz", gzip.compress((tmp_path / "x.tsv").read_bytes())),
    ("utf16.txt", csv_file.read_text().encode("utf-16")),
    ("semicolons.csv", write(tmp_path / "y.csv", cells, ";").read_bytes()),
  ):
    (tmp_path / name).write_bytes(data)
    same(tables.load([tmp_path / name]), expected)
  typed = pd.read_csv(csv_file)  # floats, objects and dates, as pandas guesses them
  typed["53-2.0"] = pd.to_datetime(typed["53-2.0"])
  typed["40001-0.0"] = typed["40001-0.0"].astype("category")
  typed.to_parquet(tmp_path / "x.parquet")
  same(tables.load([tmp_path / "x.parquet"]), expected)
  groups = [
    [name for name in cells if re.match(group, name)]
    for group in ("41|40", "241|31", "(?!41|40|241|31)[0-9]")
  ]
  parts = [
    write(tmp_path / f"{k}.csv", {name: cells[name][::step] for name in ["eid", *groups[k]]})
    for k, step in enumerate((1, -1, 1))
  ]
  same(tables.load(parts), expected)
  apart = [
    write(tmp_path / "codes.csv", {name: cells[name] for name in ("eid", "41270-0.0")}),
    write(tmp_path / "dates.csv", {name: cells[name] for name in ("eid", "41280-0.0")}),
  ]
  with pytest.raises(
    UserError, match="codes.csv has field 41270 and another table its dates, 41280"
  ):
    tables.load(apart)


def test_text_values_of_the_research_analysis_platform(tmp_path):
  coded = one(
    tmp_path,
    "a.csv",
    eid=["1", "2"],
    p31=["1", "0"],
    p52=["11", "5"],
    p34=["1950", "1960"],
    p53_i2=["2015-11-15"] * 2,
    p50_i2=["", "170"],
    p41270_a0=["I10", "E119"],
    p41270_a1=["I480", ""],
    p41280_a0=["2010-01-02", "2011-01-02"],
    p41280_a1=["2012-01-02", ""],
  )
  for name, listed in (
    ("json", ['["I10","I48.0"]', '["E119"]']),
    ("pipes", ["I10|I48.0", "E11.9"]),
    ("single", ["['I10', 'I480']", "['E119']"]),
    (
      "meaning",
      [
        "I10 Essential (primary) hypertension|I48.0 Paroxysmal atrial fibrillation",
        "E11.9 Without complications",
      ],
    ),
  ):
    text = one(
      tmp_path,
      f"{name}.csv",
      eid=[" 1 ", "2.0"],
      p31=["Male", "Female"],
      p52=["November", "May"],
      p34=["1950", "1960"],
      p53_i2=["2015-11-15", "2015-11-15T09:30:00"],
      p50_i2=["Prefer not to answer", " 170.0 "],
      p41270=listed,
      p41280_a0=["2010-01-02", "2011-01-02"],
      p41280_a1=["2012-01-02", ""],
    )
    same(tables.load([text]), tables.load([coded]))
  lists = pa.table({"eid": [1, 2], "p41270": [["I10", "I48.0"], ["E119"]]})
  pa.parquet.write_table(lists, tmp_path / "x.parquet")
  assert [code for code, _ in tables.events(tables.load([tmp_path / "x.parquet"]), "1")] == [
    "I10",
    "I480",
  ]


def test_diseases_by_date(tmp_path):
  table = tables.load([write(tmp_path / "x.csv", cells_of("24100-2.0"))])

  def read(mode, participant="DEMO0001", visit=2):
    return dict(zip(CODES, tables.diseases(table, participant, visit, CODES, mode).tolist()))

  assert {name for name, x in read("any").items() if x} == {"CAD", "AF", "HF", "MI"}
  # AF on the day of the visit
  assert {name for name, x in read("prevalent").items() if x} == {"CAD", "AF"}
  incident = read("incident")
  assert np.isnan([incident.pop("CAD"), incident.pop("AF")]).all()
  assert {name for name, x in incident.items() if x} == {"HF", "MI"} and set(incident.values()) == {
    0,
    1,
  }
  assert read("prevalent", visit=3)["HF"] == 1 and read("prevalent", visit=3)["MI"] == 0
  assert read("any", "DEMO0002") == {name: float(name == "DM") for name in CODES}
  assert set(read("any", "DEMO0003").values()) == {0}  # in the table of diagnoses, and without any
  assert np.isnan(list(read("any", "DEMO0009").values())).all()
  years = dict(zip(CODES, tables.event_years(table, "DEMO0001", 2, CODES)))
  assert (
    years["AF"] == 0
    and abs(years["HF"] - 1 / 365.25) < 1e-7
    and years["CAD"] == np.float32(-531 / 365.25)
  )
  assert abs(years["MI"] - 5) < 0.01 and np.isnan(years["DM"])
  assert tables.followed_years(table, "DEMO0001", 2) == pytest.approx(1827 / 365.25)  # to death
  # to the last diagnosis of anybody
  assert tables.followed_years(table, "DEMO0002", 2) == pytest.approx(1827 / 365.25)
  assert np.isnan(tables.followed_years(table, "DEMO0009", 2))


def test_nothing_counts_after_the_end_of_follow_up(tmp_path):
  file = write(tmp_path / "x.csv", cells_of("24100-2.0"))
  table = tables.load([file], censored="2015-06-16")
  assert [code for code, _ in tables.events(table, "DEMO0001")] == ["I259", "I480"] and np.isnat(
    table.deaths
  ).all()
  assert tables.followed_years(table, "DEMO0001", 2) == 0
  assert tables.diseases(table, "DEMO0002", 2, CODES).max() == 0
  with pytest.raises(UserError, match="YYYY-MM-DD"):
    tables.load([file], censored="16/06/2015")


def test_what_a_missing_date_leaves_open_is_unknown(tmp_path):
  table = tables.load(
    [
      one(
        tmp_path,
        eid=["A", "B", "C", "D"],
        p53_i2=["2015-01-01", "2015-01-01", "", "2015-01-01"],
        p24100_i2=["100"] * 4,
        p41270_a0=["I48", "I48", "I48", ""],
        p41280_a0=["", "", "2014-01-01", ""],
        p41270_a1=["", "I48", "", ""],
        p41280_a1=["", "2014-01-01", "", ""],
      )
    ]
  )
  af = {"AF": CODES["AF"]}
  found = {
    mode: [tables.diseases(table, p, 2, af, mode)[0] for p in "ABCD"] for mode in tables.MODES
  }
  np.testing.assert_array_equal(found["any"], [1, 1, 1, 0])
  np.testing.assert_array_equal(found["prevalent"], [np.nan, 1, np.nan, 0])
  # the last date of all is before every visit
  np.testing.assert_array_equal(found["incident"], [np.nan] * 4)
  assert np.isnan([tables.event_years(table, p, 2, af)[0] for p in "ABCD"]).all()
  undated = tables.load([one(tmp_path, eid=["A"], p24100_i2=["100"], p41270=["I48"])])
  assert tables.diseases(undated, "A", 2, af)[0] == 1 and not undated.dated
  with pytest.raises(UserError, match="41280"):
    tables.diseases(undated, "A", 2, af, "incident")
  with pytest.raises(UserError, match="any, prevalent, incident"):
    tables.diseases(undated, "A", 2, af, "past")
  # no table of diagnoses: nobody is known to be well
  without = tables.load([one(tmp_path, eid=["A"], p24100_i2=["100"])])
  assert np.isnan(tables.diseases(without, "A", 2, CODES)).all()


@pytest.mark.parametrize(
  "code, expected",
  (
    ("I259", {"CAD"}),
    ("I25.9", {"CAD"}),
    ("I21", {"CAD", "MI"}),
    ("I229", {"CAD", "MI"}),
    ("I23.0", {"CAD"}),
    ("I200", {"CAD"}),
    ("I26", set()),
    ("I199", set()),
    ("I48", {"AF"}),
    ("I489", {"AF"}),
    ("I500", {"HF"}),
    ("I42X", {"CM"}),
    ("I46.9", {"SCD"}),
    ("I472", {"SCD"}),
    ("I45", set()),
    ("I517", {"LVH"}),
    ("I51.7", {"LVH"}),
    ("I51", set()),
    ("I518", set()),
    ("I270", {"PH"}),
    ("I301", {"pericarditis"}),
    ("I32", {"pericarditis"}),
    ("I33", set()),
    ("E10", {"DM"}),
    ("E149", {"DM"}),
    ("E15", set()),
    ("I10", {"hypertension"}),
    ("I159", {"hypertension"}),
    ("I60", {"stroke"}),
    ("I64", {"stroke"}),
    ("I65", set()),
    ("I350", {"valve"}),
    ("I05", {"valve"}),
    ("I09", set()),
    ("M2551", set()),
  ),
)
def test_code_lists(tmp_path, code, expected):
  table = tables.load([one(tmp_path, eid=["A"], p41270_a0=[code])])
  assert {name for name, x in zip(CODES, tables.diseases(table, "A", 2, CODES)) if x} == expected
  assert not table.problems


def test_lists_of_a_users_own(tmp_path):
  assert list(CODES)[:8] == list(schema.DISEASES)
  own = tmp_path / "own.toml"
  own.write_text('[AV-block]\ncodes = ["I44.2", "I45-I46"]\n')
  assert ukb.disease_codes(own) == {"AV-block": (("I442", "I442"), ("I45", "I46"))}
  for text, match in (
    ("", "lists no disease"),
    ("[A", "not a list"),
    ("A = 1", "no codes"),
    ("[A]\ncodes = []", "no codes"),
    ('[A]\ncodes = ["48"]', "code '48'"),
    ('[A]\ncodes = ["I50-I48"]', "I50-I48"),
    ("[A]\ncodes = [48]", "48"),
    ('[A]\ncodes = ["I48-J10"]', "I48-J10"),
    ('[A]\ncodes = ["I48.0-I48.2"]', "I48.0"),
    ("[A]\ncodes = 'I48'", "no codes"),
  ):
    own.write_text(text)
    with pytest.raises(UserError, match=match):
      ukb.disease_codes(own)
  with pytest.raises(UserError, match="no such file|No such file"):
    ukb.disease_codes(tmp_path / "absent.toml")


def test_what_cannot_be_is_dropped_and_counted(tmp_path):
  table = tables.load(
    [
      one(
        tmp_path,
        eid=list("ABCDEFG"),
        p31=["1", "2", "x", "", "-3", "0", "1"],
        p24103_i2=["101", "60", "0.6", "", "NA", "nan", "sixty"],
        p24100_i2=["100", "-5", "150", "90", "inf", "1e9", "150"],
        p24101_i2=["120", "40", "", "90", "30", "30", "150"],
        p53_i2=[
          "2015-01-01",
          "1900-01-01",
          "2037-07-07",
          "01/02/2015",
          "2015-13-01",
          "2015-02-30",
          "",
        ],
        p50_i2=["1.80", "180", "-1", "", "tall", "251", "50"],
        p21003_i2=["-3", "121", "60", "", "", "", "0"],
        p41270=["I48|I4", "i48", "[1, 2", '[["I48"]]', "I48.0.1", "48I", "I2510|Z"],
      )
    ]
  )
  lvedv, lvesv, lvef = (
    table.phenotype_values[:, list(table.phenotypes).index(name)]
    for name in ("LVEDV", "LVESV", "LVEF")
  )
  nan = np.nan
  np.testing.assert_array_equal(lvedv, np.float32([nan, nan, 150, 90, nan, nan, 150]))
  np.testing.assert_array_equal(lvesv, np.float32([nan, 40, nan, 90, 30, 30, 150]))
  np.testing.assert_array_equal(lvef, np.float32([nan, 60, nan, nan, nan, nan, nan]))
  np.testing.assert_array_equal(table.sex, np.float32([1, nan, nan, nan, nan, 0, 1]))
  np.testing.assert_array_equal(table.body[:, 1], np.float32([nan, 180, nan, nan, nan, nan, 50]))
  np.testing.assert_array_equal(table.body[:, 0], np.float32([nan, nan, 60, nan, nan, nan, 0]))
  assert (~np.isnat(table.dates)).tolist() == [True] + [False] * 6
  assert table.codes.tolist() == ["I48", "I251"]
  assert table.problems == {
    "41270: not an ICD-10 code": 7,
    "LVEDV below LVESV, both left out": 2,
    "LVEDV: not a number": 1,
    "LVEDV: outside 1 to 800 ml": 2,
    "LVEF: not a number": 1,
    "LVEF: outside 1 to 99 %": 2,
    "age: outside 0 to 120 years": 1,
    "date of visit: not a date from 1930-01-01 to 2036-12-31": 5,
    "height: not a number": 1,
    "height: outside 50 to 250 cm": 2,
    "sex: neither 0 nor 1": 1,
    "sex: not a number": 1,
  }


def test_rows_of_one_participant(tmp_path):
  file = one(
    tmp_path,
    eid=["A", "B", "A", "C", "B", "C", " A"],
    p24100_i2=["100", "90", "100.0", "", "91", "80", ""],
    p31=["1", "0", "", "1", "0", "1", "1"],
    p41270=["I48", "I48", "I10", "", "", "I50", ""],
    p24101_i2=["", "", "40", "", "", "", ""],
  )
  table = tables.load([file])
  assert (
    table.rejected == {"B": tables.DISAGREE}
    and set(table.people) == {"A", "C"}
    and set(table.rows) == {("A", 2), ("C", 2)}
  )
  np.testing.assert_array_equal(tables.measured(table, "A", 2)[0], np.float32([100, 40]))
  assert {code for code, _ in tables.events(table, "A")} == {"I48", "I10"} and tables.events(
    table, "B"
  ) == []
  assert (
    np.isnan(tables.measured(table, "B", 2)[1]).all()
    and np.isnan(tables.diseases(table, "B", 2, CODES)).all()
  )
  other = one(tmp_path, "y.csv", eid=["C"], p31=["0"])  # another file says another sex
  assert set(tables.load([file, other]).rejected) == {"B", "C"}


def test_only_participants_asked_for_are_kept(tmp_path):
  ids = [f"DEMO{i:04}" for i in range(500)]
  file = one(tmp_path, eid=ids, p24100_i2=[str(50 + i) for i in range(500)], p41270=["I48"] * 500)
  table = tables.load([file], participants={" DEMO0007 ", "DEMO0300", "DEMO9999"})
  assert (
    set(table.people) == {"DEMO0007", "DEMO0300"}
    and len(table.sex) == len(table.phenotype_values) == len(table.codes) == 2
  )
  assert tables.measured(table, "DEMO0300", 2)[0] == [350]


def test_batches_join(tmp_path, monkeypatch):
  """Rows, people and diagnoses over many batches are those of one."""
  rng = np.random.default_rng(0)
  n = 400
  cells = {
    "eid": [str(i // 2) for i in range(n)],
    "p24100_i2": [f"{100 + i // 2 % 7}" if rng.random() < 0.6 else "" for i in range(n)],
    "p24100_i3": [f"{120 + i // 2 % 5}" if rng.random() < 0.1 else "" for i in range(n)],
    "p41270_a0": [f"I{20 + i % 30}" for i in range(n)],
    "p41280_a0": [f"20{10 + i % 9}-01-02" for i in range(n)],
  }
  csv_file = write(tmp_path / "x.csv", cells)
  pd.DataFrame(cells).to_parquet(tmp_path / "x.parquet")
  whole = tables.load([csv_file])
  monkeypatch.setattr(columns, "BLOCK_BYTES", 512)
  monkeypatch.setattr(columns, "BATCH_CELLS", 35)
  for file in (csv_file, tmp_path / "x.parquet"):
    same(tables.load([file]), whole)
  assert len(whole.codes) == n and len(whole.people) == n // 2 and not whole.rejected
  assert tables.events(whole, "5") == sorted(
    ((cells["p41270_a0"][i], datetime.date.fromisoformat(cells["p41280_a0"][i])) for i in (10, 11)),
    key=lambda x: x[1],
  )


def test_visits(tmp_path):
  file = one(tmp_path, eid=["A"], p24100_i0=["1e2"], p24100_i2=["110"], p24100_i3=["120"])
  assert set(tables.load([file]).rows) == {("A", 2), ("A", 3)}
  assert set(tables.load([file], visits=(0, 2)).rows) == {("A", 0), ("A", 2)}


def test_the_general_form(tmp_path):
  file = write(
    tmp_path / "x.csv",
    {
      "participant": ["DEMO0001", "DEMO0001", "DEMO0002"],
      "visit": ["0", "1", "0"],
      "sex": ["female", "", "M"],
      "age": ["40", "41", "50"],
      "height": ["170", "", ""],
      "weight": ["70", "71", ""],
      "phenotype:LVEDV:ml": ["120", "-1", "130"],
      "phenotype:T1:ms": ["950", "", "-3"],
      "disease:amyloid": ["0", "1", "2"],
      "remark": ["x", "y", "z"],
    },
  )
  table = tables.load([file])
  assert table.phenotypes == {"LVEDV": "ml", "T1": "ms"} and table.given == ("amyloid",)
  np.testing.assert_array_equal(tables.measured(table, "DEMO0001", 1)[0], [np.nan, np.nan])
  # sex is the person's
  np.testing.assert_array_equal(
    tables.measured(table, "DEMO0001", 1)[1], np.float32([0, 41, np.nan, 71])
  )
  # negative numbers may be phenotypes
  np.testing.assert_array_equal(tables.measured(table, "DEMO0002", 0)[0], [130, -3])
  codes = {"AF": CODES["AF"]} | dict.fromkeys(table.given, ())
  np.testing.assert_array_equal(
    [
      tables.diseases(table, p, v, codes)
      for p, v in (("DEMO0001", 0), ("DEMO0001", 1), ("DEMO0002", 0))
    ],
    [[np.nan, 0], [np.nan, 1], [np.nan, np.nan]],
  )
  assert table.problems == {"LVEDV: outside 1 to 800 ml": 1, "amyloid: neither 0 nor 1": 1}
  assert set(tables.load([file], visits=[1]).rows) == {("DEMO0001", 1)}
  with pytest.raises(UserError, match="dates of diagnoses"):
    tables.diseases(table, "DEMO0001", 0, codes, "prevalent")
  plain = tables.load([write(tmp_path / "y.csv", {"participant": ["A"], "age": ["3"]})])
  assert plain.rows == {("A", 0): 0}
  odd = tables.load(
    [
      write(
        tmp_path / "z.csv",
        {"participant": ["A", "B", "C"], "visit": ["1.5", "-1", "2.0"], "age": ["3"] * 3},
      )
    ]
  )
  assert set(odd.rows) == {("C", 2)} and sum(odd.problems.values()) == 2
  write(tmp_path / "other.csv", {"participant": ["A"], "phenotype:T1:s": ["1"]})
  with pytest.raises(UserError, match="two units"):
    tables.load([file, tmp_path / "other.csv"])
  with pytest.raises(UserError, match="not in form"):
    tables.load([write(tmp_path / "y.csv", {"participant": ["A"], "phenotype:T1": ["3"]})])


def general(tmp_path, name="x.csv", delimiter=",", **columns):
  """A table of the general form; __ in a column's name stands for a colon."""
  cells = {column.replace("__", ":"): values for column, values in columns.items()}
  count = len(next(iter(cells.values())))
  return write(
    tmp_path / name, {"participant": [f"P{i}" for i in range(count)], **cells}, delimiter
  )


@pytest.mark.reported("a capital letter in a unit switched the limits of plausible values off")
@pytest.mark.parametrize(
  "name, cells, stored",
  [
    ("LVEDV:mL", ["150", "9999", "-9"], 150),
    ("LVEDV:ML", ["150", "9999", "-9"], 150),
    ("lvedv: ml ", ["150", "9999", "-9"], 150),
    ("LVEDV:L", ["0.15", "9.999", "-9"], 150),
    ("LVM:G", ["90", "9999", "-9"], 90),
    ("LVM:kg", ["0.09", "9.999", "-9"], 90),
    ("LVEF:fraction", ["0.6", "9.99", "-9"], 60),
    ("AAo_max_area:cm\u00b2", ["7", "9999", "-9"], 700),
    ("WT:CM", ["0.9", "99", "-9"], 9),
    ("LVCO:ml/min", ["5000", "99999", "-9"], 5),
  ],
)
def test_units_of_known_names_are_read_in_any_spelling(tmp_path, name, cells, stored):
  table = tables.load(
    [write(tmp_path / "x.csv", {"participant": ["A", "B", "C"], f"phenotype:{name}": cells})]
  )
  known, unit = {x.name.lower(): (x.name, x.unit) for x in ukb.CARDIAC.values()}[
    name.split(":")[0].lower()
  ]
  assert table.phenotypes == {known: unit}
  np.testing.assert_allclose(table.phenotype_values[:, 0], [stored, np.nan, np.nan], rtol=1e-6)
  assert sum(table.problems.values()) == 2


@pytest.mark.parametrize("unit", ["", "mmol", "ml/m2", "mm"])
def test_a_unit_that_is_not_known_for_a_name_is_refused(tmp_path, unit):
  with pytest.raises(UserError, match=f"gives LVEDV in '{unit}'.*expected ml"):
    tables.load([general(tmp_path, **{f"phenotype__LVEDV__{unit}": ["150"]})])


def test_units_of_other_names_are_spelled_alike_and_a_name_has_one(tmp_path):
  assert tables.load(
    [general(tmp_path, phenotype__fat__mL=["3"], phenotype__T1__MS=["900"])]
  ).phenotypes == {"T1": "ms", "fat": "ml"}
  with pytest.raises(UserError, match="two columns for the same thing"):
    tables.load([general(tmp_path, phenotype__LVEDV__mL=["150"], phenotype__LVEDV__ml=["150"])])


def test_factors_between_units_are_exact():
  for unit, to, factor in (
    ("l", "ml", 1000),
    ("mL", "ML", 1),
    ("kg", "g", 1000),
    ("cm", "mm", 10),
    ("cm^2", "mm2", 100),
    ("1", "%", 100),
    ("l/min", "ml/min", 1000),
    ("1/min", "bpm", 1),
    ("ml", "l", 0.001),
    ("ml", "g", None),
    ("ml/m2", "ml", None),
    ("x", "y", None),
  ):
    assert units.factor(unit, to) == factor, (unit, to)
  assert units.spelled(" mmHG ") == "mmHg" and units.spelled("Wood") == "Wood"


@pytest.mark.reported("True and False in a column of a disease cost all its labels, without a word")
@pytest.mark.parametrize(
  "yes, no",
  [
    ("True", "False"),
    ("TRUE", "FALSE"),
    ("yes", "no"),
    ("Y", "n"),
    ("t", "F"),
    ("1", "0"),
    ("1.0", "0.0"),
  ],
)
def test_a_disease_may_be_in_words(tmp_path, yes, no):
  table = tables.load([general(tmp_path, disease__AF=[yes, no, "", yes, no])])
  # a row without anything is none
  np.testing.assert_array_equal(table.given_values[:, 0], [1, 0, 1, 0])
  assert not table.problems


def test_a_disease_may_be_boolean_in_parquet(tmp_path):
  frame = pd.DataFrame(
    {
      "participant": list("ABC"),
      "disease:AF": pd.array([True, False, None], "boolean"),
      "age": [50, 60, 70],
    }
  )
  frame.to_parquet(tmp_path / "x.parquet")
  np.testing.assert_array_equal(
    tables.load([tmp_path / "x.parquet"]).given_values[:, 0], [1, 0, np.nan]
  )


@pytest.mark.reported("a column with decimal commas was lost as a whole, with exit status 0")
def test_decimal_commas(tmp_path):
  file = general(
    tmp_path,
    delimiter=";",
    phenotype__LVEDV__ml=["140,5", "150", " 160,25 ", "1.5"],
    age=["50,5", "", "60", "1,2,3"],
  )
  table = tables.load([file])
  np.testing.assert_array_equal(table.phenotype_values[:, 0], [140.5, 150, 160.25, 1.5])
  np.testing.assert_array_equal(table.body[:, 0], [50.5, np.nan, 60, np.nan])
  for delimiter in "\t,":  # where it may be a mark of thousands
    with pytest.raises(
      UserError,
      match="3 of the 3 filled cells of the column 'phenotype:LVEDV:ml'.*'999,9'.*decimal sign",
    ):
      tables.load(
        [
          general(
            tmp_path,
            delimiter=delimiter,
            phenotype__LVEDV__ml=["140,5", "150,2", "160,1", ""],
            age=["50"] * 4,
          )
        ]
      )


@pytest.mark.reported("a column with decimal commas lost all but its whole numbers")
def test_decimal_commas_among_whole_numbers(tmp_path):
  cells = ["140,5", "150", "?", "160,2", "170", "180", "155,5", "145"]
  with pytest.raises(
    UserError,
    match="4 of the 8 filled cells of the column 'phenotype:LVEDV:ml'.*'999,9'.*decimal sign",
  ):
    tables.load([general(tmp_path, phenotype__LVEDV__ml=cells)])


@pytest.mark.reported(
  "of a sex or disease coded as 1 and 2 each 2 was dropped, and each 1 taken for male or diseased"
)
@pytest.mark.parametrize(
  "column, cells",
  [
    ("sex", ["1", "2"] * 5),
    ("sex", ["2"] * 6 + ["1"] * 4),
    ("sex", ["M", "H"] * 5),
    ("sex", ["0", *["1", "2"] * 5]),
    ("disease__AF", ["1"] * 7 + ["2"] * 3),
  ],
)
def test_another_coding_of_two_classes_stops(tmp_path, column, cells):
  with pytest.raises(
    UserError, match="neither 0 nor 1, and [01] are 0.*coded in another way.*expected 1 or 0"
  ):
    tables.load([general(tmp_path, **{column: cells}, age=["60"] * len(cells))])


def test_some_cells_beside_0_and_1_are_dropped(tmp_path):
  cells = ["0"] * 5 + ["1"] * 5 + ["2", "3", "unknown"]
  table = tables.load([general(tmp_path, disease__AF=cells, sex=["1"] * 13)])
  # a row without anything is none
  np.testing.assert_array_equal(table.given_values[:, 0], [0] * 5 + [1] * 5)


@pytest.mark.reported("columns of the general form in capitals, or after a blank, were passed over")
def test_columns_of_the_general_form_in_any_case(tmp_path):
  table = tables.load(
    [
      write(
        tmp_path / "x.csv",
        {
          " Participant": ["A", "A"],
          "Visit": ["1", "2"],
          "SEX": ["1", "1"],
          " Age ": ["60", "62"],
          "Phenotype:lvedv:L": ["0.15", "0.14"],
          "Disease: AF": ["0", "1"],
        },
      )
    ]
  )
  assert (
    table.rows == {("A", 1): 0, ("A", 2): 1}
    and table.phenotypes == {"LVEDV": "ml"}
    and table.given == ("AF",)
  )
  np.testing.assert_allclose(table.phenotype_values[:, 0], [150, 140])
  np.testing.assert_array_equal(table.given_values[:, 0], [0, 1])
  np.testing.assert_array_equal(table.body[:, 0], [60, 62])
  assert table.sex.tolist() == [1]


@pytest.mark.reported("a column that could not be read was one line of a count")
@pytest.mark.parametrize(
  "column, cells, words",
  [
    ("disease:AF", ["pos", "neg", "pos"], "3 of the 3 .*'pos'.*expected 1 or 0, yes or no"),
    ("disease:AF", ["1", "2", "2"], None),
    ("disease:AF", ["2"] * 9 + ["1"], "9 of the 10 .*'9'"),
    ("phenotype:LVEF:%", ["60 %"] * 3, "'99 %'.*expected numbers"),
    ("phenotype:T1:ms", ["x" * 99] * 3, "'x{20}' "),
    ("age", ["50y", "60y", "70y"], "'99y'"),
    ("sex", ["w", "w", "m"], None),
    ("sex", ["Frau", "Mann", "Frau"], "expected 1 or 0, male or female"),
    ("visit", ["baseline"] * 3, "'baseline'.*small whole number"),
    (
      "height",
      ["1.75", "1.80", "1.68"],
      "values of height .* outside 50 to 250 cm; their median is 1.75",
    ),
    ("height", ["-1", "-3", "-1"], None),
    ("phenotype:LVEDV:ml", ["0.15", "0.16", "0.14"], "outside 1 to 800 ml; .* 0.15: are they in"),
  ],
)
def test_a_column_that_is_lost_as_a_whole_stops(tmp_path, column, cells, words):
  file = write(
    tmp_path / "x.csv",
    {
      "participant": [f"DEMO{i}" for i in range(len(cells))],
      column: cells,
      "weight": ["70"] * len(cells),
    },
  )
  if words is None:
    assert tables.load([file]).people
  else:
    with pytest.raises(UserError, match=words) as error:
      tables.load([file])
    assert "DEMO" not in str(error.value)


@pytest.mark.parametrize(
  "cells, words",
  [
    (
      {"p41270_a0": ["1050", "2030", "9"], "p41270_a1": ["7", "", ""]},
      "4 of the 4 filled cells of field 41270.*ICD-10",
    ),
    ({"p53_i2": ["31/12/2015"] * 3}, "'p53_i2'.*'99/99/9999'.*2019-05-31"),
    ({"p41270_a0": ["I48"] * 3, "p41280_a0": ["5 May 2015"] * 3}, "field 41280.*dates such as"),
    (
      {"p24100_i2": ["50"] * 3, "p24101_i2": ["150"] * 3},
      "LVEDV lies below LVESV in 3 rows.*exchanged",
    ),
  ],
)
def test_a_column_of_uk_biobank_that_is_lost_stops(tmp_path, cells, words):
  with pytest.raises(UserError, match=words):
    tables.load([one(tmp_path, eid=list("ABC"), **cells)])


def test_a_column_is_judged_by_who_is_asked_for_and_over_all_batches(tmp_path, monkeypatch):
  monkeypatch.setattr(columns, "BLOCK_BYTES", 64)
  file = general(tmp_path, phenotype__T1__ms=["x"] * 3 + ["900"] * 27)
  assert tables.load([file]).problems == {"T1: not a number": 3}
  with pytest.raises(UserError, match="3 of the 3 filled cells"):
    tables.load([file], participants=["P0", "P1", "P2"])


SECRET = "DEMO4242"


@pytest.mark.parametrize(
  "content, match",
  (
    (b"", "an empty file"),
    (f"{SECRET},1,2\n".encode(), r"3 columns \(3 like other\)"),
    (f"eid,name,24100-0.0\n{SECRET},x,1".encode(), r"nothing that is wanted.*1 like 24100-2\.0"),
    (
      f"id,24100-2.0,p24100_i2\n{SECRET},1,2".encode(),
      "no column of participants.*1 like 24100-2.0, 1 like p24100_i2",
    ),
    (f"eid,f.eid,24100-2.0\n{SECRET},{SECRET},1".encode(), "several columns of participants"),
    (f"eid,24100-2.0,p24100_i2\n{SECRET},1,2".encode(), "two columns for the same thing"),
    (f"eid,24100-2.0,24100-2.0\n{SECRET},1,2".encode(), "two columns for the same thing"),
    (f"eid,p41270,p41270_a0\n{SECRET},I48,I48".encode(), "two columns for the same thing"),
    (f"eid,24100-2.0\n{SECRET},1,{SECRET}\n".encode(), "3 cells; expected 2"),
    (f"eid,24100-2.0\n{SECRET}".encode(), "1 cells; expected 2"),
    (f"eid,24100-2.0\n{SECRET},\xff".encode("latin-1"), "cannot be read"),
    (b"\xff\xfee\0i\0d\0", "nothing that is wanted"),
    (b"PAR1" + SECRET.encode() * 10, "cannot be read"),
    (f'eid,"24100-2.0\n{SECRET},1\n'.encode(), "cannot be read|nothing|no column"),
  ),
)
def test_tables_that_are_refused(tmp_path, content, match):
  (tmp_path / "x.csv").write_bytes(content)
  with pytest.raises(UserError, match=match) as caught:
    tables.load([tmp_path / "x.csv"])
  assert (
    SECRET not in str(caught.value)
    and "\n" not in str(caught.value)
    and "x.csv" in str(caught.value)
  )
  with pytest.raises(UserError, match="no such file|No such file"):
    tables.load([tmp_path / "absent.csv"])


@pytest.mark.parametrize(
  "content,found",
  [
    (gzip.compress(os.urandom(9) * 9999)[:-30], "damaged or cut short"),
    (b"PK\x03\x04", "a zip"),
    (b"%PDF-1.7", "a PDF"),
    (b"version https://git-lfs", "a Git LFS pointer"),
    ("eid,Gr\u00f6\u00dfe".encode("latin-1"), "a text in another encoding"),
    (b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml", "an Excel or other Office file"),
  ],
)
def test_files_of_other_formats_are_named(tmp_path, content, found):
  (tmp_path / "x.csv").write_bytes(content)
  with pytest.raises(UserError, match=re.escape(f"({found}); expected CSV or TSV")):
    columns.header(tmp_path / "x.csv")


def test_problems_name_nobody(tmp_path):
  table = tables.load(
    [
      one(
        tmp_path,
        eid=[SECRET, ""],
        p24100_i2=[SECRET, "1"],
        p53_i2=[SECRET, ""],
        p31=[SECRET, ""],
        p41270=[SECRET, ""],
      )
    ]
  )
  assert (
    SECRET not in json.dumps(table.problems) and table.problems["rows without a participant"] == 1
  )


@pytest.mark.parametrize(
  "text, expected",
  (
    (" 12 ", "12"),
    ("12.0", "12"),
    ("12.00", "12"),
    ("0012", "12"),
    ('"12"', "12"),
    ("'0'", "0"),
    ("000", "0"),
    (12, "12"),
    (12.0, "12"),
    ("DEMO0001", "DEMO0001"),
    ("demo0001", "demo0001"),
    ("0A1", "0A1"),
    ("12.5", "12.5"),
    ("-12", "-12"),
    ("", ""),
    ("1e6", "1e6"),
  ),
)
def test_canonical_ids(text, expected):
  assert tables.canonical(text) == expected == tables.canonical(tables.canonical(text))


@pytest.mark.parametrize(
  "content",
  (
    "eid\n12\n34\nDEMO0001\n",
    "12\n34\nDEMO0001",
    '\ufeffeid\r\n12.0\r\n\r\n0034\r\n"DEMO0001"\r\n',
    'participant_id,date\n" 12",2020\n34.0,2020\nDEMO0001,\n',
    "12\n12\n34\n DEMO0001 \n\n",
  ),
)
def test_withdrawn(tmp_path, content):
  (tmp_path / "w.csv").write_text(content, encoding="utf-8")
  assert tables.withdrawn(tmp_path / "w.csv") == {"12", "34", "DEMO0001"}


@pytest.mark.parametrize(
  "content, match",
  (
    (b"", "no participant"),
    (b"eid\n", "no participant"),
    (b"eid\n1.23457E+06\n", "scientific"),
    (b"\xff\xfe1\x002\x00", "not a list"),
    (b"\xff\n12", "not a list"),
  ),
)
def test_lists_of_withdrawals_that_are_refused(tmp_path, content, match):
  (tmp_path / "w.csv").write_bytes(content)
  with pytest.raises(UserError, match=match):
    tables.withdrawn(tmp_path / "w.csv")
  with pytest.raises(UserError, match="no such file|No such file"):
    tables.withdrawn(tmp_path / "absent.csv")


ODD_CELLS = st.one_of(
  st.sampled_from(
    [
      "",
      "NA",
      "1",
      "-3",
      "I48",
      "2015-01-01",
      "[",
      '["I48"]',
      '[{"a":1}]',
      "9" * 400,
      "1e999",
      "\u0661",
      '"',
      "[" * 3000,
      "0x10",
      "1_0",
      "True",
      "\x00",
      "inf",
      "2015-01-01x",
      "99999-01-01",
    ]
  ),
  st.text(max_size=12),
)


def only_user_errors(file):
  try:
    table = tables.load([file])
  except UserError as error:
    assert "\n" not in str(error)
    return
  for (participant, visit), row in table.rows.items():
    assert np.isfinite(table.phenotype_values[row][~np.isnan(table.phenotype_values[row])]).all()
    assert (
      set(tables.diseases(table, participant, visit, CODES)) <= {0, 1} or not table.diagnosed.all()
    )
    tables.event_years(table, participant, visit, CODES)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(ODD_CELLS, min_size=8, max_size=8), max_size=6), st.sampled_from(",\t"))
def test_odd_cells_are_dropped_or_refused(tmp_path_factory, rows, delimiter):
  names = ["eid", "24100-2.0", "31-0.0", "53-2.0", "41270-0.0", "41280-0.0", "52-0.0", "40001-0.0"]
  names = [name.replace("41270-0.0", "p41270") for name in names]
  file = tmp_path_factory.mktemp("fuzz") / "x.csv"
  with open(file, "w", newline="", encoding="utf-8", errors="surrogatepass") as handle:
    writer = csv.writer(handle, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([names, *([f"P{i % 4}", *row[1:]] for i, row in enumerate(rows))])
  only_user_errors(file)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
  st.binary(max_size=300),
  st.sampled_from((b"", b"eid,24100-2.0,p41270\n", b"eid\t31-0.0\n", b"PAR1")),
)
def test_random_bytes_are_refused_or_read(tmp_path_factory, content, head):
  file = tmp_path_factory.mktemp("fuzz") / "x.csv"
  file.write_bytes(head + content)
  only_user_errors(file)
  with contextlib.suppress(UserError):
    tables.withdrawn(file)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_parquet_is_refused_or_read(tmp_path_factory, data):
  file = tmp_path_factory.mktemp("fuzz") / "x.parquet"
  pd.DataFrame({"eid": range(5), "24100-2.0": np.arange(5.0), "p41270": ["I48"] * 5}).to_parquet(
    file
  )
  content = bytearray(file.read_bytes())
  for _ in range(data.draw(st.integers(1, 5))):
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
  file.write_bytes(content)
  only_user_errors(file)


def test_end_of_follow_up_is_that_of_everybody_in_the_tables(tmp_path):
  file = one(
    tmp_path,
    eid=["A", "B", "C"],
    p53_i2=["2015-01-01"] * 3,
    p24100_i2=["100"] * 3,
    p41270_a0=["", "I10", "I10"],
    p41280_a0=["", "2020-01-01", "2036-02-01"],
  )
  af = {"AF": CODES["AF"]}
  # B and C are not kept; C's diagnosis lies in the future
  table = tables.load([file], participants=["A"])
  assert table.censored == np.datetime64("2020-01-01")
  assert tables.followed_years(table, "A", 2) == pytest.approx(5, abs=0.01)
  assert tables.diseases(table, "A", 2, af, "incident")[0] == 0
  before = tables.load([file], participants=["A"], censored="2014-06-01")
  assert np.isnan(tables.followed_years(before, "A", 2)) and np.isnan(
    tables.diseases(before, "A", 2, af, "incident")[0]
  )
  same_day = tables.load([file], participants=["A"], censored="2015-01-01")
  assert (
    tables.followed_years(same_day, "A", 2) == 0
    and tables.diseases(same_day, "A", 2, af, "incident")[0] == 0
  )
  late = tables.load([file])
  assert late.problems["41280: after today"] == 1 and late.censored == np.datetime64("2020-01-01")


@pytest.mark.parametrize(
  "text",
  [
    "eid;year\n12;2023\n34;2023\nDEMO0001;2023\n",
    "eid\tyear\n12\t2023\n34\t2023\nDEMO0001\t2023\n",
    "row,eid\n1,12\n2,34\n3,DEMO0001\n",
  ],
)
def test_withdrawals_in_other_forms_are_read(tmp_path, text):
  (tmp_path / "w.csv").write_text(text)
  assert tables.withdrawn(tmp_path / "w.csv") == {"12", "34", "DEMO0001"}


@pytest.mark.parametrize(
  "text, match",
  [
    ("12;2023\n34;2023\n", "several columns"),
    ("1,12\n2,34\n", "several columns"),
    ("12 2023\n", "line 1.*no id"),
    ("eid\n12\n=HYPERLINK(x)\n", "line 3.*no id"),
  ],
)
def test_withdrawals_that_could_be_misread_are_refused(tmp_path, text, match):
  (tmp_path / "w.csv").write_text(text)
  with pytest.raises(UserError, match=match) as error:
    tables.withdrawn(tmp_path / "w.csv")
  assert "12" not in str(error.value).rpartition("w.csv")[2].replace("line", "")


def test_a_date_counts_up_to_today(tmp_path):
  today = datetime.date.today()
  tomorrow = today + datetime.timedelta(1)
  table = tables.load(
    [
      one(
        tmp_path,
        eid=["A", "B"],
        p53_i2=["2015-01-01"] * 2,
        p41270=["I48", "I48"],
        p41280_a0=[str(today), str(tomorrow)],
        p40000_i0=["", str(tomorrow)],
      )
    ]
  )
  assert table.censored == np.datetime64(today) and np.isnat(table.deaths).all()
  assert tables.events(table, "A") == [("I48", today)] and tables.events(table, "B") == [
    ("I48", None)
  ]
  assert table.problems == {"40000: after today": 1, "41280: after today": 1}
  af = {"AF": CODES["AF"]}
  np.testing.assert_array_equal(
    [tables.diseases(table, p, 2, af, "incident")[0] for p in "AB"], [1, np.nan]
  )


def test_a_visit_after_the_end_of_follow_up_or_after_death_is_not_followed(tmp_path):
  """The end is 2015-01-02; C died the day before the visit."""
  table = tables.load(
    [
      one(
        tmp_path,
        eid=list("ABC"),
        p53_i2=["2015-01-02", "2015-01-03", "2014-01-02"],
        p41270_a0=["", "", ""],
        p41280_a0=["2015-01-02", "", ""],
        p40000_i0=["", "", "2014-01-01"],
      )
    ]
  )
  af = {"AF": CODES["AF"]}
  np.testing.assert_array_equal(
    [tables.followed_years(table, p, 2) for p in "ABC"], [0, np.nan, np.nan]
  )
  np.testing.assert_array_equal(
    [tables.diseases(table, p, 2, af, "incident")[0] for p in "ABC"], [0, np.nan, np.nan]
  )
  assert [tables.diseases(table, p, 2, af, "prevalent")[0] for p in "ABC"] == [0, 0, 0]


@pytest.mark.parametrize(
  "dates",
  (
    ["2019-01-01|2020-02-03", ""],
    [["2020-02-03", None], ["2018-01-01"]],
    [[datetime.date(2020, 2, 3)], None],
    [datetime.datetime(2020, 2, 3, 9), datetime.datetime(2018, 1, 1)],
  ),
)
def test_the_end_of_follow_up_of_dates_in_one_cell(tmp_path, dates):
  pa.parquet.write_table(
    pa.table(
      {"eid": ["A", "B"], "p53_i2": ["2015-01-01"] * 2, "p41270": ["I48", "I48"], "p41280": dates}
    ),
    tmp_path / "x.parquet",
  )
  assert tables.load([tmp_path / "x.parquet"], participants=["B"]).censored == np.datetime64(
    "2020-02-03"
  )


def test_tables_of_other_participants_leave_nothing(tmp_path):
  table = tables.load([write(tmp_path / "x.csv", cells_of("24100-2.0"))], participants=["DEMO0101"])
  assert table.people == table.rows == table.rejected == {}
  assert tables.events(table, "DEMO0001") == [] and np.isnan(
    tables.followed_years(table, "DEMO0001", 2)
  )


def test_ids_in_names_of_files_are_those_of_tables(tmp_path):
  names = ["a/0012_20205_2_0.xml", "b/12_20205_2_1.xml", "DEMO0012_20205_2_0.xml"]
  assert source.index(names, source.ECG_FILE) == {("12", 2): names[:2], ("DEMO0012", 2): names[2:]}
  assert source.index_folders(["0012_2/sa.nii.gz"], "sa.nii.gz") == {("12", 2): ["0012_2"]}
  assert tables.load([one(tmp_path, eid=["00012.0"], p31=["1"])], participants=["0012"]).people == {
    "12": 0
  }


@pytest.mark.parametrize("read", (lambda path: tables.load([path]), tables.withdrawn))
def test_what_is_no_file_and_what_the_machine_fails_at(tmp_path, monkeypatch, read):
  with pytest.raises(UserError, match="absent.csv: no such file; expected"):
    read(tmp_path / "absent.csv")
  with pytest.raises(UserError, match="is a folder; expected"):
    read(tmp_path)
  file = one(tmp_path, eid=["1"], p31=["1"])

  for error, reason in (
    (OSError(errno.EIO, SECRET), os.strerror(errno.EIO)),
    (MemoryError(SECRET), os.strerror(errno.ENOMEM)),
    (PermissionError(errno.EACCES, SECRET), os.strerror(errno.EACCES)),
  ):

    def fail(*_, error=error, **__):
      raise error

    with monkeypatch.context() as patch:
      for room in (columns, tables):
        patch.setattr(room, "open", fail, raising=False)
      with pytest.raises(UserError, match=f"x.csv cannot be read: {reason}$"):
        read(file)


def test_the_machine_fails_half_way(tmp_path, monkeypatch):
  file = one(tmp_path, eid=["1"], p31=["1"])
  for place, name, error in (
    (pa.csv, "open_csv", OSError(errno.ENOSPC, SECRET)),
    (pa.csv, "open_csv", pa.ArrowMemoryError(SECRET)),
    (tables, "gather", MemoryError(SECRET)),
  ):

    def fail(*_, error=error, **__):
      raise error

    with monkeypatch.context() as patch:
      patch.setattr(place, name, fail)
      with pytest.raises(
        UserError, match="cannot be read: (No space left|Cannot allocate memory)"
      ) as caught:
        tables.load([file])
    assert SECRET not in str(caught.value) and "expected" not in str(caught.value)


@pytest.mark.parametrize(
  "text",
  (
    "Withdrawn participants\n12\n34\n",
    "12,\n34,,\n",
    "\n,,\n,12\n,34\n",
    "n_eid;note\n12;a, b\n34;\n",
    "Participant ID\r12\r34\r",
  ),
)
def test_withdrawals_with_one_column_that_matters(tmp_path, text):
  (tmp_path / "w.csv").write_text(text, newline="")
  assert tables.withdrawn(tmp_path / "w.csv") == {"12", "34"}


@pytest.mark.parametrize(
  "text, match",
  (
    (f"{SECRET}\t2023\n", "several columns and no header"),
    (f"eid,participant\n1,{SECRET}\n", "several headers"),
    (f"id;note\n1;{SECRET}\n", "no header"),
    (f"1\n2,{SECRET}\n", "several columns"),
    (f"eid,date\n1,{SECRET},2023\n", "line 2: more cells"),
    (f"eid\n1,{SECRET}\n", "line 2: more cells"),
    (f"date,eid\n2023\n2023,{SECRET}\n", "line 2: no id"),
    (f"1\n\n{SECRET}|2023\n", "line 3"),
    (f"eid\n{SECRET};2023\n", "line 2"),
    (f'eid,note\n1,"a\n{SECRET},b"\n', "line 2: quotes"),
    (f"{SECRET}.5\n", "line 1"),
    (f"1\x002\x00\n{SECRET}\n", "line 1"),
  ),
)
def test_lists_that_would_withdraw_others_are_refused_and_not_quoted(tmp_path, text, match):
  (tmp_path / "w.csv").write_text(text)
  with pytest.raises(UserError, match=match) as caught:
    tables.withdrawn(tmp_path / "w.csv")
  assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.reported(
  "tables of another visit than the files' gave a cohort without a label, with exit status 0"
)
@pytest.mark.parametrize(
  "columns_given, known",
  [
    ({"phenotype:LVEDV:ml": ["150", "160"]}, "0"),
    ({"visit": ["0", "1"], "age": ["60", "61"]}, "0, 1"),
    ({"visit": ["2", "2"], "disease:AF": ["", ""]}, "none"),
    ({"visit": ["2", "2"], "age": ["60", "61"]}, None),
    ({"sex": ["1", "0"]}, None),
  ],
)
def test_tables_without_a_value_for_any_visit_stop(tmp_path, columns_given, known):
  for name in "AB":
    (tmp_path / f"{name}_20205_2_0.xml").touch()
  file = write(tmp_path / "x.csv", {"participant": ["A", "B"], **columns_given})
  options = types.SimpleNamespace(
    input=[str(tmp_path)],
    tables=[str(file)],
    segmentations=None,
    withdrawn=None,
    diseases="any",
    codes=None,
    censored=None,
    shape=preprocess_cmr.Shape(),
  )
  if known is None:
    assert len(source.plan(options, lambda name: schema.subject_hash(name, b"salt")).items) == 2
    return
  with pytest.raises(
    UserError,
    match=f"no value for any visit under --input, such as visit 2; the visits with values are: {known}",
  ):
    source.plan(options, lambda name: schema.subject_hash(name, b"salt"))
