"""Nothing in the repository looks like the id of a participant: UK Biobank's have seven digits."""

import re

from common import ROOT

SEVEN_DIGITS = re.compile(r"(?<!\d)[1-9]\d{6}(?!\d)")
ALLOWED = {
  "2837502",  # doi 10.1109/TMI.2018.2837502
  "3090082",  # doi 10.1109/TMI.2021.3090082
  "3825808",  # PMC3825808
}


def test_no_number_looks_like_an_id():
  found = {}
  for folder in ("mmcl_jax", "configs", "tests", "benchmarks", "docs", "launch"):
    for file in sorted((ROOT / folder).rglob("*")):
      if file.suffix in (".py", ".md", ".toml", ".sh", ".csv", ".json"):
        numbers = set(SEVEN_DIGITS.findall(file.read_text(encoding="utf-8"))) - ALLOWED
        if numbers:
          found[str(file.relative_to(ROOT))] = sorted(numbers)
  assert not found
