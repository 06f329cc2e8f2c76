"""What a cardiologist looks at: the 12-lead ECG on its paper, and the short axis at ED and ES with
its contours.

Like mmcl_jax.reports.figures: Figures without pyplot, drawn so that nothing depends on colour.
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
from mmcl_jax.reports.figures import plain

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
BEHIND_TEXT = {"fc": "white", "ec": "none", "pad": 0.8, "alpha": 0.75}
CONTOURS = {  # what is inside: name in the legend, colour, line
  ("LV",): ("LV cavity", "#ffe14d", "-"),
  ("LV", "MYO"): ("LV epicardium (LV + MYO)", "#7fe3ff", (0, (4, 1.5))),
  ("RV",): ("RV cavity", "#ff4d94", (0, (1, 1))),
}


def ecg_paper(
  ecg: np.ndarray,
  rate_hz: float,
  title: str,
  millivolts: bool = True,
) -> Figure:
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
  if millivolts:
    gain, scale = MM_A_MV, "10 mm/mV"
  else:
    gain, scale = fitting_gain(ecg)
  rows = [*PAGE, (RHYTHM,)]
  height = FOOT + ROW * len(rows) + 2 + HEAD
  figure, paper = millimetre_paper(title, height)
  for row, names in enumerate(rows):
    zero = FOOT + ROW * (len(rows) - row - 1) + BELOW
    draw_calibration(paper, zero)
    seconds = COLUMN_S if len(names) > 1 else COLUMN_S * len(PAGE[0])
    for column, name in enumerate(names):
      first = round(column * seconds * rate_hz)
      last = round((column + 1) * seconds * rate_hz)
      lead = gain * ecg[LEADS.index(name), first:last]
      x = LEFT + MM_A_SECOND * np.arange(first, first + len(lead)) / rate_hz
      start = LEFT + MM_A_SECOND * column * seconds
      draw_lead(paper, x, zero + lead, name, start, zero)
      if column:
        paper.plot(
          [start, start],
          [zero - 3, zero + 3],
          color=INK,
          lw=0.8,
          gid="boundary",
        )
  scales = f"25 mm/s    {scale}    {rate_hz:g} Hz"
  paper.text(LEFT, 3, scales, fontsize=8, color=INK, bbox=BEHIND_TEXT)
  return figure


def draw_lead(
  paper,
  x: np.ndarray,
  y: np.ndarray,
  name: str,
  start: float,
  zero: float,
) -> None:
  """A curve with its name above the left end; all in mm."""
  paper.plot(x, y, color=INK, lw=0.7, solid_joinstyle="round", gid=name)
  paper.text(
    start + 1.5,
    zero + 12,
    name,
    fontsize=9,
    fontweight="bold",
    color=INK,
    bbox=BEHIND_TEXT,
    zorder=1,
  )


def draw_calibration(paper, zero: float) -> None:
  """The pulse of 10 mm at the left of a row."""
  x = (LEFT - 10, LEFT - 7.5, LEFT - 7.5, LEFT - 2.5, LEFT - 2.5, LEFT)
  y = (zero, zero, zero + 10, zero + 10, zero, zero)
  paper.plot(x, y, color=INK, lw=0.8, gid="calibration")


def short_axis_montage(
  volumes: np.ndarray,
  labels: np.ndarray | None,
  title: str,
  columns: int = 6,
) -> Figure:
  """Short-axis slices from base to apex, ED above ES, with contours where there are labels.

  Args:
    volumes: [2, Z, H, W], grey values 0 to 255, slice 0 at the base.
    labels: [2, Z, H, W] in schema.LABELS, or None.
    title: printed above.
    columns: slices a row.
  """
  if labels is None:
    labels = np.zeros(volumes.shape, np.uint8)
  _, slices, height, width = volumes.shape
  columns = min(columns, max(slices, 6))
  corners, shape = montage_layout(slices, height, width, columns)
  left, foot = 10, 8  # mm
  mm_a_pixel = (WIDTH - left) / shape[1]
  image_height = mm_a_pixel * shape[0]
  page_height = foot + image_height + HEAD
  figure = blank_figure(title, page_height)
  axes = figure.add_axes(
    [
      left / WIDTH,
      foot / page_height,
      1 - left / WIDTH,
      image_height / page_height,
    ]
  )
  image = np.full(shape, np.nan)
  label_image = np.zeros(shape, np.uint8)
  for (phase, z), (y, x) in corners.items():
    place = (slice(y, y + height), slice(x, x + width))
    image[place] = volumes[phase, z]
    label_image[place] = labels[phase, z]
    write_slice_name(axes, x + 0.02 * width, y + 0.02 * height, z, slices)
    if z % columns == 0:
      axes.text(
        -left / 2 / mm_a_pixel,
        y + height / 2,
        PHASES[phase].upper(),
        ha="center",
        va="center",
        fontsize=11,
        color=INK,
        fontweight="bold",
      )
  axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
  axes.axis("off")
  x = left / WIDTH
  if label_image.any():
    draw_contours(axes, label_image)
    contour_legend(figure, (x, 1 / page_height))
  else:
    text = "no contours: this record has no labels"
    figure.text(x, 3 / page_height, text, fontsize=8, color=MID)
  return figure


def montage_layout(slices: int, height: int, width: int, columns: int) -> tuple[dict, tuple]:
  """{(phase, z): (y, x) of the upper left corner}, and the height and width of the image, in
  pixels."""
  gap = max(2, width // 32)  # around every slice; contours are closed within it
  corners = {}
  for phase in range(len(PHASES)):
    for z in range(slices):
      row, column = divmod(z, columns)
      y = gap + row * (2 * height + 4 * gap) + phase * (height + gap)
      x = gap + column * (width + gap)
      corners[phase, z] = (y, x)
  last_y, _ = corners[1, slices - 1]
  return corners, (last_y + height + gap, columns * (width + gap) + gap)


def write_slice_name(axes, x: float, y: float, z: int, slices: int) -> None:
  """The number of a slice, in white with a black outline; of the first and the last also which end
  it is."""
  name = str(z + 1)
  if slices > 1 and z == 0:
    name += " basal"
  elif slices > 1 and z == slices - 1:
    name += " apical"
  outline = patheffects.withStroke(linewidth=1.5, foreground="black")
  axes.text(x, y, name, va="top", fontsize=7, color="white", path_effects=[outline])


def of_record(record: dict, info: dict, columns: int = 6) -> list[Figure]:
  """The drawings of a stored record: its ECG and its short axis, as far as it has them."""
  figures = []
  name = salted_id(record["subject"], record["visit"])
  profile = info["ecg_profile"]
  if record["has_ecg"]:
    unit = MV_A_UNIT.get(profile)
    ecg = record["ecg"].astype(np.float64) * record["ecg_scale"] * (unit or 1)
    rate_hz = preprocess_ecg.rate_hz(profile)
    title = f"{name}    ECG, profile {profile}"
    figures.append(ecg_paper(ecg, rate_hz, title, millivolts=unit is not None))
  if record["has_cmr"] and "ed_es_volumes" in record:
    spacing = " x ".join(f"{mm:.3g}" for mm in record["spacing"])
    title = f"{name}    short axis, {spacing} mm"
    labels = record.get("labels")
    figures.append(short_axis_montage(record["ed_es_volumes"], labels, title, columns))
  return figures


def describe(record: dict, info: dict, split: str, index: int) -> str:
  """One line: which record, what it lacks, and its phenotypes with their units."""
  facts = []
  for modality, field in (("ECG", "has_ecg"), ("CMR", "has_cmr")):
    if not record[field]:
      facts.append(f"no {modality}")
  for (name, unit), value in zip(info["phenotypes"].items(), record["phenotypes"]):
    if np.isfinite(value):
      facts.append(f"{name} {value:.4g} {unit}")
  record_name = salted_id(record["subject"], record["visit"])
  return f"{record_name}, {split} {index}: {', '.join(facts) or 'no phenotypes'}"


def stacked(figures: list[Figure], dpi: int) -> np.ndarray:
  """Figures of one width under each other, as pixels uint8 [H, W, 3]."""
  pixels = []
  for figure in figures:
    figure.set_dpi(dpi)
    figure.canvas.draw()
    pixels.append(np.asarray(figure.canvas.buffer_rgba())[..., :3])
  return np.concatenate(pixels)


def fitting_gain(ecg: np.ndarray) -> tuple[float, str]:
  """mm a unit, of 1, 2 or 5 times a power of ten: the largest that keeps the tallest waves below
  0.8 of a row; and that in words."""
  reach = np.nanpercentile(np.abs(ecg), 99.8, axis=1).max()
  powers = 10.0 ** np.arange(-9, 10)
  gains = np.outer(powers, (1, 2, 5)).ravel()
  fitting = gains[gains * reach <= 0.8 * ROW]
  gain = fitting.max() if len(fitting) else gains[0]
  if reach == 0:
    gain = 10.0
  return gain, f"normalised, without unit: 10 mm = {10 / gain:g}"


def millimetre_paper(title: str, height: int):
  """A figure that is one sheet of millimetre paper, and its axes, in mm from the lower left
  corner."""
  figure = blank_figure(title, height)
  paper = figure.add_axes([0, 0, 1, 1])
  paper.set(xlim=(0, WIDTH), ylim=(0, height), xticks=[], yticks=[])
  paper.axis("off")
  paper.set_zorder(-1)  # the title is written over it
  for step, color, width in ((1, SMALL, 0.3), (5, LARGE, 0.55)):
    top = height - HEAD
    lines = []
    for x in range(0, WIDTH + 1, step):
      lines.append([(x, 0), (x, top)])
    for y in range(0, top + 1, step):
      lines.append([(0, y), (WIDTH, y)])
    grid = LineCollection(lines, colors=color, linewidths=width, zorder=0)
    paper.add_collection(grid, autolim=False)
  return figure, paper


def blank_figure(title: str, height: float) -> Figure:
  """A page of WIDTH by `height` mm with its title."""
  figure = Figure(figsize=(WIDTH / 25.4, height / 25.4), facecolor="white")
  FigureCanvasAgg(figure)
  figure.text(
    5 / WIDTH,
    1 - 5 / height,
    plain(title),
    va="center",
    fontsize=9,
    color=INK,
  )
  return figure


def footnote(figure: Figure, note: str, height: float) -> None:
  if note:
    figure.text(
      1 - 4 / WIDTH,
      3 / height,
      plain(note),
      ha="right",
      fontsize=7,
      style="italic",
      color=MID,
    )


def contour_legend(figure, corner, first=()):
  """What the lines of `draw_contours` are, after the handles of `first`, {name: handle}."""
  handles = dict(first)
  for name, color, line in CONTOURS.values():
    handles[name] = Line2D([], [], color=color, ls=line, lw=1.6)
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


def draw_contours(axes, labels: np.ndarray) -> None:
  """The borders of LABELS in an image [H, W]."""
  for structures, (_, color, line) in CONTOURS.items():
    mask = np.isin(labels, [LABELS[name] for name in structures])
    if not mask.any():
      continue
    contour = axes.contour(
      mask.astype(np.float32),
      levels=[0.5],
      colors=[color],
      linestyles=[line],
      linewidths=1.3,
    )
    contour.set_gid("+".join(structures))
    shadow = patheffects.withStroke(linewidth=2.4, foreground="#000000a0")
    contour.set_path_effects([shadow])
