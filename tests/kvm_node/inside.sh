#!/bin/bash
# Process 1 of the KVM node, on the machine's own files: prepares what an init system would, runs the
# command, hands its output and its status to the ports of those names, and switches the node off.
set -eu
here=/run/kvm-node
. "$here/settings" # release, modules: the kernel's
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# port NAME: the device of a virtio-serial port; without udev nothing links it to its name.
port() { basename "$(dirname "$(grep -lx "$1" /sys/class/virtio-ports/*/name)")"; }

mkdir -p /dev/pts /dev/shm /run/lock /run/netns
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
    echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
done
while read -r tag directory; do
    mkdir -p "$directory"
    mount -t virtiofs "$tag" "$directory"
done <"$here/writable"
# From here on modprobe works as on an installed machine, and so does the kernel's own autoloading.
mkdir -p /lib/modules
ln -sfn "$modules" "/lib/modules/$release"
# Polling for work would take an emulated processor from somebody; and without tdp_mmu KVM maps eight
# pages for each fault, of which an emulated one is expensive.
modprobe kvm halt_poll_ns=0 tdp_mmu=0
modprobe --all kvm_amd vhost_vsock vhost_net tun loop
# A VM's shared memory in huge pages: a fault, which costs an exit, for every 512 pages of a guest.
echo always >/sys/kernel/mm/transparent_hugepage/shmem_enabled
# As udev does for the group of that name, which a machine without KVM may lack.
group=$(getent group kvm | cut -d: -f3)
chgrp "${group:-993}" /dev/kvm
chmod 0660 /dev/kvm
hostname kvm-node
ip link set lo up
ulimit -n 1048576

# Somebody who stays behind with the output open must not keep the node: 5 s for the last bytes.
mkfifo "$here/output"
cat "$here/output" >"/dev/$(port output)" &
copier=$!
status=0
bash "$here/command" </dev/null >"$here/output" 2>&1 || status=$?
timeout 5 tail --pid="$copier" -f /dev/null || true
echo "$status" >"/dev/$(port status)"
echo o >/proc/sysrq-trigger
sleep 60 # the kernel switches off from a work queue
