"""What a user gets wrong, program by program: one line, status 2, and nothing is made."""

import re

import pytest

from common import tiny_flags
from mistakes import error_of
from mmcl_jax import convert, embed, evaluate, prepare, train

# (program, flags, what the line says, a regular expression). {tmp} is an empty folder.
MISTAKES = [
  (evaluate, ["--workdir=/nowhere"], "has no checkpoint yet"),
  (embed, ["--workdir=/nowhere", "--input=x", "--out=/tmp/never"], "no config.json"),
  (prepare, ["synthetic", "--subjects=3", "--out={tmp}/c"], "would hold no subject"),
  (prepare, ["synthetic", "--subjects=0", "--out={tmp}/c"], "--subjects=0"),
  (
    prepare,
    ["synthetic", "--subjects=9", "--out={tmp}/c", "--split=1,2"],
    "three shares that sum to 1",
  ),
  (
    prepare,
    ["synthetic", "--subjects=9", "--out={tmp}/c", "--profile=nope"],
    "expected one of minimal",
  ),
  (prepare, ["synthetic", "--subjects=9", "--out={tmp}/c", "--size=0"], "--size=0"),
  (
    prepare,
    ["synthetic", "--subjects=9", "--out={tmp}/c", "--input=x"],
    "no use for --input; it takes --subjects",
  ),
  (prepare, ["nope", "--out={tmp}/c"], "SOURCE is 'nope'; expected one of ukb"),
  (prepare, ["no_such_module:plan", "--out={tmp}/c"], "No module named 'no_such_module'"),
  (prepare, ["json:plan", "--out={tmp}/c"], "has no attribute 'plan'"),
  (prepare, ["ukb", "--input={tmp}", "--out={tmp}/c"], "none named ID_20209"),
  (prepare, ["ukb", "--input=/nowhere", "--out={tmp}/c"], "no file or folder /nowhere"),
  (convert, ["--out={tmp}/x"], "one of the arguments --input --workdir is required"),
  (convert, ["--input={tmp}/absent.pth", "--out={tmp}/x"], "No such file"),
  (
    convert,
    ["--workdir=w", "--out={tmp}/x.safetensors", "--pool=cls"],
    "--pool cannot go with --workdir",
  ),
  (convert, ["--workdir=/nowhere", "--out={tmp}/x.safetensors"], "no config.json"),
  (convert, ["--workdir=/nowhere", "--out={tmp}/x.pth"], "ends in .safetensors"),
  (train, ["--config=configs/joint.py"], "missing --workdir"),
]
# (flag of `mmcl train` after good ones, what the line says)
TRAINING = [
  ("--config.nope=1", "nope"),
  ("--config.optimizer.learning_rat=1", "learning_rat"),
  ("--config.batch=many", "batch"),
  ("--config.steps=0", "steps is 0"),
  ("--config.batch=0", "batch is 0"),
  ("--config.mesh.model=2", "2 devices|1 x model=2"),
  ("--config.model.towers.ecg.size=huge", "'huge'; expected one of"),
  ("--config.model.towers.ecg.mask_ratio=1.5", "from 0"),
  ("--config.model.towers.ecg.patch=7", "does not divide"),
  ("--config.objectives.dual_phase.fn=triplet", "'triplet'; expected one of"),
  ("--config.objectives.dual_phase.temperature=cold", "temperature"),
  ("--config.evaluators.losses.fn=nope", "'nope'; expected one of losses, probes"),
  ("--config.evaluators.losses.every=-2", "at least 0, or -1 for"),
  ("--config.data.targets=('nope',)", "nope"),
  ("--config.model.towers.ed.view=nope", "expected one of ed_volume"),
  ("--config.model.towers.ed.planes=99", "12 planes"),
  ("--config.init_from.ecg=/nowhere", "/nowhere"),
  ("--config.model.towers.ed.frozen=True", "frozen"),
  ("--config.data.ecg_profile=mmcl", "profile 'minimal'"),
  ("--config.data.samples=9999", "9999"),
  ("--config.data.cohort=/nowhere", "no cohort at '/nowhere'"),
  ("--config=/nowhere.py", "nowhere.py"),
  ("--unknown=1", "unknown"),
  ("stray", "stray"),
]


@pytest.mark.parametrize("program, flags, words", MISTAKES)
def test_a_user_s_mistake_is_one_line_and_leaves_nothing(program, flags, words, capsys, tmp_path):
  line = error_of(program.main, [flag.replace("{tmp}", str(tmp_path)) for flag in flags], capsys)
  assert re.search(words, line), line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag, words", TRAINING)
def test_a_mistake_in_the_config_is_one_line_and_leaves_nothing(
  cohort, tmp_path, capsys, flag, words
):
  line = error_of(train.main, [*tiny_flags(cohort.path, tmp_path / "w"), flag], capsys)
  assert re.search(words, line), line
  assert not list(tmp_path.iterdir())
