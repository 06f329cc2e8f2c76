"""Damages files by the thousand and reads them: every outcome but a value, a BadRecord or a
UserError is a loss.

    python tests/fuzz/fuzz.py --inputs=2000 --out=fuzz.jsonl
    python tests/fuzz/fuzz.py --only wfdb:17

What is damaged and who reads it stands in fuzz_targets.py, the damage in fuzz_mutations.py. Input N
of a target follows from --seed, the target and N alone (but for the times that orbax and tfds write
into what they make). A worker process reads one input after the other and is started anew where it
dies. An input is lost by

  another exception    or a BadRecord that is not one line or tells a name of the person in the file
  a crash, a time-out  --limit seconds, from a watchdog thread of C, which ends what holds Python's
  lock too
  memory               --memory MiB of resident memory beyond what the worker had, by the kernel's
                       high-water mark. Address space is limited too, generously (RLIMIT_AS, 4 GiB
                       more than the idle worker maps), so that an allocation without bound cannot
                       take the machine; it is no measure, for maps of files count there
  a way out            a file opened that is neither of the input nor of Python and its packages, a
                       file made, changed or removed outside the input's folder, a program started,
                       a connection, code run that is in no file, a class that a pickle names. Audit
                       hooks see what Python does, inotify on the canaries (files beside the input,
                         where damaged paths lead) what libraries in C++ and Rust do.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import pathlib
import random
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CANARIES = (
  "canary",
  "canary.hea",
  "canary.dat",
  "canary.mat",
  "canary.json",
  "canary.csv",
  "canary.npz",
)
ADDRESS_SPACE = 4 * 2**30  # bytes beyond those of the idle worker
TOLD = 5  # losses of a target that are told in a line each
SLOW = 6  # a slow target gets a sixth of the inputs, ...
FEWEST = 300  # ... at least so many


class Target(NamedTuple):
  """What is damaged and read.

  make: fills a folder with seeds, sub-folders that hold one valid input each.
  read: reads such a folder as the programs do.
  damaged: patterns (PurePath.match) of the files that are damaged.
  slow: gets fewer inputs.
  """

  make: Callable[[pathlib.Path], None]
  read: Callable[[pathlib.Path], Any]
  damaged: tuple[str, ...] = ("*",)
  slow: bool = False


def inputs_of(target, inputs: int) -> int:
  return min(inputs, max(FEWEST, inputs // SLOW)) if target.slow else inputs


# The worker


class Watch:
  """Sees ways out of the input's folder while `armed`."""

  DOORS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "socket.getaddrinfo",
    "pickle.find_class",
    "pty.spawn",
    "ctypes.dlopen",
    "webbrowser.open",
  )
  CHANGES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
    "shutil.rmtree",
    "shutil.move",
  )
  IN_OPEN, IN_CREATE, IN_DELETE, IN_MODIFY, IN_MOVED, IN_ISDIR = (
    0x20,
    0x100,
    0x200,
    0x2,
    0xC0,
    0x40000000,
  )

  def __init__(self, work: pathlib.Path, case: pathlib.Path):
    self.own = tuple(os.path.realpath(path) + os.sep for path in (case, work / "tmp"))
    readable = {
      sys.prefix,
      sys.base_prefix,
      *sys.path,
      ROOT / "mmcl_jax",
      ROOT / "configs",
      "/proc",
      "/sys",
      "/dev/urandom",
      "/usr/share/zoneinfo",
      "/usr/lib",
      "/lib",
      "/usr/share/fonts",
      "/usr/share/mime",
      "/etc/localtime",
      "/etc/mime.types",
    }
    self.readable = tuple(os.path.realpath(path) + os.sep for path in readable if path)
    self.armed, self.seen = False, []
    self.libc = ctypes.CDLL(None, use_errno=True)
    self.inotify = self.libc.inotify_init1(os.O_NONBLOCK)
    mask = self.IN_OPEN | self.IN_CREATE | self.IN_DELETE | self.IN_MODIFY | self.IN_MOVED
    for folder in (work, case.parent):
      if self.libc.inotify_add_watch(self.inotify, os.fsencode(folder), mask) < 0:
        raise OSError(ctypes.get_errno(), "inotify")
    sys.addaudithook(self.hook)

  def begin(self):
    with contextlib.suppress(BlockingIOError):  # what the harness itself did
      while os.read(self.inotify, 2**16):
        pass
    self.seen.clear()
    self.armed = True

  def end(self) -> list[str]:
    """What was seen since `begin`."""
    self.armed = False
    with contextlib.suppress(BlockingIOError):
      events = os.read(self.inotify, 2**16)
      while events:
        _, mask, _, length = struct.unpack("iIII", events[:16])
        name, events = events[16 : 16 + length].rstrip(b"\0").decode(), events[16 + length :]
        if name.startswith("canary") or mask & (self.IN_CREATE | self.IN_DELETE | self.IN_MOVED):
          self.seen.append(f"inotify {mask & 0xFFF:#x} {name}")
    return list(dict.fromkeys(self.seen))

  def hook(self, event, arguments):
    if not self.armed:
      return
    if event == "open":
      path, mode, flags = arguments
      writes = (
        (mode or "r")[0] in "wax" or "+" in (mode or "") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
      )
      if isinstance(path, (str, bytes)) and not self.allowed(
        path, self.own if writes else self.own + self.readable
      ):
        self.seen.append(f"{'writes' if writes else 'opens'} {os.fsdecode(path)[-80:]}")
    elif event in self.CHANGES:
      paths = [x for x in arguments[:2] if isinstance(x, (str, bytes, os.PathLike))]
      if event in ("os.symlink", "os.link"):
        paths = paths[-1:]  # where the link is made; opening it is seen as itself
      for path in paths:
        if not self.allowed(os.fspath(path), self.own):
          self.seen.append(f"{event} {os.fsdecode(path)[-80:]}")
    elif event in self.DOORS:
      self.seen.append(f"{event} {str(arguments)[:80]}")
      raise Forbidden(event)
    elif event == "exec":
      name = getattr(arguments[0], "co_filename", "")
      if (
        name not in GENERATED
        and not name.startswith("<frozen")
        and not self.allowed(name, self.readable)
      ):
        self.seen.append(f"exec {name[-80:]}")

  def allowed(self, path, folders) -> bool:
    path = os.fsdecode(path)
    if "\0" in path or not path:
      return True  # cannot be opened
    real = os.path.realpath(path)
    return real == os.devnull or (real + os.sep).startswith(folders)


# File names of code that libraries make up: namedtuples, dataclasses and NumPy's, jax's and
# pydicom's helpers.
GENERATED = ("<string>", "<__array_function__ internals>")


class Forbidden(BaseException):
  """Not an Exception, so that no reader turns it into a BadRecord."""


class Case:
  """The folder of an input: files of a seed, one of them damaged."""

  def __init__(self, folder: pathlib.Path, seeds: list[dict[str, bytes]]):
    self.folder, self.seeds, self.now = folder, seeds, {}
    self.escapes = escapes(folder)
    # of the target before; the folder itself is where the worker stands
    for path in folder.iterdir():
      shutil.rmtree(path) if path.is_dir() else path.unlink()

  def put(self, number: int, seed: int, name: str, patterns: tuple[str, ...]) -> None:
    """Writes input `number`: the first ones are the seeds as they are."""
    from fuzz_mutations import damaged

    rng = random.Random(f"{seed} {name} {number}")
    seeds = self.seeds
    which = number if number < len(seeds) else rng.randrange(len(seeds))
    files = dict(seeds[which])
    if number >= len(seeds):
      for chosen in rng.sample(matching(files, patterns), k=1):
        others = [one[chosen] for one in seeds if chosen in one] or [files[chosen]]
        files[chosen] = damaged(rng, chosen, files[chosen], rng.choice(others), self.escapes)
    self.write(files)

  def write(self, files: dict[str, bytes]) -> None:
    if not self.folder.is_dir():
      self.now = {}
    there = [os.path.join(top, name) for top, _, names in os.walk(self.folder) for name in names]
    prefix = len(str(self.folder)) + 1
    for path in there:
      if path[prefix:] not in files:
        os.unlink(path)
    there = {path[prefix:] for path in there}
    for name, content in files.items():
      if self.now.get(name) is content and name in there:
        continue
      path = self.folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.unlink(missing_ok=True)  # a new file: the old one may still be mapped
      path.write_bytes(content)
      path.chmod(0o600)
    self.now = files

  def after(self) -> None:
    """Folders that a reader made go, and files that it may have changed count as unknown."""
    known = {str(parent) for name in self.now for parent in pathlib.PurePath(name).parents}
    for top, folders, names in os.walk(self.folder):
      for folder in list(folders):
        path = os.path.join(top, folder)
        if os.path.relpath(path, self.folder) not in known:
          shutil.rmtree(path, ignore_errors=True)
          folders.remove(folder)
      for name in names:
        path = os.path.join(top, name)
        content = self.now.get(relative := os.path.relpath(path, self.folder))
        now = os.stat(path)
        if content is None or now.st_mode & 0o777 != 0o600 or now.st_size != len(content):
          self.now = {kept: x for kept, x in self.now.items() if kept != relative}


def matching(files: dict[str, bytes], patterns: tuple[str, ...]) -> list[str]:
  found = sorted(
    name for name in files if any(pathlib.PurePath(name).match(pattern) for pattern in patterns)
  )
  assert found, f"no file of a seed matches {patterns}: {sorted(files)}"
  return found


def escapes(case: pathlib.Path) -> list[str]:
  """Path-like texts; most lead to a canary, some through a folder that is there."""
  up = [
    f"{'../' * depth}{name}"
    for depth in (1, 2, 3, 4)
    for name in ("canary", "canary.dat", "canary.npz")
  ]
  absolute = [
    str(case.parent / "canary"),
    str(case.parent / "canary.dat"),
    str(case.parent.parent / "canary.hea"),
  ]
  return [
    *up,
    *absolute,
    "/etc/passwd",
    f"file://{case.parent}/canary",
    "http://127.0.0.1:9/x",
    "~/.ssh/id_rsa",
    "..",
    "/",
    ".",
    "../",
    "a/../../canary",
    "..\\canary",
    "/dev/stdin",
    "s3://127.0.0.1/x",
    "canary::file",
    "$HOME",
    "`id`",
    "nul",
    "a" * 300,
  ]


def memory() -> tuple[int, int]:
  """Bytes resident now, and at most since `clear_peak`."""
  with open("/proc/self/status") as file:
    found = dict(line.split(":", 1) for line in file if line.startswith(("VmRSS", "VmHWM")))
  return int(found["VmRSS"].split()[0]) * 1024, int(found["VmHWM"].split()[0]) * 1024


def clear_peak():
  with open("/proc/self/clear_refs", "w") as file:
    file.write("5")


def worker(work: pathlib.Path, module: str, limit: float, most_mib: int) -> None:
  """Reads jobs from stdin, a JSON line each, and answers with a JSON line an input."""
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  log = os.open(work / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  os.dup2(log, 2)
  faulthandler.enable(log)
  targets, secrets = find_targets(module), secrets_of(module)
  case = work / "in" / "case"
  case.mkdir(parents=True, exist_ok=True)
  os.chdir(case)  # where relative paths lead
  watch, name = None, None
  for line in sys.stdin:
    job = json.loads(line)
    target = targets[job["target"]]
    if name != job["target"]:
      name = job["target"]
      seeds = seeds_of(work, name, target)
      current = Case(case, seeds)
      # imports what is imported late, and is the proof that the seeds are good
      for number in range(len(seeds)):
        current.put(number, 0, name, target.damaged)
        with warnings.catch_warnings():
          warnings.simplefilter("ignore")
          target.read(case)
        current.after()
      watch = watch or Watch(work, case)
      pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
      soft = pages * resource.getpagesize() + ADDRESS_SPACE
      resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))
    for number in job["numbers"]:
      current.put(number, job["seed"], name, target.damaged)
      answers.write(
        json.dumps([number, *one(target, case, watch, secrets, limit, most_mib, log, job["trace"])])
        + "\n"
      )
      current.after()
    answers.write("[-1]\n")


def one(target, case, watch, secrets, limit, most_mib, log, trace) -> tuple[str, str, int]:
  """(value, refusal or loss; what is told of it; MiB that it took) of the input that lies in
  `case`."""
  from mmcl_jax.errors import BadRecord, UserError

  kind, told = "value", ""
  faulthandler.dump_traceback_later(limit, exit=True, file=log)
  clear_peak()
  before, _ = memory()
  watch.begin()
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      target.read(case)
  except (BadRecord, UserError) as error:
    kind, told = "refusal", f"{type(error).__name__}: {error}"
    if bad := wrong_words(error, secrets):
      kind, told = "loss", f"{bad}: {told}"
  except (Exception, SystemExit, Forbidden) as error:
    kind, told = "loss", f"{type(error).__name__}: {error} at {frame(error)}"
    if trace:
      told += "\n" + "".join(traceback.format_exception(error))
  finally:
    ways = watch.end()
    faulthandler.cancel_dump_traceback_later()
  grown = max(memory()[1] - before, 0) // 2**20
  if ways:
    kind, told = "loss", f"way out: {'; '.join(ways)[:300]} ({told[:200]})"
  elif grown > most_mib:
    kind, told = "loss", f"memory: {grown} MiB ({told[:200]})"
  return kind, told if trace else " ".join(told.split())[:400], grown


def wrong_words(error, secrets) -> str:
  """What must not be in the words of a refusal: line breaks in reasons, names of the person."""
  from mmcl_jax.errors import BadRecord

  text = str(error)
  if isinstance(error, BadRecord) and ("\n" in text or len(text) > 1000):
    return "not one line"
  return next((f"tells {secret}" for secret in secrets if secret in text), "")


def frame(error) -> str:
  """The innermost line of the package that the error went through."""
  frames = traceback.extract_tb(error.__traceback__)
  frames = [one for one in frames if "/mmcl_jax/" in one.filename] or frames[-1:]
  return " < ".join(
    f"{one.filename.partition('mmcl_jax/')[2] or pathlib.Path(one.filename).name}:{one.lineno}"
    for one in frames[:-4:-1]
  )


def find_targets(module: str) -> dict[str, Target]:
  """The TARGETS of a module beside this one."""
  return importlib.import_module(module).TARGETS


def secrets_of(module: str) -> tuple[str, ...]:
  """What stands in the seeds of a module and must not be told."""
  return importlib.import_module(module).SECRETS


def seeds_of(work, name, target) -> list[dict[str, bytes]]:
  """The files of each seed, made once."""
  from fuzz_mutations import settled

  folder = work / "seeds" / name
  if not (folder / "whole").exists():
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    target.make(folder)
    (folder / "whole").touch()
  return [
    {
      str(file.relative_to(seed)): settled(file.read_bytes())
      for file in sorted(seed.rglob("*"))
      if file.is_file()
    }
    for seed in sorted(folder.iterdir())
    if seed.is_dir()
  ]


# The parent


class Workers:
  """One worker at a time, started anew where it has died."""

  def __init__(self, work: pathlib.Path, args):
    self.work, self.args, self.process, self.rest = work, args, None, b""

  def start(self):
    # A heap that keeps what was freed would hide what an input takes; jax needs no second device
    # here.
    env = {name: x for name, x in os.environ.items() if name != "GLIBC_TUNABLES"}
    env |= {"TMPDIR": str(self.work / "tmp"), "JAX_PLATFORMS": "cpu"}
    env |= {
      "OMP_NUM_THREADS": "1",
      "OPENBLAS_NUM_THREADS": "1",
      "TF_CPP_MIN_LOG_LEVEL": "3",
      "PYTHONHASHSEED": "0",
      "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [
      sys.executable,
      str(HERE / "fuzz.py"),
      f"--worker={self.work}",
      f"--of={self.args.of}",
      f"--limit={self.args.limit}",
      f"--memory={self.args.memory}",
    ]
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=ROOT
    )
    self.rest = b""

  def read(self, target: str, numbers: list[int], trace: bool = False):
    """Yields (number, kind, told, MiB) of each input, also of those that a worker died of."""
    numbers, again = list(numbers), set()
    while numbers:
      if self.process is None or self.process.poll() is not None:
        self.start()
      job = {"target": target, "numbers": numbers, "seed": self.args.seed, "trace": trace}
      with contextlib.suppress(BrokenPipeError):
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()
      begun = False
      while (answer := self.line()) is not None and answer[0] >= 0:
        begun = True
        numbers.remove(answer[0])
        yield tuple(answer)
      if answer is not None or not numbers:
        continue
      code, text = self.process.wait(), (self.work / "log").read_text(errors="replace")
      if not begun and "Timeout (" not in text and code > 0:
        raise SystemExit(f"the worker cannot begin with {target}:\n{text[-3000:]}")
      stopped = "Timeout (" in text
      if stopped and numbers[0] not in again:  # a busy machine may hold up any input once
        again.add(numbers[0])
        continue
      where = next((line.strip() for line in text.splitlines() if "/mmcl_jax/" in line), "")
      kind = f"time-out of {self.args.limit:g} s" if stopped else f"crash, status {code}"
      yield numbers.pop(0), "loss", f"{kind} {where}" + (f"\n{text[-4000:]}" if trace else ""), 0

  def line(self):
    """The worker's next answer; None where it has died. One that the watchdog did not end is ended
    here."""
    fd = self.process.stdout.fileno()
    while b"\n" not in self.rest:
      if not select.select([fd], [], [], 120 + 2 * self.args.limit)[0]:
        self.process.kill()
      if not (part := os.read(fd, 2**16)):
        return None
      self.rest += part
    line, self.rest = self.rest.split(b"\n", 1)
    return json.loads(line)

  def close(self):
    if self.process is not None and self.process.poll() is None:
      self.process.kill()
      self.process.wait()


def fuzz(workers: Workers, name: str, count: int, told) -> dict:
  """Reads `count` inputs of a target; the line of --out."""
  kinds, losses, peak, start, shown = (
    {"value": 0, "refusal": 0, "loss": 0},
    [],
    0,
    time.time(),
    time.time(),
  )
  for done, (number, kind, text, mib) in enumerate(workers.read(name, list(range(count))), 1):
    kinds[kind] += 1
    peak = max(peak, mib)
    if kind == "loss":
      losses.append(f"{name}:{number} {text}")
    if time.time() - shown > 10:
      shown = time.time()
      told(f"  {name}: {done} of {count}, {done / (shown - start):.0f}/s, {kinds['loss']} lost")
  return {
    "target": name,
    "seed": workers.args.seed,
    "inputs": count,
    "values": kinds["value"],
    "refusals": kinds["refusal"],
    "losses": kinds["loss"],
    "first": losses[:TOLD],
    "lost": [int(line.split()[0].rpartition(":")[2]) for line in losses],
    "seconds": round(time.time() - start, 1),
    "peak_mib": peak,
  }


def table(rows: list[dict]) -> str:
  """Markdown."""
  lines = [
    "| target | inputs | values | refusals | losses | seconds | inputs/s | peak MiB |",
    "|" + "---|" * 8,
  ]
  for row in rows:
    rate = row["inputs"] / max(row["seconds"], 0.1)
    counts = " | ".join(f"{row[name]:,}" for name in ("inputs", "values", "refusals", "losses"))
    lines.append(
      f"| {row['target']} | {counts} | {row['seconds']:.0f} | {rate:.0f} | {row['peak_mib']} |"
    )
  return "\n".join(lines)


@contextlib.contextmanager
def workplace():
  """A folder with canaries; in memory where that can be, for a disk takes milliseconds to replace a
  file."""
  shared = pathlib.Path("/dev/shm")
  with tempfile.TemporaryDirectory(
    prefix="mmcl_fuzz_", dir=shared if os.access(shared, os.W_OK) else None
  ) as name:
    work = pathlib.Path(name).resolve()
    for folder in (work / "in", work / "tmp", work / "seeds"):
      folder.mkdir()
    for folder in (work, work / "in"):
      for canary in CANARIES:
        (folder / canary).write_text("a canary: reading it means to have left the folder\n" * 100)
    yield work


def parse(argv):
  parser = argparse.ArgumentParser(
    description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--inputs",
    type=int,
    default=2000,
    help=f"of each target; a slow one gets 1/{SLOW}, at least {FEWEST}",
  )
  parser.add_argument("--targets", nargs="+", metavar="NAME", help="default: all")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--out", help="JSON lines, one a target; those that are there are not read again"
  )
  parser.add_argument(
    "--only", metavar="TARGET:N", help="one input, with its traceback; it is kept in a folder"
  )
  parser.add_argument("--limit", type=float, default=10, help="seconds for an input")
  parser.add_argument("--memory", type=int, default=512, help="MiB for an input")
  parser.add_argument(
    "--of",
    default="fuzz_targets",
    metavar="MODULE",
    help="beside this file, with TARGETS (default %(default)s)",
  )
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  return parser.parse_args(argv)


def main(argv=None) -> int:
  args = parse(argv)
  sys.path.insert(0, str(HERE))
  if args.worker:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker(pathlib.Path(args.worker), args.of, args.limit, args.memory)
    return 0
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no folder behind
  with workplace() as work:
    workers = Workers(work, args)
    try:
      return repeat(workers, args) if args.only else run(workers, args)
    finally:
      workers.close()


def repeat(workers: Workers, args) -> int:
  """--only: one input, told at length."""
  name, _, number = args.only.rpartition(":")
  ((_, kind, text, mib),) = workers.read(name, [int(number)], trace=True)
  kept = pathlib.Path(tempfile.mkdtemp(prefix=f"fuzz_{name}_{number}_"))
  shutil.copytree(workers.work / "in" / "case", kept, dirs_exist_ok=True)
  print(f"{kind}: {text}\n{mib} MiB; the input lies in {kept}")
  return int(kind == "loss")


def run(workers: Workers, args) -> int:
  targets = find_targets(args.of)
  if unknown := set(args.targets or ()) - targets.keys():
    raise SystemExit(f"no target {', '.join(sorted(unknown))}; there are {', '.join(targets)}")
  out, rows = pathlib.Path(args.out) if args.out else None, []
  there = (
    [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []
  )
  for name in args.targets or targets:
    count = inputs_of(targets[name], args.inputs)
    row = next(
      (
        row
        for row in there
        if (row["target"], row["seed"], row["inputs"]) == (name, args.seed, count)
      ),
      None,
    )
    if row is None:
      row = fuzz(workers, name, count, lambda text: print(text, flush=True))
      if out:
        with open(out, "a") as file:
          file.write(json.dumps(row) + "\n")
    rows.append(row)
    counts = ", ".join(f"{row[what]} {what}" for what in ("inputs", "values", "refusals", "losses"))
    print(f"{name}: {counts}, {row['inputs'] / max(row['seconds'], 0.1):.0f}/s", flush=True)
    for line in row["first"]:
      print(f"  LOST {line}", flush=True)
  print(f"\n{table(rows)}")
  return int(any(row["losses"] for row in rows))


if __name__ == "__main__":
  sys.exit(main())
