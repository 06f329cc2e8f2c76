"""From a workdir and a cohort to the context of `mmcl evaluate`."""

import os
import pathlib

from mmcl_jax import configuration, models
from mmcl_jax.data import cohort as cohort_lib, schema
from mmcl_jax.errors import UserError
from mmcl_jax.evaluators.context import Context
from mmcl_jax.support.text import SYNTHETIC_NOTE
from mmcl_jax.training import checkpoint, distributed, people, restore


def of_checkpoint(
  workdir: str, step: int | None, cohort_path: str | None, batch: int, allow_seen: bool
) -> Context:
  """Restores a checkpoint (None: see restore.choose) to be scored on test of a cohort (None: its
  own).

  Raises:
    UserError: the cohort does not fit the run, lacks what evaluation needs, or holds out people
      that the run has learned from.
  """
  step = restore.choose(workdir, step)
  cohort = cohort_lib.load(cohort_path) if cohort_path else own_cohort(workdir, step)
  distributed.check_same(
    {
      "--workdir": os.path.abspath(workdir),
      "the checkpoint": step,
      "--batch": batch,
      "the fingerprint of the cohort": cohort.fingerprint,
      "the content of its files": cohort.content,
    }
  )
  seen = people.held_out(
    cohort,
    people.of_run(workdir, step),
    f"had part in the training of {workdir}",
    allow_seen,
    "--allow_seen",
  )
  run = restore.load_run(workdir, step)
  distributed.check_mesh(run.mesh)
  check(run, cohort, workdir)
  note = SYNTHETIC_NOTE if cohort.info.get("synthetic") else ""
  return Context(run, cohort, "test", workdir, batch, note, seen)


def check(run, cohort, workdir: str) -> None:
  """Raises a UserError where the cohort cannot be scored by this run."""
  model = run.config.model
  if not model.towers:
    modules = [name for name in models.find(model).PARTS if model.get(name)]
    raise UserError(
      f"{workdir} has no encoder of an ECG or a CMR, only a {' and a '.join(modules)}; evaluate a "
      "run that starts from it and has one"
    )
  # a run without an ECG tower is evaluated by its CMR embedding
  reads = "ECG" if "ecg" in model.towers else "CMR"
  info = cohort.info
  fields = models.fields(model)
  if reads == "ECG" and info["ecg_profile"] != run.config.data.ecg_profile:
    raise UserError(
      f"the cohort {cohort.path} was normalised by profile {info['ecg_profile']!r}, the encoder "
      f"was trained on {run.config.data.ecg_profile!r}; prepare the cohort with "
      f"--profile={run.config.data.ecg_profile}"
    )
  lacking = []
  for split in schema.SPLITS:
    if not info[f"with_{reads.lower()}"][split]:
      lacking.append(f"{reads} in {split}")
  if not info["phenotypes"] and not info["diseases"]:
    lacking.append("phenotypes and no diseases")
  if reads == "CMR":
    lacking += [field for field in fields if field not in info["shapes"]]
  if lacking:
    raise UserError(
      f"the cohort {cohort.path} has no {', no '.join(lacking)}; evaluation fits on train, chooses "
      "on val and scores phenotypes and diseases on test: name another one with --cohort"
    )
  if model.towers.get("ecg", {}).get("film"):
    check_covariates(run, cohort, workdir)
  if fields and all(name in info["shapes"] for name in fields):
    models.check(model, info["shapes"])


def check_covariates(run, cohort, workdir: str) -> None:
  if not run.standardiser.covariates:
    raise UserError(
      f"the encoder takes covariates, whose names and scales {workdir}, converted weights, does "
      "not tell; start a stage from it with config.init_from.ecg, and evaluate that"
    )
  if tuple(cohort.info["covariates"]) != run.standardiser.covariates:
    raise UserError(
      f"the encoder takes the covariates {', '.join(run.standardiser.covariates)}, the cohort "
      f"{cohort.path} has {', '.join(cohort.info['covariates']) or 'none'}; evaluate on a cohort "
      "with the same ones"
    )


def own_cohort(workdir: str, step: int) -> cohort_lib.Cohort:
  """The cohort that a step was trained on, by its fingerprint: where the config has it, or where it
  lay in training."""
  manifest = checkpoint.manifest(workdir, step)
  if not manifest["cohort"]:
    raise UserError(
      f"the weights of {workdir} come from elsewhere and have no cohort of their own; name the one "
      "to evaluate on with --cohort=DIR"
    )
  places = []
  for place in (configuration.load(workdir).data.cohort, manifest.get("cohort_path")):
    if place and place not in places:
      places.append(place)
  cohorts = []
  for place in places:
    if (pathlib.Path(place) / "cohort.json").is_file():
      cohorts.append(cohort_lib.load(place))
  for cohort in cohorts:
    if cohort.fingerprint == manifest["cohort"]:
      return cohort
  if cohorts:
    raise UserError(
      f"{cohorts[0].path} is no longer the cohort that step {step} was trained on; name the one to "
      "evaluate on with --cohort=DIR"
    )
  raise UserError(
    f"no cohort at {' or '.join(map(repr, places))}, where {workdir} was trained; name the folder "
    "in which it is now with --cohort=DIR"
  )
