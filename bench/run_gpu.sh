#!/usr/bin/env bash
# Everything worth doing on a machine with a GPU, in under nine minutes:
#
#     bench/run_gpu.sh OUT_DIR [--dry-run]
#
# Builds the extension, checks every kernel against its reference, runs the benchmarks and the GPU tests, and
# compute-sanitizer last; leaves logs, JSON, table and figure in OUT_DIR, packs them into OUT_DIR/results.tar.gz (also when
# it is stopped), and prints a short table last. Stages that ran to their end leave a marker and are skipped when it is run
# again, also where a bar was missed. Needs no network; wheels that bench/gpu_wheels.sh fetched are installed beside the
# checkout. BUDGET_S (default 530) bounds the whole, each stage has a limit of its own; STAGES="NAME NAME" runs only those.
# --dry-run goes through all stages on a machine without a GPU: tests and benchmarks are only collected, kernels
# run in Triton's interpreter.
# shellcheck disable=SC2329  # functions are called by name, in a shell of their own
set -uo pipefail
[[ ${1:-} != --help ]] || { sed '1d;/^# shellcheck/d;/^[^#]/,$d;s/^# \{0,1\}//' "$0"; exit; }

usage() {
  sed -n '4p' "$0" | cut -c3- >&2
  exit 2
}
[[ $# -ge 1 && $# -le 2 ]] || usage
dry=0
if [[ $# -eq 2 ]]; then
  [[ $2 == --dry-run ]] || usage
  dry=1
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 2
budget=${BUDGET_S:-530}
slack=$((dry ? 20 : 1)) # a dry run may be on a small machine: it is about what runs, not how long
budget=$((budget * slack))
python=${PYTHON:-python3}

# The packages as they lie in the tree, whether or not they are installed.
mkdir -p "$out/path"
ln -sfn "$root/kernels" "$out/path/rlaif_fast_kernels"
ln -sfn "$root/configs" "$out/path/rlaif_fast_configs"
export PYTHONPATH="$root:$out/path${PYTHONPATH:+:$PYTHONPATH}"
wheels=${GPU_WHEELS:-$root/bench/.wheels}
if [[ -d $wheels && $dry -eq 0 ]]; then # packages that the machine lacks, behind its own
  mkdir -p "$out/wheels"
  find "$wheels" -name '*.whl' -exec cp {} "$out/wheels" \;
  find "$wheels" -name '*.whl.part000' | while read -r first; do
    cat "${first%.part000}".part* >"$out/wheels/$(basename "${first%.part000}")"
  done
  "$python" -m pip install --quiet --no-index --no-deps --target "$out/site" "$out"/wheels/*.whl
  export PYTHONPATH="$PYTHONPATH:$out/site"
fi

pack() { # one file with everything but links, caches and packages, written elsewhere: tar minds a folder that changes
  local packed
  packed=$(mktemp)
  tar --exclude=./path --exclude=./site --exclude=./wheels --exclude=./triton-cache --exclude=./results.tar.gz \
    -czf "$packed" -C "$out" .
  mv "$packed" "$out/results.tar.gz"
}
trap pack EXIT
export TRITON_CACHE_DIR="$out/triton-cache" PYTHONUNBUFFERED=1
export RLAIF_FAST_BENCH_LINES="$out/figures.jsonl" # an arm's figures as soon as they are there
if [[ $dry -eq 1 ]]; then
  export TRITON_INTERPRET=1 PYTHONPATH="$PYTHONPATH:$root/bench"
  collect=(--collect-only -q -p pretend_gpu) # what a GPU would select
else
  collect=()
fi
: >"$out/stages.tsv"

# stage NAME LIMIT_S COMMAND...: run once, within the budget, output to NAME.log
stage() {
  local name=$1 limit=$(($2 * slack)) start=$SECONDS status seconds
  shift 2
  local left=$((budget - SECONDS))
  if [[ -e $out/$name.done ]]; then
    status="passed before"
  elif [[ $left -lt 10 ]]; then
    status="no time left"
  else
    [[ $limit -le $left ]] || limit=$left
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 # interrupted, pytest says what failed
    case $? in
      0) status=passed && touch "$out/$name.done" ;;
      1)
        status=FAILED
        # A benchmark whose figures are written has done its work, also where a bar was missed.
        [[ $name == bench_* && -s $out/$name.json ]] && status="bar missed" && touch "$out/$name.done"
        ;;
      5) status="NO TESTS" ;; # selected: a name has changed
      124 | 137) status="over its ${limit} s" ;;
      *) status=FAILED ;;
    esac
  fi
  seconds=$((SECONDS - start))
  printf '%s\t%s\t%s\n' "$name" "$status" "$seconds" | tee -a "$out/stages.tsv"
}

environment() {
  nvidia-smi 2>&1 || true
  nvcc --version 2>&1 | tail -n 2 || true
  git -c safe.directory='*' rev-parse HEAD 2>&1 || true
  "$python" - <<'PY'
import ctypes, importlib.metadata, platform, sys

print("python", platform.python_version())
packages = "torch triton transformers flash-attn nvidia-dali-cuda130 pytest-benchmark"
packages += " trl liger-kernel cut-cross-entropy quack-kernels verl"
for name in packages.split():
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "not installed")
import torch

if torch.cuda.is_available():
    found = torch.cuda.get_device_properties(0)
    print("device", found.name, f"sm_{found.major}{found.minor}", found.multi_processor_count, "SMs")
else:
    print("device none")
try:
    ctypes.CDLL("libnvcuvid.so.1")
    print("NVDEC yes (libnvcuvid.so.1 loads)")
except OSError as error:
    print(f"NVDEC no ({error})")
PY
}

build() {
  [[ $dry -eq 0 ]] || { echo "dry run: not built"; return; }
  local arch
  arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return
  TORCH_CUDA_ARCH_LIST="$arch" MAX_JOBS="$(nproc)" "$python" setup.py build_ext --inplace
}

sharded() { # NAME [pytest arguments]: tests dealt to processes, as most of their time is compilation
  local name=$1 pids=() pid shard status result=5
  local shards=$(($(nproc) < 12 ? $(nproc) : 12))
  shift
  set -m # else what runs in the background would ignore the interrupt at which pytest says what failed
  trap 'kill -INT "${pids[@]}" 2>/dev/null' INT
  for ((shard = 0; shard < shards; shard++)); do
    RLAIF_FAST_TEST_SHARD=$shard/$shards "$python" -m pytest -q -rfEs -p no:cacheprovider "${collect[@]}" "$@" \
      >"$out/$name.$shard.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    while
      wait "$pid"
      status=$?
      kill -0 "$pid" 2>/dev/null # it still runs: the wait was interrupted
    do :; done
    case $status in
      0) [[ $result -ne 5 ]] || result=0 ;;
      5) ;; # nothing selected; it is enough that another process has something
      *) result=1 ;;
    esac
  done
  cat "$out/$name".*.log
  return "$result"
}

tests() { # every kernel on the device
  local files=()
  for file in tests/test_{triton_*,decode_step,patchify,prefix_decode}.py; do [[ $file == tests/test_triton_aot.py ]] || files+=("$file"); done
  sharded kernel_tests "${files[@]}"
}

gpu_tests() {
  local others=()
  mapfile -t others < <(grep -l 'mark\.gpu' tests/test_*.py)
  sharded gpu_tests -m "gpu and not slow" "${others[@]}"
}

sanitize() { # TOOL
  if [[ $dry -eq 1 ]]; then
    "$python" bench/sanitize.py
    return
  fi
  local tool
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer) || return
  "$python" bench/sanitize.py >/dev/null || return # compiles the kernels outside of the sanitizer
  "$tool" --tool "$1" --error-exitcode 9 "$python" bench/sanitize.py
}

benchmark() { # NAME [pytest arguments]: the GPU's part of one benchmark file to NAME.json
  local name=$1
  shift
  if [[ ! -e bench/$name.py ]]; then
    echo "bench/$name.py is not there"
    return 1
  fi
  "$python" -m pytest "bench/$name.py" --benchmark-only --benchmark-disable-gc -q -k "cuda and not cpu" "${collect[@]}" \
    --benchmark-json="$out/$name.json" "$@"
}

figures() {
  [[ $dry -eq 0 ]] || { "$python" -c 'import matplotlib' && test -e bench/report.py; return; }
  "$python" bench/report.py "$out"/bench_*.json --out "$out"
}

train() { # DTYPE [arguments]: the embedded run, its clips and checkpoints outside of what is brought back
  [[ $dry -eq 0 ]] || { "$python" -m rlaif_fast.train --help; return; }
  local dtype=$1 folder status
  shift
  folder=$(mktemp -d)
  "$python" -m rlaif_fast.train --dtype "$dtype" --output_dir "$folder" "$@"
  status=$?
  mkdir -p "$out/train_$dtype"
  find "$folder" -maxdepth 1 -type f -size -4M -exec cp {} "$out/train_$dtype" \;
  return "$status"
}

check() { # every kernel and wire of this machine against its reference
  "$python" -m rlaif_fast.doctor --check
}

spills() {
  [[ $dry -eq 0 ]] || { "$python" -m rlaif_fast_kernels.aot_report --help; return; }
  local arch
  arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return
  "$python" -m rlaif_fast_kernels.aot_report --arch "$arch"
}

tune() {
  [[ $dry -eq 0 ]] || { "$python" bench/tune_rows.py --help; return; }
  "$python" bench/tune_rows.py
}

# timeout runs commands, not functions: each function is handed to a bash of its own.
export -f environment build check train sharded tests gpu_tests sanitize benchmark figures spills tune
export out root python dry
in_bash() { printf '%q ' "$@"; }
collect_definition=$(declare -p collect)
call() { # NAME LIMIT FUNCTION [ARGUMENTS]
  local name=$1 limit=$2
  shift 2
  stage "$name" "$limit" bash -c "set -uo pipefail; $collect_definition; $(in_bash "$@")"
}

wanted() { [[ -z ${STAGES:-} || " $STAGES " == *" $1 "* ]]; }
run() { # NAME LIMIT FUNCTION [ARGUMENTS]: a stage, where it is wanted
  ! wanted "$1" || call "$@"
}
built() { # the extension, and everything against its reference
  run build 150 build
  run check 90 check
}

run environment 40 environment
built & # beside the kernels' tests, which need the compiler of Triton and not the extension
run kernel_tests 200 tests
wait
run bench_linear_loss 90 benchmark bench_linear_loss
run bench_step 240 benchmark bench_step
run bench_prefix_decode 45 benchmark bench_prefix_decode
run bench_decode_step 60 benchmark bench_decode_step
run bench_logits_loss 60 benchmark bench_logits_loss
run gpu_tests 120 gpu_tests
run train 150 train float32
run bench_video 45 benchmark bench_video
run bench_rank_loss 45 benchmark bench_rank_loss
run bench_rank_penalty 45 benchmark bench_rank_penalty
run bench_preference_loss 45 benchmark bench_preference_loss
run train_bfloat16 90 train bfloat16 --sft_steps 60 --max_steps 12 --eval_steps 6
run tune_rows 40 tune
run spills 60 spills
run report 30 figures
run memcheck 70 sanitize memcheck
run racecheck 70 sanitize racecheck

echo
printf '%-20s %-16s %s\n' stage result seconds
failed=0
while IFS=$'\t' read -r name status seconds; do
  printf '%-20s %-16s %s\n' "$name" "$status" "$seconds"
  [[ $status == passed* || $status == "bar missed" ]] || failed=1
done <"$out/stages.tsv"
grep -h -E '^(device|NVDEC)' "$out/environment.log" 2>/dev/null
grep -h -E '^[0-9]+ (passed|failed)' "$out"/{kernel,gpu}_tests.*.log 2>/dev/null | sort | uniq -c
grep -h 'ERROR SUMMARY\|RACECHECK SUMMARY' "$out/memcheck.log" "$out/racecheck.log" 2>/dev/null
exit "$failed"
