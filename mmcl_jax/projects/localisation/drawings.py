"""Relevance maps of one person's CMR and ECG, as figures."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from mmcl_jax.data.schema import LEADS
from mmcl_jax.reports.drawings import (
  HEAD,
  INK,
  MID,
  WIDTH,
  blank_figure,
  contour_legend,
  draw_contours,
  footnote,
)
from mmcl_jax.reports.figures import plain

# mm: ends of a lead, height of its trace and of a strip
LEFT, RIGHT, TRACE, STRIP = 26, WIDTH - 4, 12, 2.2


def relevance(examples: list[dict], note: str = "") -> dict[str, Figure]:
  """{name: Figure} of the examples that evaluator.explain gives."""
  figures = {}
  for i, example in enumerate(examples, 1):
    title = f"recording {i} of those in test that have an ECG and a CMR"
    figures[f"relevance_cmr_{i}"] = heart_relevance(example["towers"], title, note)
    figures[f"relevance_ecg_{i}"] = ecg_relevance(example["ecg"], title, note)
  return figures


def heart_relevance(towers: dict, title: str, note: str = "", most: int = 6) -> Figure:
  """Where the CMR of one person matters: two rows of planes a tower, with contours where there are
  labels.

  The first row hatches the most relevant tenth of the pixels by cosine, the second is the size of
  the integrated gradients.

  Args:
    towers: {TOWER: {seen, labels, cosine, top, gradients [P, H, W]}}, as evaluator.explain gives
      them; seen in [0, 1].
    title, note: printed above, and at the foot.
    most: planes a tower that are drawn, evenly spread.
  """
  columns = max(min(most, len(tower["seen"])) for tower in towers.values())
  left, foot, gap = 32, 14, 1.5  # mm
  side = min((WIDTH - left) / columns, 56)
  height = foot + 2 * len(towers) * side + HEAD
  figure = blank_figure(title, height)

  def panel(row, column, image, **options):
    x = left + column * side
    y = height - HEAD - (row + 1) * side
    width = side - gap
    axes = figure.add_axes([x / WIDTH, y / height, width / WIDTH, width / height])
    axes.imshow(image, interpolation="nearest", aspect="auto", **options)
    axes.axis("off")
    return axes

  def label(row, text):
    y = 1 - (HEAD + (row + 0.5) * side) / height
    figure.text(2 / WIDTH, y, text, va="center", fontsize=8, color=INK)

  for row, (name, tower) in enumerate(towers.items()):
    planes = np.linspace(0, len(tower["seen"]) - 1, columns).round().astype(int)
    near = tower["cosine"]
    size = np.abs(tower["gradients"])
    largest = np.percentile(size, 99.5) or 1.0
    label(2 * row, f"{plain(name)}: cosine\n{near.min():z.2f} to {near.max():z.2f}")
    label(2 * row + 1, f"{plain(name)}: integrated\ngradients, size")
    for column, plane in enumerate(np.unique(planes)):
      above = panel(2 * row, column, tower["seen"][plane], cmap="gray", vmin=0, vmax=1)
      hatch(above, tower["top"][plane])
      below = panel(2 * row + 1, column, size[plane], cmap="Greys", vmin=0, vmax=largest)
      for axes in (above, below):
        draw_contours(axes, tower["labels"][plane])
  tenth = {"most relevant tenth": Patch(fc="#666666", ec="white", hatch="////")}
  contour_legend(figure, (left / WIDTH, 6 / height), tenth)
  footnote(figure, note, height)
  return figure


def hatch(axes, mask: np.ndarray) -> None:
  """Hatches where the mask [H, W] is True."""
  if mask.any():
    area = axes.contourf(
      mask.astype(np.float32), levels=[0.5, 1.5], colors="none", hatches=["////"]
    )
    area.set(edgecolor="white", linewidth=0, gid="top")


def ecg_relevance(ecg: dict, title: str, note: str = "") -> Figure:
  """When the ECG of one person matters: under every lead three strips, the darker the more relevant
  the patch.

  Args:
    ecg: {seen [L, T], cosine, attention, gradients [L, patches], rate_hz}, as evaluator.explain
      gives it.
    title, note: printed above, and at the foot.
  """
  strips = {
    "cosine": ecg["cosine"],
    "attention": ecg["attention"],
    "gradients": np.abs(ecg["gradients"]),
  }
  row = TRACE + STRIP * len(strips) + 1.5
  height = 8 + row * len(LEADS) + HEAD
  figure = blank_figure(title, height)
  page = figure.add_axes([0, 0, 1, 1])
  page.axis("off")
  signal = ecg["seen"] - np.median(ecg["seen"], axis=1, keepdims=True)
  gain = 0.5 * TRACE / max(np.percentile(np.abs(signal), 99.8), 1e-9)
  x = np.linspace(LEFT, RIGHT, signal.shape[1])
  for i, name in enumerate(LEADS):
    top = height - HEAD - i * row
    middle = top - TRACE / 2
    y = middle + np.clip(gain * signal[i], -TRACE / 2, TRACE / 2)
    page.plot(x, y, color=INK, lw=0.6, gid=name)
    page.text(2, middle, name, fontsize=9, fontweight="bold", va="center", color=INK)
    for j, (what, values) in enumerate(strips.items()):
      draw_strip(page, top - TRACE - (j + 1) * STRIP, name, what, values, i)
  ranges = []
  for what, values in strips.items():
    ranges.append(f"{what} {values.min():z.3g} to {values.max():z.3g}")
  seconds = signal.shape[1] / ecg["rate_hz"]
  text = f"{seconds:g} s; white to black: {'; '.join(ranges)} (size)"
  page.text(LEFT, 3, text, fontsize=7, color=INK)
  page.set(xlim=(0, WIDTH), ylim=(0, height))
  page.set_zorder(-1)
  footnote(figure, note, height)
  return figure


def draw_strip(page, low: float, name: str, what: str, values: np.ndarray, lead: int) -> None:
  """A strip of `values` [L, patches] under a lead, its foot at `low` mm; one scale for all
  leads."""
  tall = 0.85 * STRIP
  page.imshow(
    values[lead : lead + 1],
    extent=(LEFT, RIGHT, low, low + tall),
    cmap="Greys",
    vmin=values.min(),
    vmax=values.max(),
    interpolation="nearest",
    aspect="auto",
    gid=f"{name} {what}",
  )
  page.add_patch(Rectangle((LEFT, low), RIGHT - LEFT, tall, fc="none", ec=MID, lw=0.3))
  page.text(LEFT - 1, low + STRIP / 2, what, fontsize=5.5, ha="right", va="center", color=MID)
