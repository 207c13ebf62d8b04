# Sourced by tpu_pod.sh: looking at what the workers run, until it has ended, and judging how.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154  # settings come from config.sh

# What the last look at the workers showed, by number; all empty where a worker did not answer.
states=() codes=() sizes=() ids=() keys=() stops=() reports=()

# ── Looking ─────────────────────────────────────────────────────────────────────────────────────

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
  local reason=$REASON silent
  silent=$(silent_workers)
  if (($2 == FAIL_FOR_GOOD)); then refused; fi
  pod_is_up || return 1
  if (($1 <= RETRIES)); then
    say "worker $silent did not answer: ${reason:-no reason given}"
    return 0
  fi
  # One VM of several, or one that Google holds for ill, is broken. All of a healthy pod are more
  # likely to be cut off from this machine than broken, and what they run is worth more than that.
  if [[ $silent == "$(workers_that true)" && ${HEALTH:-HEALTHY} == HEALTHY ]]; then
    die 1 "no worker of $NAME can be reached, and the TPU VM is $NODE_STATE and healthy: look at" \
      "the network and the key of this machine. The reason given: ${reason:-none}"
  fi
  OUTCOME=unreachable CAUSE="worker $silent cannot be reached: ${reason:-it does not answer}"
  return 1
}

silent_workers() { workers_that has_no_state; }
has_no_state() { [[ -z ${states[$1]} ]]; }
runs_something() { [[ ${states[$1]} == running ]]; }
is_part() { [[ ${ids[$1]} == "$ATTEMPT" ]]; }
is_running() { runs_something "$1" && is_part "$1"; }
has_ended() { [[ -n ${states[$1]} ]] && ! is_running "$1"; }
has_not_reported() { ! is_part "$1" || [[ ${reports[$1]} == - ]]; }
was_stopped() { [[ ${stops[$1]} == stopped ]]; }
# Its exit code; one that vanished without is lost, as when its machine was started anew.
code_of() { if [[ ${states[$1]} == exited ]]; then echo "${codes[$1]}"; else echo lost; fi; }
has_code() { has_ended "$2" && [[ $(code_of "$2") == "$1" ]]; }
has_failed() { has_ended "$1" && [[ $(code_of "$1") != 0 ]]; }
# 126 and 127 are the shell's, of a command that cannot be run or is not there.
was_given_wrong_input() { has_ended "$1" && [[ $(code_of "$1") =~ ^(2|126|127)$ ]]; }
# By itself, and not with its machine, nor since another was lost or all were to save.
has_failed_first() { has_failed "$1" && [[ ! $(code_of "$1") =~ ^(75|lost)$ ]]; }

# workers_that TEST…: the numbers of the workers for which the test holds, with commas between them.
workers_that() {
  local number numbers=''
  for ((number = 0; number < WORKERS; number++)); do
    if "$@" "$number"; then numbers+=", $number"; fi
  done
  echo "${numbers#, }"
}

# ── Following ───────────────────────────────────────────────────────────────────────────────────

# Follows the attempt until it has ended on all workers or must be ended; sets OUTCOME. The
# functions below share its variables.
follow() {
  local report_by=$((SECONDS + REPORT_TIMEOUT)) end_by='' silent=0 reported='' said=''
  while true; do
    look_once || return 0
    if [[ -z $reported ]]; then await_reports; fi
    if [[ -z $OUTCOME && -n $(workers_that has_ended) ]]; then await_the_others; fi
    if [[ -n $OUTCOME ]]; then return 0; fi
    pause "$POLL"
  done
}

# Looks at the workers and fetches their logs. Returns 1, with OUTCOME, if the pod is lost.
look_once() {
  local code=0
  look "@worker 0 exited 0 0 $ATTEMPT $KEY - -" || code=$?
  fetch_logs
  if ((code == 0)) && [[ -z $(silent_workers) ]]; then
    silent=0
    return 0
  fi
  # A process that is lost ends the others within a minute. While they run, it runs, too, and only
  # ssh does not come through.
  if ((silent >= RETRIES)) && [[ -n $reported && -n $(workers_that is_running) ]]; then
    if [[ -z $said ]]; then
      say "worker $(silent_workers) cannot be reached, and goes on: the others, which run, need it"
      said=yes
    fi
    pod_is_up
    return
  fi
  silent=$((silent + 1))
  could_not_reach "$silent" "$code"
}

# Workers end within a minute of each other, unless one hangs.
await_the_others() {
  if [[ -z $(workers_that is_running) && -z $(silent_workers) ]]; then
    judge_end
    return
  fi
  if [[ -z $end_by ]]; then end_by=$((SECONDS + EXIT_GRACE)); fi
  if ((SECONDS >= end_by)); then
    say "worker $(workers_that is_running) still runs $EXIT_GRACE s after others ended; killing it"
    kill_workers
    judge_end
  fi
}

# What has ended may have reported, too, however short it was.
await_reports() {
  if [[ -z $(workers_that has_not_reported) ]]; then
    reported=yes
    check_cluster
  elif [[ -z $(workers_that has_ended) ]] && ((SECONDS >= report_by)); then
    OUTCOME=failed
    CAUSE="worker $(workers_that has_not_reported) did not report the cluster in $REPORT_TIMEOUT s"
    kill_workers
  fi
}

# Compares what the workers report; sets OUTCOME, with all of them ended, if they differ.
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
    return
  fi
  OUTCOME=differs
  CAUSE+="; bring all to the same code with: launch/tpu_pod.sh sync"
  kill_workers
}

in_words() {
  local process processes version here devices
  IFS='/:' read -r process processes version here devices <<<"${reports[$1]}"
  echo "code $version and $here of $devices devices"
}

# ── Judging ─────────────────────────────────────────────────────────────────────────────────────

# Sets OUTCOME from the exit codes.
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
  if [[ -n $(workers_that was_given_wrong_input) ]]; then
    OUTCOME=wrong-input failing=$(workers_that was_given_wrong_input)
  elif [[ -n $(workers_that was_stopped) ]]; then
    OUTCOME=stopped
    return
  elif ! pod_is_up; then
    return
  elif [[ -n $(workers_that has_failed_first) || -z $(workers_that has_failed) ]]; then
    OUTCOME=failed failing=$(workers_that has_failed_first)
  else
    OUTCOME=early # all were to save, or one was lost with its machine and the others ended for it
    return
  fi
  show_end_of_log "${failing%%,*}"
}
