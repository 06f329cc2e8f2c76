"""The quality report and `mmcl inspect`: numbers against NumPy, drawings to scale, pages that load
and leak nothing."""

import collections
import html.parser
import io
import json
import os
import pathlib
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from matplotlib.path import Path
from PIL import Image

from mmcl_jax import inspect, prepare
from mmcl_jax.data import builder, schema, synthetic
from mmcl_jax.data.preprocess import ecg as preprocess_ecg
from mmcl_jax.data.sources import Item, Plan
from mmcl_jax.errors import BadRecord, UserError
from mmcl_jax.reports import drawings, quality, quality_page

EVIL = '<script>alert(1)</script><img src="http://x.example/a.png" onerror=alert(1)>'
SALT = b"of this test"


def salted_id(record):
  return schema.salted_id(record["subject"], record["visit"])


def outcome_of(cohort, **changes):
  """What prepare would report of a cohort, from its records."""
  rows = [(split, source[i]) for split, source in cohort.splits.items() for i in range(len(source))]
  phenotypes, covariates = (
    np.stack([r[name] for _, r in rows]) for name in ("phenotypes", "covariates")
  )
  return builder.Outcome(
    {"files": 90, "kept": len(rows)}, [], [], phenotypes, covariates, [split for split, _ in rows]
  )._replace(**changes)


@pytest.fixture(scope="module")
def written(cohort, tmp_path_factory):
  """The report of the synthetic cohort, with hostile texts and an unmeasured phenotype; how often
  records were read."""
  folder = tmp_path_factory.mktemp("report")

  def name(i):
    return f"{i:016x}/2"

  many = range(quality_page.LISTED)
  rejected = [{"id": name(i), "reason": f"{4000 + i} samples; expected 5000 {EVIL}"} for i in many]
  rejected += [
    {"id": name(10**4 + i), "reason": f"flat lead V{i}: moves less than 0.015 mV"}
    for i in (3, 3, 5)
  ]
  flags = [{"id": name(i), "flags": [f"ES at frame {i} {EVIL}", "ED at frame 0"]} for i in range(7)]
  outcome = outcome_of(
    cohort, rejected=rejected, flags=flags, steps={f"files {EVIL}": 2000, "kept": 64}
  )
  outcome.phenotypes[:, 3] = np.nan
  outcome.phenotypes[:5, 0] = np.nan
  reads = collections.Counter()

  class Counted:
    def __init__(self, split):
      self.split = split

    def __getitem__(self, i):
      reads[self.split, i] += 1
      return cohort.splits[self.split][i]

  info = cohort.info | {"source": f"hearts {EVIL}"}
  quality.write(
    str(folder), cohort._replace(info=info, splits={s: Counted(s) for s in cohort.splits}), outcome
  )
  return folder, outcome, reads


# -- Reasons, grouped --


@pytest.mark.parametrize(
  "text, wanted",
  [
    ("4000 samples", "# samples"),
    ("4100 samples", "# samples"),
    ("no lead V1, V6", "no lead V1, V6"),
    ("V1: 12 missing", "V1: # missing"),
    ("V17", "V#"),
    ("AV1", "AV#"),
    ("-0.5 to +1e-05 mV, 1,024", "# to # mV, #"),
    ("series b2 and b11", "series b# and b#"),
    ("UTF-8", "UTF-#"),
    ("shape [12, 4000]", "shape [#, ...]"),
    ("frames 1, 2, 3", "frames #, ..."),
    ("frames 1, 2", "frames #, ..."),
    ("reaches nan mV in info", "reaches # mV in info"),
    ("no number", "no number"),
  ],
)
def test_numbers_in_reasons_are_one_but_leads_are_not(text, wanted):
  assert quality.without_numbers(text) == wanted


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
  st.lists(
    st.tuples(
      st.integers(0, 20),
      st.sampled_from(["{} samples", "frame {} of {}", "flat lead V{}"]),
      st.integers(10, 10**5),
      st.integers(1, 6),
    ),
    max_size=40,
  )
)
def test_groups_count_what_pandas_counts(entries):
  texts = [
    (str(name), form.format(lead if "V" in form else n, n)) for name, form, n, lead in entries
  ]
  truth = pd.DataFrame(
    [
      (str(name), form.replace("V{}", f"V{lead}").replace("{}", "#"))
      for name, form, _, lead in entries
    ],
    columns=["id", "form"],
  )
  truth = truth.groupby("form")["id"].agg(["size", "nunique"])
  found = quality.grouped(texts)
  assert {g["text"]: (g["times"], g["records"]) for g in found} == {
    k: tuple(row) for k, row in truth.iterrows()
  }
  assert [g["records"] for g in found] == sorted((g["records"] for g in found), reverse=True)
  for g in found:
    assert len(g["examples"]) == len(set(g["examples"])) == min(g["records"], quality.EXAMPLES)
    assert all(
      (e, g["text"]) in [(i, quality.without_numbers(t)) for i, t in texts] for e in g["examples"]
    )


# -- Numbers --


def test_statistics_are_those_of_numpy():
  rng = np.random.default_rng(0)
  values = rng.normal(100, 10, 500)
  values[:3], values[3:40] = (200, -50, 141), np.nan
  known = pd.Series(values).dropna()
  found = quality.moments_and_quantiles(values)
  assert (found["n"], found["min"], found["max"]) == (463, -50, 200)
  assert found["mean"] == pytest.approx(known.mean()) and found["sd"] == pytest.approx(known.std())
  assert found["quantiles"] == pytest.approx(
    {f"{q:g}": known.quantile(q) for q in quality.QUANTILES}
  )
  share = ((known - known.mean()).abs() > 4 * known.std()).mean()
  assert share == 2 / 463 and found["outside_4_sd"] == pytest.approx(share)  # 141 is within
  none = quality.moments_and_quantiles(np.full(3, np.nan))
  assert (
    none["n"] == 0
    and none["mean"] is none["sd"] is none["outside_4_sd"] is none["quantiles"]["0.5"] is None
  )
  assert (
    quality.moments_and_quantiles(np.array([5.0]))["mean"] == 5
    and quality.moments_and_quantiles(np.array([5.0]))["sd"] is None
  )


@pytest.mark.reported(
  "codes for a missing value, 9999 or -9, went into means and scores without a word"
)
@pytest.mark.parametrize(
  "code, times, told",
  [
    (9999, 1, True),
    (-9, 2, True),
    (-9, 1, False),
    (-99, 1, True),
    (999, 3, True),
    (0, 2, False),
    (30, 3, False),
    (52.5, 3, False),
  ],
)
def test_codes_of_missing_values_are_found_whatever_the_name(code, times, told):
  values = np.random.default_rng(0).normal(20, 5, 200)
  values[::7] = np.nan
  assert quality.codes_of_missing(values) == {}
  values[1 : 1 + times] = code
  assert quality.codes_of_missing(values) == ({f"{code:g}": times} if told else {})


def test_values_without_a_spread_tell_of_no_code():
  for values in (np.full(9, np.nan), np.zeros(0), np.ones(20), np.array([0.0] * 90 + [1] * 10)):
    assert quality.codes_of_missing(values) == {}


def test_codes_of_missing_values_are_on_the_page_and_printed(cohort, tmp_path, capsys):
  outcome = outcome_of(cohort)
  outcome.phenotypes[:3, 11], outcome.phenotypes[5:9, 11] = -999, 9999
  prepare.report(str(tmp_path), cohort, outcome)
  lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("LOOK: ")]
  assert len(lines) == 1 and lines[0].startswith(
    "LOOK: Ecc: 7 of 64 values lie far from all others (median -"
  )
  assert "such as 9999, 4 times" in lines[0]
  summary, page = (
    json.loads((tmp_path / "quality.json").read_text()),
    (tmp_path / "quality.html").read_text(),
  )
  assert (
    summary["phenotypes"]["Ecc"]["codes"] == {"9999": 4, "-999": 3}
    and summary["phenotypes"]["Ecc"]["max"] == 9999
  )
  assert f"<b>Look:</b> {summary['suspicions'][0]}." in page


def test_summary_holds_every_count(written, cohort):
  folder, outcome, _ = written
  found = json.loads((folder / "quality.json").read_text())
  assert found["counts"] == cohort.info["counts"] and list(found["steps"].values()) == [2000, 64]
  assert found["cohort"]["fingerprint"] == cohort.fingerprint and "synthetic" in found["note"]
  assert len(found["rejected"]) == quality_page.LISTED + 3 and found["rejected"] == outcome.rejected
  listed = quality_page.LISTED
  assert [(g["records"], g["times"]) for g in found["reasons"]] == [
    (listed, listed),
    (1, 2),
    (1, 1),
  ]
  assert [g["records"] for g in found["flags"]] == [7, 7] and found["flagged"] == outcome.flags
  men = outcome.covariates[:, 0] == 1
  for k, name in enumerate(schema.PHENOTYPES):
    y, p = outcome.phenotypes[:, k].astype(np.float64), found["phenotypes"][name]
    assert (
      p["unit"] == schema.PHENOTYPES[name]
      and p["n"] + p["missing"] == 64
      and p["n"] == np.isfinite(y).sum()
    )
    assert sum(p["splits"].values()) == p["n"]
    assert p["splits"]["val"] == np.isfinite(y[np.array(outcome.splits) == "val"]).sum()
    if p["n"]:
      assert p["mean"] == pytest.approx(np.nanmean(y)) and p["men"]["mean"] == pytest.approx(
        np.nanmean(y[men])
      )
      assert p["women"]["sd"] == pytest.approx(np.nanstd(y[~men], ddof=1))
  assert found["phenotypes"]["LVEDV"]["published"]["men"] | {"source": ""} == {
    "mean": 166,
    "sd": 32,
    "source": "",
  }
  assert found["phenotypes"]["WT"]["published"]["all"]["mean"] == 5.69


def test_a_wrong_unit_is_far_off_and_a_right_one_is_not(cohort):
  outcome = outcome_of(cohort)
  found = quality.summarise(cohort, outcome)["phenotypes"]
  assert not [
    name for name in ("LVEDV", "LVM", "RVEDV", "LVEF") if found[name]["far_from_published"]
  ]
  outcome.phenotypes[:, 0] /= 1000  # litres
  found = quality.summarise(cohort, outcome)["phenotypes"]
  assert (
    found["LVEDV"]["far_from_published"] == ["all", "women", "men"]
    and not found["LVM"]["far_from_published"]
  )
  rows = quality_page.phenotype_rows(found)
  assert sum(group["far"] for row in rows for group in row["groups"]) == 3
  litres = cohort._replace(info=cohort.info | {"phenotypes": schema.PHENOTYPES | {"LVEDV": "l"}})
  # not to be compared
  assert quality.summarise(litres, outcome)["phenotypes"]["LVEDV"]["published"] == {}
  unknown = outcome._replace(covariates=np.full_like(outcome.covariates, np.nan))
  found = quality.summarise(cohort, unknown)["phenotypes"]["LVEDV"]
  assert found["far_from_published"] == ["all"] and "men" not in found


def test_a_histogram_shows_published_range_and_tells_what_it_leaves_out():
  values = np.append(np.random.default_rng(0).normal(150, 20, 999), 9000.0)
  axes = quality_page.histogram(
    "LVEDV", "ml", {"all": values}, quality.published("LVEDV", "ml")
  ).axes[0]
  assert "1 beyond the axis" in axes.get_xlabel() and axes.get_xlim()[1] < 400
  ranges = [
    line.get_xdata()
    for line in axes.lines
    if len(line.get_xdata()) == 2 and line.get_ydata()[0] < 0
  ]
  np.testing.assert_allclose(ranges, [[147.6 - 2 * 34.3, 147.6 + 2 * 34.3]])
  figure = quality_page.histogram(
    "W$T_{", "m^$m", {"all": np.full(5, 6.0), "men": np.full(2, np.nan)}, {}
  )
  drawings.stacked([figure], 50)  # names are no formulas
  axes = figure.axes[0]
  assert axes.get_xlim()[0] < 6 < axes.get_xlim()[1] and "beyond" not in axes.get_xlabel()


# -- The page --


class Tags(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.tags, self.text = [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_data(self, data):
    self.text.append(data)


def parsed(folder):
  page = (folder / "quality.html").read_text()
  tags = Tags()
  tags.feed(page)
  return page, tags


def test_page_loads_nothing_and_texts_stay_texts(written):
  page, tags = parsed(written[0])
  names = {tag for tag, _ in tags.tags}
  assert not names & {"script", "link", "iframe", "object", "embed", "form", "a", "base"}
  assert "default-src 'none'" in page and "url(" not in page and "@import" not in page
  for tag, attrs in tags.tags:
    assert not [
      name for name in attrs if name.startswith("on") or name in ("href", "srcset", "action")
    ]
    if "src" in attrs:
      assert tag == "img" and attrs["src"].startswith("data:image/png;base64,") and attrs["alt"]
  text = "".join(tags.text)
  # the rejected records themselves, the step, the source
  assert text.count(EVIL) >= quality_page.LISTED
  assert EVIL.replace("1", "#") in text  # the groups


def test_page_tells_counts_and_stays_small(written):
  page, tags = parsed(written[0])
  text = " ".join("".join(tags.text).split())
  assert (
    f"64 records kept, {quality_page.LISTED + 3:,} left out" in text
    and "7 kept with a remark" in text
  )
  assert "The other 3 are in quality.json" in text and "synthetic cohort" in text
  # in its group; the list ends before it
  assert f"{10**4 + 5:016x}/2" in text and page.count("flat lead V5") == 1
  assert len(page) < 3e6
  assert sorted(os.listdir(written[0])) == ["quality.html", "quality.json"]
  images = [attrs["src"].partition(",")[2] for tag, attrs in tags.tags if tag == "img"]
  assert len(images) == len(schema.PHENOTYPES) - 1 + quality.SHOWN  # LVEF was not measured


def test_only_the_records_drawn_are_read(written, cohort):
  _, tags = parsed(written[0])
  assert list(written[2]) == quality.sample(cohort.info["counts"], quality.SHOWN) and set(
    written[2].values()
  ) == {1}
  captions = [f"{salted_id(cohort.splits[s][i])}, {s} {i}:" for s, i in written[2]]
  assert all(caption in "".join(tags.text) for caption in captions)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 30), min_size=3, max_size=3).filter(any), st.integers(1, 40))
def test_a_sample_is_of_different_records_of_all_splits(counts, most):
  counts = dict(zip(schema.SPLITS, counts))
  found = quality.sample(counts, most)
  every = [(split, i) for split, n in counts.items() for i in range(n)]
  assert len(set(found)) == len(found) == min(most, len(every)) and found == quality.sample(
    counts, most
  )
  assert found == [place for place in every if place in found]


# -- Other cohorts: without CMR, at 250 Hz, with nothing in a record, with names to keep out --


def read(item):
  rng = np.random.default_rng(item.key)
  if item.key % 5 == 1:
    raise BadRecord(f"DEMO{item.key:04d} has {item.key} samples")
  ecg = (
    np.zeros((12, 2500), np.float32)
    if item.key == 0
    else rng.normal(size=(12, 2500)).astype(np.float32)
  )
  record = {
    "has_ecg": np.bool_(item.key),
    "has_cmr": np.False_,
    "ecg": ecg,
    "phenotypes": np.zeros(0, np.float32),
    "diseases": np.array([item.key % 2, np.nan], np.float32),
    "covariates": np.zeros(0, np.float32),
  }
  return record, (f"file of demo{item.key:04d} repaired",)


@pytest.fixture(scope="module")
def ecg_only(tmp_path_factory):
  items = [
    Item(schema.subject_hash(f"DEMO{i:04d}", SALT), 3, i, (f"DEMO{i:04d}",)) for i in range(40)
  ]
  info = {
    "source": "toy",
    "phenotypes": {},
    "diseases": ["AF", "MI"],
    "covariates": {},
    "ecg_is_normalised": True,
    "ecg_profile": "cardionets",
  }
  plan = Plan(
    items, read, info, {"files": 40}, [(items[2], "DEMO0002 twice")], split=lambda item: "train"
  )
  folder = tmp_path_factory.mktemp("ecg_only") / "c"
  return builder.build(
    str(folder), plan, shares=(1, 0, 0), profile="minimal", processes=1, report=quality.write
  )


def test_names_stay_out_of_the_report(ecg_only):
  folder = pathlib.Path(ecg_only.path)
  found = json.loads((folder / "quality.json").read_text())
  assert [g["text"] for g in found["reasons"]] == ["<id> has # samples", "<id> twice"]
  salted = {Item(schema.subject_hash(f"DEMO{i:04d}", SALT), 3, i).salted_id for i in range(40)}
  ids = [entry["id"] for entry in found["rejected"] + found["flagged"]]
  assert set(ids) <= salted and len(ids) == 9 + 32
  for name in ("quality.json", "quality.html"):
    assert "demo" not in re.sub('base64,[^"]*', "", (folder / name).read_text()).lower()
  _, tags = parsed(folder)
  assert "no phenotypes" in "".join(tags.text) and "toy" in "".join(tags.text)


def test_salted_ids_of_records_are_those_of_prepare(ecg_only):
  record = ecg_only.splits["train"][0]
  assert salted_id(record) == Item(schema.subject_hash("DEMO0000", SALT), 3, 0).salted_id


def test_a_normalised_ecg_is_drawn_at_its_rate_and_without_unit(ecg_only):
  (figure,) = drawings.of_record(ecg_only.splits["train"][1], ecg_only.info)
  texts = " ".join(t.get_text() for t in [*figure.texts, *figure.axes[0].texts])
  assert "250 Hz" in texts and "mV" not in texts and "without unit" in texts
  rhythm = [line for line in figure.axes[0].lines if line.get_gid() == "II"][-1]
  assert len(rhythm.get_xdata()) == 2500 and np.ptp(rhythm.get_xdata()) == pytest.approx(
    250 * 2499 / 2500
  )
  assert drawings.of_record(ecg_only.splits["train"][0], ecg_only.info) == []


# -- Drawings --


def test_a_second_is_25_mm_and_a_millivolt_10_mm_in_the_picture():
  ecg = np.zeros((12, 5000))
  ecg[schema.LEADS.index("II"), 2500:3000] = 1  # 1 mV from 5 s to 6 s
  pixels = drawings.stacked([drawings.ecg_paper(ecg, 500, "")], 254)  # 10 pixels a millimetre
  strip = pixels[-380:].max(axis=2) < 90  # the foot and the rhythm strip, ink alone

  def x(seconds):
    return round(10 * (drawings.LEFT + 25 * seconds))

  heights = [np.median(np.flatnonzero(strip[:280, x(s)])) for s in (4, 5.5, 7)]
  assert heights[0] - heights[1] == pytest.approx(100, abs=1) and heights[0] == heights[2]
  plateau = np.flatnonzero(strip[round(heights[1]), x(4) : x(7)])
  assert np.ptp(plateau) == pytest.approx(250, abs=5)
  pulse = np.flatnonzero(strip[round(heights[1]), : x(0) - 5])  # calibration: as tall, 5 mm wide
  assert np.ptp(pulse) == pytest.approx(50, abs=5)


def test_each_lead_is_in_its_place_and_complete():
  ecg = np.random.default_rng(0).normal(size=(12, 5000))
  figure = drawings.ecg_paper(ecg, 500, "name of the drawing")
  np.testing.assert_allclose(figure.get_size_inches()[0] * 25.4, drawings.WIDTH)

  def mm(line):
    return figure.axes[0].transData.transform(line.get_xydata()) / figure.dpi * 25.4

  lines = {}
  for line in figure.axes[0].lines:
    lines.setdefault(line.get_gid(), []).append(mm(line))
  feet = {}
  for row, names in enumerate(drawings.PAGE):
    for column, name in enumerate(names):
      place, first = lines[name][0], column * 1250
      lead = ecg[schema.LEADS.index(name)]
      height = 10 * (lead - np.median(lead))[first : first + 1250]
      feet.setdefault(row, []).append(np.median(place[:, 1] - height))
      np.testing.assert_allclose(place[:, 1] - feet[row][-1], height, atol=1e-6)
      np.testing.assert_allclose(
        place[[0, -1], 0], [15 + 25 * first / 500, 15 + 25 * (first + 1249) / 500]
      )
  assert [np.ptp(f) < 1e-6 for f in feet.values()] == [True] * 3
  assert (
    feet[0][0] > feet[1][0] > feet[2][0] and len(lines["II"]) == 2 and len(lines["II"][1]) == 5000
  )
  pulses = lines["calibration"]
  assert len(pulses) == 4 and all(np.ptp(p[:, 1]) == pytest.approx(10) for p in pulses)
  assert "name of the drawing" in [t.get_text() for t in figure.texts]


@pytest.mark.parametrize("size", [1e-5, 0.3, 1, 7, 1e4, 0])
def test_an_ecg_without_unit_fills_the_paper_at_any_size(size):
  ecg = size * synthetic.subject(0, 0)["ecg"]
  figure = drawings.ecg_paper(ecg, 500, "", millivolts=False)
  rows = [line for line in figure.axes[0].lines if line.get_gid() in schema.LEADS]
  tallest = max(np.ptp(line.get_ydata()) for line in rows)
  assert 8 < tallest < 45 if size else tallest == 0
  stated = float(
    re.search(r"10 mm = (\S+)", " ".join(t.get_text() for t in figure.axes[0].texts))[1]
  )
  if size:
    assert tallest == pytest.approx(
      10
      / stated
      * max(
        np.ptp(
          ecg[schema.LEADS.index(r.get_gid())][round((r.get_xdata()[0] - 15) * 20) :][
            : len(r.get_xdata())
          ]
        )
        for r in rows
      ),
      rel=1e-4,
    )


def test_the_minimal_profile_goes_back_to_millivolts():
  t = np.arange(5000) / 500
  wave = preprocess_ecg.normalise(np.tile(np.sin(2 * np.pi * 10 * t), (12, 1)), "minimal")
  assert np.abs(wave[:, 1000:4000]).max() * drawings.MV_A_UNIT["minimal"] == pytest.approx(
    1, abs=0.01
  )
  assert set(drawings.MV_A_UNIT) <= set(preprocess_ecg.PROFILES)


def hearts():
  """Labels [2, 7, 40, 48]: a ring with its cavity and an RV cut by the image's edge, smaller at ES;
  RV at all edges in slices 0 and 6; MYO alone in slice 5."""
  y, x = np.mgrid[:40, :48]
  labels = np.zeros((2, 7, 40, 48), np.uint8)
  for p, radius in enumerate((8, 5)):
    r = np.hypot(y - 20, x - 26)
    right = 3 * ((x < 12) & (abs(y - 20) < radius))
    labels[p, 1:5] = np.where(r < radius, 1, np.where(r < radius + 3, 2, right))
    labels[p, 5] = np.where(r < 3, 2, 0)
    labels[p, [0, 6]] = 3 * (r > 18)
  return labels


def tiles(figure):
  """(phase, slice) -> upper left pixel of its image in the mosaic, from where its number and its
  row's name stand."""
  rows = {
    round(t.get_position()[1], 3): t.get_text()
    for t in figure.axes[0].texts
    if t.get_text() in ("ED", "ES")
  }
  found = {}
  for text in figure.axes[0].texts:
    if text.get_text()[0].isdigit():
      x, y = text.get_position()
      phase = rows[min(rows, key=lambda middle: abs(middle - y) if middle > y else np.inf)]
      found[("ED", "ES").index(phase), int(text.get_text().split()[0]) - 1] = int(y), int(x)
  return found


def test_contours_enclose_their_labels_and_nothing_else():
  labels = hearts()
  figure = drawings.short_axis_montage(np.zeros_like(labels), labels, "")
  mosaic = np.zeros(figure.axes[0].images[0].get_array().shape, np.uint8)
  assert len(tiles(figure)) == 14
  for (phase, z), (y, x) in tiles(figure).items():
    mosaic[y : y + 40, x : x + 48] = labels[phase, z]
  centres = np.stack(np.meshgrid(*map(np.arange, mosaic.shape[::-1])), -1).reshape(-1, 2)
  wanted = {"LV": mosaic == 1, "LV+MYO": np.isin(mosaic, (1, 2)), "RV": mosaic == 3}
  drawn = {c.get_gid(): c for c in figure.axes[0].collections}
  assert drawn.keys() == wanted.keys()
  for name, contour in drawn.items():
    polygons = [
      Path(p) for path in contour.get_paths() for p in path.to_polygons(closed_only=False)
    ]
    # closed at the image's edge too
    assert all(np.array_equal(p.vertices[0], p.vertices[-1]) for p in polygons)
    # a contour may have a hole
    inside = np.sum([p.contains_points(centres) for p in polygons], axis=0) % 2
    np.testing.assert_array_equal(inside.reshape(mosaic.shape), wanted[name])
  assert len({str(c.get_linestyle()) for c in drawn.values()}) == 3  # told apart without colour
  assert [t.get_text() for t in figure.legends[0].get_texts()] == [
    name for name, *_ in drawings.CONTOURS.values()
  ]
  assert not drawings.short_axis_montage(np.zeros_like(labels), None, "").legends


@pytest.mark.parametrize("slices, columns", [(7, 6), (12, 12), (1, 6), (13, 4)])
def test_ed_stands_above_es_and_base_before_apex(slices, columns):
  volumes = np.random.default_rng(0).integers(0, 256, (2, slices, 36, 48)).astype(np.uint8)
  figure = drawings.short_axis_montage(volumes, None, "", columns)
  axes = figure.axes[0]
  mosaic, found = np.ma.filled(axes.images[0].get_array(), np.nan), tiles(figure)
  assert len(found) == 2 * slices
  for (phase, z), (y, x) in found.items():
    np.testing.assert_array_equal(mosaic[y : y + 36, x : x + 48], volumes[phase, z])
    assert found[0, z][0] < found[1, z][0] and found[0, z][1] == found[1, z][1]
    if z % columns:
      assert (
        found[phase, z][1] > found[phase, z - 1][1] and found[phase, z][0] == found[phase, z - 1][0]
      )
  assert np.isfinite(mosaic).sum() == volumes.size
  size = np.diff(axes.transData.transform([(0, 0), (1, 1)]), axis=0)[0]
  assert size[0] == pytest.approx(-size[1])  # pixels stay square, rows run downwards
  texts = " ".join(t.get_text() for t in axes.texts)
  assert (texts.count("1 basal"), texts.count(f"{slices} apical")) == (
    (2, 2) if slices > 1 else (0, 0)
  )


# -- mmcl inspect --


def test_inspect_tells_what_the_cohort_holds(cohort, capsys):
  inspect.main([cohort.path])
  lines = capsys.readouterr().out.splitlines()
  assert "64 records (37 train, 11 val, 16 test); all of them read" in lines[0]
  assert f"fingerprint: {cohort.fingerprint}" in lines and "ecg profile: minimal" in lines
  rows = {line.split()[0]: line.split() for line in lines if line}
  assert rows["ecg"][1:5] == ["int16", "12", "x", "5000"] and "500 Hz" in " ".join(rows["ecg"])
  assert {view: rows[view][1] for view in schema.VIEWS if view in rows} == {
    "ed_volume": "ed_es_volumes",
    "es_volume": "ed_es_volumes",
    "ed_slice": "ed_es_volumes",
    "cine_slice": "cine_slice",
    "three_frames": "three_frames",
  }  # the cohort was made without lax
  outcome = outcome_of(cohort)
  records = [source[i] for source in cohort.splits.values() for i in range(len(source))]
  for k, (name, unit) in enumerate(schema.PHENOTYPES.items()):
    y = outcome.phenotypes[:, k].astype(np.float64)
    wanted = (y.mean(), y.std(ddof=1), *np.quantile(y, (0.5, 0.05, 0.95)))
    assert rows[name] == [name, unit, "64", *(f"{x:.4g}" for x in wanted)]
  for c, name in enumerate(schema.DISEASES):
    cases = sum(r["diseases"][c] for r in records)
    assert rows[name] == [name, f"{cases:.0f}", "64", f"{cases / 64:.2%}"]


def test_inspect_of_a_large_cohort_reads_a_sample_and_says_so(cohort, capsys, monkeypatch):
  monkeypatch.setattr(inspect, "COUNTED", 10)
  inspect.main([cohort.path])
  out = capsys.readouterr().out
  assert "numbers below are of 10 drawn at random" in out and re.search(r"LVEDV +ml +10 ", out)


def test_inspect_of_a_cohort_without_cmr(ecg_only, capsys):
  inspect.main([ecg_only.path])
  out = capsys.readouterr().out
  assert "96.9% with ECG, 0.0% with CMR" in out and "ed_es_volumes" not in out and "250 Hz" in out
  assert "ed_volume" not in out and "view" not in out
  assert re.search(r"AF +16 +32 +50.00%", out) and re.search(r"MI +0 +0 +-", out)


def test_inspect_draws_a_record(cohort, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(inspect, "DPI", 127)
  inspect.main([cohort.path, "--index=3", "--split=val"])
  record = cohort.splits["val"][3]
  out = capsys.readouterr().out
  assert out.startswith(f"{salted_id(record)}, val 3: LVEDV {record['phenotypes'][0]:.4g} ml, ")
  assert os.listdir() == ["cohort-val-3.png"]
  with Image.open("cohort-val-3.png") as image:
    # a print is to scale
    assert image.size[0] == 1350 and image.info["dpi"] == pytest.approx((127, 127), abs=0.1)
    pixels = np.asarray(image)
  np.testing.assert_array_equal(
    pixels, drawings.stacked(drawings.of_record(record, cohort.info), 127)
  )


def test_a_drawing_is_whole_or_absent(cohort, tmp_path, monkeypatch):
  out = tmp_path / "a.png"
  out.write_bytes(b"earlier")

  def half(self, file, *args, **kwargs):
    file.write(b"half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(Image.Image, "save", half)
  monkeypatch.setattr(inspect, "DPI", 127)
  with pytest.raises(UserError, match="No space left"):
    inspect.main([cohort.path, "--index=0", f"--out={out}"])
  assert out.read_bytes() == b"earlier" and os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize(
  "flags, told",
  [
    (["--index=37"], "records 0 to 36"),
    (["--index=-1"], "records 0 to 36"),
    (["--split=val", "--index=11"], "to 10"),
    (["--split=tst"], "train, val, test"),
    (["--index=0", "--out=a.jpg"], ".png"),
    (["--out=a.png"], "--index"),
    (["--index=0", "--out=/no/such/folder/a.png"], "/no/such/folder"),
  ],
)
def test_inspect_refuses_in_one_line(cohort, flags, told, monkeypatch):
  monkeypatch.setattr(inspect, "DPI", 127)
  with pytest.raises(UserError) as refused:
    inspect.main([cohort.path, *flags])
  assert told in str(refused.value) and "\n" not in str(refused.value)


def test_inspect_of_what_is_not_there(ecg_only, tmp_path):
  with pytest.raises(UserError, match="no cohort"):
    inspect.main([str(tmp_path / "none")])
  with pytest.raises(UserError, match="val of .* has no records"):
    inspect.main([ecg_only.path, "--split=val", "--index=0"])
  with pytest.raises(UserError, match="neither an ECG nor"):
    inspect.main([ecg_only.path, "--index=0"])


def test_palette_keeps_the_picture():
  pixels = drawings.stacked([drawings.ecg_paper(synthetic.subject(0, 0)["ecg"], 500, "")], 127)
  back = np.asarray(Image.open(io.BytesIO(quality_page.png(pixels, 128))).convert("RGB"))
  assert back.shape == pixels.shape and np.abs(back.astype(int) - pixels).mean() < 4
