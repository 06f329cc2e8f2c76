"""Hearts drawn from ECG files, and their evaluation, by a run of two steps: what is written,
resumed, refused."""

import json
import re

import matplotlib.image
import nibabel
import numpy as np
import pytest
import wfdb

from common import ROOT, only_evaluators
from mistakes import error_of
from mmcl_jax import configuration, evaluate, train
from mmcl_jax.data import measure, schema
from mmcl_jax.errors import UserError
from mmcl_jax.projects.generation import evaluator as generation, generate

LEADS = ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]


@pytest.fixture(scope="module")
def stages(cohort, tmp_path_factory):
  """Workdirs of the stages up to a generator, each of two steps, and `told`, a masked generator
  that takes covariates too."""
  root, sources = (
    tmp_path_factory.mktemp("stages"),
    {"ecg": "ecg_mae", "tokenizer": "cmr_autoencoder", "segmenter": "cmr_segmenter"},
  )

  def trained(name, recipe, *more):
    argv = [
      f"--config={ROOT}/configs/{recipe}.py:test,steps=2",
      f"--workdir={root / name}",
      f"--config.data.cohort={cohort.path}",
      "--config.evaluators.losses.every=0",
      "--config.evaluators.probes.every=0",
      *more,
    ]
    train.train(
      configuration.from_flags("mmcl train", train.USAGE, argv, {"workdir": ""})[0],
      str(root / name),
    )

  for recipe in sources.values():
    trained(recipe, recipe)
  stages = [f"--config.init_from.{module}={root / recipe}" for module, recipe in sources.items()]
  trained("ecg_to_cmr", "ecg_to_cmr", *stages)
  trained(
    "told",
    "ecg_to_cmr",
    *stages,
    "--config.model.generator.covariates=True",
    "--config.model.generator.masked=True",
  )
  return root


@pytest.fixture(scope="module")
def recordings(cohort, tmp_path_factory):
  """Three ECG files and one that is none."""
  folder = tmp_path_factory.mktemp("ecg")
  for i in range(3):
    record = cohort.splits["test"][i]
    wfdb.wrsamp(
      f"r{i}",
      fs=500,
      units=["mV"] * 12,
      sig_name=LEADS,
      fmt=["16"] * 12,
      write_dir=str(folder),
      p_signal=(record["ecg"] * record["ecg_scale"]).T.astype(float),
    )
  (folder / "broken.hea").write_text("no header")
  return folder


def run(stages, recordings, out, *flags):
  generate.main(
    [
      f"--workdir={stages / 'ecg_to_cmr'}",
      f"--input={recordings}",
      f"--out={out}",
      "--samples=3",
      *flags,
    ]
  )


@pytest.fixture(scope="module")
def hearts(stages, recordings, tmp_path_factory):
  out = tmp_path_factory.mktemp("out") / "hearts"
  run(stages, recordings, out)
  return out


def test_every_recording_has_its_hearts_and_every_file_says_what_they_are(hearts, cohort):
  assert sorted(file.name for file in hearts.iterdir()) == ["hearts.csv", "r0", "r1", "r2"]
  spacing = cohort.splits["train"][0]["spacing"]
  for name in ("r0", "r1", "r2"):
    files = {f"heart-{i}{kind}.nii.gz" for i in (1, 2, 3) for kind in ("", "-labels")} | {
      "hearts.png",
      "hearts.json",
    }
    assert {file.name for file in (hearts / name).iterdir()} == files
    for file in (hearts / name).glob("*.nii.gz"):
      image = nibabel.load(file)
      assert bytes(
        image.header["descrip"].item()
      ) == b"generated, not measured" and image.shape == (64, 64, 12, 2)
      np.testing.assert_allclose(image.header.get_zooms()[:3], spacing[::-1], rtol=1e-5)
    said = json.loads((hearts / name / "hearts.json").read_text())
    assert said["mark"] == "generated, not measured"
    assert matplotlib.image.imread(hearts / name / "hearts.png").std() > 0.1


def test_what_a_heart_measures_is_what_its_label_file_holds(hearts):
  said = json.loads((hearts / "r1" / "hearts.json").read_text())
  values = []
  for i, heart in enumerate(said["hearts"], 1):
    labels = np.asarray(nibabel.load(hearts / "r1" / f"heart-{i}-labels.nii.gz").dataobj).transpose(
      3, 2, 1, 0
    )
    expected = measure.phenotypes(labels, np.array(said["spacing_mm"]), np.nan)
    for name in generation.PHENOTYPES:
      value = heart[f"{name}_{schema.PHENOTYPES[name]}"]
      assert (
        np.isnan(expected[name])
        if value is None
        else value == pytest.approx(expected[name], rel=1e-4)
      )
    values.append(np.nan if heart["LVM_g"] is None else heart["LVM_g"])
  if np.isfinite(values).sum() > 1:
    assert said["summary"]["LVM_g"] == pytest.approx(np.nanmean(values))
    assert said["summary"]["LVM_g_sd"] == pytest.approx(np.nanstd(values, ddof=1))


def test_the_table_has_a_line_for_each_and_tells_why_one_is_missing(hearts):
  head, *rows = [line.split(",") for line in (hearts / "hearts.csv").read_text().splitlines()]
  assert (
    head[:3] == ["path", "status", "reason"]
    and {"LVM_g", "LVM_g_sd", "LVEF_%"} <= set(head)
    and len(rows) == 4
  )
  assert sorted(row[1] for row in rows) == ["ok", "ok", "ok", "rejected"]


def test_the_same_command_goes_on_and_draws_the_same(stages, recordings, hearts, tmp_path, capsys):
  """Alone, in another order, beside others: a heart hangs on its recording and the seed."""
  alone = tmp_path / "alone"
  generate.main(
    [
      f"--workdir={stages / 'ecg_to_cmr'}",
      f"--input={recordings / 'r2.hea'}",
      f"--out={alone}",
      "--samples=3",
    ]
  )
  one, other = (
    np.asarray(nibabel.load(folder / "r2" / "heart-2.nii.gz").dataobj) for folder in (alone, hearts)
  )
  assert np.array_equal(one, other)
  before = (alone / "r2" / "hearts.json").stat().st_mtime_ns
  run(stages, recordings, alone)
  assert (
    "1 of 4 recordings are in" in capsys.readouterr().out
    and (alone / "r2" / "hearts.json").stat().st_mtime_ns == before
  )
  assert (alone / "hearts.csv").read_text() == (hearts / "hearts.csv").read_text()


def test_another_run_s_hearts_are_left_alone(stages, recordings, hearts):
  for flags in (["--seed=1"], ["--guidance=2"], ["--samples=2"]):
    with pytest.raises(UserError, match="r0 is there and not of this command"):
      run(stages, recordings, hearts, *flags)


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--samples=0"], "--samples is 0"),
    (["--seed=-1"], "--seed -1"),
    (["--guidance=-1"], "--guidance -1"),
    (["--guidance=nan"], "--guidance nan"),
    (
      ["--workdir={stages}/ecg_mae"],
      "ecg_mae has no tokenizer and no segmenter and no generator; expected a run of the recipe "
      "ecg_to_cmr",
    ),
    (["--workdir={stages}/cmr_autoencoder"], "has no ECG encoder"),
    (["--input={nowhere}"], "none of the 1 recordings could be read"),
  ],
)
def test_mistakes_are_one_line(stages, recordings, tmp_path, capsys, flags, words):
  flags = [flag.format(stages=stages, nowhere=tmp_path / "nowhere") for flag in flags]
  given = [
    f"--workdir={stages / 'ecg_to_cmr'}",
    f"--input={recordings}",
    f"--out={tmp_path / 'o'}",
  ]
  assert re.search(words, error_of(generate.main, [*given, *flags], capsys, beside=True))


def test_names_of_folders_are_told_apart():
  assert list(generate.named(["a/x.hea", "b/x.hea", "c/x 1.xml", "d/.hea"])) == [
    "x",
    "x-2",
    "x_1",
    "ecg",
  ]


def test_a_generator_that_takes_covariates_draws_without(stages, recordings, tmp_path):
  generate.main(
    [
      f"--workdir={stages / 'told'}",
      f"--input={recordings / 'r2.hea'}",
      f"--out={tmp_path}",
      "--samples=2",
      "--guidance=1.5",
    ]
  )
  hearts = [np.asarray(nibabel.load(tmp_path / "r2" / f"heart-{i}.nii.gz").dataobj) for i in (1, 2)]
  assert hearts[0].std() > 1 and (hearts[0] != hearts[1]).any()


@pytest.mark.parametrize("which, given", [("ecg_to_cmr", "ECG"), ("told", "ECG and covariates")])
def test_evaluation_judges_draws_beside_what_else_one_could_show(stages, monkeypatch, which, given):
  for name, value in dict(SUBJECTS=6, SAMPLES=4, ENSEMBLE=3, STEPS=2).items():
    monkeypatch.setattr(generation, name, value)
  only_evaluators(monkeypatch, "phenotypes", "generation")
  found = evaluate.evaluate(str(stages / which))["generation"]
  everything = {
    "drawn",
    "another_ecg",
    "without_ecg",
    "train",
    "covariates",
    "ecg_neighbours",
    "mean_heart",
    "rebuilt",
    "real",
  }
  assert set(found["phenotypes"]) == everything and set(found["images"]) == everything - {"train"}
  assert all(
    np.isfinite(score["crps"])
    for scores in found["phenotypes"].values()
    for score in scores.values()
  )
  assert set(found["differences"]) == set(generation.AGAINST)
  drawn, train = (found["phenotypes"][what]["LVM"] for what in ("drawn", "train"))
  assert found["differences"]["train"]["LVM"]["value"] == pytest.approx(
    drawn["crps"] - train["crps"]
  )
  assert (
    0 <= found["unmeasured"]["drawn"] <= 1
    and found["unmeasured"]["train"] == 0
    and found["memorisation"]["nearest_real"] > 0
  )
  page = (stages / which / "evaluation/2/report.html").read_text()
  assert (
    "Generated, not measured" in page
    and f"drawn from another&#39;s {given}<" in page
    and f"drawn without {given}<" in page
  )


def test_evaluation_says_why_no_hearts_are_drawn(stages, monkeypatch, capsys):
  only_evaluators(monkeypatch, "generation", "data")
  monkeypatch.setattr(generation, "PHENOTYPES", ("LVM", "nope"))
  assert (
    "generation" not in evaluate.evaluate(str(stages / "told"))
    and "the cohort has no nope" in capsys.readouterr().out
  )
  with pytest.raises(UserError, match="has no encoder of an ECG or a CMR, only a segmenter"):
    evaluate.evaluate(str(stages / "cmr_segmenter"))
