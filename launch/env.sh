# Sourced by the launch scripts: what XLA is told where NVIDIA's driver is, and the allocator where it is not (on a TPU
# leave it out).
if command -v nvidia-smi > /dev/null; then
  # Collectives beside computation: off in XLA, on in NVIDIA's images (docs.nvidia.com/jax-toolbox/environment-variables).
  # No merged products: XLA would copy the rows of the encoder's two passes side by side to multiply both at once by the same weights,
  # a sixth of what the ECG part of joint:base moves through an H100's memory (compiled ahead of time).
  # XLA_FLAGS of your own come last, and win.
  export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_dot_merger_threshold_mb=0 ${XLA_FLAGS:-}"
else
  # A CPU run keeps its memory between steps instead of mapping it anew (1.1 to 1.2 times the speed on glibc, docs/performance.md).
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=30000000000:glibc.malloc.arena_max=1}
fi
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
# Several simulated devices get threads enough that they cannot deadlock (jax 0.9 to 0.11); one device does not, whose matrix
# products would share 2 cores among 16 threads and take half as long again.
case ${XLA_FLAGS:-} in *host_platform_device_count*) export NPROC=${NPROC:-16} ;; esac
