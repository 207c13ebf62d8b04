#!/usr/bin/env bash
# A TPU pod of Google Cloud: created, given the code, run until complete, and deleted, from any
# machine with git, gcloud and bash. launch/README.md tells the whole way.

# shellcheck disable=SC2034,SC2153,SC2154  # variables are shared with the files in lib/
set -euo pipefail
CALLED_FROM=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
usage: launch/tpu_pod.sh [--config=FILE] [--name=NAME] [--zone=ZONE] [--project=PROJECT]
                         [--logs=DIR] [--dry_run] VERB …

  create            asks for the pod and waits until it is there
  sync              brings the committed code to all workers and installs what it needs
  run COMMAND…      starts the command on all workers and follows it until it is complete;
                    after preemption, or exit code 75, it is started again. With
                    --delete_when_done before COMMAND, the pod is deleted at the end, also of a
                    run that fails
  status            the pod, and what each worker runs
  logs [N]          what worker N (default 0) has written; with --follow, as it comes
  stop              asks all workers to save and end
  delete            deletes the pod, and returns when it is gone
  list              the pods that were asked for from here, and what they cost

  --config=FILE     settings (default launch/pod.env; see launch/pod.env.example)
  --name=NAME, --zone=ZONE, --project=PROJECT
                    in place of the settings' NAME, ZONE and PROJECT
  --logs=DIR        where the workers' logs are kept (default runs/pods/NAME)
  --dry_run         prints each call of gcloud, and does none

Exit codes: 0 complete, 1 failure, 2 wrong input, 75 stopped before it was complete.
END
}

for file in config accelerator gcloud record resource deletion code run follow logs; do
  # shellcheck source=/dev/null
  source "launch/lib/$file.sh"
done

CONFIG=launch/pod.env
NAME_FLAG='' ZONE_FLAG='' PROJECT_FLAG='' LOGS='' DRY_RUN='' FOLLOW='' DELETE_WHEN_DONE=''
FOLLOWING='' # whether a run goes on at the pod if this program ends

# Sets the flags and REST, the words after them. In `run` the flags end where the command begins.
REST=()
read_flags() {
  while (($# > 0)); do
    case $1 in
      --config=*) CONFIG=$(from_there "${1#*=}") ;;
      --name=*) NAME_FLAG=${1#*=} ;;
      --zone=*) ZONE_FLAG=${1#*=} ;;
      --project=*) PROJECT_FLAG=${1#*=} ;;
      --logs=*) LOGS=$(from_there "${1#*=}") ;;
      --dry_run) DRY_RUN=yes ;;
      --follow) FOLLOW=yes ;;
      --delete_when_done) DELETE_WHEN_DONE=yes ;;
      --help | -h) VERB=help ;;
      --)
        shift
        break
        ;;
      -*) die 2 "unknown flag '$1'; see launch/tpu_pod.sh --help" ;;
      *)
        if [[ -n $VERB ]]; then break; fi
        VERB=$1
        ;;
    esac
    shift
  done
  REST=("$@")
}

from_there() { if [[ $1 == /* ]]; then echo "$1"; else echo "$CALLED_FROM/$1"; fi; }

prepare() {
  read_settings "$CONFIG"
  NAME=${NAME_FLAG:-$NAME} ZONE=${ZONE_FLAG:-$ZONE} PROJECT=${PROJECT_FLAG:-$PROJECT}
  check_settings
  LOGS=${LOGS:-runs/pods/$NAME}
  if [[ -z $DRY_RUN ]] && ! command -v gcloud >/dev/null; then
    die 2 "there is no gcloud; install it from https://cloud.google.com/sdk/docs/install"
  fi
  TEMPORARY=$(mktemp -d)
  trap clean_up EXIT
  trap 'exit 130' INT TERM HUP
}

clean_up() {
  if [[ -n $STEP ]]; then kill "$STEP" 2>/dev/null || true; fi
  rm -rf "$TEMPORARY"
  if [[ -n $FOLLOWING ]]; then
    say "the workers go on without this program; the same command follows them again, stop ends them"
  fi
  remind
}

expect_words() {
  if ((${#REST[@]} > $1)); then die 2 "unexpected argument '${REST[$1]}'; see --help"; fi
}

create() {
  obtain_pod && return
  local reason=$REASON
  say "the request failed: $reason"
  delete_pod
  die 1 "the pod $NAME could not be created: $reason"
}

sync() {
  find_node "READY,HEALTHY,1,"
  expect_workers
  pack_code
  look '' || true
  if [[ -n $(workers_that runs_something) ]]; then
    die 2 "worker $(workers_that runs_something) is running a command; stop it first"
  fi
  send_code
  say "ready"
}

show_status() {
  find_resource ACTIVE
  find_node "READY,HEALTHY,1,"
  if [[ -z $DRY_RUN ]]; then
    echo "queued resource $STATE, TPU VM $NODE_STATE${HEALTH:+ $HEALTH}, workers: $WORKERS"
    if [[ $STATE == ABSENT ]]; then warn_of_others; fi
  fi
  if [[ $NODE_STATE != READY ]]; then return; fi
  look '' || say "not all workers could be reached: $REASON"
  if [[ -n $DRY_RUN ]]; then return; fi
  local number wrong
  for ((number = 0; number < WORKERS; number++)); do
    echo "worker $number: $(status_of "$number")"
  done
  wrong=$(difference_from_settings)
  if [[ -n $wrong ]]; then echo "$wrong"; fi
  echo "costs $(cost_of "${NODE_TYPE:-$TYPE}")"
}

status_of() {
  case ${states[$1]} in
    '') echo "no answer, or no code yet" ;;
    absent) echo "has run nothing" ;;
    exited) echo "attempt ${ids[$1]} ended with exit code ${codes[$1]}" ;;
    lost) echo "attempt ${ids[$1]} vanished when the machine was started anew" ;;
    running)
      if [[ ${reports[$1]} == - ]]; then
        echo "attempt ${ids[$1]} is running, and has not reported the cluster"
      else
        echo "attempt ${ids[$1]} is running, $(in_words "$1")"
      fi
      ;;
  esac
}

show_logs() {
  local number=${REST[0]:-0} command
  expect_words 1
  if [[ ! $number =~ ^[0-9]+$ ]]; then die 2 "'$number' is no worker's number"; fi
  worker_command log 0
  command=$QUOTED
  if [[ -n $FOLLOW ]]; then command='tail -n +1 -F spvit_jax_run/log'; fi
  on_pod ssh "$NAME" "--worker=$number" "--command=$command"
  if [[ -n $DRY_RUN ]]; then
    call '' "${CALL[@]}"
  else
    gcloud "${CALL[@]}" </dev/null || die 1 "no log of worker $number; copies are in $LOGS"
  fi
}

stop() {
  local until
  find_node "READY,HEALTHY,1,"
  expect_node
  PRESENCE=on
  worker_command stop
  ask_all "$QUOTED" asked
  until=$((SECONDS + STOP_TIMEOUT))
  while true; do
    look '' || say "not all workers could be reached: $REASON"
    if [[ -z $(workers_that runs_something) && -z $(silent_workers) || -n $DRY_RUN ]]; then break; fi
    if ((SECONDS >= until)); then
      say "worker $(workers_that runs_something) still runs after $STOP_TIMEOUT s; killing it"
      kill_workers
      break
    fi
    pause "$POLL"
  done
  say "stopped"
}

main() {
  VERB=''
  read_flags "$@"
  case $VERB in
    '' | help)
      usage
      if [[ -z $VERB ]]; then exit 2; fi
      return
      ;;
    create | sync | status | stop | delete | list) expect_words 0 ;;
    run) if ((${#REST[@]} == 0)); then die 2 "run needs a command; see --help"; fi ;;
    logs) ;;
    *) die 2 "unknown verb '$VERB'; see launch/tpu_pod.sh --help" ;;
  esac
  if [[ -n $DELETE_WHEN_DONE && $VERB != run ]]; then die 2 "--delete_when_done is a flag of run"; fi
  prepare
  case $VERB in
    create) create ;;
    sync) sync ;;
    run) run_until_complete "${REST[@]}" ;;
    status) show_status ;;
    logs) show_logs ;;
    stop) stop ;;
    delete) delete ;;
    list) list_records ;;
  esac
}

main "$@"
