"""What all rooms share: files that are whole or not there, JSON against a type, flat trees."""

import os
from typing import Any, NotRequired, TypedDict

import pytest

from mmcl_jax.support import files, text, tree, typed


def test_a_file_takes_its_name_once_it_is_whole_and_on_disk(tmp_path, monkeypatch):
  """fsync of the file before the rename, and of its folder after it."""
  (tmp_path / "a").write_text("old")
  calls, fsync, replace = [], os.fsync, os.replace
  monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync") or fsync(file))
  monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
  with files.atomic(tmp_path / "a") as file:
    file.write("new")
    file.flush()
    assert (tmp_path / "a").read_text() == "old"
  assert (tmp_path / "a").read_text() == "new" and os.listdir(tmp_path) == ["a"]
  assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("write", [files.atomic, files.atomic_folder])
def test_what_fails_leaves_what_was_there(tmp_path, write):
  with write(tmp_path / "a") as first:
    if write is files.atomic_folder:
      (first / "x").write_text("old")
    else:
      first.write("old")
  with pytest.raises(RuntimeError), write(tmp_path / "a"):
    raise RuntimeError
  kept = tmp_path / "a/x" if write is files.atomic_folder else tmp_path / "a"
  assert kept.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_writers_of_one_file_do_not_meet_and_leftovers_of_the_dead_go(tmp_path):
  """Of no process, and of one that runs."""
  mine = files.own_name(tmp_path / "a").name
  prefix = mine.removesuffix(str(os.getpid()))
  (tmp_path / f"{prefix}none").touch()
  (tmp_path / f"{prefix}1").touch()
  with files.atomic(tmp_path / "a", shared=True) as file:
    file.write("x")
  assert sorted(os.listdir(tmp_path)) == [f"{prefix}1", "a"]


class Content(TypedDict):
  name: str
  counts: dict[str, int]
  pairs: list[list[float] | None]
  more: NotRequired[bool]
  rest: NotRequired[Any]


@pytest.mark.parametrize(
  "change, wrong",
  [
    ({}, []),
    ({"rest": object(), "unknown": 1, "more": True}, []),
    ({"name": 1}, ["name"]),
    ({"counts": {"a": 1.5}}, ["counts"]),
    ({"counts": {"a": True}}, ["counts"]),
    ({"counts": []}, ["counts"]),
    ({"pairs": [[1, 2.5], None]}, []),
    ({"pairs": [["x"]]}, ["pairs"]),
    ({"more": 1, "name": None}, ["name", "more"]),
  ],
)
def test_entries_against_their_types(change, wrong):
  whole = {"name": "a", "counts": {"a": 1}, "pairs": []}
  assert typed.wrong_entries(whole | change, Content) == wrong
  assert typed.wrong_entries({}, Content) == ["name", "counts", "pairs"]


def test_trees_become_flat_and_back():
  nested = {
    "params": {"ecg": {"block0": {"kernel": 1}}, "scale": 2},
    "batch_stats": {"a": {"b": 3}},
  }
  flat = tree.flatten_variables(nested)
  assert flat == {
    ("params", "ecg/block0/kernel"): 1,
    ("params", "scale"): 2,
    ("batch_stats", "a/b"): 3,
  }
  assert tree.unflatten_variables(flat) == nested
  assert tree.flatten({"a": {"b": 1, "c": {}}, "d": 2}) == {"a.b": 1, "a.c": {}, "d": 2}


def test_columns():
  rows = [["name", "n"], ["LVEF", "1,600"], ["x\n", "2"]]
  assert text.aligned(rows) == "name      n\nLVEF  1,600\nx         2"
