"""The model card of an ECG encoder, in the sections of Mitchell et al. 2019, "Model Cards for Model
Reporting".

Its facts come from the run: the config, the manifest of the checkpoint, and what `mmcl evaluate`
measured. It names no participant and no path: a cohort is named by its source and its fingerprint.
"""

import hashlib
import re
import textwrap

import jax
import jax.numpy as jnp

from mmcl_jax import configuration, models
from mmcl_jax.data import schema
from mmcl_jax.data.preprocess import ecg as preprocess_ecg
from mmcl_jax.errors import one_line
from mmcl_jax.evaluators import data, diseases, phenotypes, readouts, retrieval
from mmcl_jax.evaluators.base import Table, number
from mmcl_jax.models import towers as tower_lib, vit
from mmcl_jax.reports import pages, report

# what `gains` counts: differences of results.json, in words
GAINS = {
  "embedding_minus_random_encoder": "the embedding over the untrained network",
  "embedding_minus_covariates": "the embedding over the covariates",
  "with_covariates_minus_covariates": "the embedding with the covariates over the covariates alone",
}
RESEARCH_ONLY = "Research only. Not a medical device."


def model_card(config, manifest: dict, results: dict | None) -> str:
  """The card as Markdown.

  Args:
    config: of the run; it has an ECG encoder.
    manifest: of the checkpoint (training.checkpoint).
    results: what `mmcl evaluate` wrote for the checkpoint (results.json); None: not evaluated.
  """
  notes = [RESEARCH_ONLY]
  if results:
    about_people = results.get("seen_people", {}).get("note")
    for note in (results.get("note"), about_people):
      if note:
        notes.append(escaped(note))
  return pages.render(
    "model_card.md.j2",
    step=manifest["step"],
    notes=notes,
    details=details(config, manifest),
    factors=factors(manifest, results),
    metrics=metrics(results),
    evaluation_data=evaluation_data(manifest, results),
    training_data=training_data(manifest, results),
    scores=scores(results),
    caveats=caveats(results),
    leads=len(schema.LEADS),
    samples=preprocess_ecg.samples(config.data.ecg_profile),
    outputs=outputs(config, results),
  )


def details(config, manifest: dict) -> str:
  """The facts of the model, a line each."""
  profile = config.data.ecg_profile
  rate = preprocess_ecg.rate_hz(profile)
  samples = preprocess_ecg.samples(profile)
  leads = len(schema.LEADS)
  config_text = configuration.as_text(config)
  packages = []
  for name, version in manifest["packages"].items():
    packages.append(escaped(f"{name} {version}"))
  origin = manifest.get("origin")
  if origin:
    training = {
      "Weights": f"converted from {code(origin)}; the run does not know how they were trained"
    }
  else:
    training = training_facts(config, manifest)
  facts = {
    "Input": f"12-lead ECG, {samples / rate:g} s at {rate} Hz, normalised by the profile "
    f"`{profile}`: float32 [B, {leads}, {samples}]",
    "Output": f"embedding, float32 [B, {width(config)}]",
    "Encoder": encoder(config),
    "Window": window(config.data.samples, samples, rate),
    "Parameters": f"{parameters(config):,}",
    **training,
    "SHA-256 of the run's config.json": hashlib.sha256(config_text.encode()).hexdigest(),
    "Software": ", ".join(packages),
    "Licence, contact": "to be added by whoever passes the model on; the run does not know them",
  }
  return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


def window(window_samples: int, samples: int, rate_hz: float) -> str:
  """What the encoder sees at a time, in words."""
  seconds = f"{window_samples / rate_hz:g} s"
  if window_samples >= samples:
    return seconds
  windows = samples // window_samples
  return f"{seconds} at a time; the embedding is the mean over the {windows} of a recording"


def encoder(config) -> str:
  """The ECG tower in words."""
  tower = config.model.towers.ecg
  dtype = config.model.dtype
  if tower.fn not in ("ecg_vit", "st_mem"):
    parameters = []
    for name, value in tower.items():
      if name not in ("fn", "view"):
        parameters.append(f"{name}={value}")
    return f"{code(tower.fn)}, {escaped(', '.join(parameters))}; {dtype}"
  size = vit.sized(tower.size)
  size_name = f", size {code(tower.size)}" if isinstance(tower.size, str) else ""
  pool = tower.get("pool", "mean")
  return (
    f"vision transformer{size_name}: {size['depth']} blocks of width {size['width']}, "
    f"{size['heads']} heads; patches of {tower.patch} samples of one lead; {pool} pooling; {dtype}"
  )


def training_facts(config, manifest: dict) -> dict[str, str]:
  """How the weights came about: updates, objectives, the towers beside the encoder, and what it
  started from."""
  updates = f"{manifest['step']:,} of {config.steps:,} updates of {config.batch:,} recordings"
  chosen = manifest.get("best") or {}
  if chosen.get("step") is not None:
    updates += f", the best of them on validation by {code(config.stop_on)}"
  stages = [name for name, workdir in config.init_from.items() if workdir]
  start = "random weights"
  if stages:
    start = f"weights of earlier runs ({', '.join(stages)})"
  objectives = []
  for name, entry in config.objectives.items():
    weight = entry.get("weight", 1.0)
    words = "weight by a schedule"
    if isinstance(weight, (int, float)):
      words = f"weight {weight:g}"
    objectives.append(f"{code(name)} ({entry.fn}, {words})")
  towers = []
  for name, tower in tower_lib.cmr(config.model).items():
    frozen = ", frozen" if tower.frozen else ""
    towers.append(f"{code(name)} ({tower.fn} on {tower.view}{frozen})")
  return {
    "Training": f"{updates}, seed {config.seed}, from {start}",
    "Objectives": ", ".join(objectives),
    "CMR encoders, in training alone": ", ".join(towers) or "none",
  }


def parameters(config) -> int:
  """Learned numbers of the ECG encoder: those that an embedding is computed with."""
  _, variables = encoder_shapes(config)
  return sum(x.size for x in jax.tree.leaves(variables["params"]["ecg"]))


def width(config) -> int:
  """Of the embedding of an ECG."""
  return encoder_shapes(config)[0]["ecg_embedding"].shape[1]


def encoder_shapes(config):
  """Shapes of what the ECG encoder gives for one ECG, and of its variables."""
  model = models.build(config.model, config.data.samples, targets=1, diseases=1)
  ecg = jax.ShapeDtypeStruct((1, len(schema.LEADS), config.data.samples), jnp.float32)

  def run(ecg):
    return model.init_with_output(jax.random.key(0), ecg, method="embed_ecg")

  return jax.eval_shape(run, ecg)


def factors(manifest: dict, results: dict | None) -> str:
  text = ""
  if not manifest.get("origin"):
    covariates = [escaped(name) for name in manifest["standardiser"]["covariates"]]
    text = (
      "Beside phenotypes and diseases the training data has of its people: "
      f"{', '.join(covariates) or 'nothing'}. "
    )
  if results:
    text += (
      "The scores below are of all test people together; none was taken by sex, age, ethnicity, "
      "illness, recorder or site."
    )
  else:
    text += "Nothing was scored, neither of all people nor of groups of them."
  return prose(text)


def metrics(results: dict | None) -> str:
  if not results:
    return (
      "No metrics were measured: `mmcl evaluate` had not been run on this checkpoint when this "
      "card was written."
    )
  measured = []
  if results["phenotypes"]:
    measured.append(
      "R2 and mean absolute error (MAE) of every phenotype, by ridge regression on the frozen "
      "embedding"
    )
  if any(results.get("diseases", {}).values()):
    measured.append(
      "area under the ROC curve (AUROC) and under the precision-recall curve (AUPRC), balanced "
      "accuracy and expected calibration error (ECE) of every disease, by logistic regression on "
      "the frozen embedding"
    )
  if results.get("retrieval"):
    measured.append("retrieval of a person's CMR by their ECG, and back, among all test people")
  protocol = (
    "Regressions are fitted on train, their strength and thresholds chosen on validation, and the "
    "scores taken on test. Brackets are 95 % intervals over test people (bootstrap); training runs "
    "of other seeds may differ by more."
  )
  models = [
    "`random`, the same network untrained",
    "`covariates`, what is known of the people without an ECG",
    "`emb + cov`, the embedding with these",
  ]
  if "own_head" in results.get("readouts", {}):
    models.append("`own head`, what the network itself says")
  if results.get("ceiling"):
    models.append("`ceiling`, the parameters that the synthetic ECGs were made from")
  first = prose(f"{'; '.join(measured)}. {protocol}")
  second = prose(f"Beside the embedding: {'; '.join(models)}.")
  return f"{first}\n\n{second}"


def evaluation_data(manifest: dict, results: dict | None) -> str:
  if not results:
    return "None."
  counts = results["counts"]
  times = results.get("test_scored")
  often = {None: "an unrecorded number of times", 1: "once"}.get(times, f"{times} times")
  splits = (
    f"{counts['val']:,} recordings of the validation split to choose by, {counts['test']:,} of the "
    f"test split to score. Test was scored {often} from the workdir of this run."
  )
  if results["cohort_fingerprint"] == manifest["cohort"]:
    return prose(f"Of the cohort it was trained on, {splits}")
  cohort = f"Fingerprint of the cohort: {escaped(results['cohort_fingerprint'])}"
  text = prose(f"Source: {source_of(results)}. {cohort}. Of it, {splits}")
  return text + data_tables(results)


def training_data(manifest: dict, results: dict | None) -> str:
  if manifest.get("origin"):
    return "The weights come from elsewhere; the run does not know what they were trained on."
  cohort = f"Fingerprint of the cohort: {escaped(manifest['cohort'])}."
  mixed = [escaped(fingerprint) for fingerprint in manifest.get("mixed", [])]
  if mixed:
    cohort += f" Mixed into its batches, the cohorts of fingerprint {', '.join(mixed)}."
  if not results or results["cohort_fingerprint"] != manifest["cohort"]:
    return prose(f"{cohort} What it holds is described here after `mmcl evaluate` on it.")
  text = prose(
    f"Source: {source_of(results)}. {cohort} The encoder learned from its train split. Where it "
    "started from weights of earlier runs (model details), those had learned before, from data "
    "that is not described here."
  )
  return text + data_tables(results)


def source_of(results: dict) -> str:
  return escaped(results.get("data", {}).get("source", "not recorded by that evaluation"))


def data_tables(results):
  """The data card of an evaluation: records, labels and cases by split; what was read, and what
  left out."""
  text = ""
  for table in data.tables(results.get("data", {}), results["counts"]):
    title = table.title.removeprefix("Data: ").capitalize()
    text += f"\n\n{title}:\n\n{as_markdown(table)}"
  return text


def scores(results: dict | None) -> str:
  """The tables of scores, and after the first one what the embedding gains."""
  if not results:
    return "No metrics were measured."
  tables = []
  if results["phenotypes"]:
    headline = phenotypes.headline(results)
    rows = []
    for row, score in zip(headline.rows, results["phenotypes"].values()):
      rows.append([*row, number(score["mae"])])
    title = "Phenotypes: R2 on test, and the MAE of the embedding in the phenotype's unit"
    tables.append(Table(title, [*headline.head, "MAE"], rows))
  scored = {}
  for model, of_diseases in results.get("diseases", {}).items():
    if of_diseases and model not in readouts.TITLES:
      scored[model] = of_diseases
  if scored:
    title = "Diseases on test (few cases: counted, not scored)"
    tables.append(diseases.table(scored)._replace(title=title))
  if results.get("retrieval"):
    tables.append(retrieval.table(results["retrieval"]))
  paragraphs = [f"{table.title}:\n\n{as_markdown(table)}" for table in tables]
  gained = gains(results.get("differences", {}))
  if gained:
    paragraphs.insert(1, gained)
  return "\n\n".join(paragraphs) or "Nothing was scored."


def gains(differences: dict) -> str:
  """In how many phenotypes the embedding beats what stands beside it: a paragraph, or "" where that
  is not known."""
  counts = []
  for name, words in GAINS.items():
    entries = differences.get(name, {}).values()
    if entries:
      lows = [entry["ci"][0] for entry in entries]
      better = sum(low is not None and low > 0 for low in lows)
      counts.append(f"{words} in {better} of {len(lows)} phenotypes")
  if not counts:
    return ""
  return prose(
    f"R2 is higher, by a difference whose own 95 % interval lies above 0: {'; '.join(counts)}."
  )


def caveats(results: dict | None) -> str:
  if not results:
    return prose(
      "Nothing is known of how well this encoder does. Evaluate it on people like those it is "
      "meant for before use: `mmcl evaluate`."
    )
  text = prose(report.LIMITS.format(encoder="ECG"))
  if results.get("test_scored", 1) > 1:
    chosen = prose(
      "Test was scored more than once: a run that was chosen by it looks better here than it is."
    )
    text += f"\n\n{chosen}"
  return text


def outputs(config, results: dict | None) -> str:
  """What the exported encoder returns, as Python: {'embedding': [B, 768], ...}."""
  widths = {"embedding": width(config)}
  if results and results["phenotypes"]:
    widths["phenotypes"] = len(results["phenotypes"])
  shapes = ", ".join(f"{name!r}: [B, {count}]" for name, count in widths.items())
  return f"{{{shapes}}}"


def prose(text: str) -> str:
  """A paragraph, no line of which begins a heading, a quotation, a list or a rule."""
  text = textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
  return re.sub(r"(?m)^(\d*)([#>+=.)-]+)(?=\s|$)", r"\1\\\2", text)


def as_markdown(table: Table) -> str:
  """A table in Markdown; the first column flush left."""
  lines = []
  for row in (table.head, *table.rows):
    cells = [escaped(cell) for cell in row]
    lines.append(f"| {' | '.join(cells)} |")
  alignment = ["---"]
  for _ in table.head[1:]:
    alignment.append("---:")
  lines.insert(1, f"| {' | '.join(alignment)} |")
  return "\n".join(lines)


def escaped(text: str) -> str:
  """A user's text as plain text in Markdown: no cell, tag, link, emphasis or formula begins in
  it."""
  return re.sub(r"[\\`*_|~$&#]|\](?=[\[(:])", r"\\\g<0>", one_line(text)).replace("<", "&lt;")


def code(text) -> str:
  """A user's text as code in Markdown."""
  return f"`{one_line(text).replace('`', chr(39))}`"
