"""Where cohorts come from. A source lists what there is (`plan`) and reads one record at a time
(`Plan.read`).

    plan(options, identify) -> Plan

`options` has the flags of `mmcl prepare SOURCE`; `identify(participant) -> uint32 [2]` is the
user's salted hash. A source of one's own is such a function in any module, named `my_module:plan`
on the command line (docs/extending.md).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mmcl_jax.data import schema


class Item(NamedTuple):
  """One record to be made, that is one visit of one participant."""

  subject: np.ndarray  # uint32 [2], identify(participant)
  visit: int  # such as UK Biobank's instance; 0 where there are no visits
  key: Any  # what `Plan.read` needs: paths, a row of a table; picklable
  # texts that identify the person (participant id, file names): cut out of every reason
  private: tuple[str, ...] = ()

  @property
  def salted_id(self) -> str:
    return schema.salted_id(self.subject, self.visit)


def by_hash(item: Item) -> tuple[int, int, int]:
  """Sorts items by hash and visit: an order that says nothing of participants."""
  low, high = item.subject.tolist()
  return high, low, item.visit


class Plan(NamedTuple):
  """All that is known before the first file is read."""

  items: list[Item]
  read: Callable[[Item], tuple[dict[str, np.ndarray], tuple[str, ...]]]
  """Item -> (record as in mmcl_jax.data.schema but for subject and visit, remarks on quality);
  BadRecord where it cannot. Picklable: it runs in other processes."""
  # for cohort.json: phenotypes (name -> unit), diseases, covariates, source, ...
  info: dict[str, Any]
  # counts of each step so far, in order: "ECG files", "with a CMR of the same visit", ...
  steps: dict[str, int]
  # known before reading: withdrawn, duplicated, without a partner
  rejected: list[tuple[Item, str]] = []
  # where the source gives the splits; otherwise drawn by subject
  split: Callable[[Item], str] | None = None
