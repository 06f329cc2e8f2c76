"""Tables of the evaluator: phenotypes, images, spread."""

from mmcl_jax.evaluators.base import Table, interval, number
from mmcl_jax.projects.generation.scores import PHENOTYPES

# in the order of the rows; {given}: what hearts are drawn from
TITLES = {
  "drawn": "drawn from the {given}",
  "train": "all of train",
  "ecg_neighbours": "neighbours by ECG embedding",
  "covariates": "neighbours by covariates",
  "mean_heart": "mean heart",
  "rebuilt": "the real one, by the tokenizer",
  "real": "the real one",
  "another_ecg": "drawn from another's {given}",
  "without_ecg": "drawn without {given}",
}


def tables(results: dict) -> list[Table]:
  counts = results["counts"]
  hearts = f"Hearts drawn from the {results['given']}"
  measured = (
    f"{hearts}: what they measure ({counts['draws']} of each of {counts['subjects']} test subjects)"
  )
  return [
    phenotype_table(results, measured),
    picture_table(results, f"{hearts}: images, and labels by the segmenter"),
    spread_table(results, f"{hearts}: spread, and copies"),
  ]


def shown_as(results: dict, what: str) -> str:
  return TITLES[what].format(given=results["given"])


def in_order(shown: dict) -> list[str]:
  return [what for what in TITLES if what in shown]


def phenotype_table(results: dict, title: str) -> Table:
  """Of each phenotype and each thing to show for an ECG: CRPS (lower is better), R2 of the mean,
  bias."""
  rows = []
  for name in PHENOTYPES:
    for what in in_order(results["phenotypes"]):
      score = results["phenotypes"][what][name]
      difference = results["differences"].get(what, {}).get(name, {})
      row = [
        name,
        shown_as(results, what),
        interval(score["crps"], score["crps_ci"]),
        interval(difference.get("value"), difference.get("ci")),
        interval(score["r2"], score["r2_ci"]),
        number(score["bias"]),
      ]
      rows.append(row)
  head = ["phenotype", "shown", "CRPS", "draws minus this", "R2 of the mean", "bias"]
  return Table(title, head, rows)


def picture_table(results: dict, title: str) -> Table:
  columns = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "dice_LV": "Dice LV",
    "dice_MYO": "Dice MYO",
    "dice_RV": "Dice RV",
  }
  rows = []
  for what in in_order(results["images"]):
    values = [number(results["images"][what].get(name)) for name in columns]
    rows.append([shown_as(results, what), *values])
  return Table(title, ["shown", *columns.values()], rows)


def spread_table(results: dict, title: str) -> Table:
  rows = [["share of them that lack a chamber", number(results["unmeasured"]["drawn"])]]
  for name, x in results["diversity"].items():
    rows.append([f"SD of {name} over that of all hearts", number(x)])
  copied = results["memorisation"]
  if copied:
    rows.append(["distance to the nearest training heart", number(copied["nearest_drawn"])])
    rows.append(["the same of real test hearts", number(copied["nearest_real"])])
    rows.append(["share nearer than 99 % of these", number(copied["closer"])])
  return Table(title, ["draws of one subject", ""], rows)
