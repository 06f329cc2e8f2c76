"""What may import what, and that the programs never load TensorFlow or torch."""

import ast
import pathlib

import pytest

from common import ROOT, python

PACKAGE = ROOT / "mmcl_jax"
GROUND = ("data", "augment", "models", "objectives")
FLOOR = {**dict.fromkeys(GROUND, 0), "interop": 1, "training": 1, "evaluators": 1}


def imports(file: pathlib.Path) -> set[str]:
  """Modules a file imports, `from package import name` as package.name."""
  found = set()
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


FILES = {file.relative_to(PACKAGE): imports(file) for file in PACKAGE.rglob("*.py")}


def room(module: str) -> str:
  return module.split(".")[1] if module.startswith("mmcl_jax.") else ""


@pytest.mark.parametrize("file", sorted(map(str, FILES)))
def test_no_arrow_runs_up_or_across_the_ground(file):
  here = pathlib.Path(file).parts[0]
  if here == "support":
    ours = {module for module in FILES[pathlib.Path(file)] if module.startswith("mmcl_jax.")}
    assert {room(module) for module in ours} <= {"support", "errors"}
  for module in FILES[pathlib.Path(file)]:
    there = room(module)
    # models read the schema's names
    if here in GROUND and there in FLOOR and (here, there) != ("models", "data"):
      assert there == here, f"{file} imports {module}"
    elif here in FLOOR:
      programs = {f.stem for f in PACKAGE.glob("*.py")} - {
        "errors",
        "registry",
        "configuration",
        "__init__",
      }
      assert there not in programs, f"{file} imports the program {module}"


@pytest.mark.parametrize("file", sorted(str(f) for f in FILES if f.parts[0] == "data"))
def test_host_rooms_hold_no_jax(file):
  assert not {m for m in FILES[pathlib.Path(file)] if m.split(".")[0] in ("jax", "flax", "optax")}


@pytest.mark.parametrize(
  "file",
  sorted(
    str(f)
    for f in FILES
    if f.parts[0] in ("augment", "models", "objectives") or str(f) == "training/steps.py"
  ),
)
def test_device_rooms_touch_no_file(file):
  source = (PACKAGE / file).read_text()
  assert not {
    m for m in FILES[pathlib.Path(file)] if m.split(".")[0] in ("os", "pathlib", "io", "shutil")
  }
  assert "open(" not in source


def test_only_one_room_knows_orbax():
  assert [str(f) for f, found in FILES.items() if any(m.startswith("orbax") for m in found)] == [
    "training/checkpoint.py"
  ]


def test_programs_load_neither_tensorflow_nor_torch(cohort, tmp_path):
  """Not only at import: a whole run of training, evaluating, embedding and exporting."""
  code = """
import pathlib, sys
import wfdb
from common import tiny_flags
from mmcl_jax import embed, evaluate, export, prepare, train
from mmcl_jax.data import schema, synthetic
train.main(tiny_flags(sys.argv[1], sys.argv[2]))
evaluate.main([f"--workdir={sys.argv[2]}"])
folder = pathlib.Path(sys.argv[2]) / "in"
folder.mkdir()
wfdb.wrsamp("one", fs=500, units=["mV"] * 12, sig_name=list(schema.LEADS), p_signal=synthetic.subject(0, 0)["ecg"].T.astype(float),
            fmt=["16"] * 12, write_dir=str(folder))
embed.main([f"--workdir={sys.argv[2]}", f"--input={folder}", f"--out={folder}/out"])
export.main([f"--workdir={sys.argv[2]}", f"--out={folder}/exported"])
print("loaded", [m for m in ("tensorflow", "torch") if m in sys.modules])
"""
  assert python(code, cohort.path, tmp_path / "w").strip().endswith("loaded []")
