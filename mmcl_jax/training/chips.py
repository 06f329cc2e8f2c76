"""Published peaks of the accelerators that a step is compiled for or trained on. No JAX here."""

from typing import NamedTuple


class Chip(NamedTuple):
  """Peaks of one chip: what JAX calls a device."""

  flops: float  # FLOP/s of dense bfloat16 products
  hbm_gib: int
  hbm: float  # its bytes/s
  network: float  # bytes/s sent to chips of the same slice or node, over all links
  network_between: float  # bytes/s sent to other slices or nodes, a chip's share of its host's
  dimensions: int  # of a slice's torus; 0: a switch, through which all GPUs of a node are one hop


# TPUs: Cloud TPU documentation, "System architecture" of each chip (docs.cloud.google.com/tpu/docs/
# v4, v5e, v5p, v6e). It gives the network in both directions, 400 GB/s for v5e and 800 for v6e, or
# in bits, 4,800 Gbit/s one way for v5p; here it is one way. v4: six links of 50 GB/s (Jouppi et al.
# 2023). Between slices: of 8 chips' host, 2 x 100 Gbit/s (v5e) and 4 x 200 (v6e); 50 Gbit/s a chip
# (v5p), which is an assumption for v4.
#
# GPUs, all in their SXM form: NVIDIA's data sheets "H100 Tensor Core GPU" (half of 1,979 TFLOP/s,
# which are with sparsity), "H200 Tensor Core GPU", "A100 Tensor Core GPU" of 80 GB. NVLink is one
# way, half of what they give. Between nodes an assumption: one network card a GPU, as in NVIDIA's
# DGX H100 and H200 (400 Gbit/s) and DGX A100 (200 Gbit/s).
CHIPS = {
  "v4": Chip(275e12, 32, 1200e9, 300e9, 6.25e9, 3),
  "v5e": Chip(197e12, 16, 819e9, 200e9, 3.125e9, 2),
  "v5p": Chip(459e12, 95, 2765e9, 600e9, 6.25e9, 3),
  "v6e": Chip(918e12, 32, 1638e9, 400e9, 12.5e9, 2),
  "a100": Chip(312e12, 80, 2039e9, 300e9, 25e9, 0),
  "h100": Chip(989e12, 80, 3350e9, 450e9, 50e9, 0),
  "h200": Chip(989e12, 141, 4800e9, 450e9, 50e9, 0),
}
# jax.Device.device_kind -> chip. Of a GPU its whole name counts: an H100 PCIe has other peaks.
KINDS = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "NVIDIA A100-SXM4-80GB": "a100",
  "NVIDIA H100 80GB HBM3": "h100",
  "NVIDIA H200": "h200",
}


def of_kind(device_kind: str) -> Chip | None:
  """The chip that JAX calls `device_kind`; None: not in the table."""
  return CHIPS.get(KINDS.get(device_kind))
