#!/bin/sh
# Everything a visit to a machine with a GPU should do, in one run. Results go to $1 (default out/gpu).
set -u
cd "$(dirname "$0")/.."
out=${1:-out/gpu}
mkdir -p "$out"
python3 setup.py build_ext --inplace > "$out/build.log" 2>&1 || echo "build failed: $out/build.log"
nvidia-smi > "$out/device.txt" 2>&1
python3 -m realera_fast info --json > "$out/info.json"
python3 -m pytest -q --benchmark-disable tests > "$out/tests.log" 2>&1
tail -n 1 "$out/tests.log"
if command -v compute-sanitizer > /dev/null; then
  compute-sanitizer --tool memcheck python3 -m pytest -q tests/test_kernels.py tests/test_ops.py \
    > "$out/sanitizer.log" 2>&1
  tail -n 3 "$out/sanitizer.log"
fi
python3 -m realera_fast demo --out "$out/demo"
python3 bench/variants.py --things rabbit house --styles sepia --out "$out/variants.jsonl"
