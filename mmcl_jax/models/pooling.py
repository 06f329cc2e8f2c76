"""Attention pooling of tokens, and their modulation by covariates (FiLM). Letters: B batch, N
tokens, D width."""

import flax.linen as nn
import jax.numpy as jnp

from mmcl_jax.models import kernels, vit


class AttentionPool(nn.Module):
  """Tokens [B, N, D] -> [B, D]: multi-head attention whose query is the mean token, keys and values
  the tokens.

  As MMCL fine-tunes (Turgut et al. 2025), with torch.nn.MultiheadAttention's parameters: `qkv` [D,
  3D], its columns as of kernels.split_qkv, and `proj` [D, D], both with bias.
  """

  heads: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens):
    B, _, D = tokens.shape

    start = vit.by_heads(vit.Dense.kernel_init, self.heads)
    qkv = vit.Dense(3 * D, self.dtype, kernel_init=start, name="qkv")(tokens)
    q, k, v = kernels.split_qkv(qkv, self.heads)
    # a Linear of the mean token is the mean of the tokens' Linear
    q = q.mean(axis=1, keepdims=True)
    pooled = kernels.attention(q, k, v)
    return vit.Dense(D, self.dtype, name="proj")(pooled.reshape(B, D))


class FiLM(nn.Module):
  """tokens * (1 + scale) + shift, both a Linear of the row's covariates (Perez et al. 2018); starts
  as the identity."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens, covariates):
    """Args: tokens [B, N, D]; covariates [B, V] standardised, NaN = unknown. Returns: [B, N, D]."""
    fc = vit.Dense(
      2 * tokens.shape[-1],
      self.dtype,
      kernel_init=nn.initializers.zeros,
      name="fc",
    )
    both = fc(with_unknown(covariates))[:, None]  # [B, 1, 2 D]
    scale, shift = jnp.split(both, 2, axis=-1)
    return tokens * (1 + scale) + shift


class GatedFiLM(nn.Module):
  """gain * tokens + shift, both the ReLU of a Linear of the row's covariates.

  As in the code of CardiacNets (Ding et al. 2024), also where the Linear starts. An unknown
  covariate is the mean.
  """

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens, covariates):
    """Args: tokens [B, N, D]; covariates [B, V] standardised, NaN = unknown. Returns: [B, N, D]."""
    start = vit.torch_uniform(covariates.shape[-1])
    fc = vit.Dense(
      2 * tokens.shape[-1],
      self.dtype,
      kernel_init=start,
      bias_init=start,
      name="fc",
    )
    both = nn.relu(fc(jnp.nan_to_num(covariates)))[:, None]  # [B, 1, 2 D]
    gain, shift = jnp.split(both, 2, axis=-1)
    return gain * tokens + shift


def with_unknown(covariates):
  """covariates [B, V] standardised, NaN = unknown -> [B, 2 V]: an unknown one is the mean, and a
  column of its own says so."""
  unknown = jnp.isnan(covariates)
  values = jnp.where(unknown, 0, covariates)
  return jnp.concatenate([values, unknown.astype(covariates.dtype)], axis=1)
