"""`mmcl convert`: PyTorch weights into a workdir, and a workdir's weights out to PyTorch.

    mmcl convert --input=signal_encoder_mmcl.pth --out=W
    mmcl convert --workdir=W --out=ecg.safetensors --tower=ecg

A workdir made so can be evaluated, embed ECGs, and start a later stage (config.init_from). Nothing
in a file is executed, and nothing is made up: what a file lacks, or has too much of, is an error
that lists it.
"""

import argparse
import collections
import os

import numpy as np

from mmcl_jax.data import schema, standardise
from mmcl_jax.errors import UserError, writing
from mmcl_jax.support import files
from mmcl_jax.support.paths import local

# options of torch_weights.load
FLAGS = ("tower", "heads", "decoder_heads", "pool", "samples", "view", "ignore")
# ECG encoder -> how its authors normalised ECGs
PROFILES = {"tiny": "mmcl", "medium": "dual_phase", "st_mem": "cardionets"}


def main(argv=None):
  args = parse(argv)
  if args.input:
    options = {name: getattr(args, name) for name in FLAGS}
    convert_in(args.input, args.out, args.ecg_profile, options)
  else:
    convert_out(args.workdir, args.step, args.out, args.tower)


def parse(argv):
  parser = argparse.ArgumentParser(
    prog="mmcl convert", description=__doc__.partition("\n\n")[0], allow_abbrev=False
  )
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument(
    "--input", type=local, help="PyTorch weights: .pth, .pt, .ckpt or .safetensors"
  )
  source.add_argument("--workdir", type=local, help="folder of a run, whose weights shall go out")
  parser.add_argument(
    "--out",
    type=local,
    required=True,
    help="with --input: workdir to make; with --workdir: FILE.safetensors",
  )
  parser.add_argument(
    "--tower",
    help="the one tower to take or to write (to write: ecg, ecg_mae with the MAE's decoder, "
    "or a CMR tower); what to call the only CMR encoder of --input",
  )
  parser.add_argument(
    "--step",
    type=int,
    help="checkpoint of --workdir (default: the best of a run that stops early, else the last)",
  )
  given = parser.add_argument_group("what an --input does not tell")
  given.add_argument(
    "--ecg_profile", help="normalisation of the ECGs that the encoder was trained on"
  )
  given.add_argument(
    "--samples", type=int, help="samples that it sees at a time, where its positions are fixed"
  )
  given.add_argument(
    "--heads",
    type=int,
    help="attention heads of the encoder, where its width and depth are not published ones",
  )
  given.add_argument("--decoder_heads", type=int, help="likewise of the MAE decoder")
  given.add_argument("--pool", help="mean, attention or cls, where it is not what the keys tell")
  given.add_argument("--view", help=f"what a CMR encoder looks at: {', '.join(schema.VIEWS)}")
  given.add_argument(
    "--ignore",
    action="append",
    default=[],
    metavar="REGEX",
    help="keys to leave out; may be repeated",
  )
  args = parser.parse_args(argv)
  chosen, of_the_other = "input", ["step"]
  if args.workdir:
    chosen = "workdir"
    of_the_other = [*FLAGS[1:], "ecg_profile"]
  unused = [name for name in of_the_other if getattr(args, name) not in (None, [])]
  if unused:
    parser.error(f"--{', --'.join(unused)} cannot go with --{chosen}")
  return args


def convert_in(path: str, out: str, profile: str | None, options: dict) -> None:
  """Makes the workdir `out` of PyTorch weights; nothing is left of it where that fails."""
  from mmcl_jax import configuration
  from mmcl_jax.data.preprocess import ecg as preprocess_ecg
  from mmcl_jax.interop import torch_weights
  from mmcl_jax.training import restore

  if os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
    raise UserError(f"{out} is there already and not empty; take another --out")
  if profile and profile not in preprocess_ecg.PROFILES:
    raise UserError(
      f"--ecg_profile={profile}; expected one of {', '.join(preprocess_ecg.PROFILES)}"
    )
  model, variables, report = torch_weights.read(
    path, **options | {"ignore": tuple(options["ignore"])}
  )

  config = configuration.defaults(batch=32, steps=1)
  config.model = model.config
  ecg = model.config.towers.get("ecg")
  size = ""
  if ecg:
    size = ecg.size if isinstance(ecg.size, str) else "of its own"
    if ecg.fn == "st_mem":
      size = "st_mem"
  config.data.ecg_profile = profile or PROFILES.get(size, "minimal")
  if size and not profile:
    why = "as published with this encoder" if size in PROFILES else "which the file does not say"
    report.append(f"ECG profile {config.data.ecg_profile}, {why} (--ecg_profile)")
  length = preprocess_ecg.samples(config.data.ecg_profile)
  config.data.samples = model.samples if size else min(model.samples, length)
  if config.data.samples > length:
    raise UserError(
      f"the encoder sees {model.samples} samples, the profile {config.data.ecg_profile} gives "
      f"{length}; name the profile it was trained on with --ecg_profile"
    )

  covariates = 0
  if ecg and ecg.get("film"):
    covariates = len(variables["params"]["ecg"]["film"]["fc"]["kernel"])
  shapes = torch_weights.record_shapes(config.model, length, covariates)
  any_number = np.zeros(1, np.float32), np.ones(1, np.float32)  # of covariates, left as they are
  standardiser = standardise.as_they_are([])._replace(covariate_moments=any_number)
  with writing(out), files.atomic_folder(out) as folder:
    restore.write_run(
      str(folder), config, variables, shapes, standardiser, origin=os.path.basename(path)
    )
  uses = ["config.init_from"]
  if not covariates:  # whose names and scales the file does not tell
    uses = [f"`mmcl evaluate --workdir={out} --cohort=COHORT`", "`mmcl embed`", *uses]
  report.append(f"made {out}, for {' or '.join(uses)}")
  print("\n".join(report))


def convert_out(workdir: str, step: int | None, out: str, tower: str | None) -> None:
  """Writes a checkpoint's weights under PyTorch's keys."""
  from mmcl_jax.interop import torch_weights
  from mmcl_jax.training import restore

  if not out.endswith(".safetensors"):
    raise UserError(f"--out={out}; expected a name that ends in .safetensors")
  run = restore.load_run(workdir, step)
  left_out = torch_weights.save(run.model, run.state.variables, out, tower)
  print(f"{tower or 'all towers'} of step {run.step} written to {out}")
  if left_out:
    groups = collections.Counter()
    for path in left_out:
      depth = 2 if path.startswith("ecg/") else 1
      groups["/".join(path.split("/")[:depth])] += 1
    counts = [f"{group} ({count} arrays)" for group, count in groups.items()]
    print(f"left out: {', '.join(counts)}")


if __name__ == "__main__":
  from mmcl_jax import cli

  cli.run(main)
