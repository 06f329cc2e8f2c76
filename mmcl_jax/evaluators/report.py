"""The report of an evaluation: a folder of JSON, CSV, NPZ, PNG and one HTML page; and a table for the terminal."""

import base64
import csv
import html
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np

from mmcl_jax.errors import UserError

SECTIONS = ("phenotypes", "baselines", "ceiling", "share_of_ceiling", "differences", "diseases", "retrieval")
MODELS = {"random_encoder": "random", "covariates": "covariates", "with_covariates": "emb + cov"}
DPI = 150
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
th{border-bottom:2px solid #222}th:first-child,td:first-child{text-align:left}
img{max-width:100%}.note{font-style:italic;color:#555}dl{display:grid;grid-template-columns:max-content 1fr;gap:0 1em}
dt{color:#555}dd{margin:0;overflow-wrap:anywhere}"""


def write(results: dict, predictions: dict, probe: dict, figures: dict, out_dir) -> Path:
  """Writes the whole report beside `out_dir` and then puts it in its place, so that no reader meets half a report.

  Args:
    results: SECTIONS as the evaluators give them (any may be absent) and any metadata; `note` heads the page.
    predictions: {name: array}, as phenotypes.evaluate gives them.
    probe: {name: array}, as phenotypes.evaluate gives it.
    figures: {name: Figure}.
    out_dir: the folder of the report; an earlier report there is replaced.

  Returns:
    the path of the folder.
  """
  out = Path(out_dir).resolve()
  if out.exists() and not (out / "results.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
    raise UserError(f"{out} is there and is not a report (it has no results.json); name a new folder for the report.")
  out.parent.mkdir(parents=True, exist_ok=True)
  new, old = (out.parent / f".{out.name}.{os.getpid()}.{word}" for word in ("new", "old"))
  shutil.rmtree(new, ignore_errors=True)
  try:
    new.mkdir()
    images = {name: _png(figure) for name, figure in figures.items()}
    (new / "results.json").write_text(json.dumps(_plain(_ordered(results)), indent=2, allow_nan=False) + "\n")
    _write_csv(results, new / "results.csv")
    np.savez(new / "probes.npz", **probe)
    np.savez_compressed(new / "predictions.npz", **predictions)
    for name, image in images.items():
      (new / f"{name}.png").write_bytes(image)
    (new / "report.html").write_text(_page(results, images), encoding="utf-8")
    if out.exists():
      os.replace(out, old)  # a rename cannot put one full folder over another
    try:
      os.replace(new, out)
    except OSError:
      if old.exists():
        os.replace(old, out)
      raise
  finally:
    shutil.rmtree(new, ignore_errors=True)
    if out.exists():
      shutil.rmtree(old, ignore_errors=True)
  return out


def table(results: dict) -> str:
  """The headline scores as aligned text: one phenotype a line, R2 with its 95 % interval, baselines and ceiling."""
  rows = _headline(results)
  widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
  return "\n".join("  ".join(cell.ljust(w) if c < 2 else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths)))
                   .rstrip() for row in rows)


def _headline(results):
  """Rows of text, headings first: phenotype, unit, R2 with its interval, baselines and ceiling where known."""
  baselines = {model: results["baselines"][model] for model in MODELS if model in results.get("baselines", {})}
  ceiling = results.get("ceiling", {})
  rows = [["phenotype", "unit", "R2 [95 % CI]", *(MODELS[m] for m in baselines), *(["ceiling"] if ceiling else [])]]
  for name, score in results.get("phenotypes", {}).items():
    rows.append([name, score["units"], _interval(score["r2"], score["r2_ci"]),
                 *(_number(scores[name]["r2"]) for scores in baselines.values()),
                 *([_number(ceiling.get(name))] if ceiling else [])])
  return rows


def _disease_rows(diseases):
  models = list(diseases)
  rows = [["disease", "cases", "n", *(f"AUROC {model.replace('_', ' ')}" for model in models),
           *(f"{score} {models[0]}" for score in ("AUPRC", "balanced accuracy", "ECE"))]]
  for name, counts in diseases[models[0]].items():
    areas = [diseases[model][name] for model in models]
    rows.append([name, f"{counts['cases']:,}", f"{counts['n']:,}",
                 *(_interval(a.get("auroc"), a.get("auroc_ci")) for a in areas),
                 *(_interval(counts.get(score), counts.get(f"{score}_ci")) for score in ("auprc", "balanced_accuracy")),
                 _number(counts.get("ece"))])
  return rows


def _retrieval_rows(retrieval):
  columns = list(next(iter(retrieval.values())))
  return [["direction", *(column.replace("_", " ") for column in columns)],
          *([direction.replace("_", " "), *(f"{scores[c]:,.3g}" if isinstance(scores[c], float) else f"{scores[c]:,}"
                                            for c in columns)] for direction, scores in retrieval.items())]


def _page(results, images):
  """One self-contained HTML page."""
  parts = ["<h1>Evaluation</h1>"]
  if results.get("note"):
    parts.append(f'<p class="note">{html.escape(str(results["note"]))}</p>')
  facts = {k: v for k, v in results.items() if k != "note" and not isinstance(v, (dict, list))}
  parts.append("<dl>" + "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>"
                                for k, v in facts.items()) + "</dl>")
  seen = results.get("encoder", "ECG")
  sections = [(f"Phenotypes from the {seen}", _headline(results))]
  if results.get("diseases"):
    sections.append((f"Diseases from the {seen} (few cases: counted, not scored)", _disease_rows(results["diseases"])))
  if results.get("retrieval"):
    sections.append(("Retrieval over the test split", _retrieval_rows(results["retrieval"])))
  for title, (head, *rows) in sections:
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    parts.append(f'<h2>{title}</h2>\n<div class="scroll"><table><tr>{heads}</tr>\n{body}</table></div>')
  for name, image in images.items():
    title = html.escape(name.replace("_", " "))
    parts.append(f'<h2>{title[:1].upper() + title[1:]}</h2>\n'
                 f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(image).decode()}">')
  return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title>'
          f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
          + "\n".join(parts) + "\n</body></html>\n")


def _write_csv(results, path):
  """One line per model and phenotype."""
  with open(path, "w", newline="", encoding="utf-8") as file:
    rows = csv.writer(file)
    rows.writerow(["model", "phenotype", "r2", "lo", "hi", "pearson", "mae", "n", "units"])
    for model, scores in {"embedding": results.get("phenotypes", {}), **results.get("baselines", {})}.items():
      for name, s in scores.items():
        values = _plain([s["r2"], *s["r2_ci"], s["pearson"], s["mae"]])
        rows.writerow([model, name, *values, s["n"], s["units"]])


def _png(figure):
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=DPI)
  return buffer.getvalue()


def _ordered(results):
  """Metadata first, then the sections that are there."""
  metadata = {k: v for k, v in results.items() if k not in SECTIONS}
  return metadata | {k: results[k] for k in SECTIONS if k in results}


def _plain(value):
  """JSON's own types, null for what is not finite."""
  if isinstance(value, dict):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  if isinstance(value, (np.ndarray, np.generic)):
    return _plain(value.tolist())
  return None if isinstance(value, float) and not np.isfinite(value) else value


def _number(value):
  return "-" if value is None or not np.isfinite(value) else f"{value:z.3f}"


def _interval(value, ci):
  return "-" if _number(value) == "-" else f"{_number(value)} [{_number(ci[0])}, {_number(ci[1])}]"
