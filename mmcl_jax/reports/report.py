"""The report of an evaluation: a folder of JSON, CSV, NPZ, PNG and one HTML page; and a table for
the terminal."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np

from mmcl_jax.errors import UserError, check_writable, one_line
from mmcl_jax.evaluators.base import Result, Score, Table
from mmcl_jax.reports import pages
from mmcl_jax.support import files
from mmcl_jax.support.text import aligned

DPI = 150
LIMITS = (
  "What this can tell: how well probes on the frozen {encoder} embedding predict labels of "
  "held-out people of the same cohort. What it cannot: how it does at other sites, devices or "
  "populations, for whom the labels were made otherwise, or whether using it helps anybody. For "
  "research only; not a medical device."
)


def write(result: Result, out_dir) -> Path:
  """Writes the whole report beside `out_dir` and then puts it in its place, so that no reader meets
  half a report.

  Args:
    result: what was evaluated, and the results of all evaluators, together; `note` of its metrics
      heads the page.
    out_dir: the folder of the report; an earlier report there is replaced.

  Returns:
    the path of the folder.
  """
  images = {name: png(figure) for name, figure in result.figures.items()}
  with replaced(out_dir) as new:
    (new / "results.json").write_text(as_json(result.metrics))
    np.savez_compressed(new / "predictions.npz", **result.predictions)
    for name, arrays in result.arrays.items():
      np.savez(new / f"{name}.npz", **arrays)
    for name, text in result.texts.items():
      (new / name).write_text(text, encoding="utf-8", newline="")
    for name, image in images.items():
      (new / f"{name}.png").write_bytes(image)
    titled = []
    for name, figure in result.figures.items():
      titled.append((title_of(name, figure), images[name]))
    page = evaluation_page(result.metrics, result.tables, titled)
    (new / "report.html").write_text(page, encoding="utf-8")
  return Path(out_dir).resolve()


def title_of(name: str, figure) -> str:
  return figure.get_label() or name.replace("_", " ")


def check_place(out_dir, what: str = "a report", mark: str = "results.json") -> Path:
  """The whole path of a folder that can be written and is free, or holds an earlier one of `what`,
  known by its `mark`.

  Else UserError.
  """
  out = Path(out_dir).resolve()
  is_empty_folder = out.is_dir() and not any(out.iterdir())
  if out.exists() and not (out / mark).is_file() and not is_empty_folder:
    raise UserError(
      f"{out} is there and is not {what} (it has no {mark}); name a new folder for it."
    )
  check_writable(out.parent)
  return out


@contextlib.contextmanager
def replaced(out_dir, *what):
  """A new folder to write into, which then takes the place of `out_dir`, whole; an earlier one
  there goes (check_place)."""
  out = check_place(out_dir, *what)
  with files.atomic_folder(out) as new:
    yield new


def as_text(table: Table) -> str:
  """A table for the terminal, in aligned columns."""
  return aligned([table.head, *table.rows])


def evaluation_page(results: dict, tables: list[Table], images: list[tuple[str, bytes]]) -> str:
  """report.html: notes on what the scores can tell, what was evaluated, tables, figures, config."""
  facts = {}
  for name, value in results.items():
    if name != "note" and not isinstance(value, (dict, list, tuple)):
      facts[name] = value
  notes = []
  if results.get("note"):
    notes.append(results["note"])
  if results.get("seen_people", {}).get("note"):
    notes.append(results["seen_people"]["note"])
  notes.append(LIMITS.format(encoder=results.get("encoder", "ECG")))
  times = results.get("test_scored", 1)
  if times > 1:
    notes.append(
      f"The test split of this cohort has been scored {times} times from this workdir. A run that "
      "was chosen by one of them looks better here than it is."
    )
  return page("Evaluation", notes, facts, tables, images, {"Config": results.get("config", {})})


def as_cell(text) -> str:
  """A user's text as a cell of a CSV that no spreadsheet takes for a formula (OWASP, CSV
  injection)."""
  text = one_line(text)
  return f"'{text}" if text[:1] in tuple("=+-@") else text


def page(
  heading: str,
  notes: list[str],
  facts: dict,
  tables: list[Table],
  images: list[tuple[str, bytes]],
  folded: dict[str, dict],
) -> str:
  """One self-contained HTML page: facts by name, tables, PNGs by title, folded JSON by name."""
  texts = {title: as_json(values) for title, values in folded.items() if values}
  return pages.render(
    "report.html.j2",
    heading=heading,
    notes=notes,
    facts=facts,
    tables=tables,
    images=images,
    folded=texts,
  )


def as_json(results: dict) -> str:
  return json.dumps(json_types(results), indent=2, allow_nan=False) + "\n"


def png(figure) -> bytes:
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=DPI)
  return buffer.getvalue()


def json_types(value):
  """JSON's own types, null for what is not finite."""
  if isinstance(value, Score):
    value = value._asdict()
  if isinstance(value, dict):
    return {str(name): json_types(entry) for name, entry in value.items()}
  if isinstance(value, (list, tuple)):
    return [json_types(entry) for entry in value]
  if isinstance(value, (np.ndarray, np.generic)):
    return json_types(value.tolist())
  if isinstance(value, float) and not np.isfinite(value):
    return None
  return value
