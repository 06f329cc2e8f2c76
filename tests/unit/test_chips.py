"""Published peaks by the name that JAX gives a device."""

import pytest

from mmcl_jax.training import chips


@pytest.mark.parametrize(
  "kind, flops",
  [
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H200", 989e12),
  ],
)
def test_the_chip_of_a_device(kind, flops):
  assert chips.of_kind(kind).flops == flops


@pytest.mark.parametrize("kind", ["cpu", "", "NVIDIA H100 PCIe", "TPU v99", "h100"])
def test_no_peaks_are_guessed(kind):
  assert chips.of_kind(kind) is None
