"""The report of an evaluation: a folder of JSON, CSV, NPZ, PNG and one HTML page; and a table for the terminal."""

import base64
import contextlib
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
LIMITS = ("What this can tell: how well linear probes on the frozen {encoder} embedding predict labels of held-out people of the same "
          "cohort. What it cannot: how it does at other sites, devices or populations, for whom the labels were made otherwise, or "
          "whether using it helps anybody. For research only; not a medical device.")
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
th{border-bottom:2px solid #222}th:first-child,td:first-child{text-align:left}
img{max-width:100%}pre{overflow-x:auto;font-size:.85em}summary{margin-top:2em;cursor:pointer}
.note{font-style:italic;color:#555}dl{display:grid;grid-template-columns:max-content 1fr;gap:0 1em}
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
  images = {name: png(figure) for name, figure in figures.items()}
  with replaced(out_dir) as new:
    (new / "results.json").write_text(as_json(_ordered(results)))
    _write_csv(results, new / "results.csv")
    np.savez(new / "probes.npz", **probe)
    np.savez_compressed(new / "predictions.npz", **predictions)
    for name, image in images.items():
      (new / f"{name}.png").write_bytes(image)
    (new / "report.html").write_text(_evaluation_page(results, images), encoding="utf-8")
  return Path(out_dir).resolve()


@contextlib.contextmanager
def replaced(out_dir):
  """A new folder to write a report into, which then takes the place of `out_dir`, whole; an earlier report there goes.

  Errors: UserError where `out_dir` is there and holds something that is not a report.
  """
  out = Path(out_dir).resolve()
  if out.exists() and not (out / "results.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
    raise UserError(f"{out} is there and is not a report (it has no results.json); name a new folder for the report.")
  out.parent.mkdir(parents=True, exist_ok=True)
  new, old = (out.parent / f".{out.name}.{os.getpid()}.{word}" for word in ("new", "old"))
  shutil.rmtree(new, ignore_errors=True)
  try:
    new.mkdir()
    yield new
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


def table(results: dict) -> str:
  """The headline scores as aligned text: one phenotype a line, R2 with its 95 % interval, baselines and ceiling."""
  return aligned(_headline(results), left=2)


def aligned(rows: list[list[str]], left: int = 1) -> str:
  """Rows of text in columns, the first `left` of them flush left, the others right."""
  widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
  return "\n".join("  ".join(cell.ljust(w) if c < left else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths)))
                   .rstrip() for row in rows)


def _headline(results):
  """Rows of text, headings first: phenotype, unit, R2 with its interval, baselines and ceiling where known."""
  baselines = {model: results["baselines"][model] for model in MODELS if model in results.get("baselines", {})}
  ceiling = results.get("ceiling", {})
  rows = [["phenotype", "unit", "R2 [95 % CI]", *(MODELS[m] for m in baselines), *(["ceiling"] if ceiling else [])]]
  for name, score in results.get("phenotypes", {}).items():
    rows.append([name, score["units"], interval(score["r2"], score["r2_ci"]),
                 *(number(scores[name]["r2"]) for scores in baselines.values()),
                 *([number(ceiling.get(name))] if ceiling else [])])
  return rows


def _disease_rows(diseases):
  models = list(diseases)
  rows = [["disease", "cases", "n", *(f"AUROC {model.replace('_', ' ')}" for model in models),
           *(f"{score} {models[0]}" for score in ("AUPRC", "balanced accuracy", "ECE"))]]
  for name, counts in diseases[models[0]].items():
    areas = [diseases[model][name] for model in models]
    rows.append([name, f"{counts['cases']:,}", f"{counts['n']:,}",
                 *(interval(a.get("auroc"), a.get("auroc_ci")) for a in areas),
                 *(interval(counts.get(score), counts.get(f"{score}_ci")) for score in ("auprc", "balanced_accuracy")),
                 number(counts.get("ece"))])
  return rows


def _retrieval_rows(retrieval):
  columns = list(next(iter(retrieval.values())))
  return [["direction", *(column.replace("_", " ") for column in columns)],
          *([direction.replace("_", " "), *(f"{scores[c]:,.3g}" if isinstance(scores[c], float) else f"{scores[c]:,}"
                                            for c in columns)] for direction, scores in retrieval.items())]


def _evaluation_page(results, images):
  facts = {k: v for k, v in results.items() if k != "note" and not isinstance(v, (dict, list))}
  notes = [results["note"]] if results.get("note") else []
  notes.append(LIMITS.format(encoder=results.get("encoder", "ECG")))
  if (times := results.get("test_scored", 1)) > 1:
    notes.append(f"The test split of this cohort has been scored {times} times from this workdir. A run that was chosen by "
                 "one of them looks better here than it is.")
  seen = results.get("encoder", "ECG")
  sections = [(f"Phenotypes from the {seen}", _headline(results))]
  if results.get("diseases"):
    sections.append((f"Diseases from the {seen} (few cases: counted, not scored)", _disease_rows(results["diseases"])))
  if results.get("retrieval"):
    sections.append(("Retrieval over the test split", _retrieval_rows(results["retrieval"])))
  sections += _data_sections(results.get("data", {}), results.get("counts", {}))
  return page("Evaluation", notes, facts, sections, images, {"Config": results.get("config", {})})


def _data_sections(data, counts):
  """Tables of what the scores rest on: records, labels and cases by split; what was left out, and why."""
  if not data:
    return []
  by_split = lambda table: [["", *counts], *([name, *(f"{row[split]:,}" for split in counts)] for name, row in table.items())]
  counted = lambda table: [["", "records"], *([name, f"{count:,}"] for name, count in table.items())]
  sections = {
      "records": by_split({"in the splits": counts, "with ECG": data["with_ecg"], "with CMR": data["with_cmr"]}),
      "known labels": by_split(data["labels"]), "cases": by_split(data["cases"]),
      "what was read": counted(data["steps"]), "rejected, and why": counted(data["rejected"])}
  return [(f"Data: {title}", rows) for title, rows in sections.items() if len(rows) > 1]


def page(heading: str, notes: list[str], facts: dict, sections: list[tuple[str, list]], images: dict[str, bytes],
         folded: dict[str, dict]) -> str:
  """One self-contained HTML page: facts by name, tables (title, rows of text, headings first), PNGs, folded JSON by name."""
  parts = [f"<h1>{heading}</h1>", *(f'<p class="note">{html.escape(note)}</p>' for note in notes)]
  parts.append("<dl>" + "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>"
                                for k, v in facts.items()) + "</dl>")
  for title, (head, *rows) in sections:
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    parts.append(f'<h2>{title}</h2>\n<div class="scroll"><table><tr>{heads}</tr>\n{body}</table></div>')
  for name, image in images.items():
    title = html.escape(name.replace("_", " "))
    parts.append(f'<h2>{title[:1].upper() + title[1:]}</h2>\n'
                 f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(image).decode()}">')
  parts += [f"<details><summary>{title}</summary><pre>{html.escape(as_json(values))}</pre></details>"
            for title, values in folded.items() if values]
  return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{heading}</title>'
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


def as_json(results: dict) -> str:
  return json.dumps(_plain(results), indent=2, allow_nan=False) + "\n"


def png(figure) -> bytes:
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


def number(value):
  return "-" if value is None or not np.isfinite(value) else f"{value:z.3f}"


def interval(value, ci):
  return "-" if number(value) == "-" else f"{number(value)} [{number(ci[0])}, {number(ci[1])}]"
