"""Nobody is named: from raw files with planted ids to the last output, in no byte that a program
writes or prints.

Raw UK Biobank files of raw_ukb go through prepare, train, evaluate, embed, export and inspect, some
of them damaged. Then every output is searched, decompressed where it is compressed, for the
participants' ids, the names, places and dates of birth that stand in the files' headers, and the
salt. The private folder alone may hold them.
"""

import gzip
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import raw_ukb
import raw_ukb_faults
from common import ROOT, tiny_flags
from PIL import Image

from mmcl_jax.data import cohort as cohort_lib

FAULTS = [
  fault
  for fault in raw_ukb_faults.FAULTS
  if fault.name
  in (
    "ECG cut",
    "ECG with an entity bomb",
    "ECG with a text among samples",
    "ECG empty",
    "zip cut",
    "zip that climbs",
    "DICOM of garbage",
    "DICOM of another size",
    "withdrawn, a word",
    "contradicting rows",
    "garbage for a date of visit",
  )
]
SUBJECTS = len(FAULTS) + 15
# column of `mmcl embed` that holds the user's own words: the names of the files it was given
OF_EMBED = ("path",)
CODE = """
import json, sys
from mmcl_jax import cli
for verb, *flags in json.loads(sys.argv[1]):
  print(verb, flush=True)
  cli.run(cli.program(verb).main, flags, hosts=verb in cli.ON_HOSTS)
"""


class Made(NamedTuple):
  """What all programs left: `printed` holds stdout and stderr of all of them."""

  folder: pathlib.Path
  truth: raw_ukb.Truth
  secrets: "Secrets"
  printed: bytes

  def outputs(self) -> list[pathlib.Path]:
    """Files and folders, but for the raw ones and the private folder."""
    return [
      file
      for top in sorted(self.folder.iterdir())
      if top.name not in ("raw", "private")
      for file in [top, *sorted(top.rglob("*"))]
    ]


def run(*command, fails=False) -> bytes:
  """stdout and stderr of a program in a process of its own, with those of its workers."""
  env = (
    os.environ
    | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    | {"PYTHONPATH": str(ROOT)}
  )
  done = subprocess.run(
    [sys.executable, *map(str, command)],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    env=env,
    cwd="/",
  )
  assert done.returncode == (2 if fails else 0), done.stdout.decode()[-3000:]
  return done.stdout


def prepare(raw: pathlib.Path, out, private, *more, fails=False) -> bytes:
  return run(
    "-m",
    "mmcl_jax.prepare",
    "ukb",
    "--input",
    raw / "Bulk",
    "--out",
    out,
    "--private",
    private,
    "--split=0.5,0.2,0.3",
    "--processes=2",
    *more,
    fails=fails,
  )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
  folder = tmp_path_factory.mktemp("ids")
  raw, out, private = folder / "raw", folder / "cohort", folder / "private"
  truth = raw_ukb.write(
    raw, SUBJECTS, seed=4, frames=8, slices=7, size=64, faults=tuple(FAULTS), processes=2
  )
  few_phenotypes(raw / "tables/phenotypes.csv")
  private.mkdir(mode=0o700)
  (private / "salt").touch(mode=0o600)
  # the same splits in every run of the test, none of them empty
  (private / "salt").write_text(64 * "5" + "\n")
  printed = prepare(
    raw,
    out,
    private,
    "--segmentations",
    raw / "Segmentations",
    "--withdrawn",
    raw / "withdrawn.csv",
    "--tables",
    *sorted((raw / "tables").iterdir()),
  )
  workdir = folder / "workdir"
  printed += run(
    "-c",
    CODE,
    json.dumps(
      [
        # Without CMR towers, which take a minute to compile and leave nothing but numbers more.
        [
          "train",
          *(
            flag.replace("joint.py:test", "joint.py:test,arm=mae")
            for flag in tiny_flags(out, workdir)
          ),
        ],
        ["evaluate", f"--workdir={workdir}"],
        [
          "embed",
          f"--workdir={workdir}",
          f"--input={raw}/Bulk/Electrocardiogram",
          f"--out={folder}/embedded",
        ],
        ["export", f"--workdir={workdir}", f"--out={folder}/exported", "--platforms=cpu"],
        ["inspect", str(out)],
        *(
          ["inspect", str(out), "--index=0", f"--split={split}", f"--out={folder}/{split}.png"]
          for split in ("train", "test")
        ),
      ]
    ),
  )
  return Made(folder, truth, secrets_of(truth, (private / "salt").read_text().strip()), printed)


def few_phenotypes(file: pathlib.Path) -> None:
  """Leaves the first six of UK Biobank's 82: evaluation takes its time for each."""
  table = pd.read_csv(file, dtype=str)
  table.iloc[:, :13].to_csv(file, index=False)


class Secrets(NamedTuple):
  """Words in lower case, of which numbers count where they are no part of a longer one; ids as
  numbers; the salt."""

  words: list[bytes]
  numbers: np.ndarray  # int [N]
  salt: bytes

  def first(self, data: bytes) -> bytes:
    """The first of the words, the numbers and the salt that stands in `data`; b"" where none
    does."""
    lower = data.lower()
    for word in self.words:
      if word in lower and (
        not word.isdigit() or re.search(rb"(?<![\d.])" + word + rb"(?!\d)", lower)
      ):
        return word
    return self.salt * (self.salt in data)


def secrets_of(truth: raw_ukb.Truth, salt: str) -> Secrets:
  ids = sorted({visit.eid for visit in truth.visits})
  words = [x.lower().encode() for x in (*ids, *raw_ukb.PLANTED, "_20205_", "_20209_", salt)]
  return Secrets(words, np.array([int(x) for x in ids if x.isdigit()]), bytes.fromhex(salt))


def contents(name: str, data: bytes) -> Iterator[bytes]:
  """The bytes of a file, and what stands compressed or encoded in it."""
  yield data
  if data[:2] == b"\x1f\x8b":
    yield from contents("", gzip.decompress(data))
  elif data[:4] == b"PK\x03\x04":
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      for member in archive.namelist():
        yield member.encode()
        yield from contents(member, archive.read(member))
  elif data[:4] == b"PAR1":
    table = pq.read_table(io.BytesIO(data))
    yield repr(table.schema.to_string(show_schema_metadata=True, truncate_metadata=False)).encode()
    for column in table.column_names:
      if column not in OF_EMBED:
        yield repr(table.column(column).to_pylist()).encode()
  elif data[:4] == b"\x89PNG":
    yield repr(Image.open(io.BytesIO(data)).info).encode()


def arrays(data: bytes) -> Iterator[np.ndarray]:
  """The arrays of numbers in a file."""
  if data[:4] == b"PK\x03\x04":
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      members = [archive.read(name) for name in archive.namelist() if name.endswith(".npy")]
  else:
    members = [data] if data[:6] == b"\x93NUMPY" else []
  for member in members:
    if (array := np.load(io.BytesIO(member))).dtype.kind in "iuf":
      yield array


def found_in(file: pathlib.Path, secrets: Secrets) -> list[bytes]:
  """What of the secrets stands in a file or in its name."""
  data = file.read_bytes() if file.is_file() else b""
  texts = file.name.encode(), *contents(file.name, without_paths(data))
  seen = [word for text in texts if (word := secrets.first(text))]
  return seen + [
    str(x).encode() for array in arrays(data) for x in np.intersect1d(array, secrets.numbers)
  ]


def without_paths(data: bytes) -> bytes:
  """A table of `mmcl embed` without OF_EMBED, which is compressed or not as Parquet likes."""
  if data[:4] != b"PAR1":
    return data
  buffer, table = io.BytesIO(), pq.read_table(io.BytesIO(data))
  pq.write_table(
    table.drop_columns([name for name in OF_EMBED if name in table.column_names]), buffer
  )
  return buffer.getvalue()


def test_no_output_names_anybody(made):
  outputs = made.outputs()
  kinds = {file.suffix for file in outputs if file.is_file()}
  assert {".json", ".html", ".npz", ".parquet", ".png", ".stablehlo", ".md", ".csv"} <= kinds, kinds
  found = {
    str(file.relative_to(made.folder)): seen
    for file in outputs
    if (seen := found_in(file, made.secrets))
  }
  assert not found


def test_no_record_names_anybody(made):
  """Records are compressed in their files."""
  records = 0
  for source in cohort_lib.load(str(made.folder / "cohort")).splits.values():
    for i in range(len(source)):
      for name, value in source[i].items():
        array = np.asarray(value)
        assert not made.secrets.first(array.tobytes()), name
        assert not np.intersect1d(array, made.secrets.numbers).size or array.dtype == np.uint8, name
      records += 1
  assert records > 15


def test_nothing_printed_names_anybody(made):
  assert all(
    line in made.printed
    for line in (
      b"records kept",
      b"trained to step",
      b"recordings embedded",
      b"encoder.stablehlo",
      b"train.png",
    )
  )
  assert not made.secrets.first(made.printed)


def test_damaged_files_were_met_and_told_without_names(made):
  """The proof that there was something to tell: reasons stand in the report and in the table of
  embeddings."""
  quality = json.loads((made.folder / "cohort/quality.json").read_text())
  lost = [fault for fault in FAULTS if fault.lost]
  reasons = [entry["reason"] for entry in quality["rejected"]]
  assert len(reasons) >= len(lost) and all(
    any(re.search(fault.report, reason) for reason in reasons) for fault in lost
  )
  rows = pq.read_table(made.folder / "embedded").to_pylist()
  assert 3 <= sum(row["status"] == "rejected" for row in rows) < len(rows)
  assert all(row["reason"] for row in rows if row["status"] == "rejected")
  assert any(made.secrets.first(row["path"].encode()) for row in rows), (
    "the paths are the user's own words"
  )


def test_the_private_folder_alone_holds_them(made):
  ids = {visit.eid for visit in made.truth.visits}
  text = (made.folder / "private/participants.csv").read_text()
  assert all(f",{name}\n" in text for name in ids)
  for file in (made.folder / "private").iterdir():
    assert file.stat().st_mode & 0o077 == 0, file
  assert (made.folder / "private").stat().st_mode & 0o077 == 0


def test_a_run_that_fails_names_nobody(made, tmp_path):
  """Nothing but damaged files: what is printed, and what is left half-way, to be gone on from."""
  names = (
    "ECG cut",
    "ECG with an entity bomb",
    "zip cut",
    "DICOM of garbage",
    "DICOM of another size",
  )
  spoilt = {visit.eid for visit in made.truth.visits if visit.fault in names}
  bulk = pathlib.Path(made.truth.folder) / "Bulk"
  for file in bulk.rglob("*_*"):
    if file.name.partition("_")[0] in spoilt:
      copy = tmp_path / "raw" / "Bulk" / file.relative_to(bulk)
      copy.parent.mkdir(parents=True, exist_ok=True)
      os.link(file, copy)
  printed = prepare(
    tmp_path / "raw", tmp_path / "out", made.folder / "private", "--split=1,0,0", fails=True
  )
  assert b"none of the first 5 records can be read" in printed and b"Traceback" not in printed
  assert not made.secrets.first(printed)
  left = [file for file in tmp_path.rglob("*") if tmp_path / "raw" not in (file, *file.parents)]
  assert not [file for file in left if found_in(file, made.secrets)]


@pytest.mark.parametrize(
  "flags, text",
  (
    (("--withdrawn", "list.csv"), "{id}\nnot an id, {id}\n"),
    (("--withdrawn", "list.csv"), "{id}\n7.38410e+07\n"),
    (("--tables", "list.csv"), "eid,31-0.0\n{id},1,{id}\n"),
    (("--tables", "list.csv"), "{id},{id}\n{id},1\n"),
    (("--tables", "list.csv"), "eid,x\n{id},1\n"),
  ),
)
def test_a_table_that_cannot_be_read_is_not_quoted(made, tmp_path, flags, text):
  from mmcl_jax import prepare as program
  from mmcl_jax.errors import UserError

  (tmp_path / "list.csv").write_text(text.format(id=raw_ukb.eid(0)))
  flags = [str(tmp_path / flag) if flag.endswith(".csv") else flag for flag in flags]
  with pytest.raises(UserError) as caught:
    program.main(
      ["ukb", "--input", f"{made.truth.folder}/Bulk", "--out", f"{tmp_path}/out", *flags]
    )
  assert not made.secrets.first(str(caught.value).encode())
  assert not (tmp_path / "out").exists() and not (tmp_path / "out.private").exists()


def test_the_search_finds_what_is_hidden(made, tmp_path):
  """An id in every container that the search claims to open, also where compression hides it."""
  person, number = raw_ukb.eid(0), int(raw_ukb.eid(2))
  hidden = {
    "a.npz": lambda file: np.savez_compressed(file, x=np.array([person] * 50, dtype="S8")),
    "b.npz": lambda file: np.savez_compressed(file, x=np.array([1, number, 3])),
    "c.npy": lambda file: np.save(file, np.float64([0, number])),
    "d.json.gz": lambda file: file.write_bytes(gzip.compress(f"{person} {person}".encode())),
    "e.zip": lambda file: zipfile.ZipFile(file, "w").writestr(f"{person}.txt", "x"),
    "f.parquet": lambda file: pq.write_table(
      pa.table({"reason": [person] * 99}), file, compression="zstd"
    ),
    "g.parquet": lambda file: pq.write_table(
      pa.table({"n": [number] * 99}), file, compression="zstd"
    ),
    "h.parquet": lambda file: pq.write_table(
      pa.table({"n": [1]}).replace_schema_metadata({"run": person}), file
    ),
    f"{person}.txt": lambda file: file.write_text("x"),
    "i.txt": lambda file: file.write_text(f"id {number}, "),
    "j.bin": lambda file: file.write_bytes(
      bytes.fromhex((made.folder / "private/salt").read_text())
    ),
    "k.html": lambda file: file.write_text(f"<b>{raw_ukb.PLANTED[0].upper()}</b>"),
  }
  for name, write in hidden.items():
    write(tmp_path / name)
  assert [name for name in hidden if not found_in(tmp_path / name, made.secrets)] == []
  pq.write_table(pa.table({"path": [raw_ukb.eid(0)]}), tmp_path / "fine.parquet")
  assert not found_in(tmp_path / "fine.parquet", made.secrets)
