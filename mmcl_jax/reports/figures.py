"""Figures of the report. Each function returns a matplotlib Figure, draws with markers, hatches and
line styles that survive greyscale, and takes `note`, a line printed at the foot (such as
support.text.SYNTHETIC_NOTE).

Figures are built directly, without pyplot: nothing global is left behind and no display is needed.
"""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from mmcl_jax.data.schema import ECG_RATE_HZ, LEADS
from mmcl_jax.errors import one_line

INK, MID, LIGHT, ACCENT = "#222222", "#808080", "#d9d9d9", "#1f5a99"
LONGEST = 60  # letters of a name in a figure
LINES = ("-", "--", ":", "-.")
MODELS = {  # of r2_bars: label, marker, fill
  "with_covariates": ("{} + covariates", "D", ACCENT),
  "covariates": ("covariates", "s", MID),
  "random_encoder": ("random encoder", "o", "white"),
}

DISEASE_MODELS = {"embedding": "embedding", "covariates": "covariates", "with_covariates": "both"}


def predicted_against_true(
  y: np.ndarray,
  prediction: np.ndarray,
  results: dict,
  note: str = "",
) -> Figure:
  """One panel per phenotype: prediction against measurement, with the line of identity and the
  scores.

  Args:
    y, prediction: [N, K] on test, in the units of the phenotypes.
    results: `phenotypes` of the results, {NAME: {r2, r2_ci, mae, n, units}}, in the order of the
      columns.
  """
  figure, panels = panel_grid(len(results), 4, (2.6, 2.75), note)
  for k, (name, score) in enumerate(results.items()):
    panel = panels[k]
    true, predicted = measured_rows(y[:, k], prediction[:, k])
    panel_title(panel, name)
    units = plain(score["units"])
    panel.set(
      aspect="equal",
      xlabel=f"measured ({units})",
      ylabel=f"predicted ({units})",
    )
    if not len(true):
      panel.text(0.5, 0.5, "no test labels", ha="center", va="center", fontsize=8, color=MID)
      panel.set(xticks=[], yticks=[])
      continue
    # a few outliers may fall outside
    together = np.concatenate([true, predicted])
    low, high = np.percentile(together, [0.2, 99.8])
    margin = 0.05 * (high - low) or 1.0
    limits = (low - margin, high + 4 * margin)  # room above for the scores
    scatter(panel, true, predicted)
    panel.plot(limits, limits, color=INK, lw=0.8, ls="--")
    panel.set_xlim(limits)
    panel.locator_params(nbins=5)
    panel.set(yticks=panel.get_xticks(), ylim=limits)
    r2 = r2_text(score["r2"], score["r2_ci"])
    panel.text(
      0.04,
      0.97,
      f"{r2}\nMAE {score['mae']:.3g}, n = {score['n']:,}",
      transform=panel.transAxes,
      va="top",
      fontsize=7,
      bbox={"fc": "white", "ec": "none", "alpha": 0.8},
    )
  return figure


def bland_altman(
  y: np.ndarray,
  prediction: np.ndarray,
  results: dict,
  note: str = "",
) -> Figure:
  """One panel per phenotype: prediction minus measurement against their mean, with the bias and the
  limits of agreement.

  Args as in `predicted_against_true`; results also have bias and limits.
  """
  figure, panels = panel_grid(len(results), 4, (2.6, 2.2), note)
  for k, (name, score) in enumerate(results.items()):
    panel = panels[k]
    true, predicted = measured_rows(y[:, k], prediction[:, k])
    panel_title(panel, name)
    units = plain(score["units"])
    panel.set(
      xlabel=f"mean of both ({units})",
      ylabel=f"predicted - measured ({units})",
    )
    scatter(panel, (true + predicted) / 2, predicted - true)
    if np.isfinite(score["bias"]):
      labelled_line(panel, score["bias"], "-")
      for limit in score["limits"]:
        labelled_line(panel, limit, "--")
  return figure


def measured_rows(y: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Both [N], where both are finite."""
  rows = np.isfinite(y) & np.isfinite(prediction)
  return y[rows], prediction[rows]


def scatter(panel, x: np.ndarray, y: np.ndarray) -> None:
  """Points that are the fainter the more there are."""
  alpha = np.clip(150 / max(len(x), 1), 0.08, 0.6)
  panel.scatter(x, y, s=5, c=ACCENT, alpha=float(alpha), lw=0)


def labelled_line(panel, value: float, style: str) -> None:
  """A horizontal line with its value at the right."""
  panel.axhline(value, color=INK, lw=0.9, ls=style)
  panel.annotate(
    f"{value:.3g}",
    (1, value),
    xycoords=("axes fraction", "data"),
    ha="right",
    va="bottom",
    fontsize=7,
  )


def roc_curves(
  y: np.ndarray,
  probability: dict,
  results: dict,
  note: str = "",
) -> Figure:
  """One panel per scored disease: the ROC curve of every model.

  Args:
    y: [N, C], 1 case, 0 control, NaN unknown.
    probability: {model: [N, C]}, of DISEASE_MODELS those there are.
    results: `diseases` of the results, {model: {NAME: {auroc, auroc_ci, ...}}}, names in the order
      of the columns.
  """

  def curve(c, model, score):
    labelled = np.isfinite(y[:, c])
    x = probability[model][labelled, c]
    false_positive, true_positive, _ = roc_curve(y[labelled, c], x)
    low, high = score["auroc_ci"]
    label = f"{score['auroc']:.2f} [{low:.2f}, {high:.2f}]"
    return false_positive, true_positive, label

  return disease_panels(results, note, "false positive rate", "true positive rate", curve, "")


def calibration(results: dict, note: str = "") -> Figure:
  """One panel per scored disease: share of cases against predicted probability, in tenths of the
  rows, of every model."""

  def curve(c, model, score):
    groups = score["reliability"]
    return groups["predicted"], groups["observed"], f"ECE {score['ece']:.3f}"

  return disease_panels(results, note, "predicted probability", "share of cases", curve, "o")


def disease_panels(
  results: dict,
  note: str,
  xlabel: str,
  ylabel: str,
  curve: Callable,
  marker: str,
) -> Figure:
  """Panels of the diseases that are scored; curve(column, model, score) -> x, y, words for the
  legend."""
  names = list(next(iter(results.values())))
  scored = [name for name in names if "auroc" in results["embedding"][name]]
  legend_place = "upper left" if marker else "lower right"
  figure, panels = panel_grid(len(scored), 3, (3.2, 3.0), note)
  for panel, name in zip(panels, scored):
    highest = 0.0
    for (model, label), style in zip(DISEASE_MODELS.items(), LINES):
      score = results.get(model, {}).get(name, {})
      if "auroc" not in score:
        continue
      x, y, words = curve(names.index(name), model, score)
      panel.plot(
        x,
        y,
        ls=style,
        marker=marker,
        ms=3,
        color=ACCENT if model == "embedding" else INK,
        lw=1.1,
        label=f"{label}: {words}",
      )
      highest = max(highest, *x, *y)
    panel.plot((0, highest), (0, highest), color=MID, lw=0.7, ls=":")
    panel_title(panel, name)
    panel.set(xlabel=xlabel, ylabel=ylabel)
    panel.legend(fontsize=6.5, frameon=False, loc=legend_place)
  return figure


def r2_bars(results: dict, note: str = "") -> Figure:
  """R2 of every phenotype from the embedding, bars with 95 % intervals, beside the baselines and
  the ceiling.

  Args:
    results: `phenotypes`, `encoder` (ECG unless given), and, where known, `baselines` and `ceiling`
      ({NAME: R2}), as results.json has them.
  """
  names = list(results["phenotypes"])
  encoder = results.get("encoder", "ECG")
  height = 1.6 + 0.5 * len(names)
  figure = Figure(figsize=(7.2, height), layout="constrained")
  axes = figure.subplots()
  place = np.arange(len(names))
  value, error = r2_and_reach(results["phenotypes"], names)
  axes.barh(
    place,
    value,
    height=0.78,
    color=LIGHT,
    edgecolor=INK,
    lw=0.6,
    label=f"{encoder} embedding",
  )
  axes.errorbar(
    value,
    place - 0.27,
    xerr=error,
    fmt="none",
    ecolor=INK,
    elinewidth=1.2,
    capsize=2.5,
  )
  draw_baselines(axes, results.get("baselines", {}), names, encoder)
  draw_ceiling(axes, results.get("ceiling", {}), names)
  for k in np.flatnonzero(np.isnan(value)):
    axes.text(0.01, k, "not scored", va="center", fontsize=7, color=MID)
  axes.axvline(0, color=INK, lw=0.8)
  axes.set_yticks(place, map(plain, names))
  axes.set_ylim(len(names) - 0.45, -0.55)
  axes.set(xlabel="$R^2$ on the test split (95 % interval over subjects)")
  left, _ = axes.get_xlim()
  axes.set_xlim(max(left, -0.5), 1.02)  # one hopeless probe must not hide the rest
  bare_axes(axes, grid="x")
  figure.legend(
    loc="outside upper center",
    ncols=5,
    frameon=False,
    fontsize=8,
    columnspacing=1.2,
    handletextpad=0.4,
  )
  return finish(figure, note)


def draw_baselines(axes, baselines: dict, names: list[str], encoder: str) -> None:
  """A marker with its interval for every phenotype and baseline of MODELS, beside the bars."""
  place = np.arange(len(names))
  scored = [model for model in MODELS if model in baselines]
  for offset, model in zip((-0.03, 0.13, 0.29), scored):
    label, marker, fill = MODELS[model]
    value, error = r2_and_reach(baselines[model], names)
    axes.errorbar(
      value,
      place + offset,
      xerr=error,
      fmt=marker,
      ms=4.5,
      mfc=fill,
      mec=INK,
      mew=0.7,
      ecolor=INK,
      elinewidth=0.7,
      label=label.format(encoder),
    )


def draw_ceiling(axes, ceiling: dict, names: list[str]) -> None:
  if not ceiling:
    return
  place = np.arange(len(names))
  r2 = [ceiling.get(name, np.nan) for name in names]
  axes.vlines(r2, place - 0.39, place + 0.39, color=INK, lw=2.4)
  axes.plot([], [], "|", ms=10, mew=2.4, color=INK, label="ceiling")


def reconstruction(
  ecg: np.ndarray,
  rebuilt: np.ndarray,
  mask: np.ndarray,
  patch: int,
  leads=("I", "II", "V1", "V5"),
  units: str = "normalised",
  note: str = "",
  rate_hz: int = ECG_RATE_HZ,
) -> Figure:
  """Some leads of one recording: as recorded, as the masked autoencoder rebuilt it, and what it did
  not see (shaded).

  Args:
    ecg, rebuilt: [L, T].
    mask: bool, True = hidden; [L, T / patch], or [T / patch] for all leads.
    patch: samples per patch.
    leads: names of the leads to show.
    units: of the amplitude.
    rate_hz: samples per second.
  """
  samples = ecg.shape[1]
  patches = np.shape(mask)[-1]
  mask = np.broadcast_to(mask, (len(ecg), patches)).astype(bool)
  height = 1.0 + 1.25 * len(leads)
  figure = Figure(figsize=(9, height), layout="constrained")
  panels = figure.subplots(len(leads), 1, sharex=True, squeeze=False).ravel()
  seconds = np.arange(samples) / rate_hz
  for panel, lead in zip(panels, leads):
    row = LEADS.index(lead)
    for start in np.flatnonzero(mask[row]) * patch / rate_hz:
      panel.axvspan(start, start + patch / rate_hz, color="#ebebeb", lw=0)
    hidden = np.repeat(mask[row], patch)[:samples]
    hidden_part = np.where(hidden, rebuilt[row], np.nan)
    panel.plot(seconds, ecg[row], color="#9a9a9a", lw=1.6, label="recorded")
    panel.plot(seconds, hidden_part, color="#123a66", lw=0.9, label="reconstructed")
    panel.set_ylabel(lead, rotation=0, ha="right", va="center", fontweight="bold")
    panel.margins(x=0)
    bare_axes(panel)
  panel.set_xlabel(f"time (s); amplitude {units}; shaded = hidden from the encoder")
  figure.legend(
    *panel.get_legend_handles_labels(),
    loc="outside upper right",
    ncols=2,
    frameon=False,
    fontsize=8,
  )
  return finish(figure, note)


def training_curves(records: list, note: str = "") -> Figure:
  """Every metric over the steps, one panel per group: names that agree up to their last '/' share a
  panel.

  Args:
    records: rows of metrics.jsonl, {'step': int, NAME: number}.
  """
  curves = {}
  for record in records:
    for name, value in record.items():
      if name != "step" and isinstance(value, (int, float)):
        group = name.rpartition("/")[0] or name
        lines = curves.setdefault(group, {})
        points = lines.setdefault(name, [])
        points.append((record["step"], value))
  figure, panels = panel_grid(len(curves), 3, (3.6, 2.5), note)
  colors = (ACCENT, INK, MID)
  for panel, (group, lines) in zip(panels, curves.items()):
    for i, (name, points) in enumerate(lines.items()):
      step, value = np.array(points, np.float64).T
      panel.plot(
        step,
        value,
        ls=LINES[i % 4],
        marker="." if len(step) < 30 else None,
        lw=1.1,
        color=colors[i // 4 % 3],
        label=plain(name.rpartition("/")[2]),
      )
    panel.set_xlabel("step")
    if len(lines) > 1:
      panel_title(panel, group)
      panel.legend(fontsize=6.5, frameon=False, ncols=1 + len(lines) // 7)
    else:
      panel_title(panel, name)
  return figure


def retrieval_ranks(ranks: dict, note: str = "") -> Figure:
  """Share of queries answered within the first k candidates, against k, for both directions and for
  chance.

  Args:
    ranks: {direction: int [N]}, of retrieval.ranks.
  """
  figure = Figure(figsize=(4.6, 3.4), layout="constrained")
  axes = figure.subplots()
  count = len(next(iter(ranks.values())))
  k = np.arange(1, count + 1)
  for style, (direction, of_queries) in zip(LINES, ranks.items()):
    source, target = direction.upper().split("_TO_")
    axes.step(
      np.sort(of_queries),
      k / count,
      ls=style,
      color=ACCENT,
      where="post",
      label=rf"{source} $\rightarrow$ {target}",
    )
  axes.plot(k, k / count, color=MID, ls=":", label="chance")
  axes.set(
    xscale="log",
    xlim=(1, max(2, count)),
    ylim=(0, 1.02),
    xlabel=f"first k of {count:,} candidates",
    ylabel="share of queries answered",
  )
  axes.legend(fontsize=8, frameon=False, loc="upper left")
  bare_axes(axes, grid="both")
  return finish(figure, note)


def low_data(curves: dict, note: str = "") -> Figure:
  """One panel per group: score against the number of training subjects with labels, mean and SD
  over random subsets.

  Args:
    curves: {MODEL: {GROUP: [{subjects, mean, sd}]}}, of evaluators.low_data.
  """
  groups = list(next(iter(curves.values())))
  figure, panels = panel_grid(len(groups), 4, (2.7, 2.5), note)
  for panel, group in zip(panels, groups):
    for (model, of_groups), style, marker in zip(curves.items(), LINES, "os^D"):
      points = of_groups[group]
      panel.errorbar(
        [point["subjects"] for point in points],
        [point["mean"] for point in points],
        yerr=[point["sd"] for point in points],
        ls=style,
        marker=marker,
        ms=4,
        lw=1.1,
        elinewidth=0.9,
        capsize=2,
        color=ACCENT if model == "embedding" else INK,
        mfc="white" if marker != "o" else None,
        label=model.replace("_", " "),
      )
    panel.set(
      xscale="log",
      xlabel="labelled training subjects",
      ylabel="AUROC" if "AUROC" in group else "mean $R^2$",
    )
    panel_title(panel, group)
  panels[0].legend(fontsize=6.5, frameon=False)
  return figure


def forest(
  scores: dict,
  columns: list[str],
  rows: Sequence[str],
  lines: Sequence[str],
  xlabel: str,
  note: str = "",
) -> Figure:
  """One panel per column: a point with its 95 % interval per row, and vertical lines to hold the
  rows against.

  Args:
    scores: {ROW: {COLUMN: {mean, ci}}}; numbers may be None.
    columns: of the panels.
    rows: from top to bottom; one that `scores` does not have is left out.
    lines: rows that are drawn as lines through the panel.
    xlabel: what is scored.
  """
  rows = [row for row in rows if row in scores]
  lines = [row for row in lines if row in scores]
  across = min(len(columns), 4)
  down = -(-len(columns) // across)
  width = 2.2 + 2.2 * across
  height = 0.5 + (0.9 + 0.24 * len(rows)) * down
  figure = Figure(figsize=(width, height), layout="constrained")
  grid = figure.subplots(down, across, sharey=True, squeeze=False)
  panels = grid.ravel()
  for panel in panels[len(columns) :]:
    panel.remove()
  for panel, column in zip(panels, columns):
    forest_panel(panel, {row: entries[column] for row, entries in scores.items()}, rows, lines)
    panel_title(panel, column)
    panel.set_xlabel(xlabel)
    bare_axes(panel, grid="x")
  for panel in grid[:, 0]:
    panel.set_yticks(np.arange(len(rows)), map(plain, rows))
  panels[0].set_ylim(len(rows) - 0.5, -0.5)
  figure.legend(
    *panels[0].get_legend_handles_labels(),
    loc="outside upper center",
    ncols=4,
    frameon=False,
    fontsize=8,
  )
  return finish(figure, note)


def forest_panel(panel, scores: dict, rows: list[str], lines: list[str]) -> None:
  """One panel of `forest`; scores: {ROW: {mean, ci}}."""
  for row, style in zip(lines, LINES):
    mean = np.float64(scores[row]["mean"])  # None -> NaN
    panel.axvline(mean, color=MID, ls=style, lw=1.0, label=plain(row))
  mean = np.array([scores[row]["mean"] for row in rows], np.float64)
  low, high = np.array([scores[row]["ci"] for row in rows], np.float64).T
  panel.errorbar(
    mean,
    np.arange(len(rows)),
    xerr=np.maximum([mean - low, high - mean], 0),
    fmt="o",
    ms=4,
    color=ACCENT,
    ecolor=INK,
    elinewidth=0.9,
    capsize=2,
  )


def plain(text) -> str:
  """A user's text for matplotlib: $ begins no formula; what is longer than LONGEST would fill the
  figure and is cut."""
  text = one_line(text)
  if len(text) > LONGEST:
    text = f"{text[:LONGEST]}\u2026"
  return text.replace("$", r"\$")


def panel_title(panel, name):
  panel.set_title(plain(name), fontsize=9, fontweight="bold")


def panel_grid(count: int, columns: int, size: tuple[float, float], note: str):
  """A figure and its `count` panels, in rows of `columns`, each of `size` inches."""
  columns = max(1, min(columns, count))
  rows = max(1, -(-count // columns))
  width, height = size
  figure = Figure(figsize=(width * columns, height * rows + 0.3), layout="constrained")
  panels = figure.subplots(rows, columns, squeeze=False).ravel()
  for panel in panels[:count]:
    bare_axes(panel)
  for panel in panels[count:]:
    panel.remove()
  return finish(figure, note), panels[:count]


def bare_axes(axes, grid=None):
  axes.spines[["top", "right"]].set_visible(False)
  axes.tick_params(labelsize=7)
  axes.xaxis.label.set_fontsize(8)
  axes.yaxis.label.set_fontsize(8)
  if grid:
    axes.grid(axis=grid, color=LIGHT, lw=0.5)
    axes.set_axisbelow(True)


def finish(figure, note):
  FigureCanvasAgg(figure)
  if note:
    figure.supxlabel(
      plain(note),
      fontsize=7,
      style="italic",
      color=MID,
      x=0.99,
      ha="right",
    )
  return figure


def r2_and_reach(scores: dict, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
  """R2 [K] and the reach of its interval below and above [2, K]."""
  of_names = [scores[name] for name in names]
  value = np.array([score["r2"] for score in of_names], np.float64)
  low, high = np.array([score["r2_ci"] for score in of_names], np.float64).T
  return value, np.maximum([value - low, high - value], 0)


def r2_text(value: float, ci: tuple[float, float]) -> str:
  if not np.isfinite(value):
    return "not scored"
  low, high = ci
  return f"$R^2$ {value:z.2f} [{low:z.2f}, {high:z.2f}]"
