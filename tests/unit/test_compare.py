"""`mmcl compare` on made-up evaluations, against scikit-learn and what can be told by hand."""

import json
import shutil

import numpy as np
import pytest
from sklearn.metrics import r2_score, roc_auc_score

from mmcl_jax import compare
from mmcl_jax.errors import UserError
from mmcl_jax.evaluators import statistics

N = 300


@pytest.fixture
def runs(tmp_path):
  """Three workdirs: `good` predicts LVEDV well and LVEF not at all, `same` is as good, `poor`
  predicts neither."""
  rng = np.random.default_rng(0)
  y, sick = rng.normal(size=(N, 2)), (rng.random((N, 2)) < (0.3, 0.01)).astype(float)
  y[:20, 0], sick[:10, 0] = np.nan, np.nan
  good = np.nan_to_num(y) * (1, 0) + 0.5 * rng.normal(size=(N, 2))
  signal = {
    "good": good,
    "same": good + 1e-3 * rng.normal(size=(N, 2)),
    "poor": rng.normal(size=(N, 2)),
  }
  for name, x in signal.items():
    write(
      tmp_path / name / "evaluation/10",
      y,
      sick,
      x,
      np.nan_to_num(sick) + rng.normal(size=(N, 2)) * (0.5 if name != "poor" else 9),
    )
  return tmp_path


def write(folder, y, sick, predicted, risk, fingerprint="f", **more):
  folder.mkdir(parents=True)
  illness = {"HF": {"cases": 90, "n": 290, "auroc": 0.5}, "CM": {"cases": 3, "n": 300}}
  (folder / "results.json").write_text(
    json.dumps(
      {
        "note": "made up",
        "cohort": "/cohort",
        "cohort_fingerprint": fingerprint,
        "phenotypes": {"LVEDV": {}, "LVEF": {}},
        "diseases": {"embedding": illness},
        **more,
      }
    )
  )
  subject = np.stack([np.arange(N) // 2, np.zeros(N)], axis=1).astype(np.uint32)
  np.savez(
    folder / "predictions.npz",
    subject=subject,
    y_true=y,
    disease_y_true=sick,
    embedding=predicted,
    disease_embedding=risk,
    covariates=np.zeros_like(y),
  )


def test_scores_are_sklearn_s_and_only_what_differs_stands(runs):
  text = compare.compare([str(runs / name) for name in ("good", "same", "poor")], str(runs / "out"))
  found = json.loads((runs / "out/results.json").read_text())
  stored = {
    name: np.load(runs / name / "evaluation/10/predictions.npz")
    for name in ("good", "same", "poor")
  }
  y, sick = stored["good"]["y_true"], stored["good"]["disease_y_true"][:, 0]
  known = [np.isfinite(y[:, 0]), np.isfinite(y[:, 1])]
  for name, x in stored.items():
    for k, phenotype in enumerate(("LVEDV", "LVEF")):
      score = r2_score(y[known[k], k], x["embedding"][known[k], k])
      assert found["r2"][name][phenotype]["value"] == pytest.approx(score, abs=1e-12)
    ill = roc_auc_score(sick[10:], x["disease_embedding"][10:, 0])
    assert found["auroc"][name] == {"HF": found["auroc"][name]["HF"]}  # CM has too few cases
    assert found["auroc"][name]["HF"]["value"] == pytest.approx(ill, abs=1e-12)
  gap = {
    run: {one["name"]: one for one in rows} for run, rows in found["differences"]["r2"].items()
  }
  assert gap["poor"]["LVEDV"]["value"] == pytest.approx(
    found["r2"]["poor"]["LVEDV"]["value"] - found["r2"]["good"]["LVEDV"]["value"]
  )
  assert gap["poor"]["LVEDV"]["stands"] and not gap["same"]["LVEDV"]["stands"]
  assert found["differences"]["auroc"]["poor"][0]["stands"]

  def width(entry):
    return entry["ci"][1] - entry["ci"][0]

  assert width(gap["same"]["LVEDV"]) < 0.05 * width(found["r2"]["same"]["LVEDV"])  # paired
  assert "covariates" in found["r2"] and "made up" in text and "all 4 of R2" in text
  page = (runs / "out/report.html").read_text()
  assert "made up" in page and page.count("data:image/png") == 1 and " *" in page


@pytest.mark.reported("people that a run had trained on were no matter in a comparison")
def test_people_seen_in_training_are_told_of_each_run(runs):
  stored = dict(np.load(runs / "poor/evaluation/10/predictions.npz"))
  arrays = [stored[name] for name in ("y_true", "disease_y_true", "embedding", "disease_embedding")]
  for name, seen in (
    ("leak", {"test": 2, "note": "2 of 4 test people"}),
    ("clean", {"test": 0, "note": ""}),
    ("odd", {"note": 3}),
  ):
    write(runs / name / "evaluation/10", *arrays, seen_people=seen)
  text = compare.compare(
    [str(runs / name) for name in ("clean", "leak", "good")], str(runs / "out")
  )
  assert "leak: 2 of 4 test people" in text and "clean: " not in text
  assert "leak: 2 of 4 test people" in (runs / "out/report.html").read_text()
  assert json.loads((runs / "out/results.json").read_text())["seen_people"].keys() == {
    "clean",
    "leak",
  }
  with pytest.raises(UserError, match="seen_people not in the form"):
    compare.compare([str(runs / "good"), str(runs / "odd")], str(runs / "out"))


def test_an_evaluation_that_is_no_table_is_refused_in_one_line(runs):
  shutil.copytree(runs / "good", runs / "number")
  (runs / "number/evaluation/10/results.json").write_text("7")
  with pytest.raises(UserError, match="results.json is not in the form"):
    compare.compare([str(runs / "good"), str(runs / "number")], str(runs / "out"))


def test_a_run_against_itself_differs_by_nothing(runs):
  compare.compare([str(runs / "good"), str(runs / "good/evaluation/10")], str(runs / "out"))
  found = json.loads((runs / "out/results.json").read_text())
  assert list(found["runs"]) == ["good/10 (1)", "good/10 (2)"]
  (rows,) = found["differences"]["r2"].values()
  assert all(one["value"] == 0 and one["ci"] == [0, 0] and not one["stands"] for one in rows)


def test_runs_that_differ_in_their_seed_alone_are_told_together(runs):
  stored = dict(np.load(runs / "good/evaluation/10/predictions.npz"))
  y, sick = stored["y_true"], stored["disease_y_true"]
  rng = np.random.default_rng(1)
  for i, (steps, seed) in enumerate([(9, 0), (9, 1), (9, 2), (8, 5), (9, 2)]):
    x = np.nan_to_num(y) + rng.normal(size=y.shape)
    config = {"seed": seed, "steps": steps, "data": {"cohort": f"/elsewhere/{i}", "samples": 5}}
    write(runs / f"s{i}/evaluation/10", y, sick, x, np.nan_to_num(sick) + x, config=config)
  text = compare.compare([str(runs / f"s{i}") for i in range(5)], str(runs / "out"))
  found = json.loads((runs / "out/results.json").read_text())
  # s3 trained for another time, s4 has a seed that is there
  assert list(found["seeds"]["r2"]) == ["s0, s1, s2"]
  values = [found["r2"][f"s{i}"]["LVEDV"]["value"] for i in range(3)]
  assert found["seeds"]["r2"]["s0, s1, s2"]["LVEDV"] == {
    "mean": pytest.approx(np.mean(values)),
    "sd": pytest.approx(np.std(values, ddof=1)),
    "seeds": 3,
  }
  assert f"{np.mean(values):.3f} ({np.std(values, ddof=1):.3f})" in text


def test_a_phenotype_of_few_measurements_is_not_scored(runs):
  for name in ("good", "poor"):
    file = runs / name / "evaluation/10/predictions.npz"
    stored = dict(np.load(file))
    stored["y_true"][9:, 1] = np.nan
    np.savez(file, **stored)
  text = compare.compare([str(runs / "good"), str(runs / "poor")], str(runs / "out"))
  found = json.loads((runs / "out/results.json").read_text())
  assert (
    found["r2"]["good"]["LVEF"] == {"value": None, "ci": [None, None]}
    and found["r2"]["good"]["LVEDV"]["value"] > 0.5
  )
  few = found["differences"]["r2"]["poor"][1]
  assert few["value"] is None and not few["stands"] and "nan" not in text


def test_the_newest_step_counts_and_other_cohorts_do_not(runs):
  stored = dict(np.load(runs / "poor/evaluation/10/predictions.npz"))
  arrays = [stored[name] for name in ("y_true", "disease_y_true", "embedding", "disease_embedding")]
  write(runs / "poor/evaluation/9", *arrays)
  write(runs / "poor/evaluation/100", *arrays)
  write(runs / "poor/evaluation/200-elsewhere", *arrays)
  assert compare.read(runs / "poor").folder.name == "100"
  assert compare.read(runs / "poor/evaluation/9").name == "poor"


def test_what_cannot_be_compared_is_one_line(runs):
  stored = dict(np.load(runs / "poor/evaluation/10/predictions.npz"))
  arrays = [stored[name] for name in ("y_true", "disease_y_true", "embedding", "disease_embedding")]
  write(runs / "elsewhere/evaluation/10", *arrays, fingerprint="g")
  write(runs / "others/evaluation/10", arrays[0][::-1], *arrays[1:])
  write(runs / "torn/evaluation/10", *arrays)
  (runs / "torn/evaluation/10/predictions.npz").write_bytes(b"PK")
  write(runs / "early/evaluation/10", *arrays)
  np.savez(
    runs / "early/evaluation/10/predictions.npz",
    **{name: x for name, x in stored.items() if name != "disease_y_true"},
  )
  for other, words in (
    ("elsewhere", "compare runs on one cohort"),
    ("others", "y_true differs"),
    ("torn", "cannot read the evaluation"),
    ("early", "no disease_y_true in predictions.npz"),
    ("nothing", "has no evaluation; mmcl evaluate"),
  ):
    with pytest.raises(UserError, match=words):
      compare.compare([str(runs / "good"), str(runs / other)], str(runs / "out"))
  with pytest.raises(UserError, match="two runs or more"):
    compare.main([str(runs / "good"), f"--out={runs}/out"])
  assert not (runs / "out").exists()


def test_simultaneous_intervals_hold_all_truths_at_once():
  """20 independent means: each by itself in 95 of 100, all 20 at once in 36 of 100, but for the
  wider intervals."""
  rng, alone, together = np.random.default_rng(0), 0, 0
  for _ in range(400):
    value = rng.normal(size=20)  # truth 0, SD 1
    draws = value + rng.normal(size=(300, 20))
    low, high = statistics.simultaneous(value, draws)
    together += ((low < 0) & (high > 0)).all()
    low, high = statistics.interval(draws)
    alone += ((low < 0) & (high > 0)).all()
  assert 0.91 < together / 400 < 0.98 and alone / 400 < 0.5


def test_scores_that_do_not_vary_or_are_unknown_take_no_part():
  draws = np.random.default_rng(0).normal(size=(1000, 3))
  draws[:, 1], draws[3, 2] = 0.0, np.nan
  found = statistics.simultaneous(np.zeros(3), draws)
  assert np.isnan(found[:, 1:]).all()
  assert found[1, 0] == pytest.approx(1.96, abs=0.15)  # alone it is an interval of one
