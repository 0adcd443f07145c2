#!/bin/busybox sh
# First program of the KVM node. Its root becomes the machine's own, read-only over virtio-fs, with a
# tmpfs above it that takes what is written. When it fails the kernel panics and the node ends.
set -e
/bin/busybox mkdir -p /proc /sys /dev /lower /upper /root
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do insmod "$module"; done </modules
mount -t virtiofs -o ro machine /lower
mount -t tmpfs -o mode=755 node /upper
mkdir /upper/files /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work node /root
mount -t tmpfs -o mode=755 run /root/run
cp -r /kvm-node /root/run/
for moved in proc sys dev; do mount -o move "/$moved" "/root/$moved"; done
exec switch_root /root /bin/bash /run/kvm-node/inside.sh
