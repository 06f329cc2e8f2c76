"""The data order is a function of (seed, step) alone, and evaluation sees every record once."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from common import PATH, alive
from mmcl_jax.data import pipeline
from mmcl_jax.errors import UserError

COUNT, BATCH = 11, 4  # 11 records: batches of 4 cross the borders of epochs


class Records:
  """Random-access records whose ECG says which record it is."""

  def __len__(self):
    return COUNT

  def __getitem__(self, i):
    small = {name: np.zeros(1, np.float32) for name in ("phenotypes", "diseases", "covariates")}
    return small | {
      "subject": np.array([i, 0], np.uint32),
      "visit": np.uint16(i),
      "has_ecg": np.uint8(1),
      "has_cmr": np.uint8(1),
      "ecg": np.full((12, 4), i, np.int16),
      "ecg_scale": np.float32(1),
      "cine_slice": np.full((2, 3, 3), i, np.uint8),
    }


def take(n, **kwargs):
  stream = pipeline.train_batches(Records(), seed=3, batch=BATCH, fields=("cine_slice",), **kwargs)
  return [next(stream) for _ in range(n)]


def rows(batches):
  """One global batch from the hosts' parts, sorted by position in the stream: [(index, subject,
  ecg, cmr), ...]."""
  return sorted(
    (int(i), int(s[0]), int(e[0, 0]), int(c[0, 0, 0]))
    for b in batches
    for i, s, e, c in zip(b["index"], b["subject"], b["ecg"], b["cmr"]["cine_slice"])
  )


def test_global_batches_do_not_depend_on_the_number_of_hosts():
  one = [rows([batch]) for batch in take(8)]
  for hosts in (2, 4):
    parts = [take(8, host=h, hosts=hosts) for h in range(hosts)]
    assert [rows(step) for step in zip(*parts)] == one


def test_starting_at_a_step_equals_skipping_to_it():
  assert [rows([b]) for b in take(3, start_step=5)] == [rows([b]) for b in take(8)][5:]


@pytest.mark.parametrize(
  "how",
  [dict(threads=1, buffer=1), dict(threads=4, buffer=3), dict(workers=2, threads=1, buffer=1)],
)
def test_order_does_not_depend_on_threads_or_workers(how):
  for a, b in zip(take(4), take(4, **how)):
    np.testing.assert_array_equal(a["index"], b["index"])
    np.testing.assert_array_equal(a["ecg"], b["ecg"])


@pytest.mark.reported("a small /dev/shm ended in a traceback")
def test_a_shared_memory_that_is_too_small_is_told_before_any_process_starts(monkeypatch):
  # of a batch: ECG, image, labels, subject, scale, index, flags
  size = 4 * (12 * 4 * 2 + 2 * 3 * 3 + 3 * 4 + 8 + 4 + 4 + 1 + 1 + 1)
  for missing in (0, 1):
    free = types.SimpleNamespace(f_bavail=2 * 4 * size - missing, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda path, free=free: free)
    if missing:
      with pytest.raises(
        UserError,
        match="config.loader.workers is 2, and 2 x 4 batches of .* --shm-size.* --config.loader.workers=0",
      ):
        take(1, workers=2, buffer=3)
    else:
      pipeline.check_shared_memory(2, 3, size)
  assert not multiprocessing.active_children()


READER = """
import multiprocessing, os, signal, sys
from test_pipeline import Records
from mmcl_jax.data import pipeline
stream = pipeline.train_batches(Records(), seed=3, batch=4, threads=1, buffer=1, workers=1)
next(stream)
reader, = multiprocessing.active_children()
for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
  os.kill(reader.pid, signum)
for _ in range(8):
  next(stream)
print(reader.pid, flush=True)
os.kill({whom}, signal.SIGKILL)
while True:
  next(stream)
"""


def read_in_a_process(whom):
  """READER, which kills itself or its reading process, and the number of the latter."""
  env = os.environ | {"PYTHONPATH": PATH}
  done = subprocess.run(
    [sys.executable, "-c", READER.replace("{whom}", whom)],
    capture_output=True,
    text=True,
    env=env,
    timeout=600,
  )
  return done, int(done.stdout)


@pytest.mark.reported(
  "a reading process that was killed ended training in a traceback",
  "SIGTERM to the whole job ended the readers",
)
def test_readers_hear_no_signal_and_one_that_is_killed_is_told():
  done, _ = read_in_a_process("reader.pid")
  assert (
    "UserError: a reading process died (Worker process was terminated unexpectedly with exit code "
    "-9)" in done.stderr
  ), done.stderr


@pytest.mark.reported("SIGKILL of training left its reading processes behind")
def test_readers_end_with_a_parent_that_is_killed():
  done, reader = read_in_a_process("os.getpid()")
  assert done.returncode == -signal.SIGKILL, done.stderr
  deadline = time.monotonic() + 300
  while alive(reader):
    assert time.monotonic() < deadline, "the reading process outlived its parent"
    time.sleep(0.1)


def test_every_epoch_holds_every_record_once_in_a_new_order():
  flat = [row for batch in take(3 * COUNT // BATCH + 1) for row in rows([batch])]
  epochs = [[s for i, s, *_ in flat if i // COUNT == e] for e in range(3)]
  assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2]
  assert [i for i, *_ in flat] == list(range(len(flat)))


def test_another_seed_gives_another_order():
  other = pipeline.train_batches(Records(), seed=4, batch=BATCH)
  assert [int(s[0]) for s in next(other)["subject"]] != [s for _, s, *_ in rows(take(1))]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_one_pass_pads_to_equal_steps_on_every_host(hosts):
  parts = [
    list(pipeline.one_pass(Records(), batch=BATCH, host=h, hosts=hosts)) for h in range(hosts)
  ]
  assert {len(part) for part in parts} == {3}
  seen = sorted(
    int(s[0]) for part in parts for b in part for s, m in zip(b["subject"], b["mask"]) if m
  )
  assert seen == list(range(COUNT))
  padding = [e for part in parts for b in part for e, m in zip(b["ecg"], b["mask"]) if not m]
  assert len(padding) == 1 and not padding[0].any()


def test_one_pass_carries_what_is_asked_for_where_a_record_has_it():
  batch = next(
    pipeline.one_pass(Records(), batch=BATCH, also=("visit", "followed_years", "subject"))
  )
  np.testing.assert_array_equal(batch["visit"], range(BATCH))
  assert "followed_years" not in batch and "visit" not in take(1)[0]


class EcgOnly:
  """Records of an ECG-only cohort, subjects from 100 on; of the first cohort's labels it has `age`
  alone, in another place."""

  def __len__(self):
    return 7

  def __getitem__(self, i):
    return {
      "subject": np.array([100 + i, 0], np.uint32),
      "has_ecg": np.uint8(1),
      "has_cmr": np.uint8(0),
      "ecg": np.full((12, 4), 100 + i, np.int16),
      "ecg_scale": np.float32(1),
      "phenotypes": np.zeros(0, np.float32),
      "diseases": np.array([1], np.float32),
      "covariates": np.array([5, 60 + i], np.float32),
    }


def take_mixed(n, share=0.25, **kwargs):
  first = {"phenotypes": {"LVM": "g"}, "diseases": ["AF"], "covariates": {"age": "years"}}
  other = {"phenotypes": {}, "diseases": ["MI"], "covariates": {"sex": "", "age": "years"}}
  mix = [
    pipeline.Mixed(
      EcgOnly(), share, pipeline.conforming(other, first, Records()[0], ("cine_slice",))
    )
  ]
  return take(n, mix=mix, **kwargs)


def test_mixed_in_cohorts_keep_their_share_and_count_as_without_cmr():
  batches = take_mixed(14)
  names, has_cmr, age, af, lvm, cine = (
    np.concatenate([np.asarray(pick(b)) for b in batches])
    for pick in (
      lambda b: b["subject"][:, 0],
      lambda b: b["has_cmr"],
      lambda b: b["covariates"][:, 0],
      lambda b: b["diseases"][:, 0],
      lambda b: b["phenotypes"][:, 0],
      lambda b: b["cmr"]["cine_slice"].max(axis=(1, 2, 3)),
    )
  )
  other = names >= 100
  assert other.sum() == 14 and all(sum(b["subject"][:, 0] >= 100) == 1 for b in batches)
  assert sorted(names[other]) == sorted([*range(100, 107)] * 2)  # its own epochs, each record once
  assert not has_cmr[other].any() and has_cmr[~other].all() and not cine[other].any()
  np.testing.assert_array_equal(age[other], names[other] - 40)  # by name, not by place
  assert (
    np.isnan(af[other]).all() and np.isnan(lvm[other]).all() and not np.isnan(lvm[~other]).any()
  )


def test_mixing_depends_on_neither_hosts_nor_the_start():
  one = take_mixed(6)
  assert [rows(step) for step in zip(*(take_mixed(6, host=h, hosts=2) for h in (0, 1)))] == [
    rows([b]) for b in one
  ]
  assert [rows([b]) for b in take_mixed(2, start_step=4)] == [rows([b]) for b in one[4:]]
  assert len({i for b in one for i in b["index"].tolist()}) == 6 * BATCH


def test_a_view_that_is_not_trained_on_may_be_lacking():
  first, info = (
    Records()[0] | {"ed_es_volumes": np.ones((2, 3, 3), np.uint8)},
    {"phenotypes": {}, "diseases": [], "covariates": []},
  )
  other = {name: x for name, x in Records()[3].items() if name != "cine_slice"} | {
    "ed_es_volumes": np.ones((2, 3, 3), np.uint8)
  }
  kept = pipeline.conforming(info, info, first, ("ed_es_volumes",))(other)
  assert kept["has_cmr"] == 1 and kept["ed_es_volumes"].all()
  lost = pipeline.conforming(info, info, first, ("ed_es_volumes", "cine_slice"))(other)
  assert lost["has_cmr"] == 0 and not lost["ed_es_volumes"].any() and not lost["cine_slice"].any()


def test_the_spec_of_a_batch_is_that_of_the_batches():
  """Names, shapes and types, from the shapes that cohort.json has."""
  record = Records()[0]
  shapes = {name: list(np.shape(x)) for name, x in record.items()}
  spec = pipeline.element_spec(shapes, ("cine_slice",), BATCH)
  (batch,) = take(1)
  spec, batch = (one | one["cmr"] for one in (spec, batch))
  assert spec.keys() == batch.keys()
  for name in spec.keys() - {"cmr"}:
    assert (spec[name].shape, spec[name].dtype) == (batch[name].shape, batch[name].dtype), name
