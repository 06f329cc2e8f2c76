"""The page `quality.html`: one file that loads nothing, for a phone or a desk, with or without
colour."""

import io
import re

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from mmcl_jax.reports import pages
from mmcl_jax.reports.figures import INK, LIGHT, MID, plain

LISTED = 1000  # of what was left out, listed on the page; quality.json has all
LINES = {"women": ("-", INK), "men": ("--", INK), "sex unknown": (":", INK), "all": ("-", MID)}


def page(summary: dict, images: dict[str, bytes], sheet: list[tuple[str, bytes]]) -> str:
  """One self-contained HTML page; its policy forbids it to load anything.

  Args:
    summary: of quality.summarise.
    images: PNGs of the phenotypes' histograms, by name.
    sheet: caption and PNG of the records that are drawn, b"" of one without a signal.
  """
  kept = sum(summary["counts"].values())
  funnel = list(summary["steps"].items())
  for split, count in summary["counts"].items():
    funnel.append((f"of which {split}", count))
  return pages.render(
    "quality.html.j2",
    heading="Quality of the cohort",
    summary=summary,
    kept=kept,
    rejected=len(summary["rejected"]),
    listed=LISTED,
    funnel=funnel,
    most=max([*summary["steps"].values(), kept, 1]),
    phenotypes=phenotype_rows(summary["phenotypes"]),
    sources="; ".join(published_in(summary["phenotypes"])),
    images=images,
    sheet=sheet,
  )


def phenotype_rows(phenotypes: dict) -> list[dict]:
  """The cells of the table of phenotypes, a dict a row; `groups` are of all, women and men."""
  rows = []
  for name, phenotype in phenotypes.items():
    groups = []
    for who in ("all", "women", "men"):
      moments = phenotype if who == "all" else phenotype.get(who)
      published = phenotype["published"].get(who)
      groups.append(
        {
          "spread": mean_and_sd(moments),
          "published": published_mean_and_sd(published) if published else "",
          "far": who in phenotype["far_from_published"],
        }
      )
    outside = phenotype["outside_4_sd"]
    rows.append(
      {
        "name": name,
        "unit": phenotype["unit"],
        "n": phenotype["n"],
        "missing": phenotype["missing"],
        "median": median_and_range(phenotype),
        "outside": "-" if outside is None else f"{outside:.2%}",
        "groups": groups,
      }
    )
  return rows


def published_in(phenotypes: dict) -> list[str]:
  """The works that the published moments are from, each once."""
  works = []
  for phenotype in phenotypes.values():
    for moments in phenotype["published"].values():
      work = re.split("[;:] ", moments["source"])[0]
      if work not in works:
        works.append(work)
  return works


def mean_and_sd(moments: dict | None) -> str:
  if not moments or moments["mean"] is None:
    return "-"
  mean = moments["mean"]
  sd = moments["sd"]
  if sd is None:
    return f"{mean:.4g}"
  digits = decimals(sd)
  return f"{mean:.{digits}f} \u00b1 {sd:.{digits}f}"


def published_mean_and_sd(moments: dict) -> str:
  """Published moments, with as many figures as were published."""
  mean = f"{moments['mean']:g}"
  if moments["sd"] is None:
    return mean
  return f"{mean} \u00b1 {moments['sd']:g}"


def median_and_range(moments: dict) -> str:
  """Median and the 5th and 95th percentile."""
  if not moments["n"]:
    return "-"
  digits = decimals(moments["sd"])
  quantiles = moments["quantiles"]
  median, low, high = (f"{quantiles[q]:.{digits}f}" for q in ("0.5", "0.05", "0.95"))
  return f"{median} [{low}, {high}]"


def decimals(sd: float | None) -> int:
  """Decimals that give an SD three figures."""
  if not sd:
    return 2
  return int(np.clip(2 - np.floor(np.log10(sd)), 0, 9))


def histogram(
  name: str,
  unit: str,
  values: dict[str, np.ndarray],
  published: dict[str, dict],
) -> Figure:
  """A phenotype by sex, and under the axis what is published: its mean and two SD to either side.

  Args:
    values: [n] of LINES' groups, NaN where not measured; at least one is.
    published: `mean` and `sd` (or None) of groups.
  """
  measured = {}
  for who, x in values.items():
    x = x[np.isfinite(x)]
    if len(x):
      measured[who] = x
  together = np.concatenate(list(measured.values()))
  bins = histogram_bins(together)
  figure = Figure(figsize=(2.9, 2.2), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  counts = [np.histogram(x, bins)[0] for x in measured.values()]
  top = np.max(counts) or 1
  for who, x in measured.items():
    line, color = LINES[who]
    axes.hist(x, bins, histtype="stepfilled", facecolor=LIGHT, alpha=0.5, lw=0)
    axes.hist(x, bins, histtype="step", color=color, ls=line, lw=1.1)
    axes.plot([], [], color=color, ls=line, lw=1.1, label=f"{who}, n = {len(x):,}")
  compared = [who for who in measured if who in published]
  if not compared and "all" in published:
    compared = ["all"]
  for i, who in enumerate(compared):
    draw_published(axes, who, published[who], -(0.08 + 0.1 * i) * top)
  outside = np.sum((together < bins[0]) | (together > bins[-1]))
  label = plain(unit)
  if outside:
    label += f"  ({outside:,} beyond the axis)"
  axes.set_title(plain(name), fontsize=9, fontweight="bold", loc="left")
  axes.set_xlabel(label, fontsize=8)
  bottom = -(0.06 + 0.1 * len(compared)) * top if compared else 0
  axes.set_ylim(bottom, 1.05 * top)
  axes.set_yticks([t for t in axes.get_yticks() if 0 <= t <= 1.05 * top])
  axes.axhline(0, color=INK, lw=0.6)
  axes.spines[["top", "right"]].set_visible(False)
  axes.tick_params(labelsize=7)
  axes.legend(
    fontsize=6.5,
    frameon=False,
    loc="lower right",
    bbox_to_anchor=(1, 1),
    ncols=2,
    borderaxespad=0,
    columnspacing=0.8,
    handlelength=1.8,
  )
  return figure


def draw_published(axes, who: str, moments: dict, y: float) -> None:
  """The mean, and two SD to either side where that is published."""
  line, color = LINES[who]
  mean = moments["mean"]
  sd = moments["sd"]
  axes.plot(mean, y, marker="D", ms=3.5, color=color)
  if sd is not None:
    axes.plot([mean - 2 * sd, mean + 2 * sd], [y, y], ls=line, color=color, lw=1.4)


def histogram_bins(values: np.ndarray) -> np.ndarray:
  """Edges of the bins: 0.5 % of the values at either end may lie outside."""
  low, high = np.quantile(values, [0.005, 0.995])
  margin = 0.3 * (high - low) or max(abs(low) * 0.1, 1.0)
  low = max(low - margin, values.min())
  high = min(high + margin, values.max())
  if low == high:
    low = low - margin
    high = high + margin
  count = int(np.clip(np.sqrt(len(values)), 8, 40))
  return np.linspace(low, high, count + 1)


def png(pixels: np.ndarray, colours: int) -> bytes:
  """PNG with a palette, of pixels uint8 [H, W, 3]: a third of the size, and no difference to the
  eye."""
  file = io.BytesIO()
  image = Image.fromarray(np.ascontiguousarray(pixels))
  image = image.quantize(colours, dither=Image.Dither.NONE)
  image.save(file, "PNG", optimize=True)
  return file.getvalue()
