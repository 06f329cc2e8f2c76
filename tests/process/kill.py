"""SIGKILL at random moments: after each the same command runs again, and in the end all is as if
nothing had happened.

    python tests/process/kill.py --kills=100 --out=kill.jsonl        # about 40 minutes on 2 cores; run again, it goes on

A chain is one run of a program that is killed again and again, at a moment drawn anew each time,
until it comes to its end. Then its results are compared with those of a run that nobody disturbed:
arrays, metrics and reports bit for bit, the names of all files, so that none is left over, and the
most disk that it ever took. A JSON line a chain, and a table.
"""

import argparse
import json
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
for folder in ("tests/helpers", "."):
  sys.path.insert(0, str(ROOT / folder))  # this checkout, whatever is installed

import common
import numpy as np
from tqdm import tqdm

HOSTS_S = 60  # a host is given up by the others after 30 s
# a worker that still imports when its parent is killed ends after that, which takes long on a slow
# machine
PATIENCE_S = 180


class Program(NamedTuple):
  """What is killed: `start(folder)` gives one command line a process; `same(folder, reference)`
  tells what differs."""

  share: float  # of the kills
  start: Callable[[pathlib.Path], list[list[str]]]
  same: Callable[[pathlib.Path, pathlib.Path], list[str]]
  # one of the processes is killed and the others must end by themselves
  alone: bool = False


def programs(base: pathlib.Path) -> dict[str, Program]:
  """`base` holds a cohort, and a trained run for the programs that need one."""

  def verb(name, *args):
    return [sys.executable, "-m", f"mmcl_jax.{name}", *map(str, args)]

  flags = ["--config.steps=24", "--config.every.save=3", "--config.every.evaluate=4"]

  def train(folder):
    return verb("train", *common.tiny_flags(base / "cohort", folder / "w"), *flags)

  def hosts(folder):
    with socket.socket() as s:
      s.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{s.getsockname()[1]}"
    return [
      [*train(folder), f"--coordinator={address}", "--processes=2", f"--process={i}"]
      for i in range(2)
    ]

  def copied(folder):
    return (
      folder / "w" if (folder / "w").exists() else shutil.copytree(base / "trained", folder / "w")
    )

  return {
    "train": Program(0.5, lambda folder: [train(folder)], same_training),
    "train, two hosts": Program(0.15, hosts, same_training),
    "train, one of two hosts": Program(0.05, hosts, same_training, alone=True),
    "prepare": Program(
      0.15,
      lambda folder: [
        verb(
          "prepare",
          "synthetic",
          "--subjects=150",
          "--seed=7",
          "--processes=2",
          f"--out={folder / 'w'}",
        )
      ],
      same_cohort,
    ),
    "evaluate": Program(
      0.1, lambda folder: [verb("evaluate", f"--workdir={copied(folder)}")], same_evaluation
    ),
    "embed": Program(
      0.05,
      lambda folder: [
        verb(
          "embed",
          f"--workdir={copied(folder)}",
          f"--input={base / 'ecg'}",
          f"--out={folder / 'out'}",
        )
      ],
      same_tables,
    ),
  }


# -- What must be the same --


def same_names(folder: pathlib.Path, reference: pathlib.Path, besides=()) -> list[str]:
  """Files that only one of them has; contents of orbax's and TensorBoard's folders have names drawn
  at random, and a run that was killed leaves no goodput."""
  left_out = ("/d/", "tensorboard/", "goodput.jsonl", *besides)

  def names(root):
    found = {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}
    return {name for name in found if not any(part in name for part in left_out)}

  return [
    f"{name} is {'left over' if name in names(folder) else 'missing'}"
    for name in sorted(names(folder) ^ names(reference))
  ]


def same_training(folder, reference) -> list[str]:
  from mmcl_jax.training import checkpoint

  found = same_names(folder, reference)
  steps = [checkpoint.steps(str(one / "w")) for one in (folder, reference)]
  if steps[0] != steps[1]:
    return [*found, f"steps {steps[0]}, expected {steps[1]}"]
  for step in steps[0]:
    one, other = (arrays(root / "w", step) for root in (folder, reference))
    found += [
      f"step {step}: {name}"
      for name in one.keys() | other.keys()
      if name not in one
      or name not in other
      or not np.array_equal(one[name], other[name], equal_nan=True)
    ]
  if (folder / "w/metrics.jsonl").read_text() != (reference / "w/metrics.jsonl").read_text():
    found.append("metrics.jsonl")
  return found


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  """All arrays of a checkpoint, as they lie there, whatever number of hosts wrote them."""
  import jax
  import orbax.checkpoint as ocp

  folder = workdir.absolute() / "checkpoints" / str(step) / "state"
  with ocp.PyTreeCheckpointer() as reader:
    as_numpy = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).item_metadata.tree
    )
    state = reader.restore(folder, restore_args=as_numpy)
  return {
    jax.tree_util.keystr(path): np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(state)
  }


def same_cohort(folder, reference) -> list[str]:
  from mmcl_jax.data import cohort as cohort_lib

  found = same_names(folder, reference)
  one, other = (cohort_lib.load(str(root / "w")) for root in (folder, reference))
  # Names of the files and not their sizes: protocol buffers give a record other bytes, and a file
  # another length, in another process.
  said = [
    which.info | {name: sorted(which.info[name]) for name in ("files", "checksums")}
    for which in (one, other)
  ]
  found += [
    f"cohort.json: {name}" for name in said[0] | said[1] if said[0].get(name) != said[1].get(name)
  ]
  subjects = [cohort_lib.subjects(which) for which in (one, other)]
  for split in one.splits:
    found += [f"subjects of {split}"] * (not np.array_equal(subjects[0][split], subjects[1][split]))
    found += [
      f"record {i} of {split}"
      for i in range(len(other.splits[split]))
      if any(
        not np.array_equal(x, one.splits[split][i][name], equal_nan=x.dtype.kind == "f")
        for name, x in other.splits[split][i].items()
      )
    ]
  return found


def same_evaluation(folder, reference) -> list[str]:
  """But for how often the test split was scored, which counts every try."""
  found = same_names(folder, reference)
  results = [
    json.loads(next(one.glob("w/evaluation/*/results.json")).read_text())
    | {"test_scored": 0, "workdir": ""}
    for one in (folder, reference)
  ]
  found += [
    name for name in results[0] if json.dumps(results[0][name]) != json.dumps(results[1].get(name))
  ]
  for file in ("predictions.npz", "probes.npz"):
    one, other = (
      dict(np.load(next(root.glob(f"w/evaluation/*/{file}")))) for root in (folder, reference)
    )
    found += [
      f"{file}: {name}"
      for name in one.keys() | other.keys()
      if name not in one
      or name not in other
      or not np.array_equal(one[name], other[name], equal_nan=one[name].dtype.kind == "f")
    ]
  return found


def same_tables(folder, reference) -> list[str]:
  """But for the name of the workdir, which a part says in its footer."""
  import pyarrow.parquet as pq

  found = same_names(folder, reference)
  if found:
    return found
  for file in (folder / "out").glob("*.parquet"):
    one, other = pq.read_table(file), pq.read_table(reference / "out" / file.name)
    about = [json.loads(table.schema.metadata[b"mmcl_jax"]) for table in (one, other)]
    for said in about:
      del said["run"]["--workdir"]
    if not one.equals(other) or about[0] != about[1]:
      found.append(file.name)
  return found


# -- Running, killing --


def run(
  program: Program, folder: pathlib.Path, kill_after: float | None, rng: random.Random
) -> tuple[bool, float]:
  """Starts the program once; kills it `kill_after` s after its start. (Did it come to its end?,
  seconds it ran)"""
  folder.mkdir(exist_ok=True)
  with open(folder.with_suffix(".log"), "a") as log:
    running = [
      subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=ROOT)
      for command in program.start(folder)
    ]
    start = time.monotonic()
    try:
      while any(one.poll() is None for one in running):
        if kill_after is not None and time.monotonic() - start >= kill_after:
          for one in rng.sample(running, 1) if program.alone else running:
            one.kill()
          if program.alone:
            for one in running:
              one.wait(timeout=HOSTS_S)
          break
        time.sleep(0.005)
      statuses = [one.wait(timeout=HOSTS_S) for one in running]
    finally:
      for one in running:
        one.kill()
  orphans = wait_for_sessions([one.pid for one in running])
  if orphans:
    raise RuntimeError(f"processes {orphans} outlived the program")
  failed = [status for status in statuses if status not in (0, -signal.SIGKILL)]
  if failed and not program.alone:
    raise RuntimeError(
      f"it ended with status {failed[0]}: {folder.with_suffix('.log').read_text()[-500:]}"
    )
  return all(status == 0 for status in statuses), time.monotonic() - start


def wait_for_sessions(sessions: list[int], patience: float = PATIENCE_S) -> list[int]:
  """Processes of these sessions that are still there after a while: nobody may outlive the program
  that started it."""
  deadline = time.monotonic() + patience
  while True:
    left = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
      try:
        fields = stat.read_text().rpartition(")")[2].split()
      except OSError:
        continue
      if int(fields[3]) in sessions and fields[0] != "Z":
        left.append(int(stat.parent.name))
    if not left or time.monotonic() > deadline:
      return left
    time.sleep(0.1)


def size(folder: pathlib.Path) -> int:
  return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def chain(name: str, program: Program, base: pathlib.Path, kills: int, seed: int) -> dict:
  """Kills at most `kills` times, then lets it come to its end, and compares."""
  rng, reference = random.Random(f"{name} {seed}"), base / f"reference {name}"
  timing = reference.with_suffix(".seconds")
  if not timing.exists():  # the second run finds all compiled, as all after it do
    for _ in range(2):
      shutil.rmtree(reference, ignore_errors=True)
      _, seconds = run(program, reference, None, rng)
    timing.write_text(str(seconds))
  usual, folder = float(timing.read_text()), base / f"{name} {seed}"
  shutil.rmtree(folder, ignore_errors=True)
  moments, most, trouble = [], 0, []
  try:
    done = False
    while not done:
      moment = rng.uniform(0, usual) if len(moments) < kills else None
      done, seconds = run(program, folder, moment, rng)
      if not done:
        moments.append(round(moment, 2))
      most = max(most, size(folder))
    trouble = program.same(folder, reference)
  except (RuntimeError, subprocess.TimeoutExpired) as error:
    trouble = [" ".join(str(error).split())[-600:]]
  if not trouble:
    shutil.rmtree(folder)
    folder.with_suffix(".log").unlink()
  return {
    "program": name,
    "seed": seed,
    "kills": len(moments),
    "moments_s": moments,
    "usual_s": round(usual, 1),
    "disk_of_usual": round(most / size(reference), 2),
    "differs": trouble[:5],
  }


def make_base(base: pathlib.Path, evaluated: bool = False) -> None:
  """A cohort and a run trained on it, once; with `evaluated` also its probes and some recordings,
  for embed."""
  if (base / "made").exists():
    return
  import wfdb

  from mmcl_jax import evaluate, prepare, train

  cohort = prepare.prepare_synthetic(
    str(base / "cohort"),
    common.SUBJECTS,
    seed=7,
    shares=common.SHARES,
    profile="minimal",
    processes=2,
  )
  train.main(common.tiny_flags(base / "cohort", base / "trained"))
  if not evaluated:
    return
  evaluate.evaluate(str(base / "trained"))
  (base / "ecg").mkdir(exist_ok=True)
  for i in range(12):
    record = cohort.splits["train"][i]
    wfdb.wrsamp(
      f"r{i}",
      fs=500,
      units=["mV"] * 12,
      sig_name=["I", "II", "III", "aVR", "aVL", "aVF", *(f"V{k}" for k in range(1, 7))],
      p_signal=(record["ecg"] * record["ecg_scale"]).T.astype(float),
      fmt=["16"] * 12,
      write_dir=str(base / "ecg"),
    )
  (base / "made").touch()


def table(lines: list[dict]) -> str:
  rows = [
    "| program | runs | killed | the same in the end | lost | most disk, of an undisturbed run |",
    "|" + "---|" * 6,
  ]
  for name in dict.fromkeys(line["program"] for line in lines):
    some = [line for line in lines if line["program"] == name]
    lost = sum(bool(line["differs"]) for line in some)
    rows.append(
      f"| {name} | {len(some)} | {sum(line['kills'] for line in some)} | {len(some) - lost} | "
      f"{lost} | "
      f"{max(line['disk_of_usual'] for line in some):.2f} |"
    )
  return "\n".join(rows)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--kills", type=int, default=100)
  parser.add_argument(
    "--chain", type=int, default=5, help="kills a run, at most (default %(default)s)"
  )
  parser.add_argument("--only", nargs="+", help="some of the programs")
  parser.add_argument(
    "--base", help="folder of the cohort and of what is under way (default: a temporary one)"
  )
  parser.add_argument("--out", default="kill.jsonl")
  args = parser.parse_args()
  out = pathlib.Path(args.out)
  lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
  base = pathlib.Path(args.base or tempfile.mkdtemp(prefix="kill-"))
  base.mkdir(exist_ok=True)
  make_base(base, evaluated=True)
  chosen = {
    name: program for name, program in programs(base).items() if not args.only or name in args.only
  }
  wanted = {name: round(args.kills * program.share) for name, program in chosen.items()}
  done = {name: sum(line["kills"] for line in lines if line["program"] == name) for name in chosen}
  with tqdm(
    total=sum(wanted.values()),
    initial=sum(min(done[name], wanted[name]) for name in chosen),
    unit="kill",
  ) as progress:
    for name, program in chosen.items():
      while done[name] < wanted[name]:
        seed = sum(line["program"] == name for line in lines)
        found = chain(name, program, base, min(args.chain, wanted[name] - done[name]), seed)
        lines.append(found)
        with open(out, "a") as file:
          file.write(json.dumps(found) + "\n")
        done[name] += found["kills"]
        progress.update(found["kills"])
        if found["differs"]:
          tqdm.write(f"LOST {name} {seed}: {found['differs']}")
        if not found["kills"] and found["differs"]:
          break  # it fails without being killed
  print(table(lines))
  sys.exit(any(line["differs"] for line in lines))


if __name__ == "__main__":
  main()
