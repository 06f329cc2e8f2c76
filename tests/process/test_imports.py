"""What is loaded when: never TensorFlow or torch, and no reader's library before it is needed."""

from common import python


def test_import_loads_no_format():
  code = """import sys
from mmcl_jax.data import readers
print(sorted({"wfdb", "pydicom", "defusedxml", "pandas", "scipy"} & set(sys.modules)))"""
  assert python(code).strip() == "[]"


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
