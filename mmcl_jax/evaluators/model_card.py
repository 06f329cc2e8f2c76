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
from mmcl_jax.evaluators import data, diseases, pages, phenotypes, readouts, report, retrieval
from mmcl_jax.evaluators.base import Table, number
from mmcl_jax.models import towers as tower_lib, vit

RESEARCH_ONLY = "Research only. Not a medical device."


def model_card(config, manifest: dict, results: dict | None) -> str:
  """The card as Markdown.

  Args:
    config: of the run; it has an ECG encoder.
    manifest: of the checkpoint (training.checkpoint).
    results: what `mmcl evaluate` wrote for the checkpoint (results.json); None: not evaluated.
  """
  told = [RESEARCH_ONLY]
  if results:
    seen = results.get("seen_people", {}).get("note")
    told += [escaped(note) for note in (results.get("note"), seen) if note]
  return pages.render(
    "model_card.md.j2",
    step=manifest["step"],
    notes=told,
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


def details(config, manifest):
  profile, window = config.data.ecg_profile, config.data.samples
  rate, whole = preprocess_ecg.rate_hz(profile), preprocess_ecg.samples(profile)
  mean = (
    f" at a time; the embedding is the mean over the {whole // window} of a recording"
    if window < whole
    else ""
  )
  origin = manifest.get("origin")
  facts = {
    "Input": f"12-lead ECG, {whole / rate:g} s at {rate} Hz, normalised by the profile `{profile}`: float32 "
    f"[B, {len(schema.LEADS)}, {whole}]",
    "Output": f"embedding, float32 [B, {width(config)}]",
    "Encoder": encoder(config),
    "Window": f"{window / rate:g} s{mean}",
    "Parameters": f"{parameters(config):,}",
    **(
      {"Weights": f"converted from {code(origin)}; the run does not know how they were trained"}
      if origin
      else trained(config, manifest)
    ),
    "SHA-256 of the run's config.json": hashlib.sha256(
      configuration.as_text(config).encode()
    ).hexdigest(),
    "Software": ", ".join(
      escaped(f"{name} {version}") for name, version in manifest["packages"].items()
    ),
    "Licence, contact": "to be added by whoever passes the model on; the run does not know them",
  }
  return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


def encoder(config):
  """The ECG tower in words."""
  c = config.model.towers.ecg
  if c.fn not in ("ecg_vit", "st_mem"):
    own = (f"{key}={value}" for key, value in c.items() if key not in ("fn", "view"))
    return f"{code(c.fn)}, {escaped(', '.join(own))}; {config.model.dtype}"
  numbers = vit.sized(c.size)
  size = f", size {code(c.size)}" if isinstance(c.size, str) else ""
  return (
    f"vision transformer{size}: {numbers['depth']} blocks of width {numbers['width']}, "
    f"{numbers['heads']} heads; patches of {c.patch} samples of one lead; "
    f"{c.get('pool', 'mean')} pooling; {config.model.dtype}"
  )


def trained(config, manifest):
  """How the weights came about: updates, objectives, the towers beside the encoder, and what it
  started from."""

  def weight(w):
    return f"weight {w:g}" if isinstance(w, (int, float)) else "weight by a schedule"

  objectives = [
    f"{code(name)} ({one.fn}, {weight(one.get('weight', 1.0))})"
    for name, one in config.objectives.items()
  ]
  towers = [
    f"{code(name)} ({one.fn} on {one.view}{', frozen' if one.frozen else ''})"
    for name, one in tower_lib.cmr(config.model).items()
  ]
  chose = (manifest.get("best") or {}).get("step") is not None
  best = f", the best of them on validation by {code(config.stop_on)}" if chose else ""
  stages = ", ".join(name for name, workdir in config.init_from.items() if workdir)
  return {
    "Training": f"{manifest['step']:,} of {config.steps:,} updates of {config.batch:,} recordings{best}, seed "
    f"{config.seed}, from {f'weights of earlier runs ({stages})' if stages else 'random weights'}",
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


def factors(manifest, results):
  known = ", ".join(map(escaped, manifest["standardiser"]["covariates"])) or "nothing"
  about = (
    ""
    if manifest.get("origin")
    else f"Beside phenotypes and diseases the training data has of its people: {known}. "
  )
  scored = (
    "The scores below are of all test people together; none was taken by sex, age, ethnicity, "
    "illness, recorder or "
    "site."
  )
  return prose(
    about
    + (scored if results else "Nothing was scored, neither of all people nor of groups of them.")
  )


def metrics(results):
  if not results:
    return "No metrics were measured: `mmcl evaluate` had not been run on this checkpoint when this card was written."
  parts = []
  if results["phenotypes"]:
    parts.append(
      "R2 and mean absolute error (MAE) of every phenotype, by ridge regression on the frozen "
      "embedding"
    )
  if any(results.get("diseases", {}).values()):
    parts.append(
      "area under the ROC curve (AUROC) and under the precision-recall curve (AUPRC), balanced "
      "accuracy and "
      "expected calibration error (ECE) of every disease, by logistic regression on the frozen "
      "embedding"
    )
  if results.get("retrieval"):
    parts.append("retrieval of a person's CMR by their ECG, and back, among all test people")
  own = (
    "; `own head`, what the network itself says"
    if "own_head" in results.get("readouts", {})
    else ""
  )
  ceiling = (
    "; `ceiling`, the parameters that the synthetic ECGs were made from"
    if results.get("ceiling")
    else ""
  )
  return "\n\n".join(
    prose(text)
    for text in (
      f"{'; '.join(parts)}. Regressions are fitted on train, their strength and thresholds chosen "
      "on validation, and the "
      "scores taken on test. Brackets are 95 % intervals over test people (bootstrap); training "
      "runs of other seeds may "
      "differ by more.",
      "Beside the embedding: `random`, the same network untrained; `covariates`, what is known of "
      "the people without an "
      f"ECG; `emb + cov`, the embedding with these{own}{ceiling}.",
    )
  )


def evaluation_data(manifest, results):
  if not results:
    return "None."
  counts, times = results["counts"], results.get("test_scored")
  often = {None: "an unrecorded number of times", 1: "once"}.get(times, f"{times} times")
  splits = (
    f"{counts['val']:,} recordings of the validation split to choose by, {counts['test']:,} of the "
    "test split to "
    f"score. Test was scored {often} from the workdir of this run."
  )
  if results["cohort_fingerprint"] == manifest["cohort"]:
    return prose(f"Of the cohort it was trained on, {splits}")
  cohort = f"Fingerprint of the cohort: {escaped(results['cohort_fingerprint'])}"
  return prose(f"Source: {source_of(results)}. {cohort}. Of it, {splits}") + data_tables(results)


def training_data(manifest, results):
  if manifest.get("origin"):
    return "The weights come from elsewhere; the run does not know what they were trained on."
  mixed = manifest.get("mixed", [])
  more = (
    f" Mixed into its batches, the cohorts of fingerprint {', '.join(map(escaped, mixed))}."
    if mixed
    else ""
  )
  cohort = f"Fingerprint of the cohort: {escaped(manifest['cohort'])}.{more}"
  if not results or results["cohort_fingerprint"] != manifest["cohort"]:
    return prose(f"{cohort} What it holds is told here after `mmcl evaluate` on it.")
  return prose(
    f"Source: {source_of(results)}. {cohort} The encoder learned from its train split. Where it "
    "started from weights "
    "of earlier runs (model details), those had learned before, from data that is not told here."
  ) + data_tables(results)


def source_of(results):
  return escaped(results.get("data", {}).get("source", "not recorded by that evaluation"))


def data_tables(results):
  """The data card of an evaluation: records, labels and cases by split; what was read, and what
  left out."""
  parts = []
  for one in data.tables(results.get("data", {}), results["counts"]):
    title = one.title.removeprefix("Data: ").capitalize()
    parts.append(f"\n\n{title}:\n\n{table(one)}")
  return "".join(parts)


def scores(results):
  if not results:
    return "No metrics were measured."
  found = []
  if results["phenotypes"]:
    one = phenotypes.headline(results)
    rows = []
    for row, score in zip(one.rows, results["phenotypes"].values()):
      rows.append([*row, number(score["mae"])])
    title = "Phenotypes: R2 on test, and the MAE of the embedding in the phenotype's unit"
    found.append(Table(title, [*one.head, "MAE"], rows))
  scored = {}
  for model, one in results.get("diseases", {}).items():
    if one and model not in readouts.TITLES:
      scored[model] = one
  if scored:
    title = "Diseases on test (few cases: counted, not scored)"
    found.append(diseases.table(scored)._replace(title=title))
  if results.get("retrieval"):
    found.append(retrieval.table(results["retrieval"]))
  tables = [f"{one.title}:\n\n{table(one)}" for one in found]
  return (
    "\n\n".join([*tables[:1], *gains(results.get("differences", {})), *tables[1:]])
    or "Nothing was scored."
  )


def gains(differences):
  """In how many phenotypes the embedding beats what stands beside it: a paragraph, or none where
  that is not known."""
  told = {
    "embedding_minus_random_encoder": "the embedding over the untrained network",
    "embedding_minus_covariates": "the embedding over the covariates",
    "with_covariates_minus_covariates": "the embedding with the covariates over the covariates alone",
  }
  parts = []
  for name, words in told.items():
    lows = [one["ci"][0] for one in differences.get(name, {}).values()]
    if lows:
      better = sum(low is not None and low > 0 for low in lows)
      parts.append(f"{words} in {better} of {len(lows)} phenotypes")
  if not parts:
    return []
  text = "R2 is higher, by a difference whose own 95 % interval lies above 0"
  return [prose(f"{text}: {'; '.join(parts)}.")]


def caveats(results):
  parts = [report.LIMITS.format(encoder="ECG")]
  if results and results.get("test_scored", 1) > 1:
    parts.append(
      "Test was scored more than once: a run that was chosen by it looks better here than it is."
    )
  if not results:
    parts = [
      "Nothing is known of how well this encoder does. Evaluate it on people like those it is "
      "meant for before use: "
      "`mmcl evaluate`."
    ]
  return "\n\n".join(prose(part) for part in parts)


def outputs(config, results) -> str:
  """What the exported encoder returns, as Python: {'embedding': [B, 768], ...}."""
  widths = {"embedding": width(config)}
  if results and results["phenotypes"]:
    widths["phenotypes"] = len(results["phenotypes"])
  return "{" + ", ".join(f"{name!r}: [B, {width}]" for name, width in widths.items()) + "}"


def prose(text: str) -> str:
  """A paragraph, no line of which begins a heading, a quotation, a list or a rule."""
  text = textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
  return re.sub(r"(?m)^(\d*)([#>+=.)-]+)(?=\s|$)", r"\1\\\2", text)


def table(one: Table) -> str:
  """A table in Markdown; the first column flush left."""
  lines = []
  for row in (one.head, *one.rows):
    lines.append(f"| {' | '.join(escaped(cell) for cell in row)} |")
  lines.insert(1, f"| {' | '.join(['---', *['---:'] * (len(one.head) - 1)])} |")
  return "\n".join(lines)


def escaped(text: str) -> str:
  """A user's text as plain text in Markdown: no cell, tag, link, emphasis or formula begins in
  it."""
  return re.sub(r"[\\`*_|~$&#]|\](?=[\[(:])", r"\\\g<0>", one_line(text)).replace("<", "&lt;")


def code(text) -> str:
  """A user's text as code in Markdown."""
  return f"`{one_line(text).replace('`', chr(39))}`"
