# Sourced by tpu_pod.sh: the workers' logs, copied to this machine as they grow.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154  # settings come from config.sh

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
  on_pod ssh "$NAME" "--worker=$number" "--command=$QUOTED"
  if gcloud "${CALL[@]}" >"$new" 2>/dev/null </dev/null; then
    cat "$new" >>"$log"
    if ((number == 0)); then cat "$new"; fi
  fi
}

show_end_of_log() {
  local log=$LOGS/$ATTEMPT/worker-${1:-0}.log
  if [[ ! -s $log ]]; then return; fi
  say "the end of $log:"
  tail -n 5 "$log" | sed 's/^/    /' >&2
}
