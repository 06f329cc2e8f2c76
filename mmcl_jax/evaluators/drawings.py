"""What a cardiologist looks at: the 12-lead ECG on its paper, and the short axis at ED and ES with
its contours.

Like mmcl_jax.evaluators.figures: Figures without pyplot, drawn so that nothing depends on colour.
Lengths are in mm of the nominal size, so a print at 100 % is to scale; at 127 or 254 dots per inch
a millimetre is 5 or 10 pixels.
"""

import numpy as np
from matplotlib import patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mmcl_jax.data.preprocess import ecg as preprocess_ecg
from mmcl_jax.data.schema import LABELS, LEADS, PHASES, salted_id
from mmcl_jax.evaluators.figures import plain

MM_A_SECOND, MM_A_MV = 25, 10
WIDTH = 270  # mm; 10 s take 250
PAGE = (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"))
RHYTHM = "II"
# of the ECG profiles that keep voltage; all others divide a recording by its own size
MV_A_UNIT = {"minimal": 0.2}
# s, then mm; BELOW: from a row's foot to its zero
COLUMN_S, ROW, BELOW, LEFT, FOOT, HEAD = 2.5, 30, 12, 15, 8, 10
SMALL, LARGE = "#f6d9d6", "#e6aaa4"
INK, MID = "#111111", "#666666"
CONTOURS = {  # what is inside: name in the legend, colour, line
  ("LV",): ("LV cavity", "#ffe14d", "-"),
  ("LV", "MYO"): ("LV epicardium (LV + MYO)", "#7fe3ff", (0, (4, 1.5))),
  ("RV",): ("RV cavity", "#ff4d94", (0, (1, 1))),
}


def ecg_paper(ecg: np.ndarray, rate_hz: float, title: str, millivolts: bool = True) -> Figure:
  """A 12-lead ECG on paper: three rows of four leads, 2.5 s each, over a rhythm strip of lead II;
  25 mm/s, 10 mm/mV.

  Every lead is drawn about its median. Where `millivolts` is False the recording has no unit: one
  gain for all leads is chosen so that it fills the paper, and the paper says so.

  Args:
    ecg: [12, T] in the order of LEADS, mV or without unit.
    rate_hz: samples per second.
    title: printed above.
  """
  ecg = np.asarray(ecg, np.float64)
  ecg = ecg - np.nanmedian(ecg, axis=1, keepdims=True)
  gain, scale = (MM_A_MV, "10 mm/mV") if millivolts else _gain(ecg)
  rows = len(PAGE) + 1
  figure, paper = _paper(title, FOOT + ROW * rows + 2 + HEAD)
  for row, names in enumerate([*PAGE, (RHYTHM,)]):
    zero = FOOT + ROW * (rows - row - 1) + BELOW
    paper.plot(
      *np.transpose(
        [
          (LEFT - 10, 0),
          (LEFT - 7.5, 0),
          (LEFT - 7.5, 10),
          (LEFT - 2.5, 10),
          (LEFT - 2.5, 0),
          (LEFT, 0),
        ]
      )
      + [[0], [zero]],
      color=INK,
      lw=0.8,
      gid="calibration",
    )
    seconds = COLUMN_S if len(names) > 1 else COLUMN_S * len(PAGE[0])
    for column, name in enumerate(names):
      first, last = (round(s * rate_hz) for s in (column * seconds, (column + 1) * seconds))
      lead = ecg[LEADS.index(name), first:last]
      x = LEFT + MM_A_SECOND * np.arange(first, first + len(lead)) / rate_hz
      paper.plot(x, zero + gain * lead, color=INK, lw=0.7, solid_joinstyle="round", gid=name)
      start = LEFT + MM_A_SECOND * column * seconds
      paper.text(
        start + 1.5,
        zero + 12,
        name,
        fontsize=9,
        fontweight="bold",
        color=INK,
        bbox=_blank(),
        zorder=1,
      )
      if column:
        paper.plot([start, start], [zero - 3, zero + 3], color=INK, lw=0.8, gid="boundary")
  paper.text(LEFT, 3, f"25 mm/s    {scale}    {rate_hz:g} Hz", fontsize=8, color=INK, bbox=_blank())
  return figure


def heart_montage(
  volumes: np.ndarray, labels: np.ndarray | None, title: str, columns: int = 6
) -> Figure:
  """Short-axis slices from base to apex, ED above ES, with contours where there are labels.

  Args:
    volumes: [2, Z, H, W], grey values 0 to 255, slice 0 at the base.
    labels: [2, Z, H, W] in schema.LABELS, or None.
    title: printed above.
    columns: slices a row.
  """
  _, slices, height, width = volumes.shape
  columns = min(columns, max(slices, 6))
  gap = max(2, width // 32)  # pixels around every slice; contours are closed within it

  def corner(phase, z):
    return (
      gap + z // columns * (2 * height + 4 * gap) + phase * (height + gap),
      gap + z % columns * (width + gap),
    )

  shape = (corner(1, slices - 1)[0] + height + gap, columns * (width + gap) + gap)
  left, foot = 10, 8  # mm
  pixel = (WIDTH - left) / shape[1]
  whole = foot + pixel * shape[0] + HEAD
  figure = blank_figure(title, whole)
  axes = figure.add_axes([left / WIDTH, foot / whole, 1 - left / WIDTH, pixel * shape[0] / whole])
  image, inside = np.full(shape, np.nan), np.zeros(shape, np.uint8)
  for phase, name in enumerate(PHASES):
    for z in range(slices):
      y, x = corner(phase, z)
      image[y : y + height, x : x + width] = volumes[phase, z]
      if labels is not None:
        inside[y : y + height, x : x + width] = labels[phase, z]
      where = {0: " basal", slices - 1: " apical"}.get(z, "") if slices > 1 else ""
      axes.text(
        x + 0.02 * width,
        y + 0.02 * height,
        f"{z + 1}{where}",
        va="top",
        fontsize=7,
        color="white",
        path_effects=[patheffects.withStroke(linewidth=1.5, foreground="black")],
      )
      if z % columns == 0:
        axes.text(
          -left / 2 / pixel,
          y + height / 2,
          name.upper(),
          ha="center",
          va="center",
          fontsize=11,
          color=INK,
          fontweight="bold",
        )
  axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
  axes.axis("off")
  if np.any(inside):
    draw_contours(axes, inside)
    contour_legend(figure, (left / WIDTH, 1 / whole))
  else:
    figure.text(
      left / WIDTH, 3 / whole, "no contours: this record has no labels", fontsize=8, color=MID
    )
  return figure


def of_record(record: dict, info: dict, columns: int = 6) -> list[Figure]:
  """The drawings of a stored record: its ECG and its heart, as far as it has them."""
  figures = []
  name = salted_id(record["subject"], record["visit"])
  profile = info["ecg_profile"]
  if record["has_ecg"]:
    unit = MV_A_UNIT.get(profile)
    ecg = record["ecg"].astype(np.float64) * record["ecg_scale"] * (unit or 1)
    figures.append(
      ecg_paper(
        ecg,
        preprocess_ecg.rate_hz(profile),
        f"{name}    ECG, profile {profile}",
        unit is not None,
      )
    )
  if record["has_cmr"] and "ed_es_volumes" in record:
    spacing = " x ".join(f"{mm:.3g}" for mm in record["spacing"])
    figures.append(
      heart_montage(
        record["ed_es_volumes"],
        record.get("labels"),
        f"{name}    short axis, {spacing} mm",
        columns,
      )
    )
  return figures


def describe(record: dict, info: dict, split: str, index: int) -> str:
  """One line: which record, what it lacks, and its phenotypes with their units."""
  values = [
    f"{name} {value:.4g} {unit}"
    for (name, unit), value in zip(info["phenotypes"].items(), record["phenotypes"])
    if np.isfinite(value)
  ]
  lacks = [
    f"no {what}" for what, field in (("ECG", "has_ecg"), ("CMR", "has_cmr")) if not record[field]
  ]
  name = salted_id(record["subject"], record["visit"])
  return f"{name}, {split} {index}: {', '.join([*lacks, *values]) or 'no phenotypes'}"


def stacked(figures: list[Figure], dpi: int) -> np.ndarray:
  """Figures of one width under each other, as pixels uint8 [H, W, 3]."""
  pixels = []
  for figure in figures:
    figure.set_dpi(dpi)
    figure.canvas.draw()
    pixels.append(np.asarray(figure.canvas.buffer_rgba())[..., :3])
  return np.concatenate(pixels)


def _gain(ecg):
  """mm a unit, of 1, 2 or 5 times a power of ten: the largest that keeps the tallest waves below
  0.8 of a row."""
  reach = np.nanpercentile(np.abs(ecg), 99.8, axis=1).max()
  steps = np.outer(10.0 ** np.arange(-9, 10), (1, 2, 5)).ravel()
  gain = max((g for g in steps if g * reach <= 0.8 * ROW), default=steps[0])
  gain = min(gain, 10.0) if reach == 0 else gain
  return gain, f"normalised, without unit: 10 mm = {10 / gain:g}"


def _paper(title, height):
  """A figure that is one sheet of millimetre paper, and its axes, in mm from the lower left
  corner."""
  figure = blank_figure(title, height)
  paper = figure.add_axes([0, 0, 1, 1])
  paper.set(xlim=(0, WIDTH), ylim=(0, height), xticks=[], yticks=[])
  paper.axis("off")
  paper.set_zorder(-1)  # the title is written over it
  for step, color, width in ((1, SMALL, 0.3), (5, LARGE, 0.55)):
    lines = [[(x, 0), (x, height - HEAD)] for x in range(0, WIDTH + 1, step)]
    lines += [[(0, y), (WIDTH, y)] for y in range(0, height - HEAD + 1, step)]
    paper.add_collection(
      LineCollection(lines, colors=color, linewidths=width, zorder=0), autolim=False
    )
  return figure, paper


def blank_figure(title, height):
  figure = Figure(figsize=(WIDTH / 25.4, height / 25.4), facecolor="white")
  FigureCanvasAgg(figure)
  figure.text(5 / WIDTH, 1 - 5 / height, plain(title), va="center", fontsize=9, color=INK)
  return figure


def footnote(figure, note, height):
  if note:
    figure.text(
      1 - 4 / WIDTH, 3 / height, plain(note), ha="right", fontsize=7, style="italic", color=MID
    )


def contour_legend(figure, corner, first=()):
  """What the lines of `draw_contours` are, after the handles of `first`, {name: handle}."""
  handles = dict(first) | {
    name: Line2D([], [], color=color, ls=line, lw=1.6) for name, color, line in CONTOURS.values()
  }
  figure.legend(
    handles.values(),
    handles,
    loc="lower left",
    ncols=len(handles),
    fontsize=8,
    handlelength=3,
    facecolor="#333333",
    labelcolor="white",
    edgecolor="none",
    framealpha=1,
    borderpad=0.4,
    borderaxespad=0,
    bbox_to_anchor=corner,
  )


def draw_contours(axes, labels):
  """The borders of LABELS in an image [H, W]."""
  for structures, (_, color, line) in CONTOURS.items():
    mask = np.isin(labels, [LABELS[name] for name in structures])
    if mask.any():
      drawn = axes.contour(
        mask.astype(np.float32), levels=[0.5], colors=[color], linestyles=[line], linewidths=1.3
      )
      drawn.set_gid("+".join(structures))
      drawn.set_path_effects([patheffects.withStroke(linewidth=2.4, foreground="#000000a0")])


def _blank():
  return {"fc": "white", "ec": "none", "pad": 0.8, "alpha": 0.75}
