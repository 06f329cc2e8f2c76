"""The recipes under configs/ as the command line reads them."""

import jax
from common import ROOT

from mmcl_jax import configuration, train
from mmcl_jax.training import state as state_lib


def configure(recipe, *flags):
  """The config of NAME:ARGUMENT as the command line reads it."""
  argv = [f"--config={ROOT}/configs/{recipe.replace(':', '.py:', 1)}", "--workdir=w", *flags]
  return configuration.from_flags("mmcl train", train.USAGE, argv, {"workdir": ""})[0]


def leaves(variables, module):
  """{COLLECTION/PATH: leaf} of one top-level module."""
  return {
    f"{collection}/{state_lib.path_name(path)}": leaf
    for collection in ("params", "batch_stats")
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables[collection].get(module, {}))
  }
