#!/usr/bin/env bash
# Hosts that are reached by ssh, without a scheduler. From the checkout, which has the same path on all of them:
#
#   bash train/launch/ssh.sh "host1 host2" --config configs/qwen3_4b.py --microbatches 32 --data /shared/rows \
#     --out /shared/runs/q3
#
# The run folder is on a shared disk. The first host, by a name that the others know, is the coordinator, on
# port PORT (8476). One process a host, with all its devices. Run it in tmux, or with nohup.
# When a process or host dies, or does not come, the others end too (--hosts.silence, --hosts.timeout), and all are
# started again: at most MAX_RESTARTS (100) times. SIGTERM or Ctrl-C to this script is passed on: all save at one step,
# and it exits 143; the same command goes on there. A mistake in the input (exit 2) ends it.
# PYTHON (.venv/bin/python) and JAX_COMPILATION_CACHE_DIR (runs/xla-cache of the checkout) are the same on all hosts.
set -u
read -r -a hosts <<< "${1:?hosts, as one word: \"host1 host2\"}"
shift
count=${#hosts[@]}
cache="${JAX_COMPILATION_CACHE_DIR:-$PWD/runs/xla-cache}"
pid_file="/tmp/dspark-$(id -un)-$(printf '%s' "$*" | cksum | cut -d' ' -f1).pid"
stopped=0
jobs=()

on_host() {  # HOST COMMAND: a dead host is noticed within two minutes
  ssh -n -o BatchMode=yes -o ServerAliveInterval=30 -o ServerAliveCountMax=4 "$1" "$2"
}
stop() {
  stopped=1
  for host in "${hosts[@]}"; do
    on_host "$host" "kill -TERM \"\$(cat $pid_file-$host)\"" 2>/dev/null &
  done
}
trap stop TERM INT

for ((restart = 0; restart <= ${MAX_RESTARTS:-100}; restart++)); do
  jobs=()
  for ((i = 0; i < count; i++)); do
    words=("${PYTHON:-.venv/bin/python}" -m train.train --mesh.fsdp -1 --hosts.coordinator "${hosts[0]}:${PORT:-8476}"
           --hosts.processes "$count" --hosts.process "$i" "$@")
    on_host "${hosts[i]}" "cd $(printf '%q' "$PWD") && JAX_COMPILATION_CACHE_DIR=$(printf '%q' "$cache") \
DSPARK_PID=$pid_file-${hosts[i]} exec bash train/launch/host.sh $(printf '%q ' "${words[@]}")" \
      > >(sed -u "s/^/${hosts[i]}: /") 2>&1 &
    jobs+=($!)
  done
  code=0
  for job in "${jobs[@]}"; do
    while wait "$job"; one=$?; kill -0 "$job" 2>/dev/null; do :; done
    # A mistake in the input is one, whatever it does to the other hosts.
    if [ "$one" != 0 ] && [ "$code" != 2 ]; then code=$one; fi
  done
  if [ "$stopped" = 1 ]; then exit 143; fi
  if [ "$code" = 0 ] || [ "$code" = 2 ]; then exit "$code"; fi
  echo "exit $code: starting all hosts again in ${PAUSE:-20} seconds" >&2
  sleep "${PAUSE:-20}"
  if [ "$stopped" = 1 ]; then exit 143; fi
done
exit "$code"
