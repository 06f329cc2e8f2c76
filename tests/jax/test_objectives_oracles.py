"""Every objective against NumPy written row by row from its formula, in float64 and in float32."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.special import softmax
from scipy.stats import norm
from sklearn.metrics import log_loss, mean_squared_error

from mmcl_jax import objectives
from mmcl_jax.objectives import common, contrastive, noncontrastive, ntxent, phenotypes, supervised
from objective_cases import B, CASES, E, K, case, counts


def unit(z):
  return np.array([row / np.linalg.norm(row) for row in z])


def named(outputs, name):
  outputs = outputs["again"] if name.endswith(".again") else outputs
  name = name.removesuffix(".again")
  return outputs["ecg_projection"] if name == "ecg" else outputs["cmr"][name]["projection"]


def rows_of(batch, *names):
  return counts(batch, {"has_ecg" if name.startswith("ecg") else "has_cmr" for name in names})


def others(i, batch, valid):
  return [
    j
    for j in range(B)
    if j != i and valid[j] and tuple(batch["subject"][j]) != tuple(batch["subject"][i])
  ]


def distance(batch, i, j):
  """Mean squared difference over the targets that both know; None where there is none."""
  d = [
    (batch["targets"][i, k] - batch["targets"][j, k]) ** 2
    for k in range(K)
    if np.isfinite(batch["targets"][i, k]) and np.isfinite(batch["targets"][j, k])
  ]
  return np.mean(d) if d else None


def weighted_nce(outputs, batch, a, b, temperature, weight, b_to_a=0.5):
  """Mean over rows, MMCL's way round: logits = Z_b Z_a^T, rows b -> a, columns a -> b. weight(i,
  k): of negatives."""
  valid = rows_of(batch, a, b)
  logits = unit(named(outputs, b)) @ unit(named(outputs, a)).T / temperature
  total = []
  for i in np.flatnonzero(valid):
    weights = {k: weight(i, k) for k in others(i, batch, valid)}

    def look(s, i=i, weights=weights):
      negatives = sum(w * np.exp(s[k]) for k, w in weights.items())
      return -np.log(np.exp(s[i]) / (np.exp(s[i]) + negatives))

    total.append(b_to_a * look(logits[i]) + (1 - b_to_a) * look(logits[:, i]))
  return np.mean(total)


def clip(outputs, batch, a="ecg", b="ed", b_to_a=0.5, temperature=0.1):
  return weighted_nce(outputs, batch, a, b, temperature, lambda i, k: 1.0, b_to_a)


def dual_phase(outputs, batch, w_ed=1.0, w_es=1.0, w_edes=1.0, temperature=0.07):
  # All three pairs of a row need both modalities, also ED with ES.
  batch = batch | {"mask": batch["mask"] * batch["has_ecg"] * batch["has_cmr"]}
  pairs = [
    clip(outputs, batch, a, b, temperature=temperature)
    for a, b in (("ecg", "ed"), ("ecg", "es"), ("ed", "es"))
  ]
  return np.dot([w_ed, w_es, w_edes], pairs) / (w_ed + w_es + w_edes)


def nt_xent(outputs, batch, of="image", temperature=0.1):
  """Over a list of all views, (row, vector)."""
  valid = rows_of(batch, of)
  views = [(i, v) for name in (of, f"{of}.again") for i, v in enumerate(unit(named(outputs, name)))]
  losses = []
  for p, (i, v) in enumerate(views):
    if valid[i]:
      rest = [
        q for q, (j, _) in enumerate(views) if q != p and (j == i or j in others(i, batch, valid))
      ]
      s = [v @ views[q][1] / temperature for q in rest]
      [positive] = [v @ views[q][1] / temperature for q in rest if views[q][0] == i]
      losses.append(np.log(np.sum(np.exp(s))) - positive)
  return np.mean(losses)


def siglip(outputs, batch, a="ecg", b="ed", temperature=0.1, bias=-10.0):
  valid = rows_of(batch, a, b)
  x, y = unit(named(outputs, a)), unit(named(outputs, b))

  def sigmoid(t):
    return 1 / (1 + np.exp(-t))

  total = 0.0
  for i in np.flatnonzero(valid):
    for k in [i, *others(i, batch, valid)]:
      total -= np.log(sigmoid((1 if k == i else -1) * (x[i] @ y[k] / temperature + bias)))
  return total / valid.sum()


def phenotype_weighted(outputs, batch, a="ecg", b="ed", temperature=0.05, sigma=0.5):
  def weight(i, k):
    d = distance(batch, i, k)
    return 1.0 if d is None else 1 - np.exp(-d / sigma**2)

  return weighted_nce(outputs, batch, a, b, temperature, weight)


def false_negative_removal(outputs, batch, a="ecg", b="ed", temperature=0.1, radius=0.5):
  def weight(i, k):
    d = distance(batch, i, k)
    return 0.0 if d is not None and np.sqrt(d) < radius else 1.0

  return weighted_nce(outputs, batch, a, b, temperature, weight)


def soft_positive(outputs, batch, a="ecg", b="ed", temperature=0.05, sigma=0.5, radius=0.5):
  valid = rows_of(batch, a, b)
  x, y = unit(named(outputs, a)), unit(named(outputs, b))
  total = []
  for query, key in ((x, y), (y, x)):
    for i in np.flatnonzero(valid):
      rest = [i, *others(i, batch, valid)]
      p = {i: 1.0}
      for k in rest[1:]:
        d = distance(batch, i, k)
        if d is not None and np.sqrt(d) < radius:
          p[k] = np.exp(-d / sigma**2)
      denominator = sum(np.exp(query[i] @ key[k] / temperature) for k in rest)
      total.append(
        -sum(
          w * np.log(np.exp(query[i] @ key[k] / temperature) / denominator) for k, w in p.items()
        )
        / sum(p.values())
      )
  return np.mean(total)


def relational(outputs, batch, a="ecg", b="ecg", temperature=0.07, sigma=0.2):
  valid = rows_of(batch, a, b)
  x, y = unit(named(outputs, a)), unit(named(outputs, b))
  total = []
  for i in np.flatnonzero(valid):
    rest = [k for k in others(i, batch, valid) if distance(batch, i, k) is not None]
    if not rest:
      continue
    rest += [i] if a != b else []
    p = np.array([np.exp(-np.sqrt(distance(batch, i, k)) / sigma) for k in rest])
    q = np.array([np.exp(x[i] @ y[k] / temperature) for k in rest])
    p, q = p / p.sum(), q / q.sum()
    total.append(np.sum(p * np.log(p / q)))
  return np.mean(total)


def phenotype_regression(outputs, batch, of="ecg", delta=0.0):
  total = []
  for i in np.flatnonzero(rows_of(batch, of)):
    e = np.abs(outputs["regression"][of][i] - batch["targets"][i])
    e = e[np.isfinite(e)]
    if len(e):
      total.append(
        np.mean(e**2 if not delta else np.where(e <= delta, e**2 / 2, delta * (e - delta / 2)))
      )
  return np.mean(total)


def disease_classification(outputs, batch, of="ecg", smoothing=0.0):
  """sklearn's log-loss of every known label as a case of weight q and a control of weight 1 - q."""
  total = []
  for i in np.flatnonzero(rows_of(batch, of)):
    known = np.isfinite(batch["diseases"][i])
    if known.any():
      p = 1 / (1 + np.exp(-outputs["classification"][of][i, known]))
      q = (1 - smoothing) * batch["diseases"][i, known] + smoothing * 0.5
      total.append(
        log_loss(np.repeat([1, 0], len(q)), np.tile(p, 2), sample_weight=np.concatenate([q, 1 - q]))
      )
  return np.mean(total)


def vicreg(outputs, batch, a="ecg", b="ed", invariance=25.0, variance=25.0, covariance=1.0):
  valid = rows_of(batch, a, b)
  views = [named(outputs, name)[valid] for name in (a, b)]
  flat = sum(np.maximum(0, 1 - np.sqrt(z.var(axis=0, ddof=1) + 1e-4)).mean() for z in views)
  squares = [np.cov(z.T) ** 2 for z in views]
  return (
    invariance * np.mean((views[0] - views[1]) ** 2)
    + variance * flat
    + covariance * sum(c.sum() - np.trace(c) for c in squares) / E
  )


def simsiam(outputs, batch):
  def cos(u, v):
    return u @ v / np.linalg.norm(u) / np.linalg.norm(v)

  z, p = outputs["siamese"]["projection"], outputs["siamese"]["prediction"]
  return np.mean(
    [
      -(cos(p[0, i], z[1, i]) + cos(p[1, i], z[0, i])) / 2
      for i in np.flatnonzero(rows_of(batch, "ecg"))
    ]
  )


def cmr_mae(outputs, batch, of="sax", norm_pix=False):
  tower, total = outputs["cmr"][of], []
  for i in np.flatnonzero(rows_of(batch, of)):
    errors = []
    for n in np.flatnonzero(tower["patch_mask"][i]):
      x = tower["patches"][i, n]
      x = (x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-6) if norm_pix else x
      errors.append(np.mean((x - tower["reconstruction"][i, n]) ** 2))
    total.append(np.mean(errors))
  return np.mean(total)


def kl_autoencoder(outputs, batch, noise=0.05):
  """Gaussians as scipy has them: log-likelihood of the voxels without its constant, KL by its
  definition, an integral."""
  made, total = outputs["tokenizer"], []
  for i in np.flatnonzero(rows_of(batch, "image")):
    x, y = batch["cmr"]["ed_es_volumes"][i], made["reconstruction"][i]
    told = norm.logpdf(x, y, noise) - norm.logpdf(0, 0, noise)
    p, q = norm(made["latent_mean"][i], np.exp(made["latent_log_variance"][i] / 2)), norm(0, 1)
    # exact: the integrand is a polynomial of degree 2
    at, weights = np.polynomial.hermite_e.hermegauss(8)
    z = p.mean()[..., None] + p.std()[..., None] * at
    densities = norm.logpdf(z, p.mean()[..., None], p.std()[..., None]) - q.logpdf(z)
    kl = (densities * weights).sum() / weights.sum()
    total.append((kl - told.sum()) / x.size)
  return np.mean(total)


def segmentation(outputs, batch):
  total = []
  for i in np.flatnonzero(rows_of(batch, "image")):
    labels, p = (
      batch["labels"][i].ravel(),
      softmax(outputs["segmentation"][i].reshape(-1, 4), axis=1),
    )
    dice = [
      (2 * p[labels == c, c].sum() + 1) / (p[:, c].sum() + (labels == c).sum() + 1)
      for c in (1, 2, 3)
    ]
    total.append(log_loss(labels, p, labels=range(4)) + 1 - np.mean(dice))
  return np.mean(total)


def flow_matching(outputs, batch):
  made = outputs["generator"]
  return mean_squared_error(
    *(made[name][rows_of(batch, "image")].ravel() for name in ("target", "velocity"))
  )


def mae(outputs, batch, region="masked", ncc_weight=0.0, norm_pix=False):
  total = []
  for i in np.flatnonzero(rows_of(batch, "ecg")):
    x, y = batch["ecg"][i], outputs["reconstruction"][i]
    seen = (
      np.repeat(outputs["patch_mask"][i], 5, axis=1) > 0
      if region == "masked"
      else np.ones_like(x, bool)
    )

    def z(v):
      return (v - v.mean()) / np.sqrt(v.var(ddof=1) + 1e-8)

    ncc = np.mean([z(x[lead]) @ z(y[lead]) / (len(x[lead]) - 1) for lead in range(2)])
    if norm_pix:
      patches = x.reshape(-1, 5)
      deviation = np.sqrt(patches.var(axis=1, ddof=1, keepdims=True) + 1e-6)
      x = ((patches - patches.mean(axis=1, keepdims=True)) / deviation).reshape(x.shape)
    total.append((1 - ncc_weight) * np.mean((x - y)[seen] ** 2) + ncc_weight * (1 - ncc))
  return np.mean(total)


MORE = [
  ("mae", dict(region="all", ncc_weight=0.1)),
  ("mae", dict()),
  ("mae", dict(norm_pix=True)),
  ("dual_phase", dict()),
  ("clip", dict()),
  ("clip", dict(a="es", b="ecg.again")),
  ("nt_xent", dict(of="ecg", temperature=0.5)),
  ("siglip", dict()),
  ("phenotype_weighted", dict()),
  ("soft_positive", dict()),
  ("soft_positive", dict(radius=50.0, sigma=0.9)),
  ("false_negative_removal", dict(radius=0.8)),
  ("relational", dict()),
  ("relational", dict(a="ecg", b="image", sigma=0.5)),
  ("phenotype_regression", dict(of="image")),
  ("disease_classification", dict(of="image")),
  ("vicreg", dict(a="ecg", b="ecg.again", variance=3.0, covariance=2.0)),
  ("cmr_mae", dict()),
  ("kl_autoencoder", dict()),
]


def test_every_objective_has_a_case():
  assert set(CASES) == set(objectives.BUILT_IN)


@pytest.mark.parametrize(
  "name, parameters", [(name, parameters) for name, (parameters, _) in CASES.items()] + MORE
)
def test_objective_is_its_formula(name, parameters):
  """float64 stays float64, to 1e-12, which one cast to float32 would spoil (1e-8 after the root of
  a rounded 0)."""
  outputs, batch = case(seed=1, dtype=np.float64)
  expected = globals()[name](outputs, batch, **parameters)
  fn = objectives.find(name, "config.objectives.mine.fn")
  compute = jax.jit(
    lambda outputs, batch: (loss := fn(outputs, batch, **parameters), objectives.mean(loss))
  )
  with jax.enable_x64(True):
    loss, mean = compute(outputs, batch)
    assert {x.dtype for x in jax.tree.leaves(loss)} == {np.dtype(np.float64)}
  np.testing.assert_allclose(mean, expected, rtol=1e-8 if name == "relational" else 1e-12)
  single = jax.tree.map(
    lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, (outputs, batch)
  )
  np.testing.assert_allclose(compute(*single)[1], expected, rtol=2e-5)


def test_clip_weighs_the_direction_it_names():
  """Both ECGs find their own CMR; the first CMR is nearer to the second ECG. Only CMR -> ECG
  errs."""
  outputs, batch = case(whole=True)
  outputs["ecg_projection"] = np.float32([[1, 0], [0, 1]])
  outputs["cmr"]["ed"]["projection"] = np.float32([[1, 3], [-1, 9]])
  batch = jax.tree.map(lambda x: x[:2], batch)

  def loss(b_to_a):
    return objectives.mean(contrastive.clip(outputs, batch, "ecg", "ed", b_to_a, temperature=0.01))

  assert loss(0.0) < 0.1 and loss(1.0) > 5
  np.testing.assert_allclose(loss(0.75), 0.25 * loss(0.0) + 0.75 * loss(1.0), rtol=1e-6)


def test_clip_is_cross_entropy_of_torch():
  """Value to 1e-12 and gradients to 1e-10 in float64: MMCL's lambda is b_to_a, its first modality
  the image."""
  torch = pytest.importorskip("torch")
  outputs, batch = case(dtype=np.float64, whole=True)
  ecg, image = (torch.tensor(named(outputs, name), requires_grad=True) for name in ("ecg", "image"))
  normal = torch.nn.functional.normalize
  logits = normal(image, dim=1) @ normal(ecg, dim=1).T / 0.1
  labels = torch.arange(B)
  entropy = torch.nn.functional.cross_entropy
  expected = 0.75 * entropy(logits, labels) + 0.25 * entropy(logits.T, labels)
  expected.backward()
  with jax.enable_x64(True):

    def loss(o):
      return objectives.mean(
        contrastive.clip(o, batch, "ecg", "image", b_to_a=0.75, temperature=0.1)
      )

    value, grads = jax.value_and_grad(loss)(outputs)
  np.testing.assert_allclose(value, expected.item(), rtol=1e-12)
  for grad, tensor in (
    (grads["ecg_projection"], ecg),
    (grads["cmr"]["image"]["projection"], image),
  ):
    np.testing.assert_allclose(grad, tensor.grad, atol=1e-10 * float(tensor.grad.norm()))


def test_disease_classification_is_that_of_torch():
  """One disease is cross-entropy over two classes with PyTorch's label smoothing, as MMCL
  fine-tunes; large odds stay finite."""
  torch = pytest.importorskip("torch")
  outputs, batch = case(dtype=np.float64, whole=True)
  odds, y = outputs["classification"]["ecg"][:, :1].copy(), batch["diseases"][:, :1]
  odds[0] = 800.0
  tensor = torch.tensor(odds, requires_grad=True)
  logits = torch.cat([torch.zeros_like(tensor), tensor], dim=1)
  expected = torch.nn.functional.cross_entropy(
    logits, torch.tensor(y[:, 0], dtype=torch.int64), label_smoothing=0.1
  )
  expected.backward()
  with jax.enable_x64(True):

    def loss(odds):
      return objectives.mean(
        supervised.disease_classification(
          {"classification": {"ecg": odds}}, batch | {"diseases": y}, smoothing=0.1
        )
      )

    value, gradient = jax.value_and_grad(loss)(odds)
  np.testing.assert_allclose(value, expected.item(), rtol=1e-12)
  np.testing.assert_allclose(gradient, tensor.grad, atol=1e-14)
  plain = supervised.disease_classification(outputs, batch, smoothing=0.1).metrics["log_loss"]
  np.testing.assert_allclose(plain, disease_classification(outputs, batch), rtol=1e-5)


@pytest.mark.parametrize(
  "fn, parameters",
  [
    (phenotypes.soft_positive, dict(radius=0.0)),
    (phenotypes.false_negative_removal, dict(radius=0.0)),
    (phenotypes.phenotype_weighted, dict(sigma=1e-3)),
  ],
)
def test_without_likeness_they_are_plain_info_nce(fn, parameters):
  outputs, batch = case()
  batch["targets"][10] += 1  # nobody is the same heart as another
  plain = contrastive.clip(outputs, batch, "ecg", "image", temperature=0.1)
  loss = fn(outputs, batch, "ecg", "image", temperature=0.1, **parameters)
  np.testing.assert_allclose(loss.values, plain.values, rtol=1e-6)
  np.testing.assert_allclose(loss.metrics["r@1"], plain.metrics["r@1"], rtol=1e-6)


def test_learned_scale_and_bias_stand_in_for_the_parameters():
  outputs, batch = case()
  learned = outputs | {"log_scale": np.float32(np.log(4)), "bias": np.float32(-2)}
  for name, (parameters, _) in CASES.items():
    fn = objectives.find(name, "")
    if name in (
      "mae",
      "cmr_mae",
      "simsiam",
      "vicreg",
      "phenotype_regression",
      "disease_classification",
      "kl_autoencoder",
      "segmentation",
      "flow_matching",
    ):
      assert objectives.mean(fn(learned, batch, **parameters)) == objectives.mean(
        fn(outputs, batch, **parameters)
      )
      continue
    fixed = parameters | dict(temperature=0.25) | (dict(bias=-2.0) if name == "siglip" else {})
    loss = fn(learned, batch, **parameters)
    np.testing.assert_allclose(
      objectives.mean(loss), objectives.mean(fn(outputs, batch, **fixed)), rtol=1e-5
    )
    np.testing.assert_allclose(loss.metrics["temperature"], 0.25, rtol=1e-6)


def test_phenotype_distance_in_float32():
  """From matrix products; of oneself it is 0, not what rounding leaves (a root of it would
  show)."""
  _, batch = case()
  batch["targets"] *= np.float32(7)  # outliers
  d, common_target = common.phenotype_distance(batch)
  expected = [[distance(batch, i, j) for j in range(B)] for i in range(B)]
  assert np.array_equal(common_target, [[x is not None for x in row] for row in expected])
  np.testing.assert_allclose(
    d, np.array([[x or 0 for x in row] for row in expected]), rtol=1e-4, atol=1e-4
  )
  many = {"targets": np.random.default_rng(0).normal(size=(B, 82)).astype(np.float32)}
  assert (np.diagonal(jax.jit(common.phenotype_distance)(many)[0]) == 0).all()


def test_metrics_by_hand():
  outputs, batch = case(whole=True)
  outputs["ecg_projection"][:] = outputs["cmr"]["image"]["projection"]  # every ECG finds its image
  outputs["ecg_projection"][0] = outputs["cmr"]["image"]["projection"][1]  # but one
  for fn in (contrastive.clip, phenotypes.soft_positive):
    np.testing.assert_allclose(fn(outputs, batch, "ecg", "image").metrics["r@1"], 15 / 16)
  image, again = (
    outputs["cmr"]["image"]["projection"],
    outputs["again"]["cmr"]["image"]["projection"],
  )
  again[:] = image
  assert ntxent.nt_xent(outputs, batch).metrics["r@1"] == 1
  # row 0 is as near to row 1's first view as to its own second one; row 1 is nearer to row 0's
  image[1] = image[0]
  np.testing.assert_allclose(ntxent.nt_xent(outputs, batch).metrics["r@1"], 14 / 16)
  batch["targets"][:] = [0, 0, 0, 0]
  batch["targets"][:4] = [9, 9, 9, 9]  # 4 hearts of one kind and 12 of another
  removed = phenotypes.false_negative_removal(outputs, batch, "ecg", "image", radius=1.0)
  np.testing.assert_allclose(removed.metrics["negative_weight"], 2 * 4 * 12 / (16 * 15), rtol=1e-6)
  positive = phenotypes.soft_positive(outputs, batch, "ecg", "image", radius=1.0)
  np.testing.assert_allclose(positive.metrics["positives"], (4 * 4 + 12 * 12) / 16, rtol=1e-6)
  outputs["regression"]["ecg"][:] = batch["targets"]
  outputs["regression"]["ecg"][0] = 0
  batch["targets"][1, 2:] = np.nan
  regressed = supervised.phenotype_regression(outputs, batch)
  np.testing.assert_allclose(regressed.metrics["r2"], 1 - 4 / 14, rtol=1e-6)


def test_spread_tells_collapse_from_health():
  outputs, batch = case()
  outputs["siamese"]["projection"] = (
    np.random.default_rng(0).normal(size=(2, B, 64)).astype(np.float32)
  )
  outputs["siamese"]["prediction"] = outputs["siamese"]["projection"]
  assert 0.9 < noncontrastive.simsiam(outputs, batch).metrics["spread"] < 1
  outputs["siamese"]["projection"] = np.ones((2, B, 64), np.float32)
  assert noncontrastive.simsiam(outputs, batch).metrics["spread"] < 1e-3


def test_simsiam_moves_predictions_only():
  """The projections are targets: no gradient reaches them from this objective except through the
  prediction."""
  outputs, batch = case()
  grads = jax.grad(lambda o: objectives.mean(noncontrastive.simsiam(o, batch)))(outputs)["siamese"]
  assert np.all(grads["projection"] == 0) and np.any(grads["prediction"] != 0)


def test_weight_of_an_objective_keeps_float64():
  entries = {
    "a": dict(fn="mae", weight=0.1),
    "b": dict(fn="mae", weight=dict(steps=(0, 10), values=(0.0, 0.3))),
  }
  with jax.enable_x64(True):
    constant, scheduled = objectives.build(ConfigDict(entries))
    found = np.float64([constant.weight(3), scheduled.weight(jax.numpy.int32(7))])
  np.testing.assert_allclose(found, [0.1, 0.21], rtol=1e-14)
  assert objectives.build(ConfigDict(entries))[0].weight(3).dtype == np.float32
