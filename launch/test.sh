#!/usr/bin/env bash
# Installs what the tests need and runs them all: style, types, tests. Arguments go to pytest.

# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-test.txt requirements-onnx.txt

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
