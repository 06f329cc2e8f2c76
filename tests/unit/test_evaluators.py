"""Evaluation from embeddings against independent oracles: scikit-learn, SciPy, and loops written
the slow way."""

import csv
import json
import os
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.linear_model import Ridge
from sklearn.metrics import (
  average_precision_score,
  balanced_accuracy_score,
  mean_absolute_error,
  r2_score,
  roc_auc_score,
  roc_curve,
)

from mmcl_jax.errors import UserError
from mmcl_jax.evaluators import diseases, phenotypes, retrieval, ridge, statistics
from mmcl_jax.evaluators.base import Result
from mmcl_jax.reports import figures, report
from mmcl_jax.support.text import SYNTHETIC_NOTE

NAMES, UNITS = ["LVEDV", "LVEF", "WT"], ["ml", "%", "mm"]


def subjects(ids):
  return np.stack([np.asarray(ids), np.full(len(ids), 7)], axis=1).astype(np.uint32)


def made_up(rng, n, signal=1.0):
  """One split: three phenotypes and two diseases that the embedding partly knows, with gaps; some
  subjects twice."""
  hidden = rng.normal(size=(n, 3))
  covariates = rng.normal(size=(n, 2))
  y = np.array([140, 60, 9]) + np.array([30, 8, 1]) * (
    hidden + 0.5 * covariates[:, :1] + 0.5 * rng.normal(size=(n, 3))
  )
  y[rng.random((n, 3)) < 0.1] = np.nan
  sick = np.stack([hidden[:, 0] > 1, hidden[:, 1] > 2.6], axis=1).astype(np.float32)
  sick[rng.random((n, 2)) < 0.1] = np.nan
  covariates[rng.random((n, 2)) < 0.1] = np.nan
  mix = np.random.default_rng(5).normal(size=(3, 12))
  return {
    "subject": subjects(rng.integers(0, n * 3 // 4, n)),
    "phenotypes": y.astype(np.float32),
    "diseases": sick,
    "covariates": covariates.astype(np.float32),
    "embedding": (signal * hidden @ mix + 2 * rng.normal(size=(n, 12))).astype(np.float32),
    "random_embedding": (0.2 * hidden @ mix + 2 * rng.normal(size=(n, 12))).astype(np.float32),
  }


@pytest.fixture(scope="module")
def features():
  rng = np.random.default_rng(0)
  return {split: made_up(rng, n) for split, n in {"train": 500, "val": 250, "test": 400}.items()}


@pytest.fixture(scope="module")
def evaluated(features):
  return phenotypes.evaluate(features, NAMES, UNITS, draws=200)


# statistics


def test_scores_match_sklearn_and_scipy_with_and_without_missing_labels(features):
  y = features["test"]["phenotypes"].astype(np.float64)
  prediction = y + np.random.default_rng(1).normal(size=y.shape) * np.nanstd(y, axis=0)
  prediction[np.isnan(y)] = 0.0
  for k in range(3):
    known = np.isfinite(y[:, k])
    true, predicted = y[known, k], prediction[known, k]
    assert statistics.r2(y, prediction)[k] == pytest.approx(r2_score(true, predicted), abs=1e-12)
    assert statistics.pearson(y, prediction)[k] == pytest.approx(
      stats.pearsonr(true, predicted)[0], abs=1e-12
    )
    assert statistics.mae(y, prediction)[k] == pytest.approx(
      mean_absolute_error(true, predicted), rel=1e-12
    )
  assert statistics.r2(y[known, 2], prediction[known, 2]).shape == ()


def test_r2_survives_a_mean_far_larger_than_the_spread():
  y = 1e6 + np.random.default_rng(0).normal(size=500)
  prediction = y + 0.3
  assert statistics.r2(y, prediction) == pytest.approx(r2_score(y, prediction), abs=1e-8)
  weights = np.random.default_rng(1).integers(0, 3, (5, 500)).astype(float)
  slow = [r2_score(y, prediction, sample_weight=w) for w in weights]
  np.testing.assert_allclose(statistics.r2(y, prediction, weights), slow, atol=1e-8)


def test_nothing_to_tell_is_nan_and_never_infinite():
  rng = np.random.default_rng(0)
  noise = rng.normal(size=300)
  for y in (np.zeros(300), np.full(300, 0.1), 60.3 * (1 + 2e-16 * rng.integers(0, 3, 300))):
    assert np.isnan(statistics.r2(y, noise)) and np.isnan(statistics.pearson(y, noise))
  nearly = np.where(np.arange(300) == 0, 61.7, 60.3)
  # draws without the one row that differs
  weights = rng.integers(0, 4, (30, 300)) * (np.arange(300.0) > 0)
  for y in (nearly, nearly - nearly.mean()):
    assert np.isfinite(statistics.r2(y, noise)) and np.isnan(statistics.r2(y, noise, weights)).all()
  empty = np.full(300, np.nan)
  assert all(
    np.isnan(score(empty, noise)) for score in (statistics.r2, statistics.pearson, statistics.mae)
  )
  assert np.isnan(statistics.interval(np.full((20, 1), np.nan))).all()


def test_bootstrap_keeps_subjects_whole_and_draws_as_many_as_there_are():
  ids = np.array([0, 1, 1, 2, 3, 3, 3, 4])
  weights = statistics.bootstrap_weights(subjects(ids), draws=400, seed=3)
  assert weights.shape == (400, 8)
  np.testing.assert_array_equal(weights[:, 1], weights[:, 2])
  np.testing.assert_array_equal(weights[:, 4], weights[:, 6])
  first = np.unique(ids, return_index=True)[1]
  np.testing.assert_array_equal(weights[:, first].sum(axis=1), 5)
  np.testing.assert_allclose(weights.mean(axis=0), 1.0, atol=0.2)
  np.testing.assert_array_equal(
    weights, statistics.bootstrap_weights(subjects(ids), draws=400, seed=3)
  )
  assert (weights != statistics.bootstrap_weights(subjects(ids), draws=400, seed=4)).any()


def test_weighted_scores_equal_scores_of_repeated_rows(features):
  y = features["test"]["phenotypes"].astype(np.float64)
  prediction = np.nan_to_num(y) + np.random.default_rng(1).normal(size=y.shape) * 5
  weights = statistics.bootstrap_weights(features["test"]["subject"], draws=20, seed=0)
  fast = statistics.r2(y, prediction, weights)
  case = features["test"]["diseases"][:, 0]
  # with ties
  score = np.round(np.nan_to_num(case) + np.random.default_rng(2).normal(size=len(case)), 1)
  fast_auroc, fast_auprc = (
    statistics.auroc(case, score, weights),
    statistics.auprc(case, score, weights),
  )
  fast_accuracy = statistics.balanced_accuracy(case, score >= 0.5, weights)
  for draw, times in enumerate(weights.astype(int)):
    rows = np.repeat(np.arange(len(y)), times)
    for k in range(3):
      known = rows[np.isfinite(y[rows, k])]
      assert fast[draw, k] == pytest.approx(r2_score(y[known, k], prediction[known, k]), abs=1e-10)
    known = rows[np.isfinite(case[rows])]
    assert fast_auroc[draw] == pytest.approx(roc_auc_score(case[known], score[known]), abs=1e-12)
    assert fast_auprc[draw] == pytest.approx(
      average_precision_score(case[known], score[known]), abs=1e-12
    )
    assert fast_accuracy[draw] == pytest.approx(
      balanced_accuracy_score(case[known], score[known] >= 0.5), abs=1e-12
    )


def test_threshold_is_youden_s_on_the_rows_that_are_known():
  rng = np.random.default_rng(0)
  y = (rng.random(300) < 0.2).astype(float)
  score = np.round(y + rng.normal(size=300), 1)
  unknown = np.where(rng.random(300) < 0.2, np.nan, y)
  known = np.isfinite(unknown)
  false_alarms, hits, levels = roc_curve(y[known], score[known], drop_intermediate=False)
  best = np.flatnonzero(hits - false_alarms >= (hits - false_alarms).max() - 1e-12)[0]
  found = statistics.best_threshold(unknown, score)
  # scores are a tenth apart, the threshold between two of them
  assert levels[best] - 0.1 < found < levels[best]
  assert statistics.balanced_accuracy(unknown, score >= found) == pytest.approx(
    (1 + (hits - false_alarms).max()) / 2
  )
  assert np.isnan(statistics.best_threshold(np.zeros(5), np.arange(5.0)))
  # all are called
  assert statistics.best_threshold(np.array([0.0, 1.0]), np.array([1.0, 1.0])) == 1.0


def test_calibration_is_sklearn_s_where_groups_are_equal_and_zero_for_the_truth():
  rng = np.random.default_rng(0)
  probability = rng.permutation(np.linspace(0.01, 0.4, 1000))
  y = (rng.random(1000) < probability).astype(float)
  said, seen, rows = statistics.reliability(y, probability)
  observed, predicted = calibration_curve(y, probability, n_bins=10, strategy="quantile")
  np.testing.assert_allclose(said, predicted, rtol=1e-12)
  np.testing.assert_allclose(seen, observed, rtol=1e-12)
  assert (rows == 100).all()
  assert statistics.ece(y, probability) == pytest.approx(
    np.abs(observed - predicted).mean(), rel=1e-12
  )
  assert statistics.ece(y, probability) < 0.04 < 0.2 < statistics.ece(y, probability + 0.3)
  gaps = np.append(y, np.nan), np.append(probability, 0.9)
  assert statistics.ece(*gaps) == statistics.ece(y, probability)
  assert [len(x) for x in statistics.reliability(y[:3], probability[:3])] == [3, 3, 3]
  assert np.isnan(statistics.ece(y[:0], probability[:0]))


def test_limits_of_agreement_by_hand():
  y = np.array([[10.0, 1.0], [20.0, np.nan], [30.0, np.nan], [np.nan, np.nan]])
  mean, low, high = statistics.limits_of_agreement(
    y, y + np.array([[1.0, 0], [2.0, 0], [6.0, 0], [9.0, 0]])
  )
  assert (
    mean[0] == 3
    and high[0] == pytest.approx(3 + 1.96 * np.sqrt((4 + 1 + 9) / 2))
    and low[0] == pytest.approx(6 - high[0])
  )
  assert np.isnan([mean[1], low[1], high[1]]).all()  # one row has no spread


def test_interval_covers_the_truth_about_95_times_in_100_although_subjects_repeat():
  """Six rows a subject, errors shared within the subject: resampling rows would cover far less."""
  rng = np.random.default_rng(0)
  covered = {"subjects": 0, "rows": 0}
  trials, people, repeats = 150, 80, 6
  for trial in range(trials):
    truth, error = rng.normal(size=people), 0.7 * rng.normal(size=people)
    y, prediction = np.repeat(truth, repeats), np.repeat(truth + error, repeats)
    ids = np.repeat(np.arange(people), repeats)
    for unit, identity in (("subjects", ids), ("rows", np.arange(len(ids)))):
      weights = statistics.bootstrap_weights(subjects(identity), draws=200, seed=trial)
      low, high = statistics.interval(statistics.r2(y, prediction, weights))
      covered[unit] += low < 1 - 0.7**2 < high
  assert 0.87 < covered["subjects"] / trials < 0.995
  assert covered["rows"] / trials < 0.75


def test_difference_is_paired():
  rng = np.random.default_rng(0)
  y = rng.normal(size=(300, 1))
  a = y + rng.normal(size=y.shape)
  b = a + 0.05 * rng.normal(size=y.shape)
  weights = statistics.bootstrap_weights(subjects(np.arange(300)), draws=300, seed=0)
  draws = statistics.r2(y, a, weights) - statistics.r2(y, b, weights)
  value, ci = statistics.r2(y, a) - statistics.r2(y, b), statistics.interval(draws)
  assert ci[0, 0] < value[0] < ci[1, 0]
  unpaired = np.ptp(statistics.interval(statistics.r2(y, a, weights)), axis=0)
  assert np.ptp(ci[:, 0]) < 0.3 * unpaired[0]


@pytest.mark.parametrize("n", [19, 39, 250])
def test_an_interval_holds_a_further_row_as_often_as_it_promises(n):
  """Skewed, heavy-tailed errors with gaps in 4,000 studies: the chance is ceil(0.95 (n + 1)) / (n +
  1) exactly."""
  rng = np.random.default_rng(n)
  error = rng.standard_t(2, size=(n + 1, 4000)) + rng.exponential(size=(n + 1, 4000))
  y = rng.normal(size=error.shape)
  gaps = np.full((3, 4000), np.nan)
  half = statistics.half_width(
    np.concatenate([gaps, y[:n]]), np.concatenate([gaps, y[:n] + error[:n]])
  )
  held = int((np.abs(error[n]) <= half).sum())
  assert stats.binomtest(held, 4000, -(-19 * (n + 1) // 20) / (n + 1)).pvalue > 0.001


def test_half_width_is_the_order_statistic_and_endless_where_too_few_rows_are_known():
  prediction = np.zeros((40, 2))
  y = np.stack([np.arange(1.0, 41), np.where(np.arange(40) < 18, 1.0, np.nan)], axis=1) * [[-1, 1]]
  # ceil(0.95 * 41)
  np.testing.assert_array_equal(statistics.half_width(y, prediction), [39, np.inf])
  # 0.95 * 40, no rounding
  np.testing.assert_array_equal(statistics.half_width(y[:39], prediction[:39]), [38, np.inf])
  np.testing.assert_array_equal(
    statistics.coverage(y, prediction, np.array([10, np.inf])), [0.25, 1]
  )
  assert np.isnan(statistics.coverage(y, prediction * np.nan, np.ones(2))).all()


# phenotypes


def test_probe_is_the_ridge_of_sklearn_at_the_strength_best_on_validation(features):
  train, val = features["train"], features["val"]
  probe = ridge.fit_probe(
    train["embedding"], train["phenotypes"], val["embedding"], val["phenotypes"]
  )
  mean, scale = train["embedding"].mean(axis=0), train["embedding"].std(axis=0)
  z, z_val = (train["embedding"] - mean) / scale, (val["embedding"] - mean) / scale
  for k in range(3):
    known, known_val = np.isfinite(train["phenotypes"][:, k]), np.isfinite(val["phenotypes"][:, k])
    fits = [Ridge(alpha=s).fit(z[known], train["phenotypes"][known, k]) for s in ridge.STRENGTHS]
    scores = [
      r2_score(val["phenotypes"][known_val, k], fit.predict(z_val[known_val])) for fit in fits
    ]
    best = int(np.argmax(scores))
    assert probe["strength"][k] == ridge.STRENGTHS[best]
    np.testing.assert_allclose(
      ridge.predict(probe, val["embedding"])[:, k], fits[best].predict(z_val), rtol=1e-4
    )


def test_choosing_the_strength_on_the_rows_of_the_interval_hardly_narrows_it():
  """100 phenotypes from 100 features; 200 rows to fit, 99 to choose and calibrate on (0.95
  exactly), 1,000 further ones."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1299, 100))
  y = x @ (rng.normal(size=(100, 100)) * (rng.random((100, 100)) < 0.2)) + 3 * rng.standard_t(
    4, size=(1299, 100)
  )
  probe = ridge.fit_probe(x[:200], y[:200], x[200:299], y[200:299])
  half = statistics.half_width(y[200:299], ridge.predict(probe, x[200:299]))
  covered = statistics.coverage(y[299:], ridge.predict(probe, x[299:]), half)
  assert len(set(probe["strength"])) > 2 and covered.mean() == pytest.approx(0.95, abs=0.01)


def test_strength_follows_the_noise_and_edges_are_told():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(400, 30))
  clean = x @ rng.normal(size=(30, 1))
  probe = ridge.fit_probe(
    x[:200],
    np.hstack([clean, rng.normal(size=clean.shape)])[:200],
    x[200:],
    np.hstack([clean, rng.normal(size=clean.shape)])[200:],
  )
  assert probe["strength"][0] == ridge.STRENGTHS[0] and probe["at_edge"][0]
  assert probe["strength"][1] > 100


def test_probe_with_more_features_than_rows_dead_features_and_absent_labels():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(40, 100)).astype(np.float32)
  x[:, 3] = 0.1  # a dead unit
  y = np.stack([x[:, 0], np.full(40, np.nan), np.full(40, 2.5)], axis=1)
  probe = ridge.fit_probe(x[:30], y[:30], x[30:], y[30:])
  prediction = ridge.predict(probe, x)
  assert np.isfinite(prediction[:, [0, 2]]).all() and np.isnan(prediction[:, 1]).all()
  np.testing.assert_allclose(prediction[:, 2], 2.5, rtol=1e-6)
  unseen = ridge.fit_probe(x[:30], y[:30], x[30:], np.full_like(y[30:], np.nan))
  assert unseen["strength"][0] == ridge.STRENGTHS[-1]
  np.testing.assert_allclose(ridge.predict(unseen, x)[:, 0], x[:30, 0].mean(), atol=0.01)


def test_standardisation_is_exact_in_float32_and_leaves_a_dead_unit_alone():
  x = np.random.default_rng(0).normal(size=(5000, 2)).astype(np.float32) * [1, 1e-7] + [1000, 1]
  mean, scale = ridge.standardisation(x.astype(np.float32))
  assert mean[0] == pytest.approx(x[:, 0].mean(), rel=1e-7) and scale[0] == pytest.approx(
    x[:, 0].std(), rel=1e-4
  )
  assert scale[1] == 1


def test_evaluate_scores_what_sklearn_scores_and_ranks_the_models(features, evaluated):
  results, predictions, probe = evaluated
  for k, name in enumerate(NAMES):
    known = np.isfinite(predictions["y_true"][:, k])
    score = results["phenotypes"][name]
    assert score["r2"] == pytest.approx(
      r2_score(predictions["y_true"][known, k], predictions["embedding"][known, k]), abs=1e-10
    )
    assert score["r2_ci"][0] < score["r2"] < score["r2_ci"][1]
    assert score["n"] == known.sum() and score["units"] == UNITS[k]
    val = (
      features["val"]["embedding"].astype(np.float64) @ probe["coef"][:, k] + probe["intercept"][k]
    )
    val = np.abs(features["val"]["phenotypes"][:, k] - val)[
      np.isfinite(features["val"]["phenotypes"][:, k])
    ]
    assert probe["half_width"][k] == pytest.approx(
      np.sort(val)[int(np.ceil(0.95 * (len(val) + 1))) - 1], rel=1e-9
    )
    off = np.abs(predictions["y_true"][known, k] - predictions["embedding"][known, k])
    assert (
      score["coverage95"] == np.mean(off <= probe["half_width"][k])
      and 0.9 < score["coverage95"] < 0.99
    )
    baselines = {model: scores[name]["r2"] for model, scores in results["baselines"].items()}
    assert set(baselines) == {"random_encoder", "covariates", "with_covariates"}
    assert baselines["with_covariates"] > score["r2"] > baselines["random_encoder"] > 0
    for a, b in phenotypes.DIFFERENCES:
      both = {"embedding": score["r2"], **baselines}
      assert results["differences"][f"{a}_minus_{b}"][name]["value"] == pytest.approx(
        both[a] - both[b], abs=1e-12
      )
    assert results["differences"]["embedding_minus_random_encoder"][name]["ci"][0] > 0
  np.testing.assert_array_equal(
    ridge.predict(probe, features["test"]["embedding"].astype(np.float64)),
    predictions["embedding"],
  )


def test_test_labels_never_reach_the_probe(features, evaluated):
  changed = {
    **features,
    "test": {**features["test"], "phenotypes": features["test"]["phenotypes"][::-1] * 3},
  }
  results, _, probe = phenotypes.evaluate(changed, NAMES, UNITS, draws=20)
  for key in ("coef", "intercept", "strength", "half_width"):
    np.testing.assert_array_equal(probe[key], evaluated[2][key])
  assert results["phenotypes"]["LVEDV"]["r2"] != evaluated[0]["phenotypes"]["LVEDV"]["r2"]


def test_few_labels_a_constant_and_missing_inputs_do_not_crash(features):
  few = {
    s: {k: v.copy() for k, v in f.items() if k != "random_embedding"} for s, f in features.items()
  }
  few["test"]["phenotypes"][9:, 0] = np.nan
  few["test"]["phenotypes"][:9, 0] = 100
  few["test"]["phenotypes"][:, 1] = 60
  for f in few.values():
    f["covariates"] = f["covariates"][:, :0]
  results, predictions, _ = phenotypes.evaluate(few, NAMES, UNITS, draws=50)
  assert results["phenotypes"]["LVEDV"]["n"] == 9
  assert np.isnan(
    [results["phenotypes"]["LVEDV"][s] for s in ("r2", "pearson", "mae", "coverage95")]
  ).all()
  assert np.isnan(
    [results["phenotypes"]["LVEF"]["r2"], *results["phenotypes"]["LVEF"]["r2_ci"]]
  ).all()
  assert np.isfinite(results["phenotypes"]["LVEF"]["mae"]) and np.isfinite(
    results["phenotypes"]["WT"]["r2"]
  )
  assert results["baselines"] == {} and results["differences"] == {}
  assert set(predictions) == {"subject", "y_true", "embedding"}


def test_features_that_are_not_finite_are_a_clear_error(features):
  broken = {
    **features,
    "val": {**features["val"], "embedding": features["val"]["embedding"] * np.nan},
  }
  with pytest.raises(UserError, match="250 of 250 rows of the val split"):
    phenotypes.evaluate(broken, NAMES, UNITS, draws=10)


def test_missing_covariates_become_the_training_mean_and_a_flag():
  nan = np.nan
  filled = ridge.fill_missing(
    {"train": np.array([[1.0, 5], [3, nan]]), "test": np.array([[nan, nan]])}
  )
  np.testing.assert_array_equal(filled["train"], [[1, 5, 0], [3, 5, 1]])
  np.testing.assert_array_equal(filled["test"], [[2, 5, 1]])


# diseases


def test_disease_scores_match_sklearn_and_few_cases_are_only_counted(features):
  results, predictions, probe = diseases.evaluate(features, ["HF", "CM"], draws=100)
  assert set(results) == {"embedding", "random_encoder", "covariates", "with_covariates"}
  y = features["test"]["diseases"]
  known = np.isfinite(y[:, 0])
  score = results["embedding"]["HF"]
  assert score["auroc"] == pytest.approx(
    roc_auc_score(y[known, 0], predictions["embedding"][known, 0]), abs=1e-12
  )
  assert score["auroc_ci"][0] < score["auroc"] < score["auroc_ci"][1] and score["auroc"] > 0.75
  assert score["cases"] == (y[:, 0] == 1).sum() and score["n"] == known.sum()
  assert score["auprc"] == pytest.approx(
    average_precision_score(y[known, 0], predictions["embedding"][known, 0]), abs=1e-12
  )
  assert score["auprc_ci"][0] < score["auprc"] < score["auprc_ci"][1]
  called = predictions["embedding"][known, 0] >= score["threshold"]
  assert score["balanced_accuracy"] == pytest.approx(
    balanced_accuracy_score(y[known, 0], called), abs=1e-12
  )
  seen_on_val = diseases.predict(
    {name: x[..., :1] for name, x in probe.items() if name in ("coef", "intercept")},
    features["val"]["embedding"],
  )
  assert score["threshold"] == pytest.approx(
    statistics.best_threshold(features["val"]["diseases"][:, 0], seen_on_val[:, 0])
  )
  assert sum(score["reliability"]["n"]) == known.sum()
  assert score["ece"] == statistics.ece(y[:, 0], predictions["embedding"][:, 0])
  assert 0 < results["embedding"]["CM"]["cases"] < diseases.FEWEST_TEST_CASES
  assert set(results["embedding"]["CM"]) == {"cases", "n", "train_cases"}
  prevalence = np.nanmean(features["train"]["diseases"][:, 0])
  assert predictions["embedding"][:, 0].mean() == pytest.approx(prevalence, abs=0.05)
  changed = {**features, "test": {**features["test"], "diseases": y[::-1]}}
  np.testing.assert_array_equal(
    diseases.evaluate(changed, ["HF", "CM"], draws=10)[2]["coef"], probe["coef"]
  )


def test_shuffled_labels_score_nothing(features):
  """A probe that saw test labels, or a score that favours the probe, would show in the mean over
  100 shuffles."""
  rng, r2, auroc = np.random.default_rng(0), [], []
  for _ in range(100):
    shuffled = {}
    for split, f in features.items():
      order = rng.permutation(len(f["subject"]))
      shuffled[split] = {
        "subject": f["subject"],
        "embedding": f["embedding"],
        "phenotypes": f["phenotypes"][order],
        "diseases": f["diseases"][order, :1],
      }
    r2 += [
      score["r2"]
      for score in phenotypes.evaluate(shuffled, NAMES, UNITS, draws=2)[0]["phenotypes"].values()
    ]
    auroc.append(diseases.evaluate(shuffled, ["HF"], draws=2)[0]["embedding"]["HF"]["auroc"])
  assert abs(np.mean(r2)) < 0.02 and abs(np.mean(auroc) - 0.5) < 0.02
  assert np.std(auroc) > 0.01  # they are 100 different shuffles


def test_no_cases_in_train_or_in_validation(features):
  rare = {s: {**f, "diseases": f["diseases"].copy()} for s, f in features.items()}
  rare["train"]["diseases"][:, 1] = 0
  rare["test"]["diseases"][:40, 1] = 1
  rare["val"]["diseases"][:, 0] = 0
  results, predictions, probe = diseases.evaluate(rare, ["HF", "CM"], draws=20)
  assert set(results["embedding"]["CM"]) == {"cases", "n", "train_cases"}
  assert np.isnan(predictions["embedding"][:, 1]).all() and np.isnan(probe["C"][1])
  assert results["embedding"]["HF"]["auroc"] > 0.75  # its strength chosen by log-loss


def test_disease_probe_does_not_mind_the_scale_and_offset_of_the_features(features):
  train, val = features["train"], features["val"]
  probes = [
    diseases.fit_probe(
      scale * train["embedding"] + offset,
      train["diseases"],
      scale * val["embedding"] + offset,
      val["diseases"],
    )
    for scale, offset in ((1, 0), (3, 20))
  ]
  x = features["test"]["embedding"]
  np.testing.assert_allclose(
    diseases.predict(probes[0], x), diseases.predict(probes[1], 3 * x + 20), atol=1e-3
  )


# retrieval


def slow_ranks(ecg, cmr, ids):
  """The definition, pair by pair."""

  def unit(v):
    return v / max(np.linalg.norm(v), 1e-12)

  n = len(ecg)
  scores = np.array(
    [[np.mean([unit(ecg[i]) @ unit(c) for c in cmr[j]]) for j in range(n)] for i in range(n)]
  )
  found = {}
  for direction, s in (("ecg_to_cmr", scores), ("cmr_to_ecg", scores.T)):
    found[direction] = []
    for i in range(n):
      best = max(s[i, j] for j in range(n) if ids[j] == ids[i])
      found[direction].append(
        1 + sum(ids[j] != ids[i] and s[i, j] >= best - 1e-6 for j in range(n))
      )
  return found


@pytest.mark.parametrize("block_scores", [2**22, 100])
def test_retrieval_matches_the_loop_with_repeats_ties_and_zeros(monkeypatch, block_scores):
  monkeypatch.setattr(retrieval, "BLOCK_SCORES", block_scores)
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 40, 60)
  ecg = rng.normal(size=(60, 8))
  cmr = ecg[:, None] + rng.normal(size=(60, 2, 8)) * [[[0.5], [1.5]]]
  cmr[5], ecg[6], cmr[7] = 0, 0, cmr[8]
  fast, slow = (
    retrieval.ranks(ecg.astype(np.float32), cmr.astype(np.float32), subjects(ids)),
    slow_ranks(ecg, cmr, ids),
  )
  for direction in slow:
    np.testing.assert_array_equal(fast[direction], slow[direction])
  scores = retrieval.evaluate(ecg, cmr, subjects(ids))[0]["ecg_to_cmr"]
  assert (
    scores["r@5"] == np.mean(np.array(slow["ecg_to_cmr"]) <= 5) and scores["n_candidates"] == 60
  )
  assert scores["median_rank"] == np.median(slow["ecg_to_cmr"])


def test_other_recordings_of_the_subject_do_not_push_its_match_down():
  ecg = np.eye(4)[[0, 0, 0, 1, 2]]
  scores = retrieval.evaluate(ecg, ecg[:, None], subjects([9, 9, 9, 1, 2]))[0]
  assert scores["ecg_to_cmr"]["r@1"] == scores["cmr_to_ecg"]["r@1"] == 1


def test_the_two_phases_count_alike_whatever_their_lengths():
  ecg = np.eye(3)
  # ES is long and wrong: a tie, not a defeat
  cmr = np.stack([ecg, 1000 * np.roll(ecg, 1, axis=0)], axis=1)
  np.testing.assert_array_equal(retrieval.ranks(ecg, cmr, subjects(range(3)))["ecg_to_cmr"], 2)


@pytest.mark.parametrize(
  "collapsed",
  [
    np.ones((500, 16)),
    np.zeros((500, 16)),
    np.full((500, 16), np.nan),
    np.ones((500, 16)) + 1e-7 * np.arange(500)[:, None] % 3,
  ],
)
def test_collapsed_embeddings_never_look_good(collapsed):
  collapsed = collapsed.astype(np.float32)
  for scores in retrieval.evaluate(collapsed, collapsed[:, None], subjects(range(500)))[0].values():
    assert scores["r@10"] == 0 and scores["median_rank"] == 500


def test_random_embeddings_score_at_chance():
  rng = np.random.default_rng(0)
  ids = subjects(rng.integers(0, 600, 1000))
  for scores in retrieval.evaluate(
    rng.normal(size=(1000, 16)), rng.normal(size=(1000, 2, 16)), ids
  )[0].values():
    assert scores["chance_r@10"] == pytest.approx(scores["r@10"], abs=0.02)
    assert scores["chance_r@10"] > 10 / 1000  # a subject with two recordings has two chances
  alone = retrieval.summary(np.arange(1, 101), subjects(range(100)))
  assert alone["chance_r@10"] == pytest.approx(0.1) and alone["r@10"] == pytest.approx(0.1)


# report and figures


@pytest.fixture(scope="module")
def assembled(features, evaluated):
  results, predictions, probe = evaluated
  ill = diseases.evaluate(features, ["HF", "CM"], draws=20)[0]
  embedding = features["test"]["embedding"]
  found = retrieval.evaluate(embedding, embedding[:, None], features["test"]["subject"])[0]
  results = {
    "note": SYNTHETIC_NOTE,
    "checkpoint": "<run>&1",
    **results,
    "ceiling": {"LVEDV": 0.8},
    "diseases": ill,
    "retrieval": found,
  }
  results["phenotypes"]["WT"] = {
    **results["phenotypes"]["WT"],
    "r2": np.nan,
    "r2_ci": [np.nan, np.nan],
  }
  return results, predictions, probe


def whole(results, predictions, probe, figures=()):
  """What `report.write` takes."""
  texts = {"results.csv": phenotypes.as_csv(results)}
  tables = [*phenotypes.tables(results), diseases.table(results["diseases"])]
  return Result(results, tables, dict(figures), predictions, {"probes": probe}, texts)


def test_report_holds_everything_and_no_nan(tmp_path, assembled):
  results, predictions, probe = assembled
  bars = figures.r2_bars(results, results["note"])
  out = report.write(whole(results, predictions, probe, {"r2": bars}), tmp_path / "a" / "r")
  assert {p.name for p in out.iterdir()} == {
    "results.json",
    "results.csv",
    "probes.npz",
    "predictions.npz",
    "r2.png",
    "report.html",
  }

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  read = json.loads((out / "results.json").read_text(), parse_constant=refuse)
  assert read["phenotypes"]["WT"]["r2"] is None and read["phenotypes"]["WT"]["r2_ci"] == [
    None,
    None,
  ]
  assert read["phenotypes"]["LVEDV"]["r2"] == results["phenotypes"]["LVEDV"]["r2"]
  assert set(read["baselines"]) == {"random_encoder", "covariates", "with_covariates"}
  assert {"r@1", "r@5", "r@10", "median_rank", "n_candidates"} <= set(
    read["retrieval"]["ecg_to_cmr"]
  )

  rows = list(csv.DictReader((out / "results.csv").open()))
  assert (
    list(rows[0]) == ["model", "phenotype", "r2", "lo", "hi", "pearson", "mae", "n", "units"]
    and len(rows) == 4 * 3
  )
  assert rows[2]["phenotype"] == "WT" and rows[2]["r2"] == ""
  assert float(rows[0]["lo"]) == results["phenotypes"]["LVEDV"]["r2_ci"][0]

  stored, predicted = np.load(out / "probes.npz"), np.load(out / "predictions.npz")
  assert {"names", "units", "coef", "intercept"} <= set(stored) and list(stored["names"]) == NAMES
  np.testing.assert_array_equal(predicted["embedding"], predictions["embedding"])

  page = (out / "report.html").read_text()
  assert "&lt;run&gt;&amp;1" in page and "<run>" not in page and SYNTHETIC_NOTE in page
  assert "nan" not in re.sub(r"base64,[^\"]*", "", page).lower() and "http" not in page.replace(
    "http-equiv", ""
  )


def test_a_report_that_fails_half_way_leaves_the_old_one_whole(tmp_path, monkeypatch, assembled):
  results, predictions, probe = assembled
  out = report.write(whole(results, predictions, probe), tmp_path / "r")
  before = {p.name: p.read_bytes() for p in out.iterdir()}
  changed = {**results, "checkpoint": "other"}

  def full(*_, **__):
    raise OSError("No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError):
      report.write(whole(changed, predictions, probe), out)
  replace = os.replace
  with monkeypatch.context() as patch:  # the very last rename fails
    patch.setattr(
      os, "replace", lambda a, b: full() if str(a).endswith(f".{os.getpid()}") else replace(a, b)
    )
    with pytest.raises(OSError):
      report.write(whole(changed, predictions, probe), out)
  assert {p.name: p.read_bytes() for p in out.iterdir()} == before
  report.write(whole(changed, predictions, probe), out)
  assert json.loads((out / "results.json").read_text())["checkpoint"] == "other"
  assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_a_folder_that_is_no_report_is_not_replaced(tmp_path, assembled):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(UserError, match="not a report"):
    report.write(whole(*assembled), tmp_path)
  assert (tmp_path / "thesis.tex").exists()


def test_table_is_short_and_aligned(assembled):
  lines = report.as_text(phenotypes.headline(assembled[0])).splitlines()
  assert len(lines) == 4 and max(map(len, lines)) < 100
  assert len({line.index("  ", line.index("]")) for line in lines[:3]}) == 1
  assert re.match(r"LVEDV +ml +0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]( +0\.\d{3}){3} +0\.800$", lines[1])
  assert lines[3].split()[2] == "-"
  alone = phenotypes.headline({"phenotypes": assembled[0]["phenotypes"]})
  assert report.as_text(alone).splitlines()[0].split()[-1] == "CI]"


def test_every_figure_draws_even_from_little(features, assembled):
  results, predictions, _ = assembled
  ill, said, _ = diseases.evaluate(features, ["HF", "CM"], draws=20)
  sick = said["y_true"], said, ill
  y = predictions["y_true"].copy()
  y[:, 2] = np.nan
  rng = np.random.default_rng(0)
  ecg = rng.normal(size=(12, 1000))
  records = [
    {"step": 0, "loss": 2.0, "val/LVEF": np.nan},
    {"step": 10, "loss": 1.0, "val/LVEDV": 0.3, "host": "a"},
  ]
  drawn = [
    figures.r2_bars({"phenotypes": results["phenotypes"]}),
    figures.r2_bars(results, "note"),
    figures.predicted_against_true(y, predictions["embedding"], results["phenotypes"], "note"),
    figures.reconstruction(ecg, ecg, rng.random(10) < 0.5, 100, note="note"),
    figures.reconstruction(ecg, ecg, rng.random((12, 10)) < 0.5, 100, leads=("aVR",)),
    figures.training_curves(records),
    figures.training_curves([]),
    figures.retrieval_ranks({"ecg_to_cmr": np.array([1, 1, 3])}, "note"),
    figures.bland_altman(
      y,
      predictions["embedding"],
      results["phenotypes"]
      | {"WT": results["phenotypes"]["WT"] | {"bias": np.nan, "limits": [np.nan, np.nan]}},
      "note",
    ),
    figures.roc_curves(*sick, "note"),
    figures.calibration(sick[2], "note"),
  ]
  for figure in drawn:
    assert isinstance(figure, Figure)
    figure.canvas.draw()
  titles = [axes.get_title() for axes in drawn[5].axes]
  assert titles == ["loss", "val"]
  # CM has too few cases
  assert [[axes.get_title() for axes in figure.axes] for figure in drawn[-2:]] == [["HF"], ["HF"]]
  roc = drawn[-2].axes[0].lines[0]
  known = np.isfinite(said["y_true"][:, 0])
  area = np.trapezoid(roc.get_ydata(), roc.get_xdata())
  assert area == pytest.approx(
    roc_auc_score(said["y_true"][known, 0], said["embedding"][known, 0]), abs=1e-12
  )
