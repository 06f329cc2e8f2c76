"""The page `quality.html`: one file that loads nothing, for a phone or a desk, with or without
colour."""

import io
import re

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from mmcl_jax.evaluators import pages
from mmcl_jax.evaluators.figures import INK, LIGHT, MID, plain

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
  for name, found in phenotypes.items():
    groups = []
    for who in ("all", "women", "men"):
      known = found["published"].get(who)
      groups.append(
        {
          "spread": _spread(found if who == "all" else found.get(who)),
          "published": _given(known) if known else "",
          "far": who in found["far_from_published"],
        }
      )
    outside = found["outside_4_sd"]
    rows.append(
      {
        "name": name,
        "unit": found["unit"],
        "n": found["n"],
        "missing": found["missing"],
        "median": _interval(found),
        "outside": "-" if outside is None else f"{outside:.2%}",
        "groups": groups,
      }
    )
  return rows


def published_in(phenotypes: dict) -> list[str]:
  """The works that the published moments are from, each once."""
  found = {}
  for phenotype in phenotypes.values():
    for moments in phenotype["published"].values():
      found[re.split("[;:] ", moments["source"])[0]] = None
  return list(found)


def _spread(moments):
  if not moments or moments["mean"] is None:
    return "-"
  if moments["sd"] is None:
    return f"{moments['mean']:.4g}"
  digits = _decimals(moments["sd"])
  return f"{moments['mean']:.{digits}f} \u00b1 {moments['sd']:.{digits}f}"


def _given(moments):
  """Published moments, with as many figures as were published."""
  return f"{moments['mean']:g}" + (
    f" \u00b1 {moments['sd']:g}" if moments["sd"] is not None else ""
  )


def _interval(moments):
  if not moments["n"]:
    return "-"
  middle, low, high = (
    f"{moments['quantiles'][q]:.{_decimals(moments['sd'])}f}" for q in ("0.5", "0.05", "0.95")
  )
  return f"{middle} [{low}, {high}]"


def _decimals(sd):
  """Decimals that give an SD three figures."""
  return int(np.clip(2 - np.floor(np.log10(sd)), 0, 9)) if sd else 2


def histogram(name: str, unit: str, parts: dict[str, np.ndarray], known: dict[str, dict]) -> Figure:
  """A phenotype by sex, and under the axis what is published: its mean and two SD to either side.

  Args:
    parts: values [n] of LINES' groups, NaN where not measured; at least one is.
    known: `mean` and `sd` (or None) of groups.
  """
  parts = {who: part[np.isfinite(part)] for who, part in parts.items()}
  parts = {who: part for who, part in parts.items() if len(part)}
  together = np.concatenate(list(parts.values()))
  low, high = np.quantile(together, [0.005, 0.995])
  margin = 0.3 * (high - low) or max(abs(low) * 0.1, 1.0)
  low, high = max(low - margin, together.min()), min(high + margin, together.max())
  if low == high:
    low, high = low - margin, high + margin
  bins = np.linspace(low, high, int(np.clip(np.sqrt(len(together)), 8, 40)) + 1)
  figure = Figure(figsize=(2.9, 2.2), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  top = max(np.histogram(part, bins)[0].max() for part in parts.values()) or 1
  for who, part in parts.items():
    line, color = LINES[who]
    axes.hist(part, bins, histtype="stepfilled", facecolor=LIGHT, alpha=0.5, lw=0)
    axes.hist(part, bins, histtype="step", color=color, ls=line, lw=1.1)
    axes.plot([], [], color=color, ls=line, lw=1.1, label=f"{who}, n = {len(part):,}")
  compared = [who for who in parts if who in known] or [who for who in known if who == "all"]
  for i, who in enumerate(compared):
    (line, color), mean, sd, y = (
      LINES[who],
      known[who]["mean"],
      known[who]["sd"],
      -(0.08 + 0.1 * i) * top,
    )
    axes.plot(mean, y, marker="D", ms=3.5, color=color)
    if sd is not None:
      axes.plot([mean - 2 * sd, mean + 2 * sd], [y, y], ls=line, color=color, lw=1.4)
  outside = np.sum((together < low) | (together > high))
  axes.set_title(plain(name), fontsize=9, fontweight="bold", loc="left")
  axes.set_xlabel(plain(unit) + (f"  ({outside:,} beyond the axis)" if outside else ""), fontsize=8)
  axes.set_ylim(-(0.06 + 0.1 * len(compared)) * top if compared else 0, 1.05 * top)
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


def png(pixels: np.ndarray, colours: int) -> bytes:
  """PNG with a palette, of pixels uint8 [H, W, 3]: a third of the size, and no difference to the
  eye."""
  file = io.BytesIO()
  image = Image.fromarray(np.ascontiguousarray(pixels)).quantize(colours, dither=Image.Dither.NONE)
  image.save(file, "PNG", optimize=True)
  return file.getvalue()
