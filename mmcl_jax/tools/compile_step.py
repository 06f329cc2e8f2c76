"""`mmcl compile`: what a recipe's training step will need on a TPU slice, from the TPU's own
compiler, without a TPU.

    mmcl compile --config=joint:base --topology=v5e:4x4 --config.model.dtype=bfloat16

The very step of `mmcl train` is compiled ahead of time and read; nothing runs. The compiler comes
with libtpu (pip install 'mmcl-jax[tpu]'). No cohort is needed: records are as `mmcl prepare` makes
them by default; with --config.data.cohort=DIR as that cohort has them.

  --topology  chips of a slice: v4:AxBxC, v5p:AxBxC, v5e:AxB, v6e:AxB; or cpu:N, simulated devices
              (no libtpu, no times)
  --batch     rows of the global batch. Default: config.per_device_batch times the devices of the
              data axis, where a recipe sets it; else the recipe's batch, taken up to the next one
              that they and config.accumulation divide

The last line is a JSON object, of one device unless it says otherwise: memory (bytes), flops and
bytes_accessed (the compiler's count, bodies of loops once; `loops` tells how often each runs, 0:
not known), matmul_flops (matrix products of the step as written, loops and recomputation included,
split evenly over the chips), collectives (kind -> count, bytes of the arrays exchanged, bytes
sent), and an estimate: the least time for each of compute, memory and network at the published
peaks, the largest of which bounds the step from below and the MFU from above. Waiting, latency and
what cannot overlap come on top.

A recipe with ResNet towers takes the TPU's compiler a quarter of an hour and more.
JAX_OPTIMIZATION_LEVEL=O0 in the environment makes minutes of it, of a program that is a little
worse: 300 MiB of buffers instead of 270 for joint:demo. `optimization` tells which it was.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P

from mmcl_jax import configuration, models, objectives, ranges
from mmcl_jax.data import cohort as cohort_lib, pipeline, schema, standardise
from mmcl_jax.data.preprocess import cmr as preprocess_cmr, ecg as preprocess_ecg
from mmcl_jax.errors import UserError
from mmcl_jax.models import exchange, inference, inputs
from mmcl_jax.tools import hlo
from mmcl_jax.training import chips, cohorts, flops, parallel, state as state_lib, step as step_lib

USAGE = (
  "usage: mmcl compile --config=joint:base --topology=v5e:4x4 [--batch=N] [--config.x.y=V ...]"
)


# chip -> how libtpu is told whether both cores of a chip are one device
TPUS = {"v4": "megacore", "v5e": "default", "v5p": "megacore", "v6e": "default"}
SLICES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # of v5e and v6e
LARGEST = {"v4": 4096, "v5p": 6144}  # chips of one job


def main(argv):
  parser = argparse.ArgumentParser(
    usage=USAGE.removeprefix("usage: "), add_help=False, allow_abbrev=False
  )
  parser.add_argument("--batch", type=rows)
  given, rest = parser.parse_known_args(argv)
  config, flags = configuration.from_flags(
    "mmcl compile",
    USAGE,
    rest,
    paths={},
    words={"topology": f"TPU slice ({', '.join(TPUS)}, such as v5e:4x4 or v5p:8x8x8), or cpu:N"},
  )
  print(json.dumps(compile_step(config, flags.topology, given.batch)))


def rows(text: str) -> int:
  if not re.fullmatch("[1-9][0-9]*", text):
    raise UserError(f"--batch is {text!r}; expected a number of rows, 1 or more")
  return int(text)


class Step(NamedTuple):
  """A training step and the shapes, with their shardings, that it is compiled for."""

  function: Callable  # jitted: (state, batch) -> (state, metrics)
  state: Any
  batch: Any


def compile_step(config, topology: str, batch: int | None = None) -> dict:
  """What `main` prints, as a dict. To be called in a process that has not used JAX's devices yet.

  Args:
    batch: rows of the global batch; None: see the module.
  """
  ranges.check(config)
  exchange.check(config)
  devices, chip = find_devices(topology)
  mesh = parallel.make_mesh(**config.mesh, devices=devices)
  config.batch = batch or batch_of(config, mesh)
  parallel.check_batch(config.batch, mesh)
  step = training_step(config, mesh, topology)

  with jax.set_mesh(mesh):
    begun = time.perf_counter()
    traced = step.function.trace(step.state, step.batch)
    say(f"traced and checked in {time.perf_counter() - begun:.0f} s; compiling")
    compiled = compile_or_explain(traced.lower(), topology, config)
    seconds = time.perf_counter() - begun
    say(f"compiled in {seconds:.0f} s")

  collectives, loops = hlo.read(compiled.as_text())
  memory = hlo.memory(compiled)
  costs = hlo.costs(compiled)
  if chip:
    memory["capacity"] = chip.hbm_gib * 2**30
  matmul_flops = flops.matmul_flops(traced.jaxpr) / len(devices)
  sent = sum(collective.sent for collective in collectives)
  return {
    "topology": topology,
    "chips": len(devices),
    "mesh": dict(mesh.shape),
    "batch": config.batch,
    "params": hlo.arrays(step.state.params),
    "memory": memory,
    **costs,
    "matmul_flops": matmul_flops,
    "collectives": hlo.by_kind(collectives),
    "loops": sorted((loop.trips for loop in loops), reverse=True),
    "estimate": estimate(chip, costs, matmul_flops, sent) if chip else None,
    "compile_s": round(seconds, 1),
    "jax": jax.__version__,
    "optimization": jax.config.jax_optimization_level,
  }


def training_step(config, mesh, topology: str) -> Step:
  """The step of `mmcl train` and what goes into it, as shapes alone; all of it is checked."""
  shapes, standardiser = cohort_of(config)
  losses = objectives.build(config.objectives)
  model = models.build(
    config.model, config.data.samples, len(standardiser.targets), len(standardiser.diseases)
  )
  models.check(config.model, shapes)
  data = mesh.shape["data"]
  rows = config.batch // mesh.shape["data"]
  say(
    f"{topology}: {mesh.size} devices, data={data} x model={mesh.shape['model']}; "
    f"batch {config.batch} ({rows} a device)"
  )
  with jax.set_mesh(mesh):
    example = inputs.example(config, shapes, len(standardiser.targets), config.batch)
    tx = state_lib.optimizer_for(model, example, config)
    state, shardings = state_lib.abstract(model, tx, example, config.seed, mesh, config.sharding)
    step_lib.check_outputs(model, losses, example, state)
    say(parallel.table(state, shardings, most=8))
    state = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      state,
      shardings,
    )
    variables = {"params": state.params, "batch_stats": state.statistics}
    batch = global_batch(model, config, shapes, variables, mesh)
    function = jax.jit(
      step_lib.make_train_step(model, losses, tx, config, standardiser),
      donate_argnums=0,
      out_shardings=(shardings, None),
    )
  return Step(function, state, batch)


def say(text: str) -> None:
  print(text, flush=True)


# --------------------------------------------------------------------------------------------------
# what to compile


def find_devices(topology: str) -> tuple[list, chips.Chip | None]:
  """Devices to compile for, none of which need exist, and what their chip can do (None: a CPU)."""
  name, _, size = topology.partition(":")
  if name == "cpu" and re.fullmatch("[1-9][0-9]{0,3}", size):
    return simulated_devices(topology, int(size)), None
  sides = ()
  if re.fullmatch(r"\d{1,3}(x\d{1,3}){1,2}", size):
    sides = tuple(int(side) for side in size.split("x"))
  if name not in TPUS or not is_slice(name, sides):
    expected = " ".join("x".join(map(str, slice_)) for slice_ in SLICES)
    raise UserError(
      f"--topology is {topology!r}; expected v5e: or v6e: with one of {expected}, v4: or v5p: with "
      f"three sides of 1, 2 or multiples of 4 (v5p:8x8x8; up to {LARGEST['v4']:,} and "
      f"{LARGEST['v5p']:,} chips), or cpu:N"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      f"--topology={topology} needs the TPU's compiler, libtpu, which is not installed; pip "
      "install 'mmcl-jax[tpu]' (no TPU is needed), or take --topology=cpu:8"
    )
  prepare_libtpu()
  host = tuple(min(side, most) for side, most in zip((*sides, 1)[:3], (2, 2, 1)))
  try:
    description = topologies.get_topology_desc(
      platform="tpu",
      topology_name=topology,
      chip_config_name=TPUS[name],
      chips_per_host_bounds=host,
    )
    return description.devices, chips.CHIPS[name]
  except Exception as error:  # libtpu has errors of its own for what it does not know
    raise UserError(f"--topology={topology}: libtpu refuses it: {error}") from None


def simulated_devices(topology: str, count: int) -> list:
  """`count` devices of the CPU, which must be the first that this process asks for."""
  jax.config.update("jax_platforms", "cpu")
  earlier = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{earlier} --xla_force_host_platform_device_count={count}"
  if len(jax.devices()) != count:
    raise UserError(
      f"--topology is {topology}, and this process has {len(jax.devices())} devices already; "
      "compile in a process of its own"
    )
  return jax.devices()


def prepare_libtpu() -> None:
  """The step is traced with the CPU at hand; libtpu looks for no TPU, locks none, writes no log."""
  jax.config.update("jax_platforms", "cpu")
  for variable, value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }.items():
    os.environ.setdefault(variable, value)


def is_slice(name: str, sides: tuple[int, ...]) -> bool:
  if chips.CHIPS[name].dimensions == 2:
    return sides in SLICES
  if len(sides) != 3 or int(np.prod(sides)) > LARGEST[name]:
    return False
  return all(side in (1, 2) or (side and side % 4 == 0) for side in sides)


def batch_of(config, mesh) -> int:
  shards = mesh.shape["data"]
  if config.per_device_batch:
    return config.per_device_batch * shards
  unit = shards * config.accumulation
  return math.ceil(config.batch / unit) * unit


def cohort_of(config):
  """Shapes of the records and how labels are standardised: of config.data.cohort, or as `mmcl
  prepare` makes them."""
  if config.data.cohort:
    cohort = cohort_lib.load(config.data.cohort)
    cohorts.check(cohort, [], config)
    return cohort.info["shapes"], standardise.of_cohort(cohort, config.data.targets)
  unknown = [name for name in config.data.targets if name not in schema.PHENOTYPES]
  if unknown:
    raise UserError(
      f"config.data.targets has {', '.join(unknown)}; without a cohort there are "
      f"{', '.join(schema.PHENOTYPES)}"
    )
  size = preprocess_cmr.Shape()
  plane = [size.size, size.size]
  volumes = [len(schema.PHASES), size.slices, *plane]
  shapes = {
    "ecg": [len(schema.LEADS), preprocess_ecg.samples(config.data.ecg_profile)],
    "ed_es_volumes": volumes,
    "labels": volumes,
    "cine_slice": [size.frames, *plane],
    "three_frames": [3, *plane],
    "lax": [size.frames, *plane],
    "phenotypes": [len(schema.PHENOTYPES)],
    "diseases": [len(schema.DISEASES)],
    "covariates": [len(schema.COVARIATES)],
  }
  phenotypes = list(schema.PHENOTYPES)
  standardiser = standardise.as_they_are(
    phenotypes,
    targets=tuple(config.data.targets) or tuple(phenotypes),
    covariates=tuple(schema.COVARIATES),
    diseases=tuple(schema.DISEASES),
  )
  return shapes, standardiser


def global_batch(model, config, shapes, variables, mesh):
  """Shapes of the batch that the pipeline gives, rows split over the data axis; of frozen towers,
  the kept features."""
  learning = models.learning(config.model)
  fields = models.fields(config.model, only=learning)
  batch = pipeline.element_spec(shapes, fields, config.batch)
  frozen = models.frozen(config.model)
  if frozen:
    spec = pipeline.element_spec(shapes, models.fields(config.model), config.batch)
    features = jax.eval_shape(inference.make_features(model, frozen), variables, spec)
    # kept as float32 (training.frozen)
    batch["features"] = {
      name: jax.ShapeDtypeStruct(x.shape, np.float32) for name, x in features.items()
    }
  rows = NamedSharding(mesh, P("data"))
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)


def compile_or_explain(lowered, topology: str, config):
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    needs = "does not fit a chip's memory"
    if used := re.search(r"[Uu]sed ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", str(error)):
      needs = f"needs {used[1]} of the {used[2]} bytes of a chip's memory"
    raise UserError(
      f"a batch of {config.batch} on {topology} {needs}; take a smaller --batch, "
      "config.accumulation, config.model.remat=blocks, "
      "config.sharding \"(('.*', 'fsdp'),)\" or a larger slice"
    ) from None


# --------------------------------------------------------------------------------------------------
# estimate


def estimate(chip: chips.Chip, costs: dict[str, float], matmul_flops: float, sent: float) -> dict:
  """Bounds from the published peaks: no step is faster than the slowest of its three, each by
  itself."""
  seconds = {
    "compute": max(costs["flops"], matmul_flops) / chip.flops,
    "memory": costs["bytes_accessed"] / chip.hbm,
    "network": sent / chip.network,
  }
  slowest = max(seconds, key=seconds.get)
  return {f"{name}_s": value for name, value in seconds.items()} | {
    "step_s": seconds[slowest],
    "limited_by": slowest,
    "mfu_bound": matmul_flops / chip.flops / seconds[slowest],
  }


if __name__ == "__main__":
  from mmcl_jax import cli

  cli.run(main)
