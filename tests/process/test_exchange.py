"""config.gradient_dtype: in which dtype the compiled step sums gradients over the devices."""

import json

import pytest
from common import python, tiny_config

from mmcl_jax.errors import UserError
from mmcl_jax.models import exchange

# A CPU sums in float32 whatever it is given, so the text is that after partitioning, before the
# passes of any platform.
READ = r"""
import collections, json, pathlib, sys
import jax, optax
from common import tiny_step
from mmcl_jax import models
from mmcl_jax.models import inputs
from mmcl_jax.tools import hlo
from mmcl_jax.training import parallel, state as state_lib, step as step_lib

config, cohort, standardiser, _, objectives, batch = tiny_step(sys.argv[1])
config.model.dtype = "bfloat16"
model = models.build(config.model, config.data.samples)
tx = optax.sgd(1.0)
mesh = parallel.make_mesh(data=4, model=1)
example = inputs.example(config, cohort.info["shapes"], len(standardiser.targets), 16)
result = {}
with jax.set_mesh(mesh):
  state, where = state_lib.create(model, tx, example, 0, mesh, ())
  rows = parallel.to_global(batch, mesh)
  for dtype in ("float32", "bfloat16"):
    config.gradient_dtype = dtype
    step = jax.jit(step_lib.make_train_step(model, objectives, tx, config, standardiser), out_shardings=(where, None))
    folder = pathlib.Path(sys.argv[2], dtype)
    step.lower(state, rows).compile({"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partitioning",
                                     "xla_dump_hlo_as_text": True, "xla_backend_optimization_level": 0})
    file, = [file for file in folder.iterdir() if "jit_train_step" in file.name and "after_spmd" in file.name]
    numbers = collections.Counter()
    for instructions in hlo.computations(file.read_text())[0].values():
      for instruction in instructions:
        if instruction.operation == "all-reduce":
          for kind, bits in (("f32", 32), ("bf16", 16)):
            if instruction.result.startswith(f"{kind}["):
              numbers[kind] += hlo.shape_bytes(instruction.result) * 8 // bits
    result[dtype] = numbers
leaves = jax.tree_util.tree_leaves_with_path(state.params)
# what the towers multiply by; heads compute in float32
result["matrices"] = sum(x.size for path, x in leaves if path[-1].key == "kernel" and not path[0].key.startswith("head"))
print(json.dumps(result))
"""


def test_a_step_sums_gradients_in_the_dtype_of_the_config(cohort, tmp_path):
  text = python(READ, cohort.path, tmp_path, devices=4, timeout=1500)
  found = json.loads(text.strip().splitlines()[-1])
  assert "bf16" not in found["float32"], found
  assert found["float32"]["f32"] > found["matrices"]
  assert found["bfloat16"]["bf16"] >= found["matrices"], found


COMPARE = """
import json
import flax.linen as nn
import jax, jax.numpy as jnp, numpy as np
from mmcl_jax.models import exchange, resnet, vit
from mmcl_jax.training import parallel

class Layers(nn.Module):
  @nn.compact
  def __call__(self, x, images):
    blocks = vit.make_blocks(2, 2, dtype=jnp.bfloat16)
    tokens = vit.apply_blocks(blocks, x.astype(jnp.bfloat16), scan=True, remat="dots")
    return tokens, resnet.Bottleneck(8, 2, 3, jnp.bfloat16)(images, jnp.ones(len(images)), True)

rng = np.random.default_rng(0)
inputs = {"x": rng.normal(size=(8, 5, 8)), "images": rng.normal(size=(8, 3, 8, 8, 4))}
inputs = {name: x.astype(np.float32) for name, x in inputs.items()}
layers = Layers()
variables = jax.jit(layers.init)(jax.random.key(0), **inputs)

def gradient(params, inputs):
  def loss(params):
    outputs, _ = layers.apply(variables | {"params": params}, **inputs, mutable=["batch_stats"])
    return sum((x.astype(jnp.float32) ** 2).sum() for x in outputs)
  return jax.grad(loss)(params)

params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), variables["params"])
one = jax.jit(gradient)(params, inputs)
mesh = parallel.make_mesh(data=4, model=1)
with jax.set_mesh(mesh):
  four = jax.jit(gradient)(params, parallel.to_global(inputs, mesh))
differences = {}
for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(four), strict=True):
  assert a.dtype == b.dtype == jnp.float32
  differences[jax.tree_util.keystr(path)] = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
print(json.dumps(differences))
"""


def test_the_gradient_on_four_devices_is_that_on_one():
  differences = json.loads(python(COMPARE, devices=4).strip().splitlines()[-1])
  for path, difference in differences.items():
    if "qkv'" not in path or "bias" not in path:  # a third of it is all rounding
      assert difference < 0.03, (path, difference)


@pytest.mark.parametrize(
  "dtype, computed, message",
  [
    ("float16", "bfloat16", "is 'float16'; expected one of float32, bfloat16"),
    ("bfloat16", "float32", "is bfloat16, and config.model.dtype is float32; expected bfloat16"),
  ],
)
def test_a_dtype_that_cannot_be_is_one_line(dtype, computed, message):
  config = tiny_config("")
  config.gradient_dtype, config.model.dtype = dtype, computed
  with pytest.raises(UserError) as error:
    exchange.check(config)
  assert f"config.gradient_dtype {message}" in str(error.value) and "\n" not in str(error.value)
