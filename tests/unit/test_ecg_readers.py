"""ECG readers: each file is made here, in its format's layout, from known volts; real recordings
where there are."""

import gzip
import json
import os
import pickle
import struct
import unicodedata
import warnings
import zlib
from pathlib import Path

import hypothesis
import numpy as np
import pydicom
import pytest
from hypothesis import strategies
from pydicom.data import get_testdata_file
from pydicom.sr.codedict import codes
from pydicom.uid import (
  DeflatedExplicitVRLittleEndian,
  ExplicitVRBigEndian,
  ExplicitVRLittleEndian,
  GeneralECGWaveformStorage,
  ImplicitVRLittleEndian,
)
from scipy import io as scipy_io

from common import ROOT
from mmcl_jax.data import readers
from mmcl_jax.data.readers import (
  array_ecg,
  dicom_ecg,
  mmcl_pt,
  nifti,
  ukb_cmr_dicom,
  ukb_ecg_xml,
  wfdb,
)
from mmcl_jax.data.readers.recording import lead_names
from mmcl_jax.data.schema import LEADS
from mmcl_jax.errors import BadRecord
from recordings import INDEPENDENT, heart, record, rewrite, stacked
from test_ecg_input import no_network  # noqa: F401 (a fixture)

REAL = ROOT.parent / "shared/realdata/ecg"
# in every file that can hold a person; in no reason and no flag
PERSON = ("DEMO0001", "Müller", "1950")


def rejects(path, *words, read=readers.read_ecg):
  with pytest.raises(BadRecord) as caught:
    read(path)
  message = str(caught.value)
  assert "\n" not in message and not any(
    secret in message for secret in (*PERSON, str(Path(path).parent))
  )
  for word in words:
    assert word in message


def counts(seconds=10, seed=0):
  """{lead: int [T]}, units of 5 uV at 500 Hz; the limb leads obey Einthoven and Goldberger
  exactly."""
  leads = {
    name: 2 * np.round(100 * lead).astype(int) for name, lead in heart(seconds, seed=seed).items()
  }
  i, ii = leads["I"], leads["II"]
  return {
    name: (leads | {"III": ii - i, "aVR": -(i + ii) // 2, "aVL": i - ii // 2, "aVF": ii - i // 2})[
      name
    ]
    for name in LEADS
  }


# WFDB


def cinc(
  folder,
  first="A0001 12 500 5000",
  line="A0001.mat 16+24 {gain}/mV 16 0 0 0 0 {lead}",
  gain=1000,
  names=LEADS,
  comments=("#Age: 74",),
):
  """A record as the CinC challenges have it: samples in a MATLAB 4 file, whose header takes 24
  bytes."""
  volts = stacked(heart())
  scipy_io.savemat(
    folder / "A0001.mat", {"val": np.round(volts * gain).astype(np.int16)}, format="4"
  )
  lines = [first, *(line.format(gain=gain, lead=name) for name in names), *comments]
  (folder / "A0001.hea").write_text("\n".join(lines))
  return folder / "A0001.hea", volts


@pytest.mark.parametrize(
  "line",
  [
    "A0001.mat 16+24 {gain}/mV 16 0 28 0 0 {lead}",
    "A0001.mat 16x1+24 {gain}.0(0)/mv 16 0 28 0 0 {lead}",
    "A0001.mat 16+24 {gain}(0)/mV 16 0 0 0 0 {lead}",
    "A0001.mat 16+24 {gain} 16 0 0 0 0 {lead}",
  ],
)
@pytest.mark.parametrize("gain", [1000, 4880, 200])
def test_headers_of_the_cinc_challenges(tmp_path, line, gain):
  header, volts = cinc(tmp_path, line=line, gain=gain)
  for path in (header, header.with_suffix(".mat"), header.with_suffix("")):
    np.testing.assert_allclose(readers.read_ecg(path).ecg_mv, volts, atol=0.51 / gain)


def test_record_named_as_a_file(tmp_path):
  """As in the first CinC 2020 release; wfdb takes the name for a syntax error."""
  header, volts = cinc(tmp_path, first="A0001.mat 12 500 5000 12-May-2020 12:33:59", gain=4880)
  before = sorted(os.listdir(tmp_path))
  recording = wfdb.read(header)
  np.testing.assert_allclose(recording.ecg_mv, volts, atol=0.0002)
  assert len(recording.flags) == 1 and "gain uncertain" in recording.flags[0]
  assert sorted(os.listdir(tmp_path)) == before
  header.with_suffix(".mat").unlink()
  rejects(header, "not beside it")


@pytest.mark.reported("MATLAB 5 files were read from byte 24 on, their leads rotated")
@pytest.mark.parametrize("gain", [1000, 4880])
def test_other_matlab_files_are_told_by_content(tmp_path, gain):
  header, volts = cinc(tmp_path, gain=gain)
  samples, counts = header.with_suffix(".mat"), np.round(volts * gain).astype(np.int16)
  scipy_io.savemat(samples, {"val": counts})
  rejects(header, "MATLAB file of version 5", "savemat(format='4')", ".json")
  for head in (b"MATLAB 7.3 MAT-file, Platform: GLNXA64", b"\x89HDF\r\n\x1a\n"):
    samples.write_bytes(head + bytes(200_000))
    rejects(header, "MATLAB file of version 5 or later")
  for array, word in (
    (counts.T, "is 5000 x 12 of type 30; expected 12 rows"),
    (counts.astype(float), "12 x 5000 of type 0"),
  ):
    scipy_io.savemat(samples, {"val": array}, format="4")
    rejects(header, word)
  samples.rename(tmp_path / "A0001.bin")
  rejects(rewrite(header, b"A0001.mat", b"A0001.bin"), "12 x 5000 of type 0")


@pytest.mark.reported(
  "MATLAB 4 files with a longer name, or in big-endian order, were called an ECG of 161 mV"
)
@pytest.mark.parametrize(
  "kind,name,found",
  [
    (30, b"signals\0", "12 x 5000 of type 30, from byte 28 on"),
    (1030, b"val\0", "12 x 5000 of type 1030;"),
  ],
)
def test_matlab_files_that_the_header_does_not_describe(tmp_path, kind, name, found):
  header, volts = cinc(tmp_path)
  order = "<>"[kind > 1000]
  head = struct.pack(f"{order}5i", kind, 12, 5000, 0, len(name)) + name
  samples = np.round(volts * 1000).astype(f"{order}i2").T.tobytes()
  header.with_suffix(".mat").write_bytes(head + samples)
  rejects(header, found, "(int16, little-endian) from byte 24 on")
  if kind == 30:  # as the header says
    np.testing.assert_allclose(
      wfdb.read(rewrite(header, b"16+24", b"16+28")).ecg_mv, volts, atol=6e-4
    )


@pytest.mark.reported("a WFDB header without a rate was read at 250 Hz without a word")
def test_rate_that_is_missing(tmp_path):
  header, _ = cinc(tmp_path, first="A0001 12")
  recording = wfdb.read(header)
  assert recording.rate_hz == 250 and "rate missing, 250 Hz taken" in recording.flags


def test_upper_case_leads_of_ptb_xl(tmp_path):
  names = [name.upper() for name in LEADS]
  header, volts = cinc(tmp_path, names=names)
  np.testing.assert_allclose(wfdb.read(header).ecg_mv, volts, atol=0.001)


def test_comments(tmp_path):
  header, _ = cinc(
    tmp_path,
    comments=(
      "# Age: 59",
      "#Sex:Female",
      "  #  Dx : 164934002,426783006",
      "# made: 12:30",
      "# no colon",
      "#Dx: 1",
      "#: empty",
      "#Rx:",
    ),
  )
  expected = {
    "age": "59",
    "sex": "Female",
    "dx": "164934002,426783006,1",
    "made": "12:30",
    "rx": "",
  }
  assert wfdb.comments(header) == wfdb.comments(header.with_suffix(".mat")) == expected
  rejects(tmp_path / "absent", "no such file", read=wfdb.comments)
  (tmp_path / "long.hea").write_bytes(b"#a: b\n" * 20_000)
  rejects(tmp_path / "long.hea", "more than 65536 bytes", read=wfdb.comments)


@pytest.mark.reported("Lead I, DI, ECG I and MDC_ECG_LEAD_I were no leads")
@pytest.mark.parametrize("spelling", ["Lead {}", "lead_{}", "ECG {}", "MDC_ECG_LEAD_{}", " {} "])
def test_common_spellings_of_leads(spelling):
  names = [spelling.format(lead) for lead in LEADS]
  assert lead_names(names) == dict(zip(LEADS, range(12)))
  assert lead_names(["DI", "DII", "diii"]) == {"I": 0, "II": 1, "III": 2}


def test_names_that_may_be_something_else_are_no_leads():
  assert lead_names(["ECG1", "Lead 1", "-aVR", "ECG -I", "D1", "MLII", "", None, "C1", "1"]) == {}
  with pytest.raises(BadRecord, match="II occurs twice"):
    lead_names(["II", "Lead II"])


@pytest.mark.reported(
  "a record without any known lead was an AttributeError of wfdb",
  "a lead was said to be absent, and not what the file has in its place",
)
def test_reasons_name_the_leads_found(tmp_path, xml):
  header, _ = cinc(tmp_path, names=[f"ECG{n}" for n in range(12)])
  rejects(header, "no lead I, II, V1, V2, V3, V4, V5, V6; it has ECG0, ECG1, ECG2")
  header, _ = cinc(tmp_path, line="A0001.mat 16+24 {gain}/mV 16 0 0 0 0")
  rejects(header, "no lead I, II")
  rejects(
    xml(data=VALID_XML.replace(b'lead="V3"', b'lead="3<"'.replace(b"<", b"&lt;"))),
    "no lead V3; it has I, II",
  )
  np.save(tmp_path / "a.npy", np.zeros((2, 5000)))
  declare(tmp_path, leads=["ECG1", "\x1b[31m" + "x" * 99])
  rejects(tmp_path / "a.npy", "it has ECG1, ??31mxxxxxxxxxxxxxxx")
  sources = {name: code("MDC", "99", f"Lead {n}") for n, name in enumerate(INDEPENDENT, 7)}
  group = multiplex({name: heart()[name] for name in INDEPENDENT}, sources=sources)
  rejects(dicom(tmp_path / "a.dcm", group), "it has Lead 7, Lead 8")


NAMES = {  # of a record's files
  "umlaut": "M\u00fcller",
  "Chinese": "\u5fc3\u7535\u56fe",
  "blanks": "two words 12",
  "decomposed": "Mu\u0308ller",
}


@pytest.mark.reported("WFDB records named with umlauts, blanks or in Chinese were not read")
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(
  "encoding,form", [("utf-8", "NFC"), ("utf-8", "NFD"), ("latin-1", "NFC"), ("utf-16", "NFC")]
)
def test_names_of_wfdb_records(tmp_path, kind, encoding, form):
  """The header may hold another Unicode form of a name than the folder."""
  name = NAMES[kind]
  if encoding == "latin-1" and kind in ("Chinese", "decomposed"):
    return
  header, volts = cinc(tmp_path)
  content = header.read_text().replace("A0001", unicodedata.normalize(form, name))
  (tmp_path / f"{name}.hea").write_bytes(content.encode(encoding))
  header.unlink()
  (tmp_path / "A0001.mat").rename(tmp_path / f"{name}.mat")
  assert [path.stem for path in readers.find_ecg(tmp_path)[0]] == [name]
  for path in (f"{name}.hea", f"{name}.mat", name):
    np.testing.assert_allclose(readers.read_ecg(tmp_path / path).ecg_mv, volts, atol=0.00051)


@pytest.mark.reported(
  "a WFDB header whose date is a year alone was not read",
  "a WFDB record named by its path was called one of several segments",
)
@pytest.mark.parametrize(
  "first",
  [
    "A0001 12 500 5000 2006",
    "A0001 12 500/500(0) 5000 12:30 00/00/2006",
    "A0001 12 500 5000 12.05.2006 noon",
    "records500/00000/A0001 12 500 5000",
    "C:\\data\\A0001 12 500 5000",
    "g1/0001 12 500 5000 2006",
  ],
)
def test_names_and_dates_that_samples_do_not_need(tmp_path, first):
  header, volts = cinc(tmp_path, first=first)
  if "0001 " in first and "A0001" not in first:  # a name of digits alone, as of a segment
    header = header.rename(tmp_path / "0001.hea")
  np.testing.assert_allclose(readers.read_ecg(header).ecg_mv, volts, atol=0.00051)


@pytest.mark.reported(
  "records with .HEA and .DAT were not found", "a .mat without its header was called no such file"
)
def test_suffixes_in_capitals_and_samples_without_a_header(tmp_path):
  leads = heart()
  header = record(tmp_path, leads, name="rec")
  header.with_suffix(".dat").rename(tmp_path / "REC.DAT")
  header = header.rename(tmp_path / "REC.HEA")
  assert readers.find_ecg(tmp_path) == ([header], {})
  for path in (
    header,
    tmp_path / "REC.DAT",
    tmp_path / "REC",
    tmp_path / "rec",
    tmp_path / "rec.dat",
  ):
    np.testing.assert_allclose(readers.read_ecg(path).ecg_mv, stacked(leads), atol=0.00051)
    assert readers.ecg_file(path) == header
  header.unlink()
  rejects(tmp_path / "REC.DAT", "samples without their header")
  rejects(tmp_path / "rec.dat", "no such file")


# CardioSoft's XML


def waves(leads):
  return "".join(
    f'<WaveformData lead="{name}">\n\t\t\t'
    + ",\n\t".join(",".join(map(str, part)) for part in np.split(lead, [len(lead) // 2]))
    + "\n</WaveformData>"
    for name, lead in leads.items()
  )


def cardiosoft(strip=None, median=None, full=None, nested=False):
  """A CardiologyXML with a strip and a median beat {lead: int [T]}, and a full disclosure of these
  leads."""
  strip, full = strip or counts(), full or counts(27, 2)
  median = median or {name: lead[:600] for name, lead in counts(2, 1).items()}
  head = """<SampleRate units="Hz">500</SampleRate><Resolution units="uVperLsb">5</Resolution>"""
  blocks = np.stack(list(full.values())).reshape(len(full), -1, 500).swapaxes(0, 1).ravel()
  data = f"""<StripData><NumberOfLeads>{len(strip)}</NumberOfLeads>{head}
    <ChannelSampleCountTotal>{len(strip["I"])}</ChannelSampleCountTotal>{waves(strip)}</StripData>"""
  text = f"""<?xml version="1.0" encoding="ISO-8859-1"?>
  <CardiologyXML><ObservationType>RestECG</ObservationType>
  <PatientInfo><PID>DEMO0001</PID><Name><FamilyName>Müller</FamilyName></Name><BirthDateTime><Year>1950</Year>
  </BirthDateTime></PatientInfo>
  <RestingECGMeasurements><VentricularRate units="BPM">61</VentricularRate><PQInterval units="ms"/>
    <QRSDuration units="ms"> 94 </QRSDuration><QTInterval units="ms">***</QTInterval><RAxis units="deg">-12</RAxis>
    <POnset units="ms">inf</POnset><MedianSamples><NumberOfLeads>{len(median)}</NumberOfLeads>{head}
    <ChannelSampleCountTotal>{len(median["I"])}</ChannelSampleCountTotal><FirstValid>0</FirstValid>
    <LastValid>593</LastValid>{waves(median)}</MedianSamples></RestingECGMeasurements>
  {"<Strip>" * nested}{data}{"</Strip>" * nested}
  <FullDisclosure><NumberOfChannels>{len(full)}</NumberOfChannels>{head}<LeadOrder>{",".join(full)}</LeadOrder>
    <FullDisclosureData><SampleCountTotal>{len(blocks)}</SampleCountTotal>{",".join(map(str, blocks))}
    </FullDisclosureData></FullDisclosure></CardiologyXML>"""
  return text.encode("latin-1")


VALID_XML = cardiosoft()


@pytest.fixture
def xml(tmp_path):
  """A function that writes the bytes of a CardiologyXML, altered by the given (old, new), once, and
  gives its path."""

  def write(*alterations, data=VALID_XML):
    for old, new in alterations:
      assert old in data
      data = data.replace(old, new, 1)
    path = tmp_path / "DEMO0001_20205_2_0.xml"
    path.write_bytes(data)
    return path

  return write


@pytest.mark.parametrize("nested", [False, True])
def test_strip(xml, nested):
  leads = counts()
  shuffled = {name.upper(): leads[name] for name in sorted(leads, reverse=True)} | {
    "X": leads["V1"]
  }
  recording = readers.read_ecg(xml(data=cardiosoft(shuffled, nested=nested)))
  assert recording.rate_hz == 500 and recording.flags == () and recording.ecg_mv.dtype == np.float32
  np.testing.assert_array_equal(np.round(recording.ecg_mv / 0.005), stacked(leads))
  np.testing.assert_allclose(recording.ecg_mv, 0.005 * stacked(leads), rtol=1e-6)


def test_median_beat_of_another_rate(xml):
  median = {name: np.repeat(lead[:600], 2) for name, lead in counts(2, 1).items()}
  data = (
    cardiosoft(median=median)
    .replace(b'Hz">500', b'Hz">1000')
    .replace(b"<LastValid>593", b"<LastValid>1187")
  )
  beat, rate = ukb_ecg_xml.read_median(xml(data=data))
  assert beat.shape == (12, 1188) and rate == 1000
  rejects(
    xml(data=data.replace(b'Hz">1000', b'Hz">500', 1)),
    "expected at most 600",
    read=ukb_ecg_xml.read_median,
  )


def test_median_beat(xml):
  leads = {name: lead[:600] for name, lead in counts(2, 1).items()}
  median, rate = ukb_ecg_xml.read_median(xml())
  assert median.shape == (12, 594) and median.dtype == np.float32 and rate == 500
  np.testing.assert_allclose(median, 0.005 * stacked(leads)[:, :594], rtol=1e-6)


def test_full_disclosure(xml):
  """Blocks of one second. Einthoven and Goldberger hold to the last bit; in any other order they do
  not at all."""
  recording = ukb_ecg_xml.read_full_disclosure(xml())
  found = np.round(recording.ecg_mv / 0.005).astype(int)
  np.testing.assert_array_equal(found, stacked(counts(27, 2)))
  i, ii, iii, avr, avl, avf = found[:6]
  assert (
    not np.any(ii - i - iii) and not np.any(2 * avr + i + ii) and not np.any(2 * (avl - i) + ii)
  )
  assert recording.rate_hz == 500 and recording.flags == ("27.0 s long",)


def test_measurements(xml):
  found = ukb_ecg_xml.measurements(xml())
  assert list(found) == list(ukb_ecg_xml.MEASUREMENTS)
  assert {name: value for name, value in found.items() if not np.isnan(value)} == {
    "VentricularRate": 61,
    "QRSDuration": 94,
    "RAxis": -12,
  }


def test_eight_leads_of_a_strip(xml):
  leads = counts()
  recording = readers.read_ecg(xml(data=cardiosoft({name: leads[name] for name in INDEPENDENT})))
  np.testing.assert_allclose(recording.ecg_mv, 0.005 * stacked(leads), atol=1e-6)
  assert recording.flags == ("limb leads derived",)


def test_counts_need_not_be_stated(xml):
  path = xml(
    data=VALID_XML.replace(b"NumberOfLeads>", b"X>")
    .replace(b"<ChannelSampleCountTotal>5000</", b"<Y>5000</")
    .replace(b"</ChannelSampleCountTotal><WaveformData", b"</Y><WaveformData")
  )
  np.testing.assert_allclose(readers.read_ecg(path).ecg_mv, 0.005 * stacked(counts()), rtol=1e-6)


@pytest.mark.parametrize(
  "old,new,word",
  [
    (b"RestECG", b"StressECG", "an exercise ECG"),
    (b"<ObservationType>RestECG</ObservationType>", b"", "ObservationType"),
    (b"<StripData>", b"<StripData/><StripData>", "2 StripData"),
    (b"StripData>", b"OtherData>", "not well-formed"),
    (b"CardiologyXML", b"RestingECG", "not well-formed"),
    (b'Hz">500', b'Hz">-100', "SampleRate is -100"),
    (b'Hz">500', b'Hz">nan', "SampleRate is missing or not a number"),
    (b'LSB">5'.replace(b"LSB", b"Lsb"), b'Lsb">0', "Resolution is 0"),
    (b'Lsb">5', b'Lsb">-5', "Resolution is -5"),
    (b'Lsb">5', b'Lsb">5000', "are its gain and unit right"),
    (b"uVperLsb", b"mVperLsb", "not calibrated"),
    (b"<NumberOfLeads>12", b"<NumberOfLeads>13", "NumberOfLeads is 13"),
    (
      b"<ChannelSampleCountTotal>5000",
      b"<ChannelSampleCountTotal>" + b"9" * 15,
      "ChannelSampleCountTotal is 1e+15",
    ),
    (b'lead="III"', b'lead="ii"', "lead II occurs twice"),
    (b'lead="V6"', b'lead="V7"', "no lead V6"),
    (b'lead="V3">', b'lead="V3">1,', "lead V3 has 5001 samples; expected 5000, as lead I"),
    (b'lead="V3">', b'lead="V3">NaN,', "a sample of lead V3 is not a number"),
    (b'lead="V3">', b'lead="V3">1_0', "a sample of lead V3 is not a number"),
    (b'lead="V3">', b'lead="V3">1-', "lead V3 is missing or not a number"),
    (b'lead="V3">', b'lead="V3">,', "lead V3 is missing or not a number"),
  ],
)
def test_faults_of_a_strip(xml, old, new, word):
  """Each is rejected for its own reason; the median beat, which stands first in the file, is
  whole."""
  at = VALID_XML.index(b"<StripData>") if old in VALID_XML[VALID_XML.index(b"<StripData>") :] else 0
  rejects(xml(data=VALID_XML[:at] + VALID_XML[at:].replace(old, new, 1)), word)


def test_constant_and_absent_leads(xml):
  flat = counts() | {"V4": np.full(5000, 7)}
  rejects(xml(data=cardiosoft(flat)), "flat lead V4")
  rejects(xml(data=VALID_XML.replace(b"StripData", b"Other")), "0 StripData; expected one")
  rejects(xml(data=VALID_XML.replace(b"CardiologyXML", b"RestingECG")), "a GE MUSE XML file")


@pytest.mark.reported(
  "GE CardioSoft XML was refused at any other rate and length than UK Biobank's"
)
@pytest.mark.parametrize("rate,seconds", [(1000, 10), (240, 10), (500, 12), (500, 5)])
def test_strips_of_any_rate_and_length(xml, rate, seconds):
  leads = {name: np.tile(lead, 2)[: rate * seconds] for name, lead in counts().items()}
  data = cardiosoft(leads).replace(b'Hz">500', b'Hz">%d' % rate)
  recording = readers.read_ecg(xml(data=data))
  assert recording.rate_hz == rate and recording.flags == (
    ("12.0 s long",) if seconds == 12 else ()
  )
  np.testing.assert_allclose(recording.ecg_mv, 0.005 * stacked(leads), rtol=1e-6)


@pytest.mark.parametrize(
  "read,old,new,word",
  [
    (ukb_ecg_xml.read_median, b"<LastValid>593", b"<LastValid>600", "last valid one at 600"),
    (ukb_ecg_xml.read_median, b"<LastValid>593", b"<LastValid>", "LastValid is missing"),
    (ukb_ecg_xml.read_median, b">600</Channel", b">99999999999</Channel", "expected at most 600"),
    (
      ukb_ecg_xml.read_median,
      b">600</Channel",
      b">599</Channel",
      "ChannelSampleCountTotal is 599; found or expected 600",
    ),
    (
      ukb_ecg_xml.read_full_disclosure,
      b"<SampleCountTotal>162000<",
      b"<SampleCountTotal>9<",
      "SampleCountTotal is 9",
    ),
    (ukb_ecg_xml.read_full_disclosure, b"<LeadOrder>I,", b"<LeadOrder>", "names 11 leads"),
    (ukb_ecg_xml.read_full_disclosure, b"<LeadOrder>I,", b"<LeadOrder>II,", "lead II occurs twice"),
    (
      ukb_ecg_xml.read_full_disclosure,
      b"<FullDisclosure>",
      b"<FullDisclosure/><FullDisclosure>",
      "2 FullDisclosure",
    ),
  ],
)
def test_faults_of_the_other_blocks(xml, read, old, new, word):
  rejects(xml((old, new)), word, read=read)


def test_full_disclosure_that_breaks_off(xml):
  start, end = VALID_XML.index(b"<SampleCountTotal>"), VALID_XML.index(b"</FullDisclosureData>")
  rejects(
    xml(data=VALID_XML[:start] + b"1,2,3,4" + VALID_XML[end:]),
    "multiple of 6000",
    read=ukb_ecg_xml.read_full_disclosure,
  )
  rejects(
    xml(data=VALID_XML[:start] + VALID_XML[end:]), "missing", read=ukb_ecg_xml.read_full_disclosure
  )


BOMB = (
  b'<!DOCTYPE x [<!ENTITY a0 "ha">'
  + b"".join(b'<!ENTITY a%d "%s">' % (n + 1, b"&a%d;" % n * 10) for n in range(10))
  + b"]><CardiologyXML>&a10;</CardiologyXML>"
)


@pytest.mark.parametrize(
  "data,word",
  [
    (BOMB, "document type"),
    (
      b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><CardiologyXML>&e;</CardiologyXML>',
      "document type",
    ),
    (b'<!DOCTYPE x SYSTEM "http://localhost/x.dtd"><CardiologyXML/>', "document type"),
    (b"<CardiologyXML>&nbsp;</CardiologyXML>", "well-formed"),
    (b"<CardiologyXML>" * 100_000, "tags"),
    (b"<CardiologyXML>" * 40_000, "well-formed"),
    (b"<!--" + b" " * 5000 + b"--><a/>", "root is not CardiologyXML"),
    (b"<CardiologyXML>" + b" " * 2**23 + b"</CardiologyXML>", "bytes"),
    (b'<?xml version="1.0" encoding="klingon"?><CardiologyXML/>', ""),
    (b"", "an empty file"),
    (b"\x00\xff" * 99, "well-formed"),
    (b"<CardiologyXML/>", "ObservationType"),
  ],
)
@pytest.mark.parametrize(
  "read", [ukb_ecg_xml.read, ukb_ecg_xml.read_median, ukb_ecg_xml.measurements]
)
def test_hostile_xml(xml, data, word, read):
  rejects(xml(data=data), word, read=read)


@pytest.mark.skipif(not REAL.exists(), reason="no real recordings here")
def test_cardiosoft_equals_the_wfdb_record_it_was_made_from():
  """Its values are rounded to 5 uV, its limb leads derived before that: III = II - I adds two
  roundings and its own."""
  recording = readers.read_ecg(REAL / "cardiosoft_style/DEMO0001_20205_2_0.xml")
  error = 1000 * np.abs(
    recording.ecg_mv - wfdb.read(REAL / "cinc2021_wfdb/HR06000.hea").ecg_mv
  ).max(axis=1)
  independent = np.isin(LEADS, INDEPENDENT)
  assert (
    error[independent].max() <= 2.5 and error[~independent].max() <= 10 and recording.flags == ()
  )
  median, _ = ukb_ecg_xml.read_median(REAL / "cardiosoft_style/DEMO0001_20205_2_0.xml")
  assert median.shape == (12, 594) and np.abs(median).max() < 5
  assert (
    ukb_ecg_xml.measurements(REAL / "cardiosoft_style/DEMO0001_20205_2_0.xml")["VentricularRate"]
    == 69
  )


# DICOM


def code(value, scheme, meaning):
  item = pydicom.Dataset()
  item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
  return pydicom.Sequence([item])


def multiplex(leads, rate=500, label="RHYTHM", dtype="<i2", sources=None, **channel):
  """A multiplex group of {lead: [T] in mV}, 2.5 uV a unit; `channel` alters every channel's
  definition."""
  group = pydicom.Dataset()
  group.MultiplexGroupLabel, group.SamplingFrequency = label, rate
  group.NumberOfWaveformChannels, group.NumberOfWaveformSamples = (
    len(leads),
    len(next(iter(leads.values()))),
  )
  group.WaveformBitsAllocated = 8 * np.dtype(dtype).itemsize
  group.WaveformSampleInterpretation = {"i1": "SB", "i2": "SS", "i4": "SL", "u1": "UB", "u2": "US"}[
    dtype[1:]
  ]
  group.ChannelDefinitionSequence = pydicom.Sequence()
  for name in leads:
    item = pydicom.Dataset()
    item.ChannelSourceSequence = (sources or {}).get(name) or code("0", "99DEMO", f"Lead {name}")
    item.ChannelSensitivity, item.ChannelSensitivityCorrectionFactor = "2.5", "1"
    item.ChannelSensitivityUnitsSequence = code("uV", "UCUM", "microvolt")
    item.ChannelBaseline = "0"
    for key, value in channel.items():
      setattr(item, key, value)
    group.ChannelDefinitionSequence.append(item)
  units = np.round(np.stack(list(leads.values()), axis=1) / 0.0025).astype(dtype)
  group.WaveformData = units.tobytes()
  group["WaveformData"].VR = "OW"
  return group


def dicom(path, *groups, syntax=ExplicitVRLittleEndian):
  dataset = pydicom.Dataset()
  dataset.file_meta = pydicom.dataset.FileMetaDataset()
  dataset.file_meta.TransferSyntaxUID = syntax
  dataset.SOPClassUID, dataset.SOPInstanceUID = GeneralECGWaveformStorage, "2.25.1"
  dataset.PatientID, dataset.PatientName, dataset.PatientBirthDate = (
    "DEMO0001",
    "Müller",
    "19500101",
  )
  dataset.SpecificCharacterSet = "ISO_IR 100"
  if groups:
    dataset.WaveformSequence = pydicom.Sequence(groups)
  dataset.save_as(
    path,
    enforce_file_format=True,
    little_endian=syntax != ExplicitVRBigEndian,
    implicit_vr=syntax == ImplicitVRLittleEndian,
  )
  return path


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("dtype", ["<i2", "<i4"])
def test_dicom(tmp_path, syntax, dtype):
  leads = heart(rate=1000)
  names = sorted(leads, reverse=True)
  group = multiplex(
    {"Resp": leads["I"]} | {name: leads[name] for name in names}, rate=1000, dtype=dtype
  )
  recording = readers.read_ecg(dicom(tmp_path / "DEMO0001.dcm", group, syntax=syntax))
  assert (
    recording.rate_hz == 1000 and recording.flags == () and recording.ecg_mv.dtype == np.float32
  )
  np.testing.assert_allclose(recording.ecg_mv, stacked(leads), atol=0.00126)


def test_channels_by_code_and_by_meaning(tmp_path):
  """MDC's codes as pydicom lists them; SCPECG has the same numbers; code meanings of both standards
  and of vendors."""
  leads = heart()
  mdc = codes.MDC
  concepts = {
    "I": mdc.LeadI,
    "II": mdc.LeadII,
    "III": mdc.LeadIII,
    "aVR": mdc.AvrAugmentedVoltageRight,
    "aVL": mdc.AvlAugmentedVoltageLeft,
    "aVF": mdc.AvfAugmentedVoltageFoot,
    **{f"V{n}": getattr(mdc, f"LeadV{n}") for n in range(1, 7)},
  }
  mdc = {name: code(concept.value, "MDC", "") for name, concept in concepts.items()}
  scp = {
    name: code(concept.value.replace("2:", "5.6.3-9-"), "SCPECG", concept.meaning)
    for name, concept in concepts.items()
  }
  text = {name: code("x", "99DEMO", concept.meaning) for name, concept in concepts.items()}
  vendor = {
    "I": code("5.6.3-9-1", "SCPECG", "Lead I (Einthoven)"),
    "aVR": code("", "", "AVR"),
    "V1": code("", "", "lead v1"),
  }
  for sources in (mdc, scp, text, vendor):
    path = dicom(tmp_path / "a.dcm", multiplex(leads, sources=sources))
    np.testing.assert_allclose(readers.read_ecg(path).ecg_mv, stacked(leads), atol=0.00126)
  inverse = {"aVR": code("2:65", "MDC", "-aVR")}  # the Cabrera lead is not aVR: derived instead
  recording = readers.read_ecg(
    dicom(tmp_path / "a.dcm", multiplex(leads | {"aVR": -leads["aVR"]}, sources=inverse))
  )
  assert recording.flags == ("limb leads derived",)
  np.testing.assert_allclose(recording.ecg_mv, stacked(leads), atol=0.003)
  contrary = multiplex(leads, sources={"V1": code("2:4", "MDC", "Lead V1")})
  rejects(dicom(tmp_path / "a.dcm", contrary), "coded as lead V2 and named V1")


def test_the_longest_group_that_is_an_ecg(tmp_path):
  leads, beat = heart(), heart(1.2, seed=1)
  eight = {name: lead for name, lead in heart(12, seed=2).items() if name in INDEPENDENT}
  limb = {name: lead for name, lead in heart(30, seed=3).items() if name in LEADS[:6]}
  median, rhythm = multiplex(beat, label="MEDIAN BEAT"), multiplex(leads)
  path = dicom(tmp_path / "a.dcm", median, multiplex(limb), rhythm)
  np.testing.assert_allclose(readers.read_ecg(path).ecg_mv, stacked(leads), atol=0.00126)
  recording = readers.read_ecg(dicom(tmp_path / "a.dcm", rhythm, multiplex(eight)))
  assert recording.ecg_mv.shape == (12, 6000) and recording.flags == (
    "12.0 s long",
    "limb leads derived",
  )
  rejects(dicom(tmp_path / "a.dcm", median, multiplex(limb)), "none of its 2 multiplex groups")


@pytest.mark.parametrize("unit,factor", [("uV", 1), ("mV", 1000), ("V", 1e6), ("nV", 1e-3)])
def test_sensitivity_unit_correction_and_baseline(tmp_path, unit, factor):
  leads = heart()
  group = multiplex(
    leads,
    ChannelSensitivityUnitsSequence=code(unit, "UCUM", ""),
    ChannelBaseline=f"{12 / factor:.6g}",
    ChannelSensitivity=f"{1.25 / factor:.6g}",
    ChannelSensitivityCorrectionFactor="2",
  )
  found = readers.read_ecg(dicom(tmp_path / "a.dcm", group)).ecg_mv
  np.testing.assert_allclose(found, stacked(leads) + 0.012, atol=0.00126)


def padded(leads, value, change=lambda units: None, dtype="<i2", **options):
  """A multiplex group with `value` (bytes) as its padding, its samples [T, L] after `change`."""
  group = multiplex(leads, dtype=dtype, **options)
  units = np.frombuffer(group.WaveformData, dtype).reshape(-1, len(leads)).copy()
  change(units)
  group.WaveformData = units.tobytes()
  group.add_new("WaveformPaddingValue", "OB" if dtype.endswith("1") else "OW", value)
  return group


def put(value, frames, channels=slice(None)):
  def change(units):
    units[frames, channels] = value

  return change


@pytest.mark.reported("a DICOM padding value of 0, or of too many bytes, made true samples missing")
@pytest.mark.parametrize(
  "dtype,value",
  [
    ("<i2", b"\0\0"),
    ("<i2", b"\0\0\0\0"),
    ("<i2", b"\x00\x80\xff\xff"),
    ("<i2", b"\x80\x00"),
    ("<i2", b"\x02\x00"),
    ("<i4", b"\0\0\0\0"),
    ("<i4", b"\x00\x80"),
    ("<u2", b"\0\0"),
    ("<u2", b"\x88\x13"),
    ("<i1", b"\0\0"),
    ("<u1", b"\x80\x80"),
  ],
)
def test_a_padding_value_in_the_signals_range_makes_nothing_missing(tmp_path, dtype, value):
  # of unsigned samples the baseline takes off what was added
  zero = {"<u2": 5000, "<u1": 128}.get(dtype, 0)
  uv = {1: 20, 2: 2.5, 4: 2.5}[np.dtype(dtype).itemsize]
  leads = {name: lead / uv * 2.5 + zero * 0.0025 for name, lead in heart().items()}
  group = multiplex(
    leads, dtype=dtype, ChannelSensitivity=f"{uv:g}", ChannelBaseline=f"{-uv * zero:g}"
  )
  plain = readers.read_ecg(dicom(tmp_path / "a.dcm", group))
  group.add_new("WaveformPaddingValue", "OW", value)
  recording = readers.read_ecg(dicom(tmp_path / "a.dcm", group))
  np.testing.assert_array_equal(recording.ecg_mv, plain.ecg_mv)
  assert recording.flags == plain.flags


@pytest.mark.parametrize(
  "dtype,value,number",
  [
    ("<i2", b"\x00\x80", -32768),
    ("<i2", b"\x00\x80\x00\x80", -32768),
    ("<i2", b"\0\0", 0),
    ("<i4", b"\x00\x00\x00\x80", -(2**31)),
    ("<i4", b"\xff\xff", -1),
  ],
)
def test_padding_is_missing(tmp_path, dtype, value, number):
  leads = heart()

  def read(*where):
    return readers.read_ecg(
      dicom(tmp_path / "a.dcm", padded(leads, value, put(number, *where), dtype))
    )

  for frames in (slice(0, 20), slice(-20, None)):  # the ends of a channel
    recording = read(frames, 3)
    assert "III: 20 missing samples interpolated".replace("III", list(leads)[3]) in recording.flags
    assert np.abs(recording.ecg_mv).max() < 2
  recording = read(slice(2000, 2010))  # frames of all channels
  assert {f"{name}: 10 missing samples interpolated" for name in LEADS} == set(recording.flags)
  np.testing.assert_allclose(
    np.delete(recording.ecg_mv, np.s_[2000:2010], 1),
    np.delete(stacked(leads), np.s_[2000:2010], 1),
    atol=0.00126,
  )
  if number < -1:  # no sample of this signal
    assert f"{list(leads)[3]}: 10 missing samples interpolated" in read(slice(100, 110), 3).flags
  rejects(
    dicom(tmp_path / "a.dcm", padded(leads, value, put(number, slice(-1000, None)), dtype)),
    "8.00 s long without 2.00 s",
  )
  rejects(
    dicom(tmp_path / "a.dcm", padded(leads, value, put(number, slice(-1000, None), 7), dtype)),
    "1000 of 5000",
  )
  leads = heart(13)
  assert read(slice(0, 1000)).flags == ("13.0 s long", "2.0 s of constant padding cut off")


def altered(key, value):
  group = multiplex(heart())
  setattr(group, key, value)
  return group


@pytest.mark.parametrize(
  "key,value,word",
  [
    ("NumberOfWaveformSamples", 2**32 - 1, "take 103079215080"),
    ("NumberOfWaveformSamples", 5001, "take 120024"),
    ("NumberOfWaveformSamples", 0, "0 samples"),
    ("NumberOfWaveformChannels", 11, "11 channels and defines 12"),
    ("NumberOfWaveformChannels", 65535, "65535 channels"),
    ("SamplingFrequency", "0", "pydicom cannot read it"),
    ("SamplingFrequency", "-500", "-500 Hz"),
    ("WaveformBitsAllocated", 24, "8, 16 or 32 bits"),
    ("WaveformSampleInterpretation", "AB", "8, 16 or 32 bits"),
    ("WaveformData", b"", "0 bytes"),
    ("ChannelDefinitionSequence", pydicom.Sequence(), "none of its 1"),
  ],
)
def test_sizes_are_compared_before_memory_is_taken(tmp_path, key, value, word):
  rejects(dicom(tmp_path / "a.dcm", altered(key, value)), word)


@pytest.mark.parametrize(
  "key,value,word",
  [
    ("ChannelSensitivityUnitsSequence", code("mm[Hg]", "UCUM", ""), "mm[Hg]"),
    ("ChannelSensitivityUnitsSequence", pydicom.Sequence(), "not calibrated"),
    ("ChannelSensitivity", None, "not calibrated"),
    ("ChannelSampleSkew", "3", "shifted in time"),
    ("ChannelTimeSkew", "0.01", "shifted in time"),
    ("ChannelBaseline", "1e308", ""),
    ("ChannelSensitivity", "9999", "gain and unit"),
  ],
)
def test_faults_of_channels(tmp_path, key, value, word):
  rejects(dicom(tmp_path / "a.dcm", multiplex(heart(), **{key: value})), word)


def test_other_dicom_files(tmp_path):
  group = multiplex(heart())
  del group.SamplingFrequency
  rejects(dicom(tmp_path / "a.dcm", multiplex(heart()), group), "group 2 lacks SamplingFrequency")
  rejects(dicom(tmp_path / "a.dcm"), "without waveforms")
  rejects(dicom(tmp_path / "a.dcm", syntax=ExplicitVRBigEndian), "big-endian")
  (tmp_path / "b.dcm").write_bytes(b"junk")
  rejects(tmp_path / "b.dcm", "pydicom cannot read it")


def test_deflated_dicom_is_not_inflated(tmp_path, monkeypatch):
  """256 MiB of zeros packed in 0.3 MB."""
  path = dicom(tmp_path / "a.dcm", multiplex(heart()), syntax=DeflatedExplicitVRLittleEndian)
  data = path.read_bytes()
  meta = data[: 144 + struct.unpack("<I", data[140:144])[0]]
  squeeze = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
  path.write_bytes(
    meta + b"".join(squeeze.compress(bytes(2**24)) for _ in range(16)) + squeeze.flush()
  )
  monkeypatch.setattr(zlib, "decompress", None)
  rejects(path, "compressed")


def test_recording_of_pydicom():
  path = get_testdata_file("waveform_ecg.dcm", download=False)
  if not path:
    pytest.skip("pydicom came without its recordings")
  recording = readers.read_ecg(path)
  expected = pydicom.dcmread(path).waveform_array(0).T / 1000  # pydicom's own calibration, in uV
  # flags would tell of Einthoven's rule broken
  assert recording.rate_hz == 1000 and recording.flags == ()
  np.testing.assert_allclose(recording.ecg_mv, expected, atol=1e-6)


# Arrays


def write_csv(path, leads, digits=5, time=True):
  table = np.stack(
    [np.arange(len(next(iter(leads.values())))) / 500] * time + list(leads.values()), axis=1
  )
  header = ",".join(["time"] * time + list(leads))
  np.savetxt(path, table, delimiter=",", header=header, comments="", fmt=f"%.{digits}f")
  return path


def declare(folder, name="ecg.json", **what):
  (folder / name).write_text(json.dumps({"rate_hz": 500} | what))


def test_csv(tmp_path):
  leads = heart()
  shuffled = {name.lower(): leads[name] for name in sorted(leads)} | {"Resp": leads["I"]}
  path = write_csv(tmp_path / "a.csv", shuffled)
  recording = array_ecg.read(path, 500)
  assert recording.rate_hz == 500 and recording.flags == ()
  np.testing.assert_allclose(recording.ecg_mv, stacked(leads), atol=1e-5)
  declare(tmp_path, "a.json", unit="uV")
  np.testing.assert_allclose(
    readers.read_ecg(write_csv(path, {n: 1000 * v for n, v in leads.items()}, 2)).ecg_mv,
    stacked(leads),
    atol=1e-5,
  )


def test_cells_of_a_csv(tmp_path):
  leads = heart()
  lines = write_csv(tmp_path / "a.csv", leads).read_text().splitlines()

  def read(*changed):
    (tmp_path / "a.csv").write_text("\r\n".join(changed) + "\r\n", encoding="utf-8-sig")
    return array_ecg.read(tmp_path / "a.csv", 500)

  dated = [lines[0].replace("time", '"time, s"')] + [
    '"12:30, 1st"' + line[line.index(",") :] for line in lines[1:]
  ]
  np.testing.assert_allclose(read(*dated).ecg_mv, stacked(leads), atol=1e-5)
  assert (
    read(*lines[:9], "0.016" + "," * 12, *lines[10:]).flags[0]
    == "I: 1 missing samples interpolated"
  )
  for changed, word in (
    (lines[1:], "names no lead"),
    ([lines[0].partition(",")[2]] + lines[1:], "12 cells, the row below 13"),
    (lines[:1], "cells"),
    (lines[:5] + [lines[5].replace(".", "x")] + lines[6:], "not a number"),
    (lines[:5] + [lines[5] + ",1"] + lines[6:], "differ in length"),
    ([lines[0].replace("V1", "II")] + lines[1:], "II occurs"),
    (["a," * 40_000], "more than 65536 characters"),
    ([lines[0].replace("time", '"time')] + lines[1:], "Error"),
  ):
    with pytest.raises(BadRecord, match=word):
      read(*changed)


@pytest.mark.parametrize(
  "dtype,unit,scale",
  [("<f4", "mV", 1), (">f8", "V", 1e-3), ("<i2", "uV", 1000), ("<i4", "nV", 1e6)],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_npy(tmp_path, dtype, unit, scale, transposed):
  leads = heart()
  values = (scale * np.stack(list(leads.values()))).astype(dtype)
  np.save(tmp_path / "a.npy", values.T if transposed else values)
  declare(tmp_path, leads=list(leads), unit=unit)
  recording = readers.read_ecg(tmp_path / "a.npy")
  assert recording.rate_hz == 500 and recording.flags == () and recording.ecg_mv.dtype == np.float32
  np.testing.assert_allclose(recording.ecg_mv, stacked(leads), atol=0.0011)


def test_long_arrays_are_read_in_part(tmp_path):
  lead = np.arange(2, 10)[:, None] * np.sin(np.arange(130_000) / 50)
  np.save(tmp_path / "a.npy", lead)
  write_csv(tmp_path / "b.csv", dict(zip(INDEPENDENT, lead)), digits=3, time=False)
  for path, leads in ((tmp_path / "a.npy", INDEPENDENT), (tmp_path / "b.csv", None)):
    recording = array_ecg.read(path, 1000, leads)
    assert recording.ecg_mv.shape == (12, 120_000) and recording.flags[0] == "130.0 s long"


@pytest.mark.reported("an array of 7.3 s in zeros was read as one of 10 s")
def test_zeros_around_an_array_are_cut_off(tmp_path):
  """As CODE-15 % has it: 4,096 samples at 400 Hz, zeros at both ends; some of its recordings last
  10 s, others 7.3 s."""
  for seconds, flags in ((10, ("10.2 s long",)), (7.3, None)):
    leads, array = heart(seconds, 400), np.zeros((4096, 12), np.float32)
    start = (4096 - len(leads["I"])) // 2
    array[start : start + len(leads["I"])] = stacked(leads).T
    np.save(tmp_path / "a.npy", array)
    declare(tmp_path, rate_hz=400, leads=list(LEADS))
    write_csv(tmp_path / "a.csv", dict(zip(LEADS, array.T)))
    for path in (tmp_path / "a.npy", tmp_path / "a.csv"):
      if flags:
        assert readers.read_ecg(path).flags == flags
      else:
        rejects(path, "7.30 s long without 2.94 s of constant padding")


@pytest.mark.reported("zeros that fill up a strip counted as ECG")
def test_zeros_in_a_strip_are_cut_off(xml):
  short = {name: np.where(np.arange(5000) < 4000, lead, 0) for name, lead in counts().items()}
  rejects(xml(data=cardiosoft(short)), "8.00 s long without 2.00 s of constant padding")


def test_what_is_declared(tmp_path):
  """The file's own sidecar comes before its folder's; without either the reason says what to
  add."""
  leads = heart()
  np.save(tmp_path / "a.npy", np.stack(list(leads.values())))
  rejects(
    tmp_path / "a.npy", '{"rate_hz": 500, "leads": ["I", "II", ...], "unit": "mV"}', "ecg.json"
  )
  rejects(write_csv(tmp_path / "b.csv", leads), "rate_hz")
  declare(tmp_path, rate_hz=250, leads=list(leads))
  assert readers.read_ecg(tmp_path / "a.npy").rate_hz == 250
  for what, word in (
    ({"rate_hz": 400, "leads": list(leads)}, ""),
    ({"leads": ["I"]}, "expected integers or floats [1, samples]"),
    ({}, "list of its leads"),
    ({"leads": "I"}, "not a list of names"),
    ({"leads": [1] * 12}, "not a list of names"),
    ({"leads": ["I"] * 12}, "I occurs twice"),
    ({"leads": list(leads), "unit": "mmHg"}, "mmHg"),
    ({"leads": list(leads), "unit": 7}, "expected one of"),
    ({"rate": 1}, "other keys"),
    *(
      ({"rate_hz": rate, "leads": list(leads)}, word)
      for rate, word in (
        ("500", "rate_hz"),
        (True, "rate_hz"),
        (-1, "rate_hz"),
        (0, "rate_hz"),
        (None, "rate_hz"),
        (10**400, ""),
      )
    ),
  ):
    declare(tmp_path, "a.json", **what)
    if what.get("rate_hz") == 400:
      assert readers.read_ecg(tmp_path / "a.npy").rate_hz == 400
    else:
      rejects(tmp_path / "a.npy", word)
  for text in ("", "[]", "{", "[" * 9999, '{"rate_hz": NaN}', " " * 99999, '"\udfff"'):
    (tmp_path / "a.json").write_text(text, errors="surrogatepass")
    rejects(tmp_path / "a.npy")
  (tmp_path / "a.json").write_text('{"rate_hz": 500,}')
  rejects(tmp_path / "a.npy", "its sidecar is no JSON; expected")
  declare(tmp_path, "a.json", rate_hz=0.5, leads=list(leads))  # kHz
  rejects(tmp_path / "a.npy", "sampled at 0.5 Hz; expected 50 to 20000")


@pytest.mark.reported("CSVs in gzip, in UTF-16 or with semicolons were not read")
@pytest.mark.parametrize(
  "mark,decimal", [(",", "."), (";", "."), (";", ","), ("\t", ","), ("\t", ".")]
)
@pytest.mark.parametrize(
  "pack",
  [
    str.encode,
    lambda text: text.encode("utf-16"),
    lambda text: gzip.compress(text.encode()),
    lambda text: gzip.compress(b"\xef\xbb\xbf" + text.encode()),
  ],
)
def test_spellings_of_a_csv(tmp_path, mark, decimal, pack):
  leads = heart()
  text = write_csv(tmp_path / "a.csv", leads).read_text().replace(",", mark).replace(".", decimal)
  lines = text.splitlines()
  lines[1] = mark.join(["0"] + lines[1].split(mark)[1:])  # a whole number
  path = tmp_path / "b.csv.gz"
  path.write_bytes(pack("\n".join(lines)))
  declare(tmp_path, "b.json")
  assert readers.find_ecg(tmp_path) == ([path], {".csv without a .json": 1})
  np.testing.assert_allclose(readers.read_ecg(path).ecg_mv, stacked(leads), atol=1e-5)


def test_a_gzip_that_is_cut_or_expands_without_end(tmp_path):
  packed = gzip.compress(write_csv(tmp_path / "a.csv", heart()).read_bytes())
  declare(tmp_path)
  for data, words in (
    (packed[:-1000], "damaged or cut short"),
    (packed[:9], "damaged or cut short"),
    (gzip.compress(bytes(70 * 2**20)), "bytes unpacked"),
    (gzip.compress(b"%PDF-1.4"), "a PDF"),
  ):
    (tmp_path / "a.csv").write_bytes(data)
    rejects(tmp_path / "a.csv", words)


@pytest.mark.reported(
  "the leads that a CSV's .json declares had no effect, and a CSV without a header row was refused"
)
def test_declared_leads_of_a_csv(tmp_path):
  leads, path = heart(), tmp_path / "a.csv"
  names = list(leads)

  def read(lines, **what):
    path.write_text("\n".join(lines) + "\n")
    declare(tmp_path, **what)
    return readers.read_ecg(path)

  plain = write_csv(path, leads, time=False).read_text().splitlines()
  timed = write_csv(path, leads).read_text().splitlines()
  dated = [f"12:30,{line}" for line in plain[1:]]
  numbers = [",".join(map(str, range(12)))] + plain[1:]
  channels = [",".join(f"ch{n}" for n in range(1, 13))] + plain[1:]
  for lines, declared in (
    (plain[1:], names),
    (numbers, names),
    (channels, names),
    (plain, names),
    (timed, names),
    (timed, ["time", *names]),
    (timed[1:], ["t", *names]),
    (dated, ["t", *names]),
  ):
    recording = read(lines, leads=declared)
    assert recording.flags == () and recording.ecg_mv.shape == (12, 5000)
    np.testing.assert_allclose(recording.ecg_mv, stacked(leads), atol=1e-5)
  swapped = ["II", "I", *(name for name in names if name not in ("I", "II"))]
  for lines, declared, words in (
    (plain[1:], None, "leads in its .json"),
    (plain, swapped, "differ (I, II, V1"),
    (timed, swapped, "differ"),
    (timed, ["V6"], "no lead I"),
    (timed[1:], names, "12 and its columns 13"),
    (plain[1:], names[:-1], "11 and its columns 12"),
    (channels, None, "it has ch1, ch2"),
  ):
    with pytest.raises(BadRecord) as caught:
      read(lines, **{"leads": declared} if declared else {})
    assert words in str(caught.value)


def npy_header(shape, dtype="<f8"):
  text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
  return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


class Trap:
  def __reduce__(self):
    return os.mkdir, ("sprung",)


@pytest.mark.parametrize(
  "content",
  [
    npy_header((12, 10**12)),
    npy_header((12, 2**61)),
    npy_header((2**32, 2**32, 12)),
    npy_header((12, -5000)),
    npy_header((12, 5000)),
    npy_header((12,)),
    npy_header((12, 5000), "O") + pickle.dumps(Trap()),
    npy_header("().__class__"),
    npy_header("(" * 5000),
    pickle.dumps(Trap()),
    b"PK\x03\x04",
    b"",
    npy_header((12, 4), "<U1") + b"1\0\0\0" * 48,
    npy_header((12, 1), "?") + bytes(12),
    npy_header((12, 1), "<c8") + bytes(96),
  ],
)
def test_hostile_npy(tmp_path, monkeypatch, content):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a.npy").write_bytes(content)
  declare(tmp_path, leads=list(LEADS))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of products that overflow
    rejects(tmp_path / "a.npy")
  assert sorted(os.listdir(tmp_path)) == ["a.npy", "ecg.json"]


# Any file


def test_dispatch(tmp_path):
  leads = heart()
  header = record(tmp_path, leads, name="a")
  scan = dicom(tmp_path / "IM0001", multiplex(leads))  # DICOM files often have no suffix
  (tmp_path / "C.XML").write_bytes(VALID_XML)
  for path in (header, header.with_suffix(""), str(header.with_suffix(".dat")), scan):
    np.testing.assert_allclose(readers.read_ecg(path).ecg_mv, stacked(leads), atol=0.00126)
  assert readers.read_ecg(tmp_path / "C.XML").ecg_mv.shape == (12, 5000)
  (tmp_path / "note.txt").write_text("hello")
  rejects(tmp_path / "note.txt", "another kind of file; expected WFDB")
  assert (
    readers.ecg_file(header.with_suffix(".dat"))
    == readers.ecg_file(header.with_suffix(""))
    == header
  )
  assert (
    readers.ecg_file(tmp_path / "C.XML") == tmp_path / "C.XML" and readers.ecg_file(scan) == scan
  )


def test_stems():
  """mmcl generate names folders by them: of DICOM's own names none is a suffix."""
  for name, stem in (
    ("a.hea", "a"),
    ("A.DCM", "A"),
    ("b.csv.gz", "b"),
    ("1.2.840.10008.5", "1.2.840.10008.5"),
    ("IM1", "IM1"),
    ("c.d.xml", "c.d"),
  ):
    assert readers.stem(f"folder.x/{name}") == stem


def test_find_ecg(tmp_path):
  for name in (
    "b/x.hea",
    "b/x.dat",
    "b/x.mat",
    "a.xml",
    "c.DCM",
    "t.csv",
    "t.npy",
    "d/e.csv",
    "d/e.json",
    "d/f.npy",
    "g/h.npy",
    "g/ecg.json",
    "z.txt",
  ):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  found, others = readers.find_ecg(tmp_path)
  assert [str(path.relative_to(tmp_path)) for path in found] == [
    "a.xml",
    "b/x.hea",
    "c.DCM",
    "d/e.csv",
    "g/h.npy",
  ]
  assert others == {".csv without a .json": 1, ".npy without a .json": 2, ".txt": 1}


@pytest.mark.reported(
  "DICOM ECGs without a suffix were passed over in folders, and nothing said what was passed over"
)
def test_every_file_of_a_folder_is_a_recording_belongs_to_one_or_is_counted(tmp_path):
  leads = heart()
  scan = dicom(tmp_path / "IM000001", multiplex(leads)).read_bytes()
  recordings = {"IM000001", "1.2.840.10008.5", "old/a.hea", "old/lost.dat", "table.csv", "export"}
  for name in ("1.2.840.10008.5", "old/lost.dat", ".git/annex/objects/x.dcm"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(scan)
  (tmp_path / "export").write_bytes(VALID_XML)
  record(tmp_path / "old", leads, name="a")
  (tmp_path / "old/a.atr").write_bytes(b"notes of beats")
  write_csv(tmp_path / "table.csv", leads)
  declare(tmp_path, "table.JSON")
  others = {
    "a.scp": b"",
    "b.edf": b"0       ",
    "c.edf": b"",
    "d.csv": b"1,2",
    "e.mat": b"MATLAB 5.0 MAT-file",
    "DICOM": b"",
    "README": b"read me",
    "report": b"%PDF-1.4",
    "._IM000001": b"\x00\x05\x16\x07",
    "1.2.3.4": b"junk",
    "f.json": b"{}",
  }
  for name, content in others.items():
    (tmp_path / name).write_bytes(content)
  os.symlink(tmp_path / "old", tmp_path / "door")
  os.symlink(tmp_path / "nowhere", tmp_path / "broken")
  found, counted = readers.find_ecg(tmp_path)
  assert {str(path.relative_to(tmp_path)) for path in found} == recordings
  assert counted == {
    ".scp": 1,
    ".edf": 2,
    ".csv without a .json": 1,
    ".mat without a .hea": 1,
    "empty": 1,
    "without a suffix": 2,
    "PDF": 1,
    "macOS ._": 1,
    ".json": 1,
    "links to folders": 1,
    "no regular file": 1,
  }
  assert readers.listing(counted).endswith(", ...") and ".edf 2, " in readers.listing(counted)
  for path in found:
    np.testing.assert_allclose(
      readers.read_ecg(path).ecg_mv,
      0.005 * stacked(counts()) if path.name == "export" else stacked(leads),
      atol=0.00126,
    )


@pytest.mark.reported("a folder without ECGs was told that a WFDB header is expected")
@pytest.mark.parametrize(
  "names,found",
  [
    ((), "nothing"),
    (("a.csv", "b.csv", "x.txt"), ".csv without a .json 2, .txt 1"),
    (("A0001.mat",), ".mat without a .hea 1"),
    (("a.scp", "b.scp"), ".scp 2"),
  ],
)
def test_a_folder_without_ecgs(tmp_path, names, found):
  for name in names:
    (tmp_path / name).write_text("x")
  rejects(
    tmp_path,
    f"no ECG in this folder; found {found}; it reads WFDB (.hea with .dat or .mat), GE CardioSoft "
    "XML, "
    "DICOM, and CSV or NPY with a .json",
  )


KINDS = {
  "a GE MUSE XML file, which is not read": b'<?xml version="1.0"?>\n<!DOCTYPE RestingECG SYSTEM "restecg.dtd">\n<RestingECG>',
  "a Philips Sierra XML file": '<?xml version="1.0" encoding="utf-16"?><restingecgdata xmlns="x">'.encode(
    "utf-16"
  ),
  "an HL7 aECG XML file": b"<!-- of <RestingECG> -->\n<ns:AnnotatedECG>",
  "an XML file whose root is plist": b"\xef\xbb\xbf<plist/>",
  "an HTML page": b"<!DOCTYPE html>\n<HTML>",
  "a Git LFS pointer, without the file itself: git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
  "a git-annex pointer": b"/annex/objects/MD5E-s1--0.dcm\n",
  "a macOS AppleDouble file": b"\x00\x05\x16\x07\x00\x02\x00\x00",
  "a zip": b"PK\x03\x04" + bytes(40),
  "an Excel or other Office file": b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml",
  "an HDF5 file": b"\x89HDF\r\n\x1a\n",
  "a PDF": b"%PDF-1.7",
  "a PNG image": b"\x89PNG\r\n",
  "an empty file": b"",
  "an SCP-ECG file": bytes(16) + b"SCPECG" + bytes(9),
  "an EDF file": b"0       " + b" " * 160 + b"01.01.85",
  "a MATLAB 5 file": b"MATLAB 5.0 MAT-file, made",
  "a text in UTF-16": "I,II".encode("utf-16"),
}


@pytest.mark.reported(
  "MUSE, Sierra, aECG, SCP, EDF, Git LFS pointers, ._ files and zips were refused without saying "
  "what they are"
)
@pytest.mark.parametrize("kind", KINDS)
def test_reasons_name_what_was_found(tmp_path, kind):
  """By whatever name and reader."""
  declare(tmp_path, leads=list(LEADS))
  for name, read in (
    ("a", readers.read_ecg),
    ("a.ecg", readers.read_ecg),
    ("a.xml", ukb_ecg_xml.read),
    ("a.dcm", dicom_ecg.read),
    ("a.hea", wfdb.read),
    ("a.csv", array_ecg.read),
    ("a.npy", array_ecg.read),
  ):
    (tmp_path / name).write_bytes(KINDS[kind])
    if kind == "a text in UTF-16" and name in ("a.hea", "a.csv"):
      rejects(tmp_path / name, read=read)
    else:
      rejects(tmp_path / name, kind, "; expected ", read=read)
      rejects(tmp_path / name, kind, "; expected ")


@pytest.mark.parametrize(
  "read,kind",
  [
    (nifti.read, "a NIfTI file"),
    (ukb_cmr_dicom.read, "a zip"),
    (mmcl_pt.load, "a file of torch"),
    (wfdb.read, "a file of samples"),
  ],
)
def test_pointers_in_place_of_files_are_named_by_every_reader(tmp_path, read, kind):
  header, _ = cinc(tmp_path)
  header.with_suffix(".mat").write_bytes(
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
  )
  rejects(
    header if read is wfdb.read else header.with_suffix(".mat"),
    "a Git LFS pointer",
    f"expected {kind}",
    read=read,
  )


@pytest.mark.skipif(not REAL.exists(), reason="no real recordings here")
def test_real_files_of_other_formats_are_named():
  found = {}
  for path in sorted(REAL.glob("*_*/*.xml")):
    try:
      readers.read_ecg(path)
    except BadRecord as error:
      found[path.name] = str(error).partition(" XML file")[0]
  assert found == {
    "subject1_0.xml": "an HL7 aECG",
    "synthetic_muse.xml": "a GE MUSE",
    "sierra_1_03.xml": "a Philips Sierra",
    "sierra_1_04.xml": "a Philips Sierra",
  }


@pytest.mark.parametrize("suffix", [".hea", ".mat", "", ".xml", ".dcm", ".csv", ".npy"])
def test_folders_pipes_and_broken_links(tmp_path, suffix):
  """None is opened: reading a pipe would wait for ever."""
  declare(tmp_path, leads=list(LEADS))
  (tmp_path / "folder").mkdir()
  os.mkfifo(tmp_path / f"pipe{suffix}")
  os.symlink(tmp_path / f"pipe{suffix}", tmp_path / f"link{suffix}")
  os.symlink(tmp_path / "folder", tmp_path / f"door{suffix}")
  os.symlink(tmp_path / f"loop{suffix}", tmp_path / f"loop{suffix}")
  os.symlink(tmp_path / ".git/annex/objects/x", tmp_path / f"annex{suffix}")
  words = {
    "pipe": "no regular file",
    "link": "no regular file",
    "door": "no ECG in this folder",
    "absent": "no such file",
    "loop": "a link to a file that is not there",
    "annex": "datalad get",
  }
  for name, word in words.items():
    rejects(tmp_path / f"{name}{suffix}", *([] if suffix == ".mat" and name != "door" else [word]))


@pytest.mark.reported(
  "recordings staged by links, as DataLad, Snakemake and Nextflow do, were refused"
)
@pytest.mark.parametrize("suffix", [".hea", ".xml", ".dcm", ".csv", ".npy"])
def test_links_lead_to_recordings(tmp_path, suffix, valid):
  folder = valid[suffix][0].parent
  for file in folder.iterdir():
    if file.stem == valid[suffix][0].stem:
      os.symlink(file, tmp_path / file.name)
  (found,) = [path for path in readers.find_ecg(tmp_path)[0] if path.suffix == suffix]
  np.testing.assert_array_equal(
    readers.read_ecg(found).ecg_mv, readers.read_ecg(valid[suffix][0]).ecg_mv
  )


def valid_files(folder):
  """{suffix: (path, valid bytes)}, as small as the readers take them."""
  leads = heart()
  record(folder, leads, name="a")
  (folder / "a.xml").write_bytes(
    cardiosoft(full=counts(1), median={n: v[:600] for n, v in counts(2).items()})
  )
  dicom(folder / "a.dcm", multiplex(leads))
  write_csv(folder / "b.csv", {name: leads[name][:300] for name in INDEPENDENT}, digits=3)
  np.save(folder / "c.npy", np.stack([leads[name] for name in INDEPENDENT]))
  declare(folder, "b.json")
  declare(folder, "c.json", leads=list(INDEPENDENT))
  paths = [folder / name for name in ("a.hea", "a.xml", "a.dcm", "b.csv", "c.npy")]
  return {path.suffix: (path, path.read_bytes()) for path in paths}


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
  return valid_files(tmp_path_factory.mktemp("fuzz"))


EDITS = strategies.lists(
  strategies.tuples(
    strategies.floats(0, 1),
    strategies.sampled_from([0, 0, 1, 1, 4, 50]),
    strategies.sampled_from(
      [b"", b"-", b"9" * 12, b"/", b"<", b"&", b",", b"\n", b"\x00", b"\xff\xff\xff\xff", b"nan"]
    )
    | strategies.binary(max_size=4),
  ),
  min_size=1,
  max_size=6,
)


@pytest.mark.parametrize(
  "suffix,head", [(".hea", 900), (".xml", 2500), (".dcm", 6000), (".csv", 200), (".npy", 128)]
)
def test_only_bad_record_escapes_damaged_files(valid, suffix, head):
  """Half of the edits hit the head, where the structure is; the others hit anything."""
  path, whole = valid[suffix]
  outcomes = []
  xml_readings = [
    ukb_ecg_xml.read_median,
    ukb_ecg_xml.read_full_disclosure,
    ukb_ecg_xml.measurements,
  ]
  readings = [readers.read_ecg] + {".xml": xml_readings, ".hea": [wfdb.comments]}.get(suffix, [])

  @hypothesis.settings(max_examples=80, deadline=None, derandomize=True, database=None)
  @hypothesis.given(EDITS, strategies.booleans())
  def damage(edits, anywhere):
    data = bytearray(whole)
    for where, length, new in edits:
      at = int(where * (len(data) if anywhere else min(head, len(data))))
      data[at : at + length] = new
    path.write_bytes(data)
    for read in readings:
      try:
        found = read(path)
      except BadRecord as error:
        assert "\n" not in str(error) and not any(secret in str(error) for secret in PERSON)
        outcomes.append(False)
      else:
        outcomes.append(True)
        if read == readers.read_ecg:
          assert found.ecg_mv.shape[0] == 12 and np.isfinite(found.ecg_mv).all()

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    damage()
  path.write_bytes(whole)
  # else the damage is too weak or too strong to tell anything
  assert any(outcomes) and not all(outcomes)
