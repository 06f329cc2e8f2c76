"""What a run says of its time, and what its loop does not wait for."""

import contextlib
import errno
import functools
import io
import itertools
import json
import re
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import ecg_config, python
from ml_collections import ConfigDict

from mmcl_jax import augment, configuration, models, train
from mmcl_jax.errors import UserError
from mmcl_jax.models import cmr_tower
from mmcl_jax.training import (
  checkpoint,
  chips,
  goodput,
  monitor,
  over_split,
  parallel,
  profile,
  step as step_lib,
)

# -- Goodput, utilisation, profile --


def test_every_moment_counts_once():
  now = [0.0]
  spent = goodput.Goodput(lambda: now[0])

  def pass_time(seconds):
    now[0] += seconds

  pass_time(3)  # loading
  spent.switch("training")
  pass_time(1)
  for busy in (True, False):
    with spent.on("waiting_for_data", unless=functools.partial(bool, busy)):
      pass_time(2 if busy else 4)
  with pytest.raises(UserError), spent.on("evaluating"):
    pass_time(5)
    with spent.on("saving"):
      pass_time(7)
    raise UserError("ends what it counts as, too")
  pass_time(10)
  assert spent.stepping() == 1 + 2 + 4 + 10
  assert spent.seconds == {
    "training": 1 + 2 + 10,
    "compiling": 0,
    "loading": 3,
    "saving": 7,
    "evaluating": 5,
    "waiting_for_data": 4,
  }
  shares = spent.shares()
  assert sum(shares.values()) == pytest.approx(1) and shares["saving"] == 7 / 32
  line = goodput.describe(shares, 3725)
  assert line.startswith("goodput 40.6%: of 1:02:05 training 40.6%, compiling 0.0%, loading 9.4%")
  assert line.endswith("waiting for data 12.5%")


def test_of_no_time_there_are_no_shares():
  assert set(goodput.Goodput(lambda: 1.0).shares().values()) == {0.0}


@pytest.fixture(scope="module")
def watched(cohort, tmp_path_factory):
  """A run of the ECG alone whose device has a peak and whose clock ticks once a look: its workdir,
  what it printed, and how often the clock was looked at."""
  config = ecg_config(cohort.path)
  config.every.log = 2
  config.evaluators = {}
  config.profile = dict(first=3, steps=2)
  looks = itertools.count()
  seen = []

  def clock():
    seen.append(next(looks))
    return float(seen[-1])

  workdir = tmp_path_factory.mktemp("watched") / "w"
  out = io.StringIO()
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
    patch.setattr(chips, "of_kind", lambda kind: chips.CHIPS["v5e"])
    train.train(config, str(workdir), clock=clock)
  return workdir, out.getvalue(), seen[-1]


def test_shares_of_a_run_add_up(watched):
  workdir, out, ticks = watched
  line = json.loads((workdir / "goodput.jsonl").read_text())
  assert (line.pop("from"), line.pop("to")) == (0, 6)
  assert sorted(line) == sorted(goodput.KINDS)
  # the last looks: at the shares and at the sum
  assert 0 <= ticks - sum(line.values()) <= 2 and min(line.values()) >= 0
  assert all(line[kind] > 0 for kind in ("training", "compiling", "loading", "saving"))
  assert line["evaluating"] == 0
  shares = re.search(r"^goodput (\d+\.\d)%: of .* training \1%, .*$", out, re.MULTILINE)[0]
  assert sum(map(float, re.findall(r" (\d+\.\d)%,?(?= |$)", shares.partition(" of ")[2]))) == (
    pytest.approx(100, abs=0.4)
  )


def test_the_log_tells_utilisation(watched):
  found = re.findall(r"^train (\d)/6 .*  MFU (\S+)%  ETA", watched[1], re.MULTILINE)
  assert [step for step, _ in found] == ["2", "4", "6"]
  assert all(0 <= float(share) < 1 for _, share in found)  # a tick is a second


@pytest.mark.parametrize(
  "remat, accumulation, name",
  [("none", 1, "MFU"), ("blocks", 1, "HFU"), ("none", 2, "HFU")],
)
def test_what_is_computed_again_is_utilisation_of_the_hardware(remat, accumulation, name):
  watch = object.__new__(monitor.Monitor)
  watch.config = configuration.defaults(batch=4, steps=9)
  watch.config.model.remat, watch.config.accumulation = remat, accumulation
  watch.spent, watch.looked = types.SimpleNamespace(stepping=lambda: 10.0), (3, 6.0)
  watch.at_peak_s = 0.5
  assert watch.utilisation(7) == f"{name} 50.0%"  # 4 steps of 0.5 s at peak in 4 s


def test_utilisation_is_products_at_peak_of_the_time_of_steps():
  chip = chips.CHIPS["v5e"]
  function = jax.jit(lambda w, x: (x @ w, x))
  w, x = jnp.zeros((5, 4)), jnp.zeros((6, 5))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(chips, "of_kind", lambda kind: chip)
    from mmcl_jax.training import loop

    at_peak = loop.seconds_at_peak(function, w, x)
  assert at_peak == pytest.approx(2 * 6 * 5 * 4 / chip.flops / jax.device_count())


def test_a_device_without_a_published_peak_is_named_once(capsys):
  from mmcl_jax.training import loop

  function = jax.jit(lambda w, x: (x @ w, x))
  assert loop.seconds_at_peak(function, jnp.zeros((5, 4)), jnp.zeros((6, 5))) is None
  assert capsys.readouterr().out == "no peak is known of the device 'cpu', so the log has no MFU\n"


def test_the_profile_of_some_steps_is_written(watched):
  workdir, out, _ = watched
  (trace,) = workdir.glob("profile/plugins/profile/*/*.xplane.pb")
  assert f"profile of steps 3 to 4: {workdir}/profile; open it with xprof" in out
  data = jax.profiler.ProfileData.from_file(str(trace))
  names = [event.name for plane in data.planes for line in plane.lines for event in line.events]
  assert names.count("train") == 2  # one a step


@pytest.mark.parametrize("entry", [dict(first=0, steps=3), dict(first=2, steps=0)])
def test_without_first_or_steps_there_is_no_profile(entry, tmp_path):
  trace = profile.Profile(ConfigDict(entry), str(tmp_path))
  for step in range(1, 5):
    trace.begin(step)
    assert trace.began is None
    trace.end(step, ())
  assert list(tmp_path.iterdir()) == []


def test_a_profile_of_steps_that_the_run_does_not_have_is_refused():
  config = ConfigDict(dict(steps=6, profile=dict(first=7, steps=1)))
  with pytest.raises(UserError, match="profile.first is 7, and the run ends with step 6"):
    profile.check(config)
  config.profile.first = 6
  profile.check(config)


def test_a_trace_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
  def refuse():
    raise RuntimeError("disk\nfull")

  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
  monkeypatch.setattr(jax.profiler, "stop_trace", refuse)
  trace = profile.Profile(ConfigDict(dict(first=1, steps=1)), str(tmp_path))
  trace.begin(1)
  with pytest.raises(UserError, match="cannot write the profile to .*: disk full; make room"):
    trace.end(1, ())


# -- Metrics in one transfer --


def test_metrics_come_back_from_one_array_bit_by_bit():
  subjects = np.uint32([[0, 2**32 - 1], [0x7F800001, 3]])  # the third would be a NaN
  values = {"loss": 1.1, "b": np.inf, "a": np.nan, "c": -0.0, "weight": 2}

  @jax.jit
  def packed(subjects):
    return step_lib.pack({**values, "top_loss_subjects": subjects})

  with jax.set_mesh(parallel.make_mesh(data=-1, model=1)):
    found = packed(subjects)
  assert len(jax.tree.leaves(found)) == 1
  scalars, back = step_lib.unpack(found)
  assert back.dtype == np.uint32 and (back == subjects).all()
  for name, x in values.items():
    assert np.float32(scalars[name]).tobytes() == np.float32(x).tobytes(), name


# -- Signatures beside the loop --


def test_hashing_a_checkpoint_does_not_hold_the_loop(tmp_path, monkeypatch):
  go = threading.Event()
  checksum = checkpoint.checksum

  def slow(file):
    assert go.wait(30)
    return checksum(file)

  monkeypatch.setattr(checkpoint, "checksum", slow)
  saved = checkpoint.Checkpoints(str(tmp_path), keep=1)
  saved.save(1, {"a": np.zeros(3)}, {}, {})
  saved.manager.wait_until_finished()
  begun = time.monotonic()
  saved.poll()
  saved.poll()
  assert time.monotonic() - begun < 20 and checkpoint.steps(str(tmp_path)) == []
  go.set()
  saved.save(2, {"a": np.zeros(3)}, {}, {})  # waits for the first one's signature
  assert checkpoint.steps(str(tmp_path)) == [1]
  saved.close()
  assert checkpoint.steps(str(tmp_path)) == [2]
  checkpoint.check_files(str(tmp_path), 2)


def test_nothing_is_written_once_checkpoints_are_released(tmp_path, monkeypatch):
  checksum = checkpoint.checksum

  def slow(file):
    time.sleep(0.05)
    return checksum(file)

  monkeypatch.setattr(checkpoint, "checksum", slow)
  saved = checkpoint.Checkpoints(str(tmp_path), keep=1)
  saved.save(1, {"a": np.zeros(3)}, {}, {})
  saved.manager.wait_until_finished()
  saved.poll()
  saved.release()
  assert checkpoint.steps(str(tmp_path)) == [1]


@pytest.mark.parametrize("ask", ["poll", "finish", "save"])
def test_what_fails_beside_the_loop_is_one_line_in_it(ask, tmp_path, monkeypatch):
  def full(file):
    raise OSError(errno.ENOSPC, "no matter what")

  monkeypatch.setattr(checkpoint, "checksum", full)
  saved = checkpoint.Checkpoints(str(tmp_path), keep=1)
  saved.save(1, {"a": np.zeros(3)}, {}, {})
  with pytest.raises(UserError, match="cannot save .*/1: No space left on device; the same") as one:
    for _ in range(200):
      getattr(saved, ask)(*(2, {"a": np.zeros(3)}, {}, {}) if ask == "save" else ())
      time.sleep(0.05)
  assert "\n" not in str(one.value) and checkpoint.steps(str(tmp_path)) == []


# -- A batch of inference is fetched while the next is computed --


def test_a_batch_is_fetched_once_the_next_is_dispatched(monkeypatch):
  said = []
  batches = [
    {"index": np.uint32(rows), "x": np.float32(rows)[:, None]} for rows in ([1, 0], [4, 2], [3, 5])
  ]
  fetch = over_split.own_rows

  def function(variables, rows):
    said.append("dispatched")
    return {"y": rows["x"] * variables}

  def fetched(arrays):
    said.append("fetched")
    return fetch(arrays)

  monkeypatch.setattr(over_split.pipeline, "one_pass", lambda *args, **options: batches)
  monkeypatch.setattr(over_split, "own_rows", fetched)
  mesh = parallel.make_mesh(data=-1, model=1)
  found = over_split.over_split(function, 2.0, range(5), mesh=mesh, batch=2, also=("x", "none"))
  assert said == ["dispatched", "dispatched", "fetched", "dispatched", "fetched", "fetched"]
  assert sorted(found) == ["x", "y"]
  np.testing.assert_array_equal(found["y"][:, 0], 2 * np.arange(5))  # 5 is padding
  np.testing.assert_array_equal(found["x"][:, 0], np.arange(5))


ROWS = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from mmcl_jax.training import over_split, parallel

mesh = parallel.make_mesh(data=2, model=2)
x = np.arange(12.0).reshape(4, 3)
jax.process_count = lambda: 2  # all devices are this host's, so all rows are
for spec in (P("data"), P()):
  whole = jax.device_put(x, NamedSharding(mesh, spec))
  rows, outputs = next(over_split.dispatched(lambda _, rows: {"y": whole}, None, [{}], mesh))
  np.testing.assert_array_equal(over_split.own_rows(outputs)["y"], x)
"""


def test_rows_of_a_host_are_taken_once_wherever_they_lie():
  python(ROWS, devices=4)


# -- Planes that nobody sees are not augmented --

VOLUMES = np.random.default_rng(0).random((2, 2, 12, 8, 8)).astype(np.float32)
FRAMES = np.random.default_rng(1).random((2, 10, 8, 8)).astype(np.float32)


def of(*views, **more):
  """config.model with towers of (view, planes)."""
  entries = {f"t{i}": dict(view=view, planes=n) for i, (view, n) in enumerate(views)}
  return ConfigDict(dict(fn="pretrainer", towers=entries, **more))


@pytest.mark.parametrize(
  "config, kept",
  [
    (of(("ed_volume", 6), ("es_volume", 6)), (2, 6)),
    (of(("ed_volume", 5), ("ed_slice", 1)), (1, 6)),
    (of(("es_volume", 3), ("ed_volume", 4)), (2, 4)),
    (of(("ed_slice", None)), (1, 2)),
    (of(("ed_volume", 12)), (1, 12)),
  ],
)
def test_towers_see_the_same_of_the_slices_that_are_kept(config, kept):
  cut = cmr_tower.seen({"ed_es_volumes": VOLUMES}, config)
  assert cut["ed_es_volumes"].shape[1:3] == kept
  for spec in config.towers.values():
    np.testing.assert_array_equal(
      cmr_tower.select_view(cut, spec), cmr_tower.select_view({"ed_es_volumes": VOLUMES}, spec)
    )


@pytest.mark.parametrize("view", ["cine_slice", "lax"])
@pytest.mark.parametrize("planes, kept", [((4,), 4), ((4, 4), 4), ((4, 3), 10), ((10,), 10)])
def test_towers_see_the_same_of_the_frames_that_are_kept(view, planes, kept):
  config = of(*((view, n) for n in planes))
  cut = cmr_tower.seen({view: FRAMES}, config)
  assert cut[view].shape[1] == kept
  for spec in config.towers.values():
    np.testing.assert_array_equal(
      cmr_tower.select_view(cut, spec), cmr_tower.select_view({view: FRAMES}, spec)
    )


def test_what_another_part_of_the_model_sees_stays_whole():
  config = of(("ed_volume", 6), tokenizer=dict(patch=(1, 1, 1)))
  config.fn = "generation"
  assert models.find(config).part_fields(config) == {"ed_es_volumes"}
  assert cmr_tower.seen({"ed_es_volumes": VOLUMES}, config)["ed_es_volumes"] is VOLUMES


def all_slices(key, cmr):
  """An augmentation of one's own, which mixes slices."""
  return cmr.mean(axis=1, keepdims=True) + 0 * cmr


def augmented(config, volumes):
  batch = {"ecg": jnp.zeros((2, 1, 4)), "cmr": {"ed_es_volumes": volumes}}
  keys = jax.random.split(jax.random.key(3), 2)
  with jax.set_mesh(parallel.make_mesh(data=1, model=1, devices=jax.devices()[:1])):
    run = jax.jit(functools.partial(step_lib.augment, config=config))
    return run(batch, keys)["cmr"]["ed_es_volumes"]


def test_augmentation_changes_seen_planes_as_it_does_all_of_them():
  config = ConfigDict(dict(model=of(("ed_volume", 6), ("es_volume", 6)), data=dict(samples=4)))
  config.augment = dict(
    ecg=dict(fn="standard", phase_noise_strength=0.0, jitter_sigma=0.0, rescale_sigma=0.0),
    cmr=dict(fn="standard", rotation_deg=20.0, scale=0.1, shift=0.1, intensity_sigma=0.1),
    twice=False,
  )
  cut = augmented(config, VOLUMES)
  assert cut.shape == (2, 2, 6, 8, 8)
  rows = []
  keys = jax.vmap(jax.random.split)(jax.random.split(jax.random.key(3), 2))[:, 1]
  change = augment.build("cmr", config.augment.cmr)
  for key, volume in zip(keys, VOLUMES):
    rows.append(change(key, volume)[:, 3:9])
  np.testing.assert_allclose(cut, np.stack(rows), rtol=0, atol=1e-6)
  assert np.abs(cut - VOLUMES[:, :, 3:9]).max() > 0.1
  config.augment.cmr = dict(fn="test_running:all_slices")
  mixed = augmented(config, VOLUMES)
  np.testing.assert_allclose(
    mixed, np.broadcast_to(VOLUMES.mean(axis=2, keepdims=True), VOLUMES.shape), rtol=1e-5
  )
