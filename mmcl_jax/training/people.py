"""Whom a run has learned from: keyed hashes of people, kept in every checkpoint and handed on from
stage to stage.

    WORKDIR/checkpoints/STEP/people.npz     train/SALT, val/SALT: uint64 [N]; unknown: text [M]

Hashes are kept by the salt of their cohort, for those of different salts cannot be compared.
"""

import collections
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
  of_splits = {}
  for split, rows in cohort_lib.subjects(cohort).items():
    as_numbers = np.ascontiguousarray(rows).view(np.uint64)
    of_splits[split] = np.unique(as_numbers)
  return of_splits


def of_cohort(cohort, chooses: bool = False) -> People:
  """Whom a run on this cohort learns from; `chooses`: it picks its best step by val."""
  of_splits = hashes(cohort)
  salt = salt_of(cohort)
  train, val = {salt: of_splits["train"]}, {}
  if chooses:
    val[salt] = of_splits["val"]
  return People(train, val)


def of_run(workdir: str, step: int) -> People:
  """Whom a checkpoint has learned from, in all stages up to it."""
  about = checkpoint.manifest(workdir, step)
  file = checkpoint.step_folder(workdir, step) / checkpoint.PEOPLE
  if file.name not in about["files"]:
    return People({}, {}, (about["origin"],))
  try:
    arrays = files.arrays(file)
    unknown = tuple(map(str, arrays["unknown"]))
    by_role = {"train": {}, "val": {}}
    for name, x in arrays.items():
      role, slash, salt = name.partition("/")
      if slash and role in by_role:
        by_role[role][salt] = x.astype(np.uint64)
  except Exception as error:  # see `files.arrays`
    raise UserError(
      f"{file} is missing or damaged ({error}); {checkpoint.way_out(workdir, step)}"
    ) from None
  return People(by_role["train"], by_role["val"], unknown)


def together(*groups: People) -> People:
  """The people of several runs and cohorts, everyone once."""
  unknown = set()
  for group in groups:
    unknown.update(group.unknown)
  train = merged([group.train for group in groups])
  val = merged([group.val for group in groups])
  return People(train, val, tuple(sorted(unknown)))


def merged(by_salt: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """{salt: uint64 [N]}, of several such dicts."""
  lists = collections.defaultdict(list)
  for hashes_of in by_salt:
    for salt, numbers in hashes_of.items():
      lists[salt].append(numbers)
  return {salt: np.unique(np.concatenate(lists[salt])) for salt in sorted(lists)}


def as_arrays(people: People) -> dict[str, np.ndarray]:
  """What people.npz holds."""
  arrays = {"unknown": np.array(people.unknown, str)}
  for role, by_salt in (("train", people.train), ("val", people.val)):
    for salt, numbers in by_salt.items():
      arrays[f"{role}/{salt}"] = numbers
  return arrays


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
  of_splits = hashes(cohort)
  salt = salt_of(cohort)
  nobody = np.zeros(0, np.uint64)
  train = people.train.get(salt, nobody)
  val = people.val.get(salt, nobody)
  counts, shown = {}, []
  for split, others in (("test", np.concatenate([train, val])), ("val", train)):
    numbers = of_splits[split]
    counts[split] = int(np.isin(numbers, others).sum())
    if counts[split]:
      shown.append(f"{counts[split]} of {len(numbers)} {split} people")
  among = " and ".join(shown)
  if shown and not allowed:
    raise UserError(
      f"{among} of {cohort.path} {part}, so scores on them would be too good; use cohorts "
      f"prepared with the same --private and --split, or {to_go_on} to go on, as every report will "
      "say"
    )
  note = ""
  if shown:
    note = (
      f"{among} of the cohort had part in training: scores on them are too good, and intervals "
      "too narrow. "
    )
  if salt != SYNTHETIC and people.train.keys() - {salt, SYNTHETIC}:
    note += (
      "Not everybody in the cohort can be checked for a part in training: cohorts prepared with "
      "different salts (--private) cannot be compared. "
    )
  if people.unknown:
    note += f"It is not known whom {' and '.join(people.unknown)} learned from. "
  return counts | {"note": note.strip()}
