# Sourced by tpu_pod.sh: one command on all workers, started together, and again as often as it
# takes. The workers run it by themselves: whoever follows it may go away and come back.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154  # settings come from config.sh

KEY=''     # of the command: two runs of the same command have the same
ATTEMPT='' # names one start of the command, on the workers and as the folder of their logs
# OUTCOME of an attempt: complete, wrong-input, differs, stopped, early, preempted, gone, failed,
# unreachable.
OUTCOME=''
CAUSE=''
LOST=''   # why the pod has to be brought back, until it is
BROKEN='' # whether it has to be deleted before
STEP=''   # process of the step that `guarded` waits for

# run_until_complete COMMAND…
run_until_complete() {
  local failures=0 begun
  refuse_to_lose_checkpoints "$@"
  quoted "$@"
  say "running: $QUOTED"
  KEY=$(cksum <<<"$QUOTED" | cut -d ' ' -f 1)
  while true; do
    begun=$SECONDS
    attempt "$@"
    case $OUTCOME in
      complete)
        say "complete; the workers' logs are in $LOGS/$ATTEMPT"
        wind_up
        return
        ;;
      wrong-input) give_up 2 "wrong input: $CAUSE" ;;
      differs) give_up 2 "$CAUSE" ;;
      stopped) finish 75 "stopped as asked: $CAUSE; the same command goes on" ;;
      gone) end_without_pod ;;
      preempted) ;; # the next attempt begins with getting it back
      early)
        say "ended early ($CAUSE); starting it again"
        pause "$POLL"
        ;;
      failed | unreachable)
        if ((SECONDS - begun >= LONG_RUN)); then failures=0; fi
        failures=$((failures + 1))
        try_again_or_give_up "$failures"
        ;;
    esac
  done
}

end_without_pod() {
  if [[ -n $ATTEMPT ]]; then finish 1 "the queued resource $NAME was deleted; the run ends"; fi
  warn_of_others
  die 2 "there is no pod $NAME; create it first"
}

# try_again_or_give_up FAILURES: returns if there are tries left, after a pause.
try_again_or_give_up() {
  if (($1 >= TRIES)); then give_up 1 "failed $1 times; the last: $CAUSE"; fi
  say "failed, try $1 of $TRIES: $CAUSE"
  if [[ $OUTCOME == unreachable ]]; then
    LOST="the pod is replaced" BROKEN=yes
  else
    back_off "$1"
  fi
}

# The workers' disks go with the pod.
refuse_to_lose_checkpoints() {
  if [[ -n $DELETE_WHEN_DONE && -z $BUCKET && " $* " != *gs://* ]]; then
    die 2 "--delete_when_done would delete what the run has saved; expected a BUCKET in $CONFIG," \
      "or a workdir gs://…"
  fi
}

# At the end of a run that nobody has to wait for: deletes the pod if that was asked for.
wind_up() {
  FOLLOWING=''
  if [[ -n $DELETE_WHEN_DONE ]]; then delete_pod; fi
}

give_up() {
  if [[ -n $DELETE_WHEN_DONE ]]; then say "giving up: $2"; fi
  wind_up
  finish "$@"
}

# finish CODE MESSAGE: ends the program; nothing runs on the workers.
finish() {
  FOLLOWING=''
  look_at_presence
  die "$@"
}

# attempt COMMAND…: gets the pod back if it is lost, starts the command, follows it; sets OUTCOME.
attempt() {
  OUTCOME='' CAUSE=''
  if [[ -z $LOST ]] && ! pod_is_up; then
    if [[ $OUTCOME == gone ]]; then return; fi
    LOST="the pod was taken away ($CAUSE)"
  fi
  if [[ -n $LOST ]]; then
    bring_back || return 0
    pod_is_up || return 0
  fi
  expect_workers
  join_or_start "$@"
  if [[ -n $OUTCOME ]]; then return; fi
  FOLLOWING=yes
  follow
}

# Asks for the pod again and sends the code. Returns 1, with OUTCOME, if that did not come about;
# the next attempt then goes on with it.
bring_back() {
  FOLLOWING=''
  say "$LOST; getting it back"
  if [[ -n $BROKEN ]] && ! guarded delete_pod; then
    OUTCOME=failed CAUSE="the pod could not be deleted"
    return 1
  fi
  BROKEN='' PRESENCE=asked
  if ! guarded obtain_pod || ! guarded send_code; then
    OUTCOME=failed CAUSE="the pod could not be brought back"
    return 1
  fi
  OUTCOME='' CAUSE='' LOST=''
}

# Does a step that may end the program, and returns 1 instead, unless it is no use to try again. In
# the background, so that a signal is heeded at once: in the queue the step may take days.
guarded() {
  local code=0
  (if "$@"; then exit 0; else exit 1; fi) &
  STEP=$!
  wait "$STEP" || code=$?
  STEP=''
  if ((code == 2)); then finish 2 "giving up"; fi
  if [[ -e $TEMPORARY/refused ]]; then finish 1 "giving up"; fi
  return "$code"
}

# Returns 1, with OUTCOME and CAUSE, if the pod has been taken away or deleted.
pod_is_up() {
  find_resource ACTIVE
  if [[ $STATE == ABSENT ]]; then
    OUTCOME=gone
    return 1
  fi
  find_node "READY,HEALTHY,1,"
  case $STATE,$NODE_STATE in
    ACTIVE,ABSENT | ACTIVE,PREEMPTED | ACTIVE,TERMINATED | ACTIVE,STOP* | ACTIVE,DELETING) ;;
    ACTIVE,*)
      if ((WORKERS > 0)); then
        PRESENCE=on
        return 0
      fi
      ;;
  esac
  OUTCOME=preempted CAUSE="queued resource $STATE, TPU VM $NODE_STATE"
  return 1
}

# Follows the command if the pod already runs it, else starts it on all workers.
join_or_start() {
  local number running
  look_patiently "@worker 0 absent - 0 - - - -" || return 0
  running=$(workers_that runs_something)
  for ((number = 0; number < WORKERS; number++)); do
    if runs_something "$number" && [[ ${keys[number]} != "$KEY" ]]; then
      die 2 "worker $number is running another command (${ids[number]}); stop it first"
    fi
  done
  if [[ -n $running ]]; then
    ATTEMPT=${ids[${running%%,*}]}
    if [[ $(workers_that is_part) == "$(workers_that true)" ]]; then
      say "is running this command already (attempt $ATTEMPT); following it"
      return
    fi
    say "of this command only worker $running has a part; starting it anew on all"
    kill_workers
  fi
  ATTEMPT=$(new_attempt)
  worker_command start "$ATTEMPT" "$KEY" "$@"
  if guarded ask_all "$QUOTED" started; then
    say "started on $WORKERS workers (attempt $ATTEMPT)"
    return
  fi
  if pod_is_up; then
    OUTCOME=failed CAUSE="it could not be started on all workers"
    kill_workers
  fi
}

# The time, and what makes it differ from another start in the same second.
new_attempt() { echo "$(date -u +%Y%m%d-%H%M%S)-$RANDOM"; }

kill_workers() {
  worker_command kill
  ssh_all '' "$QUOTED" || say "not all workers could be reached to end what they run: $REASON"
}
