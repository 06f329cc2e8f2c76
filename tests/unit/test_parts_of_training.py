"""Augmentations and metric writers by name: what is built, and what is refused in one line."""

import pytest
from ml_collections import ConfigDict

from mmcl_jax import augment, configuration
from mmcl_jax.errors import UserError
from mmcl_jax.training import metrics


def no_augmentation(ecg, key):
  """Takes its arguments in another order."""


class Deaf:
  def __init__(self, workdir, start_step):
    pass


class Kept:
  """A writer that keeps what it is given."""

  def __init__(self, workdir, start_step, unit=1.0):
    self.place, self.unit, self.rows = (workdir, start_step), unit, []

  def write_scalars(self, step, scalars):
    self.rows.append((step, scalars["loss"] / self.unit))

  def flush(self):
    self.rows.append("flush")

  def close(self):
    self.rows.append("close")


@pytest.mark.parametrize(
  "entry, words",
  [
    (dict(fn="cmr"), "augment.ecg.fn is 'cmr'; expected one of standard, or 'package.module:f"),
    (dict(jitter_sigma=0.1), r"augment.ecg has the keys \['jitter_sigma'\]; expected fn and its"),
    (dict(fn="standard", jitter=0.1), "sets jitter, which standard does not take; .*jitter_sigma"),
    (dict(fn="standard"), "does not set phase_noise_strength, jitter_sigma, rescale_sigma, which"),
    (dict(fn="os:system"), "is 'os:system', whose first parameter is not `key`; expected an aug"),
    (
      dict(fn="test_parts_of_training:no_augmentation"),
      r"whose first parameter is not `key`; .*\(key, ecg, samples, \*\*parameters\)",
    ),
    (dict(fn="nowhere:f"), "cannot be imported .*PYTHONPATH"),
  ],
)
def test_augmentations_that_there_are_not_are_one_line(entry, words):
  with pytest.raises(UserError, match=words) as error:
    augment.build("ecg", ConfigDict(entry))
  assert "\n" not in str(error.value)


def test_an_augmentation_is_neutral_where_it_changes_nothing():
  entry = configuration.defaults(8, 6).augment.cmr
  assert augment.is_neutral("cmr", entry)
  entry.shift = 0.1
  assert not augment.is_neutral("cmr", entry)
  assert not augment.is_neutral("cmr", ConfigDict(dict(fn="mine:f", strength=0.0)))


@pytest.mark.parametrize(
  "entry, words",
  [
    (dict(fn="wandb"), "writers.mine.fn is 'wandb'; expected one of jsonl, tensorboard, or 'pack"),
    (dict(unit=2), r"writers.mine has the keys \['unit'\]; expected fn and its parameters"),
    (dict(fn="jsonl", unit=2), "writers.mine sets unit, which jsonl does not take; .* none"),
    (
      dict(fn="test_parts_of_training:Deaf"),
      "has no write_scalars, flush, close; expected a class with write_scalars, flush, close",
    ),
  ],
)
def test_writers_that_there_are_not_are_one_line(entry, words):
  with pytest.raises(UserError, match=words):
    metrics.find(ConfigDict({"mine": entry}))


def test_a_writer_of_one_s_own_gets_what_the_others_get(tmp_path):
  entries = configuration.defaults(8, 6).writers
  entries.mine = dict(fn="test_parts_of_training:Kept", unit=2.0)
  writer = metrics.create_writer(entries, str(tmp_path), 4, just_logging=False)
  writer.write_scalars(5, {"loss": 3.0})
  writer.flush()
  writer.close()
  (mine,) = (one for one in writer.writers if hasattr(one, "rows"))
  assert mine.place == (str(tmp_path), 4) and mine.rows == [(5, 1.5), "flush", "close"]
  assert metrics.read(tmp_path / "metrics.jsonl") == [{"step": 5, "loss": 3.0}]
  assert metrics.create_writer(entries, str(tmp_path), 4, just_logging=True).writers == []
