"""Whom a run has learned from: keyed hashes of people, kept in every checkpoint and handed on from
stage to stage.

    WORKDIR/checkpoints/STEP/people.npz     train/SALT, val/SALT: uint64 [N]; unknown: text [M]

Hashes are kept by the salt of their cohort, for those of different salts cannot be compared.
"""

from typing import NamedTuple

import numpy as np

from mmcl_jax.data import cohort as cohort_lib
from mmcl_jax.errors import UserError
from mmcl_jax.support import files
from mmcl_jax.training import checkpoint

SYNTHETIC = "synthetic"  # in place of a salt: these hearts are nobody's


class People(NamedTuple):
  """Hashes are uint64 [N], sorted.

  train: salt -> hashes of those whose records gave gradients; val: of those by whom training chose
  its best step (config.stop_after); unknown: weights and runs that do not say whom they learned
  from.
  """

  train: dict[str, np.ndarray]
  val: dict[str, np.ndarray]
  unknown: tuple[str, ...] = ()


def salt_of(cohort) -> str:
  return (
    SYNTHETIC
    if cohort.info.get("synthetic")
    else cohort.info.get("salt_tag") or cohort.info["source"]
  )


def hashes(cohort) -> dict[str, np.ndarray]:
  """{split: uint64 [N]}, every person once."""
  return {
    split: np.unique(np.ascontiguousarray(rows).view(np.uint64))
    for split, rows in cohort_lib.subjects(cohort).items()
  }


def of_cohort(cohort, chooses: bool = False) -> People:
  """Whom a run on this cohort learns from; `chooses`: it picks its best step by val."""
  found, salt = hashes(cohort), salt_of(cohort)
  return People({salt: found["train"]}, {salt: found["val"]} if chooses else {})


def of_run(workdir: str, step: int) -> People:
  """Whom a checkpoint has learned from, in all stages up to it."""
  about, file = (
    checkpoint.manifest(workdir, step),
    checkpoint.step_folder(workdir, step) / checkpoint.PEOPLE,
  )
  if file.name not in about["files"]:
    return People({}, {}, (about["origin"],))
  try:
    arrays = files.arrays(file)
    unknown = tuple(map(str, arrays["unknown"]))
    kept = [
      {
        name.removeprefix(role): x.astype(np.uint64)
        for name, x in arrays.items()
        if name.startswith(role)
      }
      for role in ("train/", "val/")
    ]
  except Exception as error:  # see `files.arrays`
    raise UserError(
      f"{file} is missing or damaged ({error}); {checkpoint.way_out(workdir, step)}"
    ) from None
  return People(*kept, unknown)


def together(*all_of_them: People) -> People:
  def merged(role):
    kept = [getattr(one, role) for one in all_of_them]
    salts = sorted(set().union(*kept))
    return {
      salt: np.unique(np.concatenate([one[salt] for one in kept if salt in one])) for salt in salts
    }

  return People(
    merged("train"),
    merged("val"),
    tuple(sorted({name for one in all_of_them for name in one.unknown})),
  )


def as_arrays(people: People) -> dict[str, np.ndarray]:
  """What people.npz holds."""
  kept = {
    f"{role}/{salt}": found
    for role in ("train", "val")
    for salt, found in getattr(people, role).items()
  }
  return kept | {"unknown": np.array(people.unknown, str)}


def held_out(cohort, people: People, part: str, allowed: bool, to_go_on: str) -> dict:
  """How many people who are held out in `cohort` are among `people`.

  Of the test split, all of `people` count; of val, by which something is chosen anew, those of
  train do.

  Args:
    part: what `people` did, such as "had part in the training of W".
    allowed: whether to go on if there are some, which must then be said wherever scores are.
    to_go_on: the flag that allows it.

  Returns:
    test, val: counts; note: a sentence on the two, and on what cannot be told; "" where nobody is
      among them.

  Raises:
    UserError: some are, and that is not allowed.
  """
  mine, salt, counts, parts = hashes(cohort), salt_of(cohort), {}, []
  nobody = np.zeros(0, np.uint64)
  for split, roles in (("test", ("train", "val")), ("val", ("train",))):
    known = np.concatenate([getattr(people, role).get(salt, nobody) for role in roles])
    counts[split] = int(np.isin(mine[split], known).sum())
    if counts[split]:
      parts.append(f"{counts[split]} of {len(mine[split])} {split} people")
  if parts and not allowed:
    raise UserError(
      f"{' and '.join(parts)} of {cohort.path} {part}, so scores on them would be too good; use "
      "cohorts "
      f"prepared with the same --private and --split, or {to_go_on} to go on, as every report will "
      "say"
    )
  note = ""
  if parts:
    note = (
      f"{' and '.join(parts)} of the cohort had part in training: scores on them are too good, and "
      "intervals too "
      "narrow. "
    )
  if salt != SYNTHETIC and people.train.keys() - {salt, SYNTHETIC}:
    note += (
      "Not everybody in the cohort can be checked for a part in training: cohorts prepared with "
      "different salts "
      "(--private) cannot be compared. "
    )
  if people.unknown:
    note += f"It is not known whom {' and '.join(people.unknown)} learned from. "
  return counts | {"note": note.strip()}
