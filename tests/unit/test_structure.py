"""What may import what."""

import ast
import pathlib

from common import ROOT

PACKAGE = ROOT / "mmcl_jax"
GROUND = ("data", "augment", "models", "objectives")
FLOOR = {**dict.fromkeys(GROUND, 0), "interop": 1, "training": 1, "evaluators": 1, "reports": 1}
ROOF = ("tools", "projects")  # on top of the rooms: no room imports them


def imports(file: pathlib.Path) -> set[str]:
  """Modules a file imports, `from package import name` as package.name."""
  found = set()
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


FILES = {str(file.relative_to(PACKAGE)): imports(file) for file in sorted(PACKAGE.rglob("*.py"))}
SHARED = {"errors", "registry", "configuration", "ranges", "__init__"}  # of the top level
PROGRAMS = {file.stem for file in PACKAGE.glob("*.py")} - SHARED


def first(name: str) -> str:
  """The folder of a file; a file's own name at the top level."""
  return pathlib.Path(name).parts[0]


def room(module: str) -> str:
  return module.split(".")[1] if module.startswith("mmcl_jax.") else ""


def allowed(here: str, module: str) -> bool:
  """Whether a file of the folder `here` may import the module."""
  there = room(module)
  if here == "support":
    return there in ("", "support", "errors")
  if there in ROOF:
    return here == there
  # models read the schema's names
  if here in GROUND and there in FLOOR and (here, there) != ("models", "data"):
    return there == here
  return here not in FLOOR or there not in PROGRAMS


def test_no_arrow_runs_up_or_across_the_ground():
  assert not [
    f"{file} imports {module}"
    for file, modules in FILES.items()
    for module in modules
    if not allowed(first(file), module)
  ]


def test_slices_do_not_know_each_other():
  for name in ("generation", "localisation"):
    others = [
      f"{file} imports {module}"
      for file, modules in FILES.items()
      for module in modules
      if module.startswith(f"mmcl_jax.projects.{name}") and f"projects/{name}/" not in file
    ]
    assert not others


def test_host_rooms_hold_no_jax():
  assert not [
    f"{file} imports {module}"
    for file, modules in FILES.items()
    for module in modules
    if first(file) == "data" and module.split(".")[0] in ("jax", "flax", "optax")
  ]


def test_device_rooms_touch_no_file():
  files = [file for file in FILES if first(file) in ("augment", "models", "objectives")]
  files.append("training/step.py")
  program = "projects/generation/generate.py"
  files += [file for file in FILES if first(file) == "projects" and file != program]
  assert not [
    f"{file} imports {module}"
    for file in files
    for module in FILES[file]
    if module.split(".")[0] in ("os", "pathlib", "io", "shutil")
  ]
  assert not [file for file in files if "open(" in (PACKAGE / file).read_text()]


def test_only_one_room_knows_orbax():
  knowing = [
    file for file, modules in FILES.items() if any(name.startswith("orbax") for name in modules)
  ]
  assert knowing == ["training/checkpoint.py"]
