#!/usr/bin/env bash
# Installs what a build with GPU code needs, where it is not there yet: bash tools/install_cuda.sh
# nvcc and the static CUDA runtime, of CUDA 12.9 so that the wheel runs with the drivers of CUDA 12 too, and the newest
# gcc that this nvcc takes. For the manylinux_2_28 container and other systems with dnf and the packages of RHEL 8.
set -euo pipefail

if nvcc=$(command -v nvcc || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc"); then
  "$nvcc" --version
  exit
fi
command -v dnf > /dev/null || { echo "install_cuda: neither nvcc nor dnf is here: install CUDA 12.9 or newer" >&2; exit 1; }
case $(uname -m) in
  x86_64) repository=x86_64 ;;
  aarch64) repository=sbsa ;;
  *) echo "install_cuda: NVIDIA has no packages for $(uname -m)" >&2; exit 1 ;;
esac
dnf install -y dnf-plugins-core
dnf config-manager --add-repo \
  "https://developer.download.nvidia.com/compute/cuda/repos/rhel8/$repository/cuda-rhel8.repo"
dnf install -y cuda-nvcc-12-9 cuda-cudart-devel-12-9 gcc-toolset-14-gcc-c++
dnf clean all
/usr/local/cuda-12.9/bin/nvcc --version
