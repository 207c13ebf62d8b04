# Sourced by the other scripts: makes .venv in the checkout and installs a requirements file into
# it, unless that has been done. Everything that is written stays inside the checkout.
#
#     source launch/environment.sh requirements.txt

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export XDG_CACHE_HOME="$PWD/.venv/cache" MPLCONFIGDIR="$PWD/.venv/cache/matplotlib"
export KERAS_HOME="$PWD/.venv/cache/keras" TMPDIR="$PWD/.venv/tmp"

if [[ ! -x .venv/bin/python ]]; then
  python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is not Python 3.11 or newer; set PYTHON to one that is" >&2
    exit 2
  fi
  echo "making a virtual environment in .venv"
  "$python" -m venv .venv
fi
mkdir -p "$XDG_CACHE_HOME" "$TMPDIR"

stamp=.venv/installed-$(cat requirements*.txt | sha256sum | cut -c1-16)-$1
if [[ ! -e $stamp ]]; then
  echo "installing $1 (about two minutes)"
  # pip asks rustc, if there is one, for its version, and that writes its settings.
  RUSTUP_HOME="$XDG_CACHE_HOME/rustup" .venv/bin/python -m pip install --quiet -r "$1"
  touch "$stamp"
fi
