# Sourced by the launch scripts: a CPU run keeps its memory between steps instead of mapping it anew (twice the speed on
# glibc), and XLA gets enough threads that several simulated devices cannot deadlock (jax 0.9 to 0.11).
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=30000000000:glibc.malloc.arena_max=1}
export NPROC=${NPROC:-16}
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
