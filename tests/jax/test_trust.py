"""What a stranger's files may do: nothing that they name is run, and no write leaves the folder
that was asked for."""

import json
import os
import pathlib
import pickle
import re
import shutil
import signal
import time

import matplotlib
import numpy as np
import pytest
from array_record.python import array_record_module
from common import ROOT
from ml_collections import ConfigDict

from mmcl_jax import cli, configuration, evaluate, inspect, prepare, train
from mmcl_jax.data import cohort as cohort_lib
from mmcl_jax.errors import UserError
from mmcl_jax.support import files, locks
from mmcl_jax.training import checkpoint, cohorts, distributed, frozen, goodput, metrics, profile


@pytest.fixture
def victim(tmp_path):
  """A file of the user's that nothing here may touch."""
  file = tmp_path / "mine"
  file.write_text("of value")
  yield file
  assert file.read_text() == "of value"


def make_link(path, victim):
  path.symlink_to(victim)


def make_hard_link(path, victim):
  path.hardlink_to(victim)


def make_dangling(path, victim):
  path.symlink_to(victim.with_name("not there yet"))


def make_pipe(path, victim):
  os.mkfifo(path)


@pytest.mark.reported("a lock that is a symbolic link overwrote the file it points to")
@pytest.mark.parametrize("make", [make_link, make_hard_link, make_dangling, make_pipe])
def test_a_lock_that_leads_elsewhere_is_refused(tmp_path, victim, make):
  (tmp_path / "w").mkdir()
  make(tmp_path / "w/lock", victim)
  words = "lock is (a symbolic link|no file of its own).*remove it"
  with pytest.raises(UserError, match=words), locks.workdir_held(str(tmp_path / "w")):
    pass
  assert sorted(os.listdir(tmp_path)) == ["mine", "w"]


@pytest.mark.reported("temporary files with names that can be guessed were written through a link")
@pytest.mark.parametrize("make", [make_link, make_dangling])
def test_a_new_file_takes_the_place_of_a_link(tmp_path, victim, make):
  for planted in ("table", ".table.partial"):
    make(tmp_path / planted, victim)
  with files.atomic(tmp_path / "table") as file:
    file.write("new")
  assert (tmp_path / "table").read_text() == "new" and not (tmp_path / "table").is_symlink()
  assert sorted(os.listdir(tmp_path)) == ["mine", "table"]


LINKS = {  # what is written to, and the program that writes there
  "checkpoints": lambda out: checkpoint.Checkpoints(str(out), keep=1),
  "checkpoints/7": lambda out: checkpoint.Checkpoints(str(out), keep=1),
  "tensorboard": lambda out: metrics.TensorBoardWriter(str(out), 0),
  "metrics.jsonl": lambda out: metrics.JsonlWriter(str(out), 0),
  "goodput.jsonl": lambda out: goodput.Goodput(time.monotonic).write(str(out), 0, 1),
  "profile": lambda out: profile.Profile(ConfigDict(dict(first=1, steps=1)), str(out)).begin(1),
  "evaluation": lambda out: evaluate.evaluate(str(out), step=1),
  "evaluation/7": lambda out: evaluate.evaluate(str(out), step=1),
  "evaluation/scored.jsonl": lambda out: evaluate.evaluate(str(out), step=1),
  "c.cache": lambda out: frozen.folder(cohort_lib.Cohort(str(out / "c"), {}, {}), str(out)),
  "c.cache/0": lambda out: frozen.folder(cohort_lib.Cohort(str(out / "c"), {}, {}), str(out)),
  "features": lambda out: frozen.folder(cohort_lib.Cohort(str(out / "c"), {}, {}), str(out)),
  "c.partial": lambda out: prepare.main(
    ["synthetic", "--subjects=4", "--split=1,0,0", f"--out={out}/c"]
  ),
  "c.partial/shards": lambda out: prepare.main(
    ["synthetic", "--subjects=4", "--split=1,0,0", f"--out={out}/c"]
  ),
  "c.partial/lock": lambda out: prepare.main(
    ["synthetic", "--subjects=4", "--split=1,0,0", f"--out={out}/c"]
  ),
}


@pytest.mark.parametrize("make", [make_link, make_dangling])
def test_a_new_folder_takes_the_place_of_a_link(tmp_path, victim, make):
  make(files.own_name(tmp_path / "hearts"), victim)
  with files.atomic_folder(tmp_path / "hearts") as folder:
    (folder / "one").write_text("new")
  assert (tmp_path / "hearts/one").read_text() == "new"
  assert sorted(os.listdir(tmp_path)) == ["hearts", "mine"]


@pytest.mark.reported(
  "what a run wrote followed a link out of its workdir, cohort or output folder"
)
@pytest.mark.parametrize("name", LINKS)
def test_no_write_follows_a_link(tmp_path, victim, name):
  elsewhere = tmp_path / "elsewhere"
  elsewhere.mkdir()
  link = tmp_path / "out" / name
  link.parent.mkdir(parents=True)
  link.symlink_to(victim if name.endswith(("jsonl", "lock")) else elsewhere)
  with pytest.raises(UserError, match=f"{re.escape(name)} is a symbolic link.*remove it"):
    LINKS[name](tmp_path / "out")
  assert not any(elsewhere.iterdir())


def test_a_workdir_itself_may_be_a_link(tmp_path):
  (tmp_path / "scratch").mkdir()
  (tmp_path / "w").symlink_to(tmp_path / "scratch")
  writers = configuration.defaults(8, 6).writers
  writer = metrics.create_writer(writers, str(tmp_path / "w"), 0, just_logging=False)
  writer.write_scalars(1, {"loss": 2.0})
  with locks.workdir_held(str(tmp_path / "w")):
    files.no_links(tmp_path / "w/tensorboard")
  assert (tmp_path / "scratch/metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'


# -- A cohort from a stranger, or not the same on every host --


@pytest.fixture
def copied(cohort, tmp_path):
  return pathlib.Path(shutil.copytree(cohort.path, tmp_path / "c"))


def edited(file, change):
  content = json.loads(file.read_text())
  change(content)
  file.write_text(json.dumps(content))


HOSTILE = "hostile.Feature"
PLACES = {
  "the whole": lambda whole: whole.update(pythonClassName=HOSTILE),
  "a field": lambda whole: whole["featuresDict"]["features"]["ecg"].update(pythonClassName=HOSTILE),
  "a field of a field": lambda whole: whole["featuresDict"]["features"].update(
    ecg={
      "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
      "featuresDict": {
        "features": {"x": {"pythonClassName": HOSTILE, "jsonFeature": {"json": "{}"}}}
      },
    }
  ),
  "a sequence": lambda whole: whole["featuresDict"]["features"].update(
    ecg={
      "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
      "sequence": {
        "length": "-1",
        "feature": {"pythonClassName": HOSTILE, "jsonFeature": {"json": "{}"}},
      },
    }
  ),
  "a dtype of another kind": lambda whole: whole["featuresDict"]["features"]["ecg"][
    "tensor"
  ].update(dtype={}),
  "a dtype": lambda whole: whole["featuresDict"]["features"]["ecg"]["tensor"].update(dtype=HOSTILE),
}


@pytest.mark.reported("opening a cohort imported the module that its features.json names")
@pytest.mark.parametrize("place", PLACES)
def test_opening_a_cohort_runs_no_code(copied, tmp_path, monkeypatch, place):
  (tmp_path / "hostile.py").write_text(
    f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Feature: pass\n"
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  edited(next(copied.glob("ecg_cmr/*/features.json")), PLACES[place])
  edited(
    next(copied.glob("ecg_cmr/*/dataset_info.json")), lambda info: info.update(moduleName="hostile")
  )
  opening = {
    "inspect": lambda: inspect.main([str(copied)]),
    "mix": lambda: cohorts.load_mix([(str(copied), 0.3)]),
    "evaluate": lambda: evaluate.evaluate("absent", step=1, cohort_path=str(copied)),
  }
  for verb, run in opening.items():
    with pytest.raises(UserError, match=r"features\.json") as refused:
      run()
    assert "\n" not in str(refused.value), verb
  assert not (tmp_path / "ran").exists()


def rewritten(file, change):
  """A shard with other records, as ArrayRecord writes it."""
  reader = array_record_module.ArrayRecordReader(str(file))
  records = change(reader.read_all())
  reader.close()
  writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1,snappy")
  for one in records:
    writer.write(one)
  writer.close()


def shard(folder, split):
  return next(folder.glob(f"ecg_cmr/*/*-{split}.array_record*"))


CHANGES = {  # of the shard of val
  "a record is missing": lambda records: records[:-1],
  "another order": lambda records: records[::-1],
  "a record twice": lambda records: [records[0], *records[:-1]],
}


@pytest.mark.reported("a host with other records under the same path trained to the end")
@pytest.mark.parametrize("change", CHANGES)
def test_other_records_under_the_same_description_are_refused(copied, change):
  file = shard(copied, "val")
  rewritten(file, CHANGES[change])
  edited(
    copied / "cohort.json",
    lambda info: info["files"].update({str(file.relative_to(copied)): file.stat().st_size}),
  )
  with pytest.raises(UserError, match="val.*is not the file that was written with this cohort"):
    cohort_lib.load(str(copied))
  edited(copied / "cohort.json", lambda info: info["checksums"].clear())
  if change == "a record is missing":
    with pytest.raises(UserError, match="another number of records in val"):
      cohort_lib.load(str(copied))


@pytest.mark.reported("hosts with unlike files under one path did not find out")
def test_hosts_compare_what_they_have_found_and_not_what_cohort_json_says(
  cohort, copied, config, tmp_path, monkeypatch
):
  class Agreed(Exception):
    pass

  def keep(facts):
    told.append(facts)
    raise Agreed

  edited(copied / "cohort.json", lambda info: info["checksums"].clear())
  told = []
  monkeypatch.setattr(distributed, "check_same", keep)
  for change in (lambda records: records, lambda records: records[::-1]):
    rewritten(shard(copied, "val"), change)
    edited(
      copied / "cohort.json",
      lambda info: info["files"].update(
        {name: (copied / name).stat().st_size for name in info["files"]}
      ),
    )
    config.data.mix = ((str(copied), 0.3),)
    with pytest.raises(Agreed):
      train.train(config, str(tmp_path / "w"))
  differing = [fact for fact in told[0] if told[0][fact] != told[1][fact]]
  assert (
    differing == ["the content of the cohorts' files"]
    and told[0]["the fingerprint of the cohorts"][1] == cohort.fingerprint
  )


@pytest.mark.reported("the checksums of a cohort's files could not be compared")
def test_a_cohort_is_read_whole_on_request(copied, capsys):
  inspect.main([str(copied), "--check"])
  assert "4 files read whole, all as they were written" in capsys.readouterr().out
  middle = shard(copied, "train")
  content = bytearray(middle.read_bytes())
  content[len(content) // 2] ^= 1  # further from both ends than what is looked at each time
  middle.write_bytes(content)
  with pytest.raises(UserError, match="train.*its checksum differs"):
    inspect.main([str(copied), "--check"])


@pytest.mark.parametrize(
  "name",
  ["../mine", "/etc/hostname", "ecg_cmr/1.0.0/ecg_cmr-train.array_record-00000-of-00001[0:1]"],
)
def test_a_description_names_no_file_outside_its_cohort(copied, name):
  edited(copied / "cohort.json", lambda info: info["files"].update({name: 1}))
  with pytest.raises(UserError, match="files is missing or not in the form"):
    cohort_lib.load(str(copied))


@pytest.mark.parametrize(
  "damage, words",
  [
    (
      lambda file: np.savez_compressed(file, train=np.zeros((10_000, 2), np.uint32)),
      "at most 10,000 are read",
    ),
    (lambda file: np.savez(file, train=np.array([print], dtype=object)), "allow_pickle=False"),
    (lambda file: file.write_bytes(pickle.dumps(print)), "no archive"),
  ],
)
def test_archives_unfold_to_a_bound_and_hold_no_pickle(tmp_path, monkeypatch, damage, words):
  monkeypatch.setattr(files, "MOST_BYTES", 10_000)
  damage(tmp_path / "x.npz")
  with pytest.raises(ValueError, match=words):
    files.arrays(tmp_path / "x.npz")


def test_no_array_is_read_with_its_pickles():
  sources = list((ROOT / "mmcl_jax").rglob("*.py"))
  assert not [
    file
    for file in sources
    if re.search(
      r"allow_pickle\s*=\s*True|pickle\.loads?\(|import_module\(.*config", file.read_text()
    )
  ]


def test_a_settings_file_in_the_current_folder_changes_no_figure(monkeypatch):
  """matplotlib reads ./matplotlibrc when it is imported; text.usetex starts LaTeX."""
  monkeypatch.setattr(signal, "signal", lambda *args: None)
  with matplotlib.rc_context({"text.usetex": True, "savefig.dpi": 7}):
    assert cli.run(
      lambda argv: (matplotlib.rcParams["text.usetex"], matplotlib.rcParams["savefig.dpi"]), []
    ) == (False, "figure")
