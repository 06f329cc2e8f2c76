"""mmcl export: one file that runs where this package is not, and a model card that says what the
run knows."""

import hashlib
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import ROOT, python
from jax import export as jax_export
from mistakes import error_of
from scipy import signal

from mmcl_jax import configuration, export
from mmcl_jax.data import schema, synthetic
from mmcl_jax.data.preprocess import ecg as preprocess_ecg
from mmcl_jax.models import kernels, towers
from mmcl_jax.reports import model_card, report
from mmcl_jax.support.text import SYNTHETIC_NOTE
from mmcl_jax.training import restore

WIDTH, TOKENS = 16, 61  # of the `test` encoder: 12 leads x 500 samples in patches of 100, and CLS


@pytest.fixture(scope="module")
def workdir(evaluated, tmp_path_factory):
  """Trained for 6 steps and evaluated."""
  return shutil.copytree(evaluated, tmp_path_factory.mktemp("export") / "w")


@pytest.fixture(scope="module")
def results(workdir):
  return json.loads((workdir / "evaluation/6/results.json").read_text())


@pytest.fixture(scope="module")
def out(workdir):
  folder = workdir.parent / "out"
  export.main([f"--workdir={workdir}", f"--out={folder}"])
  return folder


@pytest.fixture(scope="module")
def card(out):
  return (out / "MODEL_CARD.md").read_text()


@pytest.fixture(scope="module")
def run(workdir):
  return restore.load_ecg_run(str(workdir))


@pytest.fixture
def at_hand(run, monkeypatch):
  """The run is not restored anew."""
  monkeypatch.setattr(restore, "load_ecg_run", lambda workdir, step: run._replace(step=step or 6))


@pytest.fixture
def copy(workdir, at_hand, tmp_path):
  """A workdir to spoil."""
  return shutil.copytree(workdir, tmp_path / "w")


def refused(capsys, *flags) -> str:
  """The one line of a mistake."""
  return error_of(export.main, flags, capsys)


# The file

ALONE = """
import sys
class Refuse:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in ("mmcl_jax", "flax", "ml_collections", "orbax", "optax", "clu"):
      raise ImportError(f"{name} is not to be had here")
sys.meta_path.insert(0, Refuse())
import numpy as np
from jax import export, jit
encoder = jit(export.deserialize(open(sys.argv[1], "rb").read()).call)
given = np.load(sys.argv[2])
np.savez(sys.argv[3], **{f"{name}{b}": x for b in (1, 7) for name, x in encoder(given[:b]).items()})
"""


def test_it_runs_where_this_package_is_not(workdir, out, tmp_path):
  """One file, batches of 1 and 7, against the encoder that `mmcl embed` uses and the probes in
  float64."""
  ecg = np.random.default_rng(0).normal(size=(7, 12, 5000)).astype(np.float32)
  np.save(tmp_path / "ecg.npy", ecg)
  python(ALONE, out / "encoder.stablehlo", tmp_path / "ecg.npy", tmp_path / "found.npz")
  found, encoder = np.load(tmp_path / "found.npz"), restore.load_encoder(str(workdir))
  probes = np.load(workdir / "evaluation/6/probes.npz")
  assert sorted(found) == ["embedding1", "embedding7", "phenotypes1", "phenotypes7"]
  for rows in (1, 7):
    embedding = encoder.embed(ecg[:rows])
    assert embedding.std() > 0.1
    np.testing.assert_allclose(found[f"embedding{rows}"], embedding, rtol=0, atol=1e-6)
    expected = embedding.astype(np.float64) @ probes["coef"] + probes["intercept"]
    np.testing.assert_allclose(found[f"phenotypes{rows}"], expected, rtol=1e-5, atol=1e-5)


def test_the_windows_of_a_recording_are_averaged(run, out):
  """Embedded one by one without the file: 10 windows of 500 samples."""
  ecg = np.random.default_rng(1).normal(size=(1, 12, 5000)).astype(np.float32)
  found = jax_export.deserialize((out / "encoder.stablehlo").read_bytes()).call(ecg)["embedding"]
  encode = jax.jit(
    lambda ecg: run.model.apply(run.state.variables, ecg, method="encode_ecg")["ecg_embedding"]
  )
  each = [encode(ecg[:, :, i : i + 500]) for i in range(0, 5000, 500)]
  np.testing.assert_allclose(found, np.mean(each, axis=0), atol=1e-6)


def test_it_holds_the_encoder_and_nothing_else(run, out):
  """No CMR tower, decoder or projection head goes out with it, and no path of this machine."""
  artefact, sizes = (out / "encoder.stablehlo").read_bytes(), 0
  for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(run.state.params)):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    ours = name.startswith("ecg/") and name.split("/")[1] not in ("decoder", "norm")
    sizes += x.size * ours
    if np.ptp(x) > 0:  # constants of one value are stored as one
      assert (x.tobytes() in artefact) == ours, name
  assert model_card.parameters(run.config) == sizes
  assert str(ROOT).encode() not in artefact and b".py" not in artefact


def test_parameters_are_the_published_ones():
  """MMCL's tiny encoder: 5.4 M (Turgut et al. 2025)."""
  config = configuration.recipe(str(ROOT / "configs/ecg_mae.py"), "tiny")
  config.model.towers.ecg.update(pool="attention", positions="sincos", siamese=False)
  config.model = towers.complete(config.model)
  assert config.data.samples == 2500 and config.model.towers.ecg.patch == 100
  attention = 4 * 384**2
  assert abs(model_card.parameters(config) - attention - 5.4e6) < 0.05e6


def test_platforms(workdir, at_hand, tmp_path):
  """Lowered here for each: own attention, whose division is of [N, D], on a CPU alone; JAX's, of
  [N, N], elsewhere."""
  made = {}
  for platforms in ("cpu", "tpu", "cpu,tpu,tpu", "rocm"):
    export.main(
      [f"--workdir={workdir}", f"--out={tmp_path / platforms}", f"--platforms={platforms}"]
    )
    made[platforms] = jax_export.deserialize(
      (tmp_path / platforms / "encoder.stablehlo").read_bytes()
    )
  assert [one.platforms for one in made.values()] == [("cpu",), ("tpu",), ("cpu", "tpu"), ("rocm",)]

  def has(shape):
    return [
      bool(re.search(rf"stablehlo.divide .*[<x]{shape}xf32>", one.mlir_module()))
      for one in made.values()
    ]

  assert has(rf"\?x2x{TOKENS}x8") == [True, False, True, False]
  assert has(rf"\?x2x{TOKENS}x{TOKENS}") == [False, True, True, True]
  ecg = np.ones((1, 12, 5000), np.float32)
  np.testing.assert_array_equal(
    *(made[name].call(ecg)["embedding"] for name in ("cpu", "cpu,tpu,tpu"))
  )
  with pytest.raises(ValueError, match="platform"):
    made["tpu"].call(ecg)


def test_a_gpu_at_hand_does_not_change_the_file():
  """cuDNN's attention stays out of a program for any number of rows."""
  gpu = kernels.Gpu((9, 0), 91200)

  def shape(rows):
    return jax.ShapeDtypeStruct((rows, 9, 4, 64), jnp.bfloat16)

  (rows,) = jax_export.symbolic_shape("batch")
  assert kernels.suits_cudnn(shape(2), shape(2), gpu) and not kernels.suits_cudnn(
    shape(rows), shape(rows), gpu
  )


def test_what_is_said_of_the_file(out, workdir, cohort):
  about, artefact = (
    json.loads((out / "export.json").read_text()),
    (out / "encoder.stablehlo").read_bytes(),
  )
  assert about["sha256"] == hashlib.sha256(artefact).hexdigest() and about["bytes"] == len(artefact)
  made = jax_export.deserialize(artefact)
  assert about["platforms"] == list(made.platforms) == ["cpu", "cuda", "tpu"]
  assert about["calling_convention_version"] == made.calling_convention_version
  assert about["input"]["shape"] == ["batch", 12, 5000] and about["input"]["dtype"] == "float32"
  assert about["input"]["leads"] == list(schema.LEADS) and about["input"]["rate_hz"] == 500
  assert about["outputs"]["embedding"] == {"dtype": "float32", "shape": ["batch", WIDTH]}
  phenotypes = about["outputs"]["phenotypes"]
  assert phenotypes["shape"] == ["batch", len(cohort.info["phenotypes"])]
  assert (
    dict(zip(phenotypes["names"], phenotypes["units"], strict=True)) == cohort.info["phenotypes"]
  )
  assert (
    about["step"] == 6 and about["research_only"] and about["packages"]["jax"] == jax.__version__
  )
  assert sorted(file.name for file in out.iterdir()) == [
    "MODEL_CARD.md",
    "encoder.stablehlo",
    "export.json",
  ]


def by_the_words(words, ecg, rate=500):
  """Carries out the steps of a profile as they are told, those with filters and scales."""
  for step in words[1:]:

    def found(pattern, step=step):
      return [float(x) for x in re.search(pattern, step).groups()]

    mirrored = re.search(r"mirrored for (\d) s", step)
    ends = {"padtype": "even", "padlen": int(mirrored[1]) * rate} if mirrored else {}
    if "scipy.signal.resample_poly" in step:
      ecg, rate = signal.resample_poly(ecg, 1, 2, axis=1, padtype="edge"), 250
    elif "scipy.signal.resample)" in step:
      ecg, rate = signal.resample(ecg, 2500, axis=1), 250
    elif step.startswith("notch filter at 60 Hz"):
      ecg = signal.filtfilt(*signal.iirnotch(60, found(r"Q (\d+)")[0], fs=rate), ecg)
    elif step.startswith("Savitzky-Golay"):
      ecg = signal.savgol_filter(ecg, *map(int, found(r"over (\d+) samples, order (\d)")))
    elif step.startswith("Butterworth"):
      kind = re.search("(band|high|low)-pass", step)[1] + "pass"
      (order,) = found(r"order (\d)")
      cut = found(r"([\d.]+) to ([\d.]+) Hz") if kind == "bandpass" else found(r"([\d.]+) Hz")[0]
      sos = signal.butter(int(order), cut, kind, fs=rate, output="sos")
      ecg = signal.sosfiltfilt(sos, ecg, **ends)
    elif step.startswith("divided by"):
      ecg = ecg / found(r"by ([\d.]+) mV")[0]
    else:
      sample, added = re.fullmatch(
        r"z-score \(mean and (sample )?standard deviation of all samples\)"
        r"(?:, (\S+) mV added to the standard deviation)?",
        step,
      ).groups()
      ecg = (ecg - ecg.mean()) / (ecg.std(ddof=int(bool(sample))) + float(added or 0))
  return ecg


@pytest.mark.parametrize("profile", ["minimal", "dual_phase", "cardionets", "cardionets_mirrored"])
def test_the_normalisation_can_be_done_as_it_is_told(profile):
  ecg, told = synthetic.subject(7, 0)["ecg"], preprocess_ecg.in_words(profile)
  made = by_the_words(told["steps"], ecg.astype(np.float64))
  assert (
    made.shape == (len(told["leads"]), told["samples"]) and told["samples"] == 10 * told["rate_hz"]
  )
  np.testing.assert_allclose(made, preprocess_ecg.normalise(ecg, profile), atol=1e-5)


# The card


def rows_of(card, heading):
  """{first cell: cells} of the table that a heading stands over."""
  body = card.partition(f"{heading}:\n\n")[2].partition("\n\n")[0].splitlines()
  cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body]
  return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


PHENOTYPES = "Phenotypes: R2 on test, and the MAE of the embedding in the phenotype's unit"


def test_the_sections_stand_in_mitchell_s_order(card):
  assert re.findall("^## (.*)$", card, re.MULTILINE) == [
    "Model details",
    "Intended use",
    "Factors",
    "Metrics",
    "Evaluation data",
    "Training data",
    "Quantitative analyses",
    "Ethical considerations",
    "Caveats and recommendations",
    "How to load it",
  ]


def test_the_card_has_the_figures_of_the_evaluation(card, results):
  found = rows_of(card, PHENOTYPES)
  assert list(found) == list(results["phenotypes"])
  for name, score in results["phenotypes"].items():
    r2, low, high = (round(x, 3) + 0.0 for x in (score["r2"], *score["r2_ci"]))
    assert [float(x) for x in re.findall(r"[-\d.]+", found[name]["R2 [95 % CI]"])] == [
      r2,
      low,
      high,
    ]
    assert (
      float(found[name]["MAE"]) == round(score["mae"], 3) and found[name]["unit"] == score["units"]
    )
    for column, model in (
      ("random", "random_encoder"),
      ("covariates", "covariates"),
      ("emb + cov", "with_covariates"),
    ):
      assert float(found[name][column]) == round(results["baselines"][model][name]["r2"], 3) + 0.0
  for name, counts in rows_of(card, "Diseases on test (few cases: counted, not scored)").items():
    assert int(counts["cases"]) == results["diseases"]["embedding"][name]["cases"]
  retrieval = rows_of(card, "Retrieval over the test split")
  assert float(retrieval["ecg to cmr"]["r@10"]) == pytest.approx(
    results["retrieval"]["ecg_to_cmr"]["r@10"], rel=5e-3
  )
  beats = sum(
    one["ci"][0] > 0 for one in results["differences"]["with_covariates_minus_covariates"].values()
  )
  assert f"over the covariates alone in {beats} of {len(found)} phenotypes" in " ".join(
    card.split()
  )


def test_the_card_says_what_it_rests_on(card, results, cohort, workdir, run):
  records = rows_of(card, "Records")
  assert {split: int(records["with CMR"][split]) for split in schema.SPLITS} == cohort.info[
    "with_cmr"
  ]
  labels = rows_of(card, "Known labels")
  assert {split: int(labels["LVM"][split]) for split in schema.SPLITS} == results["data"]["labels"][
    "LVM"
  ]
  assert int(rows_of(card, "What was read")["kept"]["records"]) == sum(results["counts"].values())
  text = " ".join(card.split())
  assert hashlib.sha256((workdir / "config.json").read_bytes()).hexdigest() in text
  assert (
    cohort.fingerprint in text and cohort.info["source"] in text and "Test was scored once" in text
  )
  assert (
    report.LIMITS.format(encoder="ECG") in text
    and model_card.RESEARCH_ONLY in text
    and SYNTHETIC_NOTE in text
  )
  assert "`dual_phase` (dual_phase, weight 1)" in text and "6 of 6 updates of 8 recordings" in text
  assert (
    str(cohort.path) not in card
    and str(workdir) not in card
    and not re.search(r"/(home|tmp|work|root|data)/", card)
  )


def test_the_loader_of_the_card_works_as_it_stands(card, out, monkeypatch):
  code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
  monkeypatch.chdir(out)
  names = {"ecg": np.zeros((2, 12, 5000), np.float32)}
  exec(code, names)  # noqa: S102 (three lines of our own)
  shapes = {name: list(x.shape) for name, x in names["outputs"].items()}
  assert shapes == {"embedding": [2, WIDTH], "phenotypes": [2, 12]}
  assert "{'embedding': [B, 16], 'phenotypes': [B, 12]}" in code


def test_diseases_that_were_scored_and_a_second_look(run, results):
  scored = {
    "cases": 40,
    "n": 300,
    "auroc": 0.7128,
    "auroc_ci": [0.61, 0.8],
    "auprc": 0.3,
    "auprc_ci": [0.2, 0.4],
  }
  few = {"cases": 3, "n": 300, "train_cases": 5}
  changed = results | {
    "diseases": {model: {"HF": scored, "A|F <b>": few} for model in ("embedding", "covariates")},
    "test_scored": 3,
    "seen_people": {"test": 2, "val": 0, "note": "2 of 4 test people"},
  }
  card = model_card.model_card(run.config, run.manifest, changed)
  found = rows_of(card, "Diseases on test (few cases: counted, not scored)")
  assert found["HF"]["AUROC embedding"] == "0.713 [0.610, 0.800]"
  assert found["A\\|F &lt;b>"]["AUROC embedding"] == "-"  # a name opens neither a cell nor a tag
  assert "scored 3 times" in card and "looks better here than it is" in card
  assert "**2 of 4 test people**" in card.partition("## ")[0]


def test_weights_from_elsewhere_and_another_cohort(run, results):
  """Converted weights: what they were trained on is not known, and the evaluation's cohort is not
  it."""
  manifest = run.manifest | {"origin": "signal_encoder.pth", "cohort": "", "step": 0}
  text = " ".join(model_card.model_card(run.config, manifest, results).split())
  assert (
    "the run does not know what they were trained on" in text
    and "converted from `signal_encoder.pth`" in text
  )
  assert "updates of" not in text and "was trained on, " not in text

  def section(name):
    return text.partition(f"## {name}")[2].partition(" ## ")[0]

  evaluation, training = section("Evaluation data"), section("Training data")
  assert (
    results["cohort_fingerprint"] in evaluation
    and "Known labels" in evaluation
    and "Known labels" not in training
  )


def test_an_evaluation_of_an_earlier_version(run, results):
  old = {
    name: x
    for name, x in results.items()
    if name not in ("data", "test_scored", "differences", "ceiling")
  }
  text = " ".join(model_card.model_card(run.config, run.manifest, old).split())
  assert "an unrecorded number of times" in text and "not recorded by that evaluation" in text
  assert "R2 is higher" not in text and "`ceiling`" not in text


def test_without_an_evaluation_no_metric_is_told(copy, tmp_path, capsys):
  shutil.rmtree(copy / "evaluation")
  export.main([f"--workdir={copy}", f"--out={tmp_path / 'out'}", "--platforms=cpu", "--step=3"])
  card, about = (
    (tmp_path / "out/MODEL_CARD.md").read_text(),
    json.loads((tmp_path / "out/export.json").read_text()),
  )
  assert (
    card.count("No metrics were measured") == 2 and "| R2" not in card and 'phenotypes"' not in card
  )
  assert list(about["outputs"]) == ["embedding"] and about["step"] == 3
  made = jax_export.deserialize((tmp_path / "out/encoder.stablehlo").read_bytes())
  assert list(made.call(np.zeros((1, 12, 5000), np.float32))) == ["embedding"]
  assert "mmcl evaluate" in capsys.readouterr().out


# Mistakes


@pytest.mark.parametrize("platforms", ["gpu", "cpu,", "cpu;tpu", ""])
def test_an_unknown_platform(workdir, tmp_path, capsys, platforms):
  error = refused(
    capsys, f"--workdir={workdir}", f"--out={tmp_path / 'out'}", f"--platforms={platforms}"
  )
  assert "expected some of cpu,cuda,rocm,tpu" in error and not list(tmp_path.iterdir())


def test_a_folder_that_is_no_export_is_left_alone(workdir, tmp_path, capsys):
  (tmp_path / "mine.txt").write_text("keep me")
  error = refused(capsys, f"--workdir={workdir}", f"--out={tmp_path}")
  assert "is not an export (it has no export.json)" in error
  assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
  assert "is not an export" in refused(
    capsys, f"--workdir={workdir}", f"--out={tmp_path / 'mine.txt'}"
  )
  assert "is not an export" in refused(capsys, f"--workdir={workdir}", f"--out={workdir}")


def test_an_earlier_export_is_replaced_whole_or_not_at_all(
  workdir, at_hand, tmp_path, capsys, monkeypatch
):
  flags = [f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--platforms=cpu"]
  export.main(flags)
  first = (tmp_path / "out/encoder.stablehlo").read_bytes()

  def crash(*_, **__):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    # after the encoder is written, before its description
    patch.setattr(pathlib.Path, "write_text", crash)
    assert "No space left" in refused(capsys, *flags, "--step=3")
  assert (tmp_path / "out/encoder.stablehlo").read_bytes() == first
  export.main(flags)  # the same run, the same file
  assert (tmp_path / "out/encoder.stablehlo").read_bytes() == first
  export.main([*flags, "--step=3"])
  assert json.loads((tmp_path / "out/export.json").read_text())["step"] == 3
  assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
  "spoil, words",
  [
    (
      lambda folder: (folder / "probes.npz").write_bytes(
        (folder / "probes.npz").read_bytes()[:300]
      ),
      "probes.npz",
    ),
    (
      lambda folder: np.savez(
        folder / "probes.npz",
        names=["LVM"],
        units=["g"],
        coef=np.ones((17, 1)),
        intercept=[0.0],
        half_width=[1.0],
      ),
      "width 17, the encoder gives 16",
    ),
    (
      lambda folder: np.savez(
        folder / "probes.npz",
        names=["LVM"],
        units=["g"],
        coef=np.ones((16, 2)),
        intercept=[0.0],
        half_width=[1.0],
      ),
      "expected [D, names]",
    ),
    (lambda folder: (folder / "probes.npz").unlink(), "only one of probes.npz and results.json"),
    (lambda folder: (folder / "results.json").unlink(), "only one of probes.npz and results.json"),
    (lambda folder: (folder / "results.json").write_text('{"phenotypes": {'), "cannot read"),
    (lambda folder: (folder / "results.json").write_text("{}"), "has no counts, no phenotypes"),
    (lambda folder: (folder / "results.json").write_text("3"), "cannot read"),
  ],
)
def test_a_damaged_evaluation_is_one_line(copy, tmp_path, capsys, spoil, words):
  spoil(copy / "evaluation/6")
  error = refused(capsys, f"--workdir={copy}", f"--out={tmp_path / 'out'}")
  assert words in error and [file.name for file in tmp_path.iterdir()] == ["w"]


@pytest.mark.parametrize(
  "change, words",
  [(dict(film=True), "also takes covariates"), (None, "has no ECG encoder")],
)
def test_encoders_that_an_ecg_alone_does_not_serve(
  run, tmp_path, capsys, monkeypatch, change, words
):
  config = run.config.copy_and_resolve_references()
  if change:
    config.model.towers.ecg.update(change)
  else:
    del config.model.towers["ecg"]
  monkeypatch.setattr(restore, "load_run", lambda workdir, step: run._replace(config=config))
  assert words in refused(capsys, "--workdir=w", f"--out={tmp_path / 'out'}")


def test_weights_beyond_the_format_are_refused_before_they_are_traced(
  workdir, at_hand, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(export, "MOST_BYTES", 1000)
  monkeypatch.setattr(export.export, "export", lambda *_, **__: pytest.fail("traced"))
  assert "GB of weights" in refused(capsys, f"--workdir={workdir}", f"--out={tmp_path / 'out'}")
