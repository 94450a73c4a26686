#!/usr/bin/env bash
# Cloud TPUs through xpk (https://github.com/AI-Hypercomputer/xpk), on a cluster that `xpk cluster create` made:
#
#   CLUSTER=my-cluster IMAGE=REGISTRY/dspark:1 TPU_TYPE=v5litepod-16 \
#     bash train/launch/xpk.sh qwen3-4b --config configs/qwen3_4b.py --microbatches 32 --data /shared/rows \
#     --out /shared/runs/q3
#
# IMAGE has this checkout as its working folder, with what `pip install .[programs] jax[tpu]` installs. The same command
# runs on every host of SLICES (1) slices; JAX finds the others by what GKE sets. /shared is a file system that all
# hosts mount (Filestore, by xpk storage attach). So is JAX_COMPILATION_CACHE_DIR (/shared/xla-cache), by which a
# restart does not compile: gs:// would need gcsfs in the image.
# Preemption, maintenance, dead hosts: xpk (1.16, by its --dry-run) starts all hosts again on exit codes 42 and 127 to
# 255, among them the 143 of host.sh and the aborts of JAX; added here are 1, an exception of Python's, and 75, of who
# ends as another one did or as a file server gave no answer.
# 2, a mistake in the input, ends it.
# An own JobSet, for clusters without xpk: jobset.yaml.
set -eu
name="${1:?name of the workload}"
shift
exec xpk workload create --workload "$name" --cluster "${CLUSTER:?name of the cluster}" \
  --tpu-type "${TPU_TYPE:-v5litepod-16}" --num-slices "${SLICES:-1}" --docker-image "${IMAGE:?docker image}" \
  --max-restarts "${MAX_RESTARTS:-100}" --restart-on-exit-codes 1,75 --termination-grace-period-seconds 300 \
  --env "JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-/shared/xla-cache}" \
  --command "bash train/launch/host.sh python -m train.train --mesh.fsdp -1 $(printf '%q ' "$@")"
