#!/usr/bin/env bash
# Gives a wheel the platform tag that its binary allows, and checks it: bash tools/repair_wheel.sh WHEEL FOLDER [MANYLINUX]
# auditwheel finds the oldest glibc that the binary runs with, or fails if that is newer than MANYLINUX (manylinux_2_28).
# torch's libraries come with torch and the driver's with the driver, so neither goes into the wheel.
# Needs auditwheel and patchelf on PATH. FUSED_COPY_CPU_ONLY=1: expect no GPU code.
set -euo pipefail
wheel=$1 folder=$2 platform=${3:+$3_$(uname -m)}

repaired=$(mktemp -d)
trap 'rm -rf "$repaired"' EXIT
auditwheel repair --plat "${platform:-auto}" ${platform:+--only-plat} --exclude 'libtorch*.so' --exclude 'libc10*.so' \
  --exclude 'libcuda.so.*' --wheel-dir "$repaired" "$wheel"
check=()
[[ ${FUSED_COPY_CPU_ONLY:-} != 1 ]] || check+=(--cpu-only)
[[ -z $platform ]] || check+=(--platform "$platform")
python "$(dirname "$0")/check_wheel.py" "${check[@]}" "$repaired"/*.whl
mkdir -p "$folder"
mv "$repaired"/*.whl "$folder"
