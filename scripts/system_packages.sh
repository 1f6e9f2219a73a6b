#!/usr/bin/env bash
# Debian packages for Python environments and headless MuJoCo rendering; installs only what is missing.
# Without root it says what to install and goes on: the simulator has its own message when nothing can render.
set -euo pipefail

python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null; then
    echo "error: no $python; install Python 3.10 or newer, or name one: make PYTHON=python3.12" >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: $python is $("$python" -V 2>&1); Python 3.10 or newer is needed: make PYTHON=python3.12" >&2
    exit 1
fi

missing=()
loads() { "$python" -c "import ctypes; ctypes.CDLL('$1')" 2>/dev/null; }
loads libEGL.so.1 || missing+=(libegl1)
loads libGL.so.1 || missing+=(libgl1)
if ! command -v nvidia-smi >/dev/null && [ -z "$(find /usr/lib -name 'swrast_dri.so' -o -name 'libgallium*.so' 2>/dev/null | head -n 1)" ]; then
    missing+=(libgl1-mesa-dri)
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    missing+=("$("$python" -c 'import sys; print(f"python{sys.version_info[0]}.{sys.version_info[1]}-venv")')")
fi
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
else
    echo "note: system packages seem to be missing (Debian names): ${missing[*]}" >&2
    echo "      install them as root, for example: sudo apt-get install -y ${missing[*]}" >&2
fi
