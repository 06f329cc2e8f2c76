"""A stand-in for a trained encoder."""

import types

import numpy as np
from ml_collections import ConfigDict

WIDTH = 4


def signature(batch):
  """A stand-in for an encoder: mean size of some leads; it depends on each recording alone."""
  return np.abs(np.asarray(batch))[:, :WIDTH].mean(axis=-1).astype(np.float32)


def stand_in(profile="minimal"):
  """The module that load_encoder is imported from; `.asked` and `.shapes` tell how it was used."""
  module = types.ModuleType("mmcl_jax.training.restore")
  module.profile, module.checkpoint, module.embed, module.asked, module.shapes = (
    profile,
    "c" * 64,
    signature,
    [],
    [],
  )

  def load_encoder(workdir, step=None):
    module.asked.append((workdir, step))
    config = ConfigDict({"data": {"ecg_profile": module.profile}})

    def counted(batch):
      return (module.shapes.append(batch.shape), module.embed(batch))[1]

    return types.SimpleNamespace(
      config=config, step=70, checkpoint=module.checkpoint, embed=counted
    )

  module.load_encoder = load_encoder
  return module
