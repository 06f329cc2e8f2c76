"""Names are never markup: those of phenotypes, diseases, units, runs and cohorts come from whoever
made a table or a cohort."""

import csv
import html.parser
import io
import re

import numpy as np
import pytest
from matplotlib import cbook
from matplotlib.text import Text

from mmcl_jax import cli, compare, embed
from mmcl_jax.errors import UserError, one_line
from mmcl_jax.evaluators import data, diseases, low_data, phenotypes
from mmcl_jax.evaluators.base import Result
from mmcl_jax.projects.generation import generate
from mmcl_jax.projects.localisation import drawings as localisation_drawings
from mmcl_jax.reports import figures, model_card, quality_page, report

HOSTILE = (
  r"$\frac{",
  "$x$ and $y$",
  r"\$\frac{",
  "<script>alert(1)</script>",
  "a|b",
  "*bold* _slanted_ `code`",
  "[x](http://evil.example)",
  "=1+1",
  "+1",
  "-1+1",
  "@SUM(A1)",
  " =2+2",
  "\x1b[31mred\x1b[0m\x07",
  "two\nlines\r\n# heading",
  "\u202egnp.exe",
  "\ud800",
  "&lt;b>",
  "x" * 5000,
  "_hidden",
  "%s {0} {name}",
  "",
)
COMMANDS = re.compile("[\x00-\x09\x0b-\x1f\x7f\u202e\ud800-\udfff]")


def split_of(rows, seed):
  rng, count = np.random.default_rng(seed), len(HOSTILE)
  x = rng.normal(size=(rows, 6)).astype(np.float32)
  return {
    "subject": np.stack([np.arange(rows), np.full(rows, seed)], 1).astype(np.uint32),
    "embedding": x,
    "random_embedding": x[:, ::-1],
    "covariates": x[:, :1],
    "phenotypes": x[:, rng.integers(6, size=count)]
    + rng.normal(size=(rows, count)).astype(np.float32),
    "diseases": (x[:, rng.integers(6, size=count)] > 0).astype(np.float32),
  }


@pytest.fixture(scope="module")
def evaluated():
  """(results, predictions, probe, ill) of an evaluation whose phenotypes, units and diseases have
  hostile names."""
  features = {
    split: split_of(rows, seed)
    for seed, (split, rows) in enumerate((("train", 80), ("val", 40), ("test", 80)))
  }
  names, units = list(HOSTILE), list(HOSTILE[::-1])
  results, predictions, probe = phenotypes.evaluate(features, names, units, draws=20)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(diseases, "FEWEST_TEST_CASES", 20)
    results["diseases"], ill, _ = diseases.evaluate(features, names, draws=20)
  groups = {
    group: [names.index(name) for name in found]
    for group, found in results["group_members"].items()
  }
  whole = {
    model: [score["value"] for score in results["groups"][model].values()]
    for model in low_data.MODELS
  }
  results["low_data"] = low_data.evaluate(features, groups, [], whole)
  counts = dict.fromkeys(features, 80)
  data = {
    "source": HOSTILE[3],
    "with_ecg": counts,
    "with_cmr": counts,
    "labels": dict.fromkeys(names, counts),
    "cases": dict.fromkeys(names, counts),
    "steps": dict.fromkeys(names, 3),
    "rejected": dict.fromkeys(names, 3),
  }
  results |= {
    "note": HOSTILE[0],
    "workdir": HOSTILE[12],
    "cohort": HOSTILE[15],
    "cohort_fingerprint": HOSTILE[5],
    "counts": counts,
    "data": data,
    "config": {name: name for name in names},
    "step": 3,
    "test_scored": 1,
  }
  return results, predictions, probe, ill


def whole(results, predictions, probe):
  """What `report.write` takes, with the tables of the evaluators."""
  tables = [*phenotypes.tables(results), diseases.table(results["diseases"])]
  tables += data.tables(results["data"], results["counts"])
  texts = {"results.csv": phenotypes.as_csv(results)}
  return Result(results, tables, {}, predictions, {"probes": probe}, texts)


def drawn(figure):
  """Lays a figure out, as saving it would, and holds that no name in it became a formula."""
  figure.draw_without_rendering()
  for text in figure.findobj(Text):
    said = text.get_text()
    assert not (cbook.is_math_text(said) and ("frac" in said or "$x" in said)), said


@pytest.mark.reported(
  "a phenotype or disease whose name holds $\\frac{ ended evaluate in matplotlib, after all its "
  "work"
)
def test_no_name_is_a_formula_in_a_figure(evaluated):
  results, predictions, _, ill = evaluated
  y, predicted, note = predictions["y_true"], predictions["embedding"], results["note"]
  drawn(figures.r2_bars(results, note))
  drawn(figures.predicted_against_true(y, predicted, results["phenotypes"], note))
  drawn(figures.bland_altman(y, predicted, results["phenotypes"], note))
  drawn(figures.roc_curves(ill["y_true"], ill, results["diseases"], note))
  drawn(figures.calibration(results["diseases"], note))
  drawn(
    figures.low_data(
      {
        model: {f"$x$ {group}": points for group, points in found.items()}
        for model, found in results["low_data"].items()
      },
      note,
    )
  )
  drawn(
    figures.training_curves(
      [{"step": i, **{f"validation/{name}": 1.0 for name in HOSTILE}} for i in (1, 2)], note
    )
  )
  scores = {row: {column: {"mean": 0.5, "ci": [0.4, 0.6]} for column in HOSTILE} for row in HOSTILE}
  drawn(figures.forest(scores, HOSTILE, HOSTILE[:-1], HOSTILE[-1:], "R2", note))
  for name in HOSTILE:
    drawn(quality_page.histogram(name, name, {"all": np.arange(20.0)}, {}))
  tower = {
    "seen": np.zeros((1, 8, 8)),
    "labels": np.zeros((1, 8, 8), int),
    "cosine": np.zeros((1, 8, 8)),
    "top": np.zeros((1, 8, 8), bool),
    "gradients": np.zeros((1, 8, 8)),
  }
  drawn(localisation_drawings.heart_relevance(dict.fromkeys(HOSTILE[:3], tower), HOSTILE[1], note))


class Tags(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.found = set()

  def handle_starttag(self, tag, attrs):
    self.found.add(tag)
    assert not [name for name, _ in attrs if name.startswith("on")]


def test_no_name_is_a_tag_of_a_page_a_formula_of_a_table_or_a_command_of_a_terminal(
  evaluated, tmp_path, capsys
):
  results, predictions, probe, _ = evaluated
  report.write(whole(results, predictions, probe), tmp_path / "report")
  tags, page = Tags(), (tmp_path / "report/report.html").read_text(encoding="utf-8")
  tags.feed(page)
  assert (
    "script" not in tags.found
    and "b" not in tags.found
    and not COMMANDS.search(page)
    and "&lt;script&gt;alert(1)" in page
  )
  rows = list(
    csv.reader(io.StringIO((tmp_path / "report/results.csv").read_text(encoding="utf-8")))
  )
  assert len(rows) == 1 + len(HOSTILE) * 4
  for row in rows[1:]:
    assert row[1][:1] not in tuple("=+-@") and row[-1][:1] not in tuple("=+-@")
  assert "'=1+1" in {row[1] for row in rows} and "'=2+2" in {row[1] for row in rows}
  for table in (phenotypes.headline(results), diseases.table(results["diseases"])):
    text = report.as_text(table)
    assert not COMMANDS.search(text) and len(text.splitlines()) == 1 + len(HOSTILE)


def test_no_name_is_markdown_in_a_model_card(evaluated):
  results = evaluated[0]
  manifest = {"cohort": "f", "standardiser": {"covariates": list(HOSTILE)}}
  text = "\n\n".join(
    [
      model_card.scores(results),
      model_card.data_tables(results),
      model_card.training_data(manifest, results),
      model_card.evaluation_data(manifest, results),
      model_card.factors(manifest, results),
    ]
  )
  assert not COMMANDS.search(text) and "<script" not in text
  for line in text.splitlines():
    assert not re.match(r"\s*(#|>|[-+*] |\d+[.)] |===|---$)", line), line
    if line.startswith("|") and "---:" not in line:
      inside = re.sub(r"\\.", "", line)  # what is escaped stands for itself
      assert not re.search(r"[`*_$~]|\]\(", inside), line
  heads = [line for line in text.splitlines() if line.startswith("|")]
  widths = {re.sub(r"\\.", "", line).count("|") for line in heads if "R2" in line or "'" in line}
  assert widths and model_card.code("a`b\nc") == "`a'b c`"


def test_no_name_commands_the_terminal(monkeypatch, capsys):
  def fails(argv):
    print(f"told: {HOSTILE[12]}", HOSTILE[14], HOSTILE[15])
    raise UserError(f"the cohort {HOSTILE[12]} has {HOSTILE[13]}")

  with pytest.raises(SystemExit):
    cli.run(fails, [])
  out, err = capsys.readouterr()
  assert (
    out == "told:  [31mred [0m   gnp.exe  \n"
    and err == "mmcl: error: the cohort [31mred [0m has two lines # heading\n"
  )


def test_a_name_of_a_file_is_no_formula_in_the_table_of_hearts(tmp_path):
  generate.write_table(
    tmp_path / "hearts.csv", [{"path": "=cmd|' /C calc'!A0.hea", "status": "ok", "LVEDV_ml": -3.5}]
  )
  with open(tmp_path / "hearts.csv", newline="") as file:
    (row,) = csv.DictReader(file)
  assert row == {"path": "'=cmd|' /C calc'!A0.hea", "status": "ok", "LVEDV_ml": "-3.5"}


def test_columns_of_an_embedding_have_names_that_a_file_can_hold(tmp_path):
  count = len(HOSTILE)
  np.savez(
    tmp_path / "probes.npz",
    names=HOSTILE,
    units=HOSTILE,
    coef=np.zeros((4, count)),
    intercept=np.zeros(count),
    half_width=np.zeros(count),
  )
  probes = embed.load_probes(tmp_path, 3, tmp_path)
  assert probes.columns == tuple(f"{one_line(name)}_{one_line(name)}" for name in HOSTILE)
  assert all(column.encode() and column.isprintable() for column in probes.columns)


def test_a_comparison_of_runs_with_hostile_names(evaluated, tmp_path):
  results, predictions, probe, ill = evaluated
  predictions = predictions | {f"disease_{name}": x for name, x in ill.items() if name != "subject"}
  folders = [str(tmp_path / name) for name in ("$\\frac{", "<b>run", "\x1b[31m")]
  for folder in folders:
    report.write(whole(results | {"config": {}}, predictions, probe), folder)
  text = compare.compare(folders, str(tmp_path / "out"))
  tags, page = Tags(), (tmp_path / "out/report.html").read_text(encoding="utf-8")
  tags.feed(page)
  assert (
    "script" not in tags.found
    and "b" not in tags.found
    and not COMMANDS.search(page)
    and not COMMANDS.search(text)
  )
