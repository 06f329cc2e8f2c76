"""What a file is, by its first bytes: so that a reason names what was found, and a suffix need not
tell the format."""

import re
from typing import NamedTuple

from mmcl_jax.errors import BadRecord

HEAD_BYTES = 4096  # as far as a file is looked at
BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16


class Kind(NamedTuple):
  """`name`: with its article; `advice`: added to a refusal."""

  name: str
  advice: str = "which is not read"


DICOM = Kind("a DICOM file", advice="")
CARDIOSOFT = Kind("a GE CardioSoft XML file", advice="")
NPY = Kind("a NumPy array (.npy)", advice="")
GZIP = Kind("a gzip file", advice="to be unpacked first")
PARQUET = Kind("a Parquet file")
UTF_16 = Kind("a text in UTF-16", advice="")
POINTERS = (
  Kind("a Git LFS pointer", advice="without the file itself: git lfs pull fetches it"),
  Kind("a git-annex pointer", advice="without the file itself: git annex get fetches it"),
)
POINTER_BYTES = 1024  # at most
SIGNATURES = (  # where they stand, the bytes, what begins so
  (128, b"DICM", DICOM),
  (0, b"\x93NUMPY", NPY),
  (0, b"version https://git-lfs", POINTERS[0]),
  (0, b"/annex/objects/", POINTERS[1]),
  (0, b"\x00\x05\x16\x07", Kind("a macOS AppleDouble file (._)", advice="which holds no ECG")),
  (0, b"\x1f\x8b", GZIP),
  (30, b"[Content_Types].xml", Kind("an Excel or other Office file")),
  (0, b"PK\x03\x04", Kind("a zip", advice="to be unpacked first")),
  (0, b"7z\xbc\xaf\x27\x1c", Kind("a 7z archive", advice="to be unpacked first")),
  (0, b"\x89HDF\r\n\x1a\n", Kind("an HDF5 file")),
  (0, b"MATLAB 5.0 MAT-file", Kind("a MATLAB 5 file")),
  (0, b"%PDF-", Kind("a PDF")),
  (0, b"\x89PNG", Kind("a PNG image")),
  (0, b"\xff\xd8\xff", Kind("a JPEG image")),
  (0, b"PAR1", PARQUET),
  (0, b"$FL2", Kind("an SPSS file")),
  (0, b"<stata_dta>", Kind("a Stata file")),
  (0, b"ISHNE1.0", Kind("an ISHNE Holter file")),
  (0, b"\xffBIOSEMI", Kind("a BDF file")),
  (16, b"SCPECG", Kind("an SCP-ECG file")),
)
EDF = re.compile(rb"0 {7}.{160}\d\d\.\d\d\.\d\d", re.DOTALL)  # version, patient and recording, date
ROOTS = {  # of XML, without the prefix of a namespace
  "CardiologyXML": CARDIOSOFT,
  "RestingECG": Kind("a GE MUSE XML file"),
  "restingecgdata": Kind("a Philips Sierra XML file"),
  "AnnotatedECG": Kind("an HL7 aECG XML file"),
  "html": Kind("an HTML page", advice="such as a login or an error in place of a download"),
}


def tell(head: bytes) -> Kind | None:
  """What a file is that begins with these bytes, of which HEAD_BYTES are enough; None where they do
  not tell."""
  head = head[:HEAD_BYTES]
  if not head:
    return Kind("an empty file", advice="")
  for at, signature, kind in SIGNATURES:
    if head.startswith(signature, at):
      return kind
  if EDF.match(head):
    return Kind("an EDF file")
  if head.startswith(BYTE_ORDER_MARKS):
    return _xml(head.decode("utf-16", "ignore")) or UTF_16
  return _xml(head.removeprefix(b"\xef\xbb\xbf").decode("latin-1"))


def expect(head: bytes, kind: str, *readable: Kind):
  """BadRecord where a file begins as something else that is known than `readable`; `kind` says what
  was expected."""
  actual = tell(head)
  if actual and actual not in readable:
    raise BadRecord(refusal(actual, kind))


def refusal(kind: Kind | None, expected: str) -> str:
  """Why a file of this kind is not read; None: of an unknown one."""
  if kind is None:
    return f"another kind of file; expected {expected}"
  advice = f", {kind.advice}" if kind.advice else ""
  return f"{kind.name}{advice}; expected {expected}"


def _xml(text):
  """The Kind of an XML text by its root element; None for other texts."""
  if not text.lstrip().startswith("<"):
    return None
  root = re.search(
    r"<(?:[A-Za-z_][\w.-]*:)?([A-Za-z_][\w.-]*)",
    re.sub(r"<!--.*?(?:-->|$)", "", text, flags=re.DOTALL),
  )
  if not root:
    return None
  name = root[1].lower() if root[1].lower() == "html" else root[1]
  return ROOTS.get(name) or Kind(f"an XML file whose root is {name[:40]}")
