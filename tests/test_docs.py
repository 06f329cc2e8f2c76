"""What the documents show works as it stands there."""

import re
import subprocess
import sys

import numpy as np

from conftest import ROOT
from mmcl_jax.data import cohort as cohort_room, schema, synthetic
from mmcl_jax.data.preprocess import ecg as preprocess_ecg


def test_the_source_of_one_s_own_in_your_data(tmp_path):
  """The 20 lines of docs/your_data.md, as a module in the current folder, by the command beneath them."""
  text = (ROOT / "docs/your_data.md").read_text()
  code, command = re.search(r"```python\n(.*?)```\n\n```bash\nmmcl prepare (my_source.*?)\n", text, re.DOTALL).groups()
  (tmp_path / "my_source.py").write_text(code)
  (tmp_path / "npz").mkdir()
  for i in range(30):
    ecg = np.repeat(synthetic.subject(5, i)["ecg"], 2, axis=1)  # 1,000 Hz
    if i == 4:
      ecg[6] = 0.25
    np.savez(tmp_path / f"npz/DEMO{i:04d}.npz", LVEF=50 + i, **dict(zip(schema.LEADS, ecg)))
  (tmp_path / "cohort.private").mkdir()
  (tmp_path / "cohort.private/salt").write_text("5" * 64)  # of 30 people a salt drawn anew leaves val empty once in 24 runs
  arguments = command.replace("/data/npz", "npz").split() + ["--processes=2"]
  done = subprocess.run([sys.executable, "-m", "mmcl_jax.prepare", *arguments], cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  cohort = cohort_room.load(str(tmp_path / "cohort"))
  found = {float(r["phenotypes"][0]): r for source in cohort.splits.values() for r in source}
  assert sorted(found) == [50 + i for i in range(30) if i != 4]
  wanted = preprocess_ecg.normalise(synthetic.subject(5, 7)["ecg"], "minimal")
  ecg = found[57]["ecg"] * found[57]["ecg_scale"]
  assert np.corrcoef(ecg.ravel(), wanted.ravel())[0, 1] > 0.99
  quality = (tmp_path / "cohort/quality.json").read_text()
  assert "flat lead V1" in quality and "DEMO" not in quality + done.stdout + done.stderr
