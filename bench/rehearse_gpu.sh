#!/usr/bin/env bash
# A GPU run as far as it goes without a GPU:
#
#     bench/rehearse_gpu.sh OUT_DIR
#
# Training steps in bfloat16 through Triton's interpreter and DALI's CPU decoder, whole updates on tensors that say they are on
# a GPU, every kernel compiled ahead of time, the CUDA sources where nvcc is, each kernel against its reference, the list of
# lines that only a GPU reaches, and a dry run of run_gpu.sh. Leaves a log each in OUT_DIR and prints a table; fails where one
# of them does.
set -uo pipefail
[[ ${1:-} != --help ]] || { sed '1d;/^# shellcheck/d;/^[^#]/,$d;s/^# \{0,1\}//' "$0"; exit; }

[[ $# -eq 1 ]] || { sed -n '4p' "$0" | cut -c3- >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
failed=0

stage() { # NAME COMMAND...
  local name=$1 start=$SECONDS status=passed
  shift
  "$@" >"$out/$name.log" 2>&1 || { status=FAILED && failed=1; }
  printf '%-14s %-8s %4s s\n' "$name" "$status" "$((SECONDS - start))"
}
tests() { "$python" -m pytest -q -rs -p no:cacheprovider "$@"; }

stage interpreter tests tests/test_gpu_path.py
stage simulated tests tests/test_simulated_gpu.py tests/test_simulated_capture.py
stage lines "$python" bench/cuda_only_lines.py
stage compiled tests tests/test_triton_aot.py
if command -v nvcc >/dev/null; then
  stage nvcc tests tests/test_cuda_aot.py
else
  echo "nvcc           not on the PATH"
fi
stage checkup "$python" -m rlaif_fast.doctor --check
stage dry_run bench/run_gpu.sh "$out/dry_run" --dry-run
exit "$failed"
