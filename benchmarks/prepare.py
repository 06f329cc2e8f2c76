"""`mmcl prepare ukb` on a raw cohort with planted faults: is all of it right, how fast, does its
memory stay flat?

    python benchmarks/prepare.py --subjects=1000 --frames=10 --out=study/prepare

Takes about 12 minutes on 2 CPU cores and 3 GB of disk. Writes raw files of synthetic hearts as UK
Biobank gives them (tests/helpers/raw_ukb.py; the first subjects each have a fault), makes cohorts
of a quarter, a half and all of the subjects, and holds every one against the truth with the checks
of tests/process/test_raw_ukb.py. Then times each reader on one core. Run again, it goes on; ends
with OUT/results.json and tables. Real samples beside the repository (../shared/realdata) are timed
where they are there.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import sys
import time

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # rates are per core
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "tests/helpers", "tests/process")]

import nibabel
import numpy as np
import raw_ukb
import test_raw_ukb as checks

from mmcl_jax import prepare
from mmcl_jax.data import builder, cohort as cohort_lib, schema
from mmcl_jax.data.readers import acdc, ukb_cmr_dicom, ukb_ecg_xml, ukbb_cardiac, wfdb
from mmcl_jax.data.sources import ukb

REAL = ROOT.parent / "shared" / "realdata"
SECONDS = 10  # each reader is timed, at least
NIFTI = 16  # folders written for the timing of NIfTI
# The program, then the peak memory of its own process and of its largest worker; what getrusage
# says of a process began with that of the process which started it.
MEASURED = """import pathlib, sys, threading, time
from mmcl_jax import prepare

def peak(process):
  return int(pathlib.Path("/proc", process, "status").read_text().partition("VmHWM:")[2].split()[0])

def watch():
  while True:
    for process in [p for task in pathlib.Path("/proc/self/task").glob("*/children") for p in task.read_text().split()]:
      try:
        workers.append(peak(process))
      except (OSError, IndexError):  # it has just ended
        pass
    time.sleep(0.2)

workers = [0]
threading.Thread(target=watch, daemon=True).start()
prepare.main(sys.argv[1:])
print("peak KiB", peak("self"), max(workers))"""


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", default="study/prepare")
  parser.add_argument("--subjects", type=int, default=1000)
  parser.add_argument("--frames", type=int, default=10)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--processes", type=int, default=os.cpu_count())
  args = parser.parse_args()
  out = pathlib.Path(args.out).resolve()
  truth = raw_cohort(out / "raw", args)
  runs = [run(out, truth, share, args.processes) for share in (0.25, 0.5, 1)]
  rates = throughput(out, truth)
  results = {"frames": args.frames, "processes": args.processes, "runs": runs, "rates": rates}
  (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
  print(table(results))


def raw_cohort(folder: pathlib.Path, args) -> raw_ukb.Truth:
  """The raw files, written now or by an earlier run."""
  faults = tuple(checks.FAULTS.values())
  if (folder / "truth.json").is_file():
    truth = raw_ukb.load(folder)
    if (truth.seed, truth.frames, 1 + truth.visits[-1].index) == (
      args.seed,
      args.frames,
      args.subjects,
    ):
      return truth
    raise SystemExit(
      f"{folder} holds another raw cohort; give its --subjects, --frames and --seed, or remove it"
    )
  shutil.rmtree(folder, ignore_errors=True)  # what was begun
  started = cpu_seconds()
  truth = raw_ukb.write(
    folder, args.subjects, args.seed, args.frames, faults=faults, processes=args.processes
  )
  seconds, images = cpu_seconds() - started, len(truth.visits) * args.frames * truth.grid.slices
  print(
    f"{len(truth.visits)} raw visits drawn and written, {images / seconds:.0f} DICOM files/s a "
    "core",
    flush=True,
  )
  raw_ukb.save(truth)
  return truth


def cpu_seconds() -> float:
  """Of this process and of those that it has waited for: other load on the machine counts less than
  by the clock."""
  return sum(os.times()[:4])


def run(out: pathlib.Path, truth: raw_ukb.Truth, share: float, processes: int) -> dict:
  """Prepares the first subjects and holds the cohort against the truth."""
  subjects = int(share * (1 + truth.visits[-1].index))
  work = out / f"of-{subjects}"
  done = work / "result.json"
  if done.is_file():
    return json.loads(done.read_text())
  some = truth._replace(visits=[visit for visit in truth.visits if visit.index < subjects])
  if share < 1:
    some = some._replace(
      folder=str(linked(work / "raw", truth, {visit.eid for visit in some.visits}))
    )
  shutil.rmtree(work / "cohort", ignore_errors=True)
  started, cpu = time.perf_counter(), cpu_seconds()
  made = checks.prepare(
    some, work / "cohort", work / "private", f"--processes={processes}", program=("-c", MEASURED)
  )
  seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
  parent, worker = map(int, re.search(rb"peak KiB (\d+) (\d+)", made.printed).groups())
  with concurrent.futures.ProcessPoolExecutor(
    processes, multiprocessing.get_context("spawn")
  ) as pool:
    visits = list(filter(checks.kept, some.visits))
    hearts = pool.map(checks.expected, [some] * len(visits), visits, chunksize=8)
    checks.check_pairing(
      made, {(visit.eid, visit.instance): heart for visit, heart in zip(visits, hearts)}
    )
  checks.check_faults_are_told(made)
  checks.check_nothing_else_is_lost(made)
  checks.check_tables(made)
  checks.check_nobody_is_named(made)
  checks.check_splits(made)
  result = {
    "subjects": subjects,
    "visits": len(some.visits),
    "kept": len(made.records()),
    "seconds": seconds,
    "cpu_seconds": cpu,
    "parent_mib": parent / 1024,
    "worker_mib": worker / 1024,
  }
  done.write_text(json.dumps(result) + "\n")
  print(f"{subjects} subjects: all checks hold", flush=True)
  return result


def linked(folder: pathlib.Path, truth: raw_ukb.Truth, participants: set[str]) -> pathlib.Path:
  """The raw files of some participants, as hard links, with the tables of all."""
  shutil.rmtree(folder, ignore_errors=True)
  for part in ("Bulk", "Segmentations", "tables", "withdrawn.csv"):
    source = pathlib.Path(truth.folder, part)
    for file in [source] if source.is_file() else sorted(source.rglob("*.*")):
      named = file.parent.name if part == "Segmentations" else file.name
      if part in ("Bulk", "Segmentations") and named.partition("_")[0] not in participants:
        continue
      copy = folder / file.relative_to(truth.folder)
      copy.parent.mkdir(parents=True, exist_ok=True)
      os.link(file, copy, follow_symlinks=False)
  return folder


def throughput(out: pathlib.Path, truth: raw_ukb.Truth) -> dict[str, dict]:
  """Files a second of each reader on one core, after one round of warming up."""
  whole = [visit for visit in truth.visits if not visit.fault]

  def place(path_of):
    return [path_of(truth.folder, visit.eid, visit.instance) for visit in whole]

  ecgs, zips, labels = (
    place(raw_ukb.ecg_path),
    place(raw_ukb.cmr_path),
    place(raw_ukb.segmentation_path),
  )
  images = truth.frames * truth.grid.slices
  folders = nifti_folders(out / "nifti", truth, whole[:NIFTI])
  plan = ukb.plan(
    prepare.parse(
      [
        "ukb",
        "--input",
        *map(str, ecgs + zips),
        "--segmentations",
        str(pathlib.Path(truth.folder, "Segmentations")),
        "--out=unused",
      ]
    ),
    lambda participant: schema.subject_hash(participant, b"benchmark"),
  )
  job = builder.Job(
    "", plan.read, "minimal", {name: len(plan.info[name]) for name in cohort_lib.LABELS}
  )
  found = {
    "ECG XML (20205)": rate(ukb_ecg_xml.read, ecgs),
    "DICOM zip (20209) with segmentation": rate(
      lambda pair: ukb_cmr_dicom.read(*pair), list(zip(zips, labels)), images
    ),
    "NIfTI folder (ukbb_cardiac)": rate(ukbb_cardiac.read, folders),
    "whole record: both, preprocessed, encoded": rate(
      lambda item: builder.read_item(job, item), plan.items
    ),
  }
  if REAL.is_dir():
    found |= {
      "real: WFDB, 12 x 5,000": rate(wfdb.read, sorted((REAL / "ecg/cinc2021_wfdb").glob("*.hea"))),
      "real: ECG XML": rate(
        ukb_ecg_xml.read, sorted((REAL / "ecg/cardiosoft_style").glob("*.xml"))
      ),
      "real: DICOM zip, 6 slices x 25 frames of 256 x 208": rate(
        ukb_cmr_dicom.read, sorted((REAL / "cmr/bivme_patient1_ukb20209").glob("*.zip")), 150
      ),
      "real: NIfTI folder, 6 x 25 of 256 x 208": rate(
        ukbb_cardiac.read, [REAL / "cmr/bivme_patient1"]
      ),
      "real: ACDC folder, ED and ES": rate(acdc.read, [REAL / "cmr/acdc_style/patient901"]),
    }
  return found


def rate(read, inputs: list, images: int = 0) -> dict:
  """Inputs a second of this process, round after round for SECONDS; with `images` each, images a
  second too."""
  read(inputs[0])
  started, count = time.process_time(), 0
  while time.process_time() - started < SECONDS:
    read(inputs[count % len(inputs)])
    count += 1
  a_second = count / (time.process_time() - started)
  return {"a_second": a_second} | ({"images_a_second": a_second * images} if images else {})


def nifti_folders(
  folder: pathlib.Path, truth: raw_ukb.Truth, visits: list[raw_ukb.Visit]
) -> list[pathlib.Path]:
  """The same studies as ukbb_cardiac's converter leaves them."""
  for visit in visits:
    study = folder / f"{visit.eid}_{visit.instance}"
    if not (study / "seg_sa.nii.gz").is_file():
      study.mkdir(parents=True, exist_ok=True)
      heart = truth.heart(visit)
      segmentation = nibabel.load(
        raw_ukb.segmentation_path(truth.folder, visit.eid, visit.instance)
      )
      images = heart.images[:, ::-1] if raw_ukb.is_flipped(visit.index) else heart.images
      header = segmentation.header.copy()
      header.set_data_dtype(np.int16)
      nibabel.save(
        nibabel.Nifti1Image(
          images.transpose(3, 2, 1, 0).astype(np.int16), segmentation.affine, header
        ),
        study / "sa.nii.gz",
      )
      nibabel.save(segmentation, study / "seg_sa.nii.gz")
  return [folder / f"{visit.eid}_{visit.instance}" for visit in visits]


def table(results: dict) -> str:
  """The study in Markdown."""
  rows = ["| on one core | a second | images a second |", "|---|---|---|"]
  rows += [
    f"| {name} | {found['a_second']:.1f} | {found['images_a_second']:.0f} |"
    if "images_a_second" in found
    else f"| {name} | {found['a_second']:.1f} | |"
    for name, found in results["rates"].items()
  ]
  rows += [
    "",
    f"| subjects | visits | kept | s, {results['processes']} processes | CPU s | peak MiB, parent "
    "| largest worker |",
    "|---" * 7 + "|",
  ]
  rows += [
    f"| {r['subjects']} | {r['visits']} | {r['kept']} | {r['seconds']:.0f} | "
    f"{r['cpu_seconds']:.0f} "
    f"| {r['parent_mib']:.0f} | {r['worker_mib']:.0f} |"
    for r in results["runs"]
  ]
  return "\n".join(rows)


if __name__ == "__main__":
  main()
