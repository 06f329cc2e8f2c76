"""The report of an evaluation: a folder of JSON, CSV, NPZ, PNG and one HTML page; and a table for
the terminal."""

import base64
import contextlib
import csv
import html
import io
import json
from pathlib import Path

import numpy as np

from mmcl_jax.errors import UserError, check_writable, one_line, printable
from mmcl_jax.support import files
from mmcl_jax.support.text import aligned

SECTIONS = (
  "phenotypes",
  "baselines",
  "ceiling",
  "share_of_ceiling",
  "differences",
  "groups",
  "readouts",
  "low_data",
  "diseases",
  "survival",
  "retrieval",
  "localisation",
  "generation",
)
MODELS = {"random_encoder": "random", "covariates": "covariates", "with_covariates": "emb + cov"}
HEARTS = {
  "drawn": "drawn from the {given}",
  "another_ecg": "drawn from another's {given}",
  "without_ecg": "drawn without {given}",
  "train": "all of train",
  "covariates": "neighbours by covariates",
  "ecg_neighbours": "neighbours by ECG embedding",
  "mean_heart": "mean heart",
  "rebuilt": "the real one, by the tokenizer",
  "real": "the real one",
}
READOUTS = {
  "own_head": "own head",
  "knn": "k-NN",
  "mlp": "MLP",
  "cmr_neighbours": "CMR neighbours (zero-shot)",
}
TITLES = {  # of the figures
  "r2": "R2 of every phenotype, beside its baselines",
  "predicted_against_true": "Predicted against measured",
  "bland_altman": "Bland-Altman: difference against mean, with bias and 95 % limits of agreement",
  "auroc": "AUROC of every disease",
  "roc_curves": "ROC curves",
  "calibration": "Calibration: share of cases against predicted probability",
  "low_data": "Few labels: probes fitted on a part of the training subjects",
  "hearts": "Generated, not measured: hearts drawn from an ECG, beside the real one",
  "retrieval": "Retrieval: share answered within the first k",
  "training_curves": "Training curves",
  "reconstruction": "Masked reconstruction of a test recording",
  **{
    f"relevance_{kind}_{i}": f"Localisation in the {kind.upper()}, recording {i}"
    for kind in ("cmr", "ecg")
    for i in (1, 2)
  },
}
DPI = 150
LIMITS = (
  "What this can tell: how well probes on the frozen {encoder} embedding predict labels of held-out people of the same "
  "cohort. What it cannot: how it does at other sites, devices or populations, for whom the labels were made otherwise, or "
  "whether using it helps anybody. For research only; not a medical device."
)
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
th{border-bottom:2px solid #222}th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff}
img{min-width:40em;max-width:100%}pre{overflow-x:auto;font-size:.85em}summary{margin-top:2em;cursor:pointer}
.note{font-style:italic;color:#555}dl{display:grid;grid-template-columns:max-content 1fr;gap:0 1em}
dt{color:#555}dd{margin:0;overflow-wrap:anywhere}"""


def write(results: dict, predictions: dict, probe: dict, figures: dict, out_dir) -> Path:
  """Writes the whole report beside `out_dir` and then puts it in its place, so that no reader meets
  half a report.

  Args:
    results: SECTIONS as the evaluators give them (any may be absent) and any metadata; `note` heads
      the page.
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


def check_place(out_dir, what: str = "a report", mark: str = "results.json") -> Path:
  """The whole path of a folder that can be written and is free, or holds an earlier one of `what`,
  known by its `mark`.

  Else UserError.
  """
  out = Path(out_dir).resolve()
  if out.exists() and not (out / mark).is_file() and not (out.is_dir() and not any(out.iterdir())):
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


def table(results: dict) -> str:
  """The headline scores as aligned text: one phenotype a line, R2 with its 95 % interval, baselines
  and ceiling.

  Of a cohort without phenotypes, its diseases.
  """
  return (
    aligned(headline(results), left=2)
    if results["phenotypes"]
    else aligned(disease_rows(results["diseases"]))
  )


def headline(results):
  """Rows of text, headings first: phenotype, unit, R2 with its interval, baselines and ceiling
  where known."""
  baselines = {
    model: results["baselines"][model] for model in MODELS if model in results.get("baselines", {})
  }
  ceiling, own = results.get("ceiling", {}), results.get("readouts", {}).get("own_head", {})
  rows = [
    [
      "phenotype",
      "unit",
      "R2 [95 % CI]",
      *(["own head"] if own else []),
      *(MODELS[m] for m in baselines),
      *(["ceiling"] if ceiling else []),
    ]
  ]
  for name, score in results.get("phenotypes", {}).items():
    rows.append(
      [
        name,
        score["units"],
        interval(score["r2"], score["r2_ci"]),
        *([interval(own[name]["r2"], own[name]["r2_ci"])] if own else []),
        *(number(scores[name]["r2"]) for scores in baselines.values()),
        *([number(ceiling.get(name))] if ceiling else []),
      ]
    )
  return rows


def readout_rows(results):
  readouts = results["readouts"]
  rows = [
    [
      "phenotype",
      "linear",
      *(f"{READOUTS.get(name, name)}{more}" for name in readouts for more in ("", ", r")),
    ]
  ]
  for name, score in results["phenotypes"].items():
    cells = [
      (interval(scores[name]["r2"], scores[name]["r2_ci"]), number(scores[name]["pearson"]))
      for scores in readouts.values()
    ]
    rows.append([name, number(score["r2"]), *(cell for pair in cells for cell in pair)])
  return rows


def group_rows(results):
  models = [model for model in results["groups"] if model != "ceiling"] + ["ceiling"] * (
    "ceiling" in results["groups"]
  )
  rows = [["group", "phenotypes", *((MODELS | READOUTS).get(model, model) for model in models)]]
  for group, members in results["group_members"].items():
    scores = [results["groups"][model][group] for model in models]
    rows.append(
      [group, str(len(members)), *(interval(score["value"], score["ci"]) for score in scores)]
    )
  return rows


def survival_rows(survival):
  rows = [
    [
      "disease",
      "events",
      "n",
      "median years",
      *(f"C-index {model.replace('_', ' ')}" for model in survival),
    ]
  ]
  for name, counts in next(iter(survival.values())).items():
    rows.append(
      [
        name,
        f"{counts['events']:,}",
        f"{counts['n']:,}",
        number(counts["median_years"]),
        *(
          interval(scores[name].get("c_index"), scores[name].get("c_index_ci"))
          for scores in survival.values()
        ),
      ]
    )
  return rows


def disease_rows(diseases):
  models = list(diseases)
  rows = [
    [
      "disease",
      "cases",
      "n",
      *(f"AUROC {READOUTS.get(model, model.replace('_', ' '))}" for model in models),
      *(f"{score} {models[0]}" for score in ("AUPRC", "balanced accuracy", "ECE")),
    ]
  ]
  for name, counts in diseases[models[0]].items():
    areas = [diseases[model][name] for model in models]
    rows.append(
      [
        name,
        f"{counts['cases']:,}",
        f"{counts['n']:,}",
        *(interval(a.get("auroc"), a.get("auroc_ci")) for a in areas),
        *(
          interval(counts.get(score), counts.get(f"{score}_ci"))
          for score in ("auprc", "balanced_accuracy")
        ),
        number(counts.get("ece")),
      ]
    )
  return rows


def retrieval_rows(retrieval):
  columns = list(next(iter(retrieval.values())))
  return [
    ["direction", *(column.replace("_", " ") for column in columns)],
    *(
      [
        direction.replace("_", " "),
        *(
          f"{scores[c]:,.3g}" if isinstance(scores[c], float) else f"{scores[c]:,}" for c in columns
        ),
      ]
      for direction, scores in retrieval.items()
    ),
  ]


def localisation_rows(cosine):
  columns = {
    "value": "share",
    "another_ecg": "another ECG",
    "untrained": "untrained, one draw",
    "minus_another_ecg": "minus another ECG",
    "minus_untrained": "minus untrained",
  }
  rows = [["tower / phase", "inside", "n", *columns.values(), "by chance"]]
  for place, found in cosine.items():
    for structure, score in found.items():
      cells = (
        interval(score[name], score["ci" if name == "value" else f"{name}_ci"]) for name in columns
      )
      rows.append([place, structure, f"{score['n']:,}", *cells, number(score["chance"])])
  return rows


def drawn_phenotype_rows(generation):
  """Of each phenotype and each thing to show for an ECG: CRPS (lower is better), R2 of the mean,
  bias."""
  rows = [["phenotype", "shown", "CRPS", "draws minus this", "R2 of the mean", "bias"]]
  for name in next(iter(generation["phenotypes"].values())):
    for what, scores in generation["phenotypes"].items():
      score, minus = scores[name], generation["differences"].get(what, {}).get(name, {})
      rows.append(
        [
          name,
          shown(generation, what),
          interval(score["crps"], score["crps_ci"]),
          interval(minus.get("value"), minus.get("ci")),
          interval(score["r2"], score["r2_ci"]),
          number(score["bias"]),
        ]
      )
  return rows


def shown(generation, what: str) -> str:
  return HEARTS[what].format(given=generation.get("given", "ECG"))


def picture_rows(generation):
  columns = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "dice_LV": "Dice LV",
    "dice_MYO": "Dice MYO",
    "dice_RV": "Dice RV",
  }
  return [
    ["shown", *columns.values()],
    *(
      [shown(generation, what), *(number(scores.get(name)) for name in columns)]
      for what, scores in generation["images"].items()
    ),
  ]


def spread_rows(generation):
  copied = generation["memorisation"]
  rows = [
    ["draws of one subject", ""],
    ["share of them that lack a chamber", number(generation["unmeasured"]["drawn"])],
    *(
      [f"SD of {name} over that of all hearts", number(x)]
      for name, x in generation["diversity"].items()
    ),
  ]
  if copied:
    rows += [
      ["distance to the nearest training heart", number(copied["nearest_drawn"])],
      ["the same of real test hearts", number(copied["nearest_real"])],
      ["share nearer than 99 % of these", number(copied["closer"])],
    ]
  return rows


def completeness_rows(completeness):
  """Of each recording shown: what the cosine gains over an input of zeros, and what integrated
  gradients account for."""
  rows = [["input", "recording", "gain of the cosine", "sum of the gradients"]]
  for name, found in completeness.items():
    rows += [
      [name, str(i), *(f"{x:.4f}" for x in both)]
      for i, both in enumerate(zip(found["gain"], found["sum"]), 1)
    ]
  return rows


def _evaluation_page(results, images):
  facts = {k: v for k, v in results.items() if k != "note" and not isinstance(v, (dict, list))}
  notes = [results["note"]] if results.get("note") else []
  notes += [told] if (told := results.get("seen_people", {}).get("note")) else []
  notes.append(LIMITS.format(encoder=results.get("encoder", "ECG")))
  if (times := results.get("test_scored", 1)) > 1:
    notes.append(
      f"The test split of this cohort has been scored {times} times from this workdir. A run that was chosen by "
      "one of them looks better here than it is."
    )
  seen = results.get("encoder", "ECG")
  sections = []
  if results.get("phenotypes"):
    sections.append((f"Phenotypes from the {seen}", headline(results)))
  if results.get("group_members"):
    sections.append(("Mean R2 of groups of phenotypes", group_rows(results)))
  if results.get("readouts") and results.get("phenotypes"):
    sections.append(
      (f"Other read-outs of the {seen} (R2; r: Pearson's correlation)", readout_rows(results))
    )
  if any(results.get("diseases", {}).values()):  # coverage: benchmarks/coverage.py, docs/results.md
    sections.append(
      (
        f"Diseases from the {seen} (few cases: counted, not scored; from 30 to 100 cases, 95 % intervals hold the "
        "truth 92 to 95 times in 100)",
        disease_rows(results["diseases"]),
      )
    )
  if any(results.get("survival", {}).values()):
    sections.append(
      (
        f"Incident disease from the {seen} (few events: counted, not scored)",
        survival_rows(results["survival"]),
      )
    )
  if results.get("retrieval"):
    sections.append(("Retrieval over the test split", retrieval_rows(results["retrieval"])))
  if results.get("generation"):
    counts = results["generation"]["counts"]
    hearts = f"Hearts drawn from the {results['generation'].get('given', 'ECG')}"
    sections += [
      (
        f"{hearts}: what they measure ({counts['draws']} of each of {counts['subjects']} test subjects)",
        drawn_phenotype_rows(results["generation"]),
      ),
      (f"{hearts}: images, and labels by the segmenter", picture_rows(results["generation"])),
      (f"{hearts}: spread, and copies", spread_rows(results["generation"])),
    ]
  located = results.get("localisation", {})
  if located.get("cosine"):
    sections.append(
      (
        "Localisation: share of the tenth of the pixels nearest to the ECG that lies inside",
        localisation_rows(located["cosine"]),
      )
    )
  if located.get("completeness"):
    sections.append(
      ("Integrated gradients: do they add up?", completeness_rows(located["completeness"]))
    )
  sections += data_sections(results.get("data", {}), results.get("counts", {}))
  return page("Evaluation", notes, facts, sections, images, {"Config": results.get("config", {})})


def data_sections(data, counts):
  """Tables of what the scores rest on: records, labels and cases by split; what was left out, and
  why."""
  if not data:
    return []

  def by_split(table):
    return [
      ["", *counts],
      *([name, *(f"{row[split]:,}" for split in counts)] for name, row in table.items()),
    ]

  def counted(table):
    return [["", "records"], *([name, f"{count:,}"] for name, count in table.items())]

  sections = {
    "records": by_split(
      {"in the splits": counts, "with ECG": data["with_ecg"], "with CMR": data["with_cmr"]}
    ),
    "known labels": by_split(data["labels"]),
    "cases": by_split(data["cases"]),
    "what was read": counted(data["steps"]),
    "rejected, and why": counted(data["rejected"]),
  }
  return [(f"Data: {title}", rows) for title, rows in sections.items() if len(rows) > 1]


def as_html(text) -> str:
  """A user's text as HTML that opens no tag."""
  return html.escape(printable(text))


def as_cell(text) -> str:
  """A user's text as a cell of a CSV that no spreadsheet takes for a formula (OWASP, CSV
  injection)."""
  text = one_line(text)
  return f"'{text}" if text[:1] in tuple("=+-@") else text


def page(
  heading: str,
  notes: list[str],
  facts: dict,
  sections: list[tuple[str, list]],
  images: dict[str, bytes],
  folded: dict[str, dict],
) -> str:
  """One self-contained HTML page: facts by name, tables (title, rows of text, headings first),
  PNGs, folded JSON by name."""
  parts = [f"<h1>{heading}</h1>", *(f'<p class="note">{as_html(note)}</p>' for note in notes)]
  parts.append(
    "<dl>"
    + "".join(f"<dt>{as_html(k)}</dt><dd>{as_html(v)}</dd>" for k, v in facts.items())
    + "</dl>"
  )
  for title, (head, *rows) in sections:
    body = "".join(
      "<tr>" + "".join(f"<td>{as_html(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    heads = "".join(f"<th>{as_html(cell)}</th>" for cell in head)
    parts.append(
      f'<h2>{as_html(title)}</h2>\n<div class="scroll"><table><tr>{heads}</tr>\n{body}</table></div>'
    )
  for name, image in images.items():
    title = as_html(TITLES.get(name, name))
    parts.append(
      f'<h2>{title}</h2>\n<div class="scroll"><img alt="{title}" '
      f'src="data:image/png;base64,{base64.b64encode(image).decode()}"></div>'
    )
  parts += [
    f"<details><summary>{title}</summary><pre>{as_html(as_json(values))}</pre></details>"
    for title, values in folded.items()
    if values
  ]
  return (
    f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{heading}</title>'
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
    f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
    + "\n".join(parts)
    + "\n</body></html>\n"
  )


def _write_csv(results, path):
  """One line per model and phenotype."""
  with open(path, "w", newline="", encoding="utf-8") as file:
    rows = csv.writer(file)
    rows.writerow(["model", "phenotype", "r2", "lo", "hi", "pearson", "mae", "n", "units"])
    models = {
      "embedding": results.get("phenotypes", {}),
      **results.get("baselines", {}),
      **results.get("readouts", {}),
    }
    for model, scores in models.items():
      for name, s in scores.items():
        values = _plain([s["r2"], *s["r2_ci"], s["pearson"], s["mae"]])
        rows.writerow([model, as_cell(name), *values, s["n"], as_cell(s["units"])])


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
