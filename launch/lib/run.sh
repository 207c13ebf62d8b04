# Sourced by tpu_pod.sh: one command on all workers, started together and followed until it is
# complete. The workers run it by themselves: whoever follows it may go away and come back.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154  # settings come from config.sh

KEY=''     # of the command: two runs of the same command have the same
ATTEMPT='' # names one start of the command, on the workers and as the folder of their logs
OUTCOME='' # of an attempt: complete, wrong-input, differs, stopped, early, preempted, gone, failed
CAUSE=''

# What the last look at the workers showed, by number; all empty where a worker did not answer.
states=() codes=() sizes=() ids=() keys=() stops=() reports=()

# run_until_complete COMMAND…
run_until_complete() {
  local failures=0 begun
  quoted "$@"
  say "running: $QUOTED"
  KEY=$(cksum <<<"$QUOTED" | cut -d ' ' -f 1)
  while true; do
    begun=$SECONDS
    attempt "$@"
    case $OUTCOME in
      complete)
        FOLLOWING=''
        say "complete; the workers' logs are in $LOGS/$ATTEMPT"
        return
        ;;
      wrong-input) finish 2 "wrong input: $CAUSE" ;;
      differs) finish 2 "$CAUSE" ;;
      stopped) finish 75 "stopped as asked: $CAUSE; the same command goes on" ;;
      gone)
        if [[ -z $ATTEMPT ]]; then die 2 "there is no pod $NAME; create it first"; fi
        finish 1 "the queued resource $NAME was deleted; the run ends"
        ;;
      preempted) ;; # the next attempt begins with getting it back
      early)
        say "ended early, after saving ($CAUSE); starting it again"
        pause "$POLL"
        ;;
      failed)
        if ((SECONDS - begun >= LONG_RUN)); then failures=0; fi
        failures=$((failures + 1))
        if ((failures >= TRIES)); then finish 1 "failed $failures times; the last: $CAUSE"; fi
        say "failed, try $failures of $TRIES: $CAUSE"
        back_off "$failures"
        ;;
    esac
  done
}

finish() {
  FOLLOWING=''
  die "$@"
}

# attempt COMMAND…: gets the pod back if it is lost, starts the command, follows it; sets OUTCOME.
attempt() {
  OUTCOME='' CAUSE=''
  if ! pod_is_up; then
    if [[ $OUTCOME == gone ]]; then return; fi
    say "the pod was taken away ($CAUSE); getting it back"
    if ! guarded obtain_pod || ! guarded send_code; then
      OUTCOME=failed CAUSE="the pod could not be brought back"
      return
    fi
    OUTCOME='' CAUSE=''
    pod_is_up || return 0
  fi
  join_or_start "$@"
  if [[ -n $OUTCOME ]]; then return; fi
  FOLLOWING=yes
  follow
}

# Does a step that may end the program, and returns 1 instead, unless it is no use to try again.
guarded() {
  if ("$@"); then return 0; fi
  if [[ -e $TEMPORARY/refused ]]; then finish 1 "giving up"; fi
  return 1
}

# Returns 1, with OUTCOME and CAUSE, if the pod has been taken away or deleted.
pod_is_up() {
  find_resource ACTIVE
  if [[ $STATE == ABSENT ]]; then
    OUTCOME=gone
    return 1
  fi
  find_node "READY,HEALTHY,1"
  case $STATE,$NODE_STATE in
    ACTIVE,ABSENT | ACTIVE,PREEMPTED | ACTIVE,TERMINATED | ACTIVE,STOP* | ACTIVE,DELETING) ;;
    ACTIVE,*)
      if ((WORKERS > 0)); then return 0; fi
      ;;
  esac
  OUTCOME=preempted CAUSE="queued resource $STATE, TPU VM $NODE_STATE"
  return 1
}

# ── Starting ────────────────────────────────────────────────────────────────────────────────────

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

# ── Following ───────────────────────────────────────────────────────────────────────────────────

# Looks at all workers; as `call`. Workers to which no code has been sent do not answer.
look() {
  local mark number rest
  worker_command status
  local code=0
  ssh_all "$1" "[ ! -e spvit_jax/launch/lib/worker.sh ] || $QUOTED" || code=$?
  for ((number = 0; number < WORKERS; number++)); do
    states[number]='' codes[number]='' sizes[number]=0 ids[number]='' keys[number]=''
    stops[number]='' reports[number]=''
  done
  while read -r mark number rest; do
    if [[ $mark != @worker || ! $number =~ ^[0-9]+$ ]] || ((number >= WORKERS)); then continue; fi
    read -r "states[$number]" "codes[$number]" "sizes[$number]" "ids[$number]" "keys[$number]" \
      "stops[$number]" "reports[$number]" <<<"$rest"
  done <<<"$ANSWER"
  return "$code"
}

# As `look`, until every worker answers. Returns 1, with OUTCOME, if that does not come about.
look_patiently() {
  local try code
  for ((try = 1; ; try++)); do
    code=0
    look "$1" || code=$?
    if ((code == 0)) && [[ -z $ANSWER ]]; then
      die 2 "the workers of $NAME have no code; send it with: launch/tpu_pod.sh sync"
    fi
    if ((code == 0)) && [[ -z $(silent_workers) ]]; then return 0; fi
    could_not_reach "$try" "$code" || return 1
    back_off "$try"
  done
}

# could_not_reach TRY CODE: returns 1, with OUTCOME, if the pod is gone or this was the last try.
could_not_reach() {
  if (($2 == FAIL_FOR_GOOD)); then refused; fi
  pod_is_up || return 1
  if (($1 > RETRIES)); then
    OUTCOME=failed CAUSE="worker $(silent_workers) cannot be reached: ${REASON:-it does not answer}"
    return 1
  fi
  say "worker $(silent_workers) did not answer: ${REASON:-no reason given}"
}

silent_workers() { workers_that has_no_state; }
has_no_state() { [[ -z ${states[$1]} ]]; }
runs_something() { [[ ${states[$1]} == running ]]; }
is_part() { [[ ${ids[$1]} == "$ATTEMPT" ]]; }
is_running() { runs_something "$1" && is_part "$1"; }
has_ended() { [[ -n ${states[$1]} ]] && ! is_running "$1"; }
has_not_reported() { is_running "$1" && [[ ${reports[$1]} == - ]]; }
was_stopped() { [[ ${stops[$1]} == stopped ]]; }
# Its exit code; one that vanished without is lost, as when its machine was started anew.
code_of() { if [[ ${states[$1]} == exited ]]; then echo "${codes[$1]}"; else echo lost; fi; }
has_code() { has_ended "$2" && [[ $(code_of "$2") == "$1" ]]; }

# workers_that TEST…: the numbers of the workers for which the test holds, with commas between them.
workers_that() {
  local number numbers=''
  for ((number = 0; number < WORKERS; number++)); do
    if "$@" "$number"; then numbers+=", $number"; fi
  done
  echo "${numbers#, }"
}

# Follows the attempt until it has ended on all workers or must be ended; sets OUTCOME.
follow() {
  local report_by=$((SECONDS + REPORT_TIMEOUT)) end_by='' silent=0 reported='' code
  while true; do
    code=0
    look "@worker 0 exited 0 0 $ATTEMPT $KEY - -" || code=$?
    fetch_logs
    if ((code != 0)) || [[ -n $(silent_workers) ]]; then
      silent=$((silent + 1))
      could_not_reach "$silent" "$code" || return 0
    else
      silent=0
    fi
    if [[ -n $(workers_that has_ended) ]]; then
      if [[ -z $(workers_that is_running) && -z $(silent_workers) ]]; then
        judge_end
        return
      fi
      # Workers end within a minute of each other, unless one hangs.
      if [[ -z $end_by ]]; then end_by=$((SECONDS + EXIT_GRACE)); fi
      if ((SECONDS >= end_by)); then
        say "worker $(workers_that is_running) still runs $EXIT_GRACE s after others ended; killing it"
        kill_workers
        judge_end
        return
      fi
    elif [[ -z $reported ]]; then
      if [[ -z $(workers_that has_not_reported) && -z $(silent_workers) ]]; then
        reported=yes
        check_cluster || return 0
      elif ((SECONDS >= report_by)); then
        OUTCOME=failed
        CAUSE="worker $(workers_that has_not_reported) did not report the cluster in $REPORT_TIMEOUT s"
        kill_workers
        return
      fi
    fi
    pause "$POLL"
  done
}

# Compares what the workers report; returns 1, with OUTCOME and all of them ended, if they differ.
check_cluster() {
  local number process processes version here devices sum=0 seen=' '
  local first=${reports[0]#*/}
  for ((number = 0; number < WORKERS; number++)); do
    IFS='/:' read -r process processes version here devices <<<"${reports[number]}"
    sum=$((sum + here))
    if [[ ${reports[number]#*/} != "$first" ]]; then
      CAUSE="worker $number reports $(in_words "$number"), worker 0 $(in_words 0)"
    elif ((processes != WORKERS)); then
      CAUSE="worker $number reports a cluster of $processes processes, and there are $WORKERS workers"
    elif [[ $seen == *" $process "* ]]; then
      CAUSE="two workers report to be process $process"
    fi
    seen+="$process "
  done
  if [[ -z $CAUSE ]] && ((sum != devices)); then
    CAUSE="the workers have $sum devices, and report a cluster of $devices"
  fi
  if [[ -z $CAUSE ]]; then
    say "cluster of $WORKERS workers, $devices devices, code $version"
    return 0
  fi
  OUTCOME=differs
  CAUSE+="; bring all to the same code with: launch/tpu_pod.sh sync"
  kill_workers
  return 1
}

in_words() {
  local process processes version here devices
  IFS='/:' read -r process processes version here devices <<<"${reports[$1]}"
  echo "code $version and $here of $devices devices"
}

# Sets OUTCOME from the exit codes: 0 complete, 2 wrong input, 75 saved, anything else failed.
judge_end() {
  local number failing=''
  fetch_logs
  CAUSE=''
  for ((number = 0; number < WORKERS; number++)); do
    CAUSE+=", worker $number $(if has_ended "$number"; then code_of "$number"; else echo killed; fi)"
  done
  CAUSE="exit codes: ${CAUSE#, }"
  if [[ $(workers_that has_code 0) == "$(workers_that true)" ]]; then
    OUTCOME=complete
    return
  fi
  if [[ -n $(workers_that has_code 2) ]]; then
    OUTCOME=wrong-input failing=$(workers_that has_code 2)
  elif [[ -n $(workers_that was_stopped) ]]; then
    OUTCOME=stopped
    return
  elif ! pod_is_up; then
    return
  elif [[ -n $(workers_that has_code 75) ]]; then
    OUTCOME=early
    return
  else
    OUTCOME=failed failing=$(workers_that has_failed)
  fi
  show_end_of_log "${failing%%,*}"
}

has_failed() { has_ended "$1" && [[ $(code_of "$1") != 0 ]]; }

show_end_of_log() {
  local log=$LOGS/$ATTEMPT/worker-${1:-0}.log
  if [[ ! -s $log ]]; then return; fi
  say "the end of $log:"
  tail -n 5 "$log" | sed 's/^/    /' >&2
}

# ── Logs ────────────────────────────────────────────────────────────────────────────────────────

# Copies what the workers have written since the last time, eight workers at a time, and shows what
# worker 0 wrote: it is the one that reports.
fetch_logs() {
  local number size log count=0
  if [[ -n $DRY_RUN ]]; then return; fi
  mkdir -p "$LOGS/$ATTEMPT"
  for ((number = 0; number < WORKERS; number++)); do
    log=$LOGS/$ATTEMPT/worker-$number.log
    touch "$log"
    size=$(($(wc -c <"$log")))
    if [[ ${ids[number]} != "$ATTEMPT" ]] || ((sizes[number] <= size)); then continue; fi
    fetch_log "$number" "$size" "$log" &
    count=$((count + 1))
    if ((count % 8 == 0)); then wait; fi
  done
  wait
}

fetch_log() {
  local number=$1 offset=$2 log=$3 new=$TEMPORARY/log-$1
  worker_command log "$offset"
  if gcloud compute tpus tpu-vm ssh "$NAME" "--project=$PROJECT" "--zone=$ZONE" \
    "--worker=$number" "--command=$QUOTED" >"$new" 2>/dev/null </dev/null; then
    cat "$new" >>"$log"
    if ((number == 0)); then cat "$new"; fi
  fi
}
