#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds csrc/ with each program of tests/c, plainly or under a sanitizer, and runs it.
#
#   sanitize.sh plain|asan|tsan [--build-only]
#
# The programs lie in build/c/MODE afterwards (OUT moves it).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mode=${1:-}
case $mode in
    plain) flags=(-O2) ;;
    asan) flags=(-O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer) ;;
    tsan) flags=(-O1 -fsanitize=thread -fno-omit-frame-pointer) ;;
    *) echo "usage: sanitize.sh plain|asan|tsan [--build-only]" >&2; exit 2 ;;
esac
out=${OUT:-build/c/$mode}
csrc=spdk_glue/csrc

libraries=()
uring=no
if words=$(pkg-config --libs liburing 2>/dev/null); then
    uring=yes
    read -ra libraries <<<"$words"
fi
sources=()
for source in "$csrc"/*.c; do
    case "${source##*/}" in
        no_uring.c) [ $uring = yes ] || sources+=("$source") ;;
        no_cuda.c) ;;
        no_*) sources+=("$source") ;;
        *uring*) [ $uring = no ] || sources+=("$source") ;;
        *_spdk.c) ;; # its libraries are not instrumented
        *) sources+=("$source") ;;
    esac
done

mkdir -p "$out"
"${CC:-cc}" -std=gnu11 -g -Wall -Wextra "${flags[@]}" -I"$csrc" -shared -fPIC tests/c/emulator/cuda_emulator.c -pthread \
    -o "$out/libcuda.so.1"
for program in tests/c/*.c; do
    command=("${CC:-cc}" -std=gnu11 -g -Wall -Wextra "${flags[@]}" -I"$csrc" "$program" "${sources[@]}"
        "${libraries[@]}" -pthread -ldl -o "$out/$(basename "$program" .c)")
    [ "${V:-0}" = 1 ] && echo "${command[*]}"
    "${command[@]}"
done
[ "${2:-}" = --build-only ] && exit 0

# ThreadSanitizer of older compilers cannot live with the address randomisation of newer kernels.
runner=()
if [ "$mode" = tsan ] && setarch -R true 2>/dev/null; then
    runner=(setarch -R)
fi
export UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS="halt_on_error=1 second_deadlock_stack=1"
for program in tests/c/*.c; do
    name=$(basename "$program" .c)
    echo "$mode: $name"
    "${runner[@]}" "$out/$name" || [ $? = 77 ]
done
echo "$mode: clean"
