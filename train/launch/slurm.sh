#!/usr/bin/env bash
# Slurm, nodes with eight H100s. From the checkout, which all nodes see, after `make setup` in it:
#
#   sbatch --nodes 4 train/launch/slurm.sh --config configs/qwen3_4b.py --microbatches 16 --data /shared/rows \
#     --out /shared/runs/q3
#
# The run folder is on a shared disk. JAX finds the other processes by Slurm's variables.
# Time limit and preemption: all processes get SIGTERM, save at the same step and exit; the job is queued again under
# the same number and goes on there. So does a job whose node died. A mistake in the input (exit 2) ends it.
#   scancel --signal=TERM JOB      saves, and starts again
#   scancel JOB                    ends it; sbatch with the same words goes on later
# JAX_COMPILATION_CACHE_DIR, where it is not set, is a folder beside the checkout's runs: a restart does not compile.
#
# JAX expects one process per GPU of Slurm. All GPUs of the node are to be seen by each (no --gpus-per-task): it takes
# the one of its SLURM_LOCALID.
#SBATCH --job-name=dspark
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --time=24:00:00
# To the processes, not to this script (that would be B:TERM), five minutes before the end.
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u
restarts="${SLURM_RESTART_COUNT:-0}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/runs/xla-cache}"
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart $restarts"

# srun itself reads no #SBATCH --cpus-per-task since Slurm 22.05, and would run each process on one core.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
# The first process to exit must not take down those that still save; where one crashed, the others end by themselves.
code=0
srun --kill-on-bad-exit=0 --wait=600 --label bash train/launch/host.sh \
  "${PYTHON:-.venv/bin/python}" -m train.train --mesh.fsdp -1 "$@" || code=$?

if [ "$code" = 0 ] || [ "$code" = 2 ]; then
  exit "$code"
fi
if [ "$restarts" -ge "${MAX_RESTARTS:-100}" ]; then
  echo "exit $code after $restarts restarts: giving up; the same sbatch goes on from the last checkpoint" >&2
  exit "$code"
fi
echo "exit $code: queued again"
# Where Slurm queues it again itself (preemption), it may be quicker than we are.
scontrol requeue "$SLURM_JOB_ID" || true
