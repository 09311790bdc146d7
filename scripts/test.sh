#!/usr/bin/env bash
# Install the test extra and run the tests. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh test
echo "== Running the tests"
python -m pytest "$@"
