"""The cohorts of a run: opened, checked against the config and each other, and read as training
reads them."""

import contextlib

import jax
import numpy as np

from mmcl_jax import augment, evaluators, models
from mmcl_jax.data import cohort as cohort_lib, pipeline
from mmcl_jax.errors import DamagedRecord, UserError
from mmcl_jax.training import checkpoint, people

ALLOW = "--config.data.allow_seen=True"
# records of train that labels are looked for in, and spacing is averaged over
FIRST = 200


def load_mix(mix) -> list[tuple[cohort_lib.Cohort, float]]:
  """The cohorts of config.data.mix with their shares."""
  pairs = mix if isinstance(mix, (tuple, list)) else [mix]
  for pair in pairs:
    if not (
      isinstance(pair, (tuple, list))
      and len(pair) == 2
      and isinstance(pair[0], str)
      and isinstance(pair[1], (int, float))
    ):
      raise UserError(
        f"config.data.mix is {mix!r}; expected pairs of a cohort and its share, such as "
        "(('ptbxl', 0.3),)"
      )
  return [(cohort_lib.load(path), share) for path, share in pairs]


# -- Checks --


def check(cohort, others, config) -> None:
  """The cohorts must have been prepared the way the config says, and alike."""
  check_alike(cohort, cohort, config)
  for other, _ in others:
    check_alike(other, cohort, config)
  check_images(cohort, others, config)
  models.check(config.model, cohort.info["shapes"])
  check_covariates(cohort, config)
  check_augmentation(config)
  check_labels(cohort, config)
  check_splits(cohort, others, config)
  shares = [share for _, share in others]
  if sum(shares) >= 1:
    raise UserError(f"config.data.mix has the shares {shares}; expected less than 1 together")
  watching = evaluators.in_training(config)
  if watching and not cohort.splits["val"]:
    raise UserError(
      f"the cohort {cohort.path} has no val split; prepare it with one or set "
      f"config.evaluators.NAME.every=0 for {', '.join(evaluator.name for evaluator in watching)}"
    )
  length = cohort.info["shapes"]["ecg"][1]
  if "ecg" in config.model.towers and not 0 < config.data.samples <= length:
    raise UserError(
      f"config.data.samples is {config.data.samples}; the cohort's recordings have {length} samples"
    )


def check_alike(one, first, config) -> None:
  """A cohort against the config, and against the first one: ECGs, units, something to train on."""
  profile = one.info["ecg_profile"]
  reads_ecg = "ecg" in config.model.towers
  if reads_ecg and profile != config.data.ecg_profile:
    raise UserError(
      f"the cohort {one.path} was normalised by profile {profile!r}, config.data.ecg_profile is "
      f"{config.data.ecg_profile!r}; set it to {profile!r} or prepare the cohort again"
    )
  if one.info["shapes"]["ecg"] != first.info["shapes"]["ecg"]:
    raise UserError(
      f"the cohort {one.path} has ECG of shape {one.info['shapes']['ecg']}, {first.path} of "
      f"{first.info['shapes']['ecg']}; expected the same"
    )
  if not one.splits["train"]:
    raise UserError(
      f"the cohort {one.path} has no train split; prepare it with a --split whose first share is "
      "not 0"
    )
  if reads_ecg and not one.info["with_ecg"]["train"]:
    raise UserError(f"the cohort {one.path} has no ECG to train on; prepare it with ECG")
  units = first.info["phenotypes"]
  differing = [
    name for name, unit in one.info["phenotypes"].items() if units.get(name, unit) != unit
  ]
  if differing:
    raise UserError(
      f"{', '.join(differing)} of {one.path} and {first.path} have different units; prepare them "
      "alike"
    )


def check_images(cohort, others, config) -> None:
  """The images that the CMR towers look at: there, and of one shape in all cohorts."""
  fields = models.fields(config.model)
  shapes = cohort.info["shapes"]
  for other, _ in others:
    theirs = other.info["shapes"]
    differing = [name for name in fields if name in theirs and theirs[name] != shapes.get(name)]
    if differing:
      raise UserError(
        f"{', '.join(differing)} of {other.path} and {cohort.path} differ in shape; prepare them "
        "with the same --slices, --size and --frames"
      )
  if fields and not cohort.info["with_cmr"]["train"]:
    raise UserError(
      f"the cohort {cohort.path} has no CMR to train on; take a recipe without CMR towers "
      "(joint:demo,arm=mae) or a cohort of pairs, into which this one is mixed by "
      "config.data.mix"
    )
  absent = [name for name in fields if name not in shapes]
  if absent:
    raise UserError(
      f"the cohort {cohort.path} has no {', '.join(absent)} for config.model.towers; it has "
      f"{', '.join(shapes)}"
    )


def check_covariates(cohort, config) -> None:
  taking = models.takes_covariates(config.model)
  if taking and not np.isfinite(cohort_lib.train_statistics(cohort, "covariates")).any():
    raise UserError(
      f"config.model.{taking[0]}=True asks for covariates, and {cohort.path} knows none that "
      "differ "
      "in train; prepare it with --tables that hold them, or set "
      f"config.model.{taking[0]}=False"
    )


def check_augmentation(config) -> None:
  """No augmentation of images that are looked at once, or that have labels."""
  entry = config.augment.cmr
  if augment.is_neutral("cmr", entry):
    return
  if models.frozen(config.model):
    raise UserError(
      f"config.augment.cmr is {entry.to_dict()}, and frozen towers look at every heart once, "
      "as it is; take fn='standard' with all of it 0"
    )
  if "labels" in models.fields(config.model):
    raise UserError(
      f"config.augment.cmr is {entry.to_dict()}, and labels, which the model learns from, "
      "would not follow; take fn='standard' with all of it 0"
    )


def check_labels(cohort, config) -> None:
  reads_labels = "labels" in models.fields(config.model)
  if reads_labels and not any(record["labels"].any() for record in first(cohort)):
    raise UserError(
      f"the first hearts of {cohort.path} have no labels, which the model learns from; prepare it "
      "with segmentations (`mmcl prepare --segmentations`)"
    )


def check_splits(cohort, others, config) -> None:
  """Nobody who is held out in the first cohort may come back to train through another one."""
  for other, _ in others:
    same_source = other.info["source"] == cohort.info["source"]
    same_salt = other.info.get("salt_tag") == cohort.info.get("salt_tag")
    if same_source and not same_salt and not config.data.allow_seen:
      raise UserError(
        f"{other.path} and {cohort.path} are both of {cohort.info['source']} and were prepared "
        "with "
        "different salts, so people held out in one may train in the other unseen; prepare both "
        f"with the same --private, or {ALLOW} to go on"
      )
    part = f"are in the train split of {other.path}"
    check_held_out(cohort, people.of_cohort(other), part, config)


# -- Whom a run learns from --


def stages_of(config, workdir: str, start: int) -> dict[str, str]:
  """{module: name of the run that it starts from, or, at step `start`, started from}; UserError if
  that changed."""
  runs = {}
  for module, stage in config.init_from.items():
    if stage:
      runs[module] = checkpoint.run_name(stage)
  if not start:
    return runs
  kept = checkpoint.manifest(workdir, start)["stages"]
  for module, run in runs.items():
    if run and run != kept.get(module, run):  # no run: it is gone by now
      raise UserError(
        f"config.init_from.{module} is {config.init_from[module]}, and {workdir} started from "
        "another run; give that one, wherever it lies, or take another --workdir"
      )
  return kept


def people_of(cohort, others, config, workdir: str, start: int) -> people.People:
  """Whom this run and the stages before it learn from; none of them may be held out in its
  cohort."""
  earlier = []
  if start:
    earlier.append(people.of_run(workdir, start))
  else:
    for stage in dict.fromkeys(filter(None, config.init_from.values())):
      step = checkpoint.chosen(stage)
      if step is not None:  # else initialise.load_pretrained has a word on it
        earlier.append(people.of_run(stage, step))
        part = f"had part in the training of {stage} (config.init_from)"
        check_held_out(cohort, earlier[-1], part, config)
  own = people.of_cohort(cohort, chooses=config.stop_after > 0)
  return people.together(*earlier, own, *(people.of_cohort(other) for other, _ in others))


def check_held_out(cohort, learned_from: people.People, part: str, config) -> None:
  note = people.held_out(cohort, learned_from, part, config.data.allow_seen, ALLOW)["note"]
  if note and jax.process_index() == 0:
    print(note, flush=True)


# -- Records --


def tolerant(cohort: cohort_lib.Cohort, config) -> cohort_lib.Cohort:
  """Its records as training reads them: bad ones count as rows without anything
  (config.bad_rows)."""
  reads = models.fields(config.model)
  if "ecg" in config.model.towers:
    reads = ("ecg", *reads)
  splits = {}
  for split, source in cohort.splits.items():
    if len(source):
      source = pipeline.SkipBadRecords(source, f"{split} in {cohort.path}", tuple(reads))
    splits[split] = source
  return cohort._replace(splits=splits)


def mixed(cohort, others, config, records) -> list[pipeline.Mixed]:
  """The other cohorts' records in the form of the first one's; `records(cohort, split)` reads
  them."""
  fields = models.fields(config.model)
  sources = []
  for other, share in others:
    has_all = all(name in other.info["shapes"] for name in fields)
    source = records(other, "train") if has_all else other.splits["train"]
    example = records(cohort, "train")[0]
    conform = pipeline.conforming(other.info, cohort.info, example, fields)
    sources.append(pipeline.Mixed(source, share, conform))
  return sources


def first(cohort, most: int = FIRST):
  """The first records of train with CMR; those that cannot be read are for training to judge."""
  source, count = cohort.splits["train"], 0
  for i in range(len(source)):
    with contextlib.suppress(DamagedRecord):
      record = source[i]
      if record["has_cmr"]:
        yield record
        count += 1
    if count == most:
      return


def mean_spacing(cohort) -> list[float]:
  """mm between voxels along Z, H, W, the mean of the first hearts of train."""
  spacings = [record["spacing"] for record in first(cohort)]
  return np.mean(spacings, axis=0, dtype=np.float64).tolist()
