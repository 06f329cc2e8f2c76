"""Files of torch.save read without torch, and the cohort source over them."""

import argparse
import collections
import contextlib
import io
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from mmcl_jax.data import schema
from mmcl_jax.data.readers import mmcl_pt
from mmcl_jax.data.sources import mmcl_pt as source
from mmcl_jax.errors import BadRecord, UserError

STORAGE = {
  "float64": "DoubleStorage",
  "float32": "FloatStorage",
  "float16": "HalfStorage",
  "int64": "LongStorage",
  "uint8": "ByteStorage",
  "bool": "BoolStorage",
  "int16": "ShortStorage",
}


class Global:
  """Written as a GLOBAL opcode, which is how torch names its own functions."""

  def __init__(self, module, name):
    self.module, self.name = module, name


class Call:
  """Written as a call of a Global."""

  def __init__(self, module, name, *arguments, state=None):
    self.function, self.arguments, self.state = Global(module, name), arguments, state


class Storage:
  def __init__(self, values, kind=None, key=None, count=None):
    self.values = np.ascontiguousarray(values)
    self.kind, self.key, self.count = kind or STORAGE[self.values.dtype.name], key, count


class Pickler(pickle._Pickler):
  """Writes what torch.save writes: storages by persistent id, functions of torch by name."""

  dispatch = dict(pickle._Pickler.dispatch)

  def __init__(self, file, storages, protocol):
    super().__init__(file, protocol)
    self.storages = storages

  def persistent_id(self, x):
    if not isinstance(x, Storage):
      return None
    if x not in self.storages:
      self.storages.append(x)
    key = str(self.storages.index(x)) if x.key is None else x.key
    return (
      "storage",
      Global("torch", x.kind),
      key,
      "cpu",
      x.values.size if x.count is None else x.count,
    )

  def save_named(self, x):
    self.write(pickle.GLOBAL + f"{x.module}\n{x.name}\n".encode())
    self.memoize(x)

  def save_call(self, x):
    self.save(x.function)
    self.save(x.arguments)
    self.write(pickle.REDUCE)
    if x.state is not None:
      self.save(x.state)
      self.write(pickle.BUILD)

  dispatch |= {Global: save_named, Call: save_call}


def tensor(array, storage=None, offset=0, stride=None):
  array = np.asarray(array)
  stride = (
    tuple(s // array.itemsize for s in np.array(array, order="C").strides)
    if stride is None
    else stride
  )
  hooks = Call("collections", "OrderedDict")
  return Call(
    "torch._utils",
    "_rebuild_tensor_v2",
    storage or Storage(array),
    offset,
    array.shape,
    stride,
    False,
    hooks,
  )


def laid(size, stride, offset=0, values=12, **storage):
  """A tensor of any layout over 0, 1, 2, ..."""
  kept = Storage(np.arange(values, dtype=np.float32), **storage)
  return Call("torch._utils", "_rebuild_tensor_v2", kept, offset, size, stride, False, None)


def save(path, tree, root="archive", protocol=2, compression=zipfile.ZIP_STORED, **members):
  storages, structure = [], io.BytesIO()
  Pickler(structure, storages, protocol).dump(tree)
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr(f"{root}/data.pkl", structure.getvalue())
    archive.writestr(f"{root}/byteorder", "little")
    for i, storage in enumerate(storages):
      archive.writestr(f"{root}/data/{i}", storage.values.tobytes())
    for name, content in members.items():
      archive.writestr(name, content)
  return path


def raw(path, structure, **storages):
  """An archive with a pickle written by hand."""
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a/data.pkl", structure)
    for key, content in storages.items():
      archive.writestr(f"a/data/{key}", content)
  return path


def refused(path, match):
  with pytest.raises(BadRecord, match=match) as caught:
    mmcl_pt.load(path)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
  return str(caught.value)


@pytest.mark.parametrize("protocol", (2, 4, 5))
def test_structure_and_values_come_back(tmp_path, protocol):
  rng = np.random.default_rng(0)
  arrays = {name: (10 * rng.standard_normal((3, 4))).astype(name) for name in STORAGE}
  plain = (1, -70_000, 2**70, 2.5, "text \u00e9", None, True, False, [], {}, ())
  file = save(
    tmp_path / "x.pt",
    [
      {name: tensor(x) for name, x in arrays.items()},
      plain,
      Call("torch", "Size", (2, 3)),
      Call("torch", "device", "cuda", 1),
      Global("torch", "float32"),
      Call("torch._utils", "_rebuild_parameter", tensor(np.float32([7])), True, None),
      Call("collections", "OrderedDict", [("b", 1), ("a", 2)], state={"_metadata": 1}),
    ],
    protocol=protocol,
  )
  found, *rest = mmcl_pt.load(file)
  for name, x in arrays.items():
    assert found[name].dtype == x.dtype and not found[name].flags.writeable
    np.testing.assert_array_equal(found[name], x)
  assert rest[:4] == [plain, (2, 3), "cuda:1", "torch.float32"] and [type(x) for x in rest[0]] == [
    type(x) for x in plain
  ]
  assert rest[4] == np.float32([7])
  assert rest[5] == collections.OrderedDict([("b", 1), ("a", 2)]) and not hasattr(
    rest[5], "_metadata"
  )


def test_layouts_are_those_of_numpy(tmp_path):
  whole = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
  views = [
    whole,
    whole[1],
    whole[1].T,
    whole[:, ::2, 1:4:2],
    whole[2, 3, 4, ...],
    whole[:0],
    whole.transpose(2, 0, 1),
  ]
  storage = Storage(whole)
  start = whole.__array_interface__["data"][0]
  tree = [
    tensor(
      view,
      storage,
      (view.__array_interface__["data"][0] - start) // 4 if view.size else 0,
      tuple(s // 4 for s in view.strides),
    )
    for view in views
  ]
  for found, view in zip(mmcl_pt.load(save(tmp_path / "x.pt", tree)), views, strict=True):
    assert found.shape == view.shape
    np.testing.assert_array_equal(found, view)


def test_bfloat16_is_the_upper_half_of_float32(tmp_path):
  values = np.array([1, -2.5, 3.14159, 1e30, np.inf], np.float32)
  upper = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
  file = save(tmp_path / "x.pt", tensor(upper, Storage(upper, "BFloat16Storage")))
  expected = (upper.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
  np.testing.assert_array_equal(mmcl_pt.load(file).astype(np.float32), expected)


def test_dtypes_without_a_storage_type(tmp_path):
  values = np.arange(7, dtype=np.uint32)
  storage = Storage(values.view(np.uint8), "UntypedStorage")
  tree = Call(
    "torch._utils",
    "_rebuild_tensor_v3",
    storage,
    2,
    (4,),
    (1,),
    False,
    None,
    Global("torch", "uint32"),
    None,
  )
  np.testing.assert_array_equal(mmcl_pt.load(save(tmp_path / "x.pt", tree)), values[2:6])


@pytest.mark.parametrize(
  "size, stride, offset",
  (
    ((13,), (1,), 0),
    ((12,), (1,), 1),
    ((3, 4), (5, 1), 0),
    ((2,), (12,), 0),
    ((1,), (1,), 12),
    ((2,), (2**62,), 0),
    ((2,), (-1,), 5),
    ((1,), (1,), -1),
    ((-1,), (1,), 0),
    ((2, 2), (1,), 0),
    ((2.0,), (1,), 0),
    ((True,), (1,), 0),
    ((10**6, 10**6), (0, 0), 0),
    ((13,), (0,), 0),
  ),
)
def test_no_tensor_reaches_outside_its_storage(tmp_path, size, stride, offset):
  refused(
    save(tmp_path / "x.pt", laid(size, stride, offset)),
    "reaches outside its storage of 12 values|not in form",
  )


def test_a_tensor_is_no_storage(tmp_path):
  """Strides are checked against a storage; over another tensor's strides the check would not
  hold."""
  inner = laid((12,), (0,), 11)
  refused(
    save(
      tmp_path / "x.pt",
      Call("torch._utils", "_rebuild_tensor_v2", inner, 0, (12,), (1,), False, None),
    ),
    "in form",
  )


@pytest.mark.parametrize(
  "count, key, match",
  (
    (11, None, "12 values; the structure says 11"),
    (13, None, "says 13"),
    (2**62, None, "says 4611"),
    ("12", None, "says 12"),
    (None, "9", "not in the archive"),
    (None, "../0", "not in form"),
    (None, "/etc/passwd", "not in form"),
    (None, 0, "damaged"),
    (None, "", "not in form"),
  ),
)
def test_storages_are_those_of_the_archive(tmp_path, count, key, match):
  refused(save(tmp_path / "x.pt", laid((12,), (1,), count=count, key=key)), match)


@pytest.mark.parametrize(
  "module, name, arguments",
  (
    ("os", "system", ("touch ran",)),
    ("builtins", "eval", ("1",)),
    ("builtins", "getattr", ("a", "upper")),
    ("torch", "load", ("x",)),
    ("torch._utils", "__builtins__", ()),
    ("numpy", "ndarray", ((2,),)),
    ("torch", "Tensor", ()),
    ("torch.serialization", "_load", ()),
  ),
)
def test_nothing_else_is_called(tmp_path, monkeypatch, module, name, arguments):
  monkeypatch.chdir(tmp_path)
  for tree in (
    Call(module, name, *arguments),
    [Global(module, name)],
    {"a": Call("collections", "OrderedDict", Global(module, name))},
  ):
    assert f"{module}.{name}" in refused(save(tmp_path / "x.pt", tree), "would run")
  assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
  "structure, match",
  (
    (b"cos\nsystem\n(S'touch ran'\ntR.", "would run"),
    (b"(S'touch ran'\nios\nsystem\n.", "damaged"),  # INST
    (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "damaged"),  # NEWOBJ
    # attributes of our own functions
    (b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.", "attributes"),
    (b"\x80\x02]}b.", "attributes"),
    (b"\x80\x02X\x01\x00\x00\x00a)R.", "no function"),
    (b"\x80\x02ctorch\nFloatStorage\n)R.", "no function"),
    # BYTEARRAY8 of 32 GiB
    (b"\x80\x05\x96" + struct.pack("<Q", 2**35) + b".", "damaged"),
    (b"\x80\x04\x8e" + struct.pack("<Q", 2**35) + b".", "damaged"),  # BINBYTES8
    # a string of 4 GiB
    (b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"abc.", "damaged"),
    (b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.", None),  # a frame
    (b"\x80\x02N.garbage", None),
    (b"", "damaged"),
    (b"\x80\x02(((((((", "damaged"),
    (b"\x80\x02\x82\x01.", "damaged"),
  ),
)
def test_pickles_by_hand(tmp_path, monkeypatch, structure, match):
  monkeypatch.chdir(tmp_path)
  file = raw(tmp_path / "x.pt", structure)
  if match:
    refused(file, match)
  else:
    assert mmcl_pt.load(file) is None
  assert not (tmp_path / "ran").exists()


def test_memory_goes_with_the_file_not_with_its_claims(tmp_path):
  """A memo index of 4 billion makes Python's C unpickler take 64 GiB; 2 GiB of address space must
  do here."""
  file = raw(tmp_path / "x.pt", b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".")
  code = (
    "import resource, sys; from mmcl_jax.data.readers import mmcl_pt; limit = 2 * 2**30;"
    "resource.setrlimit(resource.RLIMIT_AS, (limit, limit)); assert mmcl_pt.load(sys.argv[1]) is "
    "None"
  )
  subprocess.run(
    [sys.executable, "-c", code, str(file)],
    check=True,
    timeout=600,
    env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
  )


def test_archives_that_are_not_torchs(tmp_path):
  good = save(tmp_path / "good.pt", tensor(np.arange(1000, dtype=np.float32)))
  content = good.read_bytes()
  for name, changed, match in (
    ("legacy", mmcl_pt.LEGACY + b"rest", "before 1.6"),
    ("none", b"", "no zip"),
    ("text", b"hello", "no zip"),
    ("cut", content[:-30], "no zip|damaged"),
    ("moved", content.replace(b"PK\x03\x04", b"PK\x03\x05"), "outside the file|damaged"),
  ):
    (tmp_path / name).write_bytes(changed)
    refused(tmp_path / name, match)
  refused(tmp_path / "absent", "no such file")
  refused(tmp_path, "a folder")
  refused(
    save(tmp_path / "deflated.pt", tensor(np.zeros(9)), compression=zipfile.ZIP_DEFLATED),
    "compressed",
  )
  refused(save(tmp_path / "two.pt", 1, **{"other/data.pkl": b"N."}), "2 structures")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # zipfile's, of the second member of one name
    refused(save(tmp_path / "big.pt", 1, **{"archive/byteorder": "big"}), "big-endian")
  with zipfile.ZipFile(tmp_path / "empty.pt", "w"):
    pass
  refused(tmp_path / "empty.pt", "0 structures")


def test_a_member_that_claims_more_than_the_file_holds(tmp_path):
  file = save(tmp_path / "x.pt", tensor(np.arange(8, dtype=np.float32)))
  content = bytearray(file.read_bytes())
  entry = content.rindex(b"archive/data/0") - 46  # of the central directory
  for at in (20, 24):  # compressed and real size
    content[entry + at : entry + at + 4] = struct.pack("<I", 2**30)
  file.write_bytes(content)
  refused(file, "outside the file")


def test_reasons_name_neither_file_nor_archive(tmp_path):
  file = save(tmp_path / "DEMO0001.pt", laid((12,), (1,), key="9"), root="DEMO0001")
  assert "DEMO0001" not in refused(file, "archive")
  file.write_bytes(file.read_bytes()[:100])
  assert "DEMO0001" not in refused(file, "no zip")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_files_are_refused_or_read(tmp_path_factory, data):
  """Bytes of the archive and of its pickle are changed; whatever comes back can be walked
  through."""
  file = tmp_path_factory.mktemp("fuzz") / "x.pt"
  save(
    file,
    {
      "a": [tensor(np.arange(12, dtype=np.float32).reshape(3, 4)) for _ in range(3)],
      "b": Call("torch", "Size", (1, 2)),
      "c": Call("collections", "OrderedDict", [("k", 1.5)]),
    },
  )
  content = bytearray(file.read_bytes())
  for _ in range(data.draw(st.integers(1, 4))):
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
  file.write_bytes(content)
  try:
    found = mmcl_pt.load(file)
  except BadRecord as error:
    assert "\n" not in str(error)
    return

  def walk(x):
    for y in x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ():
      walk(y)
    if isinstance(x, np.ndarray):
      assert x.nbytes <= len(content) and np.array(x).shape == x.shape

  walk(found)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_random_pickles_are_refused_or_plain(tmp_path_factory, structure):
  file = raw(tmp_path_factory.mktemp("fuzz") / "x.pt", structure + b".")
  with contextlib.suppress(BadRecord):
    mmcl_pt.load(file)


def test_against_torch(tmp_path):
  torch = pytest.importorskip("torch")
  big = torch.arange(4 * 12 * 5, dtype=torch.float32).reshape(4, 12, 5)
  tree = {
    "list": list(big),
    "t": big[1].t(),
    "slice": big[2, ::3, 1:4],
    "bf16": big.to(torch.bfloat16),
    "u8": big[0].to(torch.uint8),
    "bool": big[0] > 3,
    "u32": torch.arange(7).to(torch.uint32)[2:],
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    "model": torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict(),
  }
  for options in ({}, {"pickle_protocol": 5}):
    torch.save(tree, tmp_path / "x.pt", **options)
    found = mmcl_pt.load(tmp_path / "x.pt")
    assert list(found) == list(tree) and list(found["model"]) == list(tree["model"])
    pairs = [(found[k], x) for k, x in tree.items() if isinstance(x, torch.Tensor)]
    for mine, theirs in (
      pairs
      + list(zip(found["list"], tree["list"]))
      + [(found["model"][k], x) for k, x in tree["model"].items()]
    ):
      assert mine.shape == tuple(theirs.shape)
      np.testing.assert_array_equal(np.asarray(mine, np.float64), theirs.double().numpy())
  torch.save(tree, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
  refused(tmp_path / "old.pt", "before 1.6")
  torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
  refused(tmp_path / "module.pt", "would run 'torch.nn")


# ---- the source


def identify(name):
  return schema.subject_hash(name, b"salt")


def folder(tmp_path, counts=None, samples=5000, images=True, labels=True):
  rng = np.random.default_rng(0)
  for split, n in (counts or {"train": 4, "val": 2, "test": 3}).items():
    save(
      tmp_path / f"ecgs_{split}_ecg_imaging_noBase_gn.pt",
      [tensor(rng.standard_normal((12, samples)).astype(np.float32)) for _ in range(n)],
    )
    if images:
      save(
        tmp_path / f"images_{split}_ecg_imaging.pt",
        [tensor(rng.random((3, 6, 5)).astype(np.float32)) for _ in range(n)],
      )
    if labels:
      save(tmp_path / f"labels_{split}_CAD_all.pt", tensor(np.arange(n) % 2))
      save(tmp_path / f"labels_{split}_LVM_all.pt", [tensor(np.float32(80 + i)) for i in range(n)])
  return argparse.Namespace(input=[str(tmp_path)])


def test_positions_join_and_nothing_is_normalised_again(tmp_path):
  plan = source.plan(folder(tmp_path), identify)
  # it goes to other processes
  plan = pickle.loads(pickle.dumps(plan._replace(items=list(plan.items))))
  assert (
    plan.info["ecg_is_normalised"]
    and plan.info["splits_given"]
    and plan.info["ecg_profile"] == "mmcl"
  )
  assert plan.info["diseases"] == ["CAD"] and plan.info["phenotypes"] == {"LVM": ""}
  assert collections.Counter(map(plan.split, plan.items)) == {"train": 4, "val": 2, "test": 3}
  assert len({item.subject.tobytes() for item in plan.items}) == 9
  item = next(item for item in plan.items if item.key.split == "test" and item.key.index == 2)
  np.testing.assert_array_equal(item.subject, identify("test/2"))
  record, flags = plan.read(item)
  np.testing.assert_array_equal(
    record["ecg"], mmcl_pt.load(tmp_path / "ecgs_test_ecg_imaging_noBase_gn.pt")[2]
  )
  image = mmcl_pt.load(tmp_path / "images_test_ecg_imaging.pt")[2]
  assert record["three_frames"].dtype == np.uint8
  assert np.abs(record["three_frames"] / 255 - image).max() <= 0.5 / 255 + 1e-6
  assert record["phenotypes"].tolist() == [82] and record["diseases"].tolist() == [0] and not flags
  assert record["has_ecg"] and record["has_cmr"] and np.isnan(record["covariates"]).all()


@pytest.mark.parametrize("kept", [("CAD",), ("LVM",), ()])
def test_labels_of_one_kind_or_of_none(tmp_path, kept):
  options = folder(tmp_path, counts={"train": 3}, images=False)
  for name in {"CAD", "LVM"} - set(kept):
    (tmp_path / f"labels_train_{name}_all.pt").unlink()
  plan = source.plan(options, identify)
  assert plan.info["diseases"] == ["CAD"] * ("CAD" in kept) and list(plan.info["phenotypes"]) == [
    "LVM"
  ] * ("LVM" in kept)
  records = [plan.read(item)[0] for item in plan.items]
  assert [r["phenotypes"].tolist() for r in records] == [
    [80 + i] if "LVM" in kept else [] for i in range(3)
  ]
  assert [r["diseases"].tolist() for r in records] == [
    [i % 2] if "CAD" in kept else [] for i in range(3)
  ]


def test_one_tensor_of_all_reads_as_a_list(tmp_path):
  options = folder(tmp_path, {"train": 3})
  # with an axis of one channel
  whole = np.random.default_rng(1).standard_normal((3, 1, 12, 2500)).astype(np.float32)
  save(tmp_path / "ecgs_train_ecg_imaging_noBase_gn.pt", tensor(whole))
  source.load.cache_clear()
  plan = source.plan(options, identify)
  # all share 2,500 samples
  np.testing.assert_array_equal(plan.read(plan.items[1])[0]["ecg"], whole[1, 0])


def test_a_recording_of_another_length_is_one_bad_record(tmp_path):
  options = folder(tmp_path, {"train": 3})
  good = np.random.default_rng(1).standard_normal((12, 5000)).astype(np.float32)
  save(
    tmp_path / "ecgs_train_ecg_imaging_noBase_gn.pt",
    [tensor(good), tensor(np.pad(good, ((0, 0), (0, 1)))), tensor(np.full_like(good, np.nan))],
  )
  source.load.cache_clear()
  plan = source.plan(options, identify)
  np.testing.assert_array_equal(plan.read(plan.items[0])[0]["ecg"], good)
  for item, match in zip(plan.items[1:], (r"\(12, 5001\); expected \(12, 5000\)", "not finite")):
    with pytest.raises(BadRecord, match=match):
      plan.read(item)


@pytest.mark.parametrize("scale, offset, flagged", ((1, 0, False), (200, 0, True), (1, -0.5, True)))
def test_images_to_uint8(scale, offset, flagged):
  image = np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 3, 4)
  found, flags = source.to_uint8(image * scale + offset, (2, 3, 4))
  np.testing.assert_array_equal(found, np.round(image * 255))
  assert bool(flags) == flagged
  with pytest.raises(BadRecord, match=r"shape \(2, 3, 4\); expected \(1, 3, 4\)"):
    source.to_uint8(image, (1, 3, 4))
  with pytest.raises(BadRecord, match="finite"):
    source.to_uint8(image * np.nan, (2, 3, 4))


def test_labels_are_diseases_only_where_all_splits_are_binary(tmp_path):
  options = folder(tmp_path, labels=False)
  save(tmp_path / "labels_train_A_all.pt", [0.0, 1.0, float("nan"), 1.0])
  save(tmp_path / "labels_val_B_all.pt", [0, 1])
  save(tmp_path / "labels_test_B_all.pt", [0, 1, 2])
  save(tmp_path / "labels_train_C_all.pt", tensor(np.arange(8.0).reshape(4, 2)))
  plan = source.plan(options, identify)
  assert plan.info["diseases"] == ["A"] and list(plan.info["phenotypes"]) == ["B", "C_0", "C_1"]
  values = {(item.key.split, item.key.index): item.key for item in plan.items}
  assert np.isnan(values["train", 2].diseases[0]) and np.isnan(values["val", 0].diseases[0])
  np.testing.assert_array_equal(values["train", 3].phenotypes, [np.nan, 6, 7])
  np.testing.assert_array_equal(values["test", 2].phenotypes, [2, np.nan, np.nan])


def test_what_does_not_belong_together_is_a_user_error(tmp_path):
  def fails(match, **changes):
    source.load.cache_clear()
    with pytest.raises(UserError, match=match):
      source.plan(argparse.Namespace(**vars(options) | changes), identify)

  here = tmp_path / "files"
  here.mkdir()
  options = folder(here)
  (tmp_path / "empty").mkdir()
  fails("no ecgs_train/val/test", input=[str(tmp_path / "empty")])
  fails("no ecgs_val", input=[str(here / "images_val_ecg_imaging.pt")])
  second = save(here / "ecgs_val_other.pt", [])
  fails("both ecgs of val")
  second.unlink()
  labels = here / "labels_val_CAD_all.pt"
  save(labels, [0, 1, 1])
  fails("not of one length: 2 in ecgs_val.*3 in labels_val_CAD_all.pt")
  save(labels, ["a", "b"])
  fails("not numbers")
  save(labels, {"a": 1})
  fails("holds a dict")
  labels.write_bytes(b"hello")
  fails("no zip")


def test_a_list_is_not_copied_without_bound(tmp_path):
  """A small pickle may ask for a size, or a dict, made of one long list again and again."""
  refused(save(tmp_path / "a.pt", [Call("torch", "Size", list(range(65)))]), "65 axes")
  refused(
    save(tmp_path / "b.pt", [Call("collections", "OrderedDict", [(i, i) for i in range(65)])]),
    "65 pairs",
  )
