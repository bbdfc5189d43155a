#!/usr/bin/env bash
# Makes the virtual environment of the OpenMMLab tests outside the checkout and prints its python on the last line.
#
#   tests/mm/install.sh            the maintained fork (onedl-*), mmcv's operators compiled once for the CPU
#   tests/mm/install.sh originals  the frozen originals, for which torchvision stands in for mmcv's operators
#
# Takes minutes the first time and about a second afterwards. STRIATE_CACHE moves it from ~/.cache/striate, PYTHON
# chooses the interpreter, MAX_JOBS the compilers at a time (one needs up to 2.3 GB).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$(dirname "$here")")
kind=${1:-fork}
cache=${STRIATE_CACHE:-${HOME:-/tmp}/.cache/striate}
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
mmcv=2.3.6
venv=$cache/mm-$kind
say() { echo "install.sh: $*" >&2; }

case $kind in
fork) check='import mmcv._ext, mmdet, mmseg, transformers, segmentation_models_pytorch' ;;
originals) check='import mmcv, mmdet' ;;
*) say "unknown stack '$kind'; give fork or originals" && exit 2 ;;
esac

mkdir -p "$cache"
exec 9>"$cache/.lock-$kind"
flock 9  # two runs share one environment

# what the environment was made from; another interpreter or list of packages makes it anew
wanted='import sys, tomllib; p = tomllib.load(sys.stdin.buffer)["project"]
print(sys.version, p["dependencies"], p["optional-dependencies"].get("mm"))'
key=$({ cat "$here/install.sh" "$here/cxx.sh"; "$python" -c "$wanted" <"$root/pyproject.toml"; } | sha256sum | cut -d' ' -f1)
if [ "$(cat "$venv/.key" 2>/dev/null)" = "$key" ] && "$venv/bin/python" -c "import torch, mmengine" 2>/dev/null; then
    echo "$venv/bin/python"
    exit
fi

pip() { "$venv/bin/python" -m pip install -qq "$@" >&2; }
[ -x "$venv/bin/python" ] && "$venv/bin/python" -c '' 2>/dev/null || "$python" -m venv --clear "$venv"
rm -f "$venv/.key"

build_mmcv() {
    say "compiling mmcv $mmcv for $1: about 5 minutes on 2 cores, once"
    build=$(mktemp -d)
    PATH=$venv/bin:$PATH CXX=$here/cxx.sh STRIATE_PCH=$build CFLAGS=-g0 MAX_JOBS=${MAX_JOBS:-2} FORCE_CUDA=0 CUDA_VISIBLE_DEVICES= \
        "$venv/bin/python" -m pip wheel -qq --no-cache-dir --no-deps --no-build-isolation --no-binary :all: \
        --wheel-dir "$build/wheel" "onedl-mmcv==$mmcv" >&2
    case $(ls "$build/wheel") in
    *-none-any.whl) say "the wheel holds no operators" && exit 1 ;;
    esac
    mkdir -p "$2"
    mv "$build"/wheel/*.whl "$2/"
    rm -r "$build"
}

say "making $venv"
case $kind in
fork)
    pip --upgrade pip "setuptools>=80" wheel ninja
    pip torch torchvision timm  # before mmcv, whose setup.py asks torch how to compile
    abi=$("$venv/bin/python" -c 'import platform, sys, torch
print(f"torch{torch.__version__}-cp{sys.version_info[0]}{sys.version_info[1]}-{platform.machine()}")')
    wheels=$cache/wheels/onedl-mmcv-$mmcv-$abi-gcc$(g++ -dumpversion)-$(sha256sum <"$here/cxx.sh" | cut -c1-8)
    ls "$wheels"/*.whl >/dev/null 2>&1 || build_mmcv "$abi" "$wheels"
    pip "$wheels"/*.whl
    pip --editable "$root[mm]" pytest pytest-xdist transformers segmentation-models-pytorch
    "$venv/bin/python" -m pip check >&2
    ;;
originals)
    pip --upgrade pip "setuptools>=77.0.3,<82" wheel
    pip --editable "$root" mmengine==0.10.7 mmcv-lite==2.1.0 mmdet==3.3.0 mmsegmentation==1.2.2 ftfy regex pytest
    ;;
esac
"$venv/bin/python" -m pip uninstall -qq --yes striate  # the tests run on the checkout they belong to
"$venv/bin/python" -c "$check"
echo "$key" >"$venv/.key"
echo "$venv/bin/python"
