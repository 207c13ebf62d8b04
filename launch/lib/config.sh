# Sourced by tpu_pod.sh: messages, time-outs, and the settings of a pod. A settings file is read,
# not executed, and every value is checked before the first call to gcloud.
# shellcheck shell=bash disable=SC2034  # the other files use what is set here

PROJECT='' ZONE='' NAME='' ACCELERATOR='' RUNTIME_VERSION='' PROVISIONING='spot' RESERVATION=''
MAX_RUN_DURATION='' PRICE_PER_CHIP_HOUR='' BUCKET='' DATA_BUCKET='' SERVICE_ACCOUNT='' NETWORK=''
SUBNETWORK='' INTERNAL_IPS='' IAP=''
SETTINGS='PROJECT ZONE NAME ACCELERATOR RUNTIME_VERSION PROVISIONING RESERVATION MAX_RUN_DURATION
PRICE_PER_CHIP_HOUR BUCKET DATA_BUCKET SERVICE_ACCOUNT NETWORK SUBNETWORK INTERNAL_IPS IAP'

# Seconds, except RETRIES and TRIES.
RETRIES=${TPU_POD_RETRIES:-10}                 # of a gcloud call that failed for a passing reason
BACKOFF=${TPU_POD_BACKOFF:-4}                  # before the second try; doubled up to 120
POLL=${TPU_POD_POLL:-20}                       # between two looks at the workers or the queue
TRIES=${TPU_POD_TRIES:-3}                      # of a run that fails (exit code 1)
LONG_RUN=${TPU_POD_LONG_RUN:-1800}             # a try that lasted this long is forgiven
REPORT_TIMEOUT=${TPU_POD_REPORT_TIMEOUT:-900}  # for all workers to report the cluster
EXIT_GRACE=${TPU_POD_EXIT_GRACE:-120}          # for the others to end once one worker has
STOP_TIMEOUT=${TPU_POD_STOP_TIMEOUT:-600}      # for the workers to save after `stop`
DELETE_TIMEOUT=${TPU_POD_DELETE_TIMEOUT:-1800} # for the resources to be gone after `delete`

say() {
  if [[ -z $DRY_RUN ]]; then indented "$(date '+%Y-%m-%d %H:%M:%S') $NAME: $*" >&2; fi
}

# die CODE MESSAGE: ends the program. Codes: 1 failure, 2 wrong input, 75 ended before it was done.
die() {
  local code=$1
  shift
  indented "error: $*" >&2
  exit "$code"
}

# A message of one line as it is; the further lines of a longer one, as of gcloud, set off from it.
indented() { echo "${1//$'\n'/$'\n    '}"; }

# read_settings FILE: sets the variables that are named in SETTINGS.
read_settings() {
  local file=$1 line key number=0
  if [[ ! -f $file ]]; then
    die 2 "there is no settings file $file; copy launch/pod.env.example to launch/pod.env, edit it"
  fi
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%$'\r'}
    if [[ $line =~ ^[[:space:]]*(#.*)?$ ]]; then continue; fi
    if [[ ! $line =~ ^([A-Z_]+)=(.*)$ ]]; then
      die 2 "$file, line $number is '$line'; expected KEY=VALUE"
    fi
    key=${BASH_REMATCH[1]}
    if [[ " ${SETTINGS//$'\n'/ } " != *" $key "* ]]; then
      die 2 "$file, line $number sets $key; known settings are ${SETTINGS//$'\n'/ }"
    fi
    printf -v "$key" %s "${BASH_REMATCH[2]}"
  done <"$file"
}

# check KEY PATTERN EXPECTED: refuses a value that does not match the whole pattern.
check() {
  local value=${!1}
  if [[ ! $value =~ ^($2)$ ]]; then
    die 2 "$1 is '$value'; expected $3; edit $CONFIG"
  fi
}

# Refuses, in one line, what could not be right; afterwards every value is a plain word.
check_settings() {
  check PROJECT '([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]' 'the ID of a Google Cloud project'
  check ZONE '[a-z]+-[a-z]+[0-9]+-[a-z0-9]+' 'a zone such as us-west4-a'
  check NAME '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' \
    'at most 40 lower-case letters, digits and hyphens, beginning with a letter'
  check ACCELERATOR 'v(4|5e|5p|6e):[1-9][0-9]*(x[1-9][0-9]*){1,2}|v[0-9]+(e|p|litepod)?-[1-9][0-9]*' \
    'a topology such as v5e:16x16, or a type such as v5litepod-256'
  check RUNTIME_VERSION '([a-z0-9][a-z0-9._-]*)?' 'the name of a TPU image, or nothing'
  check_provisioning
  check PRICE_PER_CHIP_HOUR '([0-9]+([.][0-9]+)?)?' 'US dollars such as 1.20, or nothing'
  check BUCKET '([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])?' "a bucket's name without gs://, or nothing"
  check DATA_BUCKET '([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])?' \
    "a bucket's name without gs://, or nothing"
  check SERVICE_ACCOUNT '([a-zA-Z0-9-]+@[a-z0-9.-]+)?' "a service account's address, or nothing"
  check NETWORK '([a-z0-9/._-]+)?' "a network's name, or nothing"
  check SUBNETWORK '([a-z0-9/._-]+)?' "a subnetwork's name, or nothing"
  check INTERNAL_IPS '(yes)?' 'yes or nothing'
  check IAP '(yes)?' 'yes or nothing'
  accelerator_type
  default_runtime
}

# What belongs to one way of provisioning is refused with another, where it would be ignored.
check_provisioning() {
  check PROVISIONING 'spot|on-demand|reserved|flex-start' 'spot, on-demand, reserved or flex-start'
  check RESERVATION '([a-z0-9/._-]+)?' "a reservation's name, or nothing"
  check MAX_RUN_DURATION '([1-9][0-9]*[smhd])?' 'a duration such as 12h or 7d, or nothing'
  if [[ -n $RESERVATION && $PROVISIONING != reserved ]]; then
    die 2 "RESERVATION is '$RESERVATION' and PROVISIONING is '$PROVISIONING'; expected reserved"
  fi
  if [[ $PROVISIONING == flex-start && -z $MAX_RUN_DURATION ]]; then
    die 2 "PROVISIONING is 'flex-start' without MAX_RUN_DURATION; set it, to at most 7d"
  fi
  if [[ -n $MAX_RUN_DURATION && $PROVISIONING != flex-start ]]; then
    die 2 "MAX_RUN_DURATION is '$MAX_RUN_DURATION' and PROVISIONING is '$PROVISIONING'; it goes with flex-start"
  fi
}
