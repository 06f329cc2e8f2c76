"""Text that programs print: columns, and the note on synthetic results."""

from mmcl_jax.errors import one_line

SYNTHETIC_NOTE = "synthetic cohort: proves the code, not medicine"


def aligned(rows: list[list[str]], left: int = 1) -> str:
  """Rows of text in columns, the first `left` of them flush left, the others right."""
  rows = [list(map(one_line, row)) for row in rows]
  widths = []
  for column in zip(*rows, strict=True):
    widths.append(max(map(len, column)))
  lines = []
  for row in rows:
    cells = []
    for cell, width in zip(row, widths, strict=True):
      flush_left = len(cells) < left
      cells.append(cell.ljust(width) if flush_left else cell.rjust(width))
    line = "  ".join(cells)
    lines.append(line.rstrip())
  return "\n".join(lines)
