#!/usr/bin/env bash
# Runs on a worker of the pod, called there by tpu_pod.sh: installs what the code needs, and starts,
# watches and stops one command. Needs bash 5 and what Google's TPU images bring.
#
#     worker.sh install bucket=B data=D     worker.sh stop
#     worker.sh start ID KEY COMMAND…       worker.sh kill
#     worker.sh status                      worker.sh log OFFSET
#
# Answers are one short line, "@worker NUMBER …", since those of all workers arrive on one stream.

set -euo pipefail

CODE=$HOME/spvit_jax
ENVIRONMENT=$HOME/spvit_jax_environment
RUN=$HOME/spvit_jax_run # of the last command: id, key, pid, boot, log, exit; "stopped" if asked to
MOUNTS=${SPVIT_MOUNTS:-/} # where the folders of the buckets are

answer() { echo "@worker $(number) $*"; }

# The worker's number, as gcloud and JAX count: Google's metadata server knows it.
number() {
  local url=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  [[ -s $HOME/.spvit_jax_worker ]] ||
    curl --silent --fail --retry 5 --header 'Metadata-Flavor: Google' "$url/agent-worker-number" \
      >"$HOME/.spvit_jax_worker"
  echo "$(<"$HOME/.spvit_jax_worker")"
}

boot() { echo "$(</proc/sys/kernel/random/boot_id)"; }

# ── Installing ──────────────────────────────────────────────────────────────────────────────────

# install FOLDER=BUCKET…: makes the environment anew if the requirements have changed, and mounts
# the buckets.
install() {
  mkdir -p "$RUN"
  printf '%s\n' "$@" >"$RUN/buckets"
  if ! mount_buckets; then
    answer "failed to mount a bucket: $(tail -n 1 "$HOME/spvit_jax_install.log")"
    return
  fi
  local stamp
  stamp=$ENVIRONMENT/installed-$(cat "$CODE"/requirements*.txt | sha256sum | cut -c1-16)
  if [[ ! -e $stamp ]]; then
    make_environment >"$HOME/spvit_jax_install.log" 2>&1 || {
      answer "failed, see spvit_jax_install.log: $(tail -n 1 "$HOME/spvit_jax_install.log")"
      return
    }
    touch "$stamp"
  fi
  answer "ready $(cat "$CODE/VERSION")"
}

# Google's images have Python 3.10, and the project needs 3.11: uv fetches one where there is none.
make_environment() {
  local python
  rm -rf "$ENVIRONMENT"
  for python in python3.13 python3.12 python3.11; do
    if command -v "$python" >/dev/null && "$python" -m venv "$ENVIRONMENT"; then break; fi
    rm -rf "$ENVIRONMENT"
  done
  if [[ ! -x $ENVIRONMENT/bin/python ]]; then
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --seed --python 3.11 "$ENVIRONMENT"
  fi
  "$ENVIRONMENT/bin/python" -m pip install --quiet -r "$CODE/requirements-tpu.txt"
}

# Shows each bucket as a folder. Nothing about the files of checkpoints is cached: workers see at once
# what another wrote. Data do not change, and are read more than once.
mount_buckets() {
  local folder bucket options
  while IFS='=' read -r folder bucket; do
    case $folder in
      data) options=(-o ro --metadata-cache-ttl-secs=-1) ;;
      *) options=(--rename-dir-limit=200000 --metadata-cache-ttl-secs=0) ;;
    esac
    if [[ -z $bucket ]]; then continue; fi
    mount_bucket "$bucket" "${MOUNTS%/}/$folder" "${options[@]}" || return 1
  done <"$RUN/buckets"
}

# mount_bucket BUCKET FOLDER OPTIONS…: unless it is mounted. Another bucket there, of settings of
# before, is unmounted: it would be taken for this one.
mount_bucket() {
  local bucket=$1 folder=$2
  shift 2
  if mountpoint --quiet "$folder"; then
    if [[ $(read_fact "mounted-${folder##*/}") == "$bucket" ]]; then return; fi
    fusermount -u "$folder" >>"$HOME/spvit_jax_install.log" 2>&1 || return 1
  fi
  if ! command -v gcsfuse >/dev/null; then install_gcsfuse >>"$HOME/spvit_jax_install.log" 2>&1; fi
  if [[ ! -w $folder ]]; then
    sudo mkdir -p "$folder"
    sudo chown "$(id -u)" "$folder"
  fi
  gcsfuse --implicit-dirs "$@" "$bucket" "$folder" >>"$HOME/spvit_jax_install.log" 2>&1 || return 1
  echo "$bucket" >"$RUN/mounted-${folder##*/}"
}

install_gcsfuse() {
  local keyring=/usr/share/keyrings/cloud.google.asc
  curl --silent --fail https://packages.cloud.google.com/apt/doc/apt-key.gpg |
    sudo tee "$keyring" >/dev/null
  echo "deb [signed-by=$keyring] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  # A fresh machine updates itself and holds the lock for minutes.
  sudo apt-get -o DPkg::Lock::Timeout=600 update
  sudo apt-get -o DPkg::Lock::Timeout=600 install --yes gcsfuse
}

# ── Running ─────────────────────────────────────────────────────────────────────────────────────

# start ID KEY COMMAND…: starts it unless it has been; a call that is repeated does no harm.
start() {
  local id=$1
  mkdir -p "$RUN"
  exec 9>"$RUN/lock"
  flock 9
  if [[ $(read_fact id) == "$id" ]]; then
    answer started
    return
  fi
  if is_running; then
    answer "busy with $(read_fact id)"
    return
  fi
  if ! mount_buckets; then
    answer "failed to mount a bucket: $(tail -n 1 "$HOME/spvit_jax_install.log")"
    return
  fi
  rm -f "$RUN"/{id,pid,child,exit,stopped}
  boot >"$RUN/boot"
  echo "$2" >"$RUN/key"
  setsid bash "${BASH_SOURCE[0]}" supervise "${@:3}" >"$RUN/log" 2>&1 </dev/null 9>&- &
  echo $! >"$RUN/pid"
  echo "$id" >"$RUN/id"
  answer started
}

# Runs the command and keeps its exit code, with nobody logged in.
supervise() {
  cd "$CODE"
  PATH=$ENVIRONMENT/bin:$PATH
  export PATH PYTHONUNBUFFERED=1
  local code=0
  "$@" &
  echo $! >"$RUN/child"
  wait $! || code=$?
  echo "$code" >"$RUN/exit.new"
  mv "$RUN/exit.new" "$RUN/exit"
}

read_fact() { if [[ -e $RUN/$1 ]]; then echo "$(<"$RUN/$1")"; fi; }

# Alive, and not another process that got the number after a restart of the machine.
is_running() {
  [[ -s $RUN/pid && ! -e $RUN/exit && $(read_fact boot) == "$(boot)" ]] &&
    kill -0 "$(cat "$RUN/pid")" 2>/dev/null
}

# Answers STATE EXIT-CODE LOG-BYTES ID KEY STOPPED REPORT, each "-" if there is none. The report is
# what the process said of its cluster: PROCESS/PROCESSES:VERSION:LOCAL-DEVICES/DEVICES.
status() {
  local state=absent code='' bytes=0 stopped=- report=''
  if [[ -e $RUN/id ]]; then
    # In this order: it may end while it is looked at, and its exit code is there before it is gone.
    if is_running; then
      state=running
    else
      code=$(read_fact exit)
      if [[ -n $code ]]; then state=exited; else state=lost; fi # lost with the machine it ran on
    fi
    bytes=$(stat --format=%s "$RUN/log")
    if [[ -e $RUN/stopped ]]; then stopped=stopped; fi
    report=$(sed -nE "s|.*cluster +process ([0-9]+) of ([0-9]+), code ([^ ,]+), ([0-9]+) of ([0-9]+) devices.*|\1/\2:\3:\4/\5|;T;p;q" \
      "$RUN/log")
  fi
  local id key
  id=$(read_fact id)
  key=$(read_fact key)
  answer "$state ${code:--} $bytes ${id:--} ${key:--} $stopped ${report:--}"
}

# Asks the command to save and end; it is not started again by itself.
stop() {
  touch "$RUN/stopped"
  if is_running; then kill -TERM "$(cat "$RUN/child")" || true; fi
  answer asked
}

# Ends the command and all that it has started, at once.
kill_all() {
  if [[ -s $RUN/pid ]] && is_running; then
    kill -KILL -- "-$(cat "$RUN/pid")" 2>/dev/null || true
    echo 137 >"$RUN/exit"
  fi
  answer killed
}

case ${1:-} in
  install | start | supervise | status | stop) "$@" ;;
  kill) kill_all ;;
  log) if [[ -e $RUN/log ]]; then tail -c "+$(($2 + 1))" "$RUN/log"; fi ;;
  *)
    echo "usage: worker.sh install|start|status|stop|kill|log" >&2
    exit 2
    ;;
esac
