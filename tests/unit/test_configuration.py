"""How recipes are found and given their arguments, and what the package offers by name."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

import mmcl_jax
from common import ROOT
from mmcl_jax import configuration
from mmcl_jax.configuration import parse_arg, recipe
from mmcl_jax.errors import UserError

CHOICES = {"size": {"demo": 1, "base": 2}, "arm": ("a", "b"), "batch": 0, "rate": 0.5}


@pytest.mark.parametrize(
  "arg, expected",
  [
    (None, ("demo", "a", 0, 0.5)),
    ("", ("demo", "a", 0, 0.5)),
    ("base", ("base", "a", 0, 0.5)),
    ("size=base,arm=b,batch=1024,rate=0.1", ("base", "b", 1024, 0.1)),
    ("arm=b,", ("demo", "b", 0, 0.5)),
  ],
)
def test_an_argument_sets_what_it_names(arg, expected):
  read = parse_arg(arg, **CHOICES)
  assert tuple(read[name] for name in CHOICES) == expected


@pytest.mark.parametrize(
  "arg, message",
  [
    ("huge", "the config's argument sets size='huge'; expected one of demo, base"),
    ("arm=c", "the config's argument sets arm='c'; expected one of a, b"),
    ("batch=many", "the config's argument sets batch='many'; expected int"),
    ("nope=1", "the config's argument sets 'nope'; it takes size, arm, batch, rate"),
  ],
)
def test_a_wrong_argument_is_told_with_what_is_known(arg, message):
  with pytest.raises(UserError) as stop:
    parse_arg(arg, **CHOICES)
  assert str(stop.value) == message


def test_a_recipe_is_found_by_name_and_by_path(monkeypatch, tmp_path):
  by_path = recipe(str(ROOT / "configs/joint.py"), "demo")
  monkeypatch.chdir(tmp_path)
  by_name = recipe("joint", "demo")
  assert by_name.to_json() == by_path.to_json()
  by_name.objectives.more = {"fn": "my_losses:spread", "weight": 0.1}  # not locked
  assert recipe("joint").to_json() == recipe("joint", "demo").to_json()


def test_a_recipe_of_one_s_own_starts_from_another(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mine.py").write_text(
    "from mmcl_jax.configuration import recipe\n"
    "def get_config(arg=None):\n"
    "  config = recipe('joint', arg)\n"
    "  config.seed = 5\n"
    "  return config\n"
  )
  config, _ = configuration.from_flags(
    "mmcl train", "", ["--config=mine.py:test,arm=mae", "--config.batch=4"], {}
  )
  expected = recipe("joint", "test,arm=mae")
  expected.seed, expected.batch = 5, 4
  assert config.to_json() == expected.to_json()


@pytest.mark.parametrize(
  "text, message",
  [
    (None, "there is no recipe mine.py; expected the path of a Python file, or one of arms, "),
    ("def get_config(arg=None):\n  return arg.x\n", "mine.py, line 2: AttributeError: "),
    ("import no_such_module\n", "mine.py, line 1: ModuleNotFoundError: "),
    ("def get_config(\n", "mine.py: SyntaxError: "),
    ("x = 1\n", "mine.py: AttributeError: .*get_config"),
    ("def get_config(arg=None):\n  return {}\n", "mine.py: get_config returns dict; expected"),
  ],
)
def test_a_recipe_that_does_not_run_is_one_line(tmp_path, monkeypatch, text, message):
  monkeypatch.chdir(tmp_path)
  if text is not None:
    (tmp_path / "mine.py").write_text(text)
  with pytest.raises(UserError, match=message) as stop:
    recipe("mine.py")
  assert "\n" not in str(stop.value)


def test_a_wheel_has_the_recipes(tmp_path):
  """Built from a copy of what git knows, unpacked, and used from an empty folder."""
  pytest.importorskip("setuptools")
  listed = ["git", "ls-files", "-z", "-co", "--exclude-standard"]
  for name in subprocess.run(listed, cwd=ROOT, capture_output=True).stdout.decode().split("\0"):
    if name.startswith(("mmcl_jax/", "configs/")) or name.startswith(("pyproject", "setup.py")):
      target = tmp_path / "source" / name
      target.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(ROOT / name, target)
  for name in ("README.md", "LICENSE"):
    shutil.copy(ROOT / name, tmp_path / "source" / name)
  build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
  built = subprocess.run(
    [sys.executable, "-c", build], cwd=tmp_path / "source", capture_output=True, text=True
  )
  assert built.returncode == 0, built.stderr
  (wheel,) = tmp_path.glob("*.whl")
  with zipfile.ZipFile(wheel) as files:
    files.extractall(tmp_path / "site")
  (tmp_path / "empty").mkdir()
  code = (
    "import mmcl_jax; from mmcl_jax.configuration import recipe; "
    "print(mmcl_jax.__file__); print(recipe('joint', 'demo').to_json())"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=tmp_path / "empty",
    env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  file, config = done.stdout.splitlines()
  assert file == str(tmp_path / "site/mmcl_jax/__init__.py")
  assert config == recipe("joint", "demo").to_json()
  assert (tmp_path / "site/mmcl_jax/data/diseases.toml").is_file()


def test_the_package_imports_its_parts_when_they_are_used():
  code = (
    "import sys, mmcl_jax; assert 'Loss' in dir(mmcl_jax); "
    "assert not {'jax', 'numpy', 'pandas'} & set(sys.modules); mmcl_jax.read_ecg; "
    "assert 'jax' not in sys.modules"
  )
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_public_names_are_documented_and_others_are_errors():
  assert set(mmcl_jax.__all__) == set(mmcl_jax.PUBLIC)
  for name in mmcl_jax.__all__:
    assert getattr(mmcl_jax, name).__doc__
  with pytest.raises(AttributeError, match="no attribute 'nope'"):
    mmcl_jax.nope  # noqa: B018
