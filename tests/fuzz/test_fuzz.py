"""fuzz.py in short: every target with some damaged inputs; and that the harness counts as lost what
must be."""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest

import fuzz
import fuzz_mutations
from fuzz import Target
from mmcl_jax.data.readers.files import bad_record
from mmcl_jax.errors import BadRecord

INPUTS = 40


def run(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, fuzz.__file__, *arguments], capture_output=True, text=True)


def test_no_damaged_file_ends_a_program(tmp_path):
  done = run(f"--inputs={INPUTS}", f"--out={tmp_path}/fuzz.jsonl")
  assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
  rows = [json.loads(line) for line in (tmp_path / "fuzz.jsonl").read_text().splitlines()]
  assert len(rows) > 25 and all(
    row["inputs"] == INPUTS == row["values"] + row["refusals"] for row in rows
  )
  weak = [row["target"] for row in rows if not 0 < row["values"] < INPUTS]
  assert not weak, f"the damage is too weak or too strong to tell anything of {weak}"


# Readers that must be counted as lost: in a worker this module is imported as --of=test_fuzz.


def make(folder):
  for seed in ("0", "1"):
    (folder / seed).mkdir()
    (folder / seed / "file").write_text(f"seed {seed}\n" * 200)


def text(folder) -> str:
  return (folder / "file").read_text(errors="replace")


def whole(folder) -> bool:
  """The seeds must be read without loss, or the worker does not begin."""
  return text(folder) in ("seed 0\n" * 200, "seed 1\n" * 200)


def losing(lose):
  def read(folder):
    return None if whole(folder) else lose(folder)

  return Target(make, read)


def canary(folder):
  with open(folder.parent / "canary") as file:
    return file.read()


def canary_of_a_library(folder):
  """Opened where no audit hook looks."""
  import pyarrow as pa

  with pa.OSFile(str(folder.parent / "canary")) as file:
    return file.read()


def swallowed(folder):
  """What a reader makes a BadRecord of is a way out all the same."""
  with bad_record("it cannot be read"):
    os.system("true")


def pickled(folder):
  import pickle

  return pickle.loads(b"cbuiltins\nlen\n.")


def made_up(folder):
  exec(compile("1 + 1", "/somewhere/else.py", "exec"))


def refused(folder):
  raise BadRecord("damaged")


def telling(folder):
  raise BadRecord(f"the ECG of {SECRETS[0]}")


SECRETS = ("Quillfeather",)
TARGETS = {
  f"self_{name}": target
  for name, target in {
    "exception": losing(lambda folder: {}["absent"]),
    "exit": losing(lambda folder: sys.exit(1)),
    "sleep": losing(lambda folder: time.sleep(60)),
    "loop": losing(lambda folder: sum(range(10**12))),  # in C, holding Python's lock
    "crash": losing(lambda folder: os.abort()),
    "memory": losing(lambda folder: np.ones(2**25).sum()),
    "canary": losing(canary),
    "library": losing(canary_of_a_library),
    "write": losing(lambda folder: (folder.parent / "made").write_text("x")),
    "remove": losing(lambda folder: os.remove(folder.parent / "absent")),
    "foreign": losing(lambda folder: pathlib.Path("/etc/passwd").read_text()),
    "swallowed": losing(swallowed),
    "pickle": losing(pickled),
    "exec": losing(made_up),
    "telling": losing(telling),
    "refused": losing(refused),
    "fine": Target(make, text),
  }.items()
}
WORDS = {
  "exception": "KeyError",
  "exit": "SystemExit",
  "sleep": "time-out",
  "loop": "time-out",
  "crash": "crash, status -6",
  "memory": "memory: 2",
  "canary": "way out: opens",
  "library": "inotify",
  "write": "way out: writes",
  "remove": "os.remove",
  "foreign": "opens /etc/passwd",
  "swallowed": "os.system",
  "pickle": "pickle.find_class",
  "exec": "exec /somewhere",
  "telling": "tells",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """Some inputs of each of TARGETS: the two seeds, and those that are damaged."""
  out = tmp_path_factory.mktemp("self") / "out.jsonl"
  endless, told = {"self_sleep", "self_loop"}, ""
  # the others must not be stopped on a slow machine
  for limit, names in ((0.5, endless), (10, TARGETS.keys() - endless)):
    done = run(
      "--inputs=4",
      f"--limit={limit}",
      "--memory=128",
      f"--out={out}",
      "--of=test_fuzz",
      "--targets",
      *sorted(names),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    told += done.stdout
  assert told.count("LOST") >= len(WORDS) and "| self_fine | 4 | 4 | 0 | 0 |" in told, told
  return {
    row["target"].removeprefix("self_"): row
    for row in map(json.loads, out.read_text().splitlines())
  }


@pytest.mark.parametrize("name", WORDS)
def test_the_harness_counts_as_lost(rows, name):
  row = rows[name]
  # damage may give a seed again
  assert row["losses"] >= 1 and row["losses"] + row["values"] == row["inputs"] == 4, row
  assert {line.split()[0] for line in row["first"]} <= {f"self_{name}:2", f"self_{name}:3"}
  assert all(WORDS[name] in line for line in row["first"]), row["first"]


def test_values_and_refusals_are_no_losses(rows):
  assert rows["fine"]["values"] == 4
  assert (
    rows["refused"]["refusals"] >= 1
    and rows["refused"]["refusals"] + rows["refused"]["values"] == 4
  )


def test_one_input_is_repeated_and_kept():
  done = run("--only=self_exception:2", "--of=test_fuzz")
  assert done.returncode == 1 and "Traceback" in done.stdout and "KeyError: 'absent'" in done.stdout
  kept = pathlib.Path(done.stdout.rpartition("lies in ")[2].strip())
  assert [file.name for file in kept.iterdir()] == ["file"] and not whole(kept)
  (kept / "file").unlink()
  kept.rmdir()


def test_inputs_follow_from_their_number(tmp_path):
  seeds = [
    {"a.json": b'{"a": [1, 2, {"b": "text"}]}', "b.csv": b"x,y\n1,2\n"},
    {"a.json": b'{"a": []}', "b.csv": b"x\n1\n"},
  ]
  written = []
  for turn in ("first", "second"):
    case = fuzz.Case(tmp_path, seeds)
    for number in range(200) if turn == "first" else reversed(range(200)):
      case.put(number, 0, "target", ("*",))
      written.append(
        (turn, number, tuple(sorted((file.name, file.read_bytes()) for file in tmp_path.iterdir())))
      )
  first, second = (
    {number: files for turn, number, files in written if turn == which}
    for which in ("first", "second")
  )
  assert first == second and len(set(first.values())) > 150


def test_a_finished_target_is_not_read_again(tmp_path):
  command = [
    "--inputs=30",
    f"--out={tmp_path}/out.jsonl",
    "--of=test_fuzz",
    "--targets",
    "self_fine",
  ]
  first, second = run(*command), run(*command)
  assert (
    first.returncode == second.returncode == 0
    and len((tmp_path / "out.jsonl").read_text().splitlines()) == 1
  )
  assert first.stdout.splitlines()[-1] == second.stdout.splitlines()[-1]


@pytest.mark.parametrize(
  "data",
  (
    b"",
    b"a",
    b"\0",
    b"PK\x03\x04",
    b"\x1f\x8b",
    b"\x93NUMPY",
    b"PAR1",
    b"{}",
    b"[1]",
    b"<?xml?><a/>",
  ),
)
def test_damage_takes_any_bytes(data):
  for number in range(300):
    rng = random.Random(number)
    name = rng.choice(("a.json", "a.safetensors", "a"))
    assert isinstance(fuzz_mutations.damaged(rng, name, data, data, ["../x"]), bytes)
