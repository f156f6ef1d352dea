#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes .venv and builds the package into it, editable, with its C extension. Does nothing when
# nothing that it depends on has changed. V=1 shows all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
STAMP=build/setup.stamp
LOG=build/setup.log
. scripts/lib.sh

# What the build depends on. liburing is in it: installed later, it calls for a new build.
fingerprint() {
    {
        cat spdk_glue/csrc/*.[ch] spdk_glue/_build.py setup.py pyproject.toml constraints.txt
        pwd
        pkg-config --modversion liburing 2>/dev/null || echo none
    } | sha256sum
}

up_to_date() {
    [ -x .venv/bin/python ] && compgen -G 'spdk_glue/_glue*.so' >/dev/null &&
        [ "$(cat "$STAMP" 2>/dev/null)" = "$(fingerprint)" ]
}

missing_packages() {
    command -v cc >/dev/null || echo gcc
    "$PYTHON" -c 'import os, sysconfig, sys
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null || echo python3-dev
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists liburing 2>/dev/null || echo liburing-dev
}

install_packages() {
    local wanted
    mapfile -t wanted < <(missing_packages)
    [ ${#wanted[@]} = 0 ] && return
    apt_install "${wanted[@]}" </dev/null ||
        say "going on without these packages, which could not be installed: ${wanted[*]}"
}

make_venv() {
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die "$PYTHON is missing or older than 3.11; PYTHON=/path/to/python3.11 make ... names another"
    .venv/bin/python -c 'import pip' 2>/dev/null && return
    rm -rf .venv
    "$PYTHON" -m venv .venv || die "cannot make .venv"
}

# The old objects go first: whether the build has liburing is not in any file's time.
build_package() {
    rm -rf build/temp.* build/lib.* spdk_glue/_glue*.so
    say "installing the package into .venv (minutes the first time)"
    quietly .venv/bin/python -m pip install --no-input -c constraints.txt -e '.[dev]' ||
        die "pip could not install the package; its output is above"
}

mkdir -p build
exec 9>build/setup.lock
flock 9
up_to_date && exit 0
install_packages
make_venv
build_package
fingerprint >"$STAMP"
say "done"
