"""The config.json of a workdir from somebody else names parts, and runs nothing that is no part."""

import pytest
from ml_collections import ConfigDict

from mmcl_jax import configuration, evaluators, models
from mmcl_jax.errors import UserError
from mmcl_jax.models import towers


@pytest.mark.parametrize("fn", ["subprocess:getoutput", "subprocess:Popen", "os:system"])
def test_a_tower_is_a_flax_module_or_refused(tmp_path, fn):
  command = f"touch {tmp_path}/ran"
  spec = ConfigDict(
    {"fn": fn, "view": "ed_volume", "planes": 1, "cmd": command, "command": command}
  )
  with pytest.raises(UserError, match="no flax.linen.Module class"):
    towers.complete_entry("ed", spec)
  spec.update(width=0, frozen=False)
  with pytest.raises(UserError, match="no flax.linen.Module class"):
    towers.build(spec)
  assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("fn", ["subprocess:Popen", "os:system", "flax.linen:Dense"])
def test_a_model_is_a_pretrainer_or_refused(fn):
  config = configuration.defaults(8, 6).model
  config.fn = fn
  with pytest.raises(UserError, match="no subclass of mmcl_jax.models.pretrainer.Pretrainer"):
    models.build(config, 500)


def test_parts_of_another_kind_of_model_are_refused():
  config = configuration.defaults(8, 6).model
  config.tokenizer = dict(size="test", patch=(6, 16, 16), channels=4)
  with pytest.raises(UserError, match="config.model has tokenizer, which fn='pretrainer' does not"):
    models.build(config, 500)
  config.fn = "generation"
  assert models.fields(config) == ("ed_es_volumes",)
  models.build(config, 500)


@pytest.mark.parametrize("fn", ["timeit:timeit", "os:system", "builtins:dict", "sys:path"])
def test_an_evaluator_takes_a_context_or_is_refused(fn):
  entry = {"fn": fn, "every": 0, "setup": "raise SystemExit"}
  with pytest.raises(UserError, match="first parameter is not `context`; expected an evaluator"):
    evaluators.from_entry("mine", entry, 1)
