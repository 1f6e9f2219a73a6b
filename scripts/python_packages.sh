#!/usr/bin/env bash
# Install this checkout into a virtual environment: python_packages.sh VENV/bin/python TORCH_VERSION EXTRAS
set -euo pipefail
python=$1 torch=$2 extras=$3

"$python" -m pip install -q --upgrade "pip>=23"
installed=$("$python" -c 'import importlib.metadata as m; print(m.version("torch").split("+")[0])' 2>/dev/null || true)
if [ "$installed" != "$torch" ]; then
    # A CPU build carries the tag +cpu on indexes that have one. Set PIP_EXTRA_INDEX_URL to such an index to save gigabytes on machines
    # without a GPU.
    if command -v nvidia-smi >/dev/null || ! "$python" -m pip install -q "torch==$torch+cpu" 2>/dev/null; then
        echo "installing torch $torch from the default index; with CUDA libraries this can be several GB"
        "$python" -m pip install "torch==$torch"
    fi
fi
"$python" -m pip install -q -e packages/vla-oft-client
"$python" -m pip install -q -e ".[$extras]"
# Only the robot meshes of gym-aloha are used; its dependencies would pull in a second physics stack.
"$python" -m pip install -q --no-deps "gym-aloha==0.1.5"
