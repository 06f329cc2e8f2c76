"""Several processes of the true programs on this machine: the same numbers as one, and one end for
all."""

import hashlib
import http.server
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import types

import jax
import numpy as np
import pandas as pd
import pytest
import wfdb

from common import ROOT, only_evaluators, tiny_config, tiny_flags
from hosts import DEAD_PROXY, errors, launch, said, statuses
from mistakes import error_of
from mmcl_jax import cli, evaluate, train
from mmcl_jax.data import schema, synthetic
from mmcl_jax.errors import UserError
from mmcl_jax.support import processes
from mmcl_jax.training import checkpoint, distributed, metrics, restore, signals

# Runs verbs one after the other in one program: starting a process costs more than all that it does
# here.
PROGRAM = """
import os, signal, sys
from mmcl_jax import cli, embed, evaluate, train
from mmcl_jax.data import pipeline
from mmcl_jax.training import distributed


def main(argv):
  verbs, workdir, *argv = argv
  for verb in verbs.split(","):
    if verb == "sigterm":  # comes to host 1 while it reads the first batch
      stream = pipeline.train_batches
      def interrupted(*args, **kwargs):
        for rows in stream(*args, **kwargs):
          if distributed.this_host.index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
          yield rows
      pipeline.train_batches = interrupted
      try:
        train.main(argv)
      except SystemExit as end:
        print("stopped with", end.code, os.listdir(f"{workdir}/checkpoints"), flush=True)
      pipeline.train_batches = stream
    if verb == "train":
      train.main(argv)
    if verb == "evaluate":
      evaluate.main([f"--workdir={workdir}", "--batch=12"])
    if verb == "embed":
      embed.PART = 2  # three parts: host 0 has the first and the last
      embed.main([f"--workdir={workdir}", f"--input={workdir}/in", f"--out={workdir}/out", "--batch=2"])

cli.run(main, sys.argv[1:], hosts=True)
"""


@pytest.fixture(scope="module")
def one(cohort, tmp_path_factory):
  """Trained to step 6 by one process with 4 devices."""
  workdir = tmp_path_factory.mktemp("one") / "w"
  found = launch(PROGRAM, 1, 4, "train", workdir, *tiny_flags(cohort.path, workdir))
  assert statuses(found) == [0], said(found)
  return workdir


@pytest.fixture(scope="module")
def two(cohort, tmp_path_factory):
  """Two hosts with 2 devices each: stopped by a SIGTERM to the second in its first step, gone on to
  step 6, evaluated, and used on five recordings, one of which is too short."""
  workdir = tmp_path_factory.mktemp("two") / "w"
  (workdir / "in").mkdir(parents=True)
  for i in range(5):
    ecg = synthetic.subject(7, i)["ecg"][:, : 1000 if i == 3 else None]
    wfdb.wrsamp(
      f"subject{i}",
      fs=500,
      units=["mV"] * 12,
      sig_name=list(schema.LEADS),
      p_signal=ecg.T.astype(float),
      fmt=["16"] * 12,
      write_dir=str(workdir / "in"),
    )
  found = launch(
    PROGRAM, 2, 2, "sigterm,train,evaluate,embed", workdir, *tiny_flags(cohort.path, workdir)
  )
  assert statuses(found) == [0, 0], said(found)
  return workdir, found


def test_sigterm_to_one_host_saves_on_all_and_stops_with_75(two):
  """tests/process/test_launch.py has the exit status of two processes that end so."""
  (_, first, _), (_, second, _) = two[1]
  for out in (first, second):
    assert "stopped with 75 ['2']" in out  # neither a multiple of every.save nor the end
  assert first.count("asked to stop: saved") == 1 and "asked to stop" not in second
  assert errors(two[1]) == [[], []]


# see launch
@pytest.mark.reported("JAX_DEFAULT_PRNG_IMPL=rbg gave other numbers for another number of devices")
def test_two_hosts_give_the_losses_of_one_through_the_stop(one, two):
  workdir, found = two
  # as it is not where hosts disagree
  assert "from step 2" in found[0][1] and "Compiling" in found[1][2]
  expected, records = metrics.read(one / "metrics.jsonl"), metrics.read(workdir / "metrics.jsonl")
  assert (
    [record["step"] for record in records]
    == [record["step"] for record in expected]
    == [1, 2, 3, 4, 5, 6, 6]
  )
  for a, b in zip(expected, records):
    assert b == pytest.approx(a, rel=1e-5, abs=1e-6)


def leaves(state):
  return [np.asarray(x) for x in jax.tree.leaves(jax.device_get(state))]


def digest(arrays):
  return hashlib.blake2b(b"".join(x.tobytes() for x in arrays)).hexdigest()


def test_a_checkpoint_of_two_hosts_is_that_of_one_process(one, two):
  """Sums over hosts are added in another order. The gradient of an attention's key bias is 0, which
  no softmax sees, so it is all rounding, and AdamW makes steps of full length of it: those biases
  are left out."""
  a, b = (jax.device_get(restore.load_run(str(workdir)).state) for workdir in (one, two[0]))

  def compare(path, x, y):
    if jax.tree_util.keystr(path, simple=True, separator="/").endswith("qkv/bias"):
      x, y = (np.delete(z.reshape(2, 3, -1), 1, axis=1) for z in (x, y))  # [heads, 3, width]
    np.testing.assert_allclose(y, x, rtol=0, atol=1e-4 * np.abs(x).max())

  jax.tree_util.tree_map_with_path(compare, a, b)


RESTORE = """
import os, signal, sys, hashlib
import jax, numpy as np
from mmcl_jax import cli
from mmcl_jax.training import distributed, restore

def main(argv):
  run = restore.load_run(argv[0])
  arrays = [np.asarray(x) for x in jax.tree.leaves(jax.device_get(run.state))]
  print(len(jax.devices()), hashlib.blake2b(b"".join(x.tobytes() for x in arrays)).hexdigest(), flush=True)
  distributed.gather(np.ones(1))
  if distributed.this_host.index == 3:
    os.kill(os.getpid(), signal.SIGKILL)
  while True:
    distributed.gather(np.ones(1))

cli.run(main, sys.argv[1:], hosts=True)
"""


def test_four_hosts_restore_it_and_a_killed_one_ends_the_others(two):
  expected = digest(leaves(restore.load_run(str(two[0])).state))
  found = launch(RESTORE, 4, 1, two[0])
  assert [re.findall(r"^4 (\w+)$", out, re.M) for _, out, _ in found] == [[expected]] * 4, said(
    found
  )
  assert statuses(found)[3] == -signal.SIGKILL
  assert all(status not in (0, 75) for status in statuses(found))
  lines = errors(found)
  assert [len(line) for line in lines] == [1] * 4, said(found)
  assert "host 3 of 4: ended without a word: killed" in lines[3][0]


def test_evaluation_on_two_hosts_is_that_on_one(two, tmp_path, monkeypatch):
  """Batches of 12, so that the last one of every split is padded."""
  workdir, _ = two
  together = json.loads((workdir / "evaluation/6/results.json").read_text())
  shutil.copytree(workdir, tmp_path / "w", ignore=shutil.ignore_patterns("evaluation"))
  only_evaluators(monkeypatch, "phenotypes", "retrieval")
  alone = evaluate.evaluate(str(tmp_path / "w"), batch=12)
  assert together["counts"] == alone["counts"]
  for name, scores in alone["phenotypes"].items():
    for score in ("r2", "pearson", "mae"):
      assert together["phenotypes"][name][score] == pytest.approx(scores[score], rel=1e-3, abs=1e-3)
  assert (
    together["retrieval"]["ecg_to_cmr"]["median_rank"]
    == alone["retrieval"]["ecg_to_cmr"]["median_rank"]
  )
  a, b = (np.load(folder / "evaluation/6/predictions.npz") for folder in (workdir, tmp_path / "w"))
  np.testing.assert_array_equal(a["subject"], b["subject"])
  np.testing.assert_allclose(
    a["embedding"], b["embedding"], rtol=1e-3, atol=1e-3 * np.abs(b["embedding"]).max()
  )


def test_two_hosts_embed_parts_in_turn_and_one_goes_on(two, tmp_path, monkeypatch):
  from mmcl_jax import embed

  workdir, found = two
  assert "4 of 5 recordings embedded" in found[0][1] and "recordings embedded" not in found[1][1]
  monkeypatch.setattr(embed, "PART", 2)
  flags = [f"--workdir={workdir}", f"--input={workdir / 'in'}", "--batch=2"]
  embed.main([*flags, f"--out={tmp_path / 'alone'}"])
  shutil.copytree(workdir / "out", tmp_path / "out")
  (tmp_path / "out/part-00001.parquet").unlink()
  embed.main([*flags, f"--out={tmp_path / 'out'}"])
  together, alone, gone_on = (
    pd.read_parquet(out) for out in (workdir / "out", tmp_path / "alone", tmp_path / "out")
  )
  assert list(together["status"]) == ["ok", "ok", "ok", "rejected", "ok"]
  for rows in (together, gone_on):
    pd.testing.assert_frame_equal(
      rows.drop(columns="embedding"), alone.drop(columns="embedding"), rtol=1e-4
    )
    np.testing.assert_allclose(
      *(np.stack(x["embedding"].dropna()) for x in (rows, alone)), rtol=1e-4, atol=1e-5
    )


def test_a_host_that_never_comes_is_named_on_those_that_did():
  code = (
    "import sys; from mmcl_jax import cli; from mmcl_jax.training import distributed; "
    "distributed.JOIN_S = 15; "
    "cli.run(lambda argv: None, [arg.replace('=2', '=3') if 'processes' in arg else arg for arg in "
    "sys.argv[1:]], hosts=True)"
  )
  for status, _, err in launch(code, 2, 1):
    assert status not in (0, os.EX_TEMPFAIL)
    assert "the hosts did not all come together at 127.0.0.1" in err and re.search(
      r"timed out task names:\s*2\b", err
    ), err[-2000:]


def test_a_host_that_is_too_slow_is_named():
  code = (
    "import sys, time; from mmcl_jax import cli; from mmcl_jax.training import distributed; "
    "distributed.WAIT_S, distributed.ABORT_S = 3, 60\n"
    "def main(argv):\n  time.sleep(12 * distributed.this_host.index); distributed.check_same({})\n"
    "cli.run(main, sys.argv[1:], hosts=True)"
  )
  for status, _, err in launch(code, 2, 1):
    assert status == 2 and "host 0 of 2: host 1 of 2 was not as far as host 0 within 3 s" in err, (
      err[-2000:]
    )


# every test of several hosts here has one, see launch
@pytest.mark.reported("http_proxy made several hosts hang for 300 s")
@pytest.mark.parametrize(
  "address, environ, added",
  [
    ("h0:1234", {}, {}),
    ("h0:1234", {"http_proxy": "http://p:1"}, {"no_grpc_proxy": "h0"}),
    (
      "10.0.0.1:1",
      {"HTTPS_PROXY": "http://p:1", "no_proxy": ".local,h1"},
      {"no_grpc_proxy": ".local,h1,10.0.0.1"},
    ),
    (
      "[::1]:1",
      {"grpc_proxy": "http://p:1", "no_proxy": "a", "no_grpc_proxy": "b"},
      {"no_grpc_proxy": "b,::1"},
    ),
  ],
)
def test_the_coordinator_is_reached_past_proxies(address, environ, added):
  assert distributed.around_proxies(address, environ) == added


def test_hosts_that_disagree_all_say_so_before_anything_is_compiled(cohort, tmp_path):
  found = launch(
    PROGRAM,
    2,
    1,
    "train",
    tmp_path / "w",
    *tiny_flags(cohort.path, tmp_path / "w"),
    each=lambda i: [f"--config.seed={i}"],
  )
  assert statuses(found) == [2, 2], said(found)
  lines = errors(found)
  assert lines[0] == lines[1] and len(lines[0]) == 1
  assert "host 1 of 2: config.seed is 1 here and 0 on host 0" in lines[0][0]
  assert not any("Compiling" in err or "Traceback" in err for _, _, err in found)
  assert not (tmp_path / "w").exists()


# -- One process --


@pytest.mark.reported("the first save came after a third of the run")
def test_stopped_runs_end_in_the_state_of_an_uninterrupted_one(cohort, tmp_path, monkeypatch):
  """Asked to stop in its first step, in a step that saves anyway, and again, in one that does not:
  bit for bit the same as one that saves by time alone."""
  saved = []
  save = checkpoint.Checkpoints.save
  monkeypatch.setattr(
    checkpoint.Checkpoints,
    "save",
    lambda self, step, *args, **kwargs: (saved.append(step), save(self, step, *args, **kwargs)),
  )
  config = tiny_config(cohort.path)
  config.evaluators = {}
  config.every.save = 100
  # a long time passes between any two looks
  clock = itertools.count(0, 60 * config.every.save_minutes + 1)
  expected = jax.device_get(train.train(config, str(tmp_path / "whole"), clock=lambda: next(clock)))
  assert saved == [2, 4, 6]  # known one step after it was asked for, and saved by the step after
  saved.clear()
  for every, end in ((2, 2), (100, 4)):
    config.every.save = every
    with pytest.raises(SystemExit) as stop:
      train.train(config, str(tmp_path / "w"), asked_to_stop=lambda: True)
    assert stop.value.code == os.EX_TEMPFAIL
    assert checkpoint.latest(tmp_path / "w") == end
  state = jax.device_get(train.train(config, str(tmp_path / "w")))
  assert saved == [2, 4, 6]
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  assert metrics.read(tmp_path / "w/metrics.jsonl") == metrics.read(
    tmp_path / "whole/metrics.jsonl"
  )


@pytest.mark.reported("SIGHUP, SIGUSR1 and SIGUSR2 ended training without a save")
@pytest.mark.parametrize("signum", processes.SIGNALS)
def test_a_signal_is_kept_until_it_is_read(signum):
  before = signal.getsignal(signum)
  with signals.stops() as came:
    assert not came()
    os.kill(os.getpid(), signum)
    assert came()
  assert signal.getsignal(signum) is before


def test_a_signal_that_is_ignored_from_the_start_stays_ignored():
  """As under nohup."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with signals.stops() as came:
      os.kill(os.getpid(), signal.SIGHUP)
      assert not came()
  finally:
    signal.signal(signal.SIGHUP, before)


@pytest.mark.reported("output to a terminal that was closed ended training without a checkpoint")
def test_output_that_nobody_takes_asks_training_to_stop(monkeypatch):
  taken, given = os.pipe()
  with open(given, "w") as stream:
    monkeypatch.setattr(sys, "stdout", stream)
    with signals.stops() as came:
      print("read", flush=True)
      assert os.read(taken, 9) == b"read\n" and not came()
      os.close(taken)
      print("lost", flush=True)
      assert came()
      print("lost too", flush=True)
    assert sys.stdout is stream


# Ctrl-C, then hours without an instruction of Python in between, as a compiler may take.
BUSY = """
import collections, ctypes, functools, hashlib, operator, os, signal
from mmcl_jax import cli
steps = [functools.partial(ctypes.CDLL(None).kill, os.getpid(), int(signal.SIGINT)),
         functools.partial(hashlib.pbkdf2_hmac, "sha256", b"", b"", 2**31 - 1)]
cli.run(lambda argv: collections.deque(map(operator.call, steps), maxlen=0), [])
"""


@pytest.mark.reported("Ctrl-C during compilation was not answered for minutes")
def test_a_signal_amid_a_computation_is_answered_and_a_second_interrupt_ends_it():
  running = subprocess.Popen(
    [sys.executable, "-c", BUSY],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  try:
    lines = iter(running.stderr.readline, "")
    words = "waits for what is computed or compiled now; Ctrl-C again ends at once"
    assert words in next(line for line in lines if line.strip())
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=600)
    assert running.returncode == 130 and "Traceback" not in err
  finally:
    running.kill()


SLURM = {
  "SLURM_STEP_NUM_TASKS": "8",
  "SLURM_PROCID": "5",
  "SLURM_LOCALID": "1",
  "SLURM_NODEID": "1",
  "SLURM_NTASKS": "8",
  "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
  "SLURM_JOB_ID": "7",
}


@pytest.mark.parametrize(
  "environ",
  [
    # shell of salloc, script of sbatch
    {},
    {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    # one task of srun in an allocation for eight, and salloc's shell as a step
    SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
    {"TPU_WORKER_HOSTNAMES": "localhost", "JAX_PLATFORMS": "tpu"},
    # a TPU host that is asked for its CPU alone
    {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "JAX_PLATFORMS": "cpu"},
  ],
)
def test_one_process_starts_and_awaits_nothing(environ, monkeypatch):
  monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: True)
  assert distributed.how_to_start(None, environ | {"TPU_SKIP_MDS_QUERY": "1"}) is None
  assert distributed.how_to_start({"num_processes": 1}, environ) is None


def test_a_step_of_srun_and_a_tpu_slice_are_recognised(monkeypatch):
  start = distributed.how_to_start(None, SLURM)
  assert (start["num_processes"], start["process_id"], start["cluster_detection_method"]) == (
    8,
    5,
    "slurm",
  )
  monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: True)
  assert distributed.how_to_start(None, {"TPU_WORKER_HOSTNAMES": "a,b"}) == {}
  assert (
    distributed.how_to_start(None, {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}) == {}
  )


@pytest.mark.parametrize(
  "endpoints, env, workers",
  [
    ("h0,h1,h2,h3", "", 4),
    ("10.0.0.2", "", 1),
    (None, None, 1),
    ("h0,h1", "MEGASCALE_NUM_SLICES: '2'", 4),
  ],
)
def test_workers_by_the_metadata_of_a_tpu_vm(endpoints, env, workers, monkeypatch):
  answers = {"worker-network-endpoints": endpoints, "tpu-env": env}

  class Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      text = (
        answers.get(self.path.split("/")[-1])
        if self.headers["Metadata-Flavor"] == "Google"
        else None
      )
      self.send_response(404 if text is None else 200)
      self.end_headers()
      self.wfile.write((text or "").encode())

    def log_message(self, *args):
      pass

  server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
  monkeypatch.setenv("http_proxy", DEAD_PROXY["http_proxy"])
  monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: True)
  assert distributed.tpu_workers({}) == workers
  server.shutdown()
  server.server_close()


@pytest.mark.parametrize(
  "gpus, environ, expected",
  [
    ("0,1,2,3", {}, [1]),  # a task a GPU, all seen
    ("2", {}, [0]),  # bound to one by SLURM
    ("0,1", {"SLURM_GPUS_PER_TASK": "2"}, [0, 1]),  # bound to two
    ("0,1,2,3,4,5,6,7", {}, [2, 3]),  # four tasks share eight
    ("0,1,2,3", {"SLURM_STEP_TASKS_PER_NODE": "3,1"}, [0, 1, 2, 3]),  # alone on the second node
    ("0,1,2,3", {"JAX_LOCAL_DEVICE_IDS": "3"}, None),  # chosen by hand
    ("", {}, None),  # no GPUs
    ("0,1,2,3,4,5", {}, UserError),
  ],
)
def test_gpus_of_a_slurm_task(gpus, environ, expected):
  environ = SLURM | {"CUDA_VISIBLE_DEVICES": gpus} | environ
  if expected is UserError:
    with pytest.raises(UserError, match="4 tasks on a node with 6 GPUs"):
      distributed.gpus_of_task(environ)
  else:
    assert distributed.gpus_of_task(environ) == expected


def test_flags_are_taken_out_of_the_command_line():
  argv = [
    "a",
    "--coordinator=h:1",
    "--config.x=--process=2",
    "--processes=4",
    "--process=3",
    "--step=1",
  ]
  given, rest = distributed.flags(argv)
  assert given == {"coordinator_address": "h:1", "num_processes": 4, "process_id": 3}
  assert rest == ["a", "--config.x=--process=2", "--step=1"]


@pytest.mark.parametrize(
  "argv",
  [
    "--process=0",
    "--coordinator=h:1 --processes=2",
    "--coordinator=h --processes=2 --process=0",
    "--coordinator=h:1 --processes=2 --process=2",
    "--coordinator=h:1 --processes=two --process=0",
    "--coordinator=h:1 --processes=2 --process=-1",
  ],
)
def test_flags_that_do_not_add_up_are_one_line(argv, capsys):
  error = error_of(lambda argv: pytest.fail("it ran"), argv.split(), capsys, hosts=True)
  assert "expected --coordinator=HOST:PORT" in error


@pytest.mark.parametrize("program", [train, evaluate])
def test_help_tells_of_the_flags_and_starts_nothing(program, capsys):
  with pytest.raises(SystemExit) as exit:
    cli.run(
      program.main,
      ["--help", "--coordinator=127.0.0.1:1", "--processes=2", "--process=1"],
      hosts=True,
    )
  assert exit.value.code == 0
  printed = capsys.readouterr().out
  assert "--workdir" in printed and "--processes=N" in printed


class Store:
  """Stands for the client of JAX's distributed runtime: a dictionary."""

  def __init__(self, entries=()):
    self.entries = dict(entries)

  def key_value_set(self, key, value, allow_overwrite=False):
    assert allow_overwrite or key not in self.entries
    self.entries[key] = value

  def blocking_key_value_get(self, key, timeout):
    return self.entries[key]

  def wait_at_barrier(self, key, timeout):
    pass


@pytest.mark.parametrize(
  "mine, words",
  [
    ({"cohort": "b"}, 'cohort is "b" here and "a" on host 0'),
    ({}, "cohort is None here"),
    ({"cohort": "a"}, None),
  ],
)
def test_agreement_names_what_differs(mine, words, monkeypatch):
  store = Store()
  monkeypatch.setattr(distributed, "counter", iter((0, 0)))
  monkeypatch.setattr(distributed, "this_host", distributed.Host(0, 2, store))
  distributed.check_same({"cohort": "a"})
  monkeypatch.setattr(distributed, "this_host", distributed.Host(1, 2, store))
  if words:
    with pytest.raises(UserError, match=words):
      distributed.check_same(mine)
  else:
    distributed.check_same(mine)


def test_a_folder_that_hosts_do_not_share_is_found(tmp_path, monkeypatch):
  """Host 0 and host 1 in threads of one process, each with a folder of its own, then with the
  same."""
  store = Store()
  store.blocking_key_value_get = lambda key, timeout: wait_for(store.entries, key)
  (tmp_path / "a").mkdir()
  (tmp_path / "b").mkdir()
  for folder, words in (("b", "of host 1 is another folder"), ("a", None)):
    store.entries.clear()
    monkeypatch.setattr(distributed, "counter", iter((0, 0)))
    monkeypatch.setattr(distributed, "this_host", distributed.Host(0, 2, store))
    outcome = []

    def check(outcome=outcome):
      outcome.append(outcome_of(distributed.check_shared, tmp_path / "a"))

    first = threading.Thread(target=check)
    first.start()
    wait_for(store.entries, "mmcl/shared/0")
    distributed.this_host = distributed.Host(1, 2, store)
    distributed.check_shared(tmp_path / folder)
    first.join()
    assert (words is None) == (outcome[0] is None) and (words or "") in str(outcome[0])
    assert not list((tmp_path / "a").iterdir())


def wait_for(entries, key):
  while key not in entries:
    threading.Event().wait(0.01)
  return entries[key]


def outcome_of(function, *args):
  try:
    return function(*args)
  except UserError as error:
    return error


@pytest.mark.parametrize(
  "owners, words", [([[0, 0], [1, 1]], None), ([[0], [0], [1]], "2, 1 devices")]
)
def test_meshes_that_hosts_do_not_fit(owners, words, monkeypatch):
  monkeypatch.setattr(distributed, "this_host", distributed.Host(0, 2))
  devices = np.array([[types.SimpleNamespace(process_index=i) for i in row] for row in owners])
  mesh = types.SimpleNamespace(devices=devices)
  if words is None:
    return distributed.check_mesh(mesh)
  with pytest.raises(UserError, match=words):
    distributed.check_mesh(mesh)
