#!/usr/bin/env bash
# One host's part of a training, or one process of it. All recipes here start the same command through it:
#
#   bash train/launch/host.sh python -m train.train --config FILE --data DATA --out RUN --mesh.fsdp -1
#
# train.train exits 0 when it is done, and also when SIGTERM stopped it with its state saved. Who starts it again must
# know one from the other, so this script exits with
#   0    done
#   2    a mistake in the input: the last line of stderr says which; the same command would fail again
#   143  stopped by SIGTERM, state saved: give the same command again
#   else a crash, 75 of another process or of a file server: give the same command again, it goes on from the last
#        checkpoint
# DSPARK_PID: a file that holds the number of this process while it runs, for who wants to stop it.
set -u
if [ -n "${DSPARK_PID:-}" ]; then
  # What a lost connection left here would still hold the run folder. By name, too: numbers are used again.
  while old=$(cat "$DSPARK_PID" 2>/dev/null) && grep -qs launch/host.sh "/proc/$old/cmdline"; do
    kill -TERM "$old" 2>/dev/null
    sleep 1
  done
  echo $$ > "$DSPARK_PID"
  trap 'rm -f "$DSPARK_PID"' EXIT
fi
stopped=0
"$@" &
child=$!
trap 'stopped=1; kill -TERM "$child" 2>/dev/null' TERM INT
# A signal ends `wait`, not the child, which is given the time that its checkpoint takes.
while wait "$child"; code=$?; kill -0 "$child" 2>/dev/null; do :; done
if [ "$stopped" = 1 ] && [ "$code" = 0 ]; then
  code=143
fi
exit "$code"
