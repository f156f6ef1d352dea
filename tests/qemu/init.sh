#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# The guest's first process, in an initramfs that holds busybox and the modules of 9p and overlayfs.
# Over the host's root, which it may only read, lies a layer in memory; what the host does not have
# comes from build/qemu. Then run.sh, which the host wrote into the one folder that both may write to.
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /host /layer /root
/bin/busybox --install -s /bin
fail() { echo "guest: $*"; sleep 1; reboot -f; }
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
read -r modules </modules/order
for module in $modules; do insmod "/modules/$module" || fail "cannot load $module"; done

over_9p() { mount -t 9p -o "trans=virtio,version=9p2000.L,msize=524288,$1" "$2" "$3" || fail "cannot mount $2"; }
over_9p ro,cache=loose host /host
mount -t tmpfs layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work root /root || fail "cannot mount /"
for folder in proc sys dev run tmp var/tmp var/run lib/modules; do
    [ -e "/root/$folder" ] || [ -L "/root/$folder" ] || mkdir -p "/root/$folder"
done
for mounted in proc sys dev; do mount --move "/$mounted" "/root/$mounted"; done
mkdir -p /root/dev/shm /root/dev/pts /root/dev/hugepages
mount -t tmpfs shm /root/dev/shm
mount -t devpts pts /root/dev/pts
mount -t hugetlbfs hugepages /root/dev/hugepages
mount -t cgroup2 cgroup /root/sys/fs/cgroup
mount -t tmpfs run /root/run
mkdir -p /root/run/bin /root/run/host
over_9p rw,access=any,cache=none out /root/run/host
. /root/run/host/settings.sh # TOOLS: build/qemu/root
mount --bind "/host$TOOLS/lib/modules" /root/lib/modules
cp /bin/busybox /root/run/bin/busybox
cp /run.sh /root/run/run.sh
exec switch_root /root /run/bin/busybox sh /run/run.sh
