"""People whom a run has learned from do not come back as people to score it on, or it is said
wherever scores are."""

import types

import numpy as np
import pytest

from mmcl_jax.data import schema
from mmcl_jax.errors import UserError
from mmcl_jax.training import checkpoint, people


def a_cohort(tmp_path, name="c", train=(), val=(), test=(), **info):
  """A cohort of people who are numbers, as far as its subjects go."""
  folder = tmp_path / name
  folder.mkdir()
  rows = {
    split: np.array([[n, 0] for n in who], np.uint32).reshape(-1, 2)
    for split, who in zip(schema.SPLITS, (train, val, test))
  }
  np.savez(folder / "subjects.npz", **rows)
  info = {"source": "UK Biobank", "counts": {split: len(x) for split, x in rows.items()}} | info
  return types.SimpleNamespace(path=str(folder), info=info)


def seen(cohort, learned, allowed=True):
  return people.held_out(cohort, learned, "had part in the training of W", allowed, "--go_on")


def test_people_are_counted_once_and_by_what_they_were_for(tmp_path):
  first = a_cohort(tmp_path, "first", train=[1, 2, 3, 3], val=[4, 5], test=[6], salt_tag="a")
  second = a_cohort(
    tmp_path, "second", train=[6], val=[3, 4, 7], test=[2, 2, 5, 8, 9], salt_tag="a"
  )
  learned, chose = people.of_cohort(first), people.of_cohort(first, chooses=True)
  assert {split: seen(second, learned)[split] for split in ("test", "val")} == {"test": 1, "val": 1}
  assert {split: seen(second, chose)[split] for split in ("test", "val")} == {"test": 2, "val": 1}
  assert seen(first, chose) == {"test": 0, "val": 0, "note": ""}  # another stage on the same cohort
  with pytest.raises(
    UserError,
    match="^2 of 4 test people and 1 of 3 val people of .*second had part in the training of W, .*--go_on",
  ):
    seen(second, chose, allowed=False)
  assert (
    "2 of 4 test people and 1 of 3 val people of the cohort had part in training"
    in seen(second, chose)["note"]
  )


def test_what_cannot_be_told_is_said(tmp_path):
  learned = people.of_cohort(a_cohort(tmp_path, "a", train=[1], salt_tag="a"))
  other = a_cohort(tmp_path, "b", test=[1], salt_tag="b")
  made_up = a_cohort(tmp_path, "s", test=[1], synthetic=True)
  found = seen(other, learned, allowed=False)
  assert (
    found["test"] == 0
    and "different salts" in found["note"]
    and "cannot be compared" in found["note"]
  )
  assert seen(made_up, learned)["note"] == seen(other, people.of_cohort(made_up))["note"] == ""
  converted = people.People({}, {}, ("w.pth",))
  assert seen(other, converted, allowed=False)["note"] == "It is not known whom w.pth learned from."


def test_all_stages_are_kept_with_a_checkpoint(tmp_path, monkeypatch):
  one = a_cohort(tmp_path, "one", train=[3, 1], val=[9], salt_tag="a")
  two = a_cohort(tmp_path, "two", train=[2, 1], salt_tag="a")
  three = a_cohort(tmp_path, "three", train=[1], salt_tag="b/../c")
  whole = people.together(
    people.of_cohort(one, chooses=True),
    people.of_cohort(two),
    people.of_cohort(three),
    people.People({}, {}, ("w.pth",)),
  )
  folder = checkpoint.step_folder(str(tmp_path / "w"), 6)
  folder.mkdir(parents=True)
  np.savez(folder / "people.npz", **people.as_arrays(whole))
  checkpoint.sign(folder, {"step": 6, "run": "r"})
  kept = people.of_run(str(tmp_path / "w"), 6)
  assert {salt: list(x) for salt, x in kept.train.items()} == {"a": [1, 2, 3], "b/../c": [1]}
  assert {salt: list(x) for salt, x in kept.val.items()} == {"a": [9]} and kept.unknown == (
    "w.pth",
  )
  (folder / "people.npz").write_bytes((folder / "people.npz").read_bytes()[:-9])
  with pytest.raises(UserError, match="people.npz is missing or damaged"):
    people.of_run(str(tmp_path / "w"), 6)
  manifest = checkpoint.manifest(str(tmp_path / "w"), 6)
  changed = manifest | {"files": {}, "origin": "w.pth"}
  monkeypatch.setattr(checkpoint, "manifest", lambda workdir, step: changed)
  assert people.of_run(str(tmp_path / "w"), 6) == people.People({}, {}, ("w.pth",))
