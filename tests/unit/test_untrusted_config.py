"""The config.json of a workdir from somebody else names parts, and runs nothing that is no part."""

import pytest
from ml_collections import ConfigDict

from mmcl_jax import evaluators
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


@pytest.mark.parametrize("fn", ["timeit:timeit", "os:system", "builtins:dict", "sys:path"])
def test_an_evaluator_takes_a_context_or_is_refused(fn):
  entry = {"fn": fn, "every": 0, "setup": "raise SystemExit"}
  with pytest.raises(UserError, match="first parameter is not `context`; expected an evaluator"):
    evaluators.one("mine", entry, 1)
