#!/bin/sh
# What a visit to a machine with a GPU should do, in order of worth, within a quarter of an hour.
#
#   bench/gpu.sh [OUT]              results go to OUT (default out/gpu)
#   bench/gpu.sh OUT continue       goes on where the last run stopped
#   bench/gpu.sh --minutes 90 OUT   a longer visit
#   bench/gpu.sh --dry-run          prints name, seconds, when and command of each step, and runs none
#
# A step is ended at its limit, and the next one begins. OUT/NAME.log is what it said, OUT/NAME.jsonl
# its rows (OUT/NAME.unfinished, as far as they got, if it was ended). OUT/done/NAME holds the exit
# status of a step that ended by itself: `continue` leaves it out, whatever the status; remove the file
# to repeat it. OUT/steps.txt has a line for each step.
set -u
cd "$(dirname "$0")/.."
usage() {
  echo "usage: bench/gpu.sh [--dry-run] [--minutes N] [OUT [continue]]" >&2
  exit 2
}
minutes=15
dry=
while :; do
  case ${1-} in
    --dry-run) dry=yes ;;
    --minutes)
      minutes=${2-}
      case $minutes in '' | *[!0-9]*) usage ;; esac
      shift
      ;;
    -*) usage ;;
    *) break ;;
  esac
  shift
done
out=${1:-out/gpu}
again=
case ${2-} in
  '') ;;
  continue) again=yes ;;
  *) usage ;;
esac
end=$(($(date +%s) + 60 * minutes))
if [ -z "$dry" ]; then
  mkdir -p "$out"
  [ -n "$again" ] || rm -rf "$out/done" "$out/steps.txt"
  mkdir -p "$out/done"
fi

# attempt WHEN NAME SECONDS COMMAND...
attempt() {
  when=$1 name=$2 limit=$3
  shift 3
  if [ -n "$dry" ]; then
    printf '%s\t%s\t%s\t%s\n' "$name" "$limit" "$when" "$*"
    return
  fi
  if [ -e "$out/done/$name" ]; then
    echo "$name: done before"
    return
  fi
  begun=$(date +%s)
  left=$((end - begun))
  if [ "$limit" -gt "$left" ]; then
    # What is cut short says something only if rows come one by one: not what is for spare time.
    if [ "$left" -lt 10 ] || [ "$when" = spare ]; then
      echo "$name: no time left"
      return
    fi
    limit=$left
  fi
  # Python must not be in the middle of a row for long: five seconds after the signal it is killed.
  timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  case $status in
    124 | 137) said="ended after $limit s" ;;
    *)
      echo $status > "$out/done/$name"
      said="exit status $status"
      ;;
  esac
  echo "$name: $said, $(($(date +%s) - begun)) s" | tee -a "$out/steps.txt"
  tail -n 1 "$out/$name.log"
}
step() { attempt always "$@"; }
spare() { attempt spare "$@"; }

pytest="python3 -m pytest -q --benchmark-disable --failed-first -o cache_dir=$out/pytest_cache"

step device 10 nvidia-smi
# A library that came with the checkout and has its CUDA part is not built again.
has_cuda="import sys; from realera_fast import ops; \
sys.exit(ops.implementations()['solve_spd']['cuda'] != 'native')"
step build 170 sh -c "python3 -c \"$has_cuda\" || python3 setup.py build_ext --inplace"
step check 60 python3 -m realera_fast info --check --json
step kernels 110 $pytest tests/ops/test_trust.py tests/ops/test_perturb_kernel.py \
  tests/ops/test_gram.py tests/ops/test_projection.py
step tests 130 $pytest -m gpu tests
step closed_form 60 python3 bench/run.py closed_form --quick --out "$out/closed_form.jsonl"
step end_to_end 120 python3 bench/run.py end_to_end --out "$out/end_to_end.jsonl"
step perturb 60 python3 bench/run.py perturb --quick --out "$out/perturb.jsonl"
step alignment 100 python3 bench/run.py alignment --quick --out "$out/alignment.jsonl"

# Without torch's pool an overrun leaves its own allocation and shows.
sanitizer="env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9"
native="$pytest tests/ops/test_ops.py -k"
spare memcheck 60 $sanitizer --tool memcheck --kernel-regex kns=realera_fast \
  $native "cuda and (SolveSpd or LowRankUpdate)"
spare profile_alignment 60 python3 bench/run.py alignment --profile "$out/alignment_profile.txt"
spare profile_closed_form 60 ncu --set full -k "regex:update_kernel|solve_kernel" -c 8 -f \
  -o "$out/closed_form" python3 bench/run.py closed_form --quick --out "$out/profiled.jsonl"
spare profile_perturb 90 ncu --set full -k "regex:_sums|_rows|_project|_backward|_products|_add" \
  -c 24 -f -o "$out/perturb" python3 bench/run.py perturb --quick --out "$out/profiled.jsonl"
for tool in racecheck synccheck initcheck; do
  spare $tool 90 $sanitizer --tool $tool --kernel-regex kns=realera_fast \
    $native "cuda and (SolveSpd or LowRankUpdate)"
done
spare memcheck_triton 300 compute-sanitizer --tool memcheck $pytest \
  tests/ops/test_perturb_kernel.py tests/ops/test_gram.py tests/ops/test_projection.py
spare full_size 300 python3 bench/run.py full_size --out "$out/full_size.jsonl"
spare closed_form_full 600 python3 bench/run.py closed_form --out "$out/closed_form_full.jsonl"
spare perturb_full 600 python3 bench/run.py perturb --out "$out/perturb_full.jsonl"
spare alignment_full 900 python3 bench/run.py alignment --out "$out/alignment_full.jsonl"
spare aot 600 env -u TRITON_INTERPRET python3 -m pytest -q tests/aot
spare demo 300 python3 -m realera_fast demo --out "$out/demo"
spare all_tests 1800 $pytest tests
spare costs 900 python3 bench/run.py quality costs --out "$out/costs.jsonl"
spare quality 1800 python3 bench/run.py quality objects --seeds 0 --out "$out/quality.jsonl"
spare attacks 3600 python3 bench/run.py robustness --seeds 0 --out "$out/attacks.jsonl"
