"""The code blocks of docs/extending.md."""

import re

from common import ROOT

PAGE = (ROOT / "docs/extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))


def blocks(heading: str, kind: str) -> list[str]:
  """The code blocks of a section, kind "python" or "bash"."""
  return re.findall(rf"^```{kind}\n(.*?)^```$", SECTIONS[heading], re.DOTALL | re.MULTILINE)


def write(heading: str, folder) -> None:
  """Writes the Python blocks of a section to the files that their first lines name."""
  for code in blocks(heading, "python"):
    name = re.match(r"# (\w+\.py)\n", code)[1]
    (folder / name).write_text(code)
