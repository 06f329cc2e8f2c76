"""The ECG reader of docs/extending.md, through `mmcl prepare` and `mmcl embed`."""

import sys

import numpy as np
import pandas as pd
import pytest

from common import ROOT
from encoder import stand_in
from extending import blocks, write
from mistakes import error_of
from recordings import heart, record, stacked
from mmcl_jax import embed, prepare
from mmcl_jax.data import cohort, readers
from mmcl_jax.data.schema import LEADS
from mmcl_jax.errors import BadRecord, UserError

FLAG = "--reader=.ours=my_reader:read"
DOCS = ROOT / "docs"


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Two ECGs of our device, one damaged file of it, a WFDB record and a text; my_reader is in the
  current folder."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", list(sys.path))
  monkeypatch.delitem(sys.modules, "my_reader", raising=False)
  write("An ECG reader", tmp_path)
  folder = tmp_path / "ecg"
  record(folder, heart(seed=9), name="d")
  for name, seed in (("a.ours", 1), ("b.OURS", 2)):
    with open(folder / name, "w") as file:
      file.write("our device, 500 Hz\n")
      np.savetxt(file, 1000 * stacked(heart(seed=seed)).T, delimiter=";", fmt="%.1f")
  (folder / "c.ours").write_text("something else\n")
  (folder / "notes.txt").write_text("of the study")
  return folder


def test_a_reader_of_one_s_own_through_prepare(folder, tmp_path, capsys):
  """In worker processes; the tables and the splits are those of every source of ECG alone."""
  argv = ["ecg", f"--input={folder}", f"--out={tmp_path}/cohort", FLAG, "--processes=2"]
  prepare.main([*argv, "--split=1,0,0"])
  made = cohort.load(tmp_path / "cohort")
  assert made.info["counts"] == {"train": 3, "val": 0, "test": 0}
  told = capsys.readouterr().out
  assert "files of other kinds, passed over: .txt 1" in told and "1 rejected" in told
  assert "not a file of our device" in (tmp_path / "cohort/quality.html").read_text()


def test_a_reader_of_one_s_own_through_embed(folder, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "mmcl_jax.training.restore", stand_in())
  embed.main([f"--workdir={tmp_path}", f"--input={folder}", f"--out={tmp_path}/out", FLAG])
  rows = pd.read_parquet(tmp_path / "out")
  assert [path.rpartition("/")[2] for path in rows["path"]] == [
    "a.ours",
    "b.OURS",
    "c.ours",
    "d.hea",
  ]
  assert list(rows["status"]) == ["ok", "ok", "rejected", "ok"]
  assert "not a file of our device" in rows["reason"][2]
  assert "1 files of other kinds, passed over: .txt 1" in capsys.readouterr().out


def test_the_documents_name_every_format():
  (command,) = blocks("An ECG reader", "bash")
  assert FLAG in command.split()
  page = (DOCS / "your_data.md").read_text().replace("`", "")
  for entry in readers.FORMATS.values():
    rows = [
      row for row in page.splitlines() if row.startswith(f"| {entry.title.partition(' (')[0]}")
    ]
    for suffix in (*entry.suffixes, *entry.companions):
      assert any(suffix in row for row in rows), suffix


def test_a_reader_of_one_s_own_gives_what_it_reads(folder):
  own = readers.parse_own([".ours=my_reader:read"])
  for name, seed in (("a.ours", 1), ("b.OURS", 2)):
    recording = readers.read_ecg(folder / name, own)
    np.testing.assert_allclose(recording.ecg_mv, stacked(heart(seed=seed)), atol=0.0001)
  with pytest.raises(BadRecord, match="another kind of file; expected WFDB"):
    readers.read_ecg(folder / "a.ours")


def test_a_reader_of_one_s_own_goes_before_a_suffix_and_content_that_are_known(folder):
  (folder / "a.ours").rename(folder / "a.dat")
  own = readers.parse_own([".dat=my_reader:read"])
  assert readers.ecg_file(folder / "a.dat", own) == folder / "a.dat"
  recording = readers.read_ecg(folder / "a.dat", own)
  np.testing.assert_allclose(recording.ecg_mv, stacked(heart(seed=1)), atol=0.0001)
  assert folder / "a.dat" in readers.find_ecg(folder, own)[0]


def test_a_built_in_reader_for_another_suffix(folder):
  """Such as CSVs that are called .txt."""
  with open(folder / "e.txt", "w") as file:
    file.write(",".join(LEADS) + "\n")
    np.savetxt(file, stacked(heart(seed=3)).T, delimiter=",")
  (folder / "e.json").write_text('{"rate_hz": 500}')
  recording = readers.read_ecg(folder / "e.txt", readers.parse_own([".txt=array"]))
  np.testing.assert_allclose(recording.ecg_mv, stacked(heart(seed=3)), atol=0.0001)


@pytest.mark.parametrize(
  "flag,words",
  [
    ("my_reader:read", "expected SUFFIX=package.module:function, such as .ecg=my_reader:read"),
    ("ours=my_reader:read", "expected SUFFIX="),
    (".ours=", "expected SUFFIX="),
    (".ours=my_reader", "expected one of wfdb, cardiosoft, dicom, array, or 'package.module"),
    (".ours=my_reader:reed", "cannot be imported (module 'my_reader' has no attribute 'reed')"),
    (".ours=no_such_module:read", "cannot be imported (No module named 'no_such_module')"),
  ],
)
def test_a_reader_that_cannot_be_had_is_one_line(folder, tmp_path, capsys, flag, words):
  for main, argv in (
    (prepare.main, ["ecg", f"--input={folder}", f"--out={tmp_path}/out"]),
    (embed.main, [f"--workdir={tmp_path}", f"--input={folder}", f"--out={tmp_path}/out"]),
  ):
    line = error_of(main, [*argv, f"--reader={flag}"], capsys, beside=True)
    assert words in line


def test_other_sources_have_no_use_for_a_reader(folder):
  args = prepare.parse(["wfdb", f"--input={folder}", "--out=c", FLAG])
  with pytest.raises(UserError, match="source wfdb has no use for --reader"):
    prepare.find_source(args)


def test_what_a_reader_returns_is_checked(folder, tmp_path):
  (tmp_path / "my_reader.py").write_text("def read(path):\n  return 5\n")
  with pytest.raises(BadRecord, match="its reader returned a int; expected a Recording"):
    readers.read_ecg(folder / "a.ours", {".ours": "my_reader:read"})
