"""`mmcl embed` with a stand-in for the encoder: rows and parts, going on, refusals, readers that
are processes."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from concurrent import futures
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common import PATH, alive
from encoder import WIDTH, signature, stand_in
from mistakes import error_of
from recordings import heart, record, stacked
from mmcl_jax import embed
from mmcl_jax.data import ahead
from mmcl_jax.data.preprocess import ecg as preprocess
from mmcl_jax.data.readers import wfdb
from mmcl_jax.data.schema import LEADS
from mmcl_jax.errors import UserError


@pytest.fixture
def encoder(monkeypatch):
  """Readers are threads, which start at once."""
  monkeypatch.setitem(sys.modules, "mmcl_jax.training.restore", stand_in())
  monkeypatch.setattr(ahead, "readers", lambda: futures.ThreadPoolExecutor(2))
  return sys.modules["mmcl_jax.training.restore"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """Five good and three bad recordings in nested folders, each good one of its own voltage."""
  folder = tmp_path_factory.mktemp("written") / "ecg"
  for k, name in enumerate(("b", "a", "nested/d", "nested/e", "z")):
    leads = {lead: (1 + k) * values for lead, values in heart(seed=k).items()}
    record(folder / Path(name).parent, leads, name=Path(name).name)
  record(folder, heart(2), name="brief")
  record(folder, heart(), name="lost").with_suffix(".dat").unlink()
  (folder / "nested/junk.hea").write_bytes(b"\x00\x01junk")
  return folder


@pytest.fixture
def recordings(written, tmp_path):
  return Path(shutil.copytree(written, tmp_path / "ecg"))


def run(tmp_path, *more, out="out"):
  embed.main(
    [f"--workdir={tmp_path}", f"--out={tmp_path / out}", f"--input={tmp_path / 'ecg'}", *more]
  )
  return pd.read_parquet(tmp_path / out)


def files(out):
  return {file.name: file.read_bytes() for file in sorted(Path(out).iterdir())}


def expected_embedding(path):
  recording = wfdb.read(path)
  standard = preprocess.to_standard(recording.ecg_mv, recording.rate_hz)
  return signature(preprocess.normalise(standard, "minimal")[None])[0]


def probes(tmp_path, half_width=(30.0, 5.5), **more):
  folder = tmp_path / "evaluation/70"
  folder.mkdir(parents=True, exist_ok=True)
  arrays = {
    "names": ["LVM", "LVEF"],
    "units": ["g", "%"],
    "coef": np.arange(2.0 * WIDTH).reshape(WIDTH, 2),
    "intercept": np.array([50.0, -3.0]),
    "half_width": np.array(half_width),
  }
  np.savez(folder / "probes.npz", **arrays | more)
  return arrays


@pytest.mark.reported(
  "intervals were given without a word where people to judge them by had part in training"
)
def test_what_an_evaluation_says_of_people_seen_in_training_is_said_of_the_intervals(
  tmp_path, capsys
):
  probes(tmp_path)
  folder = tmp_path / "evaluation/70"
  embed.load_probes(tmp_path, 70, folder)
  assert capsys.readouterr().out == ""
  probes(tmp_path, note="2 of 4 test people had part in training")
  embed.load_probes(tmp_path, 70, folder)
  assert "intervals: 2 of 4 test people had part in training" in capsys.readouterr().out


# Rows


def test_a_mixed_folder(tmp_path, encoder, recordings, capsys):
  absent, image = tmp_path / "absent.hea", tmp_path / "image.png"
  image.write_bytes(b"png")
  rows = run(tmp_path, str(absent), str(image), "--batch=3", "--step=70", out="new/out")
  names = ["a", "b", "brief", "lost", "nested/d", "nested/e", "nested/junk", "z"]
  paths = [recordings / f"{name}.hea" for name in names] + [absent, image]
  assert list(rows["path"]) == list(map(str, paths))
  assert list(rows["status"] == "ok") == [1, 1, 0, 0, 1, 1, 0, 1, 0, 0]
  assert list(rows.columns) == ["path", "status", "reason", "flags", "embedding"]
  assert all(
    bool(row.reason) == (row.status == "rejected") == (row.embedding is None)
    for row in rows.itertuples()
  )
  assert "2.00 s long" in rows["reason"][2] and "no such file" in rows["reason"][8]
  ok = rows[rows["status"] == "ok"]
  np.testing.assert_allclose(
    np.stack(ok["embedding"]), [expected_embedding(path) for path in ok["path"]], rtol=1e-6
  )
  assert set(encoder.shapes) == {(3, 12, 5000)} and encoder.asked == [(str(tmp_path), 70)]
  assert os.listdir(tmp_path / "new/out") == ["part-00000.parquet"]
  printed = capsys.readouterr().out
  assert "mmcl evaluate" in printed and "5 of 10 recordings embedded" in printed


def test_every_format_and_the_rate_of_the_profile(tmp_path, encoder):
  """Folders are searched for every format; a table that no sidecar calls an ECG is passed over, not
  rejected."""
  folder = tmp_path / "ecg"
  leads = heart()
  record(folder, leads, name="a")
  np.savetxt(folder / "b.csv", stacked(leads).T, delimiter=",", header=",".join(LEADS), comments="")
  (folder / "b.json").write_text('{"rate_hz": 500}')
  (folder / "records.csv").write_text("path,status\n")
  np.save(folder / "embeddings.npy", np.zeros((5, 4)))
  (folder / "note.xml").write_text("<note/>")
  encoder.profile = "cardionets"
  rows = run(tmp_path, "--batch=2")
  assert [(Path(row.path).name, row.status) for row in rows.itertuples()] == [
    ("a.hea", "ok"),
    ("b.csv", "ok"),
    ("note.xml", "rejected"),
  ]
  assert set(encoder.shapes) == {(2, 12, 2500)}
  expected = signature(preprocess.normalise(stacked(leads), "cardionets")[None])[0]
  np.testing.assert_allclose(np.stack(rows["embedding"][:2]), [expected] * 2, atol=0.002)


@pytest.mark.reported("a folder's files that embed does not read were passed over without a word")
def test_what_folders_hold_besides_is_counted(tmp_path, encoder, recordings, capsys):
  (recordings / "nested/a.scp").write_bytes(b"")
  (recordings / "nested/b.edf").write_bytes(b"")
  (tmp_path / "empty").mkdir()
  (tmp_path / "empty/table.csv").write_text("I,II\n")
  rows = run(tmp_path, str(tmp_path / "empty"))
  assert "3 files of other kinds, passed over: " in (told := capsys.readouterr().out)
  assert all(kind in told for kind in (".scp 1", ".edf 1", ".csv without a .json 1"))
  assert rows["path"].iloc[-1] == str(tmp_path / "empty") and len(rows) == 9
  assert (
    rows["reason"]
    .iloc[-1]
    .startswith("no ECG in this folder; found .csv without a .json 1; it reads WFDB")
  )


def test_inputs_in_any_form_once(tmp_path, encoder, recordings):
  a, b, d = recordings / "a.hea", recordings / "b", recordings / "nested/d.dat"
  embed.main(
    [
      f"--input={d}",
      f"--workdir={tmp_path}",
      str(a),
      f"--input={b}",
      f"--out={tmp_path / 'out'}",
      str(a.with_suffix(".dat")),
    ]
  )
  rows = pd.read_parquet(tmp_path / "out")
  assert list(rows["path"]) == [str(d), str(b), str(a)]
  np.testing.assert_allclose(rows["embedding"][1], expected_embedding(b), rtol=1e-6)
  found = embed.find_recordings([recordings / "a", recordings])
  assert [Path(path).relative_to(recordings).name for path in found[:3]] == [
    "a",
    "b.hea",
    "brief.hea",
  ]


def test_phenotypes_and_their_intervals(tmp_path, encoder, recordings):
  """One phenotype's half-width is inf, as too few rows of validation leave it."""
  arrays = probes(tmp_path, half_width=(30.0, np.inf))
  rows = run(tmp_path)
  texts = [(name, pa.string()) for name in ("path", "status", "reason", "flags")]
  numbers = [
    (f"{name}{end}", pa.float64()) for name in ("LVM_g", "LVEF_%") for end in ("", "_low", "_high")
  ]
  found = pq.read_schema(tmp_path / "out/part-00000.parquet").remove_metadata()
  assert found == pa.schema([*texts, ("embedding", pa.list_(pa.float32(), WIDTH)), *numbers])
  ok = rows[rows["status"] == "ok"]
  values = np.stack(ok["embedding"]).astype(float) @ arrays["coef"] + arrays["intercept"]
  np.testing.assert_allclose(ok[["LVM_g", "LVEF_%"]], values, rtol=1e-12)
  np.testing.assert_allclose(
    ok[["LVM_g_low", "LVM_g_high"]], values[:, :1] + [[-30, 30]], rtol=1e-12
  )
  assert (ok["LVEF_%_low"] == -np.inf).all() and (ok["LVEF_%_high"] == np.inf).all()
  assert rows[rows["status"] == "rejected"].iloc[:, 4:].isna().all(axis=None)


@pytest.mark.parametrize(
  "damage, words",
  [
    (
      lambda folder: np.savez(
        folder / "probes.npz",
        names=["LVM"],
        units=["g"],
        coef=np.ones((WIDTH, 1)),
        intercept=np.ones(1),
      ),
      "half_width",
    ),  # of an earlier version
    (lambda folder: (folder / "probes.npz").write_bytes(b"PK broken"), "probes.npz"),
    (
      lambda folder: probes(folder.parents[1], coef=np.ones((WIDTH + 1, 2))),
      "width 5, the encoder gives 4",
    ),
    (lambda folder: probes(folder.parents[1], half_width=(1.0,)), "2 names"),
  ],
)
def test_probes_that_cannot_be_used_are_refused(
  damage, words, tmp_path, encoder, recordings, capsys
):
  probes(tmp_path)
  damage(tmp_path / "evaluation/70")
  line = error_of(lambda _: run(tmp_path), [], capsys, beside=True)
  assert words in line and "mmcl evaluate" in line


def test_nothing_to_embed_is_an_error_that_keeps_the_reasons(tmp_path, encoder, recordings, capsys):
  empty = tmp_path / "empty"
  empty.mkdir()
  flags = [
    f"--workdir={tmp_path}",
    f"--out={tmp_path / 'out'}",
    f"--input={recordings / 'brief'}",
    str(empty),
  ]
  for _ in range(2):
    line = error_of(embed.main, flags, capsys, beside=True)
    assert "0 of 2 recordings" in line and "2.00 s long" in line and "`reason`" in line
    assert list(pd.read_parquet(tmp_path / "out")["status"]) == ["rejected"] * 2


def test_what_the_encoder_cannot_embed_is_rejected(tmp_path, encoder, recordings):
  encoder.embed = lambda batch: np.where(
    np.arange(len(batch))[:, None] == 1, np.nan, signature(batch)
  )
  rows = run(tmp_path)
  assert (
    rows["status"][1] == "rejected"
    and "finite" in rows["reason"][1]
    and rows["embedding"][1] is None
  )
  ok = rows[rows["status"] == "ok"]
  np.testing.assert_allclose(
    np.stack(ok["embedding"]), [expected_embedding(path) for path in ok["path"]], rtol=1e-6
  )


def test_a_name_that_is_not_utf8_and_a_reader_s_own_mistake_cost_a_row_each(
  tmp_path, encoder, recordings, monkeypatch
):
  shutil.copytree(recordings, recordings / os.fsdecode(b"\xff"))
  read_ecg = ahead.read_ecg
  monkeypatch.setattr(
    ahead, "read_ecg", lambda path, own: 1 / 0 if path.endswith("z.hea") else read_ecg(path)
  )
  rows = run(tmp_path)
  (name,) = [path for path in rows["path"] if path.endswith("\\xff/a.hea")]
  assert "is not beside it" in rows.set_index("path")["reason"][name.replace("a.hea", "lost.hea")]
  assert (
    list(rows[rows["path"].str.endswith("z.hea")]["reason"])
    == ["unexpected ZeroDivisionError: division by zero"] * 2
  )


# Parts


def test_parts_are_the_table_of_one(tmp_path, encoder, recordings, monkeypatch):
  probes(tmp_path)
  whole = run(tmp_path)
  monkeypatch.setattr(embed, "PART", 3)
  parts = run(tmp_path, "--batch=2", out="parts")
  names = list(files(tmp_path / "parts"))
  assert names == ["part-00000.parquet", "part-00001.parquet"]
  # 3, rounded up to the batch
  assert [pq.read_metadata(tmp_path / "parts" / name).num_rows for name in names] == [4, 4]
  pd.testing.assert_frame_equal(parts, whole, rtol=1e-12)


def test_an_interrupted_run_goes_on_to_the_same_files(
  tmp_path, encoder, recordings, monkeypatch, capsys
):
  """Stopped in the third of four parts, which leaves a torn temporary; the parts that are there are
  not touched."""
  monkeypatch.setattr(embed, "PART", 2)
  flags, replace = ["--batch=2"], os.replace
  run(tmp_path, *flags, out="uninterrupted")

  def stopped(source, target):
    if target.name == "part-00002.parquet":
      source.write_bytes(source.read_bytes()[:200])
      raise KeyboardInterrupt
    replace(source, target)

  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", stopped)
    patch.setattr(Path, "unlink", lambda *args, **kwargs: None)  # as after a kill
    with pytest.raises(KeyboardInterrupt):
      run(tmp_path, *flags)
  assert list(files(tmp_path / "out")) == [
    ".part-00002.parquet.partial",
    "part-00000.parquet",
    "part-00001.parquet",
  ]
  assert len(pd.read_parquet(tmp_path / "out")) == 4
  written = {
    name: os.stat(tmp_path / "out" / name).st_mtime_ns
    for name in ("part-00000.parquet", "part-00001.parquet")
  }
  encoder.shapes.clear()
  run(tmp_path, *flags)
  assert len(encoder.shapes) == 1 + 2  # one call tells the width
  assert files(tmp_path / "out") == files(tmp_path / "uninterrupted")
  assert {name: os.stat(tmp_path / "out" / name).st_mtime_ns for name in written} == written
  encoder.shapes.clear()
  run(tmp_path, *flags)  # nothing to do
  assert encoder.shapes == [] and "5 of 8 recordings embedded" in capsys.readouterr().out


@pytest.mark.reported("a table could not be gone on with once its workdir was moved")
def test_a_workdir_is_its_checkpoint_wherever_it_lies(tmp_path, encoder, recordings):
  run(tmp_path, "--batch=2")
  encoder.shapes.clear()
  embed.main(
    [f"--workdir={tmp_path}/moved", f"--out={tmp_path}/out", f"--input={recordings}", "--batch=2"]
  )
  assert encoder.shapes == []  # nothing to do


@pytest.mark.parametrize(
  "change, words",
  [
    (
      lambda tmp, encoder: setattr(encoder, "checkpoint", "d" * 64),
      "the checksum of the checkpoint is cccc",
    ),
    (
      lambda tmp, encoder: record(tmp / "ecg", heart(), name="more"),
      "the number of recordings is 8 there, 9 now",
    ),
    (lambda tmp, encoder: (tmp / "ecg/z.hea").rename(tmp / "ecg/y.hea"), "the hash of their names"),
    (lambda tmp, encoder: probes(tmp), "the checksum of its probes is None there"),
    (
      lambda tmp, encoder: embed.__setattr__("PART", 64),
      "the number of recordings in a part is 32 there, 64 now",
    ),
    (lambda tmp, encoder: (tmp / "out/part-00000.parquet").write_bytes(b"PAR1"), "is damaged"),
    (
      lambda tmp, encoder: pd.DataFrame({"x": [1]}).to_parquet(tmp / "out/part-00000.parquet"),
      "not of mmcl embed",
    ),
    (lambda tmp, encoder: (tmp / "out/records.csv").write_text("path\n"), "out holds records.csv"),
  ],
)
def test_what_is_not_of_this_run_is_refused(
  change, words, tmp_path, encoder, recordings, monkeypatch, capsys
):
  monkeypatch.setattr(embed, "PART", 8)
  run(tmp_path)
  change(tmp_path, encoder)
  before = files(tmp_path / "out")
  line = error_of(lambda _: run(tmp_path), [], capsys, beside=True)
  assert words in line and str(tmp_path / "out") in line
  assert files(tmp_path / "out") == before


def test_a_disk_that_failed_is_tried_again_by_the_same_command(
  tmp_path, encoder, recordings, monkeypatch, capsys
):
  monkeypatch.setattr(embed, "PART", 2)
  expected = run(tmp_path, "--batch=2", out="expected")
  read_ecg = ahead.read_ecg

  def fails(path, own):
    if path.endswith("nested/d.hea"):
      raise OSError(errno.EIO, "Input/output error")
    return read_ecg(path)

  with monkeypatch.context() as patch:
    patch.setattr(ahead, "read_ecg", fails)
    rows = run(tmp_path, "--batch=2")
  assert rows["reason"][4] == "could not be read now (Input/output error)"
  assert "1 could not be read now; the same command" in capsys.readouterr().out
  encoder.shapes.clear()
  pd.testing.assert_frame_equal(run(tmp_path, "--batch=2"), expected)
  assert len(encoder.shapes) == 2  # the width, and one part
  assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_a_mistake_in_the_flags_is_one_line(tmp_path, encoder, recordings, capsys):
  good = [f"--workdir={tmp_path}", f"--input={recordings}"]
  occupied = tmp_path / "occupied"
  occupied.write_text("")
  for flags, word in (
    (good + ["--out=x", "--batch=0"], "batch"),
    ([good[0], "--out=x"], "--input"),
    (good + [f"--out={occupied}"], "cannot write to"),
    (good, "--out"),
    (good + [f"--out={recordings}"], "holds a.dat"),
  ):
    assert word in error_of(embed.main, flags, capsys, beside=True)


# Readers


class Lazy:
  """An executor that does the work when it is asked for; counts what it was given."""

  def __init__(self):
    self.given = 0

  def submit(self, function, *args):
    self.given += 1
    return types.SimpleNamespace(result=lambda: function(*args))

  def shutdown(self, cancel_futures):
    assert cancel_futures


def test_recordings_come_in_order_and_no_more_wait_than_asked_for(monkeypatch):
  pool = Lazy()
  monkeypatch.setattr(ahead, "readers", lambda: pool)
  monkeypatch.setattr(ahead, "read", lambda path, profile, own: (path, profile))
  for number, found in enumerate(ahead.read_ahead((f"{i}" for i in range(500)), "minimal", 64)):
    assert found == (f"{number}", "minimal")
    assert pool.given == min(number + 64, 500)
  assert number == 499


def dies(path, profile, own):
  os._exit(1)


def test_a_reader_that_dies_is_one_line_that_says_where(monkeypatch):
  """As of a file on which a library crashes."""
  monkeypatch.setattr(ahead, "read", dies)
  with pytest.raises(UserError, match="a reading process died, .* at deadly.hea or one of the"):
    list(ahead.read_ahead(["deadly.hea"], "minimal", 4))


KILLED = """
import os, signal, sys
from concurrent import futures
from mmcl_jax import embed
from mmcl_jax.data import ahead
from encoder import stand_in

sys.modules["mmcl_jax.training.restore"] = stand_in()
embed.PART, write, pools = 2, embed.write, []
readers = ahead.readers
ahead.readers = lambda: pools.append(readers()) or pools[0]

def killed(file, *args):
  if file.name == "part-00002.parquet":
    file.with_name(f".{file.name}.partial").write_bytes(b"PAR1 torn")
    print(*pools[0]._processes, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
  return write(file, *args)

embed.write = killed
embed.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_to_the_same_files_and_leaves_no_reader(
  tmp_path, encoder, recordings, monkeypatch
):
  """The program with its own readers, by SIGKILL in its third part."""
  flags = [
    f"--workdir={tmp_path}",
    f"--out={tmp_path / 'out'}",
    f"--input={recordings}",
    "--batch=2",
  ]
  env = os.environ | {"PYTHONPATH": PATH}
  done = subprocess.run(
    [sys.executable, "-c", KILLED, *flags], env=env, capture_output=True, text=True, timeout=600
  )  # a reader that goes on holds the output open
  assert done.returncode == -signal.SIGKILL, done.stderr
  processes = re.findall(r"^\d[\d ]*$", done.stdout, re.M)[0].split()
  until = time.monotonic() + 300
  while any(map(alive, processes)) and time.monotonic() < until:
    time.sleep(0.1)
  assert processes and not any(map(alive, processes))
  assert list(files(tmp_path / "out")) == [
    ".part-00002.parquet.partial",
    "part-00000.parquet",
    "part-00001.parquet",
  ]
  monkeypatch.setattr(embed, "PART", 2)
  run(tmp_path, "--batch=2")
  run(tmp_path, "--batch=2", out="uninterrupted")
  assert files(tmp_path / "out") == files(tmp_path / "uninterrupted")
