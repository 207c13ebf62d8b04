# Sourced by tpu_pod.sh: what has been asked for from this checkout, where, and not been seen gone
# since. Settings change; what they no longer name must still be found, as it costs money.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154  # settings come from config.sh

RECORDS=runs/pods/created # a file for each pod, called PROJECT,ZONE,NAME

# What is left if this program ends now: '' nothing that it knows of, `asked` a request that may be
# in the queue, `on` a pod, `ended` a queued resource that is over.
PRESENCE=''

record_file() { echo "$RECORDS/$PROJECT,$ZONE,$NAME"; }

# Before the request is made, so that there is a record whatever happens to this program.
write_record() {
  PRESENCE=asked
  if [[ -n $DRY_RUN ]]; then return; fi
  mkdir -p "$RECORDS"
  printf '%s\n' "TYPE=$TYPE" "PROVISIONING=$PROVISIONING" \
    "CREATED=$(date -u '+%Y-%m-%d %H:%M:%S') UTC" >"$(record_file)"
}

# When it has been seen that neither queued resource nor TPU VM is there.
forget_record() {
  PRESENCE=''
  if [[ -z $DRY_RUN ]]; then rm -f "$(record_file)"; fi
}

# Sets PRESENCE by a single look; what cannot be looked at is as it was.
look_at_presence() {
  local code=0
  if [[ -n $DRY_RUN ]]; then return; fi
  call '' compute tpus queued-resources describe "$NAME" "--project=$PROJECT" "--zone=$ZONE" \
    '--format=value(state.state)' || code=$?
  case $code,$ANSWER in
    "$FAIL_ABSENT",*) forget_record ;;
    0,ACTIVE) PRESENCE=on ;;
    0,SUSPENDED | 0,FAILED) PRESENCE=ended ;;
    0,*) PRESENCE=asked ;;
  esac
}

# recorded KEY: one of the facts of the record, or "unknown".
recorded() {
  local line
  line=$(grep "^$1=" "$(record_file)" 2>/dev/null || echo '=unknown')
  echo "${line#*=}"
}

# The command that deletes this pod, whatever the settings say by then.
delete_command() {
  local config=''
  if [[ $CONFIG != launch/pod.env ]]; then
    quoted "--config=$CONFIG"
    config="$QUOTED "
  fi
  echo "launch/tpu_pod.sh $config--name=$NAME --zone=$ZONE --project=$PROJECT delete"
}

# At the end of a command: what goes on to cost money, and how to end that.
remind() {
  case $PRESENCE in
    asked)
      say "the request for $TYPE may be in the queue of $ZONE, and becomes a pod that costs" \
        "$(cost_of "$TYPE"); to wait for it, call the same command again; to withdraw it:" \
        "$(delete_command)"
      ;;
    ended) say "the queued resource is left, and costs nothing; to delete it: $(delete_command)" ;;
    on)
      say "the pod stays on in $ZONE and costs $(cost_of "$TYPE"); to delete it:" \
        "$(delete_command)"
      ;;
  esac
}

# at_each_record PATTERN COMMAND…: calls the command with PROJECT, ZONE, NAME and TYPE of each
# record whose file's name matches.
at_each_record() {
  local pattern=$1 file
  local PROJECT ZONE NAME TYPE
  shift
  for file in "$RECORDS"/$pattern; do
    if [[ ! -e $file ]]; then continue; fi
    IFS=, read -r PROJECT ZONE NAME <<<"${file##*/}"
    TYPE=$(recorded TYPE)
    "$@"
  done
}

# Sets STATE and NODE_STATE of a record, and forgets it if nothing is there any more.
look_at_record() {
  find_resource ABSENT
  find_node ABSENT
  if [[ $STATE,$NODE_STATE == ABSENT,ABSENT ]]; then forget_record; fi
}

list_records() {
  if [[ -z $(ls "$RECORDS" 2>/dev/null) ]]; then
    echo "no pod has been asked for from here that has not been deleted"
  fi
  at_each_record '*' list_record
}

list_record() {
  local created provisioning
  created=$(recorded CREATED) provisioning=$(recorded PROVISIONING)
  look_at_record
  echo "$NAME: $TYPE ($provisioning) in $ZONE of $PROJECT, asked for $created:" \
    "queued resource $STATE, TPU VM $NODE_STATE"
  if [[ $STATE,$NODE_STATE != ABSENT,ABSENT ]]; then
    echo "    costs $(cost_of "$TYPE") while it is on; to delete it: $(delete_command)"
  fi
}

# ── Elsewhere ───────────────────────────────────────────────────────────────────────────────────

# Ends the program with exit code 2 if a pod of this name is in another zone or project: what was to
# be deleted is there, and not where the settings say.
refuse_if_elsewhere() {
  local here="$PROJECT,$ZONE,$NAME" group zones
  if [[ -n $DRY_RUN ]]; then return; fi
  at_each_record "*,$NAME" refuse_if_recorded_elsewhere "$here"
  for group in queued-resources tpu-vm; do
    if ! call '' compute tpus "$group" list "--project=$PROJECT" --zone=- '--format=value(name)'; then
      say "other zones of $PROJECT could not be looked at: $REASON"
      return
    fi
    zones=$(sed -nE "s|.*/locations/([^/]+)/[^/]+/$NAME\$|\1|p" <<<"$ANSWER" | sort -u)
    if [[ -n $zones ]]; then is_elsewhere "${zones%%$'\n'*}"; fi
  done
}

refuse_if_recorded_elsewhere() {
  if [[ $PROJECT,$ZONE,$NAME == "$1" ]]; then return; fi
  look_at_record
  if [[ $STATE,$NODE_STATE != ABSENT,ABSENT ]]; then is_elsewhere "$ZONE"; fi
}

# is_elsewhere ZONE
is_elsewhere() {
  local there=$1
  local ZONE=$there
  die 2 "nothing was deleted: the pod $NAME is in $ZONE of $PROJECT, and the settings name another" \
    "place. To delete it: $(delete_command)"
}

# Says so if the record names a pod of this name at another place, since that goes on to cost.
warn_of_others() { at_each_record "*,$NAME" warn_of_other "$PROJECT,$ZONE,$NAME"; }

warn_of_other() {
  if [[ $PROJECT,$ZONE,$NAME == "$1" ]]; then return; fi
  say "note: a pod $NAME has been asked for in $ZONE of $PROJECT as well, and not been deleted" \
    "from here; to delete it: $(delete_command)"
}
