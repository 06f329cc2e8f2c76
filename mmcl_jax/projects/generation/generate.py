"""`mmcl generate`: hearts drawn from ECG recordings, by a run of the recipe ecg_to_cmr. None of
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

from mmcl_jax import models
from mmcl_jax.data import readers, schema
from mmcl_jax.data.ahead import read_ahead
from mmcl_jax.embed import find_recordings
from mmcl_jax.errors import UserError, check_writable, writing
from mmcl_jax.projects.generation import drawings, evaluator
from mmcl_jax.projects.generation.model import GenerationModel, noise_shape, parts
from mmcl_jax.projects.generation.sampling import make_generate, make_segment
from mmcl_jax.projects.generation.scores import PHENOTYPES, measure, volumes
from mmcl_jax.reports.report import as_cell
from mmcl_jax.support import files
from mmcl_jax.support.paths import local
from mmcl_jax.training import restore

MARK = "generated, not measured"  # in every picture and every header
UNITS = [schema.PHENOTYPES[name] for name in PHENOTYPES]


def arguments(argv) -> argparse.Namespace:
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
    help="folder for the hearts; hearts of the same run that are there are kept",
  )
  parser.add_argument(
    "--samples", type=int, default=8, help="hearts of each recording (default %(default)s)"
  )
  parser.add_argument(
    "--guidance",
    type=float,
    default=1.0,
    help="1: as the ECG says; above: further away from the hearts of all; 0: any heart "
    "(default %(default)s)",
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
      "at least 1, a number of at least 0, and a whole number from 0 to 4294967295"
    )
  return args


def main(argv):
  args = arguments(argv)
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
      f"{rows[0]['reason']}. All reasons: {out}/hearts.csv"
    )
  print(
    f"{args.samples} hearts of each of {drawn} recordings ({len(rows) - drawn} rejected), {MARK}: "
    f"{out}"
  )


def load_generator(workdir: str, step: int | None, guidance: float) -> restore.Run:
  """A run that draws hearts from an ECG alone and measures them."""
  run = restore.load_ecg_run(workdir, step)
  lacking = [part for part in GenerationModel.PARTS if part not in parts(run.config.model)]
  if lacking:
    raise UserError(
      f"{workdir} has no {' and no '.join(lacking)}; expected a run of the recipe ecg_to_cmr"
    )
  if models.takes_covariates(run.config.model) and not run.config.model.generator.dropout:
    raise UserError(
      f"{workdir} was trained with the covariates always there (config.model.generator.covariates, "
      "dropout 0), and ECG files hold none; evaluate it on a cohort with `mmcl evaluate`, or train "
      "one with dropout"
    )
  if guidance != 1 and not run.config.model.generator.dropout:
    raise UserError(
      f"--guidance is {guidance}, and {workdir} was trained with the ECG always there "
      "(config.model.generator.dropout is 0); only 1 has a meaning"
    )
  return run


def named(paths: list[str]) -> dict[str, str]:
  """{name of its folder: path}: the file's name without its format's suffix, with a number where
  several have it."""
  recordings = {}
  for path in paths:
    stem = re.sub(r"[^\w.-]", "_", readers.stem(path)).lstrip(".") or "ecg"
    name, number = stem, 1
    while name in recordings or name == "hearts.csv":
      number += 1
      name = f"{stem}-{number}"
    recordings[name] = path
  return recordings


def write_hearts(run, recordings: dict[str, str], out: pathlib.Path, about: dict) -> list[dict]:
  """Draws the hearts that are not there yet; a row of hearts.csv for every recording."""
  rows, to_do = {}, {}
  for name, path in recordings.items():
    row = row_of_earlier(out / name, path, about)
    if row:
      rows[name] = row
    else:
      to_do[name] = path
  if rows:
    print(f"{len(rows)} of {len(recordings)} recordings are in {out}", flush=True)
  if not to_do:
    return [rows[name] for name in recordings]
  draw = make_draw(run, about)
  ecgs = read_ahead(to_do.values(), run.config.data.ecg_profile, ahead=8)
  progress = tqdm(zip(to_do, ecgs), "generate", len(to_do), unit="ECG", mininterval=1)
  for name, (row, ecg) in progress:
    rows[name] = row
    if ecg is not None:
      key = key_of(name, about["seed"])
      stacks, labels = jax.device_get(draw(run.state.variables, ecg, key))
      of_recording = about | {"recording": row}
      rows[name] |= write_recording(
        out / name, stacks, labels, run.manifest["spacing"], of_recording
      )
  return [rows[name] for name in recordings]


def make_draw(run, about: dict):
  """(variables, ecg [L, T], key) -> stacks and labels uint8 [S, P, Z, H, W]."""
  shape = tuple(run.manifest["shapes"]["ed_es_volumes"][1:])
  # covariates, of which ECG files say nothing
  unknown = jnp.full((1, len(run.standardiser.covariates)), jnp.nan)
  shape_of_noise = about["samples"], *noise_shape(run.config.model, shape)
  generate = make_generate(run.model, run.config, shape, evaluator.STEPS, about["guidance"])
  segment = make_segment(run.model)

  def draw(variables, ecg, key):
    noise = jax.random.normal(key, (1, *shape_of_noise))
    stacks = generate(variables, ecg[None], noise, unknown)[0]
    labels = jax.lax.map(lambda x: segment(variables, x[None])[0], stacks, batch_size=8)
    return (255 * stacks).round().astype("uint8"), labels

  return jax.jit(draw, out_shardings=NamedSharding(run.mesh, P()))


def key_of(name: str, seed: int):
  """By the name, so that neither the order nor an interruption changes a heart."""
  number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")
  return jax.random.fold_in(jax.random.key(seed), np.uint32(number))


def row_of_earlier(folder: pathlib.Path, path: str, about: dict) -> dict | None:
  """The row of a recording that the same run has drawn hearts of; None where there is nothing;
  UserError where it is another's."""
  if not folder.exists():
    return None
  try:
    earlier = json.loads((folder / "hearts.json").read_text())
    same = all(earlier[name] == value for name, value in about.items())
    row = earlier["recording"] | earlier["summary"]
    if same and row["path"] == path:
      return row
  except (OSError, ValueError, KeyError, TypeError):
    pass
  raise UserError(
    f"{folder} is there and not of this command (another run, flags or recording); name another "
    "--out, or remove it"
  )


def write_recording(
  folder: pathlib.Path, stacks: np.ndarray, labels: np.ndarray, spacing: list[float], about: dict
) -> dict:
  """Writes the hearts of a recording, stacks and labels uint8 [S, P, Z, H, W], whole or not at all;
  their mean and SD by name."""
  title = f"{len(stacks)} hearts drawn from one ECG"
  figure = drawings.montage(stacks, labels, title, MARK.upper())
  voxels = np.tile(np.float32(spacing), (len(labels), 1))
  values = measure(np.asarray(volumes(labels, voxels)))
  columns = [f"{name}_{unit}" for name, unit in zip(PHENOTYPES, UNITS)]
  hearts = []
  for row in values:
    known = [None if np.isnan(x) else float(x) for x in row]
    hearts.append(dict(zip(columns, known)))
  summary = summarised(columns, values)
  with files.atomic_folder(folder) as partial:
    for i, (stack, label) in enumerate(zip(stacks, labels), 1):
      save_nifti(partial / f"heart-{i}.nii.gz", stack, spacing)
      save_nifti(partial / f"heart-{i}-labels.nii.gz", label, spacing)
    figure.savefig(partial / "hearts.png", dpi=110, metadata={"Description": MARK})
    entry = about | {"spacing_mm": spacing, "summary": summary, "hearts": hearts}
    (partial / "hearts.json").write_text(json.dumps(entry, indent=1) + "\n")
  return summary


def summarised(columns: list[str], values: np.ndarray) -> dict[str, float | None]:
  """Mean and SD of each column of values [S, K] over the hearts that it is known of; None of none,
  and no SD of one."""
  means, deviations = {}, {}
  for column, x in zip(columns, values.T):
    known = x[np.isfinite(x)]
    means[column] = float(np.mean(known)) if len(known) else None
    deviations[f"{column}_sd"] = float(known.std(ddof=1)) if len(known) > 1 else None
  return means | deviations


def save_nifti(file: pathlib.Path, stack: np.ndarray, spacing: list[float]) -> None:
  """stack [P, Z, H, W] as [W, H, Z, P] with its voxel size in mm (spacing along Z, H, W)."""
  affine = np.diag([*spacing[::-1], 1.0])
  image = nibabel.Nifti1Image(stack.transpose(3, 2, 1, 0), affine)
  image.header["descrip"], image.header["intent_name"] = MARK.encode(), b"generated"
  image.header.set_xyzt_units("mm")
  nibabel.save(image, file)


def write_table(file: pathlib.Path, rows: list[dict]) -> None:
  columns = list(dict.fromkeys(name for row in rows for name in row))
  with files.atomic(file, newline="", encoding="utf-8") as table:
    writer = csv.DictWriter(table, columns)
    writer.writeheader()
    for row in rows:
      cells = {name: as_cell(x) if isinstance(x, str) else x for name, x in row.items()}
      writer.writerow(cells)


if __name__ == "__main__":
  from mmcl_jax import cli

  cli.run(main)
