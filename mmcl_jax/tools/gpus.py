"""GPUs to compile for where there is none: what XLA must know of one, and who else must be told."""

from collections.abc import Callable

from mmcl_jax.models import kernels
from mmcl_jax.training import chips

# The limits of compute capability 9.0 (CUDA C++ Programming Guide, "Compute Capabilities") and
# NVIDIA's published figures of an H100 or H200 SXM: 132 multiprocessors of 128 lanes at 1.98 GHz
# with 50 MiB of L2 cache between them ("NVIDIA H100 Tensor Core GPU Architecture"). cuDNN's version
# decides which of its calls XLA may use.
DESCRIPTION = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800  memory_bandwidth: {bandwidth}  device_memory_size: {memory}
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{name}"
"""
NAMES = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
# As launch/env.sh sets them where NVIDIA's driver is, with their source.
FLAGS = "--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_dot_merger_threshold_mb=0"
HOPPER = kernels.Gpu((9, 0), 91200)


def description(name: str) -> str:
  """The target of XLA (a GpuTargetConfigProto in text form) that is one of NAMES."""
  chip = chips.CHIPS[name]
  return DESCRIPTION.format(bandwidth=int(chip.hbm), memory=chip.hbm_gib * 2**30, name=NAMES[name])


def tell(patch: Callable, gpu: kernels.Gpu) -> None:
  """Everything that asks for the GPU at hand while a program is traced hears that it is this one.

  Args:
    patch: setattr, or what undoes it later.
  """
  from jax._src.cudnn import fused_attention_stablehlo as wrapper

  def parsed(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))

  patch(wrapper, "check_cudnn_version", lambda: gpu.cudnn)
  patch(wrapper, "check_compute_capability", lambda least: gpu.capability >= parsed(least))
  patch(wrapper, "is_cuda_compute_capability_equal", lambda one: gpu.capability == parsed(one))
  patch(kernels, "gpu_at_hand", lambda: gpu)
