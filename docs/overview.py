"""Draws docs/overview.png: one synthetic subject, and the test R2 that docs/results.md lists.

python docs/overview.py
"""

import re
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("agg")
import matplotlib.pyplot as plt

from mmcl_jax.data import schema, synthetic

HERE = Path(__file__).parent
ROWS = {  # of the table in results.md -> label
  "untrained encoder": "untrained encoder",
  "mae": "ECG alone (masked autoencoder)",
  "joint": "with CMR (joint, one stage)",
  "dual_phase": "with CMR (dual-phase, three stages)",
  "ceiling": "ceiling of this cohort",
}
INK, MUTED, BLUE, GREY = "#222222", "#666666", "#2a6fb0", "#b8bec6"


def main():
  subject = synthetic.subject(5, 7)
  figure = plt.figure(figsize=(10, 3.4))
  grid = figure.add_gridspec(
    2, 3, width_ratios=(2.4, 1.3, 2.3), left=0.01, right=0.97, top=0.86, bottom=0.17, wspace=0.1
  )
  draw_ecg(figure.add_subplot(grid[:, 0]), subject["ecg"])
  draw_heart(figure.add_subplot(grid[0, 1]), subject["ed_es_volumes"][0], "end-diastole")
  draw_heart(figure.add_subplot(grid[1, 1]), subject["ed_es_volumes"][1], "end-systole")
  draw_scores(figure.add_subplot(grid[:, 2]))
  figure.savefig(HERE / "overview.png", dpi=120)


def draw_ecg(axes, ecg):
  """Four leads, the first 3 s, 500 Hz."""
  seconds = np.arange(1500) / 500
  for row, lead in enumerate(("I", "II", "V2", "V5")):
    axes.plot(seconds, ecg[schema.LEADS.index(lead), :1500] - 2.4 * row, color=INK, linewidth=0.8)
    axes.text(-0.06, -2.4 * row, lead, ha="right", va="center", color=MUTED, fontsize=9)
  axes.set_title("an ECG ...", fontsize=11, color=INK)
  axes.set_xlim(-0.25, 3)
  axes.axis("off")


def draw_heart(axes, stack, phase):
  """The middle slice of a short-axis stack [S, H, W]."""
  middle = stack[len(stack) // 2]
  axes.imshow(middle, cmap="gray", interpolation="nearest")
  axes.text(2, 61, phase, color="white", fontsize=8)
  if phase == "end-diastole":
    axes.set_title("... and the same heart's MRI", fontsize=11, color=INK)
  axes.axis("off")


def draw_scores(axes):
  """Test R2 of mass and wall thickness, the mean, with its 95 % interval, from the table."""
  table = (HERE / "results.md").read_text()
  for place, (row, label) in enumerate(ROWS.items()):
    columns = re.search(rf"^\| {row} \|(.*)\|$", table, re.MULTILINE)[1].split("|")
    value, low, high = map(float, re.findall(r"\d\.\d+", columns[1])[:3])
    y, colour = len(ROWS) - place, BLUE if "CMR" in label else GREY
    axes.barh(y, value, height=0.36, color=colour)
    axes.plot((low, high), (y, y), color=INK, linewidth=1)
    axes.text(0.0, y + 0.26, label, fontsize=9, color=INK, va="bottom")
    axes.text(high + 0.01, y, f"{value:.2f}", fontsize=9, color=MUTED, va="center")
  axes.set_title("LV mass and wall thickness from the ECG", fontsize=11, color=INK)
  axes.set_xlabel("test R2 and 95 % interval; synthetic cohort", fontsize=9, color=MUTED)
  axes.set_xlim(0, 0.5)
  axes.set_ylim(0.6, len(ROWS) + 0.9)
  axes.set_yticks([])
  axes.tick_params(labelsize=8, colors=MUTED)
  for side in ("top", "right", "left"):
    axes.spines[side].set_visible(False)


if __name__ == "__main__":
  main()
