"""Raw UK Biobank files with planted faults through `mmcl prepare ukb`: pairs are right, faults
told, nobody named.

The checks take what `raw_ukb.write` wrote and what the program made of it; benchmarks/prepare.py
runs them on 1,000 subjects.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import raw_ukb
import raw_ukb_faults
import threadpoolctl
from common import ROOT

from mmcl_jax.data import cohort as cohort_lib, measure, schema, ukb_fields
from mmcl_jax.data.preprocess import cmr as preprocess_cmr, ecg as preprocess_ecg
from mmcl_jax.data.readers.cine import Cine

FAULTS = {fault.name: fault for fault in raw_ukb_faults.FAULTS}
NO_LABELS = ("segmentation empty", "segmentation absent")
SPLIT = (0.4, 0.3, 0.3)
# for matrices this small, more are slower
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
DISEASES_OF_CODES = {code: [name] for name, code in raw_ukb.CODES.items()} | {
  "I219": ["MI", "CAD"],
  "E119": ["DM"],
  "Z824": [],
  "K219": [],
}


class Made(NamedTuple):
  """What one run of the program left."""

  truth: raw_ukb.Truth
  out: pathlib.Path
  private: pathlib.Path
  printed: bytes

  @property
  def ids(self) -> dict[str, str]:
    """Participant -> hash in reports."""
    return {
      participant: name
      for name, participant in (
        line.split(",") for line in (self.private / "participants.csv").read_text().splitlines()[1:]
      )
    }

  @property
  def quality(self) -> dict:
    return json.loads((self.out / "quality.json").read_text())

  def name(self, visit: raw_ukb.Visit) -> str:
    return f"{self.ids[visit.eid]}/{visit.instance}"

  def records(self) -> dict[str, tuple[str, dict]]:
    """Name in reports -> (split, record)."""
    found = {}
    for split, source in cohort_lib.load(str(self.out)).splits.items():
      for i in range(len(source)):
        high, low = (int(x) for x in source[i]["subject"][::-1])
        name = f"{high:08x}{low:08x}/{int(source[i]['visit'])}"
        assert name not in found
        found[name] = split, source[i]
    return found


def prepare(
  truth: raw_ukb.Truth, out, private, *more: str, program=("-m", "mmcl_jax.prepare")
) -> Made:
  """Runs the program in a process of its own, so that all that it and its workers print is seen."""
  folder = pathlib.Path(truth.folder)
  command = [
    sys.executable,
    *program,
    "ukb",
    "--input",
    folder / "Bulk",
    "--out",
    out,
    "--private",
    private,
    "--split",
    ",".join(map(str, SPLIT)),
    *more,
  ]
  if (folder / "tables").is_dir():
    command += [
      "--segmentations",
      folder / "Segmentations",
      "--withdrawn",
      folder / "withdrawn.csv",
      "--tables",
      *sorted((folder / "tables").iterdir()),
    ]
  done = subprocess.run(
    list(map(str, command)),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    env=os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT)},
  )
  assert done.returncode == 0, done.stdout.decode()[-3000:]
  return Made(truth, pathlib.Path(out), pathlib.Path(private), done.stdout)


def kept(visit: raw_ukb.Visit) -> bool:
  return not (visit.fault and FAULTS[visit.fault].lost)


# What must hold of any cohort made of raw_ukb's files.


def check_nothing_else_is_lost(made: Made) -> None:
  expected = {made.name(visit) for visit in made.truth.visits if kept(visit)}
  assert made.records().keys() == expected
  quality = made.quality
  silent = {made.name(v) for v in made.truth.visits if not v.fault or not FAULTS[v.fault].report}
  said = {entry["id"] for entry in quality["rejected"] + quality["flagged"]}
  assert not silent & said


def check_faults_are_told(made: Made) -> None:
  quality = made.quality
  untold = []
  for visit in made.truth.visits:
    fault = FAULTS.get(visit.fault)
    if fault and fault.report:
      told = [entry["reason"] for entry in quality["rejected"] if entry["id"] == made.name(visit)]
      told += [
        flag
        for entry in quality["flagged"]
        if entry["id"] == made.name(visit)
        for flag in entry["flags"]
      ]
      told += [
        step
        for step, count in quality["steps"].items()
        if step.startswith("in the tables") and count == 1
      ]
      if not any(re.search(fault.report, text) for text in told):
        untold.append(f"{fault.name}: {told}, not {fault.report!r}")
  assert not untold, "\n".join(untold)


class Expected(NamedTuple):
  """What must be in the record of one visit, made from the heart without a file in between."""

  ecg: np.ndarray  # float32 [12, 500], every tenth sample
  volumes: np.ndarray  # uint8 [2, Z, H, W]
  labels: np.ndarray  # uint8 [2, Z, H, W]
  millilitres: np.ndarray  # float64 [2, 3], of LV, MYO and RV on the hearts' own grid


def expected(truth: raw_ukb.Truth, visit: raw_ukb.Visit, profile: str = "minimal") -> Expected:
  heart = truth.heart(visit)
  normalised = preprocess_ecg.normalise(heart.ecg * (raw_ukb.RESOLUTION_UV / 1000), profile)
  cine = Cine(heart.images, truth.grid.spacing)
  if visit.fault not in NO_LABELS:  # without, the positions of the slices tell base and apex
    cine = cine._replace(labels=heart.labels, labelled=tuple(range(truth.frames)))
  fields, _, _ = preprocess_cmr.to_record(cine)
  return Expected(
    normalised[:, ::10],
    fields["ed_es_volumes"],
    fields["labels"],
    measure.volumes(heart.labels[[0, heart.es]], truth.grid.spacing),
  )


def check_pairing(made: Made, hearts: dict[tuple[str, int], Expected]) -> None:
  """Each record's ECG, images and labels are those of its own participant at its own visit, and of
  no other."""
  keys, records = list(hearts), made.records()
  by_name = {made.name(visit): (visit.eid, visit.instance) for visit in made.truth.visits}
  names = list(records)
  right = np.array([keys.index(by_name[name]) for name in names])
  labelled = np.array([bool(records[name][1]["labels"].any()) for name in names])

  ecgs = np.stack(
    [records[name][1]["ecg"][:, ::10] * np.float32(records[name][1]["ecg_scale"]) for name in names]
  )
  distance = distances(ecgs, np.stack([heart.ecg for heart in hearts.values()]))
  np.testing.assert_array_equal(distance.argmin(axis=1), right)
  # 5 uV are 0.025, where a lead was derived
  assert distance[np.arange(len(right)), right].max() < 0.02

  volumes = np.stack([records[name][1]["ed_es_volumes"] for name in names])
  distance = distances(
    volumes[..., ::4, ::4], np.stack([heart.volumes[..., ::4, ::4] for heart in hearts.values()])
  )
  np.testing.assert_array_equal(distance.argmin(axis=1), right)
  for name, i in zip(names, right):
    np.testing.assert_array_equal(records[name][1]["ed_es_volumes"], hearts[keys[i]].volumes)
    np.testing.assert_array_equal(records[name][1]["labels"], hearts[keys[i]].labels)

  # Their volumes, which no code of the preprocessing has seen; a wall of few voxels, sampled from
  # 2.0 to 2.5 mm.
  found = np.stack(
    [measure.volumes(record["labels"], record["spacing"]) for _, record in records.values()]
  )
  ratio = (found / [hearts[keys[i]].millilitres for i in right])[labelled]
  assert np.abs(ratio - 1).max() < 0.1 and abs(ratio.mean() - 1) < 0.005


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Root mean square difference of every a [N, ...] to every b [M, ...]; float64 [N, M]."""
  a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))
  squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
  return np.sqrt(np.maximum(squares, 0) / a.shape[1])


def check_tables(made: Made) -> None:
  """Phenotypes, covariates and diseases are those of the tables, for each participant and visit."""
  info, records = cohort_lib.load(str(made.out)).info, made.records()
  assert list(info["phenotypes"]) == [field.name for field in ukb_fields.CARDIAC.values()]
  assert len(info["phenotypes"]) == len(raw_ukb.ALL_FIELDS)
  for visit in filter(kept, made.truth.visits):
    _, record = records[made.name(visit)]
    for name, values in expected_row(visit, info["diseases"]).items():
      tolerance = 0.006 if name == "phenotypes" else 1e-4  # two decimals; float32
      np.testing.assert_allclose(
        record[name], values, rtol=0, atol=tolerance, err_msg=f"{name}, {visit.fault}"
      )


def expected_row(visit: raw_ukb.Visit, diseases: list[str]) -> dict[str, np.ndarray]:
  """Values of a visit in the order of the cohort; NaN = not known."""
  rows = {table: own[0] for table, own in raw_ukb.rows_of([visit]).items() if own}
  phenotypes = {
    field.name: rows["phenotypes"][f"{number}-{visit.instance}.0"]
    for number, field in ukb_fields.CARDIAC.items()
  }
  seen = np.datetime64(rows["covariates"][f"f.53.{visit.instance}.0"])
  first = [np.inf] * len(diseases)  # years from the visit to the first code
  for i, code in enumerate(rows["outcomes"]["p41270"]):
    years = (
      (np.datetime64(rows["outcomes"][f"p41280_a{i}"]) - seen) / np.timedelta64(1, "D") / 365.25
    )
    if i == 0 and visit.fault == "garbage for a date of diagnosis":
      years = np.nan
    for name in DISEASES_OF_CODES[code]:
      first[diseases.index(name)] = min(years, first[diseases.index(name)])
  found = {
    "phenotypes": list(phenotypes.values()),
    "covariates": list(visit.covariates.values()),
    "diseases": [float(years != np.inf) for years in first],
    "event_years": [years if np.isfinite(years) else np.nan for years in first],
  }
  found = {name: np.array(values) for name, values in found.items()}
  if visit.fault == "in no table":
    found = {name: np.full_like(values, np.nan) for name, values in found.items()}
  elif visit.fault == "LVEF of 140 %":
    found["phenotypes"][list(phenotypes).index("LVEF")] = np.nan
  elif visit.fault == "garbage for a date of visit":
    found["event_years"][:] = np.nan
  return found


def check_nobody_is_named(made: Made) -> None:
  """No id, file name, personal name or date of birth in any byte that leaves the private folder."""
  ids = {visit.eid for visit in made.truth.visits}
  secret = re.compile(
    "|".join([r"DEMO\d{4}", r"(?<![\d.])73841\d{3}(?!\d)", *raw_ukb.PLANTED, "_2020[59]_"]).encode()
  )
  assert all(secret.fullmatch(participant.encode()) for participant in ids)
  texts = [made.printed, *(file.read_bytes() for file in made.out.rglob("*") if file.is_file())]
  texts += [str(file.relative_to(made.out)).encode() for file in made.out.rglob("*")]
  numbers = {int(name) for name in ids if name.isdigit()}
  for _, record in made.records().values():  # files are compressed
    texts += [array.tobytes() for array in map(np.asarray, record.values())]
    assert not numbers & {int(x) for x in np.ravel(record["subject"])}
  assert sum(map(len, texts)) > 10**6
  assert not [secret.search(text)[0] for text in texts if secret.search(text)]
  assert (made.private / "participants.csv").stat().st_mode & 0o077 == 0


def check_splits(made: Made) -> None:
  """All visits of a participant are in one split, and it is the one that the hash alone decides."""
  homes = {}
  for name, (split, record) in made.records().items():
    homes.setdefault(name.partition("/")[0], set()).add(split)
    assert split == schema.split_of(record["subject"], SPLIT)
  assert all(len(splits) == 1 for splits in homes.values())
  assert len(made.records()) > len(homes), "no repeat visit among those kept"


# In the size of a test.


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Each fault once, and some subjects without any."""
  folder = tmp_path_factory.mktemp("ukb")
  truth = raw_ukb.write(
    folder / "raw",
    len(FAULTS) + 12,
    seed=3,
    frames=8,
    slices=9,
    faults=tuple(FAULTS.values()),
    processes=2,
  )
  (folder / "private").mkdir(mode=0o700)
  # the same splits in every run of the test
  (folder / "private" / "salt").write_text(64 * "5" + "\n")
  return prepare(truth, folder / "cohort", folder / "private", "--processes=2")


def test_each_fault_is_told_with_its_reason(made):
  check_faults_are_told(made)


def test_nothing_is_lost_but_what_must_be(made):
  check_nothing_else_is_lost(made)


def test_each_record_is_of_one_visit_of_one_participant(made):
  with threadpoolctl.threadpool_limits(1):
    hearts = {
      (visit.eid, visit.instance): expected(made.truth, visit)
      for visit in made.truth.visits
      if kept(visit)
    }
  check_pairing(made, hearts)


def test_tables_reach_their_participants(made):
  check_tables(made)


def test_nobody_is_named(made):
  check_nobody_is_named(made)


def test_visits_of_a_participant_share_a_split(made):
  check_splits(made)


def test_a_fault_leaves_nothing_on_disk(made):
  """A zip that climbs was refused without effect; the folders hold what was written and nothing
  else."""
  assert not list(made.out.parents[1].rglob("climbed*"))
  assert sorted(path.name for path in made.out.parent.iterdir()) == ["cohort", "private", "raw"]


def test_splits_stay_when_a_cohort_grows(made, tmp_path):
  """With the private folder of the first cohort, a larger one keeps everybody's hash and split."""
  some = {visit.eid for visit in made.truth.visits if not visit.fault}
  for file in (pathlib.Path(made.truth.folder) / "Bulk").rglob("*_*"):
    if file.name.partition("_")[0] in some:
      copy = tmp_path / "raw" / file.relative_to(made.truth.folder)
      copy.parent.mkdir(parents=True, exist_ok=True)
      os.link(file, copy)
  small = prepare(
    made.truth._replace(folder=tmp_path / "raw"), tmp_path / "cohort", made.private, "--processes=1"
  )
  before, after = small.records(), made.records()
  assert len({name.partition("/")[0] for name in before}) == len(some)
  assert {name: split for name, (split, _) in before.items()} == {
    name: after[name][0] for name in before
  }
  # the second run has forgotten nobody
  assert set(made.ids) == {visit.eid for visit in made.truth.visits}
