"""ECG augmentations that published systems use beyond crop, phase noise and rescaling, against
NumPy and their laws."""

import jax
import numpy as np
import pytest
from scipy import stats

from mmcl_jax.augment import ecg as augment

L, T, N = 3, 64, 2000
OFF = dict(phase_noise_strength=0, jitter_sigma=0, rescale_sigma=0)
ECG = np.random.default_rng(0).normal(size=(L, T)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(5), N)


def draws(ecg, samples=T, **options):
  """[N, L, samples], one of every key."""
  return np.asarray(
    jax.jit(jax.vmap(lambda key: augment.augment(key, ecg, samples, **OFF | options)))(KEYS)
  )


@pytest.fixture(scope="module")
def flipped():
  return {name: draws(ECG, **{name: 0.33}) for name in ("time_flip", "sign_flip")}


def test_gain_noise_is_normal_and_in_proportion_to_the_sample():
  noise = (draws(np.ones((L, T), np.float32), gain_noise_sigma=0.25)[:200] - 1) / 0.6
  assert stats.kstest(noise.ravel(), stats.norm(0, 0.25).cdf).pvalue > 0.001
  # times, then leads: independent
  for variables in (noise.reshape(-1, T).T, noise.swapaxes(0, 1).reshape(L, -1)):
    r = np.corrcoef(variables) - np.eye(len(variables))
    assert np.abs(r).max() < 5 / np.sqrt(variables.shape[1])
  np.testing.assert_allclose(
    draws(ECG, gain_noise_sigma=0.25)[:200], ECG * (1 + 0.6 * noise), atol=2e-6
  )
  assert not draws(np.zeros((L, T), np.float32), gain_noise_sigma=0.25).any()


@pytest.mark.parametrize(
  "name, numpy", [("time_flip", lambda x: x[..., ::-1]), ("sign_flip", np.negative)]
)
def test_flips_are_numpy_s_at_their_probability(flipped, name, numpy):
  done = np.abs(flipped[name] - ECG).max(axis=(1, 2)) > 0
  np.testing.assert_array_equal(
    flipped[name][done], np.broadcast_to(numpy(ECG), (done.sum(), L, T))
  )
  assert abs(done.mean() - 0.33) < 4 * np.sqrt(0.33 * 0.67 / N)
  # of the same crop
  np.testing.assert_array_equal(draws(ECG, 40, **{name: 1.0}), numpy(draws(ECG, 40)))


def test_flips_are_drawn_apart(flipped):
  turned, inverted = (np.abs(x - ECG).max(axis=(1, 2)) > 0 for x in flipped.values())
  assert abs(np.corrcoef(turned, inverted)[0, 1]) < 4 / np.sqrt(N)
  start = np.argmin(np.abs(draws(ECG, 40)[:, 0, :1] - ECG[0]), axis=1)
  assert abs(np.corrcoef(turned, start)[0, 1]) < 4 / np.sqrt(N)


@pytest.mark.reported("MMCL's contrastive stage left half of the ECGs without phase noise")
@pytest.mark.parametrize("always, share", [(False, 0.5), (True, 1.0)])
def test_phase_noise_comes_to_half_of_the_ecgs_or_to_all(always, share):
  noisy = draws(ECG, **{"phase_noise_strength": 0.1, "phase_noise_always": always})
  done = (np.abs(noisy - ECG).max(axis=(1, 2)) > 1e-2).mean()
  assert abs(done - share) <= 4 * np.sqrt(share * (1 - share) / N)


def test_float64_stays_float64():
  with jax.enable_x64(True):
    out = augment.augment(
      jax.random.key(0),
      ECG.astype(np.float64),
      T,
      **OFF,
      gain_noise_sigma=0.25,
      time_flip=0.5,
      sign_flip=0.5,
    )
    assert out.dtype == np.float64
