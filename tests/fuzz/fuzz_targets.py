"""What fuzz.py damages: for every kind of file that a stranger may have made, valid ones, and the
package's reading.

What a reading lets through beside BadRecord and UserError would end a program with a traceback.
"""

import json
import os
import pathlib
import shutil
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("tests/helpers", "tests/unit", "configs")]

import raw_ukb
from fuzz import Target

from mmcl_jax import configuration
from mmcl_jax.data import builder, cohort as cohort_lib, readers, schema, standardise, ukb_fields
from mmcl_jax.data.preprocess import cmr as preprocess_cmr, ecg as preprocess_ecg
from mmcl_jax.data.readers import mmcl_pt as reader_pt, tables, ukb_cmr_dicom, ukb_ecg_xml, wfdb
from mmcl_jax.data.sources import acdc, labels, mmcl_pt, mnms, ukb, wfdb as source_wfdb
from mmcl_jax.data.synthetic import cmr as synthetic_cmr, population
from mmcl_jax.errors import BadRecord, UserError

Folder = pathlib.Path
SECRETS = (*raw_ukb.PLANTED, "DEMO0")  # stand in the seeds; no message may tell them


def options(**given):
  """The flags of `mmcl prepare` that a source's plan looks at."""
  flags = dict(
    input=[],
    tables=[],
    segmentations=None,
    withdrawn=None,
    diseases="any",
    codes=None,
    censored=None,
    shape=SHAPE,
  )
  return types.SimpleNamespace(**flags | given)


def identify(participant: str) -> np.ndarray:
  return schema.subject_hash(participant, bytes(32))


def all_of(*readings: Callable[[], Any]) -> list:
  """Runs all readings; the first refusal is raised when all have run."""
  found, refusals = [], []
  for reading in readings:
    try:
      found.append(reading())
    except (BadRecord, UserError) as error:
      refusals.append(error)
  if refusals:
    raise refusals[0]
  return found


def records_of(plan) -> list:
  return all_of(*(lambda item=item: plan.read(item) for item in plan.items))


# ECG files


def made_ecg(name: str):
  """Makes one of the files of test_ecg_readers.valid_files, with its sidecar; two seeds, which are
  alike."""

  def make(folder):
    import test_ecg_readers

    for seed in ("0", "1"):
      (folder / "all").mkdir(exist_ok=True)
      test_ecg_readers.valid_files(folder / "all")
      (folder / seed).mkdir()
      for file in (folder / "all").iterdir():
        if file.stem == name.partition(".")[0] and file.suffix in (
          pathlib.Path(name).suffix,
          ".json",
        ):
          shutil.copy(file, folder / seed / file.name)
    shutil.rmtree(folder / "all")

  return make


def make_wfdb(folder):
  """A record with .dat, one of the CinC challenges with .mat, and one whose header calls its record
  as a file."""
  import recordings
  import test_ecg_readers

  for seed in ("0", "1", "2"):
    (folder / seed).mkdir()
  recordings.record(folder / "0", recordings.heart(), name="a", comments=["Age: 60", "Dx: 1,2"])
  test_ecg_readers.cinc(folder / "1")
  test_ecg_readers.cinc(folder / "2", first="A0001.mat 12 500 5000 12-May-2020 12:33:59")


def make_csv(folder):
  """Ten seconds at 100 Hz, with a sidecar of its own or of the folder."""
  import recordings
  import test_ecg_readers

  for seed, sidecar in (("0", "b.json"), ("1", "ecg.json")):
    (folder / seed).mkdir()
    leads = recordings.heart(rate=100, seed=int(seed))
    few = {name: leads[name] for name in recordings.INDEPENDENT}
    test_ecg_readers.write_csv(folder / seed / "b.csv", leads if seed == "0" else few, digits=3)
    (folder / seed / sidecar).write_text('{"rate_hz": 100, "unit": "mV"}')


def make_xml(folder):
  rng = np.random.default_rng(0)
  made_ecg("a.xml")(folder)
  samples = rng.integers(-200, 200, (12, 5000))
  first, second = samples[:2]
  samples[2:6] = second - first, -(first + second) // 2, first - second // 2, second - first // 2
  raw_ukb.write_xml(folder / "2" / "a.xml", samples, raw_ukb.eid(0), 60)


def read_ecgs(folder, *more: Callable):
  """As `mmcl embed` reads a folder."""

  def whole(path):
    recording = readers.read_ecg(path)
    return preprocess_ecg.normalise(
      preprocess_ecg.to_standard(recording.ecg_mv, recording.rate_hz), "minimal"
    )

  return all_of(
    *(
      lambda path=path, read=read: read(path)
      for path in readers.find_ecg(folder)[0]
      for read in (whole, *more)
    )
  )


def read_wfdb(folder):
  return read_ecgs(folder, wfdb.comments)


def read_xml(folder):
  return read_ecgs(
    folder, ukb_ecg_xml.read_median, ukb_ecg_xml.read_full_disclosure, ukb_ecg_xml.measurements
  )


def make_wfdb_tables(folder):
  """A record that a table of PTB-XL's form lists, or one of MIMIC-IV-ECG's."""
  import recordings

  tables_ = {
    "0": "ecg_id,patient_id,age,sex,height,weight,recording_date,scp_codes,filename_lr,filename_hr\n"
    "1,15709.0,56.0,1,,63.0,1984-11-09 09:17:34,\"{'NORM': 100.0, 'LVOLT': "
    '0.0}",records100/a_lr,records500/a\n'
    "2,15709.0,300.0,0,170,63.0,1985-11-09 09:17:34,\"{'AFIB': "
    '35.0}",records100/b_lr,records500/b\n',
    "1": "subject_id,file_name,ecg_time,gender,age,all_diag_hosp,all_diag_all\n"
    "7,files/a,2150-01-01 01:00:00,F,60,\"['I48', 'I509']\",\"['I48']\"\n"
    "8,files/b,2151-01-01 01:00:00,M,70,[],[]\n",
  }
  for seed, text in tables_.items():
    for k, name in enumerate("ab"):
      recordings.record(folder / seed / "records", recordings.heart(seed=k), name=name)
    (folder / seed / "table.csv").write_text(text)


def read_wfdb_tables(folder):
  given = options(input=[str(folder / "records")], tables=[str(folder / "table.csv")])
  return records_of(source_wfdb.plan(given, identify))


# CMR


SHAPE = preprocess_cmr.Shape(slices=4, size=16, pixel_mm=6.0, frames=4)
GRID = synthetic_cmr.Grid(7, 40, (10.0, 4.0, 4.0))


def hearts():
  return {str(k): raw_ukb.heart(5, k, 2, 8, GRID) for k in (0, 1)}


def make_zip(folder):
  """Zips as small as the reader takes them, with a segmentation."""
  for seed, heart in hearts().items():
    name = raw_ukb.eid(int(seed))
    files = raw_ukb.series_of(name, 2, heart.images, GRID, 900, flipped=False)
    raw_ukb.write_zip(
      folder / seed / "a.zip",
      name,
      files + raw_ukb.inline_vf(name, 2),
      population.generator(0, 0, 0),
    )
    raw_ukb.write_segmentation(
      folder / seed / "seg_sa.nii.gz", heart.labels, GRID, 0.1, False, np.uint8
    )


def read_zip(folder):
  cine = ukb_cmr_dicom.read(folder / "a.zip", folder / "seg_sa.nii.gz")
  return preprocess_cmr.to_record(cine, SHAPE)


def make_ukbb(folder):
  import test_cmr_readers

  for seed, heart in hearts().items():
    images, labels_ = heart.images.astype(np.int16), heart.labels
    to = folder / seed / f"{raw_ukb.eid(int(seed))}_2"

    def write(name, voxels, to=to):
      return test_cmr_readers.save(to / name, voxels, spacing=GRID.spacing)

    write("sa.nii.gz", images)
    write("seg_sa.nii.gz", labels_)
    write("sa_ES.nii.gz", images[heart.es : heart.es + 1])
    write("sa_ED.nii.gz", images[:1])
  (folder / "1" / to.name / "seg_sa.nii.gz").rename(to / "label_sa.nii.gz")


def read_ukbb(folder):
  return records_of(ukb.plan_folders(options(input=[str(folder)]), identify))


def make_acdc(folder):
  import test_cmr_readers

  for seed, heart in hearts().items():
    to = folder / seed / f"patient{seed}"

    def write(name, voxels, *more, to=to):
      return test_cmr_readers.save(to / name, voxels, *more, spacing=GRID.spacing)

    if seed == "0":
      write(f"{to.name}_4d.nii.gz", heart.images.astype(np.int16))
    for frame in (0, heart.es):
      write(
        f"{to.name}_frame{frame + 1:02d}.nii.gz", heart.images[frame : frame + 1].astype(np.int16)
      )
      write(f"{to.name}_frame{frame + 1:02d}_gt.nii.gz", heart.labels[frame : frame + 1], (3, 2, 1))
    (to / "Info.cfg").write_text(
      f"ED: 1\nES: {heart.es + 1}\nGroup: DCM\nHeight: 170.0\nNbFrame: 8\nWeight: 70.0\n"
    )


def read_acdc(folder):
  return records_of(acdc.plan(options(input=[str(folder)]), identify))


def make_mnms(folder):
  import test_cmr_readers

  for seed, heart in hearts().items():
    named = np.isin(np.arange(len(heart.labels)), (0, heart.es))[:, None, None, None]
    row = f"0,A{seed},Siemens,A,1,0,{heart.es},50,HCM,M,180.0,"
    (folder / seed).mkdir()
    table = folder / seed / "1_M&Ms_Dataset_information_diagnosis_opendataset.csv"
    table.write_text(f"{test_cmr_readers.MNMS_HEADER}\n{row}\n")
    to = folder / seed / "Testing" / f"A{seed}"
    test_cmr_readers.save(
      to / f"A{seed}_sa.nii.gz", heart.images.astype(np.int16), spacing=GRID.spacing
    )
    labelled = np.where(named, heart.labels, 0)
    test_cmr_readers.save(to / f"A{seed}_sa_gt.nii.gz", labelled, (1, 2, 3), spacing=GRID.spacing)


def read_mnms(folder):
  return records_of(mnms.plan(options(input=[str(folder)]), identify))


# Tables and lists


PHENOTYPES = {
  "LVEDV": 150.0,
  "LVESV": 60.0,
  "LVSV": 90.0,
  "LVEF": 60.0,
  "LVCO": 5.5,
  "LVM": 95.0,
  "RVEDV": 160.0,
  # of a healthy adult
  "RVESV": 70.0,
  "RVSV": 90.0,
  "RVEF": 56.0,
  "WT": 6.0,
  "Ecc": -18.0,
}


def visits() -> list[raw_ukb.Visit]:
  return [
    raw_ukb.Visit(
      raw_ukb.eid(i),
      2,
      i,
      3,
      {name: PHENOTYPES[name] + i / 10 for name in raw_ukb.FIELDS},
      {"sex": i % 2, "age": 60, "height": 170.5, "weight": 70.0},
      {"HF": 1.0, "AF": float(i % 2)},
    )
    for i in range(8)
  ]


def make_tables(*names: str):
  def make(folder):
    for seed in ("0", "1"):
      rows = {}
      for visit in visits()[int(seed) :]:
        for table, own in raw_ukb.rows_of([visit]).items():
          rows.setdefault(table, []).extend(own)
      (folder / seed).mkdir(parents=True)
      raw_ukb.write_tables(folder / seed, rows)
      (folder / seed / "withdrawn.csv").unlink()
      for file in (folder / seed / "tables").iterdir():
        if file.suffix not in names:
          file.unlink()

  return make


def make_general(folder):
  """The general form, and UK Biobank's with lists of codes in one cell."""
  (folder / "0" / "tables").mkdir(parents=True)
  (folder / "0" / "tables" / "a.csv").write_text(
    "participant,visit,sex,age,height,weight,phenotype:LVEDV:ml,phenotype:X:,disease:HF\n"
    'DEMO0001,0,1,61.5,170,70,150.5,1e3,1\nDEMO0002,1,female,NA,,80,-1,,0\n"DEMO0003",2,0,50,160,60,140,2,\n'
  )
  make_tables(".csv", ".tsv")(folder / "more")
  for seed in ("0", "1"):
    shutil.move(folder / "more" / seed, folder / str(int(seed) + 1))
  shutil.rmtree(folder / "more")
  (folder / "2" / "tables" / "outcomes.csv").write_text(
    "eid,p41270,p41280_a0,p41280_a1,p53_i2,p40000_i0,p40001_i0\n"
    'DEMO0001,"[""I10"",""I48.0""]",2010-01-01,2012-05-06,2015-01-01,,\n'
    "DEMO0002,I10|I509,2011-01-01,,2015-02-02,2019-01-01,I219\n"
  )


def read_tables(folder):
  """All that `mmcl prepare` asks a table for each participant."""
  files, codes = sorted((folder / "tables").iterdir()), ukb_fields.disease_codes()
  for people in (None, [raw_ukb.eid(1), "DEMO0002"]):
    table = tables.load(files, participants=people)
    wanted = codes | dict.fromkeys(table.given, ())
    for mode in tables.MODES:
      for participant, visit in list(table.rows)[:50]:
        try:
          ukb.of_tables(table, participant, visit, wanted, mode)
        except UserError:
          break
  return table


def make_withdrawn(folder):
  for seed, text in enumerate(
    (
      "DEMO0001\n17\n00018\n",
      'eid,reason\nDEMO0001,moved\n"17",x\n',
      "id\tParticipant ID\n1\tDEMO0001\n",
    )
  ):
    (folder / str(seed)).mkdir()
    (folder / str(seed) / "withdrawn.csv").write_text(text)


def make_codes(folder):
  for seed, text in enumerate(
    (
      pathlib.Path(ukb_fields.__file__).with_name("diseases.toml").read_text(),
      '[AF]\ncodes = ["I48"]\n[X-1]\ncodes = ["I20-I25", "I51.7"]\nnote = "a"\n',
    )
  ):
    (folder / str(seed)).mkdir()
    (folder / str(seed) / "codes.toml").write_text(text)


def read_codes(folder):
  codes = ukb_fields.disease_codes(folder / "codes.toml")
  return labels.icd(["I48"], ["I509"], codes)


def make_private(folder):
  for seed in ("0", "1"):
    (folder / seed / "private").mkdir(parents=True)
    (folder / seed / "private" / "salt").write_text(64 * seed + "\n")
    (folder / seed / "private" / "participants.csv").write_text(
      "hash,participant\n0123456789abcdef,DEMO0001\n"
    )


def read_private(folder):
  from mmcl_jax import prepare

  identities = prepare.Identities(str(folder / "private"), str(folder / "out"))
  identities.identify("DEMO0002")
  identities.save()


# Files of torch and safetensors


def make_pt(folder):
  import test_mmcl_pt as by_hand

  rng = np.random.default_rng(0)
  for seed, count in (("0", 3), ("1", 4)):
    (folder / seed).mkdir()
    ecgs = [by_hand.tensor(rng.normal(size=(12, 40)).astype(np.float32)) for _ in range(count)]
    images = by_hand.tensor(rng.random((count, 3, 8, 8)).astype(np.float32))
    for name, tree in (
      ("ecgs_train_a", ecgs),
      ("images_train_a", images),
      ("labels_train_HF_all", [0, 1, 0, 1][:count]),
      ("labels_train_LVM_all", by_hand.tensor(rng.normal(size=count))),
    ):
      by_hand.save(folder / seed / f"{name}.pt", tree)


def read_pt(folder):
  mmcl_pt.load.cache_clear()  # it goes by name, and the files change under their names
  plan = mmcl_pt.plan(options(input=[str(folder)]), identify)
  try:
    return all_of(
      lambda: records_of(plan),
      *(lambda file=file: reader_pt.load(file) for file in folder.glob("*.pt")),
    )
  finally:
    mmcl_pt.load.cache_clear()


def make_weights(suffix: str):
  """Towers of the smallest sizes, under the keys that `mmcl convert` writes; plain, and in a
  checkpoint with more."""

  def make(folder):
    import joint
    import test_mmcl_pt as by_hand

    from mmcl_jax import models
    from mmcl_jax.interop import torch_files, torch_weights
    from mmcl_jax.support import tree

    rng = np.random.default_rng(0)
    for seed, arm in (("0", "mae"), ("1", "joint")):
      config = joint.get_config(f"test,arm={arm}")
      model = models.build(config.model, config.data.samples)
      variables = tree.unflatten_variables(
        {
          place: rng.normal(size=shape).astype(np.float32) / 8
          for place, shape in torch_weights.shapes(model, 0).items()
        }
      )
      state = torch_weights.state_dict(model, variables)
      (folder / seed).mkdir()
      if suffix == ".safetensors":
        torch_files.save(
          state, folder / seed / "w.safetensors", {"heads": "2", "decoder_heads": "2"}
        )
        continue
      tensors = {key: by_hand.tensor(np.asarray(x)) for key, x in state.items()}
      beside = {"epoch": 3, "args": by_hand.Call("argparse", "Namespace", state={"lr": 1.0})}
      by_hand.save(
        folder / seed / "w.pth", tensors if arm == "mae" else {"state_dict": tensors} | beside
      )

  return make


def read_weights(folder):
  from mmcl_jax.interop import torch_files

  return torch_files.read(next(iter(folder.iterdir())))


def read_convert(folder):
  from mmcl_jax.interop import torch_weights

  return torch_weights.read(str(next(iter(folder.iterdir()))))


# What the programs leave for one another


def make_cohort(folder):
  from mmcl_jax import prepare

  for seed in ("0", "1"):
    plan = prepare.synthetic.plan(types.SimpleNamespace(subjects=16, seed=int(seed), lax=False))
    builder.build(
      str(folder / seed / "c"), plan, shares=(0.4, 0.3, 0.3), profile="minimal", processes=1
    )
    # none are compared: damage must get further than them
    description = folder / seed / "c/cohort.json"
    info = json.loads(description.read_text())
    info["checksums"] = {}
    description.write_text(json.dumps(info, indent=1) + "\n")


def read_cohort(folder):
  """As every program opens a cohort, and what training asks it before the first batch."""
  cohort = cohort_lib.load(str(folder / "c"))
  statistics = (
    lambda field=field: cohort_lib.train_statistics(cohort, field)
    for field in ("phenotypes", "covariates")
  )
  return all_of(lambda: cohort.fingerprint, lambda: cohort_lib.subjects(cohort), *statistics)


def read_inspect(folder):
  from mmcl_jax import inspect

  return inspect.main([str(folder / "c")])


def make_config(folder):
  import joint
  import mmcl

  for seed, config in (("0", joint.get_config("test")), ("1", mmcl.get_config("tiny"))):
    (folder / seed).mkdir()
    configuration.save(config, str(folder / seed))


def read_config(folder):
  import joint

  return all_of(
    lambda: configuration.load(str(folder)), lambda: check_other(folder, joint.get_config("test"))
  )


def check_other(folder, config):
  try:
    configuration.check_workdir(config, str(folder))
  except UserError as error:
    if "belongs to another config" not in str(error):  # said of the second seed, rightly
      raise


def make_checkpoint(folder):
  import jax.numpy as jnp
  import joint

  from mmcl_jax.training import checkpoint, restore

  for seed in ("0", "1"):
    standardiser = standardise.as_they_are(["LVM"], ("LVM",), ("sex",), ("HF",))
    (folder / seed).mkdir()
    config = joint.get_config("test")
    configuration.save(config, str(folder / seed))
    saved = checkpoint.Checkpoints(str(folder / seed), keep=2)
    for step in (3, 6):
      more = {"config": json.loads(config.to_json())}
      if seed == "1":
        more["best"] = {"step": 3, "value": 0.5}
      meta = restore.meta(
        step, "f" * 32, {"ecg": [12, 5000], "phenotypes": [1]}, standardiser, **more
      )
      saved.save(step, {"w": jnp.arange(8.0) + step}, data={"next_step": step}, meta=meta)
    saved.close()


def read_manifest(folder):
  """What is asked of a manifest before arrays are restored (restore.load_run)."""
  from mmcl_jax.training import checkpoint, restore

  step = restore.choose(str(folder))
  about = checkpoint.manifest(str(folder), step)
  return standardise.from_json(about["standardiser"]), about["shapes"], about["cohort"]


def read_checkpoint(folder):
  import jax

  from mmcl_jax.training import checkpoint

  abstract = {
    "w": jax.ShapeDtypeStruct(
      (8,), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
  }
  state, data, _ = checkpoint.restore(str(folder), checkpoint.chosen(str(folder)), abstract)
  return np.asarray(state["w"]), data["next_step"]


def make_evaluations(folder):
  import test_compare

  rng = np.random.default_rng(0)
  n = test_compare.N
  y, sick = rng.normal(size=(n, 2)), (rng.random((n, 2)) < (0.3, 0.01)).astype(float)
  way = {"r@10": 0.5, "chance_r@10": 0.1, "n_candidates": n}
  for seed in ("0", "1"):
    for i, run in enumerate(("a", "b")):
      x = np.nan_to_num(y) + rng.normal(size=y.shape)
      more = {
        "retrieval": {"ecg_to_cmr": way, "cmr_to_ecg": way},
        "config": {"seed": i, "steps": 9, "data": {"cohort": "/c", "samples": 5}},
      }
      test_compare.write(folder / seed / run / "evaluation/10", y, sick, x, sick + x, **more)


def read_compare(folder):
  """`mmcl compare` with few draws and without its figure, which takes a second."""
  from mmcl_jax import compare

  with (
    mock.patch.object(compare, "DRAWS", 20),
    mock.patch.object(compare.figures, "forest"),
    mock.patch.object(compare.report, "png", lambda figure: b""),
  ):
    return compare.compare([str(folder / "a"), str(folder / "b")], str(folder / "out"))


def make_probes(folder):
  rng = np.random.default_rng(0)
  for seed, k in (("0", 2), ("1", 3)):
    to = folder / seed / "evaluation/10"
    to.mkdir(parents=True)
    np.savez(
      to / "probes.npz",
      names=np.array(["LVM", "LVEF", "X"][:k]),
      units=np.array(["g", "%", ""][:k]),
      coef=rng.normal(size=(8, k)),
      intercept=rng.normal(size=k),
      half_width=rng.random(k),
      strength=np.ones(k),
      at_edge=np.zeros(k, bool),
    )


def read_probes(folder):
  """As `mmcl embed` reads them, and a part written with what they predict."""
  from mmcl_jax import embed

  probes = embed.load_probes(folder, 10, folder / "evaluation/10")
  if probes.columns and len(probes.coef) != 8:
    raise UserError("the probes take embeddings of another width")  # as embed_parts says
  row = dict.fromkeys(embed.TEXTS, "") | {"status": "ok"}
  return embed.write(
    folder / "part-00000.parquet", [row] * 2, np.ones((2, 8), np.float32), probes, {}
  )


RUN = {"--workdir": "/w", "--step": 10, "--batch": 32}


def make_parts(folder):
  from mmcl_jax import embed

  for seed in ("0", "1"):
    (folder / seed).mkdir()
    for part in range(2):
      rows = [dict.fromkeys(embed.TEXTS, seed) | {"status": "ok"}] * 3
      embed.write(
        folder / seed / f"part-{part:05d}.parquet",
        rows,
        np.ones((3, 8), np.float32),
        embed.Probes(),
        RUN,
      )


def read_parts(folder):
  from mmcl_jax import embed

  return embed.finished_parts(folder, RUN)


def make_arguments(folder):
  for seed, text in enumerate(
    ("demo", "size=base,batch=1024,steps=80000,rate=0.5", "demo,arm=mae")
  ):
    (folder / str(seed)).mkdir()
    (folder / str(seed) / "argument").write_text(text)


def read_argument(folder):
  text = os.fsdecode((folder / "argument").read_bytes())
  config = configuration.parse_arg(text, size="demo", batch=0, steps=0, arm="joint", rate=0.1)
  return json.loads(config.to_json())


TARGETS = {
  "wfdb": Target(make_wfdb, read_wfdb),
  "wfdb_tables": Target(make_wfdb_tables, read_wfdb_tables, ("*.csv",)),
  "csv": Target(make_csv, read_ecgs),
  "npy": Target(made_ecg("c.npy"), read_ecgs),
  "xml": Target(make_xml, read_xml, slow=True),
  "dicom_ecg": Target(made_ecg("a.dcm"), read_ecgs),
  "cmr_zip": Target(make_zip, read_zip, slow=True),
  "ukbb_cardiac": Target(make_ukbb, read_ukbb),
  "acdc": Target(make_acdc, read_acdc),
  "mnms": Target(make_mnms, read_mnms),
  "tables": Target(make_general, read_tables),
  "parquet": Target(make_tables(".parquet"), read_tables),
  "withdrawn": Target(make_withdrawn, lambda folder: tables.withdrawn(folder / "withdrawn.csv")),
  "codes": Target(make_codes, read_codes),
  "private": Target(make_private, read_private),
  "mmcl_pt": Target(make_pt, read_pt),
  "torch": Target(make_weights(".pth"), read_weights),
  "safetensors": Target(make_weights(".safetensors"), read_weights),
  "convert_torch": Target(make_weights(".pth"), read_convert, slow=True),
  "convert_safetensors": Target(make_weights(".safetensors"), read_convert, slow=True),
  "cohort": Target(
    make_cohort, read_cohort, ("cohort.json", "features.json", "dataset_info.json", "subjects.npz")
  ),
  "inspect": Target(
    make_cohort,
    read_inspect,
    ("cohort.json", "features.json", "dataset_info.json", "*.array_record*"),
    slow=True,
  ),
  "config": Target(make_config, read_config),
  "manifest": Target(make_checkpoint, read_manifest, ("manifest.json", "config.json")),
  "checkpoint": Target(make_checkpoint, read_checkpoint, ("*",), slow=True),
  "compare": Target(make_evaluations, read_compare, ("a/evaluation/10/*", "b/evaluation/10/*")),
  "probes": Target(make_probes, read_probes),
  "parts": Target(make_parts, read_parts),
  "arguments": Target(make_arguments, read_argument),
}
