"""Weights out of files: what a checkpoint holds beside them stays inert, and files of strangers do
no harm."""

import argparse
import collections
import enum
import functools
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import test_mmcl_pt as by_hand
from common import ROOT
from mmcl_jax.data.readers import mmcl_pt
from mmcl_jax.errors import BadRecord, UserError
from mmcl_jax.interop import torch_files

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


class AttributeDict(dict):
  """As Lightning keeps hyper-parameters: a dict of a class that is not here."""


class Mode(enum.Enum):
  A = 1


def refused(path, match):
  with pytest.raises(UserError, match=match) as caught:
    torch_files.read(path)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_objects_beside_weights_become_inert(tmp_path, protocol):
  torch = pytest.importorskip("torch")
  net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
  net(torch.randn(4, 3)).sum().backward()
  optimizer = torch.optim.AdamW(net.parameters())
  optimizer.step()
  hyper = AttributeDict(lr=1.0)
  hyper.more = 3
  strange = {
    "args": argparse.Namespace(lr=1, list=[1, 2]),
    "hyper_parameters": hyper,
    "callbacks": {AttributeDict: {"best": 1}, ("a", "b"): 2},
    "numpy": np.float64(3.2),
    "array": np.arange(3),
    "set": {1, 2},
    "frozen": frozenset([1]),
    "path": pathlib.Path("x"),
    "partial": functools.partial(print, 1),
    "default": collections.defaultdict(list, {1: [2]}),
    "mode": Mode.A,
    "counter": collections.Counter("aab"),
    "loss": torch.nn.CrossEntropyLoss(),
    "sparse": torch.eye(3).to_sparse(),
    "bytes": b"abc",
  }
  torch.save(
    {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 7} | strange,
    tmp_path / "x.pth",
    pickle_protocol=protocol,
  )
  found = mmcl_pt.load_checkpoint(tmp_path / "x.pth")
  inert = {name for name, x in found.items() if x is mmcl_pt.INERT}
  assert inert == set(strange) - {"callbacks", "bytes"} | ({"bytes"} if protocol == 2 else set())
  # what stands under a class or a tuple is left out
  assert found["callbacks"] == {} and found["epoch"] == 7
  weights = torch_files.read(tmp_path / "x.pth")
  assert list(weights.state) == list(net.state_dict()) and set(weights.beside) == {
    "optimizer",
    "epoch",
    *strange,
  }
  for key, x in net.state_dict().items():
    np.testing.assert_array_equal(weights.state[key], x.numpy())
  with pytest.raises(BadRecord, match="would run"):  # ECG data may hold nothing of the kind
    mmcl_pt.load(tmp_path / "x.pth")


class Attack:
  """A pickle that makes a file when it is run."""

  def __init__(self, function, *arguments):
    self.function, self.arguments = function, arguments

  def __reduce__(self):
    return self.function, self.arguments


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_in_a_pickle_runs(tmp_path, protocol):
  torch = pytest.importorskip("torch")
  made = tmp_path / "made"
  attacks = {
    "system": Attack(os.system, f"touch {made}"),
    "open": Attack(open, str(made), "w"),
    "exec": Attack(exec, f"open({str(made)!r}, 'w')"),
    "run": Attack(subprocess.run, ["touch", str(made)]),
  }
  torch.save(
    {"model": {"a": torch.tensor(WEIGHT)} | attacks} | attacks,
    tmp_path / "x.pth",
    pickle_protocol=protocol,
  )
  weights = torch_files.read(tmp_path / "x.pth")
  np.testing.assert_array_equal(weights.state["a"], WEIGHT)
  assert list(weights.state) == ["a"] and set(weights.beside) == {*attacks} and not made.exists()
  torch.save(Attack(os.system, f"touch {made}"), tmp_path / "only.pth", pickle_protocol=protocol)
  refused(tmp_path / "only.pth", "holds no weights")
  assert not made.exists()
  pickle.loads(pickle.dumps(attacks["open"])).close()  # the attack is a real one
  assert made.exists()


def nested(depth):
  """A tuple that holds itself twice, `depth` times over: 2^depth leaves in `depth` opcodes."""
  return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))


BOMBS = {
  "key": b"\x80\x02}" + nested(60) + b"Ns.",
  "ordered": b"\x80\x02ccollections\nOrderedDict\n(l(" + nested(60) + b"N\x86a\x85R.",
  "device": b"\x80\x02ctorch\ndevice\n" + nested(60) + b"\x85R.",
  "count": b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
  + nested(60)
  + b"tQ.",
  "set": b"\x80\x04\x8f(" + nested(60) + b"\x90.",
  "frozenset": b"\x80\x04(" + nested(60) + b"\x91.",
  "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b".",
  "call": b"\x80\x02cos\nsystem\n" + nested(60) + b"R.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_pickles_that_would_take_for_ever(tmp_path, name):
  """Hashed or printed, such a tuple takes 2^60 steps; both readers must be done at once, in 2 GiB
  of address space."""
  file = by_hand.raw(tmp_path / "x.pt", BOMBS[name], **{"0": b"\0\0\0\0"})
  code = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\n"
    "from mmcl_jax.data.readers import mmcl_pt; from mmcl_jax.errors import BadRecord\n"
    "for read in (mmcl_pt.load, mmcl_pt.load_checkpoint):\n"
    "  try: read(sys.argv[1])\n"
    "  except BadRecord: pass\n"
  )
  subprocess.run(
    [sys.executable, "-c", code, str(file)],
    check=True,
    timeout=600,
    env={
      "OMP_NUM_THREADS": "1",
      "OPENBLAS_NUM_THREADS": "1",
      "PYTHONPATH": str(ROOT),
    },
  )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
  structure=st.lists(
    st.sampled_from(
      [
        b"}",
        b"]",
        b")",
        b"(",
        b"N",
        b"K\x01",
        b"X\x01\x00\x00\x00a",
        b"s",
        b"u",
        b"a",
        b"e",
        b"b",
        b"R",
        b"\x81",
        b"\x92",
        b"\x8f",
        b"\x90",
        b"\x91",
        b"0",
        b"1",
        b"\x85",
        b"\x86",
        b"t",
        b"q\x00",
        b"h\x00",
        b"cos\nsystem\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch\nSize\n",
      ]
    ),
    max_size=25,
  )
)
def test_any_order_of_opcodes_is_refused_or_plain(tmp_path_factory, structure):
  file = by_hand.raw(
    tmp_path_factory.mktemp("fuzz") / "x.pt", b"\x80\x04" + b"".join(structure) + b"."
  )
  try:
    found = mmcl_pt.load_checkpoint(file)
  except BadRecord:
    return
  assert type(found) in (
    type(None),
    int,
    str,
    list,
    tuple,
    dict,
    collections.OrderedDict,
    mmcl_pt._Inert,
    mmcl_pt._Call,
  )


def test_where_weights_are_found(tmp_path):
  weight = by_hand.tensor(WEIGHT)
  for name in ("model", "state_dict", "model_state_dict", "model_state"):
    weights = torch_files.read(by_hand.save(tmp_path / "x.pt", {name: {"a": weight}, "epoch": 3}))
    np.testing.assert_array_equal(weights.state["a"], WEIGHT)
    assert weights.beside == ["epoch"]
  assert list(torch_files.read(by_hand.save(tmp_path / "x.pt", {"a": weight, "b": 3})).state) == [
    "a"
  ]
  refused(
    by_hand.save(tmp_path / "x.pt", {"model": {"a": weight}, "state_dict": {"a": weight}}),
    "under model and state_dict",
  )
  for nothing in ({}, {"a": 1}, [weight], {"net": {"a": weight}}, None):
    refused(
      by_hand.save(tmp_path / "x.pt", nothing),
      "holds no weights, neither plain nor under model, state_dict",
    )


def test_files_that_are_none(tmp_path):
  good = by_hand.save(tmp_path / "good.pth", {"a": by_hand.tensor(WEIGHT)}).read_bytes()
  for content, match in (
    (good[: len(good) // 2], "no zip"),
    (good[:-30], "no zip|damaged"),
    (b"", "no zip"),
    (b"GIF89a" * 9, "no zip"),
    (mmcl_pt.LEGACY + b"rest", "before 1.6; load it in torch and save it again"),
  ):
    (tmp_path / "x.pth").write_bytes(content)
    refused(tmp_path / "x.pth", match)
  refused(tmp_path / "absent.pth", "No such file")
  refused(tmp_path, "Is a directory")
  (tmp_path / "link.pth").symlink_to(tmp_path / "good.pth")
  # the user's own file, wherever it lies
  assert list(torch_files.read(tmp_path / "link.pth").state) == ["a"]


def safetensors(path, header, data=bytes(24), length=None):
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
  return path


def test_safetensors_with_a_lying_header(tmp_path):
  entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
  file = tmp_path / "x.safetensors"
  assert torch_files.read(safetensors(file, {"a": entry})).state["a"].shape == (2, 3)
  for header, length in (
    ({"a": entry | {"data_offsets": [0, 2400]}}, None),
    ({"a": entry | {"shape": [2, 3000]}}, None),
    ({"a": entry | {"shape": [2**62, 2**62]}}, None),
    ({"a": entry, "b": entry}, None),
    ({"a": entry | {"data_offsets": [24, 0]}}, None),
    ({"a": entry | {"dtype": "X9"}}, None),
    ({"a": entry}, 2**60),
    ({"a": entry}, 5),
    ([1, 2], None),
  ):
    refused(
      safetensors(file, header, length=length),
      "no safetensors file, or a damaged one|of the type 'X9'|no zip",
    )
  refused(safetensors(file, {"a": entry}, data=bytes(20)), "no safetensors file, or a damaged one")


@pytest.mark.reported("safetensors of float8 or float4 ended in an AttributeError")
@pytest.mark.parametrize(
  "dtype, bits",
  [("F8_E4M3", 8), ("F8_E5M2", 8), ("F8_E8M0", 8), ("F4", 4), ("F6_E2M3", 6), ("C64", 64)],
)
def test_types_that_numpy_lacks_are_named(tmp_path, dtype, bits):
  header = {"a": {"dtype": dtype, "shape": [4], "data_offsets": [0, bits // 2]}}
  refused(
    safetensors(tmp_path / "x.safetensors", header, data=bytes(bits // 2)),
    f"'a' is of the type '{dtype}'.*save it as float32",
  )


ANNOUNCED = {
  "more than the file holds": (
    {"dtype": "F32", "shape": [2**41], "data_offsets": [0, 2**43]},
    "no safetensors file, or a damaged one",
  ),
  "no value at all": (
    {"dtype": "F32", "shape": [2**41, 0], "data_offsets": [0, 0]},
    "no tensor in it has a value",
  ),
  "axes without end": (
    {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]},
    "shape of 'a' is not in form",
  ),
  "text for a length": (
    {"dtype": "F32", "shape": ["x" * 2**20, 2**20], "data_offsets": [0, 4]},
    "shape of 'a' is not in form",
  ),
}


@pytest.mark.reported("shapes that announce 7 TiB ended in a MemoryError")
@pytest.mark.parametrize("name", ANNOUNCED)
def test_what_a_header_announces_takes_no_memory(tmp_path, name):
  entry, words = ANNOUNCED[name]
  refused(safetensors(tmp_path / "x.safetensors", {"a": entry}, data=bytes(4)), words)


@pytest.mark.reported("shapes that announce 7 TiB ended in a MemoryError")
def test_a_file_too_large_for_weights_is_not_mapped(tmp_path):
  """7 TiB that take no room on the disk, as holes do."""
  file = safetensors(
    tmp_path / "x.safetensors",
    {"a": {"dtype": "F32", "shape": [7 * 2**38], "data_offsets": [0, 7 * 2**40]}},
  )
  with open(file, "r+b") as f:
    f.truncate(7 * 2**40)
  refused(file, "7,168 GiB; at most 16 GiB are read")


ENDLESS = {
  "lists": b"]",
  "dicts": b"}",
  "tuples": b"))",
  "marks": b"(",
  "numbers": b"K\x01",
  "names": b"]\x94",
}


@pytest.mark.reported("a 60 MB pickle of empty lists took 108 s and 4.3 GB")
@pytest.mark.parametrize("name", ENDLESS)
def test_pickles_of_nothing_end_after_so_many_steps(tmp_path, monkeypatch, name):
  file = by_hand.raw(
    tmp_path / "x.pt", b"\x80\x04](" + ENDLESS[name] * 50_000 + b"e.", **{"0": b"\0\0\0\0"}
  )
  monkeypatch.setattr(mmcl_pt._Counted, "left", 40_000)
  refused(file, "steps; expected at most some 200,000 tensors")
  with pytest.raises(BadRecord, match="steps"):
    mmcl_pt.load(file)


def test_the_directory_of_an_archive_is_bounded(tmp_path, monkeypatch):
  file = by_hand.raw(tmp_path / "x.pt", b"\x80\x04N.", **{str(i): b"" for i in range(100)})
  monkeypatch.setattr(mmcl_pt, "MAX_DIRECTORY_BYTES", 5000)
  refused(file, "an archive whose directory has .* bytes; expected at most 5000")


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_types_of_numbers(tmp_path, name):
  torch = pytest.importorskip("torch")
  from safetensors.torch import save_file

  x = torch.tensor(WEIGHT).to(getattr(torch, name))
  torch.save({"a": x}, tmp_path / "x.pth")
  save_file({"a": x}, tmp_path / "x.safetensors")
  for file in ("x.pth", "x.safetensors"):
    found = torch_files.read(tmp_path / file).state["a"]
    assert found.dtype.name == name
    np.testing.assert_array_equal(found.astype(np.float64), WEIGHT)


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
  pytest.importorskip("torch")
  from safetensors.torch import load_file

  file = tmp_path / "x.safetensors"
  torch_files.save({"a": WEIGHT.T, "n": np.zeros((), np.int64)}, file, {"heads": "3"})
  found = load_file(file)
  np.testing.assert_array_equal(found["a"].numpy(), WEIGHT.T)
  assert found["n"].shape == () and torch_files.read(file).metadata == {
    "format": "pt",
    "heads": "3",
  }
  before = file.read_bytes()
  with pytest.raises(UserError, match="cannot write"):
    torch_files.save({"a": WEIGHT}, tmp_path / "absent/x.safetensors", {})

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(torch_files.os, "replace", full)
  with pytest.raises(UserError, match="cannot write .*No space left"):
    torch_files.save({"a": WEIGHT}, file, {})
  assert file.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["x.safetensors"]
