"""Making a cohort: interrupted or not, by one process or two, the same records; what identifies a
person stays out."""

import errno
import functools
import json
import os
import pathlib
import stat
import types

import numpy as np
import pytest

from mmcl_jax import prepare
from mmcl_jax.data import builder, cohort as cohort_lib, schema
from mmcl_jax.data.sources import Item, Plan, synthetic
from mmcl_jax.errors import BadRecord, UserError
from mmcl_jax.support import locks

SHARES = (0.6, 0.2, 0.2)
SALT = b"of this test"


def record(number: int) -> dict:
  rng = np.random.default_rng(number)
  return {
    "has_ecg": np.True_,
    "has_cmr": np.False_,
    "ecg": rng.normal(size=(12, 5000)).astype(np.float32),
    "phenotypes": np.array([number, np.nan], np.float32),
    "diseases": np.zeros(0, np.float32),
    "covariates": np.full(4, number, np.float32),
  }


def record_alone(item):
  return record(item.key), ()


def read(item):
  """A toy reader; the number of a record decides what goes wrong."""
  number = item.key
  if number % 10 == 3:
    raise BadRecord(f"DEMO{number}: the file of demo{number} is cut off")
  if number % 10 == 4:
    raise KeyError(f"DEMO{number}")
  if number % 10 == 5:
    return record(number) | {"ecg": np.zeros((12, 4000), np.float32)}, ()
  if number % 10 == 6:
    return {name: x for name, x in record(number).items() if name != "covariates"}, ()
  return record(number), (f"a remark on DEMO{number}",) if number % 10 == 7 else ()


def plan(n=220, read=read, **changes) -> Plan:
  items = [Item(schema.subject_hash(f"DEMO{i}", SALT), 2, i, (f"DEMO{i}",)) for i in range(n)]
  info = {
    "source": "toy",
    "phenotypes": {"LVM": "g", "LVEF": "%"},
    "diseases": [],
    "covariates": schema.COVARIATES,
    "ecg_is_normalised": True,
    "ecg_profile": "minimal",
  }
  return Plan(items, read, info, {"toys": n})._replace(**changes)


def build(out, plan, processes=1, **kwargs):
  return builder.build(
    str(out), plan, shares=SHARES, profile="minimal", processes=processes, **kwargs
  )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  seen = []
  folder = tmp_path_factory.mktemp("cohort") / "c"
  return build(folder, plan(), report=lambda folder, cohort, outcome: seen.append(outcome)), seen[0]


def test_each_fault_costs_its_own_record_and_is_told_without_names(built):
  cohort, outcome = built
  kept = sorted(int(r["phenotypes"][0]) for source in cohort.splits.values() for r in source)
  assert kept == [i for i in range(220) if i % 10 not in (3, 4, 5, 6)]
  assert outcome.steps == {"toys": 220, "read": 220, "kept": 132} and len(outcome.rejected) == 88
  by_id = {entry["id"]: entry["reason"] for entry in outcome.rejected}
  reasons = {i: by_id[plan().items[i].salted_id] for i in range(220) if i % 10 in (3, 4, 5, 6)}
  assert reasons[13] == "<id>: the file of <id> is cut off"  # in any case
  assert reasons[14] == "unexpected KeyError: '<id>'"
  assert "ecg int16 [12, 4000]" in reasons[15] and "covariates" in reasons[16]
  assert {tuple(entry["flags"]) for entry in outcome.flags} == {("a remark on <id>",)} and len(
    outcome.flags
  ) == 22
  assert "DEMO" not in json.dumps(outcome._asdict(), default=str)
  assert not [
    f for f in pathlib.Path(cohort.path).rglob("*") if f.is_file() and b"DEMO" in f.read_bytes()
  ]


def test_records_come_back_as_they_were_in_the_order_of_the_plan(built):
  cohort, outcome = built
  for split, source in cohort.splits.items():
    numbers = [int(r["phenotypes"][0]) for r in source]
    assert numbers == sorted(numbers)
    assert numbers == [
      int(p) for p, s in zip(outcome.phenotypes[:, 0], outcome.splits) if s == split
    ]
    for r, number in zip(source, numbers):
      wanted = record(number)
      assert schema.split_of(r["subject"], SHARES) == split and r["visit"] == 2
      np.testing.assert_array_equal(r["subject"], schema.subject_hash(f"DEMO{number}", SALT))
      np.testing.assert_allclose(
        r["ecg"] * r["ecg_scale"], wanted["ecg"], atol=np.abs(wanted["ecg"]).max() / 65000
      )
  np.testing.assert_array_equal(outcome.covariates[:, 0], outcome.phenotypes[:, 0])


def test_two_processes_and_an_interruption_change_nothing(built, tmp_path):
  """An interrupted run keeps its finished shards, is not a cohort, and goes on to the same
  records."""

  def stop_midway(write, shards, processes):
    for shard in shards[:2]:
      write(shard)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    build(tmp_path / "c", plan(), run=stop_midway)
  with pytest.raises(UserError, match="no cohort"):
    cohort_lib.load(str(tmp_path / "c"))
  done = {f: f.stat().st_mtime_ns for f in (tmp_path / "c.partial").rglob("*.array_record")}
  assert len(done) == 2
  renamed = {}

  def keep_times(folder, cohort, outcome):
    renamed.update({f.stat().st_mtime_ns: f for f in pathlib.Path(folder).rglob("*-of-*")})

  again = build(tmp_path / "c", plan(), processes=2, report=keep_times)
  assert set(done.values()) <= renamed.keys()  # not written anew
  assert (
    again.fingerprint == built[0].fingerprint and again.info["counts"] == built[0].info["counts"]
  )
  assert sorted(os.listdir(tmp_path)) == ["c"] and sorted(os.listdir(tmp_path / "c")) == [
    "cohort.json",
    "ecg_cmr",
    "subjects.npz",
  ]


def read_from(where, item):
  return read(item)


def test_another_plan_does_not_go_on_from_a_beginning(tmp_path):
  def stop(write, shards, processes):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    build(tmp_path / "c", plan(), run=stop)
  # same people, another table or folder
  other_values = [item._replace(key=item.key + 1000) for item in plan().items]
  for other in (
    plan(n=219),
    plan(items=other_values),
    plan(read=functools.partial(read_from, "elsewhere")),
  ):
    with pytest.raises(UserError, match="begun with other inputs"):
      build(tmp_path / "c", other)


def test_a_single_changed_sample_changes_the_fingerprint(tmp_path, built):
  def changed(item):
    found, flags = read(item)
    found["ecg"][3, 100] += 0.01 * (item.key == 120)
    return found, flags

  assert build(tmp_path / "c", plan(read=changed)).fingerprint != built[0].fingerprint


def failing_disk(item):
  if item.key == 50:
    raise OSError(5, "Input/output error", f"/data/DEMO{item.key}")
  return read(item)


def test_a_failing_disk_stops_the_run_and_rejects_nobody(tmp_path, built):
  with pytest.raises(
    UserError, match=r"record [0-9a-f]{16}/2 failed \(Input/output error\)"
  ) as error:
    build(tmp_path / "c", plan(read=failing_disk))
  assert "DEMO" not in str(error.value)
  assert build(tmp_path / "c", plan()).fingerprint == built[0].fingerprint


def deadly(item):
  if item.key == 199:
    os.kill(os.getpid(), 9)
  return read(item)


def test_a_worker_that_is_killed_stops_the_run_with_what_to_do(tmp_path, built):
  with pytest.raises(UserError, match="a worker process died.*fewer --processes than 2"):
    build(tmp_path / "c", plan(read=deadly), processes=2)
  assert build(tmp_path / "c", plan(), processes=2).fingerprint == built[0].fingerprint
  # a mistake in a worker arrives as it is
  with pytest.raises(UserError, match="Input/output error"):
    build(tmp_path / "d", plan(read=failing_disk), processes=2)


def all_bad(item):
  raise BadRecord("not an ECG")


def with_nan(item):
  found = record(item.key)
  found["ecg"][2, 7] = np.nan
  return (found, ()) if item.key % 3 == 0 else read(item)


def test_an_ecg_that_is_not_finite_is_no_record(tmp_path):
  seen = []
  cohort = build(
    tmp_path / "c",
    plan(60, read=with_nan),
    report=lambda folder, cohort, outcome: seen.append(outcome),
  )
  assert (
    sum(entry["reason"] == "1 samples of the ECG are not finite" for entry in seen[0].rejected)
    == 20
  )
  assert all(
    np.isfinite(r["ecg_scale"]) and r["phenotypes"][0] % 3
    for source in cohort.splits.values()
    for r in source
  )


def short(item):
  return record(item.key) | {"ecg": np.zeros((12, 4000), np.float32)}, ()


def one_more(item):
  return record(item.key) | {"diseases": np.zeros(1, np.float32)}, ()


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      dict(read=short, info=plan().info | {"ecg_is_normalised": False}),
      r"ECG of shape \[12, 4000\]; expected \[12, 5000\]",
    ),
    (dict(read=one_more), r"diseases of shape \[1\] and names 0"),
    (dict(read=all_bad), "none of the first 30 records.*not an ECG"),
    (dict(items=[]), "would hold no subject"),
    (dict(items=plan(2).items * 2), "planned twice"),
  ],
)
def test_hopeless_plans_are_refused_in_one_line(tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    build(tmp_path / "c", plan(30, **changes))
  assert not (tmp_path / "c").exists()


def test_visits_of_one_person_are_never_in_two_splits(tmp_path):
  items = [item._replace(visit=visit) for item in plan(30).items for visit in (2, 3)]
  cohort = build(tmp_path / "c", plan(items=items))
  homes = {}
  for split, source in cohort.splits.items():
    for r in source:
      homes.setdefault(r["subject"].tobytes(), set()).add(split)
  assert max(map(len, homes.values())) == 1 and sum(map(len, cohort.splits.values())) == 2 * len(
    homes
  )
  with pytest.raises(UserError, match="in train and in test"):
    build(
      tmp_path / "d", plan(items=items, split=lambda item: "train" if item.visit == 2 else "test")
    )


def test_a_folder_in_use_is_left_alone(tmp_path):
  (tmp_path / "c").mkdir()
  (tmp_path / "c" / "mine").write_text("x")
  with pytest.raises(UserError, match="is not empty"):
    build(tmp_path / "c", plan(30))
  assert os.listdir(tmp_path) == ["c"]


@pytest.mark.reported(
  "prepare could not run where files cannot be locked, and blamed another process"
)
@pytest.mark.parametrize("number", sorted(locks.UNSUPPORTED))
def test_where_files_cannot_be_locked_it_is_said_and_the_work_goes_on(
  tmp_path, monkeypatch, capsys, number
):
  def flock(file, operation):
    raise OSError(number, "no locks here")

  monkeypatch.setattr(locks.fcntl, "flock", flock)
  build(tmp_path / "c", plan(30, record_alone))
  assert capsys.readouterr().out.count("c.partial is on a file system without locks") == 1
  with locks.workdir_held(str(tmp_path / "w")):
    assert f"process {os.getpid()}" in (tmp_path / "w/lock").read_text()
  assert "w is on a file system without locks" in capsys.readouterr().out


def test_what_another_process_prepares_is_left_to_it(tmp_path):
  (tmp_path / "c.partial").mkdir()
  with open(tmp_path / "c.partial/lock", "w") as held:
    assert locks.locked(held.fileno(), "c")
    with pytest.raises(UserError, match="another process is preparing"):
      build(tmp_path / "c", plan(30, record_alone))


def test_a_lock_that_fails_otherwise_is_no_other_process(tmp_path, monkeypatch):
  def flock(file, operation):
    raise OSError(errno.EIO, "broken disk")

  monkeypatch.setattr(locks.fcntl, "flock", flock)
  with pytest.raises(OSError, match="broken disk"):
    build(tmp_path / "c", plan(30, record_alone))
  with (
    pytest.raises(UserError, match="cannot write to .*broken disk"),
    locks.workdir_held(str(tmp_path / "w")),
  ):
    pass


def test_the_same_command_finds_its_cohort_and_another_does_not(tmp_path, monkeypatch):
  """As where it was killed after the cohort had got its name, before it had cleared up."""
  first = build(tmp_path / "c", plan(30))
  (tmp_path / "c" / "plan.json").touch()
  with monkeypatch.context() as patch:
    patch.setattr(builder, "write_all", None)  # nothing is made again
    again = build(tmp_path / "c", plan(30))
    assert again.info == first.info and not (tmp_path / "c" / "plan.json").exists()
    with pytest.raises(UserError, match="holds a cohort of other inputs or settings"):
      build(tmp_path / "c", plan(31))
  assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("out", ["{tmp}/link", "."])
def test_a_name_that_a_cohort_cannot_get_is_refused_before_the_work(tmp_path, monkeypatch, out):
  (tmp_path / "there").mkdir()
  (tmp_path / "link").symlink_to(tmp_path / "there")
  monkeypatch.chdir(tmp_path / "there")
  with pytest.raises(UserError, match="expected the name of a new folder"):
    build(out.format(tmp=tmp_path), plan(30))


def test_a_cohort_tells_who_is_in_it_and_what_they_have(built):
  cohort, _ = built
  assert cohort.info["with_ecg"] == cohort.info["counts"] and set(
    cohort.info["with_cmr"].values()
  ) == {0}
  for split, source in cohort.splits.items():
    np.testing.assert_array_equal(
      cohort_lib.subjects(cohort)[split], [r["subject"] for r in source]
    )


def test_training_statistics_are_those_of_the_training_split(built):
  cohort, outcome = built
  train = np.array(outcome.splits) == "train"
  mean, sd = cohort_lib.train_statistics(cohort, "phenotypes")
  known = outcome.phenotypes[train, 0].astype(np.float64)
  assert (mean[0], sd[0]) == (
    np.float32(known.mean()),
    np.float32(known.std()),
  ) and mean.dtype == np.float32
  assert known.mean() != outcome.phenotypes[:, 0].mean()
  assert cohort.info["train_statistics"]["phenotypes"]["LVEF"] is None  # never measured
  assert np.isnan([mean[1], sd[1]]).all()
  mean, sd = cohort_lib.train_statistics(cohort, "covariates")
  np.testing.assert_array_equal([mean, sd], np.float32([[known.mean()] * 4, [known.std()] * 4]))


def test_moments_against_numpy_and_where_there_are_none():
  values = np.random.default_rng(0).normal(100, 1e-3, (500, 6)).astype(np.float32)
  values[::3, 1], values[1:, 2], values[:, 3], values[:, 4], values[:-2, 5] = (
    np.nan,
    np.nan,
    0.1,
    np.nan,
    np.nan,
  )
  found = builder.moments(values)
  assert found[2:5] == [None] * 3  # one value, one value many times, none
  wide = values.astype(np.float64)
  for column in (0, 1, 5):
    np.testing.assert_allclose(
      found[column], [np.nanmean(wide[:, column]), np.nanstd(wide[:, column])], rtol=1e-12
    )
  assert builder.moments(values[:0]) == [None] * 6 and builder.moments(values[:, :0]) == []


def test_a_cohort_without_phenotypes_has_empty_statistics(built):
  cohort, _ = built
  bare = cohort._replace(
    info=cohort.info | {"phenotypes": {}, "train_statistics": {"phenotypes": {}}}
  )
  assert [x.shape for x in cohort_lib.train_statistics(bare, "phenotypes")] == [(0,), (0,)]


def test_units_are_spelled_alike_in_all_cohorts(tmp_path):
  made = plan(30, record_alone)
  cohort = build(
    tmp_path / "c", made._replace(info=made.info | {"phenotypes": {"LVM": "G", "LVEF": "percent"}})
  )
  assert cohort.info["phenotypes"] == {"LVM": "g", "LVEF": "%"}


def test_splits_stay_when_a_cohort_grows(tmp_path):
  """The split depends on the subject's hash alone, and the hash on the private folder's salt."""
  small, large = (
    {item.key: schema.split_of(item.subject, SHARES) for item in plan(n).items} for n in (50, 200)
  )
  assert small.items() <= large.items()
  made = []
  for name in ("a", "a", "b"):
    made.append(prepare.Identities(str(tmp_path / name), "c"))
    made[-1].save()
  first, same, other = made
  assert first.tag == same.tag != other.tag
  np.testing.assert_array_equal(first.identify("DEMO1"), same.identify("DEMO1"))
  assert not np.array_equal(first.identify("DEMO1"), other.identify("DEMO1"))


def test_the_private_folder_is_private_and_remembers(tmp_path):
  folder = tmp_path / "p"
  for name in ("DEMO2", 'a,"b"'):
    identities = prepare.Identities(str(folder), "c")
    identities.identify(name)
    identities.save()
  assert stat.S_IMODE(folder.stat().st_mode) == 0o700
  assert {stat.S_IMODE(f.stat().st_mode) for f in folder.iterdir()} == {0o600}
  rows = (folder / "participants.csv").read_text().splitlines()
  assert rows[0] == "hash,participant" and sorted(row.split(",", 1)[1] for row in rows[1:]) == [
    '"a,""b"""',
    "DEMO2",
  ]
  for text in ("no salt", "", "ab", "ab" * 40):
    (folder / "salt").write_text(text)
    with pytest.raises(UserError, match="is not a salt"):
      prepare.Identities(str(folder), "c")
  with pytest.raises(UserError, match="lies in --out"):
    prepare.Identities(str(tmp_path / "c" / "private"), str(tmp_path / "c"))


def test_beam_writes_the_same_cohort(tmp_path):
  """Runs where Apache Beam is installed (launch/constraints-beam.txt)."""
  pytest.importorskip("apache_beam")
  from mmcl_jax.data import beam

  plan = synthetic.plan(types.SimpleNamespace(subjects=120, seed=3))
  local, cluster = (
    build(tmp_path / name, plan, processes=2, run=run)
    for name, run in (("local", None), ("beam", functools.partial(beam.run, options=[])))
  )
  assert cluster.fingerprint == local.fingerprint and cluster.info["counts"] == local.info["counts"]
