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

from mmcl_jax.data import pipeline, schema
from mmcl_jax.evaluators import statistics
from mmcl_jax.evaluators.base import Result, Table, interval, number
from mmcl_jax.evaluators.context import Context
from mmcl_jax.evaluators.phenotypes import entry
from mmcl_jax.models import inference, inputs, pretrainer
from mmcl_jax.projects.generation import drawings, images
from mmcl_jax.training.over_split import over_split

SUBJECTS = 200  # of test, the first with ECG and CMR
SAMPLES = 64  # hearts drawn of each; the CRPS is of the first ENSEMBLE
ENSEMBLE = 32  # hearts that a CRPS is of: draws, and nearest neighbours
# hearts drawn for each without looking at the ECG, which together are one ensemble
POOL = 2
STEPS = 12  # of the flow, or of each token's, two looks each
SHOWN = 4  # test subjects of the figure, and draws of each
PHENOTYPES = ("LVEDV", "LVESV", "LVEF", "LVM", "RVEDV", "RVESV", "RVEF")
TITLES = {
  "drawn": "drawn from the {given}",
  "another_ecg": "drawn from another's {given}",
  "without_ecg": "drawn without {given}",
  "train": "all of train",
  "covariates": "neighbours by covariates",
  "ecg_neighbours": "neighbours by ECG embedding",
  "mean_heart": "mean heart",
  "rebuilt": "the real one, by the tokenizer",
  "real": "the real one",
}
AGAINST = ("another_ecg", "without_ecg", "train", "covariates", "ecg_neighbours", "mean_heart")


def generation(context: Context, draws: int = 1000, seed: int = 0) -> Result:
  """Draws hearts for the first people of the split and judges them, of a run with a generator.

  Args:
    context: with the split that is scored.
    draws, seed: of the bootstrap over test subjects.
  """
  run, cohort = context.run, context.cohort
  if parts(run.config.model) != ["tokenizer", "segmenter", "generator"] or not context.cmr_fields:
    return Result()
  features = context.all_features()
  if why := lacking(run, cohort, features):
    context.say(f"no hearts are drawn: {why}")
    return Result()
  with jax.set_mesh(run.mesh):
    results, shown = evaluate(run, cohort, features, draws=draws, seed=seed, split=context.split)
  figure = drawings.examples(**shown, note=context.note)
  figure.set_label("Generated, not measured: hearts drawn from an ECG, beside the real one")
  return Result({"generation": results}, tables(results), {"hearts": figure})


def parts(model) -> list[str]:
  """What of generation a model has."""
  return [name for name in ("tokenizer", "segmenter", "generator") if model.get(name)]


def measure(millilitres: np.ndarray) -> np.ndarray:
  """Volumes [..., P, 3] of LV, MYO and RV at ED and ES -> PHENOTYPES [..., K] (data.measure); NaN
  where there is no LV or RV."""
  ed, es = np.moveaxis(np.where(millilitres > 0, millilitres, np.nan), -2, 0)
  ejected = 100 * (ed - es) / ed
  found = {
    "LVEDV": ed[..., 0],
    "LVESV": es[..., 0],
    "LVEF": ejected[..., 0],
    "LVM": ed[..., 1] * schema.MYOCARDIUM_G_PER_ML,
    "RVEDV": ed[..., 2],
    "RVESV": es[..., 2],
    "RVEF": ejected[..., 2],
  }
  return np.stack([found[name] for name in PHENOTYPES], axis=-1)


def volumes(labels, spacing):
  """Labels [B, ..., Z, H, W] with the spacing [B, 3] of each row in mm -> ml of LV, MYO, RV [B,
  ..., 3]."""
  counts = jnp.stack(
    [(labels == schema.LABELS[name]).sum(axis=(-3, -2, -1)) for name in ("LV", "MYO", "RV")],
    axis=-1,
  )
  voxel = spacing.prod(axis=-1) / 1000
  return counts * voxel.reshape(-1, *[1] * (counts.ndim - 1))


def make_draws(run, shape, samples: int, guidance: float = 1.0):
  """(variables, batch) -> what generation is judged by, a row a subject.

  Returns: draws uint8 [B, SHOWN, P, Z, H, W], real and rebuilt uint8 [B, P, Z, H, W], labels uint8
  of the cohort and, as the segmenter gives them, of the first draw, the rebuilt and the real
  images; ml [B, S, P, 3], ml_rebuilt and ml_real [B, P, 3]; latents of the first draw and of the
  real heart [B, N C]. Voxels of draws have the mean size in training: their own size, that of the
  real heart, is not told by an ECG.
  """
  generate = inference.make_generate(run.model, run.config, shape, STEPS, guidance)
  segment = inference.make_segment(run.model)

  def bytes_of(x):
    return jnp.round(255 * jnp.clip(x, 0, 1)).astype(jnp.uint8)

  def draws(variables, batch):
    spacing = batch["spacing"]
    of_draws = jnp.broadcast_to(jnp.float32(run.manifest["spacing"]), spacing.shape)
    batch = inputs.to_float(
      batch, run.standardiser if pretrainer.takes_covariates(run.config.model) else None
    )
    real = batch["cmr"]["ed_es_volumes"]

    def one(key):
      return jax.random.normal(key, (samples, *pretrainer.noise_shape(run.config.model, shape)))

    noise = jax.vmap(one)(inputs.sample_keys(run.config.seed, batch["index"]))
    conditions = batch.get("conditions")
    if conditions is not None and not guidance:
      conditions = jnp.full_like(conditions, jnp.nan)  # anybody's heart
    drawn = generate(variables, batch["ecg"], noise, conditions)
    # A few draws at a time: what the segmenter keeps of one is ten times its image.
    drawn_labels = jax.lax.map(
      lambda x: segment(variables, x), drawn.swapaxes(0, 1), batch_size=8
    ).swapaxes(0, 1)
    rebuilt = run.model.apply(variables, real, method=lambda m, x: m.tokenizer(x))
    of_rebuilt, of_real = (
      segment(variables, jnp.clip(x, 0, 1)) for x in (rebuilt["reconstruction"], real)
    )
    return {
      "draws": bytes_of(drawn[:, :SHOWN]),
      "real": bytes_of(real),
      "rebuilt": bytes_of(rebuilt["reconstruction"]),
      "labels": batch["labels"],
      "labels_draw": drawn_labels[:, 0],
      "labels_rebuilt": of_rebuilt,
      "labels_real": of_real,
      "ml": volumes(drawn_labels, of_draws),
      "ml_rebuilt": volumes(of_rebuilt, spacing),
      "ml_real": volumes(of_real, spacing),
      "latents_draw": latents_of(run, variables, drawn[:, 0]),
      "latents_real": rebuilt["latent_mean"].reshape(len(real), -1),
    }

  return draws


def lacking(run, cohort, features: dict) -> str:
  """Why hearts cannot be drawn and judged with this cohort, or ""."""
  if (
    pretrainer.takes_covariates(run.config.model)
    and tuple(cohort.info["covariates"]) != run.standardiser.covariates
  ):
    return (
      f"the generator takes the covariates {', '.join(run.standardiser.covariates)}, the cohort has "
      f"{', '.join(cohort.info['covariates']) or 'none'}"
    )
  if absent := [name for name in PHENOTYPES if name not in cohort.info["phenotypes"]]:
    return f"the cohort has no {', '.join(absent)} to compare with"
  if empty := [split for split in ("train", "test") if not len(complete(features[split], cohort))]:
    return f"nobody in {' and '.join(empty)} has an ECG, a CMR and all of {', '.join(PHENOTYPES)}"
  return ""


def complete(features: dict, cohort) -> np.ndarray:
  """Rows of `features`, all of which have an ECG, that have CMR and all PHENOTYPES."""
  columns = [list(cohort.info["phenotypes"]).index(name) for name in PHENOTYPES]
  return np.flatnonzero(
    (features["has_cmr"] > 0) & np.isfinite(features["phenotypes"][:, columns]).all(axis=1)
  )


def evaluate(
  run,
  cohort,
  features: dict,
  batch: int = 4,
  draws: int = 1000,
  seed: int = 0,
  split: str = "test",
) -> tuple[dict, dict]:
  """Draws hearts for the first SUBJECTS of `split` that have ECG and CMR; what is `lacking` must be
  asked before.

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
  found, blind = draw(run, cohort, hearts, batch)
  given = "ECG and covariates" if pretrainer.takes_covariates(run.config.model) else "ECG"
  results = {
    "memorisation": {},
    "given": given,
    "counts": {"subjects": len(hearts), "draws": SAMPLES, "steps": STEPS},
  }
  if cohort.fingerprint == run.manifest["cohort"]:
    latents = encoded(run, cohort.splits["train"], batch)
    results["memorisation"] = memorisation(found["latents_draw"], found["latents_real"], latents)

  columns = [list(cohort.info["phenotypes"]).index(name) for name in PHENOTYPES]
  y = test["phenotypes"][:, columns].astype(np.float64)
  of_train = train["phenotypes"][:, columns].astype(np.float64)
  train_hearts = pipeline.Rows(cohort.splits["train"], train["row"])
  pictures, ensembles = what_to_show(run, train_hearts, test, train, found, blind, of_train)
  results["images"] = {}
  for name, picture in pictures.items():
    scores = picture_scores(*picture, of_bytes(found["real"]), found["labels"])
    results["images"][name] = scores
  weights = statistics.bootstrap_weights(test["subject"], draws, seed)
  results |= ensemble_scores(y, ensembles, of_train, weights)
  shown = {name: found[name][:SHOWN] for name in ("real", "draws", "rebuilt")}
  return results, shown


def draw(run, cohort, hearts, batch: int) -> tuple[dict, dict | None]:
  """What `make_draws` gives for the records `hearts`: with their ECG, and without it where the
  generator has learned to."""
  shape = tuple(cohort.info["shapes"]["ed_es_volumes"][1:])
  draws = make_draws(run, shape, SAMPLES)
  found = over(run, draws, hearts, batch, "draw hearts", ("spacing",))
  if not run.config.model.generator.dropout:
    return found, None
  blind = make_draws(run, shape, POOL, guidance=0.0)
  return found, over(run, blind, hearts, batch, "without their ECG", ("spacing",))


def encoded(run, source, batch: int) -> np.ndarray:
  """Mean latents [M, N C] of the records of `source` that have CMR."""

  def encode(variables, rows):
    return {"latents": latents_of(run, variables, inputs.to_float(rows)["cmr"]["ed_es_volumes"])}

  seen = over(run, encode, source, batch, "encode train", ("spacing", "has_cmr"))
  return seen["latents"][seen["has_cmr"] > 0]


def over(run, function, source, batch: int, title: str, also: tuple[str, ...]) -> dict:
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


def ensemble_scores(y, ensembles: dict, of_train, weights) -> dict:
  """Scores of the phenotypes y [N, K] of test by ensembles {WHAT: [N or 1, S, K]}.

  Returns:
    `phenotypes`, `differences`, `unmeasured` and `diversity`, see `evaluate`.
  """
  measured = {name: np.isfinite(x) for name, x in ensembles.items()}
  many = measured["drawn"].sum(axis=1) > 1
  within = np.where(many, sd(ensembles["drawn"]), np.nan)
  spread = np.nanmean(within, axis=0) / of_train.std(axis=0)
  results = {"phenotypes": {}, "differences": {}, "unmeasured": {}}
  results["diversity"] = dict(zip(PHENOTYPES, spread.tolist()))
  crps = {}
  for name, x in ensembles.items():
    x = filled(x)
    crps[name] = statistics.crps(y, x[:, :ENSEMBLE] if len(x) > 1 else x)
    scores = phenotype_scores(y, x, crps[name], weights)
    results["phenotypes"][name] = dict(zip(PHENOTYPES, scores))
    results["unmeasured"][name] = float(1 - measured[name].all(axis=2).mean())
  for name in AGAINST:
    if name in crps:
      gain = crps["drawn"] - crps[name]
      results["differences"][name] = {
        phenotype: entry(*mean_and_draws(gain[:, k], weights))
        for k, phenotype in enumerate(PHENOTYPES)
      }
  return results


def what_to_show(run, hearts, test, train, found, blind, of_train) -> tuple[dict, dict]:
  """For every test subject: pictures {WHAT: (stacks in [0, 1] or None, labels)} and ensembles
  {WHAT: phenotypes [N or 1, S, K]}.

  hearts: the records of `train`, whose phenotypes are of_train [M, K]; found, blind: draws with and
  without the ECG.
  """
  nearest = {"ecg_neighbours": neighbours(unit(train["embedding"]), unit(test["embedding"]))}
  told = np.isfinite(train["covariates"]).any(axis=0) & (
    np.nan_to_num(np.nanstd(train["covariates"], axis=0)) > 0
  )
  if told.any():
    nearest["covariates"] = neighbours(
      *standardised(train["covariates"][:, told], test["covariates"][:, told])
    )

  def of_nearest(chosen, field):
    return np.stack([hearts[i][field] for i in chosen[:, 0]])

  mean_image = (
    sum(hearts[i]["ed_es_volumes"].astype(np.float64) for i in range(len(hearts))) / len(hearts)
  ).astype(np.float32) / 255
  mean_labels = np.asarray(
    jax.jit(inference.make_segment(run.model))(run.state.variables, mean_image[None])
  )
  mean_measured = measure(np.asarray(volumes(mean_labels, np.float32([run.manifest["spacing"]]))))

  def everybody(x):
    return x.repeat(len(test["row"]), axis=0)

  drawn = measure(found["ml"])
  pictures = {
    "drawn": (of_bytes(found["draws"][:, 0]), found["labels_draw"]),
    **{
      name: (of_bytes(of_nearest(chosen, "ed_es_volumes")), of_nearest(chosen, "labels"))
      for name, chosen in nearest.items()
    },
    "mean_heart": (everybody(mean_image[None]), everybody(mean_labels)),
    "rebuilt": (of_bytes(found["rebuilt"]), found["labels_rebuilt"]),
    "real": (None, found["labels_real"]),
  }
  ensembles = {
    "drawn": drawn,
    "train": of_train[None],
    **{name: of_train[chosen] for name, chosen in nearest.items()},
    "mean_heart": everybody(mean_measured[:, None]),
    "rebuilt": measure(found["ml_rebuilt"])[:, None],
    "real": measure(found["ml_real"])[:, None],
  }
  if (other := another(test["subject"])) is not None:
    pictures["another_ecg"] = pictures["drawn"][0][other], pictures["drawn"][1][other]
    ensembles["another_ecg"] = drawn[other]
  if blind is not None:
    pictures["without_ecg"] = of_bytes(blind["draws"][:, 0]), blind["labels_draw"]
    ensembles["without_ecg"] = measure(blind["ml"]).reshape(1, -1, drawn.shape[2])
  return pictures, ensembles


def another(subject: np.ndarray) -> np.ndarray | None:
  """Of every row of subject [N, 2] the next row, round and round, of somebody else [N]; None where
  there is nobody else."""
  differs = (subject[:, None] != subject).any(axis=2)
  if not differs.any(axis=1).all():
    return None
  count = len(subject)
  turn = (np.arange(count)[:, None] + np.arange(count)) % count  # row i looks at i, i + 1, ...
  return turn[np.arange(count), np.take_along_axis(differs, turn, axis=1).argmax(axis=1)]


def of_bytes(x: np.ndarray) -> np.ndarray:
  return x.astype(np.float32) / 255


def sd(x: np.ndarray) -> np.ndarray:
  """SD over the draws [N, S, K] that are known -> [N, K]; 0 of one."""
  known = np.isfinite(x)
  count = np.maximum(known.sum(axis=1), 2)
  mean = np.where(known, x, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
  return np.sqrt((np.where(known, x - mean[:, None], 0) ** 2).sum(axis=1) / (count - 1))


def latents_of(run, variables, stacks):
  """stacks [B, P, Z, H, W] in [0, 1] -> mean latents [B, N C]."""
  return run.model.apply(variables, stacks, method=lambda m, x: m.tokenizer.encode(x)[0]).reshape(
    len(stacks), -1
  )


def filled(x: np.ndarray) -> np.ndarray:
  """A heart without a chamber to measure counts as the mean of the others of its kind [..., K]; NaN
  where there are none."""
  known = np.isfinite(x)
  count = known.sum(axis=(0, 1))
  mean = np.where(known, x, 0).sum(axis=(0, 1)) / np.maximum(count, 1)
  return np.where(known, x, np.where(count > 0, mean, np.nan))


def neighbours(gallery: np.ndarray, queries: np.ndarray) -> np.ndarray:
  """Rows of the ENSEMBLE nearest of gallery [M, D] to each of queries [N, D], nearest first [N,
  ENSEMBLE]."""
  return np.argsort(cdist(queries, gallery), axis=1, kind="stable")[:, :ENSEMBLE]


def unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Both by the mean and SD of train; what is unknown is the mean, and a column that does not vary
  counts for nothing."""
  mean, sd = np.nanmean(train, axis=0), np.nanstd(train, axis=0)
  scale = np.where(sd > 0, sd, np.inf)
  return np.nan_to_num((train - mean) / scale), np.nan_to_num((test - mean) / scale)


def mean_and_draws(values: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
  """Mean of values [N] and its bootstrap draws [R] by weights [R, N]."""
  return values.mean(), weights @ values / weights.sum(axis=1)


def phenotype_scores(
  y: np.ndarray, x: np.ndarray, crps: np.ndarray, weights: np.ndarray
) -> list[dict]:
  """Of each phenotype: R2, bias and SD of the error of the mean of x [N or 1, S, K] against y [N,
  K], and the mean of crps [N, K]."""
  mean = np.broadcast_to(x.mean(axis=1), y.shape)
  r2, drawn = statistics.r2(y, mean), statistics.r2(y, mean, weights)
  found = []
  for k in range(y.shape[1]):
    value, values = mean_and_draws(crps[:, k], weights)
    error = mean[:, k] - y[:, k]
    found.append(
      {
        "r2": float(r2[k]),
        "r2_ci": statistics.interval(drawn[:, k]).tolist(),
        "bias": float(error.mean()),
        "sd": float(error.std(ddof=1)),
        "crps": float(value),
        "crps_ci": statistics.interval(values).tolist(),
      }
    )
  return found


def picture_scores(x, labels, real, truth) -> dict[str, float]:
  """Means over subjects: PSNR (dB) and SSIM of x against the real images, where there is one, and
  Dice of its labels."""
  known = truth.any(axis=(1, 2, 3, 4))  # nobody has drawn the others

  def dice(name):
    return images.dice(labels[known], truth[known], schema.LABELS[name])

  found = {}
  if x is not None:
    found["psnr"] = float(images.psnr(x, real).mean())
    found["ssim"] = float(images.ssim(x, real).mean())
  for name in ("LV", "MYO", "RV"):
    found[f"dice_{name}"] = float(np.nanmean(dice(name))) if known.any() else np.nan
  return found


def memorisation(drawn: np.ndarray, real: np.ndarray, train: np.ndarray) -> dict[str, float]:
  """Distance of latents to the nearest of train: of draws, and of real hearts of test, which nobody
  can have memorised.

  `closer` is the share of draws that lie nearer than all but 1 % of the real hearts: 0.01 of draws
  from the true distribution, near 1 of copies.
  """
  of_drawn, of_real = (cdist(x, train).min(axis=1) for x in (drawn, real))
  return {
    "nearest_drawn": float(np.median(of_drawn)),
    "nearest_real": float(np.median(of_real)),
    "closer": float((of_drawn < np.quantile(of_real, 0.01)).mean()),
  }


def tables(results: dict) -> list[Table]:
  counts, hearts = results["counts"], f"Hearts drawn from the {results['given']}"
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


def phenotype_table(results: dict, title: str) -> Table:
  """Of each phenotype and each thing to show for an ECG: CRPS (lower is better), R2 of the mean,
  bias."""
  rows = []
  for name in PHENOTYPES:
    for what, scores in results["phenotypes"].items():
      score, minus = scores[name], results["differences"].get(what, {}).get(name, {})
      rows.append(
        [
          name,
          shown_as(results, what),
          interval(score["crps"], score["crps_ci"]),
          interval(minus.get("value"), minus.get("ci")),
          interval(score["r2"], score["r2_ci"]),
          number(score["bias"]),
        ]
      )
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
  for what, scores in results["images"].items():
    rows.append([shown_as(results, what), *(number(scores.get(name)) for name in columns)])
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
