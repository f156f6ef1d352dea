# SPDX-License-Identifier: Apache-2.0
# What the set-up scripts share. Sourced; LOG names the file that quiet commands write to.

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

# Quiet, but with the whole output when it fails.
quietly() {
    if [ "${V:-0}" = 1 ]; then
        "$@"
    elif ! "$@" >"$LOG" 2>&1; then
        cat "$LOG" >&2
        return 1
    fi
}

# Runs a command as root, where that needs no password.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

apt_install() {
    command -v apt-get >/dev/null || return 1
    as_root true 2>/dev/null || return 1
    say "installing $*"
    local install=(as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@")
    quietly "${install[@]}" 2>/dev/null || { quietly as_root apt-get update && quietly "${install[@]}"; }
}
