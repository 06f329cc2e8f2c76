"""Text that programs print: columns, and the note on synthetic results."""

from mmcl_jax.errors import one_line

SYNTHETIC_NOTE = "synthetic cohort: proves the code, not medicine"


def aligned(rows: list[list[str]], left: int = 1) -> str:
  """Rows of text in columns, the first `left` of them flush left, the others right."""
  rows = [[one_line(cell) for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = []
    for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
      cells.append(cell.ljust(width) if place < left else cell.rjust(width))
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)
