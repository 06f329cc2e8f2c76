"""Real ECG input: the WFDB reader and the preprocessing profiles."""

import random
import socket
from pathlib import Path

import numpy as np
import pytest
from scipy import signal, sparse
from scipy.sparse import linalg

from common import ROOT
from recordings import INDEPENDENT, heart, record, rewrite, stacked
from mmcl_jax.data import ahead, builder, ecg_quality, synthetic
from mmcl_jax.data.preprocess import ecg as preprocess
from mmcl_jax.data.readers import wfdb
from mmcl_jax.data.schema import LEADS
from mmcl_jax.data.sources import Item
from mmcl_jax.errors import BadRecord, UserError

REAL = ROOT.parent / "shared/realdata/ecg/cinc2021_wfdb"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
  def refuse(*_):
    raise AssertionError("a reader opened a connection")

  monkeypatch.setattr(socket.socket, "connect", refuse)


def rejects(path, *words):
  with pytest.raises(BadRecord) as caught:
    wfdb.read(path)
  message = str(caught.value)
  assert "\n" not in message and "rec.dat" not in message and str(Path(path).parent) not in message
  for word in words:
    assert word in message


# The reader


def test_leads_go_by_name_not_position(tmp_path):
  leads = heart()
  names = random.Random(1).sample(LEADS, 12)
  shuffled = (
    {"vx": 7 * leads["V1"]}
    | {name.lower(): leads[name] for name in names}
    | {"Resp": 3 * leads["II"]}
  )
  for path in (
    header := record(tmp_path, shuffled),
    tmp_path / "rec",
    str(header.with_suffix(".dat")),
  ):
    ecg, rate, flags = wfdb.read(path)
    assert ecg.dtype == np.float32 and ecg.shape == (12, 5000) and rate == 500 and flags == ()
    np.testing.assert_allclose(ecg, stacked(leads), atol=0.00051)


@pytest.mark.parametrize(
  "fmt,name", [("16", "a b"), ("212", "[x]*"), ("24", "é"), ("32", "{y}"), ("80", "~")]
)
def test_formats_and_odd_folder_names(tmp_path, fmt, name):
  leads = heart()
  gain = 80 if fmt == "80" else 1000
  ecg, _, flags = wfdb.read(record(tmp_path / name, leads, fmt=fmt, gain=gain))
  np.testing.assert_allclose(ecg, stacked(leads), atol=0.51 / gain)
  assert fmt == "80" or flags == ()


@pytest.mark.parametrize("unit", ["mV", "uV", "nV", "V"])
def test_units(tmp_path, unit):
  leads = heart()
  np.testing.assert_allclose(
    wfdb.read(record(tmp_path, leads, unit=unit)).ecg_mv, stacked(leads), atol=0.00051
  )


@pytest.mark.parametrize("micro", ["µ".encode(), "μ".encode(), b"\xb5"])
def test_micro_sign_survives(tmp_path, micro):
  """wfdb alone drops the sign and reads volts: a million times too much."""
  leads = heart()
  header = rewrite(record(tmp_path, leads, unit="uV"), b"/uV", b"/" + micro + b"V")
  np.testing.assert_allclose(wfdb.read(header).ecg_mv, stacked(leads), atol=0.00051)


def test_missing_and_foreign_units(tmp_path):
  leads = heart()
  header = rewrite(record(tmp_path, leads), b"/mV", b"")
  recording = wfdb.read(header)
  np.testing.assert_allclose(recording.ecg_mv, stacked(leads), atol=0.00051)
  assert recording.flags == ("unit missing, mV taken",)
  rejects(rewrite(record(tmp_path, leads), b"/mV", b"/mmHg"), "mmHg", "lead I ")


def test_eight_leads_are_completed(tmp_path):
  leads = heart()
  recording = wfdb.read(record(tmp_path, {name: leads[name] for name in INDEPENDENT}))
  np.testing.assert_allclose(recording.ecg_mv, stacked(leads), atol=0.0011)
  assert recording.flags == ("limb leads derived",)


def test_missing_and_doubled_leads(tmp_path):
  leads = heart()
  rejects(
    record(tmp_path, {n: v for n, v in leads.items() if n not in ("V3", "II")}), "no lead II, V3;"
  )
  rejects(record(tmp_path, leads | {"v3": leads["V3"]}), "V3 occurs twice")


@pytest.mark.reported("leads in another order than named were read with a remark")
def test_limb_leads_that_cannot_belong_together(tmp_path):
  leads = heart()
  rejects(
    record(tmp_path, leads | {"I": leads["II"], "II": leads["I"]}),
    "lead III, aVL, aVF cannot",
    "in their order",
  )
  rejects(
    record(tmp_path, leads | {"aVF": leads["aVL"], "aVL": leads["aVF"]}), "lead aVL, aVF cannot"
  )
  rejects(record(tmp_path, leads | {"aVF": 2 * leads["aVF"]}), "lead aVF cannot", "gain")
  late = {name: np.append(lead, 0 * lead) for name, lead in leads.items()}
  late["aVF"][5500:] += 3 * np.sin(np.arange(4500) / 9)
  assert wfdb.read(record(tmp_path, late)).flags == ("20.0 s long",)  # beyond what is used


def test_limb_leads_that_disagree_a_little_are_kept(tmp_path):
  leads, t = heart(), np.arange(5000)
  spoilt = leads | {"III": leads["III"] + (t % 100 == 7)}  # 1 % of samples
  assert wfdb.read(record(tmp_path, spoilt)).flags == (
    "limb leads disagree with I and II by up to 1.001 mV",
  )
  for changed, gain in (
    (leads | {"III": leads["III"] + 0.3}, 1000),  # an offset of one lead
    # a filter of its own
    (leads | {"aVF": leads["aVF"] + 0.03 * np.sin(t / 300)}, 1000),
    # 67 uV a unit, as of 8 bits
    ({name: 6 * lead for name, lead in leads.items()}, 15),
  ):
    (flag,) = wfdb.read(record(tmp_path, changed, gain=gain)).flags
    assert flag.startswith("limb leads disagree")


def test_few_gaps_are_filled_and_flagged_many_are_not(tmp_path):
  leads = heart()
  truth = leads["V2"].copy()
  leads["V2"] = np.where(np.isin(np.arange(5000), range(2300, 2340)), np.nan, truth)
  recording = wfdb.read(record(tmp_path, leads))
  row = recording.ecg_mv[LEADS.index("V2")]
  assert recording.flags == ("V2: 40 missing samples interpolated",)
  line = np.interp(np.arange(2300, 2340), [2299, 2340], truth[[2299, 2340]])
  np.testing.assert_allclose(row[2300:2340], line, atol=0.001)
  leads["V2"][1000:1020] = np.nan
  rejects(record(tmp_path, leads), "V2", "60 of 5000")
  rejects(record(tmp_path, leads | {"V2": np.full(5000, np.nan)}), "V2", "5000 of 5000")


def test_long_records_are_flagged_and_read_in_part(tmp_path):
  leads = heart(130, 1000)
  ecg, rate, flags = wfdb.read(record(tmp_path, leads, rate=1000))
  assert flags == ("130.0 s long",) and rate == 1000
  np.testing.assert_allclose(ecg, stacked(leads)[:, :120_000], atol=0.00051)


def test_signals_that_no_ecg_has(tmp_path):
  leads = heart()
  rejects(
    record(tmp_path, leads | {"V5": np.full(5000, 0.3)}), "flat lead V5", "10.0 of the first 10.0 s"
  )
  rejects(record(tmp_path, leads | {"V6": 20 * leads["V6"] + 0.2}, gain=100), "V6", "gain and unit")
  # an electrode's constant voltage is no fault
  offset = wfdb.read(record(tmp_path, leads | {"V6": leads["V6"] + 30}))
  assert offset.flags == ()


def where(leads, change, names=LEADS):
  """`leads` with `change(seconds [T], lead)` in place of those of `names`."""
  return {
    name: change(np.arange(len(lead)) / 500, lead) if name in names else lead
    for name, lead in leads.items()
  }


def flat(start, end):
  return lambda t, lead: np.where((start <= t) & (t < end), 0, lead)


@pytest.mark.reported(
  "a flat first ten seconds got an LV mass",
  "three flat leads got an LV mass",
  "one spike saved a flat lead",
  "a step of 5 uV to both sides saved a flat lead",
  "a recording that was flat for half of its time got an LV mass",
)
@pytest.mark.parametrize(
  "seconds,change,names,word",
  [
    (30, flat(0, 12), ("V4", "V5", "V6"), "flat lead V4, V5, V6"),
    (30, flat(1, 7), LEADS, "flat lead I, II, III"),
    (10, flat(0, 5), LEADS, "5.00 s long without 5.00 s of constant padding"),
    (10, flat(2.5, 7.5), LEADS, "flat lead I, II, III"),
    (10, flat(3.33, 6.4), ("V2",), "flat lead V2"),
    (10, lambda t, lead: np.where(t == 4, 0.02, 0), LEADS, "flat lead I, II"),
    (
      30,
      lambda t, lead: np.where(t < 12, 0.005 * (np.arange(len(t)) * 7 % 3 - 1), lead),
      LEADS,
      "flat lead I, II",
    ),
    (10, lambda t, lead: np.where(t % 1 == 0, 5, 0.004 * (t * 500 % 2)), ("V3",), "flat lead V3"),
  ],
)
def test_flat_in_the_first_ten_seconds(tmp_path, seconds, change, names, word):
  rejects(record(tmp_path, where(heart(seconds), change, names)), word)


@pytest.mark.reported("a recording that was clipped, or constant for a while, had no remark")
@pytest.mark.parametrize(
  "change,names,flags",
  [
    (flat(4.25, 6.15), ("V2",), ("V2 flat for 2.0 s",)),
    (flat(4.2, 4.9), LEADS, ()),  # less than from beat to beat
    (
      lambda t, lead: np.minimum(lead, 0.2),
      ("V5", "V6"),
      ("V5, V6 clipped in up to 5% of samples",),
    ),
  ],
)
def test_remarks_on_the_first_ten_seconds(tmp_path, change, names, flags):
  assert wfdb.read(record(tmp_path, where(heart(), change, names))).flags == flags


@pytest.mark.reported(
  "an artefact beyond the first ten seconds rejected a good recording",
  "one second of the first ten was interpolated in a long recording",
)
def test_what_lies_beyond_ten_seconds_decides_nothing(tmp_path):
  leads = heart(30)
  spoilt = where(leads, lambda t, lead: lead + 31 * ((t > 18) & (t < 19)), INDEPENDENT[2:])
  spoilt = where(spoilt, lambda t, lead: np.where(t < 20, lead, np.nan), ("V1", "II"))
  spoilt = where(spoilt, flat(12, 25), ("V6",))
  recording = wfdb.read(record(tmp_path, spoilt))
  assert recording.flags == ("30.0 s long",) and np.isfinite(recording.ecg_mv).all()
  np.testing.assert_allclose(recording.ecg_mv[:, :5000], stacked(leads)[:, :5000], atol=0.00051)
  rejects(
    record(tmp_path, where(leads, lambda t, lead: lead + 31 * ((t > 8) & (t < 9)), ("V4",))),
    "V4 reaches",
    "gain",
  )
  rejects(
    record(tmp_path, where(leads, lambda t, lead: np.where(t < 1.1, np.nan, lead))),
    "lacks 550 of 5000",
  )


@pytest.mark.reported("a source of one's own stored flat leads without a word")
def test_what_a_source_of_ones_own_gives_is_judged(tmp_path):
  """Also where it does not ask `assemble`; what the readers have remarked before resampling is not
  said twice."""
  leads = heart(rate=1000)
  clipped = where(leads, lambda t, lead: np.minimum(lead, 0.2), ("V5", "V6"))
  slow = wfdb.read(
    record(tmp_path, where(clipped, lambda t, lead: lead + 0.03 * np.sin(t), ("III",)), rate=1000)
  )
  given = {
    "read": slow,
    "half": heart(),
    "swapped": heart() | {"I": heart()["II"], "II": heart()["I"]},
    "flat": where(heart(), flat(2, 6), ("V3",)),
    "clipped": where(heart(), lambda t, lead: np.minimum(lead, 0.2), ("V6",)),
  }
  given["half"] = where(given["half"], flat(0, 5))

  def read(item):
    found = given[item.key]
    if item.key == "read":
      ecg, flags = (
        preprocess.to_standard(found.ecg_mv, found.rate_hz),
        tuple(f"ECG: {flag}" for flag in found.flags),
      )
    else:
      ecg, flags = np.float32(stacked(found)), ("age unknown",)
    nothing = np.zeros(0, np.float32)
    return {
      "has_ecg": np.True_,
      "has_cmr": np.False_,
      "ecg": ecg,
      "phenotypes": nothing,
      "diseases": nothing,
      "covariates": nothing,
    }, flags

  job = builder.Job("", read, "minimal", dict.fromkeys(("phenotypes", "diseases", "covariates"), 0))

  def outcome(name):
    return builder.read_item(job, Item(np.zeros(2, np.uint32), 0, name))[1]

  assert outcome("clipped") == ["age unknown", "V6 clipped in up to 5% of samples"]
  for name, word in (
    ("half", "flat lead I, II"),
    ("swapped", "cannot belong"),
    ("flat", "flat lead V3"),
  ):
    with pytest.raises(BadRecord, match=word):
      outcome(name)
  assert len(slow.flags) == 2 and outcome("read") == [f"ECG: {flag}" for flag in slow.flags]
  normalised = job._replace(profile=None)  # of unit mV no more
  assert builder.read_item(normalised, Item(np.zeros(2, np.uint32), 0, "swapped"))[1] == [
    "age unknown"
  ]


def test_embedding_tells_what_was_remarked(tmp_path):
  remarked = record(tmp_path, where(heart(), flat(4, 6), ("V2",)))
  texts, ecg = ahead.read(str(remarked), "minimal")
  assert (texts["status"], texts["flags"]) == ("ok", "V2 flat for 2.0 s") and ecg.shape == (
    12,
    5000,
  )
  texts, ecg = ahead.read(str(record(tmp_path, where(heart(), flat(2, 6), ("V2",)))), "minimal")
  assert (
    texts["status"] == "rejected" and texts["reason"].startswith("flat lead V2") and ecg is None
  )


def test_synthetic_hearts_have_no_remark():
  for i in range(20):
    assert ecg_quality.judge(synthetic.subject(5, i)["ecg"], 500) == ()


@pytest.mark.reported(
  "zeros that fill up a recording counted as ECG",
  "the first ten seconds were zeros and got an LV mass",
)
def test_constant_padding_is_cut_off(tmp_path):
  leads = heart(12)
  padded = where(leads, lambda t, lead: np.where((t < 1.5) | (t >= 11.9), 0, lead))
  recording = wfdb.read(record(tmp_path, padded))
  # 0.1 s at the end is none
  assert recording.flags == ("12.0 s long", "1.5 s of constant padding cut off")
  np.testing.assert_allclose(recording.ecg_mv[:, :5000], stacked(leads)[:, 750:5750], atol=0.00051)
  rejects(
    record(tmp_path, where(leads, lambda t, lead: np.where((t >= 1.5) & (t < 8.8), lead, 0.2))),
    "7.30 s long without 4.70 s of constant padding",
    "at least 10 s",
  )
  eight = {name: padded[name] for name in INDEPENDENT}
  assert "1.5 s of constant padding cut off" in wfdb.read(record(tmp_path, eight)).flags
  one = where(leads, flat(0, 2), ("V1",))  # a lead that was connected late
  assert wfdb.read(record(tmp_path, one)).flags == ("12.0 s long", "V1 flat for 2.0 s")


def test_low_sampling_rates_are_told(tmp_path):
  assert wfdb.read(record(tmp_path, heart(rate=100), rate=100)).flags == (
    "sampled at 100 Hz: nothing above 50 Hz",
  )
  assert wfdb.read(record(tmp_path, heart(rate=200), rate=200)).flags == ()


@pytest.mark.reported("a WFDB header that leaves the length to the size of the samples was refused")
@pytest.mark.parametrize("length", [b"500", b"500 0"])
@pytest.mark.parametrize("fmt", ["16", "212", "24"])
def test_length_from_the_size_of_the_samples(tmp_path, length, fmt):
  leads = heart(12)
  header = rewrite(record(tmp_path, leads, fmt=fmt), b"500 6000", length)
  recording = wfdb.read(header)
  np.testing.assert_allclose(recording.ecg_mv, stacked(leads), atol=0.00051)
  assert recording.flags == ("12.0 s long",)
  header.with_suffix(".dat").write_bytes(b"12345")
  rejects(header, "gives their number")


@pytest.mark.parametrize(
  "gain,unit", [(b"0(0)", b"/mV"), (b"", b""), (b"-", b"/mV"), (b"nan", b"")]
)
def test_uncalibrated(tmp_path, gain, unit):
  rejects(rewrite(record(tmp_path, heart()), b"1000.0(0)/mV", gain + unit))


def test_zero_gain_says_so(tmp_path):
  rejects(
    rewrite(record(tmp_path, heart()), b" 1000.0(0)", b" 0(0)", 1),
    "lead I has gain 0",
    "not calibrated",
  )


def test_samples_missing_short_or_altered(tmp_path):
  header = record(tmp_path, heart())
  data = header.with_suffix(".dat")
  samples = data.read_bytes()
  data.write_bytes(samples[:-2])
  rejects(header, "119998 bytes", "120000")
  data.write_bytes(samples[:24] + b"\x10" + samples[25:])
  assert "I: checksum differs" in wfdb.read(header).flags
  data.unlink()
  rejects(header, "not beside it")
  rejects(tmp_path / "absent", "no such file")
  rejects(tmp_path, "a folder")
  (tmp_path / "ecg.xml").write_text("<xml/>")
  rejects(
    tmp_path / "ecg.xml", "an XML file whose root is xml, which is not read; expected a WFDB header"
  )


@pytest.mark.parametrize(
  "old,new,word",
  [
    (b"rec.dat", b"../rec.dat", "own folder"),
    (b"rec.dat", b"/etc/passwd", "own folder"),
    (b"rec.dat", b"https://physionet.org/rec.dat", "own folder"),
    (b"rec.dat", b"..", "own folder"),
    (b"500 5000", b"500 1000000000000", "claims 1000000000000"),
    (b"rec 12 ", b"rec 999999999 ", "999999999 signals"),
    (b"rec 12 ", b"rec/3 12 ", "segment"),
    (b"rec 12 500", b"rec 12 0", "0 Hz"),
    (b"500 5000\nrec.dat 16", b"500\nrec.dat 516", "neither the header nor"),
    (b"dat 16", b"dat 99", "format 99"),
    (b"dat 16", b"dat 16x2", "plain layout"),
    (b"dat 16", b"dat 16:1000000000000", "plain layout"),
    (b"dat 16", b"dat 16+999999999999", "claims"),
    (b"500 5000", b"500 5000" + b"7" * 5000, "header"),
  ],
)
def test_hostile_headers(tmp_path, old, new, word):
  record(tmp_path, heart(), name="rec")  # what '../rec.dat' would reach
  rejects(rewrite(record(tmp_path / "inner", heart()), old, new), word)


@pytest.mark.parametrize(
  "content", [b"", b"\n# a comment\n", b"\x00\xff" * 300, b"rec 12 500 5000\n", b"a" * 10**6]
)
def test_no_header_at_all(tmp_path, content):
  (tmp_path / "rec.hea").write_bytes(content)
  rejects(tmp_path / "rec.hea")


def test_scattered_signals_are_not_mixed_up(tmp_path):
  leads = heart()
  lines = record(tmp_path, leads).read_text().splitlines()
  (tmp_path / "other.dat").write_bytes((tmp_path / "rec.dat").read_bytes())
  lines[2] = lines[2].replace("rec.dat", "other.dat")
  (tmp_path / "rec.hea").write_text("\n".join(lines))
  rejects(tmp_path / "rec.hea", "plain layout")


def test_colons_in_a_folder_do_not_reach_fsspec(tmp_path):
  """Under wfdb, it takes '::' for a chain of remote files."""
  leads = heart()
  np.testing.assert_allclose(
    wfdb.read(record(tmp_path / "a::b", leads)).ecg_mv, stacked(leads), atol=0.00051
  )


def test_only_bad_record_escapes_damaged_headers(tmp_path):
  header = record(tmp_path, heart())
  whole = header.read_bytes()
  dice = random.Random(7)
  survived = 0
  for _ in range(400):
    damaged = bytearray(whole)
    for _ in range(dice.choice((1, 3, 30))):
      at = dice.randrange(len(damaged))
      noise = dice.choice((b"", b"-", b"9" * 12, b"/", bytes([dice.randrange(256)])))
      damaged[at : at + dice.choice((0, 1, 1, 8))] = noise
    header.write_bytes(damaged)
    try:
      ecg = wfdb.read(header).ecg_mv
      assert ecg.shape[0] == 12 and np.isfinite(ecg).all()
      survived += 1
    except BadRecord:
      pass
  assert 0 < survived < 400  # else the damage is too weak or too strong to tell anything


# To 10 s at 500 Hz


def tone(hertz, rate, seconds=10.0, size=1.0):
  return np.tile(
    size * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate), (12, 1)
  )


@pytest.mark.parametrize("rate", [100, 250, 257, 360, 1000, 2000])
def test_resampling_keeps_time_and_size(rate):
  standard = preprocess.to_standard(tone(7, rate), rate)
  assert standard.shape == (12, 5000) and standard.dtype == np.float32
  np.testing.assert_allclose(standard[:, 250:-250], tone(7, 500)[:, 250:-250], atol=0.01)


def test_no_aliasing():
  """400 Hz sampled at 1000 Hz would fold to 100 Hz at 500 Hz."""
  assert np.abs(preprocess.to_standard(tone(400, 1000), 1000)[:, 250:-250]).max() < 0.01
  kept = preprocess.to_standard(tone(100, 1000), 1000)
  np.testing.assert_allclose(kept[:, 250:-250], tone(100, 500)[:, 250:-250], atol=0.01)


def test_length_and_rate():
  ecg = tone(3, 500)
  np.testing.assert_array_equal(preprocess.to_standard(ecg, 500), ecg.astype(np.float32))
  np.testing.assert_array_equal(
    preprocess.to_standard(tone(3, 500, 30), 500), ecg.astype(np.float32)
  )
  assert preprocess.to_standard(tone(3, 100)[:, :-1], 100).shape == (12, 5000)
  for bad, rate, words in (
    (ecg[:, :1000], 500, "2.00 s long; expected at least 10 s"),
    (ecg[:, :4998], 500, "long"),
    (ecg, 0, "0 Hz"),
    (ecg, 1e6, "Hz"),
    (ecg, float("nan"), "nan Hz"),
  ):
    with pytest.raises(BadRecord, match=words):
      preprocess.to_standard(bad, rate)
  long = preprocess.to_standard(tone(3, 1000, 12), 1000)  # its end is as good as its middle
  np.testing.assert_allclose(long[:, 250:], ecg[:, 250:], atol=0.005)


# Profiles


def raw_ecg():
  drift = 0.5 * np.sin(2 * np.pi * 0.05 * np.arange(5000) / 500)
  return (stacked(heart()) + drift).astype(np.float32)


@pytest.mark.parametrize("profile", list(preprocess.PROFILES))
@pytest.mark.parametrize(
  "ecg", [np.zeros((12, 5000)), np.full((12, 5000), -3.7), np.arange(60000).reshape(12, 5000)]
)
def test_profiles_stay_finite(profile, ecg):
  out = preprocess.normalise(ecg, profile)
  assert (
    out.shape == (12, preprocess.samples(profile))
    and out.dtype == np.float32
    and np.isfinite(out).all()
  )


def test_rates():
  assert {
    name: (preprocess.rate_hz(name), preprocess.samples(name)) for name in preprocess.PROFILES
  } == {
    "minimal": (500, 5000),
    "mmcl": (500, 5000),
    "dual_phase": (500, 5000),
    "dual_phase_mirrored": (500, 5000),
    "cardionets": (250, 2500),
    "cardionets_mirrored": (250, 2500),
  }


def test_unknown_profile():
  with pytest.raises(UserError, match="minimal, mmcl, dual_phase"):
    preprocess.normalise(raw_ecg(), "maximal")
  with pytest.raises(UserError, match="cardionets"):
    preprocess.samples("maximal")


def test_minimal_keeps_voltage():
  once, twice = (preprocess.normalise(factor * raw_ecg(), "minimal") for factor in (1, 2))
  np.testing.assert_allclose(twice, 2 * once, rtol=1e-4, atol=1e-5)
  assert np.abs(once).max() > 2  # nothing was scaled away


@pytest.mark.parametrize(
  "profile,hertz,low,high",
  [
    ("minimal", 0.05, 0, 0.02),
    ("minimal", 10, 0.99, 1.01),
    ("minimal", 40, 0.95, 1.01),
    ("minimal", 240, 0, 0.01),
  ],
)
def test_minimal_frequency_response(profile, hertz, low, high):
  out = 0.2 * preprocess.normalise(tone(hertz, 500), profile)
  rms = out[0, 500:-500].std() / tone(hertz, 500)[0, 500:-500].std()
  assert low <= rms <= high


@pytest.mark.parametrize("profile", list(preprocess.PROFILES))
def test_filters_do_not_move_waves(profile):
  """A wave symmetric about 5 s stays so; any delay would show on its steep flanks."""
  ecg = np.tile(np.exp(-(((np.arange(5000) - 2500) / 10) ** 2)), (12, 1))
  out = preprocess.normalise(ecg, profile)[0]
  middle = len(out) // 2
  np.testing.assert_allclose(
    out[middle : middle + 100], out[middle : middle - 100 : -1], atol=1e-3 * np.ptp(out)
  )


def both_ways(ecg, *filters, edge=2000):
  """Each (b, a) run forwards and backwards in turn by lfilter, the ends mirrored."""
  padded = np.concatenate([ecg[:, edge:0:-1], ecg, ecg[:, -2 : -edge - 2 : -1]], axis=1)
  for b, a in filters:
    padded = signal.lfilter(b, a, signal.lfilter(b, a, padded)[:, ::-1])[:, ::-1]
  return padded[:, edge:-edge]


def test_minimal_against_its_definition():
  """A band-pass of order 2 is one section of order 4; its slow poles are still well placed as one
  polynomial."""
  ecg = raw_ecg().astype(float)
  expected = both_ways(ecg, signal.butter(2, [0.5 / 250, 100 / 250], "band")) / 0.2
  np.testing.assert_allclose(
    preprocess.normalise(ecg, "minimal")[:, 1000:-1000], expected[:, 1000:-1000], atol=2e-3
  )


def test_an_end_within_a_qrs_complex_bends_nothing():
  """Against the same recording going on: what a filter makes of the last second must not hang on
  where it is cut."""
  beat = np.exp(-(((np.arange(500) - 250) / 8) ** 2))  # 1 mV
  ecg = np.tile(np.tile(beat, 14), (12, 1))
  apply = preprocess.PROFILES["minimal"].apply
  whole, cut = 0.2 * apply(ecg), 0.2 * apply(ecg[:, : 5000 - 250])  # ends at the peak of an R wave
  assert np.abs(whole[:, 4000:4750] - cut[:, 4000:]).max() < 0.05  # mV; 0.95 with ends turned over


@pytest.mark.parametrize("profile", ["cardionets", "cardionets_mirrored"])
def test_cardionets_against_its_definition(profile):
  """On the spectrum: Butterworth gains of the bilinear transform in closed form, squared as both
  directions do."""
  # ends at rest, so that it does not matter how they are continued
  ecg = raw_ecg() * signal.windows.tukey(5000, 0.6)
  rest = 20 * 250  # samples, for filters to fade in
  padded = np.pad(signal.resample(ecg, 2500, axis=1), ((0, 0), (rest, rest)))
  w, high, low = (
    np.tan(np.pi * np.fft.rfftfreq(padded.shape[1])),
    np.tan(np.pi * 0.67 / 250),
    np.tan(np.pi * 40 / 250),
  )
  gain = w**10 / (w**10 + high**10) * low**10 / (w**10 + low**10)
  expected = np.fft.irfft(np.fft.rfft(padded) * gain)[:, rest:-rest]
  expected = (expected - expected.mean()) / expected.std()
  out = preprocess.normalise(ecg, profile)
  assert out.shape == (12, 2500) and abs(out.mean()) < 1e-5 and abs(out.std() - 1) < 1e-5
  np.testing.assert_allclose(out[:, 250:-250], expected[:, 250:-250], atol=0.015)
  np.testing.assert_allclose(out, expected, atol=0.06)  # less exact where the continued ends begin


@pytest.mark.parametrize(
  "hertz,low,high",
  [
    (0.1, 0, 0.002),
    (0.67, 0.49, 0.51),
    (10, 0.999, 1.001),
    (40, 0.49, 0.51),
    (90, 0, 0.01),
    (240, 0, 0.01),
  ],
)
def test_cardionets_frequency_response(hertz, low, high):
  """Both ways, a Butterworth filter leaves half the size at its corner; a 10 Hz tone in another
  lead is the scale."""
  ecg = tone(10, 500)
  ecg[0] = tone(hertz, 500)[0]
  # the ends of the other ring at 0.67 Hz for longer
  out = preprocess.normalise(ecg, "cardionets_mirrored")
  middle = slice(500, -500)
  assert low <= out[0, middle].std() / out[1, middle].std() <= high


def test_als_baseline_against_dense_algebra():
  y = np.random.default_rng(3).standard_normal(60).cumsum()
  difference = np.diff(np.eye(60), 2, axis=0)
  weights = np.ones(60)
  for _ in range(5):
    z = np.linalg.solve(np.diag(weights) + 1e3 * difference.T @ difference, weights * y)
    weights = np.where(y > z, 0.3, 0.7)
  np.testing.assert_allclose(preprocess.als_baseline(y, smoothness=1e3), z, atol=1e-9)


def test_als_baseline_against_a_sparse_solver():
  y = (np.random.default_rng(4).standard_normal(5000).cumsum() + tone(1, 500)[0]).astype(float)
  difference = sparse.diags([1.0, -2.0, 1.0], [0, 1, 2], shape=(4998, 5000))
  weights = np.ones(5000)
  for _ in range(5):
    z = linalg.spsolve(
      sparse.csc_matrix(sparse.diags(weights) + 1e7 * difference.T @ difference), weights * y
    )
    weights = np.where(y > z, 0.3, 0.7)
  np.testing.assert_allclose(preprocess.als_baseline(y), z, atol=1e-5 * np.ptp(y))


def test_mmcl_groups():
  ecg = raw_ecg()
  out = preprocess.normalise(ecg, "mmcl")
  for group in (out[:3], out[3:6], out[6:]):
    assert abs(group.mean()) < 1e-5 and abs(group.std() - 1) < 1e-5
  assert abs(out[0].std() - 1) > 0.05  # a group's scale, not a lead's
  spiked = ecg.copy()
  spiked[7, 1234] = 1e3
  clipped = np.clip(spiked, -4 * spiked.std(), 4 * spiked.std())
  chest = clipped[6:] - np.stack([preprocess.als_baseline(lead) for lead in clipped[6:]])
  chest = (chest - chest.mean()) / chest.std()
  np.testing.assert_allclose(preprocess.normalise(spiked, "mmcl")[6:], chest, atol=1e-3)
  gap = np.where(np.arange(5000) == 5, np.nan, ecg)
  assert np.isfinite(preprocess.normalise(gap, "mmcl")).all()


@pytest.mark.parametrize("size", [0.005, 0.05, 0.5])
@pytest.mark.parametrize(
  "hertz,mains", [(50, 50), (60, 60), (49.8, 50), (60.2, 60), (55, 50), (150, 50)]
)
def test_mains_are_found(hertz, mains, size):
  assert preprocess.mains_hz(raw_ecg() + tone(hertz, 500, size=size)) == mains


def test_mains_of_a_clean_ecg():
  """A regular pulse is a comb of lines, many of them at 60 Hz and not at 50: they are not the
  mains."""
  assert preprocess.mains_hz(raw_ecg()) == 50 == preprocess.mains_hz(np.zeros((12, 5000)))
  for per_minute in range(40, 305, 5):
    t = np.arange(5000) / 500
    phase = (t * per_minute / 60) % 1 * 60 / per_minute
    spiky = np.exp(-(((phase - 0.1) / 0.005) ** 2))
    assert preprocess.mains_hz(np.tile(spiky, (12, 1))) == 50, per_minute


@pytest.mark.parametrize("hertz", [50, 60])
def test_mirrored_dual_phase_against_its_definition(hertz):
  ecg = raw_ecg() + tone(hertz, 500, size=0.3)
  out = preprocess.normalise(ecg, "dual_phase_mirrored")
  assert abs(out.mean()) < 1e-5 and abs(out.std() - 1) < 1e-3
  spectrum = np.abs(np.fft.rfft(out[0] * np.hanning(5000)))
  assert spectrum[10 * hertz] < 2 * np.median(spectrum[10 * hertz - 20 : 10 * hertz + 20])
  sos = signal.butter(4, 0.5, "highpass", fs=500, output="sos")
  notch = signal.tf2sos(*signal.iirnotch(hertz, 40, fs=500))
  expected = signal.savgol_filter(
    signal.sosfiltfilt(np.vstack([sos, notch]), ecg, padtype="even", padlen=1000), 15, 3
  )
  expected = (expected - expected.mean()) / expected.std()
  # ends differ a little
  np.testing.assert_allclose(out[:, 1000:-1000], expected[:, 1000:-1000], rtol=0.01, atol=0.015)


def turned_over(ecg, sos, samples):
  """Both ways by one section after the other, each in its steady state at first; the ends turned
  over about themselves."""
  first, last = ecg[:, :1], ecg[:, -1:]
  padded = np.concatenate(
    [2 * first - ecg[:, samples:0:-1], ecg, 2 * last - ecg[:, -2 : -samples - 2 : -1]], axis=1
  )
  for _ in range(2):
    level = padded[:, :1]
    for section in sos:
      b, a = section[:3], section[3:]
      padded, _ = signal.lfilter(b, a, padded, zi=signal.lfilter_zi(b, a) * level)
      level = level * b.sum() / a.sum()
    padded = padded[:, ::-1]
  return padded[:, samples:-samples]


@pytest.mark.reported("dual-phase's and CardioNets' filters had other ends than in their code")
def test_published_profiles_end_as_published():
  """scipy's ends are 3 (2 sections + 1) samples long, less what vanishes at the origin; of a notch
  3 x 3."""
  ecg = raw_ecg().astype(float)  # ends within beats
  high, notch = (
    signal.butter(4, 0.5, "highpass", fs=500, output="sos"),
    signal.tf2sos(*signal.iirnotch(60, 40, fs=500)),
  )
  expected = signal.savgol_filter(turned_over(turned_over(ecg, high, 15), notch, 9), 15, 3)
  expected = (expected - expected.mean()) / (expected.std(ddof=1) + 1e-8)
  np.testing.assert_allclose(preprocess.normalise(ecg, "dual_phase"), expected, atol=1e-5)
  assert np.abs(preprocess.normalise(ecg, "dual_phase_mirrored") - expected).max() > 0.1

  spectrum = np.fft.rfft(ecg)[:, :1251]
  spectrum[:, -1] = 2 * spectrum[:, -1].real  # both halves of the new highest frequency
  slow = np.fft.irfft(spectrum, 2500) / 2
  high, low = (
    signal.butter(5, hertz, kind, fs=250, output="sos")
    for hertz, kind in ((0.67, "highpass"), (40, "lowpass"))
  )
  expected = turned_over(turned_over(slow, high, 18), low, 18)
  expected = (expected - expected.mean()) / expected.std()
  np.testing.assert_allclose(preprocess.normalise(ecg, "cardionets"), expected, atol=1e-5)
  assert np.abs(preprocess.normalise(ecg, "cardionets_mirrored") - expected).max() > 0.1


def test_mirrored_ends_are_the_better_ones():
  """Against the same recording going on, as a 5 s window that ends within a beat."""
  ecg = raw_ecg().astype(float)
  for order, hertz in ((4, 0.5), (5, 0.67)):
    whole = preprocess.filtered(ecg, order, hertz, "highpass")[:, 1250:3750]
    mirrored, turned = (
      preprocess.filtered(ecg[:, 1250:3750], order, hertz, "highpass", edge_s=seconds)
      for seconds in (2, None)
    )
    assert np.std(mirrored - whole) < np.std(turned - whole)


# Real recordings


@pytest.mark.skipif(not REAL.exists(), reason="no real recordings here")
def test_real_recordings():
  headers = sorted(REAL.glob("*.hea"))
  assert len(headers) == 30
  for header in headers:
    recording = wfdb.read(header)
    ecg = recording.ecg_mv
    assert ecg.shape == (12, 5000) and recording.rate_hz == 500 and recording.flags == ()
    assert np.abs(ecg[2] - (ecg[1] - ecg[0])).max() <= 0.005
    assert header.name.startswith("E") or preprocess.mains_hz(ecg) == 50  # HR*: PTB-XL, Germany
    assert 0.3 < np.ptp(ecg, axis=1).max() < 10
    standard = preprocess.to_standard(ecg, recording.rate_hz)
    np.testing.assert_array_equal(standard, ecg)
    for profile in preprocess.PROFILES:
      out = preprocess.normalise(standard, profile)
      assert np.isfinite(out).all() and 0.2 < out.std() < 5
