"""ring=True against the plain objectives: the same numbers on any mesh, and nothing of [B, B] is
ever held."""

import json

import jax
import numpy as np
import pytest
from scipy.special import logsumexp

from common import python
from mmcl_jax import objectives
from mmcl_jax.objectives import ring
from mmcl_jax.training import flops
from objective_cases import B, E, RING, case

COMPARE = """
import contextlib, json, re
import jax, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from mmcl_jax import objectives
from mmcl_jax.objectives import ring
from objective_cases import RING, case

def on(data, model):
  mesh = np.array(jax.devices()[:data * model]).reshape(data, model)
  return Mesh(mesh, ("data", "model"), axis_types=(AxisType.Auto,) * 2)

def compute(outputs, batch, cases, **ring):
  found = []
  for name, parameters in cases:
    def loss(outputs):
      found = objectives.find(name, "")(outputs, batch, **parameters, **ring)
      return objectives.mean(found), (found.values, found.metrics)
    found.append(jax.value_and_grad(loss, has_aux=True)(outputs))
  return found

outputs, batch = case()
outputs = {name: outputs[name] for name in ("ecg_projection", "cmr")} | {"log_scale": np.float32(np.log(1 / 0.07))}
del outputs["cmr"]["sax"]
batch = {name: batch[name] for name in ("subject", "mask", "has_ecg", "has_cmr")}
filled = lambda x: jax.tree.map(lambda z: np.full_like(z, x), outputs) | {"log_scale": outputs["log_scale"]}
INPUTS = {
    "mixed": (outputs, batch), "low temperature": (outputs | {"log_scale": np.float32(np.log(100))}, batch),
    "identical": (filled(1.0), batch), "zeros": (filled(0.0), batch),
    "one subject": (outputs, batch | {"subject": np.ones_like(batch["subject"])}),
    "no rows": (outputs, batch | {"mask": np.zeros_like(batch["mask"])}),
    "one row": (outputs, batch | {"mask": np.float32(np.arange(16) == 13)})}

def differences_of(found, plain, scale):
  # Largest of any element: values as a share of the largest logit there can be (scale), gradients of their norm, or, where
  # nothing pulls and they are rounding alone, of the scale.
  leaves = lambda tree: [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
  worst = lambda a, b: max(np.abs(x - y).max() for x, y in zip(leaves(a), leaves(b), strict=True))
  norm = np.sqrt(sum((x ** 2).sum() for x in leaves(plain[1])))
  return dict(value=worst(found[0], plain[0]) / scale, gradient=worst(found[1], plain[1]) / (norm if norm > 0.1 else scale),
              norm=norm)

ring.BLOCK = 3
plain = jax.jit(lambda *inputs: compute(*inputs, RING))
plain = {name: jax.device_get(plain(*inputs)) for name, inputs in INPUTS.items()}
differences = []
for mesh, cases in ((None, (0, 1, 2, 3)), (on(8, 1), (0, 2)), (on(2, 4), (2,))):
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P("data") if x.ndim else P())) if mesh else x
    function = jax.jit(lambda *inputs: compute(*inputs, [RING[i] for i in cases], ring=True))
    for name, inputs in INPUTS.items():
      for i, a in zip(cases, jax.device_get(function(*jax.tree.map(place, inputs))), strict=True):
        differences.append(dict(differences_of(a, plain[name][i], float(np.exp(inputs[0]["log_scale"]))), input=name, case=i,
            mesh=mesh and list(mesh.shape.values()), finite=all(bool(np.isfinite(x).all()) for x in jax.tree.leaves(a))))

ring.BLOCK, B, E = 128, 2048, 64
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
compiled = []
for mesh in (on(1, 1), on(8, 1)):
  sharding = lambda shape: NamedSharding(mesh, P("data") if shape else P())
  f32 = lambda *shape, dtype=np.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(shape))
  shapes = {"ecg_projection": f32(B, E), "cmr": {"ed": {"projection": f32(B, E)}}, "log_scale": f32()}
  rows = {name: f32(B) for name in ("mask", "has_ecg", "has_cmr")} | {"subject": f32(B, 2, dtype=np.uint32)}
  for parameters in ({}, {"ring": True}):
    with jax.set_mesh(mesh):
      made = jax.jit(lambda *inputs: compute(*inputs, [("clip", {})], **parameters)).lower(shapes, rows).compile()
    text = made.as_text()
    elements = [int(np.prod([int(n) for n in dims.split(",")])) for dims in re.findall(r"[a-z0-9]+\\[([0-9,]+)\\]", text)]
    compiled.append(dict(devices=mesh.shape["data"], ring=bool(parameters), largest=max(elements),
        temporary=made.memory_analysis().temp_size_in_bytes,
        kinds=sorted(set(re.findall(r" (" + KINDS + ")(?:-start)?[(]", text)))))
print(json.dumps(dict(differences=differences, compiled=compiled)))
"""


@pytest.fixture(scope="module")
def compared():
  return json.loads(python(COMPARE, devices=8, timeout=1800).strip().splitlines()[-1])


@pytest.mark.parametrize("mesh, cases", [(None, len(RING)), ([8, 1], 2), ([2, 4], 1)], ids=str)
def test_values_hits_and_gradients_are_the_plain_ones(compared, mesh, cases):
  """On 16 rows in blocks of at most 3: blocks that are not full, several blocks a device, devices
  of one block."""
  found = [one for one in compared["differences"] if one["mesh"] == mesh]
  assert len(found) == 7 * cases
  for one in found:
    # logits to 100: float32 itself leaves 1e-5 of a softmax
    bound = 1e-5 if one["input"] == "low temperature" else 1e-6
    assert one["finite"] and one["value"] < 1e-6 and one["gradient"] < bound, one
    # else nothing pulls
    assert (one["norm"] > 0.1) == (one["input"] in ("mixed", "low temperature")), one


def test_nothing_of_the_size_of_all_logits_is_held(compared):
  B, E = 2048, 64
  for one in compared["compiled"]:
    own = B // one["devices"]
    assert (
      one["largest"] <= 2 * max(own * E, 128**2) if one["ring"] else one["largest"] >= own * B
    ), one
  for devices in (1, 8):
    plain, ringed = (
      one["temporary"]
      for one in sorted(compared["compiled"], key=lambda one: one["ring"])
      if one["devices"] == devices
    )
    assert ringed < plain / 4, (plain, ringed)


def test_rows_go_from_neighbour_to_neighbour(compared):
  [plain] = [
    one["kinds"] for one in compared["compiled"] if one["devices"] == 8 and not one["ring"]
  ]
  [ringed] = [one["kinds"] for one in compared["compiled"] if one["devices"] == 8 and one["ring"]]
  # reduced: sums over the batch
  assert "all-gather" in plain and ringed == ["all-reduce", "collective-permute"]


def inputs():
  """float64 projections of 7 rows: two of one subject, one that does not count."""
  rng = np.random.default_rng(3)
  a, b = rng.normal(size=(2, 7, 4))
  ones = np.ones(7, np.float32)
  subject = np.stack([np.zeros(7), [0, 1, 2, 2, 3, 4, 5]], axis=1).astype(np.uint32)
  batch = {"subject": subject, "mask": ones.copy(), "has_ecg": ones, "has_cmr": ones}
  batch["mask"][5] = 0
  return a, b, np.log(1 / 0.2), batch


def by_hand(a, b, log_scale, batch, b_to_a=0.75):
  """Row by row in float64: loss, share of hits."""
  a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (a, b))
  logits, losses, hits = np.exp(log_scale) * a @ b.T, [], []
  for i in np.flatnonzero(batch["mask"]):
    others = [
      k for k in range(7) if batch["mask"][k] and (batch["subject"][k] != batch["subject"][i]).any()
    ]
    row, column = (logsumexp([logits[i, i], *line[others]]) for line in (logits[i], logits[:, i]))
    losses.append((1 - b_to_a) * row + b_to_a * column - logits[i, i])
    hits.append(logits[i, i] > logits[i, others].max())
  return np.mean(losses), np.mean(hits)


@pytest.mark.parametrize("block", [2, 1024])
def test_clip_is_its_formula(monkeypatch, block):
  """Gradients by central differences of the formula."""
  monkeypatch.setattr(ring, "BLOCK", block)
  *z, batch = inputs()

  def loss(a, b, log_scale):
    outputs = {"ecg_projection": a, "cmr": {"ed": {"projection": b}}, "log_scale": log_scale}
    found = objectives.find("clip", "")(outputs, batch, b_to_a=0.75, ring=True)
    return objectives.mean(found), found.metrics["r@1"]

  (value, hits), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
    *map(np.float32, z)
  )
  np.testing.assert_allclose((value, hits), by_hand(*z, batch), rtol=1e-5)
  for i, gradient in enumerate(gradients):
    for place in np.ndindex(gradient.shape):
      step = np.zeros_like(z[i])
      step[place] = 1e-6
      above, below = (
        by_hand(*(x + sign * step if j == i else x for j, x in enumerate(z)), batch)[0]
        for sign in (1, -1)
      )
      np.testing.assert_allclose(gradient[place], (above - below) / 2e-6, atol=2e-5)


def test_each_logit_is_computed_once_and_once_more_for_the_gradient(monkeypatch):
  monkeypatch.setattr(ring, "BLOCK", 4)
  outputs, batch = case()

  def loss(outputs):
    return objectives.mean(objectives.find("clip", "")(outputs, batch, b="image", ring=True))

  def products(function):
    return flops.matmul_flops(jax.make_jaxpr(function)(outputs)) / (2 * B * B * E)

  assert products(loss) == 1  # for both directions
  assert products(jax.grad(loss)) == 1 + 3  # logits, again, and what they hand to either side


@pytest.mark.parametrize("name, parameters", RING[:2])
def test_ring_is_a_switch(name, parameters):
  with pytest.raises(ValueError, match="ring is 'yes'; expected True or False"):
    objectives.find(name, "")(*case(), **parameters, ring="yes")
