"""The page `quality.html`: one file that loads nothing, for a phone or a desk, with or without
colour."""

import base64
import io
import re

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from mmcl_jax.evaluators.figures import INK, LIGHT, MID, plain
from mmcl_jax.evaluators.report import STYLE, as_html

LISTED = 1000  # of what was left out, listed on the page; quality.json has all
LINES = {"women": ("-", INK), "men": ("--", INK), "sex unknown": (":", INK), "all": ("-", MID)}
PAGE_STYLE = """body{max-width:72em}td.t,th.t{text-align:left;white-space:normal;overflow-wrap:anywhere}
.bar{width:8em;background:#e8e8e8}.bar div{background:#555;height:.7em}
.scroll img{min-width:46em;width:100%;display:block}figure{margin:1.5em 0}
figcaption{font-size:.9em;overflow-wrap:anywhere}.small{font-size:.85em;color:#555}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(15em,1fr));gap:.6em}.tiles img{width:100%}
code{white-space:nowrap}summary{cursor:pointer;padding:.4em 0}"""


def page(summary: dict, images: dict[str, bytes], sheet: list[tuple[str, bytes]]) -> str:
  """One self-contained HTML page; its policy forbids it to load anything."""
  kept, rejected = sum(summary["counts"].values()), len(summary["rejected"])
  most = max([*summary["steps"].values(), kept, 1])
  counts = [
    *summary["steps"].items(),
    *((f"of which {split}", n) for split, n in summary["counts"].items()),
  ]
  funnel = [
    [as_html(step), f"{n:,}", f'<div class="bar"><div style="width:{n / most:.1%}"></div></div>']
    for step, n in counts
  ]
  parts = ["<h1>Quality of the cohort</h1>"]
  if summary["note"]:
    parts.append(f'<p class="note">{as_html(summary["note"])}</p>')
  parts += [
    f"<p><b>{kept:,} records kept, {rejected:,} left out</b>, {len(summary['flagged']):,} kept with a remark."
    "</p>",
    *(f"<p><b>Look:</b> {as_html(text)}.</p>" for text in summary["suspicions"]),
    "<dl>"
    + "".join(
      f"<dt>{as_html(name.replace('_', ' '))}</dt><dd>{as_html(value)}</dd>"
      for name, value in summary["cohort"].items()
    )
    + "</dl>",
    "<h2>From files to records</h2>",
    _table(["t:step", "count", ""], funnel),
    "<h2>Left out, and why</h2>",
    _groups(summary["reasons"], "reason", "Nothing was left out."),
  ]
  if rejected:
    rows = [
      [f"<code>{as_html(entry['id'])}</code>", as_html(entry["reason"])]
      for entry in summary["rejected"][:LISTED]
    ]
    more = (
      f"<p>The other {rejected - LISTED:,} are in quality.json.</p>" if rejected > LISTED else ""
    )
    parts.append(
      f"<details><summary>All that was left out ({rejected:,})</summary>"
      f"{_table(['t:record', 't:reason'], rows)}{more}</details>"
    )
  parts += [
    "<h2>Kept with a remark</h2>",
    _groups(summary["flags"], "remark", "No record has a remark."),
  ]
  parts += ["<h2>Phenotypes</h2>", *_phenotypes(summary["phenotypes"])]
  if images:
    parts += [
      '<p class="small">Under the axis: published mean (diamond) and two SD to either side.</p>',
      '<div class="tiles">'
      + "".join(_image(f"histogram of {name}", image) for name, image in images.items())
      + "</div>",
    ]
  parts += [f"<h2>{len(sheet)} records drawn at random</h2>"]
  parts += [
    f"<figure><figcaption>{as_html(caption)}</figcaption>"
    + (f'<div class="scroll">{_image("ECG and heart", image)}</div>' if image else "")
    + "</figure>"
    for caption, image in sheet
  ]
  parts.append(
    '<p class="small">This page shows data of persons under salted names: guard it like the cohort.</p>'
  )
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Quality of the cohort</title>'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'\">"
    f'<meta name="viewport" content="width=device-width"><style>{STYLE}\n{PAGE_STYLE}</style></head>\n<body>\n'
    + "\n".join(parts)
    + "\n</body></html>\n"
  )


def _phenotypes(phenotypes):
  if not phenotypes:
    return ["<p>This cohort has no phenotypes.</p>"]
  rows, sources = [], {}
  for name, p in phenotypes.items():
    known = p["published"]
    cells = [
      f"{as_html(name)}<br><small>{as_html(p['unit'])}</small>",
      f"{p['n']:,}" + (f"<br><small>{p['missing']:,} missing</small>" if p["missing"] else ""),
      _interval(p),
      "-" if p["outside_4_sd"] is None else f"{p['outside_4_sd']:.2%}",
    ]
    for who in ("all", "women", "men"):
      mark = "<b>far off</b> " if who in p["far_from_published"] else ""
      cells.append(
        _spread(p if who == "all" else p.get(who))
        + (f"<br><small>{mark}{_given(known[who])}</small>" if who in known else "")
      )
    rows.append(cells)
    sources |= {re.split("[;:] ", moments["source"])[0]: None for moments in known.values()}
  heads = ["phenotype", "n", "median [5, 95 %]", "outside 4 SD", "all", "women", "men"]
  return [
    _table(heads, rows),
    '<p class="small">All, women, men: mean \u00b1 SD, and under it what is published for UK Biobank '
    f"({as_html('; '.join(sources) or 'nothing on these')}). Far off: the mean is more than one published SD "
    "away from the published one: another population or method, or a wrong unit or column.</p>",
  ]


def _groups(groups, what, none):
  if not groups:
    return f"<p>{none}</p>"
  rows = [
    [
      f"{group['records']:,}",
      f"{as_html(group['text'])}<br><small>such as "
      + ", ".join(f"<code>{as_html(name)}</code>" for name in group["examples"])
      + "</small>",
    ]
    for group in groups
  ]
  return _table(["records", f"t:{what} (# = any number)"], rows)


def _table(heads, rows):
  """HTML of a table; a head that begins with t: is of a column of text that may wrap. Cells are
  HTML already."""
  kinds = [' class="t"' if head.startswith("t:") else "" for head in heads]
  head = "".join(
    f"<th{kind}>{as_html(head.removeprefix('t:'))}</th>" for kind, head in zip(kinds, heads)
  )
  body = "".join(
    "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row)) + "</tr>\n"
    for row in rows
  )
  return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'


def _image(title, png):
  return (
    f'<img alt="{as_html(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
  )


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
