"""The TPU's attention at every size of the recipes, in interpret mode and in the hands of the TPU's
compiler, without a TPU."""

import importlib.util
import json

import pytest
from attentions import RECIPES, check_kernel
from common import python

SELF_ATTENTIONS = [(tokens, 2, width) for width, counts in RECIPES.items() for tokens in counts]


@pytest.mark.parametrize("tokens, heads, width", [*SELF_ATTENTIONS, (501, 2, 64)])
def test_value_and_gradient_are_jaxs_at_every_size_of_the_recipes(tokens, heads, width):
  check_kernel(tokens, heads, width)


COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from mmcl_jax.models import kernels
from mmcl_jax.tools import targets
from mmcl_jax.training import parallel

devices = targets.find(sys.argv[1]).devices
mesh = parallel.make_mesh(-1, 1, devices)
found = {}
for tokens, heads, width, dtype in json.loads(sys.argv[2]):
  def gradient(qkv):
    return jax.grad(lambda qkv: (kernels.self_attention(qkv, heads).astype(jnp.float32) ** 2).sum())(qkv)
  where = NamedSharding(mesh, P("data"))
  qkv = jax.ShapeDtypeStruct((2 * mesh.size, tokens, 3 * heads * width), dtype, sharding=where)
  with jax.set_mesh(mesh):
    compiled = jax.jit(gradient, out_shardings=where).lower(qkv).compile()
  text = compiled.as_text()
  found[f"{tokens} {heads} {width} {dtype}"] = [
      text.count('custom_call_target="tpu_custom_call"'), "all-gather" in text, compiled.memory_analysis().temp_size_in_bytes / qkv.size]
print(json.dumps(found))
"""
# tokens, heads, width, dtype: groups of 2 heads of 64 and of 4 of 32, all heads of 72 and of 48 in
# one program, 6 of 12 where tokens are few, and more tokens than any recipe has
CASES = (
  (601, 12, 64, "bfloat16"),
  (601, 12, 64, "float32"),
  (601, 8, 32, "bfloat16"),
  (601, 8, 72, "bfloat16"),
  (121, 12, 64, "bfloat16"),
  (61, 2, 48, "float32"),
  (900, 12, 64, "float32"),
)


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="no libtpu: pip install 'mmcl-jax[tpu]' brings the TPU's compiler",
)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_value_and_gradient_compile_for_a_tpu(topology):
  """Two calls of the kernel, nothing gathered from other chips, nothing N x N kept."""
  found = json.loads(python(COMPILE, topology, json.dumps(CASES)).strip().splitlines()[-1])
  assert len(found) == len(CASES)
  for case, (calls, gathers, kept) in found.items():
    assert calls == 2 and not gathers and kept < 12, case
