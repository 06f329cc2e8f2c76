"""Ways to read an embedding beside the linear probe, groups, few labels, incident disease: against
scikit-learn, scikit-survival and cases worked by hand."""

import re

import numpy as np
import pytest
from scipy.special import erf
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.neighbors import KNeighborsRegressor

from mmcl_jax.data import ukb_fields
from mmcl_jax.evaluators import (
  diseases,
  low_data,
  mlp,
  neighbours,
  phenotypes,
  retrieval,
  ridge,
  statistics,
  survival,
)
from mmcl_jax.evaluators.base import interval


def subjects(ids):
  return np.stack([np.asarray(ids), np.full(len(ids), 7)], axis=1).astype(np.uint32)


# neighbours


def test_neighbours_are_those_of_sklearn_with_the_best_number_on_validation():
  rng = np.random.default_rng(0)
  gallery, val, test = (retrieval.unit(rng.normal(size=(n, 4))) for n in (400, 80, 60))

  def truth(x):
    return np.stack([x[:, 0], np.sign(x[:, 1])], axis=1)

  labels, val_labels = (
    truth(x) + rng.normal(size=(len(x), 2)) * (0.2, 2.0) for x in (gallery, val)
  )
  found = neighbours.predict(gallery, labels, val, val_labels, test)
  for k in range(2):
    oracles = [
      KNeighborsRegressor(g, metric="cosine", algorithm="brute").fit(gallery, labels[:, k])
      for g in neighbours.NEIGHBOURS
    ]
    best = min(oracles, key=lambda oracle: ((oracle.predict(val) - val_labels[:, k]) ** 2).sum())
    for split, x in (("val", val), ("test", test)):
      np.testing.assert_allclose(found[split][:, k], best.predict(x), atol=1e-12)
  assert len({tuple(np.unique(found["test"][:, k]).round(6)) for k in range(2)}) == 2


def test_neighbours_without_a_label_do_not_count_and_blocks_change_nothing(monkeypatch):
  gallery = np.eye(3, dtype=np.float32)
  labels = np.array([[np.nan, 1.0], [4.0, np.nan], [6.0, np.nan]])
  queries = np.array([[1.0, 0.5, 0.1], [0.0, 0.1, 1.0]], np.float32)
  whole = neighbours.means(gallery, labels, queries)
  # the nearest alone; where it has none, everybody's mean
  np.testing.assert_allclose(whole[0], [[5.0, 1.0], [6.0, 1.0]])
  np.testing.assert_allclose(whole[1], [[5.0, 1.0], [5.0, 1.0]])  # all three
  monkeypatch.setattr(neighbours, "BLOCK_SCORES", 1)
  np.testing.assert_array_equal(neighbours.means(gallery, labels, queries), whole)


def test_without_a_validation_label_the_most_neighbours_speak():
  rng = np.random.default_rng(0)
  gallery, labels, test = (
    rng.normal(size=(350, 3)),
    rng.normal(size=(350, 1)),
    rng.normal(size=(5, 3)),
  )
  found = neighbours.predict(
    gallery, labels, rng.normal(size=(9, 3)), np.full((9, 1), np.nan), test
  )["test"]
  nearest = np.argsort(-(test @ gallery.T), axis=1)[:, :300]
  np.testing.assert_allclose(found, labels[nearest].mean(axis=1))


# the MLP


def test_the_mlp_is_two_gelu_layers_of_half_and_a_quarter_of_the_width():
  import jax

  params = jax.device_get(mlp.initial_params(jax.random.key(0), 576, 2))
  assert [params[f"fc{i}"]["kernel"].shape for i in range(3)] == [
    (2, 576, 288),
    (2, 288, 144),
    (2, 144, 1),
  ]
  # Glorot, of one label's layer
  assert abs(params["fc0"]["kernel"].std() / np.sqrt(2 / (576 + 288)) - 1) < 0.02
  x = np.random.default_rng(0).normal(size=(3, 576))

  def gelu(a):
    return a * (1 + erf(a / np.sqrt(2))) / 2

  for k in range(2):
    w = [params[f"fc{i}"]["kernel"][k].astype(float) for i in range(3)]
    expected = gelu(gelu(x @ w[0]) @ w[1]) @ w[2]
    np.testing.assert_allclose(
      mlp.forward(params, x.astype(np.float32))[:, k], expected[:, 0], rtol=2e-4, atol=2e-5
    )


@pytest.fixture(scope="module")
def bent():
  """Labels that a line cannot tell, in units of their own; the second is unknown to train, the
  third to half of the rows."""
  rng = np.random.default_rng(0)
  # wide, so that 30 epochs are enough
  x = [np.tile(rng.normal(size=(n, 4)), 8) for n in (1500, 300, 400)]
  y = [np.stack([140 + 30 * np.abs(a[:, 0]), a[:, 1], np.abs(a[:, 2])], axis=1) for a in x]
  y[0][:, 1], y[0][::2, 2] = np.nan, np.nan
  return x, y


def test_the_mlp_learns_what_a_line_cannot(bent, monkeypatch):
  (train, val, test), (y, y_val, y_test) = bent
  monkeypatch.setattr(mlp, "RATE", 1e-2)
  monkeypatch.setattr(mlp, "EPOCHS", 30)
  found = mlp.predict(train, y, val, y_val, test)
  line = ridge.predict(ridge.fit_probe(train, y, val, y_val), test)
  assert (
    statistics.r2(y_test[:, 0], line[:, 0])
    < 0.1
    < 0.9
    < statistics.r2(y_test[:, 0], found["test"][:, 0])
  )
  assert statistics.r2(y_test[:, 2], found["test"][:, 2]) > 0.9
  assert np.isnan(found["test"][:, 1]).all() and found["val"].shape == y_val.shape

  def sick(y):
    return (np.random.default_rng(1).random(len(y)) < 0.05 + 0.6 * (y[:, :1].T > 160)).T.astype(
      np.float32
    )

  said = mlp.predict(train, sick(y), val, sick(y_val), test, binary=True)["test"][:, 0]
  assert (
    roc_auc_score(sick(y_test)[:, 0], said) > 0.8 and abs(said.mean() - sick(y_test).mean()) < 0.05
  )


def test_labels_are_fitted_apart(bent, monkeypatch):
  (train, val, test), (y, y_val, _) = bent
  monkeypatch.setattr(mlp, "EPOCHS", 2)
  first = mlp.predict(train, y, val, y_val, test)["test"]
  y = y * (1, 1, -3) + (0, 0, 5)
  other = mlp.predict(train, y, val, y_val, test)["test"]
  np.testing.assert_array_equal(first[:, 0], other[:, 0])
  assert (first[:, 2] != other[:, 2]).all()


# groups, few labels


def test_every_cardiac_field_of_ukb_has_its_group():
  groups = phenotypes.grouped([field.name for field in ukb_fields.CARDIAC.values()])
  assert {group: len(names) for group, names in groups.items()} == {
    "left ventricle": 6,
    "right ventricle": 4,
    "atria": 8,
    "aorta": 6,
    "wall thickness": 17,
    "circumferential strain": 17,
    "radial strain": 17,
    "longitudinal strain": 7,
  }
  assert phenotypes.grouped(["LVM", "mine"]) == {"left ventricle": ["LVM"], "other": ["mine"]}


@pytest.fixture(scope="module")
def features():
  """Three splits: two LV phenotypes and one RV, two diseases (the second very rare), some people
  twice."""
  rng = np.random.default_rng(0)

  def split(n):
    hidden = rng.normal(size=(n, 3))
    y = hidden + 0.5 * rng.normal(size=(n, 3))
    y[rng.random((n, 3)) < 0.1] = np.nan
    sick = np.stack([hidden[:, 0] > 0.8, hidden[:, 1] > 2.8], axis=1).astype(np.float32)
    return {
      "subject": subjects(rng.integers(0, n * 3 // 4, n) + 10**6 * len(y)),
      "phenotypes": y.astype(np.float32),
      "diseases": sick,
      "covariates": rng.normal(size=(n, 1)).astype(np.float32),
      "embedding": (
        hidden @ rng.normal(size=(3, 6)) * 0
        + np.concatenate([hidden, rng.normal(size=(n, 3))], axis=1)
      ),
      "random_embedding": rng.normal(size=(n, 6)),
    }

  return {name: split(n) for name, n in {"train": 600, "val": 200, "test": 300}.items()}


NAMES = ["LVM", "LVEDV", "RVEDV"]


def test_groups_and_other_readouts_are_scored_like_the_probe(features):
  y = features["test"]["phenotypes"].astype(np.float64)
  guess = np.nan_to_num(y) + np.random.default_rng(1).normal(size=y.shape)
  results, predictions, _ = phenotypes.evaluate(
    features, NAMES, ["g", "ml", "ml"], {"knn": guess}, draws=200
  )
  assert results["group_members"] == {
    "left ventricle": ["LVM", "LVEDV"],
    "right ventricle": ["RVEDV"],
  }
  known = np.isfinite(y)

  def r2(x, k):
    return r2_score(y[known[:, k], k], x[known[:, k], k])

  for model, x in (("knn", guess), ("embedding", predictions["embedding"])):
    group = results["groups"][model]["left ventricle"]
    assert group["value"] == pytest.approx((r2(x, 0) + r2(x, 1)) / 2, abs=1e-12)
    assert group["ci"][0] < group["value"] < group["ci"][1]
    assert results["groups"][model]["right ventricle"]["value"] == pytest.approx(
      r2(x, 2), abs=1e-12
    )
  assert results["readouts"]["knn"]["RVEDV"]["r2"] == pytest.approx(r2(guess, 2), abs=1e-12)
  assert (
    "strength" not in results["readouts"]["knn"]["LVM"]
    and "strength" in results["phenotypes"]["LVM"]
  )
  assert set(results["baselines"]) == {"random_encoder", "covariates", "with_covariates"}
  table = phenotypes.group_table(results)
  assert table.head[:3] == ["group", "phenotypes", "embedding"] and table.rows[0][:2] == [
    "left ventricle",
    "2",
  ]
  assert phenotypes.readout_table(results).rows[2][2] == interval(
    r2(guess, 2), results["readouts"]["knn"]["RVEDV"]["r2_ci"]
  )


def test_probabilities_fitted_elsewhere_are_scored_at_their_own_threshold(features):
  noise = np.random.default_rng(0).normal(size=(300, 2))
  said = {
    "val": np.full((200, 2), 0.2),
    "test": np.clip(0.3 * features["test"]["diseases"] + 0.1 * np.abs(noise), 0, 1),
  }
  results, predictions, _ = diseases.evaluate(features, ["HF", "CM"], {"mlp": said}, draws=50)
  assert results["mlp"]["HF"]["auroc"] == pytest.approx(
    roc_auc_score(features["test"]["diseases"][:, 0], said["test"][:, 0])
  )
  assert (
    results["mlp"]["HF"]["threshold"] == 0.2
    and "C" not in results["mlp"]["HF"]
    and "C" in results["embedding"]["HF"]
  )
  np.testing.assert_array_equal(predictions["mlp"], said["test"])


def test_few_labels_are_those_of_whole_subjects_and_all_of_them_give_the_probe(features):
  groups, scored = {"left ventricle": [0, 1], "right ventricle": [2]}, [0]
  everybody = np.ones(len(features["train"]["subject"]), bool)
  fitted = {
    model: low_data.scores(x, features, everybody, groups, scored)
    for model, x in ridge.inputs(features).items()
    if model in low_data.MODELS
  }
  curves = low_data.evaluate(features, groups, scored, fitted)
  assert set(curves) == {"embedding", "random_encoder", "covariates"}
  people = len(np.unique(features["train"]["subject"], axis=0))
  for found in curves["embedding"].values():
    assert [point["subjects"] for point in found] == [
      round(0.01 * people),
      round(0.1 * people),
      people,
    ]
    assert [point["seeds"] for point in found] == [5, 5, 1] and found[0]["sd"] > 0
    assert found[0]["mean"] < found[1]["mean"] < found[2]["mean"]
  whole, _, _ = phenotypes.evaluate(features, NAMES, [""] * 3, draws=10)
  ill, _, _ = diseases.evaluate(features, ["HF", "CM"], draws=10)
  for group in groups:
    assert curves["embedding"][group][-1]["mean"] == pytest.approx(
      whole["groups"]["embedding"][group]["value"], abs=1e-12
    )
  assert curves["embedding"]["diseases (AUROC)"][-1]["mean"] == pytest.approx(
    ill["embedding"]["HF"]["auroc"], abs=1e-12
  )
  rows = features["train"]["diseases"][:, 0] == 0  # a subset without a case
  assert (
    low_data.scores(ridge.inputs(features)["embedding"], features, rows, groups, scored)[-1] == 0.5
  )


# incident disease


def test_who_is_at_risk_and_for_how_long():
  nan = np.nan
  first = [[2.0], [-1.0], [nan], [7.0], [nan], [nan], [3.0], [0.0]]
  sick = [[1.0], [1.0], [0.0], [1.0], [1.0], [nan], [nan], [1.0]]
  features = {
    "event_years": np.array(first),
    "followed_years": np.array([5.0, 5, 5, 5, 5, 5, nan, 5]),
    "diseases": np.array(sick),
  }
  years, happened = survival.times(features)
  # event; had it before; free to the end; after the end; no date; not known; not followed; on the
  # day of the visit
  np.testing.assert_array_equal(years[:, 0], [2, nan, 5, 5, nan, nan, nan, nan])
  np.testing.assert_array_equal(happened[:, 0], [True] + [False] * 7)


def censored(rng, n, signal=1.0):
  """Exponential times whose log hazard is the first feature, censored, on a coarse grid so that
  there are ties."""
  x = rng.normal(size=(n, 5))
  event, end = (
    np.ceil(4 * rng.exponential(6 * np.exp(-signal * x[:, 0]))) / 4,
    np.ceil(4 * rng.uniform(0, 5, n)) / 4,
  )
  return {
    "subject": subjects(np.arange(n)),
    "embedding": x,
    "phenotypes": np.zeros((n, 1)),
    "followed_years": end,
    "diseases": np.stack([event <= end, np.zeros(n)], axis=1).astype(np.float32),
    "event_years": np.stack([np.where(event <= end, event, np.nan), np.full(n, np.nan)], axis=1),
  }


def test_the_c_index_is_that_of_scikit_survival_with_ties_and_draws():
  metrics = pytest.importorskip("sksurv.metrics")
  rng = np.random.default_rng(0)
  x = censored(rng, 300)
  years, happened = (found[:, 0] for found in survival.times(x))
  risk = np.round(x["embedding"][:, 0] + rng.normal(size=300), 1)
  value = statistics.c_index(years, happened, risk)
  assert value == pytest.approx(
    metrics.concordance_index_censored(happened, years, risk)[0], abs=1e-12
  )
  weights = statistics.bootstrap_weights(x["subject"], 20, seed=0)
  for score, times in zip(statistics.c_index(years, happened, risk, weights), weights.astype(int)):
    # a row and its copy are tied in time: no pair where both had the event
    rows = np.repeat(np.arange(300), times)
    assert score == pytest.approx(
      metrics.concordance_index_censored(happened[rows], years[rows], risk[rows])[0], abs=1e-12
    )
  assert np.isnan(statistics.c_index(years, np.zeros(300, bool), risk))


def test_cox_is_scored_on_test_and_few_events_are_only_counted():
  pytest.importorskip("sksurv")
  from sksurv.linear_model import CoxPHSurvivalAnalysis
  from sksurv.metrics import concordance_index_censored
  from sksurv.util import Surv

  rng = np.random.default_rng(0)
  features = {
    split: censored(rng, n) for split, n in {"train": 500, "val": 200, "test": 300}.items()
  }
  results, predictions = survival.evaluate(features, ["HF", "none"], draws=200)
  found = results["embedding"]["HF"]
  assert (
    found["c_index"] > 0.65 and found["c_index_ci"][0] < found["c_index"] < found["c_index_ci"][1]
  )
  train, test = features["train"], features["test"]
  mean, sd = train["embedding"].mean(axis=0), train["embedding"].std(axis=0)
  years, happened = (x[:, 0] for x in survival.times(train))
  oracle = CoxPHSurvivalAnalysis(alpha=found["strength"], ties="efron").fit(
    (train["embedding"] - mean) / sd, Surv.from_arrays(happened, years)
  )
  risk = oracle.predict((test["embedding"] - mean) / sd)
  np.testing.assert_allclose(predictions["embedding"][:, 0], risk, atol=1e-9)
  years, happened = (x[:, 0] for x in survival.times(test))
  assert found["c_index"] == pytest.approx(
    concordance_index_censored(happened, years, risk)[0], abs=1e-12
  )
  assert found["events"] == happened.sum() and "c_index" not in results["embedding"]["none"]
  assert np.isnan(predictions["embedding"][:, 1]).all()
  rows = survival.table(results).rows
  assert rows[0][0] == "HF" and rows[1][-1] == "-" and re.match(r"0\.\d{3} \[", rows[0][-1])


def test_what_a_subset_knows_nothing_of_counts_as_its_mean_and_who_has_no_label_is_not_drawn(
  features,
):
  rows = features["train"]["subject"][:, 0] % 5 > 0
  train = {name: x.copy() for name, x in features["train"].items()}
  train["phenotypes"][~rows], train["diseases"][~rows] = np.nan, np.nan
  few = features | {"train": train}
  curves = low_data.evaluate(
    few, {"left ventricle": [0, 1]}, [], dict.fromkeys(low_data.MODELS, [0.0])
  )
  people = len(np.unique(train["subject"][rows], axis=0))
  assert [point["subjects"] for point in curves["embedding"]["left ventricle"]] == [
    round(0.01 * people),
    round(0.1 * people),
    people,
  ]
  train["phenotypes"][:, 1] = np.nan
  both, one = low_data.scores(
    ridge.inputs(few)["embedding"], few, rows, {"both": [0, 1], "one": [0]}, []
  )
  assert both == pytest.approx(one / 2, abs=1e-12) and one > 0.3


def test_few_rows_leave_fewer_components():
  rng = np.random.default_rng(0)
  assert survival.components(
    {"train": rng.normal(size=(50, 100)), "test": rng.normal(size=(3, 100))}
  )["test"].shape == (3, 50)


def test_many_features_are_reduced_by_components_of_train():
  rng = np.random.default_rng(0)
  x = {
    split: rng.normal(size=(n, 100)) @ np.diag(np.r_[np.full(3, 9.0), np.ones(97)])
    for split, n in (("train", 300), ("test", 40))
  }
  z = survival.components(x)
  assert z["train"].shape == (300, survival.COMPONENTS) and z["test"].shape == (
    40,
    survival.COMPONENTS,
  )
  covariance = np.cov(z["train"].T)
  np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=1e-9)
