#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What the tests in a virtual machine need: QEMU, installed where root or sudo allows, and in build/qemu
# (nothing of it is installed) Debian's standard kernel with the modules that the guest loads, busybox,
# and the tools that make dm and md devices and filesystems. Does nothing when all is there. V=1 shows all.
# Always exits 0: what is missing, the tests tell as the need `qemu`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LOG=build/qemu-setup.log
GUEST=build/qemu
TREES='fs drivers/md drivers/nvme drivers/uio drivers/vfio drivers/virtio net/9p arch block crypto lib virt'
TOOLS='busybox-static dmsetup mdadm e2fsprogs'
. scripts/lib.sh

give_up() { say "$*"; exit 0; }

install_qemu() {
    command -v qemu-system-x86_64 >/dev/null && return
    apt_install qemu-system-x86 </dev/null ||
        give_up "the tests in a virtual machine need qemu-system-x86: sudo apt-get install qemu-system-x86"
}

# The kernel's package carries its version in its name, which the meta-package tells.
kernel_package() {
    apt-cache depends linux-image-amd64 2>/dev/null | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n1
}

# Those of the tools' libraries that a machine without the tools may lack; their names change with releases.
tool_libraries() {
    # shellcheck disable=SC2086
    apt-cache depends $TOOLS | sed -n 's/.*Depends: \(lib\(com-err\|devmapper\|ext2fs\|ss2\)[^ ]*\).*/\1/p' | sort -u
}

package_names() {
    local kernel
    kernel=$(kernel_package)
    if [ -z "$kernel" ]; then
        as_root apt-get update >"$LOG" 2>&1 || true # lists that were never fetched, or were thrown away
        kernel=$(kernel_package)
    fi
    [ -n "$kernel" ] && echo "$kernel $TOOLS" $(tool_libraries)
}

# Into a folder that everyone may write to: as root, apt fetches as a user of its own.
download() {
    mkdir -p "$GUEST/new" && chmod 777 "$GUEST/new"
    (cd "$GUEST/new" && apt-get download "$@")
}

fetch_packages() {
    local names
    command -v apt-get >/dev/null || give_up "the tests in a virtual machine take their kernel from Debian's packages, and there is no apt-get"
    read -ra names <<<"$(package_names)" || true
    [ ${#names[@]} -gt 0 ] || give_up "the tests in a virtual machine need Debian's linux-image-amd64, which apt does not know: sudo apt-get update"
    say "fetching a kernel for the tests in a virtual machine"
    quietly download "${names[@]}" 2>/dev/null ||
        { as_root apt-get update >/dev/null 2>&1 && read -ra names <<<"$(package_names)" && quietly download "${names[@]}"; } ||
        give_up "the tests in a virtual machine need these packages, which could not be downloaded: ${names[*]}"
}

unpack_kernel() {
    local tree wanted=('./boot/vmlinuz-*' './lib/modules/*/modules.*')
    for tree in $TREES; do wanted+=("./lib/modules/*/kernel/$tree/*"); done
    dpkg-deb --fsys-tarfile "$1" | tar -x --wildcards -C "$GUEST/root" "${wanted[@]}"
}

unpack() {
    local package
    rm -rf "$GUEST/root" "$GUEST"/vmlinux-* && mkdir -p "$GUEST/root"
    for package in "$GUEST"/new/*.deb; do
        case $package in
            */linux-image-*) unpack_kernel "$package" ;;
            *) dpkg -x "$package" "$GUEST/root" ;;
        esac
    done
    "$GUEST/root/bin/busybox" depmod -b "$PWD/$GUEST/root" "$(ls "$GUEST/root/lib/modules")"
    rm -rf "$GUEST/new"
}

mkdir -p "$GUEST"
exec 9>"$GUEST/lock"
flock 9
install_qemu
[ "$(cat "$GUEST/complete" 2>/dev/null)" = "$TREES $TOOLS" ] && exit 0
fetch_packages
quietly unpack || give_up "the packages for the tests in a virtual machine could not be unpacked"
echo "$TREES $TOOLS" >"$GUEST/complete"
