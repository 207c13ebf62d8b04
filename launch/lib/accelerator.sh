# Sourced by tpu_pod.sh: what an accelerator type stands for: chips, VMs, image, cost.
# shellcheck shell=bash disable=SC2034,SC2153  # settings come from config.sh

TYPE='' # gcloud's name of the accelerator

# Sets TYPE: of v4 and v5p it counts cores, of v5e and v6e chips.
accelerator_type() {
  if [[ $ACCELERATOR != *:* ]]; then
    TYPE=$ACCELERATOR
    return
  fi
  local chip=${ACCELERATOR%%:*} shape=${ACCELERATOR#*:}
  local chips=$((${shape//x/*}))
  case $chip in
    v5e) TYPE=v5litepod-$chips ;;
    v6e) TYPE=v6e-$chips ;;
    *) TYPE=$chip-$((2 * chips)) ;;
  esac
}

default_runtime() {
  if [[ -n $RUNTIME_VERSION ]]; then return; fi
  case $TYPE in
    v5litepod-*) RUNTIME_VERSION=v2-alpha-tpuv5-lite ;;
    v5p-*) RUNTIME_VERSION=v2-alpha-tpuv5 ;;
    v6e-*) RUNTIME_VERSION=v2-alpha-tpuv6e ;;
    *) RUNTIME_VERSION=tpu-ubuntu2204-base ;;
  esac
}

# chips_of TYPE
chips_of() {
  case $1 in
    v5litepod-* | v6e-*) echo "${1#*-}" ;;
    *) echo $((${1#*-} / 2)) ;;
  esac
}

# vms_of TYPE: four chips each; up to eight of v5e and v6e are one VM.
vms_of() {
  local chips
  chips=$(chips_of "$1")
  case $1 in
    v5litepod-* | v6e-*) if ((chips <= 8)); then chips=4; fi ;;
  esac
  echo $(((chips + 3) / 4))
}

# Google's list prices on demand in the US, in dollars per chip and hour, as of 2025; see
# https://cloud.google.com/tpu/pricing. v4 is in us-central2, the others in several US regions.
list_price() {
  case $1 in
    v4-*) echo 3.22 ;;
    v5litepod-*) echo 1.20 ;;
    v5p-*) echo 4.20 ;;
    v6e-*) echo 2.70 ;;
  esac
}

# cost_of TYPE: what a pod of this type costs per hour, in words.
cost_of() {
  local chips price source='list price on demand, US, 2025'
  chips=$(chips_of "$1")
  price=$(list_price "$1")
  if [[ -n $PRICE_PER_CHIP_HOUR ]]; then
    price=$PRICE_PER_CHIP_HOUR source='the settings'
  fi
  if [[ -z $price ]]; then
    echo "at a price unknown here (set PRICE_PER_CHIP_HOUR) for $chips chips"
    return
  fi
  awk -v chips="$chips" -v price="$price" -v from="$source" \
    'BEGIN { printf "%.2f USD per hour (%d chips at %s, %s)\n", chips * price, chips, price, from }'
}
