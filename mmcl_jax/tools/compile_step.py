"""`mmcl compile`: what a recipe's training step will need on TPUs or GPUs, from their own compiler,
without one of them.

    mmcl compile --config=joint:base --topology=v5e:4x4 --config.model.dtype=bfloat16

The very step of `mmcl train` is compiled ahead of time and read; nothing runs. The compiler comes
with libtpu (pip install 'mmcl-jax[tpu]') or with jax's CUDA plugin (pip install 'mmcl-jax[cuda]',
on Python 3.12 and later). No cohort is needed: records are as `mmcl prepare` makes them by default;
with --config.data.cohort=DIR as that cohort has them.

  --topology  chips of a slice: v4:AxBxC, v5p:AxBxC, v5e:AxB, v6e:AxB; several slices: 2xv5e:16x16;
              GPUs of a node: h100:N, h200:N; nodes x GPUs: h100:MxN; or cpu:N, simulated devices
              (no libtpu, no times)
  --batch     rows of the global batch. Default: config.per_device_batch times the devices of the
              data axis, where a recipe sets it; else the recipe's batch, taken up to the next one
              that they and config.accumulation divide

The last line is a JSON object, of one device unless it says otherwise: memory (bytes), hbm_bytes
(what the step reads from the memory and writes to it), flops (matrix products of the compiled step,
but those of kernels that it calls), matmul_flops (of the step as written, recomputation included,
split evenly over the chips), collectives (kind -> count, bytes of the arrays exchanged, bytes
sent), loops (how often each runs; 0: not known, counted once), and an estimate: the least time for
each of compute, memory and network at the published peaks, the largest of which bounds the step
from below and the MFU from above. Waiting and what cannot overlap come on top; `latency_s` is what
the hops of all exchanges would take one after the other (tools.estimate).

A TPU's program is read after XLA's optimisations, at which buffers are assigned. Code generation, a
quarter of an hour for a recipe with ResNet towers, would come next and is not waited for.
"""

import argparse
import json
import math
import pathlib
import re
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from mmcl_jax import configuration, models, objectives, ranges
from mmcl_jax.data import cohort as cohort_lib, pipeline, schema, standardise
from mmcl_jax.data.preprocess import cmr as preprocess_cmr, ecg as preprocess_ecg
from mmcl_jax.errors import UserError
from mmcl_jax.models import exchange, inference, inputs
from mmcl_jax.tools import estimate, hlo, targets, traffic
from mmcl_jax.training import cohorts, flops, parallel, state as state_lib, step as step_lib

USAGE = (
  "usage: mmcl compile --config=joint:base --topology=v5e:4x4 [--batch=N] [--config.x.y=V ...]"
)
# "Used 23.01G of 15.75G hbm", "temporaries (24.25G) exceeds available HBM (15.75G)"
OUT_OF_MEMORY = re.compile(
  r"\b([\d.]+[KMGT]?)\)? (?:of|exceeds available HBM) \(?([\d.]+[KMGT]?)\b", re.IGNORECASE
)
# XLA's names of what it writes down
OPTIMISED = "after_optimizations"
PROGRAM = f"{OPTIMISED}.txt"
BUFFERS = f"{OPTIMISED}-buffer-assignment.txt"


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
    words={"topology": "TPU slice (v5e:4x4, v5p:8x8x8, 2xv5e:16x16), GPUs (h100:4x8), or cpu:N"},
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
  """What `main` prints, as a dict.

  To be called in a process that has not used JAX's devices yet. For a TPU, a daemon thread goes on
  to generate code until the process ends.

  Args:
    batch: rows of the global batch; None: see the module.
  """
  ranges.check(config)
  exchange.check(config)
  target = targets.find(topology)
  mesh = parallel.make_mesh(**config.mesh, devices=target.devices)
  config.batch = batch or batch_of(config, mesh)
  parallel.check_batch(config.batch, mesh)
  step = training_step(config, mesh, topology)

  with jax.set_mesh(mesh):
    begun = time.perf_counter()
    traced = step.function.trace(step.state, step.batch)
    say(f"traced and checked in {time.perf_counter() - begun:.0f} s; compiling")
    text, memory = compile_or_explain(traced.lower(), target, config)
    seconds = time.perf_counter() - begun
    say(f"compiled in {seconds:.0f} s")

  collectives, loops = hlo.read(text)
  counted = {
    "flops": hlo.product_flops(text),
    "hbm_bytes": traffic.hbm_bytes(text),
    "matmul_flops": flops.matmul_flops(traced.jaxpr) / mesh.size,
  }
  bounds = None
  if target.chip:
    network = estimate.Network(target.groups, target.sides, mesh.shape["model"])
    bounds = estimate.estimate(target.chip, network, collectives=collectives, **counted)
  return {
    "topology": topology,
    "chips": mesh.size,
    "mesh": dict(mesh.shape),
    "batch": config.batch,
    "params": hlo.arrays(step.state.params),
    "memory": memory,
    **counted,
    "collectives": hlo.by_kind(collectives),
    "loops": sorted((loop.trips for loop in loops), reverse=True),
    "estimate": bounds,
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


def compile_or_explain(lowered, target: targets.Target, config) -> tuple[str, dict[str, int]]:
  """The text of the compiled step and its memory (hlo.memory)."""
  needs = None
  try:
    if target.chip and target.chip.dimensions:
      text, memory = optimised(lowered)
    else:
      compiled = lowered.compile()
      text, memory = compiled.as_text(), hlo.memory(compiled)
    if target.chip:
      memory["capacity"] = target.chip.hbm_gib * 2**30
      if memory["total"] > memory["capacity"]:
        needs = f"{memory['total'] / 2**30:.2f}G of the {target.chip.hbm_gib}G"
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    used = OUT_OF_MEMORY.search(str(error))
    needs = f"{used[1]} of the {used[2]}" if used else "more than the"
  if needs:
    raise UserError(
      f"a batch of {config.batch} on {target.topology} needs {needs} bytes of a chip's memory; "
      "take a smaller --batch, config.accumulation, config.model.remat=blocks, "
      "config.sharding \"(('.*', 'fsdp'),)\" or a larger slice"
    )
  return text, memory


def optimised(lowered) -> tuple[str, dict[str, int]]:
  """A TPU's program after XLA's optimisations and its memory, as soon as XLA has written both down.

  The compiler goes on, in a daemon thread, to generate code.
  """
  compiled = futures.Future()

  def compile_all(folder):
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    try:
      compiled.set_result(lowered.compile(compiler_options=options))
    except Exception as error:
      compiled.set_exception(error)

  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    threading.Thread(target=compile_all, args=(folder,), daemon=True).start()
    before, found = {}, written(folder)
    while not compiled.done() and not (len(found) == 2 and found == before and all(found.values())):
      time.sleep(1)
      before, found = found, written(folder)
    if compiled.done():
      compiled.result()  # raises what the compiler did
    files = written(folder)
    texts = {file.name[file.name.index(OPTIMISED) :]: file.read_text() for file in files}
  return texts[PROGRAM], hlo.memory_of_buffers(texts[BUFFERS])


def written(folder: str) -> dict[pathlib.Path, int]:
  """Files of the program and of its buffer assignment, as far as XLA has written them -> bytes."""
  files = pathlib.Path(folder).glob(f"*{OPTIMISED}*")
  return {file: file.stat().st_size for file in files if file.name.endswith((PROGRAM, BUFFERS))}


if __name__ == "__main__":
  from mmcl_jax import cli

  cli.run(main)
