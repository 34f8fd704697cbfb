#!/usr/bin/env bash
# Fetches beforehand what a GPU machine without a network lacks, into an ignored folder, in parts under 64 MiB:
#
#     bench/gpu_wheels.sh [FOLDER] [--small]        (default bench/.wheels; PYTHON_VERSION, default 3.12)
#
# --small leaves out DALI and what a machine with PyTorch, transformers and pandas has: 37 MB, enough for every stage but NVDEC.
# bench/run_gpu.sh joins the parts and installs them there beside the checkout. flash-attn is taken where an index has a
# wheel of it for that Python; else attention is PyTorch's own.
set -euo pipefail
[[ ${1:-} != --help ]] || { sed '1d;/^# shellcheck/d;/^[^#]/,$d;s/^# \{0,1\}//' "$0"; exit; }
folder=$(dirname "${BASH_SOURCE[0]}")/.wheels
small=0
for argument in "$@"; do
  if [[ $argument == --small ]]; then small=1; else folder=$argument; fi
done
version=${PYTHON_VERSION:-3.12}
part_bytes=$((60 << 20))
packages=(
  av jsonargparse typeshed-client docstring-parser tenacity liger-kernel==0.8.5 "trl==1.16.*" datasets dill multiprocess
)
optional=()
if [[ $small -eq 0 ]]; then
  packages+=(
    httpx httpcore h11 anyio idna certifi sacrebleu portalocker tabulate colorama lxml
    nvidia-dali-cuda130 nvidia-libnvcomp-cu13 nvidia-nvimgcodec-cu13 astunparse gast libcst makefun nvtx optree six
    "setuptools>=77" accelerate peft pyarrow pandas xxhash psutil
  )
  optional=(flash-attn)
fi

mkdir -p "$folder"
fetch() {
  python3 -m pip download --quiet --no-deps --only-binary :all: --python-version "$version" \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
    --dest "$folder" "$1"
}
for package in "${packages[@]}"; do fetch "$package"; done
for package in "${optional[@]}"; do fetch "$package" 2>/dev/null || echo "$package: no wheel for Python $version, left out"; done
find "$folder" -name '*.whl' -size +"$part_bytes"c | while read -r wheel; do
  split --bytes="$part_bytes" --numeric-suffixes --suffix-length=3 "$wheel" "$wheel.part"
  rm "$wheel"
done
du -sh "$folder"
