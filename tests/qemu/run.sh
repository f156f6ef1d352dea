# SPDX-License-Identifier: Apache-2.0
# The guest's first process once its root is there: what the host may lack, pytest with the host's
# Python, then off.
. /run/host/settings.sh # PYTHON REPO TOOLS LIMIT_S
export PATH=/run/first:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/run/bin
export HOME=/run/home TMPDIR=/run/tmp PYTHONDONTWRITEBYTECODE=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
export PYTHONPATH=$REPO/tests/qemu:$REPO/tests HF_HUB_OFFLINE=1

/run/bin/busybox --install -s /run/bin
mkdir -p "$HOME" "$TMPDIR" /var/tmp /run/first
printf '#!/bin/sh\nexec "$@"\n' >/run/first/sudo # hints say it; this is root anyway
chmod +x /run/first/sudo
# busybox reads what its own depmod wrote, which kmod's modprobe does not, and knows no soft dependencies.
cat >/run/modprobe <<'END'
#!/bin/sh
/run/bin/modprobe "$@" || exit
[ "$*" != vfio-pci ] || exec /run/bin/modprobe vfio_iommu_type1
END
chmod +x /run/modprobe
for folder in /sbin /usr/sbin; do rm -f $folder/modprobe && cp /run/modprobe $folder/modprobe; done
for tool in dmsetup mdadm mkfs.ext4; do
    printf '#!/bin/sh\nMKE2FS_CONFIG=%s LD_LIBRARY_PATH=%s exec %s "$@"\n' "$TOOLS/etc/mke2fs.conf" \
        "$TOOLS/lib/x86_64-linux-gnu:$TOOLS/usr/lib/x86_64-linux-gnu" "$TOOLS/sbin/$tool" >"/run/bin/$tool"
    chmod +x "/run/bin/$tool"
done
# SPDK starts OpenSSL, which wants its configuration; an empty one will do.
[ -e /usr/lib/ssl/openssl.cnf ] || { mkdir -p /usr/lib/ssl && : >/usr/lib/ssl/openssl.cnf; }
echo /usr/sbin/modprobe >/proc/sys/kernel/modprobe
ifconfig lo 127.0.0.1 up
modprobe -a nvme ext4

(sleep "$LIMIT_S"; echo "guest: out of time"; reboot -f) &
cd "$REPO" || reboot -f
# Only a test that hangs is traced, before the host gives up on it: to trace one that runs can crash Python.
"$PYTHON" -m pytest -c /dev/null --rootdir="$REPO" --noconftest -p guest_plugin -p no:cacheprovider \
    -o faulthandler_timeout=650 -q @/run/host/tests
echo "guest: pytest ended with $?"
dmesg >/run/host/dmesg
sync
reboot -f
