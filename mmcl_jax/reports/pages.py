"""Pages from the templates beside: HTML, one file each that loads nothing, and Markdown.

Every value of an HTML page is escaped; those of a Markdown page must come escaped. Unprintable
characters are blanks: names come from tables, cohorts and workdirs that a stranger may have made.
"""

import base64

import jinja2
from markupsafe import Markup

from mmcl_jax.errors import printable


def render(template: str, **values) -> str:
  """A template of this package's `templates` with its values."""
  return ENVIRONMENT.get_template(template).render(**values)


def is_html(template: str | None) -> bool:
  return template is None or not template.endswith(".md.j2")


def visible(value):
  """A value as it is shown, before it is escaped; Markup is of a template itself."""
  return value if isinstance(value, Markup) else printable(value)


def thousands(count: int) -> str:
  return f"{count:,}"


def data_uri(png: bytes) -> str:
  return f"data:image/png;base64,{base64.b64encode(png).decode()}"


ENVIRONMENT = jinja2.Environment(
  loader=jinja2.PackageLoader("mmcl_jax.reports"),
  autoescape=is_html,
  finalize=visible,
  trim_blocks=True,
  lstrip_blocks=True,
  keep_trailing_newline=True,
  undefined=jinja2.StrictUndefined,
)
ENVIRONMENT.filters |= {"thousands": thousands, "data_uri": data_uri}
