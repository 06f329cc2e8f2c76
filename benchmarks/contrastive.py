"""Memory and traffic of the contrastive objectives at large batches, plain and with ring=True.

    python benchmarks/contrastive.py

Compiles value and gradient for 8 simulated devices; nothing is executed, and a minute on 2 CPU
cores is enough. Prints a JSON line a case, then a Markdown table. Bytes are per device: temporary
memory as XLA's CPU compiler plans it (other compilers fuse otherwise: compare rows with each
other), and the arrays exchanged, in loops as often as they run.
"""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICES, WIDTH = 8, 128
BATCHES = (4096, 16384, 32768)
TOWERS = {"dual_phase": ("ed", "es"), "clip": ("ed",)}


def main():
  if sys.argv[1:] == ["compile"]:
    return compile_all()
  environment = os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
  }
  cases = []
  with subprocess.Popen(
    [sys.executable, __file__, "compile"], env=environment, stdout=subprocess.PIPE, text=True
  ) as child:
    for line in child.stdout:
      print(line, end="", flush=True)
      cases.append(json.loads(line))
  if child.returncode:
    sys.exit(child.returncode)
  print("\n| objective | batch | | temporary MiB | collectives MiB |\n|---|---|---|---|---|")
  for one in cases:
    traffic = ", ".join(
      f"{kind} {mib(total['bytes']):.4g} ({total['count']} times)"
      for kind, total in one["collectives"].items()
    )
    form = "ring" if one["ring"] else "plain"
    print(
      f"| {one['objective']} | {one['batch']} | {form} | {mib(one['temporary']):.4g} | {traffic} |"
    )


def mib(size: int) -> float:
  return size / 2**20


def compile_all():
  import jax
  import numpy as np
  from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

  from mmcl_jax import objectives
  from mmcl_jax.tools import hlo

  mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
  for batch in BATCHES:
    for name, towers in TOWERS.items():

      def array(*shape, dtype=np.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("data")))

      projections = {
        "ecg_projection": array(batch, WIDTH),
        "cmr": {tower: {"projection": array(batch, WIDTH)} for tower in towers},
      }
      rows = {field: array(batch) for field in ("mask", "has_ecg", "has_cmr")} | {
        "subject": array(batch, 2, dtype=np.uint32)
      }
      for ring in (False, True):

        def loss(outputs, rows, name=name, ring=ring):
          return objectives.mean(objectives.find(name, "")(outputs, rows, ring=ring))

        with jax.set_mesh(mesh):
          compiled = jax.jit(jax.value_and_grad(loss)).lower(projections, rows).compile()
        found, _ = hlo.read(compiled.as_text())
        print(
          json.dumps(
            {
              "objective": name,
              "batch": batch,
              "width": WIDTH,
              "devices": DEVICES,
              "ring": ring,
              "temporary": hlo.memory(compiled)["temporaries"],
              "collectives": hlo.by_kind(found),
            }
          ),
          flush=True,
        )


if __name__ == "__main__":
  main()
