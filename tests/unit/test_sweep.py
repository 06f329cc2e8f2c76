"""The study over all recipes: its graph, what is run again, and its scores against loops written
the slow way."""

import json
import sys
import threading
import types

import numpy as np
import pytest
from common import ROOT, tiny_config
from sklearn.metrics import r2_score, roc_auc_score

sys.path.insert(0, str(ROOT / "benchmarks"))
import sweep

NAMES, DISEASES = ["LVEDV", "LVM", "WT", "LVEF"], ["HF", "CM"]


# the graph


def config_of(run):
  recipe, _, argument = run.recipe.partition(":")
  sys.path.insert(0, str(ROOT / "configs"))
  return __import__(recipe.removesuffix(".py")).get_config(argument.replace("demo", "test"))


def test_graph_gives_every_recipe_the_stages_that_it_starts_from():
  runs = sweep.graph(2)
  assert len({run.name for run in runs}) == len(runs) == 5 + 2 * 10
  assert {run.arm for run in runs if not run.name.startswith("cmr_")} == set(sweep.TRAINED)
  before = {}
  for run in runs:
    config = config_of(run)
    for module, start in run.starts.items():
      earlier = before[start]  # KeyError: comes later, or never
      assert earlier.seed == (run.seed if module == "ecg" else 0)
      if module == "ecg":
        assert earlier.arm == "mae"
      else:
        (teacher,) = config_of(earlier).model.towers.values()
        mine = config.model.towers[module.removeprefix("cmr_")]
        assert (mine.fn, mine.view) == (teacher.fn, teacher.view)
    wanted = set(config.init_from) if run.arm in (*sweep.ARMS, "mmcl") else set()
    assert set(run.starts) == wanted, run.name
    before[run.name] = run


# running


def fakes(**starts):
  return [sweep.Run(name, name, "", 0, dict(enumerate(after))) for name, after in starts.items()]


def test_schedule_keeps_the_order_and_the_number_of_jobs():
  runs = fakes(a="", b="", c="", d="ab", e="d", f="")
  lock, going, peak, ended, told = threading.Lock(), set(), [0], [], []
  met = threading.Barrier(2, timeout=600)

  def work(run):
    with lock:
      assert set(run.starts.values()) <= {"b", *ended}
      going.add(run.name)
      peak[0] = max(peak[0], len(going))
    if run.name in "ac":
      met.wait()  # passes only where two run at a time
    with lock:
      going.remove(run.name)
      ended.append(run.name)

  assert (
    sweep.schedule(runs, ["b"], work, 2, lambda run, what, done: told.append((what, len(done))))
    == {}
  )
  assert sorted(ended) == list("acdef") and peak[0] == 2
  assert told[-1] == ("is done", 6)
  begun = np.cumsum([what == "begins" for what, _ in told])
  assert all(count - (done - 1) <= 2 for count, (_, done) in zip(begun, told))  # b was done before


def test_a_failed_run_costs_itself_and_what_starts_from_it():
  ended = []

  def work(run):
    if run.name == "a":
      raise SystemExit("no memory")
    ended.append(run.name)

  failed = sweep.schedule(fakes(a="", b="", c="a", d="c", e="b"), [], work, jobs=2)
  assert failed == {
    "a": "no memory",
    "c": "starts from a, which failed",
    "d": "starts from c, which failed",
  }
  assert sorted(ended) == ["b", "e"]


def test_what_is_finished_is_not_run_again(tmp_path, monkeypatch, capsys):
  """mae-0 is evaluated, dual_phase-0 trained, ed_slice-0 has an earlier checkpoint and one that was
  cut short."""
  called = []
  monkeypatch.setattr(sweep, "call", lambda program, *words, **_: called.append((program, words)))
  report = sweep.report_of(sweep.Run("mae-0", "mae", "", 0, {}), tmp_path, 6)
  for file in (
    report,
    tmp_path / "dual_phase-0/checkpoints/6/meta/manifest.json",
    tmp_path / "ed_slice-0/checkpoints/4/meta/manifest.json",
    tmp_path / "ed_slice-0/checkpoints/6/state/x",
  ):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")
  runs = [run for run in sweep.graph(1) if run.name in ("mae-0", "dual_phase-0", "ed_slice-0")]
  runs = [run._replace(starts={k: v for k, v in run.starts.items() if k == "ecg"}) for run in runs]
  assert sweep.carry_out(runs, tmp_path, 6, [[0]]) == {}

  def workdir(words):
    return next(word for word in words if word.startswith("--workdir")).rpartition("/")[2]

  assert [(program, workdir(words)) for program, words in called] == [
    ("train", "ed_slice-0"),
    ("evaluate", "ed_slice-0"),
    ("evaluate", "dual_phase-0"),
  ]
  assert f"--config.init_from.ecg={tmp_path}/mae-0" in called[0][1]
  assert f"--config={ROOT}/configs/arms.py:demo,arm=ed_slice,steps=6" in called[0][1]
  assert "3 of 3 done; dual_phase-0 is done" in capsys.readouterr().out


def test_time_left_goes_by_runs_of_the_same_arm():
  runs = [sweep.Run(name, name[:-1], "", 0, {}) for name in ("a0", "b0", "a1", "b1", "c1")]
  # c1 is being run
  taken = {"a0": {"train": 500.0, "evaluate": 100.0}, "b0": {"train": 7800.0}, "c1": {"train": 9e9}}
  # (10 + 130 + 70) / 2
  assert sweep.time_left(runs[2:], runs, taken, jobs=2) == ", about 1 h 45 min left"
  assert sweep.time_left(runs, runs, {}, jobs=2) == ""


# scores


def finish(out, runs):
  """Made-up evaluations of 90 rows of 70 subjects: HF has 34 cases, CM 3; better embeddings for
  later runs."""
  rng = np.random.default_rng(3)
  person = np.r_[np.arange(70), rng.integers(0, 70, 20)]
  y = rng.normal(size=(90, 4)) * [30, 20, 1, 5] + [150, 90, 6, 60]
  sick = np.zeros((90, 2), np.float32)
  sick[:34, 0] = sick[:3, 1] = 1
  sick[80, 0] = np.nan
  for i, run in enumerate(runs):

    def noisy(i=i):
      return y + rng.normal(size=y.shape) * y.std(axis=0) / (1 + i)

    found = {
      "subject": np.stack([person, person], axis=1).astype(np.uint32),
      "y_true": y,
      "disease_y_true": sick,
    }
    found |= {
      model: noisy()
      for model in ("embedding", "with_covariates", "covariates", "random_encoder", "ceiling")
    }
    for model in ("embedding", "with_covariates"):
      found[f"disease_{model}"] = np.nan_to_num(sick) + rng.normal(size=(90, 2))
    report = sweep.report_of(run, out, 6)
    report.parent.mkdir(parents=True)
    np.savez(report.with_name("predictions.npz"), **found)
    results = {
      "phenotypes": dict.fromkeys(NAMES),
      "diseases": {"embedding": dict.fromkeys(DISEASES)},
      "counts": {},
    }
    if run.arm in ("joint", "dual_phase"):
      hits = {"ecg_to_cmr": 0.1 * (1 + run.seed), "cmr_to_ecg": 0.1 * (1 + run.seed) + 1}
      results["retrieval"] = {way: {"r@10": x, "chance_r@10": 0.11} for way, x in hits.items()}
    report.write_text(json.dumps(results))


def predictions(out):
  return {file.parts[-4]: np.load(file) for file in out.glob("*/evaluation/6/predictions.npz")}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
  """Two seeds of mae, dual_phase and a teacher; joint has seed 1 alone."""
  out, patch = tmp_path_factory.mktemp("study"), pytest.MonkeyPatch()
  runs = [
    run for run in sweep.graph(2) if run.arm in ("mae", "dual_phase", "joint", "cmr_ed_volume")
  ]
  finish(out, [run for run in runs if run.name != "joint-0"])
  patch.setattr(sweep, "DRAWS", 60)
  results = sweep.summarise(runs, out, 6)
  patch.undo()
  return out, runs, results


def slow_bootstrap(person, score):
  """95 % interval of `score(rows)` over 60 cohorts drawn subject by subject."""
  persons = np.unique(person)
  draws = np.random.default_rng(0).integers(len(persons), size=(60, len(persons)))
  return np.percentile(
    [score(np.concatenate([np.flatnonzero(person == persons[p]) for p in draw])) for draw in draws],
    [2.5, 97.5],
  )


def test_scores_and_paired_differences_match_a_slow_bootstrap(study):
  out, _, results = study
  found = predictions(out)
  y, person = found["mae-0"]["y_true"], found["mae-0"]["subject"][:, 0]
  sick = found["mae-0"]["disease_y_true"][:, 0]

  def r2(names, column, rows):
    return np.mean(
      [r2_score(y[rows, column], found[name]["embedding"][rows, column]) for name in names]
    )

  def mass(names, rows):
    return (r2(names, 1, rows) + r2(names, 2, rows)) / 2

  def area(names, rows):
    rows = rows[np.isfinite(sick[rows])]
    return np.mean(
      [roc_auc_score(sick[rows], found[name]["disease_embedding"][rows, 0]) for name in names]
    )

  def check(entry, score):
    assert entry["mean"] == pytest.approx(score(np.arange(90)), abs=1e-10)
    np.testing.assert_allclose(entry["ci"], slow_bootstrap(person, score), atol=1e-10)

  dual, mae = ["dual_phase-0", "dual_phase-1"], ["mae-0", "mae-1"]
  check(results["r2"]["dual_phase"]["LVEF"], lambda rows: r2(dual, 3, rows))
  check(results["r2"]["dual_phase"]["mass"], lambda rows: mass(dual, rows))
  check(results["auroc"]["mae"]["HF"], lambda rows: area(mae, rows))
  # joint has seed 1 alone, and so its difference is one of that seed
  joint, differences = ["joint-1"], results["differences"]
  check(
    differences["r2"]["joint minus dual_phase"]["mass"],
    lambda rows: mass(joint, rows) - mass(dual[1:], rows),
  )
  check(
    differences["r2"]["joint minus mae"]["LVEDV"],
    lambda rows: r2(joint, 0, rows) - r2(mae[1:], 0, rows),
  )
  check(
    differences["auroc"]["joint minus dual_phase"]["HF"],
    lambda rows: area(joint, rows) - area(dual[1:], rows),
  )
  both = [r2([name], 0, np.arange(90)) for name in dual]
  assert results["r2"]["dual_phase"]["LVEDV"]["seed_sd"] == pytest.approx(
    abs(both[0] - both[1]) / 2**0.5
  )
  assert results["r2"]["joint"]["LVEDV"]["seed_sd"] is None


def test_baselines_are_taken_from_where_they_belong(study):
  out, _, results = study
  found = predictions(out)

  def score(name, model):
    return r2_score(found["mae-0"]["y_true"][:, 1], found[name][model][:, 1])

  r2 = {row: found["LVM"]["mean"] for row, found in results["r2"].items()}
  assert r2["untrained encoder"] == pytest.approx(
    sum(score(f"mae-{seed}", "random_encoder") for seed in (0, 1)) / 2
  )
  assert r2["covariates"] == pytest.approx(score("mae-0", "covariates"))
  assert r2["ceiling"] == pytest.approx(score("mae-0", "ceiling"))
  assert r2["CMR itself: ed_volume"] == pytest.approx(score("cmr_ed_volume", "embedding"))
  assert r2["joint + covariates"] == pytest.approx(score("joint-1", "with_covariates"))
  difference = results["differences"]["r2"]["dual_phase + covariates minus covariates"]["LVM"]
  assert difference["mean"] == pytest.approx(r2["dual_phase + covariates"] - r2["covariates"])
  assert "dual_phase minus ed_volume" not in results["differences"]["r2"]  # not run


def test_runs_on_other_test_subjects_are_refused(study, tmp_path):
  _, runs, _ = study
  finish(tmp_path, runs)
  file = sweep.report_of(runs[1], tmp_path, 6).with_name("predictions.npz")
  changed = dict(np.load(file))
  np.savez(file, **changed | {"subject": changed["subject"][::-1]})
  with pytest.raises(SystemExit, match=f"{runs[1].name} was not evaluated on the test subjects"):
    sweep.summarise(runs, tmp_path, 6)


def test_groups_are_means_of_the_phenotypes_that_the_cohort_has():
  names = ["LVEF", "LVEDV", "Ecc", "LVESV", "RVEF"]
  scores = np.array([[1.0, 2, 3, 4, 8], [0, 1, 0, 0, 6]])
  assert sweep.present(names) == {"volumes": [1, 3], "function": [0, 4, 2]}
  np.testing.assert_array_equal(
    sweep.grouped(scores, names), [[3, 4, 1, 2, 3, 4, 8], [0.5, 2, 0, 1, 0, 0, 6]]
  )
  grouped = [name for group in sweep.GROUPS.values() for name in group]
  # each in one group, none forgotten
  assert sorted(grouped) == sorted(sweep.cohort_lib.schema.PHENOTYPES)


def test_the_table_tells_what_is_not_there(study):
  *_, results = study
  text = sweep.table(results | {"retrieval_ceiling": {"ecg_to_cmr": 0.021, "cmr_to_ecg": 0.0204}})
  lines = text.splitlines()
  assert lines[0] == "**Not finished yet: joint-0.**"
  assert "| test R2, mean of the group | volumes | mass | function |" in lines
  volumes = results["r2"]["joint"]["volumes"]
  start = (
    f"| joint (seeds 1) | {volumes['mean']:.3f} [{volumes['ci'][0]:.3f}, {volumes['ci'][1]:.3f}] |"
  )
  assert [line.startswith(start) for line in lines].count(True) == 1
  assert "Test cases: HF 34, CM 3. Too few to score: CM." in lines
  assert (
    "| test AUROC | mean | HF |" in lines
    and "| difference | volumes | mass | function | mean AUROC |" in lines
  )
  assert "| dual_phase | 0.150 ±0.071 | 1.150 ±0.071 | 0.1100 |" in lines
  assert "| ceiling: the generator's own parameters | 0.021 | 0.020 | |" in lines
  assert any(line.startswith("| joint minus dual_phase (seeds 1) | ") for line in lines)
  for block in text.split("\n\n"):
    assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_the_figure_draws_what_the_table_says(study):
  *_, results = study
  panels = sweep.drawing(results).axes
  assert [panel.get_title() for panel in panels] == ["volumes", "mass", "function"]
  assert [text.get_text() for text in panels[0].get_yticklabels()] == ["mae", "dual_phase", "joint"]
  for panel, group in zip(panels, sweep.GROUPS):
    untrained, ceiling, points = panel.lines[:3]
    assert untrained.get_xdata()[0] == results["r2"]["untrained encoder"][group]["mean"]
    assert ceiling.get_xdata()[0] == results["r2"]["ceiling"][group]["mean"]
    assert list(points.get_xdata()) == [
      results["r2"][row][group]["mean"] for row in ("mae", "dual_phase", "joint")
    ]
    ends = np.array([segment[:, 0] for segment in panel.collections[0].get_segments()])
    np.testing.assert_allclose(
      ends, [results["r2"][row][group]["ci"] for row in ("mae", "dual_phase", "joint")]
    )


@pytest.mark.parametrize(
  "score, text",
  [
    ({"mean": 0.12345, "ci": [0.1, 0.15], "seed_sd": 0.0021}, "0.123 [0.100, 0.150] ±0.002"),
    ({"mean": -0.0001, "ci": [-0.2, 0.00049], "seed_sd": None}, "0.000 [-0.200, 0.000]"),
    ({"mean": 0.5, "ci": [None, None], "seed_sd": None}, "0.500"),
    ({"mean": None, "ci": [None, None], "seed_sd": None}, "-"),
    (None, "-"),
  ],
)
def test_cells(score, text):
  assert sweep.cell(score) == text


# what the evaluation leaves for it


def test_evaluation_keeps_the_probabilities_of_diseases_beside_the_phenotypes(
  cohort, tmp_path, monkeypatch
):
  from mmcl_jax import configuration, evaluate
  from mmcl_jax.evaluators import context, diseases, setup
  from mmcl_jax.training import parallel

  config = tiny_config(cohort.path)
  config.model.towers = {"ecg": dict(fn="ecg_vit", view="ecg", size="test", patch=100)}
  configuration.save(config, str(tmp_path))
  rng = np.random.default_rng(0)

  def column(split, name):
    return np.stack([cohort.splits[split][i][name] for i in range(len(cohort.splits[split]))])

  features = {
    split: {
      name: column(split, name) for name in ("subject", "phenotypes", "diseases", "covariates")
    }
    | {"embedding": rng.normal(size=(len(cohort.splits[split]), 4))}
    for split in cohort.splits
  }
  run = types.SimpleNamespace(
    config=config,
    step=0,
    mesh=parallel.make_mesh(data=-1, model=1),
    manifest={"cohort": cohort.fingerprint},
    state=None,
    standardiser=types.SimpleNamespace(targets=(), diseases=()),
  )
  monkeypatch.setattr(setup.restore, "load_run", lambda *_: run)
  monkeypatch.setattr(evaluate.restore, "checksum", lambda *_: "")
  monkeypatch.setattr(setup.people, "of_run", lambda *_: setup.people.People({}, {}))
  monkeypatch.setattr(context.Context, "features", lambda self, split: features[split])
  evaluate.evaluate(str(tmp_path), step=0, cohort_path=cohort.path)
  found = np.load(tmp_path / "evaluation/0/predictions.npz")
  _, wanted, _ = diseases.evaluate(features, cohort.info["diseases"], draws=2)
  np.testing.assert_array_equal(found["subject"], column("test", "subject"))
  np.testing.assert_array_equal(found["disease_y_true"], column("test", "diseases"))
  for model in ("embedding", "covariates", "with_covariates"):
    np.testing.assert_array_equal(found[f"disease_{model}"], wanted[model])
