"""Figures of generated hearts: of the report, and beside the files of `mmcl generate`."""

import numpy as np
from matplotlib import patheffects
from matplotlib.figure import Figure

from mmcl_jax.data.schema import PHASES
from mmcl_jax.reports import figures
from mmcl_jax.reports.drawings import (
  HEAD,
  WIDTH,
  blank_figure,
  contour_legend,
  draw_contours,
  footnote,
)


def examples(real: np.ndarray, rebuilt: np.ndarray, draws: np.ndarray, note: str = "") -> Figure:
  """A row a subject: the middle slice at ED and ES of its real heart, the same by the tokenizer,
  and hearts drawn from its ECG.

  Args:
    real, rebuilt: uint8 [N, P, Z, H, W].
    draws: uint8 [N, S, P, Z, H, W].
  """
  middle = real.shape[2] // 2
  columns = [("real", real), ("tokenizer", rebuilt)]
  for i in range(draws.shape[1]):
    columns.append((f"GENERATED {i + 1}", draws[:, i]))
  size = 1.6 * len(columns) + 0.4, 0.85 * len(real) + 0.7
  figure = Figure(figsize=size, layout="constrained")
  panels = figure.subplots(len(real), 2 * len(columns), squeeze=False)
  for c, (title, stacks) in enumerate(columns):
    for n, row in enumerate(panels):
      for phase, panel in enumerate(row[2 * c : 2 * c + 2]):
        panel.imshow(stacks[n, phase, middle], cmap="gray", vmin=0, vmax=255)
        panel.set(xticks=[], yticks=[])
        if n == 0:
          panel.set_title(f"{title}\n{PHASES[phase].upper()}", fontsize=6.5)
        if c > 1:
          write_across(panel, "generated, not measured", 3.6, 0.8)
  return figures.finish(figure, note)


def montage(stacks: np.ndarray, labels: np.ndarray, title: str, mark: str) -> Figure:
  """Generated hearts, one a row: every other slice from base to apex at ED, then at ES, with
  contours; `mark` across each.

  Args:
    stacks, labels: uint8 [S, P, Z, H, W].
  """
  _, phases, slices, height, width = stacks.shape
  chosen = range(0, slices, max(1, slices // 6))

  def row(x, fill):
    images = [x[p, z] for p in range(phases) for z in chosen]
    return np.concatenate([np.pad(a, 1, constant_values=fill) for a in images], axis=1)

  pixel = (WIDTH - 8) / row(stacks[0], 0).shape[1]  # mm
  tall = pixel * (height + 2)
  total = HEAD + len(stacks) * tall + 10
  figure = blank_figure(title, total)
  for i, (stack, label) in enumerate(zip(stacks, labels)):
    foot = 1 - (HEAD + (i + 1) * tall) / total
    axes = figure.add_axes([4 / WIDTH, foot, 1 - 8 / WIDTH, tall / total])
    grey = dict(cmap="gray", vmin=0, vmax=255)
    axes.imshow(row(stack, 255), interpolation="nearest", aspect="auto", **grey)
    draw_contours(axes, row(label, 0))
    write_across(axes, mark, 8, 1.5)
    axes.axis("off")
  contour_legend(figure, (4 / WIDTH, 1 / total))
  footnote(figure, f"left half ED, right half ES, base to apex; {mark}", total)
  return figure


def write_across(axes, text: str, size: float, outline: float) -> None:
  """Text at the foot of an image, in white with a black outline."""
  axes.text(
    0.5,
    0.02,
    text,
    transform=axes.transAxes,
    ha="center",
    va="bottom",
    fontsize=size,
    color="white",
    path_effects=[patheffects.withStroke(linewidth=outline, foreground="black")],
  )
