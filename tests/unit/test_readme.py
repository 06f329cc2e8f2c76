"""The first pages are short, and what they and the documents link to exists."""

import re

import pytest

from common import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_the_first_pages_are_short():
  readme = (ROOT / "README.md").read_text()
  assert len(readme.encode()) <= 6000 and len(readme.splitlines()) <= 120
  assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_leads_to_a_file_and_a_heading(page):
  """Headings as GitHub and the site name them: lower case, hyphens, no punctuation."""
  for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
    path, _, heading = link.partition("#")
    if link.startswith("https://"):
      continue
    target = page.parent / path if path else page
    assert target.is_file(), link
    if page.parent.name == "docs":  # the site has these pages only
      assert target.parent.resolve() == page.parent, link
    if heading:
      titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
      names = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
      assert heading in names, link


def test_every_page_is_in_the_navigation_of_the_site():
  navigation = (ROOT / "mkdocs.yml").read_text().split("nav:")[1].split("plugins:")[0]
  assert set(re.findall(r"(\w+\.md)", navigation)) == {page.name for page in ROOT.glob("docs/*.md")}
