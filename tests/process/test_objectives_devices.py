"""Every objective on eight simulated devices against one: value, metrics, gradients, and what
travels between them."""

import json

import pytest

from common import python
from objective_cases import B, CASES, E

COMPARE = """
import json, re
import jax, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from mmcl_jax import objectives
from objective_cases import B, CASES, case

def place(x, mesh):
  return jax.device_put(x, NamedSharding(mesh, P("data") if x.shape[0] == B else P(None, "data")))

result = {}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
for name, (parameters, _) in CASES.items():
  fn = objectives.find(name, "")

  def loss(outputs, batch):
    loss = fn(outputs, batch, **parameters)
    return objectives.mean(loss), loss.metrics

  found = {}
  for devices in (1, 8):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
      inputs = jax.tree.map(lambda x: place(x, mesh), case())
      compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*inputs).compile()
      (value, metrics), grads = compiled(*inputs)
      found[devices] = dict(metrics, loss=value), jax.tree.map(lambda g: np.asarray(g, np.float64), grads)
  scale = np.sqrt(sum((g ** 2).sum() for g in jax.tree.leaves(found[1][1])))
  gradient = max(np.abs(x - y).max() for x, y in zip(*(jax.tree.leaves(found[d][1]) for d in (1, 8)))) / scale
  sizes = []
  for line in compiled.as_text().splitlines():
    travels = re.search(r"= (.*?) (" + KINDS + ")(-start)?[(]", line)
    if travels:
      shapes = re.findall(r"[a-z]+[0-9]*\\[([0-9,]*)\\]", travels[1])
      sizes += [(travels[2], int(np.prod([int(n) for n in s.split(",") if n]))) for s in shapes]
  result[name] = dict(gradient=gradient, sizes=sizes, scale=scale,
                      **{str(d): {k: float(v) for k, v in found[d][0].items()} for d in (1, 8)})
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def compared():
  return json.loads(python(COMPARE, devices=8, timeout=600).strip().splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_give_the_numbers_of_one(compared, name):
  found = compared[name]
  assert found["8"] == pytest.approx(found["1"], rel=1e-5, abs=1e-6)
  # largest difference of any element, as a share of the norm
  assert found["scale"] > 0 and found["gradient"] < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_only_projections_and_sums_travel(compared, name):
  """No [B, B] matrix, no image and no recording: at most a projection [B, E] at a time."""
  assert compared[name]["sizes"]
  assert all(
    kind in ("all-gather", "all-reduce") and size <= B * E for kind, size in compared[name]["sizes"]
  )
