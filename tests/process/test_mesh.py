"""The mesh over slices and hosts: on stand-in devices, and on topologies that libtpu describes."""

import importlib.util
import json
import types

import pytest
from jax.experimental import mesh_utils

from common import python
from mmcl_jax.errors import UserError
from mmcl_jax.training import parallel

NODES = "two or more GPU nodes, or TPU slices, ended in make_mesh"
SPLIT = "config.mesh.model=2 on v4, v5p and v6e ended in a raw NotImplementedError"
SPANS = "config.mesh.model=4 on v5e was refused with advice that was already followed"


class Device(types.SimpleNamespace):
  """Stands for one of JAX's, whose mesh asks for hashes."""

  __hash__ = object.__hash__


def devices(slices, hosts, each, kind="NVIDIA H100", platform="gpu"):
  """`slices` of `hosts` (processes) of `each` devices, in no order: ids go round the slices."""
  found = [
    Device(
      id=i,
      slice_index=i % slices,
      process_index=i % (slices * hosts),
      platform=platform,
      device_kind=kind,
    )
    for i in range(slices * hosts * each)
  ]
  return found[::-1]


def laid(*args, **kwargs):
  """(slice, host) of every device of the mesh."""
  grid = parallel.make_mesh(*args, **kwargs).devices
  return [[(device.slice_index, device.process_index) for device in row] for row in grid]


@pytest.mark.reported(NODES)
@pytest.mark.parametrize(
  "slices, hosts, each, model",
  [
    (2, 1, 4, 1),
    (2, 1, 4, 2),
    (2, 1, 4, 4),
    (2, 4, 1, 1),
    (3, 2, 4, 2),
    (8, 1, 8, 8),
    (1, 4, 2, 2),
  ],
)
def test_data_goes_through_node_after_node_and_a_row_stays_on_its_host(slices, hosts, each, model):
  """A node has one process or one a GPU; its GPUs are a slice."""
  rows = laid(-1, model, devices(slices, hosts, each))
  assert (len(rows), len(rows[0])) == (slices * hosts * each // model, model)
  assert all(len(set(row)) == 1 for row in rows)
  assert [row[0][0] for row in rows] == sorted(row[0][0] for row in rows)
  if model > 1:
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


@pytest.mark.reported(SPANS)
@pytest.mark.parametrize(
  "slices, hosts, each, model, words",
  [
    (2, 4, 1, 2, ["model=2", "host 0 has 1", "one process a node has all of its GPUs"]),
    (2, 1, 4, 8, ["model=8", "host 0 has 4", "expected config.mesh.model to divide 4"]),
    (2, 1, 6, 4, ["model=4", "host 0 has 6", "expected config.mesh.model to divide 6"]),
  ],
)
def test_a_row_that_one_host_cannot_hold_is_one_line(slices, hosts, each, model, words):
  with pytest.raises(UserError) as error:
    parallel.make_mesh(-1, model, devices(slices, hosts, each))
  text = str(error.value)
  assert "\n" not in text and all(word in text for word in words), text
  assert "process a node" not in text or hosts > 1


def test_numbers_of_devices_that_are_not_there_are_one_line():
  for data, model, words in (
    (3, 2, "data=3 x model=2 = 6 devices, there are 8"),
    (0, 1, "positive"),
    (4, 0, "positive"),
  ):
    with pytest.raises(UserError, match=words):
      parallel.make_mesh(data, model, devices(2, 1, 4))


def test_one_slice_keeps_the_order_of_its_devices_and_what_is_no_slice_is_one():
  """As on a CPU, whose devices have no slice_index."""
  plain = [Device(id=i, process_index=0, platform="cpu", device_kind="cpu") for i in range(8)]
  for model in (1, 2, 8):
    assert list(parallel.make_mesh(-1, model, plain).devices.flat) == plain


def test_chips_that_are_a_part_of_their_slice_are_taken_as_they_come():
  """JAX orders no mesh with a hole in it."""
  chips = [
    Device(
      id=i, process_index=0, platform="tpu", device_kind="TPU v4", core_on_chip=0, coords=coords
    )
    for i, coords in enumerate(((0, 0, 0), (1, 0, 0), (0, 1, 0)))
  ]
  with pytest.raises(AssertionError):
    mesh_utils.create_device_mesh((3,), chips)
  assert list(parallel.make_mesh(-1, 1, chips).devices.flat) == chips


TOPOLOGIES = """
import json
import jax
from jax.sharding import AxisType
from mmcl_jax.tools import targets
from mmcl_jax.training import parallel

found = {}
for size in ("v5e:4x4", "v4:4x4x4", "v5p:4x4x4", "v6e:4x4"):
  for slices in (1, 2):
    devices = targets.find(f"{slices}x{size}").devices
    for model in (1, 2, 4):
      grid = parallel.make_mesh(-1, model, devices).devices
      found[f"{size} {slices} {model}"] = [
          [(parallel.slice_of(device), device.process_index) for device in row] for row in grid]
      if slices == model == 1:
        plain = jax.make_mesh(grid.shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2,
                              devices=devices)
        assert (plain.devices == grid).all()
print(json.dumps(found))
"""


@pytest.mark.reported(NODES, SPLIT, SPANS)
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="no libtpu: pip install 'mmcl-jax[tpu]' describes TPUs, without one",
)
def test_meshes_of_tpu_slices():
  """One and two slices, without and with `model`; one slice without it is laid as by JAX."""
  for case, rows in json.loads(python(TOPOLOGIES).strip().splitlines()[-1]).items():
    _, slices, model = case.split()
    assert {len(row) for row in rows} == {int(model)}, case
    assert all(row.count(row[0]) == len(row) for row in rows), case
    of = [row[0][0] for row in rows]
    assert of == sorted(of) and len(set(of)) == int(slices), case
    assert of.count(0) * int(slices) == len(rows), case
