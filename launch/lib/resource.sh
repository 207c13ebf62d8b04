# Sourced by tpu_pod.sh: the queued resource and the TPU VM (node) that it brings, both called NAME.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154  # settings come from config.sh

STATE=''      # of the queued resource, ABSENT if there is none
NODE_STATE='' # of the TPU VM, ABSENT if there is none
HEALTH=''
WORKERS=0     # number of VMs of which the TPU VM consists
NODE_TYPE=''  # its accelerator
REQUESTING='' # whether a new request is being made

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

# find_node ASSUMED: sets NODE_STATE, HEALTH, WORKERS and NODE_TYPE; ASSUMED is as
# READY,HEALTHY,1,v6e-4.
find_node() {
  NODE_STATE=ABSENT HEALTH='' WORKERS=0 NODE_TYPE=''
  if call_again "$1" compute tpus tpu-vm describe "$NAME" "--project=$PROJECT" "--zone=$ZONE" \
    '--format=csv[no-heading](state,health,networkEndpoints.len(),acceleratorType)'; then
    IFS=, read -r NODE_STATE HEALTH WORKERS NODE_TYPE <<<"$ANSWER"
  fi
}

# Ends the program if `find_node` has found nothing that could do work.
expect_node() {
  if [[ $NODE_STATE == ABSENT ]]; then
    warn_of_others
    die 2 "there is no TPU VM $NAME; create it first"
  fi
  if ((WORKERS == 0)); then die 1 "the TPU VM $NAME is $NODE_STATE, and has no workers yet"; fi
}

# As `expect_node`, and if it is another pod than the settings describe, or half of it: a run on
# that would hang, or be another run.
expect_workers() {
  local wrong
  expect_node
  wrong=$(difference_from_settings)
  if [[ -n $wrong ]]; then die 2 "$wrong; delete it and create it again, or edit $CONFIG"; fi
}

# In what the TPU VM is not what the settings ask for; empty if in nothing.
difference_from_settings() {
  if [[ -n $DRY_RUN ]]; then return; fi
  if [[ -n $NODE_TYPE && $NODE_TYPE != "$TYPE" ]]; then
    echo "the TPU VM $NAME is a $NODE_TYPE, and ACCELERATOR is $ACCELERATOR ($TYPE)"
  elif ((WORKERS > 0 && WORKERS != $(vms_of "$TYPE"))); then
    echo "the TPU VM $NAME has $WORKERS workers, and $TYPE consists of $(vms_of "$TYPE")"
  fi
}

# Asks for the pod and waits until it is there. A resource of this name that has ended is replaced.
# Returns 1 if the request failed.
obtain_pod() {
  warn_of_others
  find_resource ABSENT
  case $STATE in
    ACTIVE)
      PRESENCE=on
      find_node "READY,HEALTHY,1,"
      expect_workers
      say "is there already"
      return
      ;;
    ABSENT)
      find_node ABSENT
      if [[ $NODE_STATE != ABSENT ]]; then
        PRESENCE=on
        die 2 "there is a TPU VM $NAME without a queued resource; choose another NAME, or delete it"
      fi
      request_pod
      ;;
    SUSPENDING | SUSPENDED | FAILED | DELETING)
      say "the queued resource of before is $STATE; deleting it"
      delete_pod
      request_pod
      ;;
    *)
      PRESENCE=asked
      say "has been asked for already"
      ;;
  esac
  wait_for_pod
}

request_pod() {
  local create=(compute tpus queued-resources create "$NAME" "--project=$PROJECT" "--zone=$ZONE"
    "--node-id=$NAME" "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME_VERSION")
  case $PROVISIONING in
    spot) create+=(--spot) ;;
    reserved) if [[ -z $RESERVATION ]]; then create+=(--reserved); fi ;;
    flex-start)
      create+=(--provisioning-model=flex-start "--max-run-duration=$MAX_RUN_DURATION")
      ;;
  esac
  if [[ -n $RESERVATION ]]; then create+=("--reservation=$RESERVATION"); fi
  # Known to gcloud's alpha commands alone.
  if [[ -n $RESERVATION || $PROVISIONING == flex-start ]]; then create=(alpha "${create[@]}"); fi
  if [[ -n $SERVICE_ACCOUNT ]]; then create+=("--service-account=$SERVICE_ACCOUNT"); fi
  # The VMs read and write the buckets with the rights of their account.
  create+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
  if [[ -n $NETWORK ]]; then create+=("--network=$NETWORK"); fi
  if [[ -n $SUBNETWORK ]]; then create+=("--subnetwork=$SUBNETWORK"); fi
  if [[ -n $INTERNAL_IPS ]]; then create+=(--internal-ips); fi
  say "asking for $TYPE in $ZONE, $PROVISIONING"
  write_record
  REQUESTING=yes
  # An answer that was lost on the way shows as "exists" at the next try, and is as good.
  call_again '' "${create[@]}" --async || true
  REQUESTING=''
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
        PRESENCE=on
        find_node "READY,HEALTHY,1,"
        if ((WORKERS > 0)); then return 0; fi
        ;;
      ABSENT)
        forget_record
        die 1 "the queued resource $NAME was deleted by somebody else while it was waited for"
        ;;
      FAILED | SUSPENDING | SUSPENDED)
        queued_resources '' describe '--format=value(state.failedData.error.message)' || true
        REASON=${ANSWER:-it gives no reason}
        return 1
        ;;
    esac
    pause "$POLL"
  done
}
