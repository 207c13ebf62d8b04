# Sourced by tpu_pod.sh: deleting the queued resource and the TPU VM, and seeing that they are gone.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154  # settings come from config.sh

FOUND='' # whether `delete_pod` has found something to delete

# The verb. "Gone" is said of what was there, or had been asked for there; what is not where the
# settings say may be elsewhere, and go on to cost money.
delete() {
  local known=''
  if [[ -e $(record_file) ]]; then known=yes; fi
  delete_pod
  if [[ -n $FOUND ]]; then return; fi
  if [[ -z $known ]]; then refuse_if_elsewhere; fi
  say "nothing was deleted: there is no $NAME in $ZONE of $PROJECT${known:+ any more}"
}

# Deletes the queued resource and the TPU VM, each if it is there, and returns when both are gone.
# Half-made ones, too: the force flag takes the VM with the resource, and what then is left of a
# VM is deleted by itself.
delete_pod() {
  local until=$((SECONDS + DELETE_TIMEOUT))
  FOUND=''
  find_resource ACTIVE
  while [[ $STATE != ABSENT ]]; do
    FOUND=yes
    if [[ $STATE != DELETING ]]; then
      delete_one queued-resources --force
    fi
    wait_before_next_look "$until" "the queued resource $NAME is still $STATE"
    find_resource ABSENT
  done
  find_node ABSENT
  while [[ $NODE_STATE != ABSENT ]]; do
    FOUND=yes
    if [[ $NODE_STATE != DELETING ]]; then
      delete_one tpu-vm
    fi
    wait_before_next_look "$until" "the TPU VM $NAME is still $NODE_STATE"
    find_node ABSENT
  done
  forget_record
  if [[ -n $FOUND ]]; then say "gone: queued resource and TPU VM"; fi
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
    die 1 "$2 after $DELETE_TIMEOUT s and may cost money ($(cost_of "$TYPE"));" \
      "look at it in the cloud console, or try again: $(delete_command)"
  fi
  pause "$POLL"
}
