"""Every recipe trains for two steps at its smallest, and its stages chain."""

import types

import jax
import numpy as np
import pytest

from recipes import configure, leaves
from mmcl_jax import prepare, train
from mmcl_jax.errors import UserError
from mmcl_jax.training import initialise, metrics

# stage -> recipe with its argument, modules and the stages they start from, objectives
SMALL = "test,steps=2"
STAGES = {
  "mae": (f"ecg_mae:{SMALL}", {}, {"reconstruction", "siamese"}),
  "simclr": (f"cmr_simclr:{SMALL}", {}, {"simclr"}),
  "mmcl": (f"mmcl:{SMALL}", {"ecg": "mae", "cmr_image": "simclr"}, {"contrastive"}),
  "wo_mdm": (f"mmcl:{SMALL},arm=wo_mdm", {"cmr_image": "simclr"}, {"contrastive"}),
  "ed": (f"cmr_phenotype:{SMALL}", {}, {"phenotypes"}),
  "es": (f"cmr_phenotype:{SMALL},view=es_volume,targets=3", {}, {"phenotypes"}),
  "slice": (f"cmr_phenotype:{SMALL},view=ed_slice", {}, {"phenotypes"}),
  "cine": (f"cmr_phenotype:{SMALL},view=cine_slice,targets=all", {}, {"phenotypes"}),
  "dual": (f"dual_phase:{SMALL}", {"ecg": "mae", "cmr_ed": "ed", "cmr_es": "es"}, {"dual_phase"}),
  "arm_ecg_only": (
    f"arms:{SMALL},arm=ecg_only",
    {"ecg": "mae"},
    {"reconstruction", "siamese"},
  ),
  "arm_ed_slice": (
    f"arms:{SMALL},arm=ed_slice",
    {"ecg": "mae", "cmr_slice": "slice"},
    {"contrastive"},
  ),
  "arm_cine_slice": (
    f"arms:{SMALL},arm=cine_slice",
    {"ecg": "mae", "cmr_cine": "cine"},
    {"contrastive"},
  ),
  "arm_ed_volume": (f"arms:{SMALL},arm=ed_volume", {"ecg": "mae", "cmr_ed": "ed"}, {"contrastive"}),
  "cardiacnets_cmr": (f"cardiacnets:{SMALL},stage=cmr", {}, {"sax_mim", "lax_mim", "sax_lax"}),
  "cardiacnets_ecg": (f"cardiacnets:{SMALL},stage=ecg", {}, {"reconstruction"}),
  "cardiacnets": (
    f"cardiacnets:{SMALL},stage=align",
    {"ecg": "cardiacnets_ecg", "cmr_sax": "cardiacnets_cmr", "cmr_lax": "cardiacnets_cmr"},
    {"ecg_sax", "ecg_lax"},
  ),
  "cardionets_cmr": (f"cardionets:{SMALL},stage=cmr", {}, {"video"}),
  "cardionets_ecg": (f"cardionets:{SMALL},stage=ecg", {}, {"reconstruction"}),
  "cardionets": (
    f"cardionets:{SMALL},stage=align",
    {"ecg": "cardionets_ecg", "cmr_cine": "cardionets_cmr"},
    {"contrastive"},
  ),
  "supervised": (f"supervised:{SMALL}", {}, {"phenotypes"}),
  "tuned": (f"supervised:{SMALL},start=pretrained", {"ecg": "mmcl"}, {"phenotypes"}),
  "diagnosed": (f"supervised:{SMALL},task=diseases", {}, {"diseases"}),
  "tuned_medium": (f"supervised:{SMALL},start=pretrained", {"ecg": "mae"}, {"phenotypes"}),
  "joint": (f"joint:{SMALL}", {}, {"reconstruction", "dual_phase"}),
  "autoencoder": (f"cmr_autoencoder:{SMALL}", {}, {"autoencoder"}),
  "segmenter": (f"cmr_segmenter:{SMALL}", {}, {"segmentation"}),
  "generator": (
    f"ecg_to_cmr:{SMALL}",
    {"ecg": "joint", "tokenizer": "autoencoder", "segmenter": "segmenter"},
    {"flow"},
  ),
}
GENERATION = {"autoencoder", "segmenter", "generator"}  # stages without an embedding to probe
CHAINED = [name for name, (_, sources, _) in STAGES.items() if sources]
FROZEN = {
  "dual": {"ed", "es"},
  "arm_ed_slice": {"slice"},
  "arm_cine_slice": {"cine"},
  "arm_ed_volume": {"ed"},
  "cardiacnets": {"sax", "lax"},
  "cardionets": {"cine"},
}
# stage -> what of the modules it starts from is fresh, and what it leaves behind: the first two
# parts of the paths
AUTOENCODER = {"ecg/decoder", "ecg/norm"}
OF_MAE = AUTOENCODER | {"ecg/siamese_predictor", "ecg/siamese_projector"}
FRESH = {
  "dual": {"ecg/head"},
  "arm_ed_slice": {"ecg/head"},
  "arm_cine_slice": {"ecg/head"},
  "arm_ed_volume": {"ecg/head"},
  "cardiacnets": {"ecg/film"},
  "tuned": {"ecg/pool"},
  "tuned_medium": {"ecg/pool"},
}
LEFT = {
  **dict.fromkeys(("mmcl", "dual", "arm_ed_slice", "arm_cine_slice", "arm_ed_volume"), OF_MAE),
  "wo_mdm": set(),
  "arm_ecg_only": set(),
  "tuned": set(),
  "tuned_medium": OF_MAE,
  "cardiacnets": {"ecg/decoder", "cmr_sax/backbone/decoder", "cmr_lax/backbone/decoder"},
  "cardionets": AUTOENCODER | {"cmr_cine/backbone/decoder"},
}


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
  """Compiling is most of the time here, and no number of this file hangs on how well it is done."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def lax_cohort(tmp_path_factory):
  """One cohort for all recipes."""
  out = tmp_path_factory.mktemp("lax") / "cohort"
  prepare.main(
    [
      "synthetic",
      "--subjects=40",
      "--seed=9",
      "--lax",
      "--split=0.6,0.3,0.1",
      f"--out={out}",
      "--processes=2",
    ]
  )
  return str(out)


@pytest.fixture(scope="module")
def walk(lax_cohort, tmp_path_factory):
  """name of STAGES -> what it started from, fresh and with earlier stages, what it ended with, and
  its workdir.

  By the command line, after the stages it needs; each is walked once.
  """
  root, walked = tmp_path_factory.mktemp("stages"), {}

  def go(name):
    if name in walked:
      return walked[name]
    recipe, sources, _ = STAGES[name]
    for source in sources.values():
      go(source)
    seen = types.SimpleNamespace(workdir=root / name)

    def load_pretrained(state, config, load, real=initialise.load_pretrained):
      seen.fresh = jax.device_get(state.variables)
      state, seen.report = real(state, config, load)
      seen.start = jax.device_get(state.variables)
      return state, seen.report

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(initialise, "load_pretrained", load_pretrained)
      seen.config = configure(
        recipe,
        f"--config.data.cohort={lax_cohort}",
        "--config.every.log=1",
        *(f"--config.init_from.{module}={root / source}" for module, source in sources.items()),
      )
      seen.end = jax.device_get(train.train(seen.config, str(seen.workdir)).variables)
    walked[name] = seen
    return seen

  return go


def parts(paths, module):
  """Where the paths lie: MODULE/PART, or cmr_NAME/backbone/PART."""
  found = [path.split("/")[1:] for path in paths]
  return {"/".join([module, *(path[:2] if path[0] == "backbone" else path[:1])]) for path in found}


@pytest.mark.parametrize("name", STAGES)
def test_the_objectives_are_minimised(walk, name):
  """Two steps and the evaluators: every objective of the recipe in the log, and nothing that is not
  finite."""
  records = metrics.read(walk(name).workdir / "metrics.jsonl")
  trained = [record for record in records if "loss" in record]
  assert [record["step"] for record in trained] == [1, 2]
  for record in trained:
    logged = {key.removesuffix("/loss") for key in record if key.endswith("/loss")}
    assert logged == STAGES[name][2]
    assert all(np.isfinite(value) for value in record.values())
    assert record["gradient_norm"] > 0
  validated = {key for record in records for key in record}
  probed = set() if name in GENERATION else {"validation/r2/LVM"}
  assert {f"validation/{objective}" for objective in STAGES[name][2]} | probed <= validated


@pytest.mark.parametrize("name", CHAINED)
def test_a_stage_starts_where_the_earlier_ones_ended(walk, name):
  seen, fresh, left = walk(name), set(), set()
  for module, source in STAGES[name][1].items():
    before, after, random = (
      leaves(walk(source).end, module),
      leaves(seen.start, module),
      leaves(seen.fresh, module),
    )
    for path in before.keys() & after.keys():
      np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    for path in after.keys() - before.keys():
      np.testing.assert_array_equal(after[path], random[path], err_msg=path)
    assert any(not np.array_equal(after[path], random[path]) for path in after), (
      "the earlier stage has learned nothing"
    )
    fresh |= parts(after.keys() - before.keys(), module)
    left |= parts(before.keys() - after.keys(), module)
  assert fresh == FRESH.get(name, set())
  assert left == LEFT.get(name, AUTOENCODER)


@pytest.mark.parametrize("name", CHAINED)
def test_frozen_encoders_stay_as_they_are_and_all_else_learns(walk, name):
  seen = walk(name)
  assert {
    tower for tower, spec in seen.config.model.towers.items() if spec.get("frozen")
  } == FROZEN.get(name, set())
  modules = [
    module
    for module in seen.start["params"]
    if module in (*STAGES[name][1], "generator") or module.startswith("cmr_")
  ]
  for module in modules:
    start, end = leaves(seen.start, module), leaves(seen.end, module)
    for path in start:
      backbone = (
        module.removeprefix("cmr_") in FROZEN.get(name, ()) and path.split("/")[1] == "backbone"
      )
      if backbone or (name == "generator" and module != "generator"):
        np.testing.assert_array_equal(end[path], start[path], err_msg=path)
      else:
        assert not np.array_equal(end[path], start[path]) or unused(path, name), path


def unused(path, name):
  """The only weights that two steps may leave: norms that this stage's objectives do not read; what
  lies behind gates of 0."""
  return (name == "arm_ecg_only" and path.startswith("params/fc_norm/")) or (
    name == "generator" and not path.startswith("params/velocity/")
  )


def test_a_frozen_stage_cannot_start_without_its_encoder(lax_cohort, walk, tmp_path):
  flags = [
    f"--config.data.cohort={lax_cohort}",
    f"--config.init_from.ecg={walk('mae').workdir}",
    f"--config.init_from.cmr_ed={walk('ed').workdir}",
  ]
  with pytest.raises(UserError, match="towers.es.frozen would freeze random weights"):
    train.train(configure(f"dual_phase:{SMALL}", *flags), str(tmp_path / "w"))
  # nor without the ECG encoder that it names
  with pytest.raises(UserError, match="matches no parameter of cmr_ed"):
    train.train(configure(f"arms:{SMALL},arm=ed_volume", flags[0], flags[2]), str(tmp_path / "w"))
  with pytest.raises(
    UserError,
    match="the random weights of tokenizer and segmenter; give config.init_from.tokenizer",
  ):
    train.train(
      configure(f"ecg_to_cmr:{SMALL}", flags[0], f"--config.init_from.ecg={walk('joint').workdir}"),
      str(tmp_path / "w"),
    )
  assert not (tmp_path / "w").exists()
