"""The report in a browser: no console error, nothing wider than the screen, nothing from the
network. Where a Chromium is installed (Debian: apt install chromium); the part that needs none runs
everywhere."""

import html.parser
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from mmcl_jax.evaluators.base import Table
from mmcl_jax.reports import report

CHROMIUM = next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  """A page with a wide table, a figure, a long path and a config."""
  figure = Figure(figsize=(9, 3))
  figure.subplots().plot([0, 1], [0, 1], "k")
  head = ["phenotype", *(f"column {i}" for i in range(12))]
  rows = [[f"name {k}", *["0.123 [0.100, 0.150]"] * 12] for k in range(20)]
  text = report.page(
    "Evaluation",
    ["A <note> & more"],
    {"workdir": "/a/very/long/path" * 12},
    [Table("Table", head, rows, "A note <below>")],
    [("R2", report.png(figure))],
    {"Config": {"key": "value " * 60}},
  )
  file = tmp_path_factory.mktemp("page") / "report.html"
  file.write_text(text, encoding="utf-8")
  return file


class Tags(html.parser.HTMLParser):
  """Open tags, which must close in turn, and whatever names an address."""

  def __init__(self):
    super().__init__()
    self.open, self.addresses = [], []

  def handle_starttag(self, tag, attrs):
    self.addresses += [
      value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")
    ]
    if tag not in ("meta", "img", "br", "link"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(page):
  text, tags = page.read_text(encoding="utf-8"), Tags()
  tags.feed(text)
  assert (
    not tags.open
    and len(tags.addresses) == 1
    and tags.addresses[0].startswith("data:image/png;base64,")
  )
  assert (
    "default-src 'none'" in text
    and not re.search(r"https?://|@import|url\(|<script", text)
    and "A &lt;note&gt; &amp; more" in text
    and "A note &lt;below&gt;" in text
  )


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on PATH; on Debian: apt install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_error_at_phone_and_desktop_width(page, tmp_path, width):
  def browse(file, *flags):
    command = [
      CHROMIUM,
      "--headless",
      "--no-sandbox",
      "--disable-gpu",
      f"--user-data-dir={tmp_path / 'profile'}",
      "--enable-logging=stderr",
      f"--window-size={width},844",
      *flags,
      file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr[-2000:]
    return done.stdout

  browse(page, f"--screenshot={tmp_path / 'shot.png'}")
  shot = imread(tmp_path / "shot.png")
  assert shot.shape[1] == width and np.ptp(shot[..., :3]) > 0.5  # not an empty page
  measured = tmp_path / "measured.html"  # the page says itself how wide it has become
  script = "<script>document.title = [document.documentElement.scrollWidth, window.innerWidth].join('/')</script></body>"
  text = page.read_text(encoding="utf-8").replace(
    "default-src 'none'", "default-src 'unsafe-inline'"
  )
  measured.write_text(text.replace("</body>", script), encoding="utf-8")
  wide, screen = map(int, re.search(r"<title>(\d+)/(\d+)", browse(measured, "--dump-dom")).groups())
  assert wide <= screen
