#!/usr/bin/env bash
# Install the test extra and run the tests, a file at a time on each core. Further arguments go to pytest;
# -n 0 runs them in one process.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh test
bash tests/app/install.sh    # the tests of the page are skipped where Chromium cannot be installed
echo "== Running the tests"
python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
