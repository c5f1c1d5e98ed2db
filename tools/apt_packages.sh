#!/usr/bin/env bash
# Installs what a bare Debian or Ubuntu machine lacks to build this package, and nothing that is there: a C++ compiler,
# make, and of Python its module venv and its headers.
#
#     tools/apt_packages.sh            as root, or as a user who may use sudo
#     tools/apt_packages.sh --slurm    the same, and what tests/test_slurm.py runs on virtual hosts
#     tools/apt_packages.sh --check    installs nothing; fails, and says what to do, where something is lacking
#
# PYTHON=python3.12 in the environment: for that Python in place of python3.
set -euo pipefail

python=${PYTHON:-python3}
lacking=()
need() { # need PACKAGE COMMAND...: the package is lacking when the command fails
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || lacking+=("$package")
}

name=$(basename "$python") # python3, python3.12: so Debian names its packages
need "$name" "$python" --version
need "$name-venv" "$python" -c "import venv, ensurepip"
need "$name-dev" "$python" -c "import os, sysconfig; os.stat(sysconfig.get_path('include') + '/Python.h')"
need g++ c++ --version
need make make --version
if [ "${1:-}" = --slurm ]; then
  need iproute2 ip -V
  need munge munged --version
  need slurmctld slurmctld -V
  need slurmd slurmd -V
  need slurm-client command -v srun # it says its version only where a cluster is
  # Slurm's plug-in for PMIx opens libpmix.so, a name that only the development package has.
  need libpmix-dev "$python" -c "import ctypes; ctypes.CDLL('libpmix.so')"
fi

if [ "${1:-}" = --check ]; then
  if [ ${#lacking[@]} -gt 0 ]; then
    echo "This machine lacks ${lacking[*]} (by their names in Debian and Ubuntu)." \
      "tools/apt_packages.sh installs them there, as root or through sudo." >&2
    exit 1
  fi
  "$python" -c "import sys; sys.exit(sys.version_info < (3, 10))" || {
    echo "$("$python" --version) is too old: collective needs 3.10 or later, such as PYTHON=python3.12." >&2
    exit 1
  }
elif [ ${#lacking[@]} -gt 0 ]; then
  echo "Installing ${lacking[*]}"
  root=()
  [ "$(id -u)" -eq 0 ] || root=(sudo)
  "${root[@]}" apt-get update -qq
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${lacking[@]}" >/dev/null
fi
