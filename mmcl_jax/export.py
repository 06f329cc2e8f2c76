"""`mmcl export`: the ECG encoder of a checkpoint as one file that runs without this package, and
its model card.

    mmcl export --workdir=W --out=DIR [--step=N] [--evaluation=DIR] [--platforms=cpu,cuda,tpu]

Writes DIR/encoder.stablehlo (jax.export: the program with its weights, for any number of recordings
at a time), with the phenotypes where mmcl evaluate has left probes; export.json, what goes in and
what comes out; MODEL_CARD.md.
"""

import argparse
import hashlib
import importlib.metadata
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from mmcl_jax.data.preprocess import ecg as preprocess_ecg
from mmcl_jax.embed import EVALUATION, Probes, evaluation, load_probes
from mmcl_jax.errors import UserError, writing
from mmcl_jax.models import inference
from mmcl_jax.reports import model_card, report
from mmcl_jax.support.paths import local
from mmcl_jax.training import restore

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
ARTEFACT, ABOUT, CARD = "encoder.stablehlo", "export.json", "MODEL_CARD.md"
# of weights: jax.export's format (flatbuffers) ends at 2 GiB, program included
MOST_BYTES = 2**31 - 2**24
NEEDED = ("counts", "phenotypes", "cohort_fingerprint")  # of results.json, by the card


def main(argv):
  parser = argparse.ArgumentParser(
    prog="mmcl export", description=__doc__.partition("\n\n")[0], allow_abbrev=False
  )
  parser.add_argument("--workdir", type=local, required=True, help="folder of the run")
  parser.add_argument(
    "--out", type=local, required=True, help=f"folder for {ARTEFACT}, {ABOUT} and {CARD}"
  )
  parser.add_argument(
    "--step",
    type=int,
    help="checkpoint (default: the best of a run that stops early, else the last)",
  )
  parser.add_argument("--evaluation", **EVALUATION)
  parser.add_argument(
    "--platforms",
    default="cpu,cuda,tpu",
    help=f"what the file shall run on, of {', '.join(PLATFORMS)} (default %(default)s)",
  )
  args = parser.parse_args(argv)
  platforms = tuple(dict.fromkeys(args.platforms.split(",")))
  if unknown := [name for name in platforms if name not in PLATFORMS]:
    raise UserError(
      f"--platforms has {', '.join(map(repr, unknown))}; expected some of {','.join(PLATFORMS)}"
    )
  place = report.check_place(args.out, "an export", ABOUT)

  run = restore.load_ecg_run(args.workdir, args.step)
  folder = evaluation(args.workdir, run.step, args.evaluation)
  probes = load_probes(args.workdir, run.step, folder)
  results = load_results(args.workdir, folder)
  if (probes.checksum is None) != (results is None):
    raise UserError(
      f"{folder} has only one of probes.npz and results.json; mmcl evaluate "
      f"--workdir={args.workdir} makes both"
    )
  try:
    card = model_card.model_card(run.config, run.manifest, results)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    if results is None:
      raise
    raise UserError(
      f"{folder}/results.json is not in the form that mmcl evaluate writes ({error!r}); mmcl "
      f"evaluate --workdir={args.workdir} makes it anew"
    ) from error
  exported = lower(run, probes, platforms)
  artefact = exported.serialize()
  about = describe(run, probes, exported, artefact)
  with writing(place), report.replaced(place, "an export", ABOUT) as folder:
    (folder / ARTEFACT).write_bytes(artefact)
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    (folder / CARD).write_text(card, encoding="utf-8")
  megabytes = len(artefact) / 1e6
  print(
    f"step {run.step} for {', '.join(platforms)}: {place / ARTEFACT} ({megabytes:,.1f} MB), "
    f"{ABOUT}, {CARD}"
  )


def load_results(workdir: str, folder: pathlib.Path) -> dict | None:
  """What `mmcl evaluate` measured; None where it has not run."""
  path = folder / "results.json"
  if not path.exists():
    return None
  try:
    results = json.loads(path.read_text())
    lacking = [name for name in NEEDED if name not in results]
  except (OSError, ValueError, TypeError) as error:
    raise UserError(
      f"cannot read {path} ({error}); mmcl evaluate --workdir={workdir} makes it anew"
    ) from error
  if lacking:
    raise UserError(
      f"{path} has no {', no '.join(lacking)}; mmcl evaluate --workdir={workdir} makes it anew"
    )
  return results


def lower(run: restore.Run, probes: Probes, platforms: tuple[str, ...]) -> export.Exported:
  """The program ecg float32 [batch, 12, samples] -> embedding [batch, D], phenotypes [batch, K];
  its weights are constants.

  Kernels choose their form by platform when the program is compiled, so that one file suits all.
  """
  config = run.config
  width = model_card.width(run.config)
  if probes.columns and len(probes.coef) != width:
    raise UserError(
      f"the probes take embeddings of width {len(probes.coef)}, the encoder gives {width}; mmcl "
      "evaluate fits them anew"
    )
  if (size := 4 * model_card.parameters(config)) > MOST_BYTES:
    raise UserError(
      f"the encoder has {size / 1e9:.1f} GB of weights; jax.export's files hold "
      f"{MOST_BYTES / 1e9:.1f} GB"
    )
  embed = inference.make_embed_ecg(run.model, config.data.samples, "embed_ecg")
  variables = jax.device_get(run.state.variables)
  coef = np.asarray(probes.coef, np.float32)
  intercept = np.asarray(probes.intercept, np.float32)

  def encode(ecg):
    embedding = embed(variables, ecg)["ecg_embedding"]
    if not probes.columns:
      return {"embedding": embedding}
    phenotypes = jnp.dot(embedding, coef, precision="highest") + intercept
    return {"embedding": embedding, "phenotypes": phenotypes}

  leads, _ = run.manifest["shapes"]["ecg"]
  samples = preprocess_ecg.samples(config.data.ecg_profile)
  (batch,) = export.symbolic_shape("batch")
  ecg = jax.ShapeDtypeStruct((batch, leads, samples), jnp.float32)
  before = jax.config.jax_traceback_in_locations_limit
  # else every operation names the files of this machine
  jax.config.update("jax_traceback_in_locations_limit", 0)
  try:
    return export.export(jax.jit(encode), platforms=platforms)(ecg)
  finally:
    jax.config.update("jax_traceback_in_locations_limit", before)


def describe(run, probes, exported, artefact) -> dict:
  """export.json: what goes in, what comes out, and of what the file was made."""

  def shape(aval):
    return [str(n) if export.is_symbolic_dim(n) else n for n in aval.shape]

  def array(aval):
    return {"dtype": str(aval.dtype), "shape": shape(aval)}

  avals = jax.tree.unflatten(exported.out_tree, exported.out_avals)
  outputs = {name: array(aval) for name, aval in avals.items()}
  if probes.columns:
    names = []
    for column, unit in zip(probes.columns, probes.units, strict=True):
      names.append(column.removesuffix(f"_{unit}"))
    outputs["phenotypes"] |= {"names": names, "units": list(probes.units)}
  config = run.config
  return {
    "research_only": model_card.RESEARCH_ONLY,
    "file": ARTEFACT,
    "sha256": hashlib.sha256(artefact).hexdigest(),
    "bytes": len(artefact),
    "input": {
      "name": "ecg",
      **array(exported.in_avals[0]),
      **preprocess_ecg.in_words(config.data.ecg_profile),
    },
    "outputs": outputs,
    "platforms": list(exported.platforms),
    "calling_convention_version": exported.calling_convention_version,
    "packages": {
      name: importlib.metadata.version(name) for name in ("mmcl-jax", "jax", "jaxlib", "flax")
    },
    "step": run.step,
    "cohort_fingerprint": run.manifest["cohort"],
  }


if __name__ == "__main__":
  from mmcl_jax import cli

  cli.run(main)
