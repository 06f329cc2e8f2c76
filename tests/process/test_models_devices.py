"""Batch statistics and kernels of the models are the same on one and on eight devices."""

import json

from common import python

STATISTICS = """
import json
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import PartitionSpec as P, NamedSharding
from mmcl_jax.models.towers import resnet, s4, slow_resnet, xresnet1d

rng = np.random.default_rng(0)
models = {"resnet": (resnet.ResNet("test", dtype=jnp.float64), rng.random((16, 3, 16, 16))),
          "slow": (slow_resnet.SlowResNet("test", dtype=jnp.float64), rng.random((16, 3, 16, 16))),
          "xresnet1d": (xresnet1d.XResNet1d("test", dtype=jnp.float64), rng.random((16, 12, 60))),
          "s4": (s4.S4("test", dtype=jnp.float64), rng.random((16, 12, 60)))}
rows = np.ones(16)
rows[[0, 1, 5]] = 0  # the first of eight devices has nothing that counts
weight = {name: rng.normal(size=(16, 1)) * rows[:, None] for name in models}  # nobody asks for rows of weight 0

def loss(params, statistics, x, rows):
  found, changed = {}, {}
  for name, (model, _) in models.items():
    variables = {"params": params[name], "batch_stats": statistics[name]}
    (_, found[name]), changed[name] = model.apply(variables, x[name], rows, True, mutable=["batch_stats"])
  return sum((weight[name] * jnp.sin(y)).sum() for name, y in found.items()), (found, changed)

variables = {name: jax.eval_shape(lambda: model.init(jax.random.key(0), x[:1], rows[:1], False))
             for name, (model, x) in models.items()}
values = jax.tree.map(lambda x: rng.uniform(-0.2, 1.0, x.shape), variables)
params, statistics = ({name: v.get(part, {}) for name, v in values.items()} for part in ("params", "batch_stats"))
step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options={"xla_backend_optimization_level": 0})
results = []
for devices in (1, 8):
  mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
  x, r = jax.device_put(({name: x for name, (_, x) in models.items()}, rows), NamedSharding(mesh, P("data")))
  with jax.set_mesh(mesh):
    (_, (found, changed)), grads = step(params, statistics, x, r)
  assert len(found["resnet"].sharding.device_set) == devices
  results.append(jax.device_get(dict(features=found, statistics=changed, gradient=grads)))
one, eight = results
scale = lambda tree: max(np.abs(x).max() for x in jax.tree.leaves(tree))
differ = lambda a, b: float(scale(jax.tree.map(np.subtract, a, b)) / scale(a))
print(json.dumps({f"{name} {part}": differ(one[part][name], eight[part][name]) for part in one for name in models if jax.tree.leaves(one[part].get(name))}))
"""


def test_statistics_and_gradients_are_those_of_the_global_batch():
  differences = json.loads(python(STATISTICS, devices=8).strip().splitlines()[-1])
  assert len(differences) == 3 * 4 - 1 and max(differences.values()) < 1e-10, differences


KERNELS = """
import json
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import NamedSharding, PartitionSpec as P
from mmcl_jax.models import kernels, vit

rng, block = np.random.default_rng(0), vit.Block(2, dtype=jnp.float64)
order = np.argsort(rng.random((16, 5)), axis=1)
x = rng.normal(size=(16, 5, 8))
params = jax.eval_shape(lambda key: block.init(key, x), jax.random.key(0))["params"]
params = jax.tree.map(lambda s: rng.normal(size=s.shape), params)
def loss(params, x, order):
  return (kernels.permute(block.apply({"params": params}, x), order) ** 2).sum()
options = {"xla_backend_optimization_level": 0}
step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), compiler_options=options)
found = {"one": jax.device_get(step(params, x, order))}
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
with jax.set_mesh(mesh):
  rows = lambda a: jax.device_put(a, NamedSharding(mesh, P("data")))
  place = lambda w: jax.device_put(w, NamedSharding(mesh, P(*[None] * (w.ndim - 1), "model")))
  found["split"] = jax.device_get(step(jax.tree.map(place, params), rows(x), rows(order)))
  def each(params, x, order):  # the program of one device
    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(params, x, order)
    return jax.lax.psum(value, ("data", "model")), grads
  both = P(("data", "model"))
  found["shard_map"] = jax.device_get(jax.jit(jax.shard_map(each, in_specs=(P(), both, both), out_specs=(P(), (P(), both))),
                                              compiler_options=options)(params, x, order))
differ = lambda a, b: max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
print(json.dumps({name: differ(tree, found["one"]) for name, tree in found.items()}))
"""


def test_kernels_are_the_same_on_eight_devices():
  """Parameters split over `model`, rows over `data`, by the partitioner; and one program a device
  under shard_map."""
  found = json.loads(python(KERNELS, devices=8).strip().splitlines()[-1])
  assert set(found) == {"one", "split", "shard_map"} and max(found.values()) < 1e-12, found
