"""Relevance maps of one person's CMR and ECG, as figures."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from mmcl_jax.data.schema import LEADS
from mmcl_jax.evaluators.drawings import (
  HEAD,
  INK,
  MID,
  WIDTH,
  blank_figure,
  contour_legend,
  draw_contours,
  footnote,
)
from mmcl_jax.evaluators.figures import plain


def relevance(examples: list[dict], note: str = "") -> dict[str, Figure]:
  """{name: Figure} of what localisation.explain found in some recordings."""
  figures = {}
  for i, found in enumerate(examples, 1):
    title = f"recording {i} of those in test that have an ECG and a CMR"
    figures[f"relevance_cmr_{i}"] = heart_relevance(found["towers"], title, note)
    figures[f"relevance_ecg_{i}"] = ecg_relevance(found["ecg"], title, note)
  return figures


def heart_relevance(towers: dict, title: str, note: str = "", most: int = 6) -> Figure:
  """Where the CMR of one person matters: two rows of planes a tower, with contours where there are
  labels.

  The first row hatches the most relevant tenth of the pixels by cosine, the second is the size of
  the integrated gradients.

  Args:
    towers: {TOWER: {seen, labels, cosine, top, gradients [P, H, W]}}, as localisation.explain gives
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
    place = (left + column * side, height - HEAD - (row + 1) * side, side - gap, side - gap)
    axes = figure.add_axes([x / (WIDTH, height)[i % 2] for i, x in enumerate(place)])
    axes.imshow(image, interpolation="nearest", aspect="auto", **options)
    axes.axis("off")
    return axes

  for row, (name, tower) in enumerate(towers.items()):
    planes = np.unique(np.linspace(0, len(tower["seen"]) - 1, columns).round().astype(int))
    near, size = tower["cosine"], np.abs(tower["gradients"])
    full = np.percentile(size, 99.5) or 1.0
    words = (
      f"{plain(name)}: cosine\n{near.min():z.2f} to {near.max():z.2f}",
      f"{plain(name)}: integrated\ngradients, size",
    )
    for i, text in enumerate(words):
      figure.text(
        2 / WIDTH,
        1 - (HEAD + (2 * row + i + 0.5) * side) / height,
        text,
        va="center",
        fontsize=8,
        color=INK,
      )
    for column, plane in enumerate(planes):
      above = panel(2 * row, column, tower["seen"][plane], cmap="gray", vmin=0, vmax=1)
      if tower["top"][plane].any():
        hatched = above.contourf(
          tower["top"][plane].astype(np.float32), levels=[0.5, 1.5], colors="none", hatches=["////"]
        )
        hatched.set(edgecolor="white", linewidth=0, gid="top")
      below = panel(2 * row + 1, column, size[plane], cmap="Greys", vmin=0, vmax=full)
      for axes in (above, below):
        draw_contours(axes, tower["labels"][plane])
  contour_legend(
    figure,
    (left / WIDTH, 6 / height),
    {"most relevant tenth": Patch(fc="#666666", ec="white", hatch="////")},
  )
  footnote(figure, note, height)
  return figure


def ecg_relevance(ecg: dict, title: str, note: str = "") -> Figure:
  """When the ECG of one person matters: under every lead three strips, the darker the more relevant
  the patch.

  Args:
    ecg: {seen [L, T], cosine, attention, gradients [L, patches], rate_hz}, as localisation.explain
    gives it.
    title, note: printed above, and at the foot.
  """
  strips = {
    "cosine": ecg["cosine"],
    "attention": ecg["attention"],
    "gradients": np.abs(ecg["gradients"]),
  }
  left, foot, trace, strip = 26, 8, 12, 2.2  # mm
  row = trace + strip * len(strips) + 1.5
  height = foot + row * len(LEADS) + HEAD
  figure = blank_figure(title, height)
  page = figure.add_axes([0, 0, 1, 1])
  page.axis("off")
  signal = ecg["seen"] - np.median(ecg["seen"], axis=1, keepdims=True)
  gain = 0.5 * trace / max(np.percentile(np.abs(signal), 99.8), 1e-9)
  right = WIDTH - 4
  x = np.linspace(left, right, signal.shape[1])
  for i, name in enumerate(LEADS):
    top = height - HEAD - i * row
    page.plot(
      x,
      top - trace / 2 + np.clip(gain * signal[i], -trace / 2, trace / 2),
      color=INK,
      lw=0.6,
      gid=name,
    )
    page.text(2, top - trace / 2, name, fontsize=9, fontweight="bold", va="center", color=INK)
    for j, (what, values) in enumerate(strips.items()):
      low = top - trace - (j + 1) * strip
      page.imshow(
        values[i : i + 1],
        extent=(left, right, low, low + 0.85 * strip),
        cmap="Greys",
        vmin=values.min(),
        vmax=values.max(),
        interpolation="nearest",
        aspect="auto",
        gid=f"{name} {what}",
      )
      page.add_patch(Rectangle((left, low), right - left, 0.85 * strip, fc="none", ec=MID, lw=0.3))
      page.text(left - 1, low + strip / 2, what, fontsize=5.5, ha="right", va="center", color=MID)
  ranges = "; ".join(
    f"{what} {values.min():z.3g} to {values.max():z.3g}" for what, values in strips.items()
  )
  page.text(
    left,
    3,
    f"{signal.shape[1] / ecg['rate_hz']:g} s; white to black: {ranges} (size)",
    fontsize=7,
    color=INK,
  )
  page.set(xlim=(0, WIDTH), ylim=(0, height))
  page.set_zorder(-1)
  footnote(figure, note, height)
  return figure
