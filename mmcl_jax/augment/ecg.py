"""ECG augmentations on the device: pure functions of one recording [L, T] and its random key.

Formulas of MMCL (Turgut et al. 2025) and its code; strengths come from the config.
"""

import jax
import jax.numpy as jnp


def crop(key, ecg, samples: int):
  """A random window of `samples` samples; random only in time, the same for all leads."""
  latest = ecg.shape[1] - samples
  start = jax.random.randint(key, (), 0, latest + 1)
  return jax.lax.dynamic_slice_in_dim(ecg, start, samples, axis=1)


def phase_noise(key, ecg, strength: float, probability: float):
  """Fourier-transform surrogate: random phases exp(i a phi), phi ~ U[0, 2 pi), the same on all
  leads."""
  gate, key = jax.random.split(key)
  spectrum = jnp.fft.rfft(ecg, axis=1)
  frequencies = spectrum.shape[1]
  phase = strength * jax.random.uniform(key, (frequencies,), maxval=2 * jnp.pi)
  phase = phase.at[0].set(0.0)  # the mean keeps its sign
  shifted = spectrum * jnp.exp(1j * phase)
  noisy = jnp.fft.irfft(shifted, n=ecg.shape[1], axis=1)
  chosen = jax.random.bernoulli(gate, probability)
  return jnp.where(chosen, noisy, ecg)


def reverse(key, ecg, probability: float):
  """Time flip of the whole recording (CardiacNets, Ding et al. 2024: probability 0.33)."""
  chosen = jax.random.bernoulli(key, probability)
  return jnp.where(chosen, ecg[:, ::-1], ecg)


def invert(key, ecg, probability: float):
  """Sign flip, all leads together (CardiacNets: probability 0.33)."""
  chosen = jax.random.bernoulli(key, probability)
  return jnp.where(chosen, -ecg, ecg)


def gain_noise(key, ecg, sigma: float):
  """x + 0.6 x n with n ~ N(0, sigma^2) for every sample: what MMCL's code calls jitter; it leaves
  zeros as they are."""
  return ecg + 0.6 * ecg * (sigma * jax.random.normal(key, ecg.shape, ecg.dtype))


def jitter(key, ecg, sigma: float):
  """Additive white noise of standard deviation `sigma`, in units of the normalised signal."""
  return ecg + sigma * jax.random.normal(key, ecg.shape)


def rescale(key, ecg, sigma: float):
  """One factor N(1, sigma^2) for the whole recording."""
  return ecg * (1 + sigma * jax.random.normal(key, ()))


def augment(
  key,
  ecg,
  samples: int,
  *,
  phase_noise_strength: float,
  jitter_sigma: float,
  rescale_sigma: float,
  gain_noise_sigma: float = 0,
  time_flip: float = 0,
  sign_flip: float = 0,
  phase_noise_always: bool = False,
):
  """Crop, flips, then phase noise, jitter and rescaling in MMCL's order; [L, T] -> [L, samples]. 0
  leaves one out.

  Phase noise comes to half of the recordings, as in MMCL's masked autoencoder, or always, as in its
  contrastive stage. MMCL's jitter is `gain_noise_sigma` 0.25; `jitter_sigma` adds white noise.
  Flips are probabilities.
  """
  keys = jax.random.split(key, 7)
  ecg = crop(keys[0], ecg, samples)
  if time_flip:
    ecg = reverse(keys[4], ecg, time_flip)
  if sign_flip:
    ecg = invert(keys[5], ecg, sign_flip)
  if phase_noise_strength:
    probability = 1.0 if phase_noise_always else 0.5
    ecg = phase_noise(keys[1], ecg, phase_noise_strength, probability)
  if gain_noise_sigma:
    ecg = gain_noise(keys[6], ecg, gain_noise_sigma)
  if jitter_sigma:
    ecg = jitter(keys[2], ecg, jitter_sigma)
  if rescale_sigma:
    ecg = rescale(keys[3], ecg, rescale_sigma)
  return ecg
