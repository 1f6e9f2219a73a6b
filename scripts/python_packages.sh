#!/usr/bin/env bash
# Install this checkout into a virtual environment: python_packages.sh VENV/bin/python TORCH_VERSION
# Prefers a CPU build of torch where the machine has no NVIDIA driver and the index offers one under the version's +cpu tag.
set -euo pipefail
python=$1 torch=$2

"$python" -m pip install -q --upgrade "pip>=23"
if ! "$python" -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null || ! "$python" -m pip install -q "torch==$torch+cpu" 2>/dev/null; then
        "$python" -m pip install -q "torch==$torch"
    fi
fi
"$python" -m pip install -q -e packages/vla-oft-client
"$python" -m pip install -q -e ".[train,data,sim,dev]"
# Only the robot meshes of gym-aloha are used; its dependencies would pull in a second physics stack.
"$python" -m pip install -q --no-deps "gym-aloha==0.1.5"
