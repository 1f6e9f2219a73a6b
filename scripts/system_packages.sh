#!/usr/bin/env bash
# Debian packages for Python environments and headless MuJoCo rendering; installs only what is missing.
set -euo pipefail

missing=()
has_library() { ldconfig -p 2>/dev/null | grep -q "$1"; }
has_library libEGL.so.1 || missing+=(libegl1)
has_library libGL.so.1 || missing+=(libgl1)
[ -n "$(find /usr/lib -name 'swrast_dri.so' -o -name 'libgallium*.so' 2>/dev/null | head -n 1)" ] || missing+=(libgl1-mesa-dri)
"${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
[ ${#missing[@]} -eq 0 ] && exit 0

if ! command -v apt-get >/dev/null; then
    echo "error: missing system packages: ${missing[*]} (Debian names). Install them with this system's package manager." >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "error: missing system packages. Run this once, then try again:  sudo apt-get install -y ${missing[*]}" >&2
    exit 1
fi
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
