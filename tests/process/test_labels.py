"""Cohorts with dates of disease, with diseases alone and without any label, as a user runs the
programs on them."""

import argparse
import functools
import json
import pathlib
import shutil

import numpy as np
import pandas as pd
import pytest
from common import ROOT, SHARES, SUBJECTS, only_evaluators
from recordings import write_wfdb
from sklearn.metrics import roc_auc_score

from mmcl_jax import compare, embed, evaluate, export, train
from mmcl_jax.data import builder, schema, synthetic
from mmcl_jax.data.sources import synthetic as source
from mmcl_jax.errors import UserError
from mmcl_jax.evaluators import diseases, setup, survival
from mmcl_jax.training import people


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
  """Trained for 6 steps."""
  return shutil.copytree(trained[0], tmp_path_factory.mktemp("labels") / "w")


def dated(item, seed=8):
  """A synthetic ECG with dates, without a CMR: every eighth had AF before the visit, of the others
  it comes to 6 in 10."""
  record, flags = source.read(seed, False, item)
  record = {
    name: x
    for name, x in record.items()
    if name not in ("ed_es_volumes", "labels", "cine_slice", "three_frames", "spacing")
  }
  sick, years = item.key % 8 == 0, np.random.default_rng(item.key).exponential(5)
  record["diseases"] = np.where(np.array(schema.DISEASES) == "AF", float(sick), 0).astype(
    np.float32
  )
  first = -1.0 if sick else years if years <= 5 else np.nan
  record["event_years"] = np.where(np.array(schema.DISEASES) == "AF", first, np.nan).astype(
    np.float32
  )
  return record | {"has_cmr": np.False_, "followed_years": np.float32(5)}, flags


@pytest.mark.reported("people that a run had trained on came back as test people of another cohort")
def test_a_cohort_with_dates_is_scored_for_incident_disease_and_people_seen_in_training_are_told(
  workdir, cohort, tmp_path, monkeypatch, capsys
):
  metrics = pytest.importorskip("sksurv.metrics")
  # the people of training, split otherwise
  plan = source.plan(argparse.Namespace(subjects=SUBJECTS, seed=7))
  plan = plan._replace(read=functools.partial(dated, seed=7))
  trained = people.hashes(cohort)["train"]
  cohort = builder.build(
    str(tmp_path / "dated"), plan, shares=(0.3, 0.1, 0.6), profile="minimal", processes=1
  )
  only_evaluators(monkeypatch, "phenotypes", "survival")
  monkeypatch.setattr(survival, "FEWEST_EVENTS", 5)  # of half of them in test
  flags = [f"--workdir={workdir}", f"--cohort={cohort.path}", "--step=3"]
  seen = {split: np.isin(found, trained).sum() for split, found in people.hashes(cohort).items()}
  told = " and ".join(
    f"{seen[split]} of {cohort.info['counts'][split]} {split} people"
    for split in ("test", "val")
    if seen[split]
  )
  with pytest.raises(
    UserError, match=f"^{told} of .*dated had part in the training of .* or --allow_seen to go on"
  ):
    evaluate.main(flags)
  out = workdir / "evaluation/3-dated"
  assert not out.exists()
  evaluate.main([*flags, "--allow_seen"])
  told = f"{told} of the cohort had part in training"
  assert told in capsys.readouterr().out and told in (out / "report.html").read_text()
  assert json.loads((out / "results.json").read_text())["seen_people"]["test"] == seen["test"] > 0
  assert told in str(np.load(out / "probes.npz")["note"])
  found, saved = (
    json.loads((out / "results.json").read_text())["survival"],
    np.load(out / "predictions.npz"),
  )
  af, test = schema.DISEASES.index("AF"), cohort.splits["test"]
  records = [test[i] for i in range(len(test))]
  risk = [r for r in records if r["diseases"][af] == 0]
  assert found.keys() == {"embedding", "random_encoder", "covariates", "with_covariates"}
  for model, scores in found.items():
    of = np.isfinite(years := saved["survival_years"][:, af])
    happened = saved["survival_happened"][of, af]
    assert scores["AF"]["n"] == of.sum() == len(risk)
    assert (
      scores["AF"]["events"]
      == happened.sum()
      == sum(np.isfinite(r["event_years"][af]) for r in risk)
      >= 5
    )
    oracle = metrics.concordance_index_censored(
      happened, years[of], saved[f"survival_{model}"][of, af]
    )[0]
    assert scores["AF"]["c_index"] == pytest.approx(oracle, abs=1e-12)
    assert scores["HF"]["events"] == 0 and "c_index" not in scores["HF"]
  assert "Incident disease" in (out / "report.html").read_text()


def diagnosed(item):
  """A synthetic ECG with diseases alone, as of PTB-XL: neither phenotypes nor a CMR; every other
  one has AF."""
  record, flags = dated(item)
  record = {
    name: x
    for name, x in record.items()
    if name not in ("event_years", "followed_years", "ecg_parameters")
  }
  record["diseases"] = np.where(np.array(schema.DISEASES) == "AF", float(item.key % 2), 0).astype(
    np.float32
  )
  return record | {"phenotypes": np.zeros(0, np.float32)}, flags


@pytest.fixture(scope="module")
def ptb(tmp_path_factory):
  plan = source.plan(argparse.Namespace(subjects=SUBJECTS, seed=9))
  plan = plan._replace(read=diagnosed, info=plan.info | {"phenotypes": {}})
  return builder.build(
    str(tmp_path_factory.mktemp("data") / "ptb"),
    plan,
    shares=SHARES,
    profile="minimal",
    processes=1,
  )


@pytest.fixture(scope="module")
def ptb_run(ptb, tmp_path_factory):
  """Trained on diseases for 6 steps and evaluated on them, the report beside the workdir."""
  out = tmp_path_factory.mktemp("ptb") / "w"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(diseases, "FEWEST_TEST_CASES", 3)
    train.main(
      [
        f"--config={ROOT}/configs/supervised.py:test,task=diseases",
        f"--workdir={out}",
        f"--config.data.cohort={ptb.path}",
      ]
    )
    only_evaluators(patch, "phenotypes", "diseases", "low_data", "data")
    evaluate.main([f"--workdir={out}", f"--out={out}-report"])
  return out


@pytest.mark.reported("a cohort of ECGs with diseases but no phenotypes could not be evaluated")
def test_a_cohort_with_diseases_alone_is_scored(ptb_run, ptb):
  report = pathlib.Path(f"{ptb_run}-report")
  found, saved = (
    json.loads((report / "results.json").read_text()),
    np.load(report / "predictions.npz"),
  )
  assert found["phenotypes"] == {} and found["cohort_fingerprint"] == ptb.fingerprint
  af = list(found["diseases"]["embedding"]).index("AF")
  for model in ("embedding", "random_encoder", "covariates", "own_head", "knn", "mlp"):
    oracle = roc_auc_score(saved["disease_y_true"][:, af], saved[f"disease_{model}"][:, af])
    assert found["diseases"][model]["AF"]["auroc"] == pytest.approx(oracle, abs=1e-12)
  assert (
    found["low_data"]["embedding"]["diseases (AUROC)"][-1]["mean"]
    == found["diseases"]["embedding"]["AF"]["auroc"]
  )
  page = (report / "report.html").read_text()
  assert (
    "Diseases from the ECG" in page and "Phenotypes from" not in page and "read-outs" not in page
  )
  assert {"roc_curves.png", "calibration.png", "low_data.png"} <= {f.name for f in report.iterdir()}
  assert not (report / "r2.png").exists()
  assert (
    found["test_scored"] == 1
    and len((ptb_run / "evaluation/scored.jsonl").read_text().splitlines()) == 1
  )


def test_without_phenotypes_the_other_programs_say_what_is_true(ptb_run, tmp_path, capsys):
  report = f"{ptb_run}-report"
  (tmp_path / "in").mkdir()
  write_wfdb(tmp_path / "in", "one", synthetic.subject(9, 0)["ecg"])
  embed.main(
    [
      f"--workdir={ptb_run}",
      f"--input={tmp_path / 'in'}",
      f"--out={tmp_path / 'emb'}",
      f"--evaluation={report}",
    ]
  )
  assert "no phenotypes will be predicted" in capsys.readouterr().out
  assert list(pd.read_parquet(tmp_path / "emb").columns) == [
    "path",
    "status",
    "reason",
    "flags",
    "embedding",
  ]
  export.main(
    [
      f"--workdir={ptb_run}",
      f"--out={tmp_path / 'exported'}",
      f"--evaluation={report}",
      "--platforms=cpu",
    ]
  )
  assert list(json.loads((tmp_path / "exported/export.json").read_text())["outputs"]) == [
    "embedding"
  ]
  card = (tmp_path / "exported/MODEL_CARD.md").read_text()
  assert "| AF |" in card and "R2" not in card and "'phenotypes'" not in card
  text = compare.compare([report, report], str(tmp_path / "compared"))
  assert "AF" in text and "phenotype " not in text
  assert sorted(f.name for f in (tmp_path / "compared").iterdir()) == [
    "auroc.png",
    "report.html",
    "results.json",
  ]


def test_an_evaluation_of_another_run_is_refused(ptb_run, workdir, tmp_path):
  for program in (embed, export):
    flags = [f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--step=6"] + ["--input=x"] * (
      program is embed
    )
    for given, words in (
      (f"{ptb_run}-report", "is of another checkpoint than step 6"),
      (tmp_path, "is not what"),
    ):
      with pytest.raises(UserError, match=words):
        program.main([*flags, f"--evaluation={given}"])


def test_a_cohort_without_any_label_is_refused_before_the_work(workdir, ptb, monkeypatch):
  monkeypatch.setattr(
    setup.cohort_lib, "load", lambda path: ptb._replace(info=ptb.info | {"diseases": []})
  )
  with pytest.raises(
    UserError, match="has no phenotypes and no diseases; evaluation fits on train"
  ):
    evaluate.main([f"--workdir={workdir}", "--cohort=any"])
