#!/usr/bin/env bash
# Runs a command as N processes on this machine that form one cluster, as on a pod without a pod.
#
#     launch/local_pod.sh N COMMAND…
#     DEVICES=4 launch/local_pod.sh 2 .venv/bin/python -m spvit_jax.train --config=… --workdir=…
#
# COMMAND gets --coordinator, --num_processes and --process_id. Each process has DEVICES simulated
# devices (2 unless set), and its number before each line that it says. SIGTERM, SIGINT and Ctrl-C
# reach all of them as SIGTERM: save and stop. When one fails or stops early, the others have GRACE
# seconds (60 unless set) to end, and are killed then.
#
# Exit code: 2 if a process was given wrong input or there is no such command, else 1 if one failed,
# else 75 if one stopped early, else 0.

set -euo pipefail

if [[ ! ${1-} =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
  echo "usage: $0 N COMMAND…, with N the number of processes; got: $*" >&2
  exit 2
fi
if [[ ! ${DEVICES:-2} =~ ^[1-9][0-9]*$ || ! ${GRACE:-60} =~ ^[0-9]+$ ]]; then
  echo "error: DEVICES is '${DEVICES:-2}' and GRACE is '${GRACE:-60}'; expected whole numbers" >&2
  exit 2
fi
count=$1
shift

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} JAX_NUM_CPU_DEVICES=${DEVICES:-2}

# A port that nobody listens at: connecting to it fails.
port=
for _ in {1..100}; do
  candidate=$((20000 + RANDOM % 12000))
  if ! (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null; then
    port=$candidate
    break
  fi
done
if [[ -z $port ]]; then
  echo "error: found no free port among 100" >&2
  exit 1
fi

pids=() readers=()
for ((id = 0; id < count; id++)); do
  # The readers see the signals of a terminal, too, and must outlive what they read.
  exec {out}> >(trap '' INT TERM; exec sed -u "s/^/[$id] /")
  readers+=($!)
  exec {err}> >(trap '' INT TERM; exec sed -u "s/^/[$id] /" >&2)
  readers+=($!)
  # A session of its own, so that what the process has started can be ended with it.
  setsid "$@" "--coordinator=127.0.0.1:$port" "--num_processes=$count" "--process_id=$id" \
    </dev/null >&"$out" 2>&"$err" {out}>&- {err}>&- &
  pids+=($!)
  exec {out}>&- {err}>&-
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
trap '((!${#pids[@]})) || kill -KILL -- "${pids[@]/#/-}" 2>/dev/null || true' EXIT

wrong=0 failed=0 early=0
while ((${#pids[@]})); do
  sleep 0.2
  for id in "${!pids[@]}"; do
    if kill -0 "${pids[id]}" 2>/dev/null; then continue; fi
    code=0
    wait "${pids[id]}" 2>/dev/null || code=$?
    kill -KILL -- "-${pids[id]}" 2>/dev/null || true # what it has left behind
    unset "pids[id]"
    case $code in
      0) continue ;;
      75) early=1 ;;
      2 | 126 | 127) wrong=1 ;; # of the shell: there is no such command
      *) failed=1 ;;
    esac
    if ((code != 75)); then echo "[$id] ended with exit code $code" >&2; fi
    deadline=${deadline:-$((SECONDS + ${GRACE:-60}))}
  done
  if ((${#pids[@]} && SECONDS >= ${deadline:-SECONDS + 1})); then
    kill -KILL -- "${pids[@]/#/-}" 2>/dev/null || true
  fi
done
for reader in "${readers[@]}"; do wait "$reader" || true; done

if ((wrong)); then exit 2; fi
if ((failed)); then exit 1; fi
if ((early)); then exit 75; fi
