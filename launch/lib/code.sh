# Sourced by tpu_pod.sh: the committed code, packed and brought to all workers.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154  # settings come from config.sh

CODE_VERSION='' # of what is sent; empty: of what was packed last

# Packs what is committed, with a file VERSION, since a copy without .git cannot name its commit.
pack_code() {
  local version folder=$TEMPORARY/code
  version=$(git rev-parse --short HEAD)
  if [[ -n $(git status --porcelain --untracked-files=no) ]]; then
    say "note: the workers get commit $version, without your uncommitted changes"
  fi
  CODE_VERSION=$version
  if [[ -n $DRY_RUN ]]; then return; fi
  rm -rf "$folder"
  mkdir -p "$folder" "$LOGS"
  git archive --prefix=spvit_jax/ --output="$folder/code.tar" HEAD
  mkdir "$folder/spvit_jax"
  echo "$version" >"$folder/spvit_jax/VERSION"
  tar -rf "$folder/code.tar" -C "$folder" spvit_jax/VERSION
  gzip -c "$folder/code.tar" >"$LOGS/code.tar.gz"
  echo "$version" >"$LOGS/code.version"
}

# Brings the packed code to all workers and installs what it needs. A pod that was taken away gets
# the same code again, whatever has been committed since.
send_code() {
  local version=${CODE_VERSION:-$(<"$LOGS/code.version")}
  find_node "READY,HEALTHY,1,"
  expect_workers
  say "sending commit $version to $WORKERS workers"
  on_pod scp "$LOGS/code.tar.gz" "$NAME:spvit_jax.tar.gz" --worker=all
  call_again '' "${CALL[@]}" || die 1 "there is no TPU VM $NAME: $REASON"
  worker_command install "bucket=$BUCKET" "data=$DATA_BUCKET"
  local unpack='rm -rf spvit_jax.new && mkdir spvit_jax.new'
  unpack+=' && tar -xzf spvit_jax.tar.gz -C spvit_jax.new --strip-components=1'
  unpack+=' && rm -rf spvit_jax && mv spvit_jax.new spvit_jax'
  ask_all "$unpack && $QUOTED" "ready $version"
}

# ask_all COMMAND EXPECTED: runs a command on all workers until each has answered EXPECTED. Ends the
# program if one answers something else, or, after retries, nothing.
ask_all() {
  local try code wrong missing
  for ((try = 1; ; try++)); do
    code=0
    ssh_all "@worker 0 $2" "$1" || code=$?
    if ((code == FAIL_FOR_GOOD)); then refused; fi
    # Neither stream is in order; what counts is that each worker has answered.
    wrong=$(grep '^@worker ' <<<"$ANSWER" | grep -v "^@worker [0-9]* $2\$" | head -n 1 || true)
    if [[ -n $wrong ]]; then die 1 "${wrong#@}"; fi
    missing=$(without_answer)
    if [[ -z $missing ]]; then return 0; fi
    if ((try > RETRIES)); then
      die 1 "worker $missing did not answer '$2' in $try tries: ${REASON:-no reason given}"
    fi
    say "worker $missing has not answered '$2', try $try of $((RETRIES + 1))"
    back_off "$try"
  done
}

# The numbers of the workers that ANSWER has no line of, with commas between them.
without_answer() {
  local number numbers=''
  for ((number = 0; number < WORKERS; number++)); do
    if ! grep -q "^@worker $number " <<<"$ANSWER"; then numbers+=", $number"; fi
  done
  echo "${numbers#, }"
}
