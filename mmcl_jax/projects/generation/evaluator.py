"""Hearts drawn from an ECG, against what else one could show for it: how alike they look, and above
all what they measure.

One honest draw cannot beat a mean heart in R2, as it has the spread of real hearts. So draws are
judged as a distribution: by the continuous ranked probability score (CRPS) of the phenotypes
measured on them, which is least for draws from the true one; and by the R2 of their mean.
Phenotypes are measured on the labels that the run's segmenter gives, on generated, rebuilt and real
images alike, and compared with the cohort's; what real images lose by that is in the table.

Letters: N test subjects, S draws of each, K phenotypes, P phases, Z slices, H W pixels.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial.distance import cdist

from mmcl_jax import models
from mmcl_jax.data import pipeline
from mmcl_jax.evaluators import statistics
from mmcl_jax.evaluators.base import Result
from mmcl_jax.evaluators.context import Context
from mmcl_jax.evaluators.phenotypes import entry
from mmcl_jax.models import inputs
from mmcl_jax.projects.generation import drawings
from mmcl_jax.projects.generation.model import GenerationModel, noise_shape, parts
from mmcl_jax.projects.generation.sampling import make_generate, make_segment
from mmcl_jax.projects.generation.scores import (
  PHENOTYPES,
  filled,
  mean_and_draws,
  measure,
  memorisation,
  phenotype_scores,
  picture_scores,
  sd,
  volumes,
)
from mmcl_jax.projects.generation.tables import tables
from mmcl_jax.training.over_split import over_split

SUBJECTS = 200  # of test, the first with ECG and CMR
SAMPLES = 64  # hearts drawn of each; the CRPS is of the first ENSEMBLE
ENSEMBLE = 32  # hearts that a CRPS is of: draws, and nearest neighbours
# hearts drawn for each without looking at the ECG, which together are one ensemble
POOL = 2
STEPS = 12  # of the flow, or of each token's, two looks each
SHOWN = 4  # test subjects of the figure, and draws of each
AGAINST = ("another_ecg", "without_ecg", "train", "covariates", "ecg_neighbours", "mean_heart")


def generation(context: Context, draws: int = 1000, seed: int = 0) -> Result:
  """Draws hearts for the first people of the split and judges them, of a run with a generator.

  Args:
    context: with the split that is scored.
    draws, seed: of the bootstrap over test subjects.
  """
  run, cohort = context.run, context.cohort
  if parts(run.config.model) != list(GenerationModel.PARTS) or not context.cmr_fields:
    return Result()
  features = context.all_features()
  if reason := why_not(run, cohort, features):
    context.say(f"no hearts are drawn: {reason}")
    return Result()
  with jax.set_mesh(run.mesh):
    results, shown = evaluate(run, cohort, features, draws=draws, seed=seed, split=context.split)
  figure = drawings.examples(**shown, note=context.note)
  figure.set_label("Generated, not measured: hearts drawn from an ECG, beside the real one")
  return Result({"generation": results}, tables(results), {"hearts": figure})


def why_not(run, cohort, features: dict) -> str:
  """Why hearts cannot be drawn and judged with this cohort, or ""."""
  has = tuple(cohort.info["covariates"])
  if models.takes_covariates(run.config.model) and has != run.standardiser.covariates:
    return (
      f"the generator takes the covariates {', '.join(run.standardiser.covariates)}, the cohort "
      f"has {', '.join(has) or 'none'}"
    )
  if absent := [name for name in PHENOTYPES if name not in cohort.info["phenotypes"]]:
    return f"the cohort has no {', '.join(absent)} to compare with"
  if empty := [split for split in ("train", "test") if not len(complete(features[split], cohort))]:
    return f"nobody in {' and '.join(empty)} has an ECG, a CMR and all of {', '.join(PHENOTYPES)}"
  return ""


def phenotype_columns(cohort) -> list[int]:
  """Places of PHENOTYPES among the cohort's."""
  names = list(cohort.info["phenotypes"])
  return [names.index(name) for name in PHENOTYPES]


def complete(features: dict, cohort) -> np.ndarray:
  """Rows of `features`, all of which have an ECG, that have CMR and all PHENOTYPES."""
  measured = np.isfinite(features["phenotypes"][:, phenotype_columns(cohort)]).all(axis=1)
  return np.flatnonzero((features["has_cmr"] > 0) & measured)


def evaluate(
  run,
  cohort,
  features: dict,
  batch: int = 4,
  draws: int = 1000,
  seed: int = 0,
  split: str = "test",
) -> tuple[dict, dict]:
  """Draws hearts for the first SUBJECTS of `split` that have ECG and CMR, where `why_not` gives no
  reason against it.

  Args:
    run: with generator, tokenizer and segmenter (training.restore.Run).
    features: {split: {name: array}} of train and, as "test", of what is scored, in their order
      (evaluators.embeddings.collect).
    batch: subjects at a time.
    draws, seed: of the bootstrap over test subjects.
    split: of the cohort, what is scored.

  Returns:
    results: `images.WHAT.{psnr, ssim, dice_LV, ...}`, `phenotypes.WHAT.NAME.{r2, r2_ci, bias, sd,
      crps, crps_ci}`, `differences.WHAT.NAME.{value, ci}`, CRPS of the draws minus that of WHAT
      (AGAINST), `unmeasured.WHAT`, the share of hearts that lack a chamber, `diversity.NAME`, SD of
      the draws of one subject over the SD of all hearts, `memorisation` where the cohort is the one
        of training, `given`, what hearts are drawn from, and `counts`;
    shown: what the figure draws.
  """
  test_rows = complete(features["test"], cohort)[:SUBJECTS]
  test = {name: x[test_rows] for name, x in features["test"].items()}
  train_rows = complete(features["train"], cohort)
  train = {name: x[train_rows] for name, x in features["train"].items()}
  hearts = pipeline.Rows(cohort.splits[split], test["row"])
  drawn, without_ecg = draw(run, cohort, hearts, batch)

  columns = phenotype_columns(cohort)
  y = test["phenotypes"][:, columns].astype(np.float64)
  of_train = train["phenotypes"][:, columns].astype(np.float64)
  train_hearts = pipeline.Rows(cohort.splits["train"], train["row"])
  pictures, ensembles = alternatives(run, train_hearts, train, test, of_train)
  add_draws(pictures, ensembles, test["subject"], drawn, without_ecg)

  given = "ECG and covariates" if models.takes_covariates(run.config.model) else "ECG"
  results = {
    "memorisation": {},
    "given": given,
    "counts": {"subjects": len(hearts), "draws": SAMPLES, "steps": STEPS},
  }
  if cohort.fingerprint == run.manifest["cohort"]:
    latents = encoded(run, cohort.splits["train"], batch)
    results["memorisation"] = memorisation(drawn["latents_draw"], drawn["latents_real"], latents)
  results["images"] = {}
  for name, (stacks, labels) in pictures.items():
    scores = picture_scores(stacks, labels, of_bytes(drawn["real"]), drawn["labels"])
    results["images"][name] = scores
  weights = statistics.bootstrap_weights(test["subject"], draws, seed)
  results |= ensemble_scores(y, ensembles, of_train, weights)
  shown = {name: drawn[name][:SHOWN] for name in ("real", "draws", "rebuilt")}
  return results, shown


# --------------------------------------------------------------------------------------------------
# what is drawn


def draw(run, cohort, hearts, batch: int) -> tuple[dict, dict | None]:
  """What `make_draws` gives for the records `hearts`: with their ECG, and without it where the
  generator has learned to."""
  shape = tuple(cohort.info["shapes"]["ed_es_volumes"][1:])
  with_ecg = make_draws(run, shape, SAMPLES)
  drawn = over_hearts(run, with_ecg, hearts, batch, "draw hearts", ("spacing",))
  if not run.config.model.generator.dropout:
    return drawn, None
  without = make_draws(run, shape, POOL, guidance=0.0)
  return drawn, over_hearts(run, without, hearts, batch, "without their ECG", ("spacing",))


def make_draws(run, shape, samples: int, guidance: float = 1.0):
  """(variables, batch) -> what generation is judged by, a row a subject.

  Returns: draws uint8 [B, SHOWN, P, Z, H, W], real and rebuilt uint8 [B, P, Z, H, W], labels uint8
  of the cohort and, as the segmenter gives them, of the first draw, the rebuilt and the real
  images; ml [B, S, P, 3], ml_rebuilt and ml_real [B, P, 3]; latents of the first draw and of the
  real heart [B, N C]. Voxels of draws have the mean size in training: their own size, that of the
  real heart, is not told by an ECG.
  """
  generate = make_generate(run.model, run.config, shape, STEPS, guidance)
  segment = make_segment(run.model)
  standardiser = None
  if models.takes_covariates(run.config.model):
    standardiser = run.standardiser

  def noise_of(key):
    return jax.random.normal(key, (samples, *noise_shape(run.config.model, shape)))

  def rebuild(m, stacks):
    return m.tokenizer(stacks)

  def draws(variables, batch):
    spacing = batch["spacing"]
    of_draws = jnp.broadcast_to(jnp.float32(run.manifest["spacing"]), spacing.shape)
    batch = inputs.to_float(batch, standardiser)
    conditions = batch.get("conditions")
    if conditions is not None and not guidance:
      conditions = jnp.full_like(conditions, jnp.nan)  # anybody's heart
    noise = jax.vmap(noise_of)(inputs.sample_keys(run.config.seed, batch["index"]))
    drawn = generate(variables, batch["ecg"], noise, conditions)
    # A few draws at a time: what the segmenter keeps of one is ten times its image.
    labels = jax.lax.map(lambda x: segment(variables, x), drawn.swapaxes(0, 1), batch_size=8)
    labels = labels.swapaxes(0, 1)

    real = batch["cmr"]["ed_es_volumes"]
    rebuilt = run.model.apply(variables, real, method=rebuild)
    labels_rebuilt = segment(variables, jnp.clip(rebuilt["reconstruction"], 0, 1))
    labels_real = segment(variables, jnp.clip(real, 0, 1))
    return {
      "draws": to_bytes(drawn[:, :SHOWN]),
      "real": to_bytes(real),
      "rebuilt": to_bytes(rebuilt["reconstruction"]),
      "labels": batch["labels"],
      "labels_draw": labels[:, 0],
      "labels_rebuilt": labels_rebuilt,
      "labels_real": labels_real,
      "ml": volumes(labels, of_draws),
      "ml_rebuilt": volumes(labels_rebuilt, spacing),
      "ml_real": volumes(labels_real, spacing),
      "latents_draw": latents_of(run, variables, drawn[:, 0]),
      "latents_real": rebuilt["latent_mean"].reshape(len(real), -1),
    }

  return draws


def encoded(run, source, batch: int) -> np.ndarray:
  """Mean latents [M, N C] of the records of `source` that have CMR."""

  def encode(variables, rows):
    stacks = inputs.to_float(rows)["cmr"]["ed_es_volumes"]
    return {"latents": latents_of(run, variables, stacks)}

  rows = over_hearts(run, encode, source, batch, "encode train", ("spacing", "has_cmr"))
  return rows["latents"][rows["has_cmr"] > 0]


def latents_of(run, variables, stacks):
  """stacks [B, P, Z, H, W] in [0, 1] -> mean latents [B, N C]."""

  def encode(m, stacks):
    mean, _ = m.tokenizer.encode(stacks)
    return mean

  return run.model.apply(variables, stacks, method=encode).reshape(len(stacks), -1)


def over_hearts(run, function, source, batch: int, title: str, also: tuple[str, ...]) -> dict:
  return over_split(
    jax.jit(function),
    run.state.variables,
    source,
    mesh=run.mesh,
    batch=batch,
    title=title,
    fields=("ed_es_volumes", "labels"),
    also=also,
  )


def to_bytes(x):
  """Grey values in [0, 1] as uint8."""
  return jnp.round(255 * jnp.clip(x, 0, 1)).astype(jnp.uint8)


def of_bytes(x: np.ndarray) -> np.ndarray:
  return x.astype(np.float32) / 255


# --------------------------------------------------------------------------------------------------
# what else one could show


def alternatives(run, hearts, train: dict, test: dict, of_train: np.ndarray) -> tuple[dict, dict]:
  """What else one could show for every test subject: training hearts, and the mean heart.

  Args:
    hearts: the records of `train`, whose phenotypes are of_train [M, K].
    train, test: features.

  Returns:
    pictures: {WHAT: (stacks in [0, 1], labels)}, a row a test subject.
    ensembles: {WHAT: phenotypes [N or 1, S, K]}.
  """
  pictures, ensembles = {}, {"train": of_train[None]}
  for name, chosen in nearest_hearts(train, test).items():
    first = [hearts[i] for i in chosen[:, 0]]
    stacks = np.stack([record["ed_es_volumes"] for record in first])
    pictures[name] = of_bytes(stacks), np.stack([record["labels"] for record in first])
    ensembles[name] = of_train[chosen]

  people = len(test["row"])
  stack = mean_stack(hearts)
  segment = jax.jit(make_segment(run.model))
  labels = np.asarray(segment(run.state.variables, stack[None]))
  values = measure(np.asarray(volumes(labels, np.float32([run.manifest["spacing"]]))))
  stacks = stack[None].repeat(people, axis=0)
  pictures["mean_heart"] = stacks, labels.repeat(people, axis=0)
  ensembles["mean_heart"] = values[:, None].repeat(people, axis=0)
  return pictures, ensembles


def nearest_hearts(train: dict, test: dict) -> dict[str, np.ndarray]:
  """{WHAT: rows of train [N, ENSEMBLE]} nearest to each test subject, by the embedding of the ECG
  and, where covariates differ, by these."""
  nearest = {"ecg_neighbours": neighbours(unit(train["embedding"]), unit(test["embedding"]))}
  covariates = train["covariates"]
  known = np.isfinite(covariates).any(axis=0)
  differ = known & (np.nan_to_num(np.nanstd(covariates, axis=0)) > 0)
  if differ.any():
    scaled = standardised(covariates[:, differ], test["covariates"][:, differ])
    nearest["covariates"] = neighbours(*scaled)
  return nearest


def mean_stack(hearts) -> np.ndarray:
  """The mean image of all `hearts`, in [0, 1]."""
  total = 0.0
  for i in range(len(hearts)):
    total = total + hearts[i]["ed_es_volumes"].astype(np.float64)
  return (total / len(hearts)).astype(np.float32) / 255


def add_draws(
  pictures: dict, ensembles: dict, subject: np.ndarray, drawn: dict, without_ecg: dict | None
) -> None:
  """Adds to `alternatives` what was drawn, with and without the ECG, rebuilt and real."""
  values = measure(drawn["ml"])
  stacks = of_bytes(drawn["draws"][:, 0])
  labels = drawn["labels_draw"]
  pictures["drawn"], ensembles["drawn"] = (stacks, labels), values
  pictures["rebuilt"] = of_bytes(drawn["rebuilt"]), drawn["labels_rebuilt"]
  ensembles["rebuilt"] = measure(drawn["ml_rebuilt"])[:, None]
  pictures["real"] = None, drawn["labels_real"]
  ensembles["real"] = measure(drawn["ml_real"])[:, None]
  other = another(subject)
  if other is not None:
    pictures["another_ecg"] = stacks[other], labels[other]
    ensembles["another_ecg"] = values[other]
  if without_ecg is not None:
    pictures["without_ecg"] = of_bytes(without_ecg["draws"][:, 0]), without_ecg["labels_draw"]
    # together they are one ensemble, of everybody
    ensembles["without_ecg"] = measure(without_ecg["ml"]).reshape(1, -1, values.shape[2])


def another(subject: np.ndarray) -> np.ndarray | None:
  """Of every row of subject [N, 2] the next row, round and round, of somebody else [N]; None where
  there is nobody else."""
  differs = (subject[:, None] != subject).any(axis=2)
  if not differs.any(axis=1).all():
    return None
  rows = np.arange(len(subject))
  turn = (rows[:, None] + rows) % len(subject)  # row i looks at i, i + 1, ...
  steps = np.take_along_axis(differs, turn, axis=1).argmax(axis=1)
  return turn[rows, steps]


def neighbours(gallery: np.ndarray, queries: np.ndarray) -> np.ndarray:
  """Rows of the ENSEMBLE nearest of gallery [M, D] to each of queries [N, D], nearest first [N,
  ENSEMBLE]."""
  return np.argsort(cdist(queries, gallery), axis=1, kind="stable")[:, :ENSEMBLE]


def unit(x: np.ndarray) -> np.ndarray:
  """Vectors [N, D] of length 1."""
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Both by the mean and SD of train; what is unknown is the mean, and a column that does not vary
  counts for nothing."""
  mean = np.nanmean(train, axis=0)
  deviation = np.nanstd(train, axis=0)
  scale = np.where(deviation > 0, deviation, np.inf)
  return np.nan_to_num((train - mean) / scale), np.nan_to_num((test - mean) / scale)


def ensemble_scores(y, ensembles: dict, of_train, weights) -> dict:
  """Scores of the phenotypes y [N, K] of test by ensembles {WHAT: [N or 1, S, K]}.

  Returns:
    `phenotypes`, `differences`, `unmeasured` and `diversity`, see `evaluate`.
  """
  results = {"phenotypes": {}, "differences": {}, "unmeasured": {}}
  several = np.isfinite(ensembles["drawn"]).sum(axis=1) > 1
  within = np.where(several, sd(ensembles["drawn"]), np.nan)
  spread = np.nanmean(within, axis=0) / of_train.std(axis=0)
  results["diversity"] = dict(zip(PHENOTYPES, spread.tolist()))
  crps = {}
  for name, x in ensembles.items():
    measured = np.isfinite(x).all(axis=2)
    results["unmeasured"][name] = float(1 - measured.mean())
    x = filled(x)
    of_each = len(x) > 1  # else all subjects share one ensemble
    crps[name] = statistics.crps(y, x[:, :ENSEMBLE] if of_each else x)
    scores = phenotype_scores(y, x, crps[name], weights)
    results["phenotypes"][name] = dict(zip(PHENOTYPES, scores))
  for name in AGAINST:
    if name in crps:
      gain = crps["drawn"] - crps[name]
      results["differences"][name] = {
        phenotype: entry(*mean_and_draws(gain[:, k], weights))
        for k, phenotype in enumerate(PHENOTYPES)
      }
  return results
