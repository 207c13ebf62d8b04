#!/usr/bin/env bash
# Trains SP-ViT on handwritten digits, evaluates it, and draws what its heads learned about space.
# Needs Python 3.11 or newer and nothing else. Run again, it reuses what is there.

# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements.txt

run=runs/quickstart
config=configs/digits.py

.venv/bin/python -m spvit_jax.train --config=$config --workdir=$run
.venv/bin/python -m spvit_jax.evaluate --config=$config --checkpoint=$run --json=$run/test.json
.venv/bin/python -m spvit_jax.explain --config=$config --checkpoint=$run --output=$run/explained

echo "what its heads do: $PWD/$run/explained/explain.html"
.venv/bin/python -c "
import json
result = json.load(open('$run/test.json'))
print(f'test accuracy: {result[\"top1\"]:.1%} of {result[\"count\"]} images')"
