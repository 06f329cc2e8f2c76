"""`mmcl generate`: hearts drawn from ECG recordings, by a run of configs/ecg_to_cmr.py. None of
them was measured.

    mmcl generate --workdir=W --input=ECG... --out=DIR [--samples=8]

Of each recording DIR/NAME/ holds heart-1.nii.gz and so on, grey values of ED and ES [columns, rows,
slices, phase] whose header says that they are generated, heart-1-labels.nii.gz (1 LV, 2 myocardium,
3 RV), hearts.png, and hearts.json with what each of the hearts measures. DIR/hearts.csv has a line
a recording: mean and SD over its hearts, or why it was rejected. How far apart the hearts of one
recording are is what the ECG leaves open. The same command goes on after the recordings that are
there.
"""

import argparse
import csv
import hashlib
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from tqdm import tqdm

from mmcl_jax.data import readers, schema
from mmcl_jax.data.ahead import read_ahead
from mmcl_jax.embed import find_recordings
from mmcl_jax.errors import UserError, check_writable, writing
from mmcl_jax.evaluators.report import as_cell
from mmcl_jax.models import inference, pretrainer
from mmcl_jax.projects.generation import drawings, evaluator
from mmcl_jax.support import files
from mmcl_jax.support.paths import local
from mmcl_jax.training import restore

MARK = "generated, not measured"  # in every picture and every header
UNITS = [schema.PHENOTYPES[name] for name in evaluator.PHENOTYPES]


def main(argv):
  parser = argparse.ArgumentParser(
    prog="mmcl generate", description=__doc__.partition("\n\n")[0], allow_abbrev=False
  )
  parser.add_argument("--workdir", type=local, required=True, help="folder of the run")
  parser.add_argument(
    "--input",
    type=local,
    nargs="+",
    required=True,
    metavar="PATH",
    help="ECGs, and folders to search for them (as mmcl embed)",
  )
  parser.add_argument(
    "--out",
    type=local,
    required=True,
    help="folder for the hearts; what is there of the same run is gone on from",
  )
  parser.add_argument(
    "--samples", type=int, default=8, help="hearts of each recording (default %(default)s)"
  )
  parser.add_argument(
    "--guidance",
    type=float,
    default=1.0,
    help="1: as the ECG says; above: further away from the hearts of all; 0: any heart (default %(default)s)",
  )
  parser.add_argument(
    "--seed", type=int, default=0, help="of the noise that hearts grow from (default %(default)s)"
  )
  parser.add_argument(
    "--step", type=int, help="checkpoint (default: the last, or the best of a run that stops early)"
  )
  args = parser.parse_args(argv)
  if args.samples < 1 or not 0 <= args.guidance < np.inf or not 0 <= args.seed < 2**32:
    raise UserError(
      f"--samples is {args.samples}, --guidance {args.guidance} and --seed {args.seed}; expected "
      "at "
      "least 1, a number of at least 0, and a whole number from 0 to 4294967295"
    )
  check_writable(args.out)
  paths = find_recordings(args.input)
  run = load_generator(args.workdir, args.step, args.guidance)
  about = {
    "mark": MARK,
    "checkpoint": restore.checksum(args.workdir, run.step),
    "step": run.step,
    "samples": args.samples,
    "guidance": args.guidance,
    "seed": args.seed,
  }
  out = pathlib.Path(args.out)
  with writing(out):
    out.mkdir(parents=True, exist_ok=True)
    rows = write_hearts(run, named(paths), out, about)
    write_table(out / "hearts.csv", rows)
  drawn = sum(row["status"] == "ok" for row in rows)
  if not drawn:
    raise UserError(
      f"none of the {len(rows)} recordings could be read; the first, {rows[0]['path']}: "
      f"{rows[0]['reason']}. All "
      f"reasons: {out}/hearts.csv"
    )
  print(
    f"{args.samples} hearts of each of {drawn} recordings ({len(rows) - drawn} rejected), {MARK}: "
    f"{out}"
  )


def load_generator(workdir: str, step: int | None, guidance: float) -> restore.Run:
  """A run that draws hearts from an ECG alone and measures them."""
  run = restore.load_ecg_run(workdir, step)
  if lacking := [
    name
    for name in ("tokenizer", "segmenter", "generator")
    if name not in evaluator.parts(run.config.model)
  ]:
    raise UserError(
      f"{workdir} has no {' and no '.join(lacking)}; expected a run of configs/ecg_to_cmr.py"
    )
  if pretrainer.takes_covariates(run.config.model) and not run.config.model.generator.dropout:
    raise UserError(
      f"{workdir} was trained with the covariates always there (config.model.generator.covariates, "
      "dropout 0), and "
      "ECG files hold none; evaluate it on a cohort with `mmcl evaluate`, or train one with dropout"
    )
  if "spacing" not in run.manifest:
    raise UserError(
      f"{workdir}/checkpoints/{run.step} does not say how large its voxels are; train it with this "
      "version"
    )
  if guidance != 1 and not run.config.model.generator.dropout:
    raise UserError(
      f"--guidance is {guidance}, and {workdir} was trained with the ECG always there "
      "(config.model.generator.dropout "
      "is 0); only 1 has a meaning"
    )
  return run


def named(paths: list[str]) -> dict[str, str]:
  """{name of its folder: path}: the file's name without its format's suffix, with a number where
  several have it."""
  found = {}
  for path in paths:
    stem = re.sub(r"[^\w.-]", "_", readers.stem(path)).lstrip(".") or "ecg"
    name, number = stem, 1
    while name in found or name == "hearts.csv":
      number += 1
      name = f"{stem}-{number}"
    found[name] = path
  return found


def write_hearts(run, recordings: dict[str, str], out: pathlib.Path, about: dict) -> list[dict]:
  """Draws the hearts that are not there yet; a row of hearts.csv for every recording."""
  shape = tuple(run.manifest["shapes"]["ed_es_volumes"][1:])
  # covariates, of which ECG files say nothing
  unknown = jnp.full((1, len(run.standardiser.covariates)), jnp.nan)
  noise_shape = about["samples"], *pretrainer.noise_shape(run.config.model, shape)
  generate = inference.make_generate(
    run.model, run.config, shape, evaluator.STEPS, about["guidance"]
  )
  segment = inference.make_segment(run.model)

  def draw(variables, ecg, key):
    stacks = generate(variables, ecg[None], jax.random.normal(key, (1, *noise_shape)), unknown)[0]
    labels = jax.lax.map(lambda x: segment(variables, x[None])[0], stacks, batch_size=8)
    return (255 * stacks).round().astype("uint8"), labels

  draw = jax.jit(draw, out_shardings=NamedSharding(run.mesh, P()))
  done = {name: row for name in recordings if (row := made(out / name, recordings[name], about))}
  if done:
    print(f"{len(done)} of {len(recordings)} recordings are in {out}", flush=True)
  to_do, rows = {name: path for name, path in recordings.items() if name not in done}, dict(done)
  read = read_ahead(to_do.values(), run.config.data.ecg_profile, ahead=8) if to_do else ()
  for name, (row, ecg) in tqdm(zip(to_do, read), "generate", len(to_do), unit="ECG", mininterval=1):
    rows[name] = row
    if ecg is not None:
      # By the name, so that neither the order nor an interruption changes a heart.
      number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")
      key = jax.random.fold_in(jax.random.key(about["seed"]), np.uint32(number))
      stacks, labels = jax.device_get(draw(run.state.variables, ecg, key))
      rows[name] |= write_one(
        out / name, stacks, labels, run.manifest["spacing"], about | {"recording": row}
      )
  return [rows[name] for name in recordings]


def made(folder: pathlib.Path, path: str, about: dict) -> dict | None:
  """The row of a recording that the same run has drawn hearts of; None where there is nothing;
  UserError where it is another's."""
  if not folder.exists():
    return None
  try:
    found = json.loads((folder / "hearts.json").read_text())
    theirs, row = {name: found[name] for name in about}, found["recording"] | found["summary"]
    if theirs == about and row["path"] == path:
      return row
  except (OSError, ValueError, KeyError, TypeError):
    pass
  raise UserError(
    f"{folder} is there and not of this command (another run, flags or recording); name another "
    "--out, or remove it"
  )


def write_one(
  folder: pathlib.Path, stacks: np.ndarray, labels: np.ndarray, spacing: list[float], about: dict
) -> dict:
  """Writes the hearts of a recording, stacks and labels uint8 [S, P, Z, H, W], whole or not at all;
  their mean and SD by name."""
  figure = drawings.montage(
    stacks, labels, f"{len(stacks)} hearts drawn from one ECG", MARK.upper()
  )
  millilitres = np.asarray(
    evaluator.volumes(labels, np.tile(np.float32(spacing), (len(labels), 1)))
  )
  values = evaluator.measure(millilitres)
  known = np.isfinite(values).sum(axis=0)

  def told(statistic, least):
    return [
      float(statistic(x[np.isfinite(x)])) if n >= least else None for x, n in zip(values.T, known)
    ]

  columns = [f"{name}_{unit}" for name, unit in zip(evaluator.PHENOTYPES, UNITS)]
  summary = dict(zip(columns, told(np.mean, 1))) | dict(
    zip([f"{c}_sd" for c in columns], told(lambda x: x.std(ddof=1), 2))
  )
  hearts = [{c: None if np.isnan(x) else float(x) for c, x in zip(columns, row)} for row in values]
  whole = about | {"spacing_mm": spacing, "summary": summary, "hearts": hearts}
  with files.atomic_folder(folder) as partial:
    for i, (stack, label) in enumerate(zip(stacks, labels), 1):
      save_nifti(partial / f"heart-{i}.nii.gz", stack, spacing)
      save_nifti(partial / f"heart-{i}-labels.nii.gz", label, spacing)
    figure.savefig(partial / "hearts.png", dpi=110, metadata={"Description": MARK})
    (partial / "hearts.json").write_text(json.dumps(whole, indent=1) + "\n")
  return summary


def save_nifti(file: pathlib.Path, stack: np.ndarray, spacing: list[float]) -> None:
  """stack [P, Z, H, W] as [W, H, Z, P] with its voxel size in mm (spacing along Z, H, W)."""
  image = nibabel.Nifti1Image(stack.transpose(3, 2, 1, 0), np.diag([*spacing[::-1], 1.0]))
  image.header["descrip"], image.header["intent_name"] = MARK.encode(), b"generated"
  image.header.set_xyzt_units("mm")
  nibabel.save(image, file)


def write_table(file: pathlib.Path, rows: list[dict]) -> None:
  columns = list(dict.fromkeys(name for row in rows for name in row))
  with files.atomic(file, newline="", encoding="utf-8") as table:
    writer = csv.DictWriter(table, columns)
    writer.writeheader()
    writer.writerows(
      {name: as_cell(x) if isinstance(x, str) else x for name, x in row.items()} for row in rows
    )


if __name__ == "__main__":
  from mmcl_jax import cli

  cli.run(main)
