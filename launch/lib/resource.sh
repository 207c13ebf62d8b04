# Sourced by tpu_pod.sh: the queued resource and the TPU VM (node) that it brings, both called NAME.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154  # settings come from config.sh

STATE=''      # of the queued resource, ABSENT if there is none
NODE_STATE='' # of the TPU VM, ABSENT if there is none
HEALTH=''
WORKERS=0 # number of VMs of which the TPU VM consists

queued_resources() {
  local assumed=$1 verb=$2
  shift 2
  call_again "$assumed" compute tpus queued-resources "$verb" "$NAME" \
    "--project=$PROJECT" "--zone=$ZONE" "$@"
}

# find_resource ASSUMED: sets STATE.
find_resource() {
  if queued_resources "$1" describe '--format=value(state.state)'; then
    STATE=${ANSWER:-UNKNOWN}
  else
    STATE=ABSENT
  fi
}

# find_node ASSUMED: sets NODE_STATE, HEALTH and WORKERS; ASSUMED is as READY,HEALTHY,1.
find_node() {
  NODE_STATE=ABSENT HEALTH='' WORKERS=0
  if call_again "$1" compute tpus tpu-vm describe "$NAME" "--project=$PROJECT" "--zone=$ZONE" \
    '--format=csv[no-heading](state,health,networkEndpoints.len())'; then
    IFS=, read -r NODE_STATE HEALTH WORKERS <<<"$ANSWER"
  fi
}

# Ends the program if `find_node` has found nothing that could do work.
expect_workers() {
  if [[ $NODE_STATE == ABSENT ]]; then die 2 "there is no TPU VM $NAME; create it first"; fi
  if ((WORKERS == 0)); then die 1 "the TPU VM $NAME is $NODE_STATE, and has no workers yet"; fi
}

# Asks for the pod and waits until it is there. A resource of this name that has ended is replaced.
# Returns 1 if the request failed.
obtain_pod() {
  find_resource ABSENT
  case $STATE in
    ACTIVE)
      say "is there already"
      return
      ;;
    ABSENT)
      find_node ABSENT
      if [[ $NODE_STATE != ABSENT ]]; then
        die 2 "there is a TPU VM $NAME without a queued resource; choose another NAME, or delete it"
      fi
      request_pod
      ;;
    SUSPENDING | SUSPENDED | FAILED | DELETING)
      say "the queued resource of before is $STATE; deleting it"
      delete_pod
      request_pod
      ;;
    *) say "has been asked for already" ;;
  esac
  wait_for_pod
}

request_pod() {
  local flags=("--node-id=$NAME" "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME_VERSION")
  case $PROVISIONING in
    spot) flags+=(--spot) ;;
    reserved) flags+=(--reserved) ;;
  esac
  if [[ -n $SERVICE_ACCOUNT ]]; then flags+=("--service-account=$SERVICE_ACCOUNT"); fi
  # The VMs read and write the bucket with the rights of their account.
  flags+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
  if [[ -n $NETWORK ]]; then flags+=("--network=$NETWORK"); fi
  if [[ -n $SUBNETWORK ]]; then flags+=("--subnetwork=$SUBNETWORK"); fi
  say "asking for $TYPE in $ZONE, $PROVISIONING"
  # An answer that was lost on the way shows as "exists" at the next try, and is as good.
  queued_resources '' create "${flags[@]}" --async || true
}

# Waits while the request is in the queue, however long that is and whether or not it can be looked
# at; returns 1 if it failed.
wait_for_pod() {
  local before='' code
  while true; do
    code=0
    call ACTIVE compute tpus queued-resources describe "$NAME" \
      "--project=$PROJECT" "--zone=$ZONE" '--format=value(state.state)' || code=$?
    case $code in
      0) STATE=${ANSWER:-UNKNOWN} ;;
      "$FAIL_ABSENT") STATE=ABSENT ;;
      "$FAIL_FOR_GOOD") refused ;;
      *) STATE="cannot be looked at: $REASON" ;;
    esac
    if [[ $STATE != "$before" ]]; then say "queued resource: $STATE"; fi
    before=$STATE
    case $STATE in
      ACTIVE)
        find_node "READY,HEALTHY,1"
        if ((WORKERS > 0)); then return 0; fi
        ;;
      ABSENT) die 1 "the queued resource $NAME was deleted by somebody else while it was waited for" ;;
      FAILED | SUSPENDING | SUSPENDED)
        queued_resources '' describe '--format=value(state.failedData.error.message)' || true
        REASON=${ANSWER:-it gives no reason}
        return 1
        ;;
    esac
    pause "$POLL"
  done
}

# Deletes the queued resource and the TPU VM, each if it is there, and returns when both are gone.
# Half-made ones, too: the force flag takes the VM with the resource, and what then is left of a
# VM is deleted by itself.
delete_pod() {
  local until=$((SECONDS + DELETE_TIMEOUT))
  find_resource ACTIVE
  while [[ $STATE != ABSENT ]]; do
    if [[ $STATE != DELETING ]]; then
      delete_one queued-resources --force
    fi
    wait_before_next_look "$until" "the queued resource $NAME is still $STATE"
    find_resource ABSENT
  done
  find_node ABSENT
  while [[ $NODE_STATE != ABSENT ]]; do
    if [[ $NODE_STATE != DELETING ]]; then
      delete_one tpu-vm
    fi
    wait_before_next_look "$until" "the TPU VM $NAME is still $NODE_STATE"
    find_node ABSENT
  done
  say "gone: queued resource and TPU VM"
}

# Asks once. "Not now" (it is still being made, say) is no error: the caller looks and asks again.
delete_one() {
  local group=$1 code=0
  shift
  call '' compute tpus "$group" delete "$NAME" "--project=$PROJECT" "--zone=$ZONE" \
    "$@" --quiet --async || code=$?
  case $code in
    "$FAIL_FOR_GOOD") refused ;;
    "$FAIL_FOR_NOW") say "not deleted yet: $REASON" ;;
  esac
}

wait_before_next_look() {
  if ((SECONDS > $1)); then
    die 1 "$2 after $DELETE_TIMEOUT s and may cost money; look at it in the cloud console"
  fi
  pause "$POLL"
}
