#!/usr/bin/env bash
# Tests the fused-copy that is installed, with the extra "test", beside the python on PATH: bash tools/test_wheel.sh
# Arguments are pytest's. The GPU tests run where torch sees a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
fused-copy env
python tools/import_time.py
pytest "$@"
