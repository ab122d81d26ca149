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
python3 bench/run.py closed_form --quick --out "$out/closed_form_quick.jsonl" | tee "$out/closed_form.log"
python3 bench/run.py closed_form --out "$out/closed_form.jsonl" >> "$out/closed_form.log" 2>&1
python3 bench/run.py perturb --quick --out "$out/perturb_quick.jsonl" | tee "$out/perturb.log"
python3 bench/run.py perturb --out "$out/perturb.jsonl" >> "$out/perturb.log" 2>&1
python3 bench/run.py alignment --profile "$out/alignment_profile.txt" > "$out/alignment.log" 2>&1
python3 bench/run.py alignment --quick --out "$out/alignment_quick.jsonl" | tee -a "$out/alignment.log"
python3 bench/run.py alignment --out "$out/alignment.jsonl" >> "$out/alignment.log" 2>&1
python3 bench/run.py full_size --out "$out/full_size.jsonl" | tee "$out/full_size.log"
env -u TRITON_INTERPRET python3 -m pytest -q tests/aot > "$out/aot.log" 2>&1
tail -n 1 "$out/aot.log"
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck synccheck initcheck; do
    # Without torch's pool an overrun leaves its own allocation and shows.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
      --kernel-regex kns=realera_fast python3 -m pytest -q tests/ops/test_ops.py \
      -k "cuda and (SolveSpd or LowRankUpdate)" > "$out/$tool.log" 2>&1
    echo "$tool: exit status $?"
  done
  compute-sanitizer --tool memcheck python3 -m pytest -q \
    tests/ops/test_perturb_kernel.py tests/ops/test_gram.py tests/ops/test_projection.py \
    > "$out/memcheck_triton.log" 2>&1
  tail -n 3 "$out/memcheck_triton.log"
fi
if command -v ncu > /dev/null; then
  ncu --set full -k "regex:update_kernel|solve_kernel" -c 8 -o "$out/closed_form" \
    python3 bench/run.py closed_form --quick --out "$out/profiled.jsonl" > "$out/ncu.log" 2>&1
  ncu --set full -k "regex:_sums|_rows|_project|_backward|_products|_add" -c 24 \
    -o "$out/perturb" python3 bench/run.py perturb --quick --out "$out/profiled.jsonl" \
    >> "$out/ncu.log" 2>&1
fi
python3 -m realera_fast demo --out "$out/demo"
python3 bench/run.py quality objects --seeds 0 --out "$out/quality.jsonl" | tee "$out/quality.log"
python3 bench/run.py quality costs --out "$out/costs.jsonl" | tee -a "$out/quality.log"
python3 bench/run.py robustness --seeds 0 --out "$out/attacks.jsonl" | tee -a "$out/quality.log"
