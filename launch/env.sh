# Sourced by the launch scripts. A CPU run keeps its memory between steps instead of mapping it anew (1.1 to 1.2 times the speed
# on glibc, docs/performance.md). Several simulated devices get threads enough that they cannot deadlock (jax 0.9 to 0.11); one device does not,
# whose matrix products would share 2 cores among 16 threads and take half as long again.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=30000000000:glibc.malloc.arena_max=1}
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
case ${XLA_FLAGS:-} in *host_platform_device_count*) export NPROC=${NPROC:-16} ;; esac
