"""ECG encoders pre-trained with cardiac MRI, in JAX.

    import mmcl_jax

    cohort = mmcl_jax.load_cohort("cohort")      # made by `mmcl prepare`
    encoder = mmcl_jax.load_encoder("run")       # made by `mmcl train`
    recording = mmcl_jax.read_ecg("first.hea")   # WFDB, CardioSoft XML, DICOM, CSV or NPY

`Loss` and `Result` are what a loss and an evaluator of your own return (docs/extending.md). The
rest of the package may change between minor versions. Nothing is imported before it is used:
`import mmcl_jax` brings no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from mmcl_jax.data.cohort import load as load_cohort
  from mmcl_jax.data.readers import read_ecg
  from mmcl_jax.evaluators.base import Result
  from mmcl_jax.objectives import Loss
  from mmcl_jax.training.restore import load_encoder

__version__ = "0.1.0"
__all__ = ["Loss", "Result", "load_cohort", "load_encoder", "read_ecg"]

PUBLIC = {
  "Loss": "mmcl_jax.objectives:Loss",
  "Result": "mmcl_jax.evaluators.base:Result",
  "load_cohort": "mmcl_jax.data.cohort:load",
  "load_encoder": "mmcl_jax.training.restore:load_encoder",
  "read_ecg": "mmcl_jax.data.readers:read_ecg",
}


def __getattr__(name: str) -> Any:
  """Imports a public name where it is first used (PEP 562)."""
  if name not in PUBLIC:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module, _, attribute = PUBLIC[name].partition(":")
  return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
  return sorted({*globals(), *PUBLIC})
