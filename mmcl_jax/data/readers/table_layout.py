"""Which columns of a table of participants hold what: UK Biobank's in any of its styles, or the
general form's.

A slot is what one number is, of a person or of a visit. Phenotypes and diseases are slots too,
named as in the general form.
"""

import re
from collections import Counter
from typing import NamedTuple

from mmcl_jax.data import schema, ukb_fields as ukb, units
from mmcl_jax.data.readers import columns
from mmcl_jax.errors import UserError

IDS = ("eid", "participant.eid", "f.eid", "participant")  # the last: the general form
PERSON = {ukb.SEX: "sex", ukb.BIRTH_YEAR: "birth year", ukb.BIRTH_MONTH: "birth month"}
VISIT = {
  ukb.AGE: "age",
  ukb.HEIGHT[0]: "height",
  ukb.WEIGHT[0]: "weight",
  ukb.HEIGHT[1]: "height at the scanner",
  ukb.WEIGHT[1]: "weight at the scanner",
  ukb.VISIT_DATE: "date",
}
PHENOTYPES = {field: f"phenotype:{x.name}:{x.unit}" for field, x in ukb.CARDIAC.items()}
# whose plausible limits and published values go by name and unit
KNOWN = {x.name.lower(): x for x in ukb.CARDIAC.values()}


class Layout(NamedTuple):
  """Which columns of a file hold what."""

  id: str
  visit: str | None  # of the general form
  person: dict[str, str]  # slot -> column
  # visit (None: in the column `visit`, or 0) -> slot -> column
  visits: dict[int | None, dict[str, str]]
  # field of an array -> array index (None: all in one cell) -> column
  lists: dict[int, dict[int | None, str]]

  @property
  def wanted(self) -> list[str]:
    names = list(self.person.values())
    for columns_of in (self.visits, self.lists):
      for group in columns_of.values():
        names += group.values()
    return names

  @property
  def columns(self) -> list[str]:
    names = [self.id]
    if self.visit:
      names.append(self.visit)
    return names + self.wanted


def read(path, visits) -> Layout:
  """Reads a file's header. `visits` as in tables.load; UserError where it has no participants or
  nothing wanted."""
  names = columns.header(path)
  ids = [name for name in names if _plain(name) in IDS]
  if len(ids) != 1:
    number = "several columns" if ids else "no column"
    raise UserError(
      f"{path} has {number} of participants: {_styles(names)}; expected one of {', '.join(IDS)}"
    )
  general = _plain(ids[0]) == "participant"
  visit = None
  if general:
    visit = next((name for name in names if _plain(name) == "visit"), None)
  place = _general if general else _ukb
  layout = Layout(ids[0], visit, {}, {}, {})
  for name in names:
    group, key = place(layout, name, visits)
    if group and (key in group or None in (key, *group)):
      raise UserError(
        f"{path} has two columns for the same thing, the second is {name!r}; expected one"
      )
    if group is not None:
      group[key] = name
  if not layout.wanted:
    raise UserError(
      f"{path} has nothing that is wanted beside participants: {_styles(names)}; expected fields "
      "such as 24100 (LVEDV) of an imaging visit, 31, 53 or 41270 of UK Biobank, or sex, age, "
      "phenotype:NAME:UNIT, disease:NAME"
    )
  return layout


def _ukb(layout, name, visits):
  """(group of the layout, key) where a column of UK Biobank belongs; (None, None) where it is not
  wanted."""
  column = ukb.column(name)
  if column is None:
    return None, None
  if column.field in (ukb.DIAGNOSES, ukb.DIAGNOSIS_DATES):
    return layout.lists.setdefault(column.field, {}), column.array
  if column.array:
    return None, None
  # there is a second instance where a certificate was amended
  if column.field in (ukb.DEATH_CAUSE, ukb.DEATH_DATE):
    return layout.lists.setdefault(column.field, {}), column.instance
  if column.field in PERSON and column.instance == 0:
    return layout.person, PERSON[column.field]
  slot = PHENOTYPES.get(column.field) or VISIT.get(column.field)
  if visits is None:
    visits = ukb.IMAGING_VISITS
  if slot and column.instance in visits:
    return layout.visits.setdefault(column.instance, {}), slot
  return None, None


def _general(layout, name, visits):
  """The same of a column of the general form."""
  kind, colon, rest = name.partition(":")
  slot = kind.strip().lower() + colon + rest.strip()
  if slot == "sex":
    return layout.person, slot
  kind = slot.split(":")[0]
  in_form = re.fullmatch(r"phenotype:[^:]+:[^:]*|disease:[^:]+", slot)
  if kind in ("phenotype", "disease") and not in_form:
    raise UserError(
      f"the column {name[:80]!r} is not in form; expected phenotype:NAME:UNIT or disease:NAME"
    )
  if kind == "phenotype":
    return layout.visits.setdefault(None, {}), _phenotype(slot)
  if kind == "disease" or slot in schema.COVARIATES:
    return layout.visits.setdefault(None, {}), slot
  return None, None


def _phenotype(name):
  """The slot of a column phenotype:NAME:UNIT, in the known spelling of both; a known name has the
  unit of its field."""
  _, phenotype, unit = name.split(":")
  field = KNOWN.get(phenotype.strip().lower())
  if field is None:
    return f"phenotype:{phenotype}:{units.spelled(unit)}"
  if units.factor(unit, field.unit) is None:
    raise UserError(
      f"the column {name[:80]!r} gives {field.name} in {unit[:40]!r}, a unit that is not known for "
      f"it; expected {field.unit}: phenotype:{field.name}:{field.unit}"
    )
  return f"phenotype:{field.name}:{field.unit}"


def factor(slot: str, column: str) -> float:
  """What the cells of a column are multiplied by to be in the unit of its slot."""
  if column.count(":") != 2:
    return 1.0
  _, _, own = column.split(":")
  _, _, expected = slot.split(":")
  return units.factor(own, expected)


def _plain(name):
  return name.strip().lower()


def _styles(names):
  """What kinds of columns there are, not their names: those of a file without a header are a
  participant's cells."""
  styles = Counter()
  for name in names:
    column = ukb.column(name)
    styles[column.style if column else "other"] += 1
  counts = ", ".join(f"{times} like {style}" for style, times in styles.items())
  return f"{len(names)} columns ({counts})"
