"""CMR preprocessing against the real heart, synthetic hearts whose truth is known, and phantoms
computed by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import ndimage

from common import ROOT
from mmcl_jax.data import measure, schema
from mmcl_jax.data.preprocess import cmr, motion
from mmcl_jax.data.readers.cine import assemble
from mmcl_jax.data.synthetic import cmr as synthetic, population
from mmcl_jax.errors import BadRecord

REAL = ROOT.parent / "shared/realdata/cmr/bivme_patient1"
LV, MYO, RV = (schema.LABELS[name] for name in ("LV", "MYO", "RV"))
NUMBERS = {"LV": LV, "MYO": MYO, "RV": RV}
GRID = synthetic.Grid()


@pytest.fixture(scope="module")
def real():
  if not REAL.exists():
    pytest.skip("no real samples beside the checkout")
  import nibabel

  cine, labels = (nibabel.load(REAL / name) for name in ("sa.nii.gz", "seg_sa.nii.gz"))
  x, y, z, step = (float(zoom) for zoom in cine.header.get_zooms())
  images, labels = (
    np.ascontiguousarray(np.asarray(file.dataobj).transpose(3, 2, 1, 0)) for file in (cine, labels)
  )
  return assemble(images, (z, y, x), step, labels.astype(np.uint8), NUMBERS)


@pytest.fixture(scope="module")
def mesh_volumes():
  if not REAL.exists():
    pytest.skip("no real samples beside the checkout")
  return np.genfromtxt(
    REAL / "bivme_model_volumes.csv", delimiter=",", names=True, dtype=None, encoding="utf-8"
  )


@pytest.fixture(scope="module")
def people():
  return population.draw(11, range(200))


@pytest.fixture(scope="module")
def beats(people):
  """(images, labels) of 40 whole cines."""
  return [synthetic.cine_stack(row(people, i), np.random.default_rng(i)) for i in range(40)]


@pytest.fixture(scope="module")
def beat(beats):
  """A segmented cine on the grid of a cohort."""
  images, labels = beats[0]
  return assemble(images.astype(np.int16), GRID.spacing, 0.04, labels, NUMBERS)


def row(people, i):
  return {name: values[i] for name, values in people.items()}


def unlabelled(cine):
  return cine._replace(labels=None, labelled=())


def only(cine, *frames):
  """`cine` with labels in these frames alone."""
  labels = np.zeros_like(cine.labels)
  labels[list(frames)] = cine.labels[list(frames)]
  return cine._replace(labels=labels, labelled=frames)


def phantom(
  size=(80, 70), spacing=(10.0, 1.8, 1.8), centre=None, slices=8, frames=10, es=5, held=slice(0, 8)
):
  """Concentric discs that shrink to `es` and taper along the slices, an RV beside them; blood 200,
  wall 80, else 20."""
  height, width = size
  cy, cx = centre or (height * spacing[1] / 2, width * spacing[2] / 2)  # mm from the image's corner
  y, x = ((np.arange(n) + 0.5) * mm for n, mm in zip(size, spacing[1:]))
  radius = np.hypot(y[:, None] - cy, x - cx)
  beside = np.hypot(y[:, None] - cy, x - cx + 30)
  labels = np.zeros((frames, slices, height, width), np.uint8)
  for f, z in itertools.product(range(frames), range(slices)[held]):
    distance = min(abs(f - es), frames - abs(f - es)) / (frames / 2)
    taper = 1 - 0.08 * (z - held.start)
    labels[f, z][beside < 18 * taper] = RV
    labels[f, z][radius < (20 + 6 * distance) * taper + 2] = MYO
    labels[f, z][radius < (12 + 10 * distance) * taper] = LV
  images = np.array([20, 200, 80, 200], np.int16)[labels]
  images[:, :, 0, 0] = 21  # slices beyond the heart are not constant
  return assemble(images, spacing, 0.1, labels, NUMBERS)


# The real heart.


def test_real_heart_measured_as_ukbb_cardiac_does(real, mesh_volumes):
  """Voxels times pixdim, mass at ED times 1.05: counted here anew. The bias against the meshes is
  the file's: thick slices far apart, no septum and no basal contours in the labels."""
  _, measured, flags = cmr.to_record(real)
  voxel_ml = np.prod(real.spacing) / 1000
  ed, es = (np.bincount(real.labels[frame].ravel(), minlength=4) * voxel_ml for frame in (0, 9))
  expected = {
    "LVEDV": ed[LV],
    "LVESV": es[LV],
    "LVSV": ed[LV] - es[LV],
    "LVEF": 100 * (1 - es[LV] / ed[LV]),
    "LVM": ed[MYO] * 1.05,
    "RVEDV": ed[RV],
    "RVESV": es[RV],
    "RVSV": ed[RV] - es[RV],
    "RVEF": 100 * (1 - es[RV] / ed[RV]),
    "LVCO": (ed[LV] - es[LV]) * 60 / (25 * real.frame_s) / 1000,
  }
  assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-9)
  assert [round(measured[name], 1) for name in ("LVEDV", "LVESV", "LVM", "LVEF")] == [
    161.5,
    51.4,
    79.1,
    68.2,
  ]
  bias = [
    100 * (measured[name] / truth - 1)
    for name, truth in (
      ("LVEDV", mesh_volumes["lv_vol"][0]),
      ("LVESV", mesh_volumes["lv_vol"][9]),
      ("LVM", mesh_volumes["lvm"][0]),
    )
  ]
  assert bias == pytest.approx([-7.5, -28.6, -40.3], abs=0.05)
  assert np.isnan(measured["WT"]) and np.isnan(measured["Ecc"])  # no ring is closed at ED
  assert flags == ("the largest LV volume is at frame 24, ED is taken at frame 0",)


def test_real_heart_es_is_where_meshes_and_labels_have_it(real, mesh_volumes):
  assert (
    np.argmin(mesh_volumes["lv_vol"])
    == np.argmin(measure.volumes(real.labels, real.spacing)[:, 0])
    == 9
  )
  fields, _, _ = cmr.to_record(real)
  named, _, _ = cmr.to_record(real._replace(ed=0, es=9))
  images, _, flags = cmr.to_record(unlabelled(real))
  for name, value in fields.items():
    np.testing.assert_array_equal(value, named[name])
  assert "ES from images, no segmentation" in flags and not images["labels"].any()
  found = motion.find_heart(real)
  noisy = real.images + 80 * np.random.default_rng(0).standard_normal(real.images.shape, np.float32)
  assert (
    abs(motion.end_systole(motion.find_heart(real._replace(images=noisy)), real.spacing, 0) - 9)
    <= 1
  )
  assert motion.end_systole(found, real.spacing, 0) == 9
  truth = np.argwhere(real.labels[0].any(axis=0))
  centre = (truth.min(axis=0) + truth.max(axis=0)) / 2
  assert np.all(np.abs((found.first + found.last) / 2 - centre) * real.spacing[1:] < 12)


def test_real_heart_keeps_size_place_and_order(real):
  fields, _, _ = cmr.to_record(real)
  labels = fields["labels"]
  assert fields["spacing"] == pytest.approx([17.7, 2.5, 2.5], abs=1e-3)
  assert np.array_equal(
    fields["ed_es_volumes"].any((0, 2, 3)), [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0]
  )
  assert np.array_equal(np.flatnonzero(labels[0].any((1, 2))), [4, 5, 6, 7, 8])
  kept = measure.volumes(labels, fields["spacing"])
  np.testing.assert_allclose(kept, measure.volumes(real.labels[[0, 9]], real.spacing), rtol=0.03)
  blood, wall = (fields["ed_es_volumes"][labels == structure].mean() for structure in (LV, MYO))
  assert blood > 1.5 * wall
  backwards = cmr.to_record(real._replace(images=real.images[:, ::-1], labels=real.labels[:, ::-1]))
  for name, value in fields.items():
    np.testing.assert_array_equal(value, backwards[0][name])


@pytest.mark.parametrize(
  "numbers", [n for n in itertools.permutations((1, 2, 3)) if n != (1, 2, 3)]
)
def test_any_wrong_label_map_is_refused(real, beats, numbers):
  """Of the real heart, whose septum is not labelled, and of synthetic ones."""
  table = np.array((0, *numbers), np.uint8)
  hearts = [real] + [
    assemble(images, GRID.spacing, labels=labels, numbers=NUMBERS) for images, labels in beats[:3]
  ]
  for heart in hearts:
    with pytest.raises(BadRecord, match="the label map looks wrong|not less than"):
      cmr.to_record(heart._replace(labels=table[heart.labels]))
  if numbers == (3, 2, 1):  # ACDC's, read as ukbb_cardiac's
    with pytest.raises(
      BadRecord, match="0% of the LV's border lies on myocardium, 86% of the RV's"
    ):
      cmr.to_record(real._replace(labels=table[real.labels]))


def test_an_open_wall_is_no_wrong_label_map():
  """As in the basal slices of many hearts, and where a contour leaves the septum out."""
  cine = phantom()
  columns, middle = np.arange(70), np.argwhere(cine.labels == LV)[:, 3].mean()
  # of the radius, to the right: the wall left of it is not labelled
  for share, passes in ((0.4, True), (-0.7, False)):
    gone = (columns < middle - share * 12) & (cine.labels == MYO)
    opened = cine._replace(labels=np.where(gone, 0, cine.labels).astype(np.uint8))
    on, off = (border.sum() for border in measure.borders(opened.labels[[0, 5]], LV))
    assert (0.5 < on / (on + off) < 0.8) if passes else on / (on + off) < 0.5
    if passes:
      cmr.to_record(opened)
    else:
      with pytest.raises(BadRecord, match="the label map looks wrong"):
        cmr.to_record(opened)


# The synthetic heart.


def test_cine_stack_is_the_whole_beat_of_heart(people, beats):
  for i in (0, 7):
    volumes, labels, _ = synthetic.heart(row(people, i), np.random.default_rng(i))
    images, all_labels = beats[i]
    assert (
      images.shape == all_labels.shape == (25, 12, 64, 64)
      and images.dtype == all_labels.dtype == np.uint8
    )
    np.testing.assert_array_equal(images[[0, 9]], volumes)
    np.testing.assert_array_equal(all_labels[[0, 9]], labels)
  for i, (images, labels) in enumerate(beats):
    ml = measure.volumes(labels, GRID.spacing)
    expected = ml[0] + synthetic.EJECTED[:, None] * (ml[9] - ml[0])
    np.testing.assert_allclose(ml, expected, atol=0.51 * GRID.millilitres)
    assert np.ptp(ml[:, 1]) == 0 and np.argmin(ml[:, 0]) == 9 and np.argmax(ml[:, 0]) == 0
    assert images[labels == LV].mean() > 1.5 * images[labels == MYO].mean(), i


def test_every_synthetic_heart_passes_and_its_labels_come_through(people):
  """200 hearts on the cohort's own grid, from base and from apex, with ED and ES as the only
  frames."""
  brightness = (
    np.random.default_rng(0)
    .integers(0, 80, (2, GRID.slices, GRID.size, GRID.size))
    .astype(np.int16)
  )
  for i in range(200):
    labels = synthetic._end_phases(row(people, i), np.random.default_rng(i), GRID)[-1]
    images = brightness + np.array([0, 100, 30, 100], np.int16)[labels]
    turn = slice(None, None, 1 if i % 2 else -1)
    cine = assemble(
      images[:, turn], GRID.spacing, labels=labels[:, turn], numbers=NUMBERS, ed=0, es=1
    )
    fields, measured, flags = cmr.to_record(cine, cmr.Shape(frames=0), heart_rate=64)
    np.testing.assert_array_equal(fields["labels"], labels)
    assert np.corrcoef(fields["ed_es_volumes"].ravel(), images.ravel())[0, 1] > 0.99
    assert measured == pytest.approx(
      measure.phenotypes(labels, GRID.spacing, 64), nan_ok=True, rel=1e-12
    )
    assert flags == () and "cine_slice" not in fields


def test_cine_slice_is_one_beat_from_ed_at_the_middle_of_the_lv(beat):
  fields, _, flags = cmr.to_record(beat)
  held = np.flatnonzero((beat.labels[[0, 9]] == LV).any((2, 3)).all(0))
  middle = held[len(held) // 2]
  low, high = np.percentile(beat.images[[0, 9]], (1, 99))
  expected = np.clip((beat.images[:, middle] - low) * 255 / (high - low), 0, 255)
  np.testing.assert_allclose(fields["cine_slice"], expected, atol=0.51)
  np.testing.assert_array_equal(fields["cine_slice"][[0, 9]], fields["ed_es_volumes"][:, middle])
  assert flags == ()
  for shift in (4, 20):  # ED in the source's frame 4 or 20; ES wraps round the end
    rolled = beat._replace(
      images=np.roll(beat.images, shift, 0), labels=np.roll(beat.labels, shift, 0), ed=shift
    )
    again = cmr.to_record(rolled)
    for name, value in fields.items():
      np.testing.assert_array_equal(value, again[0][name])
    assert again[2] == ()
  half = cmr.to_record(beat, cmr.Shape(frames=50))[0]["cine_slice"].astype(int)
  np.testing.assert_array_equal(half[::2], fields["cine_slice"])
  # the last lies between the last frame and the first
  between = (half[0::2] + np.roll(half[0::2], -1, 0)) / 2
  inner = (
    (expected > 0)
    & (expected < 255)
    & (np.roll(expected, -1, 0) > 0)
    & (np.roll(expected, -1, 0) < 255)
  )
  assert np.abs(half[1::2] - between)[inner].max() <= 1.01


def test_three_frames_are_ed_half_way_and_es_of_the_cine_slice(people, beat):
  """Of the synthetic heart frames 0, 4 and 9, wherever the beat begins, whatever frames are kept,
  ES named or found."""
  made = synthetic.heart(row(people, 0), np.random.default_rng(0))[2][[0, 4, 9]]
  fields = cmr.to_record(beat)[0]
  three = fields["three_frames"]
  np.testing.assert_array_equal(three, fields["cine_slice"][[0, 4, 9]])
  # noise is drawn anew but at ED and ES
  likeness = np.corrcoef(three.reshape(3, -1), made.reshape(3, -1))[:3, 3:]
  assert likeness.diagonal().min() > 0.96 and np.array_equal(likeness.argmax(axis=1), [0, 1, 2])
  rolled = beat._replace(
    images=np.roll(beat.images, 20, 0), labels=np.roll(beat.labels, 20, 0), ed=20
  )
  for cine, frames in ((rolled, 25), (beat, 7), (unlabelled(beat)._replace(ed=0, es=9), 25)):
    np.testing.assert_array_equal(
      cmr.to_record(cine, cmr.Shape(frames=frames))[0]["three_frames"], three
    )
  later = cmr.to_record(beat._replace(es=12))[0]
  np.testing.assert_array_equal(later["three_frames"], later["cine_slice"][[0, 6, 12]])
  assert "three_frames" not in cmr.to_record(beat, cmr.Shape(frames=0))[0]
  ends = beat._replace(
    images=beat.images[[0, 9]], labels=beat.labels[[0, 9]], labelled=(0, 1), ed=0, es=1
  )
  few = cmr.to_record(ends)[0]["three_frames"].astype(int)  # nothing was recorded between: the mean
  np.testing.assert_array_equal(few[[0, 2]], three[[0, 2]])
  inner = ((few[[0, 2]] > 0) & (few[[0, 2]] < 255)).all(axis=0)
  assert inner.mean() > 0.8 and np.abs(few[1] - few[[0, 2]].mean(axis=0))[inner].max() <= 1.01


def test_es_of_images_of_forty_hearts(beats):
  """Without segmentation, with noise of 1/5 of the blood's signal. The true frame is 9; a frame
  beside it has ejected 96 to 98 % of the stroke volume, so one frame of error is no other heart."""
  rng = np.random.default_rng(0)
  errors, offsets = [], []
  for images, labels in beats:
    noisy = images + 40 * rng.standard_normal(images.shape, np.float32)
    heart = motion.find_heart(assemble(noisy, GRID.spacing))
    errors.append(motion.end_systole(heart, GRID.spacing, 0) - 9)
    truth = np.argwhere(labels[0].any(axis=0))
    offsets.append(((heart.first + heart.last) - (truth.min(axis=0) + truth.max(axis=0))) / 2 * 2.5)
  errors = np.abs(errors)
  assert np.mean(errors == 0) >= 0.75 and np.mean(errors <= 1) >= 0.9 and errors.max() <= 3
  assert np.abs(offsets).max() <= 12.5  # mm; the crop spares 20 and more about most hearts


# Phases.


def test_phases_and_what_is_said_of_them(beat):
  full = "the least LV volume is at frame 9, ES is taken at frame"
  for es, expected in ((8, ()), (10, ()), (12, (f"{full} 12",)), (6, (f"{full} 6",))):
    fields, measured, flags = cmr.to_record(beat._replace(es=es))
    assert flags == expected
    assert measured["LVESV"] == pytest.approx(
      measure.volumes(beat.labels[es : es + 1], GRID.spacing)[0, 0]
    )
    np.testing.assert_array_equal(fields["cine_slice"][es], fields["ed_es_volumes"][1, 6])
  fields, _, _ = cmr.to_record(beat)
  partial, _, flags = cmr.to_record(only(beat, 0, 9))
  np.testing.assert_array_equal(partial["ed_es_volumes"], fields["ed_es_volumes"])
  assert flags == ("ES is the least LV of 2 segmented frames, there are 25",)
  assert cmr.to_record(only(beat, 0, 9)._replace(ed=0, es=9))[2] == ()
  failed = beat.labels.copy()
  failed[17] = 0  # a frame where the network saw nothing is not end-systole
  again, _, flags = cmr.to_record(beat._replace(labels=failed))
  np.testing.assert_array_equal(again["labels"], fields["labels"])
  assert flags == ("1 segmented frames have no LV label",)
  failed[20, :9] = 0  # nor does one where it lost most of it pass in silence
  assert "ES at 0.80 of the beat" in cmr.to_record(beat._replace(labels=failed))[2]


def test_without_segmentation_what_is_named_is_kept(beat):
  fields, measured, flags = cmr.to_record(unlabelled(beat)._replace(ed=0, es=9))
  np.testing.assert_array_equal(fields["ed_es_volumes"], cmr.to_record(beat)[0]["ed_es_volumes"])
  assert flags == (
    "no segmentation: no phenotypes, heart located by its motion",
    "slice order taken as base to apex",
  )
  assert list(measured) == list(schema.PHENOTYPES) and np.isnan(list(measured.values())).all()
  assert not fields["labels"].any() and fields["labels"].shape == (2, 12, 64, 64)


@pytest.mark.reported("a stack without labels that runs from apex to base was kept upside down")
def test_without_segmentation_the_geometry_tells_base_and_apex(beat):
  bare = unlabelled(beat)
  upright, _, unknown = cmr.to_record(bare)
  turned = bare._replace(images=bare.images[:, ::-1])
  for cine in (bare._replace(base_first=True), turned._replace(base_first=False)):
    fields, _, flags = cmr.to_record(cine)
    for name in ("ed_es_volumes", "cine_slice", "three_frames"):
      np.testing.assert_array_equal(fields[name], upright[name])
    assert flags == tuple(flag for flag in unknown if flag != "slice order taken as base to apex")
  labelled, _, _ = cmr.to_record(beat._replace(base_first=False))  # labels go before
  np.testing.assert_array_equal(labelled["ed_es_volumes"], cmr.to_record(beat)[0]["ed_es_volumes"])


# The grid.


@pytest.mark.parametrize(
  "spacing", [(10, 1.25, 1.25), (8, 1.8, 1.8), (8, 1.83, 1.406), (10, 2.5, 2.5), (9, 4.0, 3.1)]
)
def test_places_are_kept_to_a_part_of_a_pixel(spacing):
  """A blob and a disc at a known place in mm, on an image smaller than the crop: it lies centred in
  zeros."""
  size = tuple(int(126 / mm) for mm in spacing[1:])
  place = np.array((66.3, 71.9))  # mm from the corner of the image
  cine = phantom(size, spacing, tuple(place))
  y, x = ((np.arange(n) + 0.5) * mm for n, mm in zip(size, spacing[1:]))
  blob = 1000 * np.exp(-((y[:, None] - place[0]) ** 2 + (x - place[1]) ** 2) / (2 * 9**2))
  blob = np.broadcast_to(blob.astype(np.float32), cine.images.shape)
  fields, _, _ = cmr.to_record(cine._replace(images=blob))
  whole = np.array([int(n * mm / 2.5 + 0.5) for n, mm in zip(size, spacing[1:])])
  before = (64 - whole + 1) // 2
  for image, tolerance in (
    (fields["ed_es_volumes"][0, 5], 0.1),
    (fields["cine_slice"][3], 0.1),
    (fields["labels"][0, 5] == LV, 0.4),
  ):
    found = (np.array(ndimage.center_of_mass(image)) - before + 0.5) * 2.5
    np.testing.assert_allclose(found, place, atol=tolerance * 2.5)
  outside = np.ones((64, 64), bool)
  outside[before[0] : before[0] + whole[0], before[1] : before[1] + whole[1]] = False
  assert (
    not fields["ed_es_volumes"][..., outside].any() and not fields["labels"][..., outside].any()
  )
  kept, source = (
    measure.volumes(labels, mm)[:, [0, 2]]
    for labels, mm in ((fields["labels"], fields["spacing"]), (cine.labels[[0, 5]], spacing))
  )
  np.testing.assert_allclose(kept, source, rtol=0.06)


def test_beyond_the_image_is_zero():
  """Though the RV reaches the image's edge, and all intensities are below 0."""
  cine = phantom((70, 40))
  assert cine.labels[..., 0].any()
  images = np.random.default_rng(0).integers(-500, -400, cine.images.shape).astype(np.int16)
  fields, _, _ = cmr.to_record(cine._replace(images=images))
  found = np.argwhere(cine.labels[0])
  # 29 pixels of 64 are drawn, after 18 of zeros
  last = 18 + int((found[:, 2].max() + 0.5) * 1.8 / 2.5)
  for name, end in (("ed_es_volumes", 46), ("cine_slice", 46), ("labels", last)):
    drawn = np.flatnonzero(fields[name].reshape(-1, 64, 64).any(axis=(0, 1)))
    assert drawn[[0, -1]].tolist() == [18, end], name


@pytest.mark.parametrize("mm", [1.0, 1.406, 1.83, 2.5, 3.3])
def test_a_ramp_stays_a_ramp(mm):
  """Linear, and in its place, to half a pixel at worst: grey levels are rounded, the image ends
  within pixels."""
  size = int(150 / mm)
  cine = phantom((size, size), (10, mm, mm))
  ramp = 1000 + 10 * (np.arange(size) + 0.5) * mm
  fields, _, _ = cmr.to_record(
    cine._replace(images=np.broadcast_to(ramp.astype(np.float32), cine.images.shape))
  )
  image = fields["ed_es_volumes"][0, 4].astype(float)
  lit = np.flatnonzero((image[32] > 0) & (image[32] < 255))[1:-1]
  assert len(lit) > 50 and np.ptp(image[10:50], axis=0).max() == 0
  line = np.polyval(np.polyfit(lit, image[32, lit], 1), lit)
  assert np.abs(image[32, lit] - line).max() < 1
  whole = int(size * mm / 2.5 + 0.5)
  # the percentiles are its ends: a column is more than 1 %
  exact = 1000 + 10 * (np.arange(whole) + 0.5) * 2.5
  expected = (exact[lit - (64 - whole + 1) // 2] - exact[0]) * 255 / (exact[-1] - exact[0])
  np.testing.assert_allclose(image[32, lit], expected, atol=2)  # a pixel is 4.4 levels


def test_shrinking_does_not_alias():
  """Stripes of one pixel are finer than the output's pixels: they are to vanish, not to turn into
  waves."""
  cine = phantom((150, 150), (10, 1.0, 1.0))
  striped = cine.images + np.where(np.arange(150) % 2, 60, -60)[:, None].astype(np.int16)
  plain, waves = (
    cmr.to_record(cine._replace(images=images))[0]["ed_es_volumes"].astype(int)
    for images in (cine.images, striped)
  )
  inner = np.s_[:, 2:10, 4:-4, 4:-4]
  # of 255; 60 are 85
  assert np.abs(plain - waves)[inner].mean() < 10 and np.abs(plain - waves)[inner].max() < 25


def test_crop_follows_the_heart_and_says_when_it_does_not_fit():
  cine = phantom((200, 180), (10, 1.5, 1.5), centre=(70, 190), slices=8)
  noise = np.random.default_rng(0).integers(0, 60, cine.images.shape[1:]).astype(np.int16)
  fields, _, flags = cmr.to_record(cine._replace(images=cine.images + noise))
  kept, source = (
    measure.volumes(labels, mm)
    for labels, mm in ((fields["labels"], fields["spacing"]), (cine.labels[[0, 5]], cine.spacing))
  )
  np.testing.assert_allclose(kept, source, rtol=0.05)
  # no zeros while there is image
  assert flags == () and fields["ed_es_volumes"][:, 2:10].any(axis=1).all()
  rows, columns = (np.flatnonzero(fields["labels"][0].any((0, 3 - axis))) for axis in (1, 2))
  # 70 mm: the crop has slid to where the image starts
  assert abs(columns.mean() - 31.5) <= 0.5 and rows.mean() == 27.5
  found = np.argwhere(cine.labels[0])
  need = (np.ptp(found[:, 2]) + 1) * 1.5 + 20
  size = int(np.ceil(need / 2.5)) - 1
  small, _, flags = cmr.to_record(cine, cmr.Shape(size=size))
  assert len(flags) == 1 and flags[0].startswith(
    f"the heart is cut by the crop: it needs {need:.0f} mm along W"
  )
  assert small["spacing"].tolist() == [10, 2.5, 2.5] and small["labels"].shape == (
    2,
    12,
    size,
    size,
  )
  assert cmr.to_record(cine, cmr.Shape(size=size + 1))[2] == ()
  fields, _, _ = cmr.to_record(cine)
  located, _, _ = cmr.to_record(unlabelled(cine))
  places = [ndimage.center_of_mass(each["ed_es_volumes"][0, 5] > 150) for each in (fields, located)]
  # by its motion: only the LV moves here, it lies beside the RV
  np.testing.assert_allclose(*places, atol=10)
  stray = cine.labels.copy()
  stray[:, 3, 195:197, 2] = RV
  again, _, flags = cmr.to_record(cine._replace(labels=stray))
  assert flags == ("2 labelled voxels lie apart from the heart",)
  np.testing.assert_array_equal(again["ed_es_volumes"], fields["ed_es_volumes"])


def test_slices_are_chosen_about_the_heart():
  cine = phantom(slices=16, held=slice(6, 14))
  whole, _, flags = cmr.to_record(cine)
  assert (
    np.array_equal(np.flatnonzero(whole["labels"][0].any((1, 2))), np.arange(8) + 2) and flags == ()
  )
  few, _, flags = cmr.to_record(cine, cmr.Shape(slices=6))
  np.testing.assert_array_equal(few["labels"], whole["labels"][:, 3:9])
  assert flags == ("the heart is cut by the crop: it needs 80 mm along Z, 60 are kept",)
  edge, _, _ = cmr.to_record(phantom(slices=16, held=slice(0, 8)))
  # no zeros while there are slices
  assert np.array_equal(np.flatnonzero(edge["labels"][0].any((1, 2))), np.arange(8))
  flat = cine._replace(
    labels=np.where((cine.labels[:, 6:7] > 0).any(1, keepdims=True), cine.labels[:, 6:7], 0)
    .repeat(16, 1)
    .astype(np.uint8)
  )
  assert "slice order taken as base to apex" in cmr.to_record(flat)[2]


# Intensity, heart rate, measuring.


def test_intensity_has_one_scale_free_of_outliers(beat):
  fields, _, _ = cmr.to_record(beat)
  other, _, _ = cmr.to_record(beat._replace(images=(3 * beat.images + 100).astype(np.uint16)))
  hot = beat.images.copy()
  hot[:, 5, 3, 3] = 32000
  spiked, _, _ = cmr.to_record(beat._replace(images=hot))
  hot[14] *= 3  # a frame that is neither ED nor ES does not set the scale
  for again in (other, spiked, cmr.to_record(beat._replace(images=hot))[0]):
    assert np.abs(again["ed_es_volumes"].astype(int) - fields["ed_es_volumes"])[:, 6:].max() <= 1
    assert np.abs(again["cine_slice"].astype(int) - fields["cine_slice"])[:12].max() <= 1
  assert (
    0.005 < np.mean(fields["ed_es_volumes"] == 0) < 0.02
    and 0.005 < np.mean(fields["ed_es_volumes"] == 255) < 0.02
  )


def test_heart_rate_of_the_scan(beat):
  _, measured, _ = cmr.to_record(beat)
  # 25 frames of 40 ms
  assert measured["LVCO"] == pytest.approx((measured["LVEDV"] - measured["LVESV"]) * 60 / 1000)
  assert cmr.to_record(beat, heart_rate=90)[1]["LVCO"] == pytest.approx(1.5 * measured["LVCO"])
  for cine, flag in (
    (beat._replace(frame_s=float("nan")), "heart rate unknown"),
    (beat._replace(frame_s=0.004), "heart rate of 600 bpm not believed"),
  ):
    _, without, flags = cmr.to_record(cine)
    assert np.isnan(without["LVCO"]) and flags == (flag,) and without["LVEF"] == measured["LVEF"]


def test_borders_by_hand():
  labels = np.array([[[0, 2, 2, 2], [2, 1, 1, 2], [2, 1, 3, 0]]])
  on, off = measure.borders(labels, LV)
  # two edges to the RV, one to the end of the image
  assert (on.tolist(), off.tolist()) == ([5], [3])
  on, off = measure.borders(labels, RV)
  assert (on.tolist(), off.tolist()) == ([0], [4])


# What is refused.


def zero(images, *where):
  images = images.copy()
  images[where] = 0
  return images


def relabelled(cine, frame, old, new=0):
  labels = cine.labels.copy()
  labels[frame][labels[frame] == old] = new
  return cine._replace(labels=labels)


@pytest.mark.parametrize(
  "spoil, reason",
  [
    (
      lambda c: c._replace(images=c.images[:, :5], labels=c.labels[:, :5]),
      "5 slices; expected at least 6",
    ),
    (
      lambda c: unlabelled(c)._replace(images=c.images[:7]),
      "7 frames, ED and ES not named; expected at least 8",
    ),
    (
      lambda c: c._replace(images=c.images[..., :12], labels=c.labels[..., :12]),
      "160 x 30 mm; .* at least 40",
    ),
    (lambda c: c._replace(images=zero(c.images, 3)), "slice 0 of frame 3 is all zeros"),
    (lambda c: c._replace(images=zero(c.images, 3, 2)), "slice 2 of frame 3 is all zeros"),
    (
      lambda c: c._replace(images=zero(c.images, slice(None)) + 7),
      r"slice 0 of frame 0 is constant \(7\)",
    ),
    (
      lambda c: c._replace(images=np.where(np.arange(64) == 9, np.float32("nan"), c.images)),
      "nan .*expected finite",
    ),
    (
      lambda c: c._replace(images=np.where(np.arange(64) == 9, np.float32(1e30), c.images)),
      "1e.30; expected finite",
    ),
    (lambda c: c._replace(es=0), "ED and ES are both frame 0"),
    (lambda c: only(c, 9), r"ED \(frame 0\) is not segmented; 1 of 25 frames are"),
    (lambda c: only(c, 0)._replace(es=9), r"ES \(frame 9\) is not segmented; 1 of 25 frames are"),
    (lambda c: only(c, 0, 9)._replace(es=12), r"ES \(frame 12\) is not segmented"),
    (lambda c: only(c, 0), r"no frame but ED \(frame 0\) is segmented"),
    (lambda c: relabelled(c, 0, LV), r"no LV label at ED \(frame 0\)"),
    (lambda c: relabelled(c._replace(es=9), 9, LV), r"no LV label at ES \(frame 9\)"),
    (lambda c: relabelled(c, 9, MYO), "no myocardium label at ES"),
    (lambda c: c._replace(ed=9, es=0), "not less than .* at ED .frame 9."),
    (
      lambda c: unlabelled(c)._replace(images=c.images[:1].repeat(25, 0)),
      "nothing moves over the beat",
    ),
  ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(beat, spoil, reason):
  with pytest.raises(BadRecord, match=reason) as error:
    cmr.to_record(spoil(beat))
  assert "\n" not in str(error.value)


def test_a_heart_without_rv_labels_is_measured_without(beat):
  labels = np.where(beat.labels == RV, 0, beat.labels).astype(np.uint8)
  _, measured, flags = cmr.to_record(beat._replace(labels=labels))
  assert np.isnan(measured["RVEDV"]) and measured["LVEDV"] > 0
  assert flags == ("no RV label at ED", "no RV label at ES")


@st.composite
def cines(draw):
  """Arguments of `assemble` for small cines: images and labels of many kinds, most of them
  wrong."""
  frames, slices = draw(st.sampled_from([1, 2, 8, 9, 12])), draw(st.sampled_from([5, 6, 7, 13]))
  size = draw(st.sampled_from([1, 7, 12, 19])), draw(st.integers(8, 20))
  spacing = draw(st.floats(0.5, 50)), draw(st.sampled_from([0.1, 3.7, 8.0])), draw(st.floats(4, 10))
  rng = np.random.default_rng(draw(st.integers(0, 99)))
  shape = (frames, slices, *size)
  dtype = draw(st.sampled_from([np.int16, np.uint16, np.float32]))
  images = (rng.normal(300, draw(st.sampled_from([0, 1, 100])), shape)).clip(0, 3e4).astype(dtype)
  match draw(st.sampled_from(["", "", "", "spot", "zero frame", "border"])):
    case "spot":
      images[tuple(rng.integers(n) for n in shape)] = draw(
        st.sampled_from(
          [np.nan, np.inf, -np.inf, 3e38, 1e9, 1e-40] if dtype == np.float32 else [0, 32767]
        )
      )
    case "zero frame":
      images[rng.integers(frames)] = 0
    case "border":
      images[..., size[0] // 2 :, :] = 0
  y, x = (np.arange(n) - n / 2 for n in size)
  radius, z = np.hypot(y[:, None], x - 2), np.arange(slices)[:, None, None]
  inner = rng.uniform(1, 5) * (1 - 0.06 * z) * rng.uniform(0.3, 1.5, frames)[:, None, None, None]
  heart = np.select([radius < inner, radius < inner + 2, radius < 8], [LV, MYO, RV], 0).astype(
    np.uint8
  )
  kind = draw(
    st.sampled_from(
      ["none", "none", "none", "none", "noise", "heart", "heart", "noisy heart", "some", "empty"]
    )
  )
  labels = {
    "none": None,
    "noise": rng.integers(0, 4, shape).astype(np.uint8),
    "heart": heart,
    "noisy heart": np.where(rng.random(shape) < 0.02, 0, heart).astype(np.uint8),
    "some": heart * (rng.random((frames, 1, 1, 1)) < 0.5).astype(np.uint8),
    "empty": np.zeros(shape, np.uint8),
  }[kind]
  ed, es = (draw(st.none() | st.integers(0, frames)) for _ in range(2))
  frame_s = draw(st.sampled_from([float("nan"), 0.0, -1.0, 0.03, 1e9]))
  return images, spacing, frame_s, labels, NUMBERS, ed, es


shapes = st.builds(
  cmr.Shape, st.integers(1, 14), st.integers(4, 40), st.floats(0.5, 8), st.sampled_from([0, 1, 7])
)
seen = set()


@settings(max_examples=400, deadline=None, derandomize=True)
@given(cines(), shapes)
def test_any_cine_gives_a_record_or_a_reason(parts, shape):
  try:
    fields, measured, flags = cmr.to_record(assemble(*parts), shape)
  except BadRecord as error:
    seen.add("refused")
    assert str(error) and "\n" not in str(error)
    return
  seen.add("segmented" if fields["labels"].any() else "unsegmented")
  stack = (2, shape.slices, shape.size, shape.size)
  expected = {
    "ed_es_volumes": ("uint8", stack),
    "labels": ("uint8", stack),
    "spacing": ("float32", (3,)),
  }
  if shape.frames:
    expected["cine_slice"] = ("uint8", (shape.frames, shape.size, shape.size))
    expected["three_frames"] = ("uint8", (3, shape.size, shape.size))
  assert {name: (value.dtype.name, value.shape) for name, value in fields.items()} == expected
  assert fields["labels"].max() <= 3 and np.all(fields["spacing"] > 0)
  assert fields["ed_es_volumes"].max() > fields["ed_es_volumes"].min()
  assert list(measured) == list(schema.PHENOTYPES) and not np.isinf(list(measured.values())).any()
  assert all(isinstance(flag, str) and flag for flag in flags)


def test_fuzzing_reached_all_outcomes():
  # unlabelled cines have a test of their own: few drawn ones are fit to be kept
  assert {"refused", "segmented"} <= seen
