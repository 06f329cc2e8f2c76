"""What a program computes on, and the settings of JAX that its numbers depend on."""

import functools
import os
from collections import Counter

import jax

from mmcl_jax.errors import UserError
from mmcl_jax.training import distributed

# Whatever the environment says (JAX_DEFAULT_PRNG_IMPL and so on): with rbg, or where threefry is
# not partitionable, numbers would depend on how arrays are split, and a resumed run on its new
# environment.
PINNED = {
  "jax_default_prng_impl": "threefry2x32",
  "jax_threefry_partitionable": True,
  "jax_random_seed_offset": 0,
  "jax_enable_x64": False,
  "jax_numpy_dtype_promotion": "standard",
}


def devices() -> list[jax.Device]:
  """All devices of all hosts, printed once by the first host; every program that computes calls
  this first.

  Raises:
    UserError: the platform of JAX_PLATFORMS, or the one that JAX has found, cannot be started.
  """
  for name, value in PINNED.items():
    jax.config.update(name, value)
  try:
    found = jax.devices()
  # of a platform that JAX does not know, and of one without its plugin
  except (RuntimeError, AssertionError) as error:
    wanted = os.environ.get("JAX_PLATFORMS")
    reason = (
      " ".join(str(error).partition("(set JAX_PLATFORMS")[0].split())[:200]
      or "its plugin is not installed"
    )
    platform = f"JAX_PLATFORMS is {wanted}" if wanted else "JAX finds a platform"
    raise UserError(
      f"{platform}, which cannot be started: {reason}; set JAX_PLATFORMS to cpu, or on a machine "
      "that "
      "has one to cuda (pip install 'mmcl-jax[cuda]') or tpu (pip install 'mmcl-jax[tpu]')"
    ) from None
  if distributed.this_host.index == 0:
    counts = Counter(x.device_kind for x in found)
    kinds = []
    for kind, count in counts.items():
      devices = "1 device" if count == 1 else f"{count} devices"
      kinds.append(f"{devices}: {kind}")
    say(", ".join(kinds))
  return found


@functools.cache
def say(what: str) -> None:
  print(f"running on {what}", flush=True)
