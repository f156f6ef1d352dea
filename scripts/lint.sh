#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Every static check; all of them run, and one that fails makes the whole fail.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

failed=()
check() {
    local name=$1 output
    shift
    [ "${V:-0}" = 1 ] && echo "$name: $*"
    if output=$("$@" 2>&1); then
        echo "$name: ok"
    else
        printf '%s\n' "$output" "$name: FAILED"
        failed+=("$name")
    fi
}

c_sources() {
    local source words flags bad=0
    for source in spdk_glue/csrc/*.c tests/c/*.c tests/c/*/*.c; do
        flags=()
        case "${source##*/}" in
            no_*) ;;
            *uring*) pkg-config --exists liburing || continue ;;
            *_spdk.c)
                words=$(pkg-config --cflags spdk_nvme libdpdk 2>/dev/null) || continue
                read -ra flags <<<"${words//-I/-isystem }" ;;
        esac
        "${CC:-cc}" -std=gnu11 -Wall -Wextra -Wconversion -Werror -fsyntax-only "${flags[@]}" -Ispdk_glue/csrc "$source" || bad=1
    done
    return $bad
}

check "ruff check" .venv/bin/ruff check .
check "ruff format" .venv/bin/ruff format --check .
check "mypy" .venv/bin/mypy
check "C" c_sources
if [ ${#failed[@]} -gt 0 ]; then
    echo "lint: failed: ${failed[*]}"
    exit 1
fi
