# Sourced by tpu_pod.sh: calls of gcloud. What may pass is tried again with back-off, what will not
# is an error at once; a dry run prints each call and does none.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154  # settings come from config.sh

# What `call` leaves behind.
ANSWER='' # its standard output
REASON='' # why it failed, all of what gcloud says of it

# How a call can fail.
FAIL_FOR_NOW=1 # it may work next time
FAIL_FOR_GOOD=2
FAIL_ABSENT=3 # there is no such resource
FAIL_EXISTS=4

# call ASSUMED ARGUMENTS…: one call of gcloud. ASSUMED is the answer that a dry run goes on with;
# the word ABSENT stands for the failure of that name.
call() {
  local assumed=$1
  shift
  if [[ -n $DRY_RUN ]]; then
    quoted gcloud "$@"
    echo "$QUOTED"
    ANSWER=$assumed
    if [[ $assumed == ABSENT ]]; then return "$FAIL_ABSENT"; fi
    return 0
  fi
  local code=0
  gcloud "$@" >"$TEMPORARY/answer" 2>"$TEMPORARY/reason" </dev/null || code=$?
  ANSWER=$(<"$TEMPORARY/answer")
  if ((code == 0)); then return 0; fi
  REASON=$(reason_in "$TEMPORARY/reason")
  code=0
  kind_of_failure "$@" || code=$?
  return "$code"
}

# Sets QUOTED to the arguments as one line that a shell reads back unchanged.
quoted() {
  local word
  QUOTED=''
  for word in "$@"; do
    if [[ ! $word =~ ^[a-zA-Z0-9_./:=@%+,-]+$ ]]; then word=$(in_quotes "$word"); fi
    QUOTED+=${QUOTED:+ }$word
  done
}

# In single quotes nothing has a meaning but the quote. Of printf %q the words would be as safe, and
# hard to read.
in_quotes() {
  local rest=$1 done=''
  while [[ $rest == *\'* ]]; do
    done+="${rest%%\'*}'\\''"
    rest=${rest#*\'}
  done
  echo "'$done$rest'"
}

# What gcloud's messages say was wrong: all lines from the first error on, since a refusal is often
# explained in those that follow; without one, the last lines.
reason_in() {
  local lines
  lines=$(sed -n '/^ERROR/,$p' "$1")
  if [[ -z $lines ]]; then lines=$(tail -n 5 "$1"); fi
  echo "${lines:-gcloud said nothing}"
}

# kind_of_failure CALL…: by REASON, as gcloud's exit code is 1 for nearly everything. A rate limit
# speaks of a quota, too, but passes. What is not known may pass: retries are limited.
kind_of_failure() {
  local error
  error=$(grep '^ERROR: (gcloud' <<<"$REASON" || true)
  if is_absent "$error" "$@"; then return "$FAIL_ABSENT"; fi
  if grep -qE 'ALREADY_EXISTS|already exists' <<<"$error"; then return "$FAIL_EXISTS"; fi
  if grep -qiE 'per minute|rate ?limit|too many requests' <<<"$REASON"; then
    return "$FAIL_FOR_NOW"
  fi
  if grep -qE 'PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|RESOURCE_EXHAUSTED|SERVICE_DISABLED' \
    <<<"$REASON"; then return "$FAIL_FOR_GOOD"; fi
  if grep -qiE 'quota|does not have permission|active account|auth login|ssh-add|billing|has not been used|unrecognized arguments|invalid (choice|value)|argument --' \
    <<<"$REASON"; then return "$FAIL_FOR_GOOD"; fi
  return "$FAIL_FOR_NOW"
}

# is_absent ERROR CALL…: whether gcloud says that the pod itself is not there. Of ssh, much else can
# be "not found" (a host's key, a command on the worker), and is no reason to think so.
is_absent() {
  local error=$1
  shift
  if grep -qE "/(nodes|queuedResources)/$NAME'? was not found" <<<"$error"; then return 0; fi
  case " $* " in
    *' ssh '* | *' scp '*) return 1 ;;
    *) grep -q 'NOT_FOUND' <<<"$error" ;;
  esac
}

# call_again ASSUMED ARGUMENTS…: as `call`, but a failure that may pass is retried with back-off.
# Ends the program if it does not pass, or will not. Returns 0, FAIL_ABSENT or FAIL_EXISTS.
call_again() {
  local try code
  for ((try = 1; ; try++)); do
    code=0
    call "$@" || code=$?
    case $code in
      "$FAIL_FOR_NOW") ;;
      "$FAIL_FOR_GOOD") refused ;;
      *) return "$code" ;;
    esac
    if ((try > RETRIES)); then die 1 "gcloud failed $try times: $REASON"; fi
    say "gcloud failed, try $try of $((RETRIES + 1)): $REASON"
    back_off "$try"
  done
}

# Ends the program: nothing is gained by trying again, as the file tells who would.
refused() {
  local reason=$REASON
  touch "$TEMPORARY/refused"
  if [[ -n $REQUESTING ]]; then look_at_presence; fi
  die 1 "gcloud refused: $reason"
}

# back_off N: waits BACKOFF seconds after the first failure, then twice as long, up to two minutes.
back_off() {
  local seconds=$((BACKOFF << ($1 < 6 ? $1 - 1 : 5)))
  pause "$((seconds < 120 ? seconds : 120))"
}

# In the background, so that a signal is heeded at once and not when the time is over.
pause() {
  if [[ -n $DRY_RUN ]]; then return; fi
  sleep "$1" >/dev/null 2>&1 &
  wait $! || true
}

# on_pod VERB ARGUMENTS…: sets CALL to a call of `gcloud compute tpus tpu-vm`, `ssh` or `scp`, by
# the way on which the workers can be reached. A tunnel is known to gcloud's alpha commands alone.
on_pod() {
  local verb=$1
  shift
  CALL=(compute tpus tpu-vm "$verb" "$@" "--project=$PROJECT" "--zone=$ZONE")
  if [[ -n $IAP ]]; then
    CALL=(alpha "${CALL[@]}" --tunnel-through-iap)
  elif [[ -n $INTERNAL_IPS ]]; then
    CALL+=(--internal-ip)
  fi
}

# ssh_all ASSUMED COMMAND: runs a command on all workers at the same time; as `call`. One worker
# that fails makes it fail, and what the others wrote is in ANSWER all the same.
ssh_all() {
  on_pod ssh "$NAME" --worker=all "--command=$2"
  call "$1" "${CALL[@]}"
}

# worker_command ARGUMENTS…: sets QUOTED to the command that calls worker.sh on a worker.
worker_command() { quoted bash spvit_jax/launch/lib/worker.sh "$@"; }
