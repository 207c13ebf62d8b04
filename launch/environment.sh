# Sourced by the other scripts: makes .venv in the checkout and installs a requirements file into
# it, unless that has been done. Everything that is written stays inside the checkout.
#
#     source launch/environment.sh requirements.txt
#
# The packages of a second file are installed without what they require themselves.
#
# shellcheck shell=bash

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Python compiles what it imports, and pip would compile 20,000 files for a minute. It has to write
# that down, which the settings of some containers forbid: each process would compile JAX and
# TensorFlow anew, for ten seconds.
export PIP_COMPILE=0 PYTHONPYCACHEPREFIX="$PWD/.venv/cache/bytecode"
unset PYTHONDONTWRITEBYTECODE
export XDG_CACHE_HOME="$PWD/.venv/cache" MPLCONFIGDIR="$PWD/.venv/cache/matplotlib"
export KERAS_HOME="$PWD/.venv/cache/keras" TMPDIR="$PWD/.venv/tmp"

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if [[ ! -e .venv ]]; then
  python=${PYTHON:-python3}
  if ! is_new_enough "$python"; then
    echo "error: $python is not Python 3.11 or newer; set PYTHON to one that is" >&2
    exit 2
  fi
  echo "making a virtual environment in .venv"
  if ! "$python" -m venv .venv; then
    rm -rf .venv
    echo "error: $python cannot make a virtual environment; on Debian and Ubuntu it needs the" \
      "package python3-venv (or python3.11-venv, for the version in question)" >&2
    exit 2
  fi
elif [[ -n ${PYTHON-} ]]; then
  echo "note: PYTHON is not used, since .venv is there; remove .venv to have it made anew" >&2
fi
# Half of one is left when its making is interrupted.
if ! is_new_enough .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  echo "error: $PWD/.venv is not whole, or not of Python 3.11 or newer; remove it and start again" >&2
  exit 2
fi
mkdir -p "$XDG_CACHE_HOME" "$TMPDIR"

stamp=.venv/installed-$(cat requirements*.txt | sha256sum | cut -c1-16)-$1
if [[ ! -e $stamp ]]; then
  echo "installing $1 (about two minutes)"
  # pip asks rustc, if there is one, for its version, and that writes its settings.
  RUSTUP_HOME="$XDG_CACHE_HOME/rustup" .venv/bin/python -m pip install --quiet -r "$1"
  if [[ -n ${2-} ]]; then
    .venv/bin/python -m pip install --quiet --no-deps -r "$2"
  fi
  touch "$stamp"
fi
