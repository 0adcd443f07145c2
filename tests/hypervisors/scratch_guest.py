"""A guest for these tests only: the project's kernel and modules, with a shell script as init.

The kernel unpacks concatenated archives in order, so a second archive that replaces /init turns the
project's initrd into ours. The script says what it sees on the console, one line a change.
"""

from __future__ import annotations

from pathlib import Path

from guest.image.cpio import Tree, archive

REPOSITORY = Path(__file__).parents[2]
GUEST = REPOSITORY / "build" / "guest"
KERNEL = GUEST / "vmlinux"
INITRD = GUEST / "initrd.img"
BUSYBOX = Path("/bin/busybox")
QEMU = Path("/usr/bin/qemu-system-x86_64")
# QEMU's own in C, and the Rust one where a distribution or `make` put it.
VIRTIOFSDS = [
    path
    for path in (
        Path("/usr/lib/qemu/virtiofsd"),
        Path("/usr/libexec/virtiofsd"),
        REPOSITORY / "build" / "bin" / "virtiofsd",
    )
    if path.exists()
]
VSOCK_DEVICE = REPOSITORY / "build" / "bin" / "vhost-device-vsock"

INIT = rb"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
while read module; do insmod $module || echo "NO-MODULE $module"; done < /etc/modules
mount -t virtiofs kataShared /mnt 2>/dev/null && echo "SHARE $(cat /mnt/hello)"
grep -l 0x0013 /sys/bus/virtio/devices/*/device && echo "VSOCK virtio:19"
echo GUEST-READY
for word in $(cat /proc/cmdline); do
  case $word in
    scenario=poweroff) poweroff -f;;
    scenario=reboot) reboot -f;;
    scenario=flood) head -c 60000 /dev/urandom; reboot -f;;
    scenario=panic) echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger;;
  esac
done
while :; do
  for cpu in /sys/devices/system/cpu/cpu[0-9]*/online; do
    [ -e $cpu ] && [ "$(cat $cpu)" = 0 ] && echo 1 > $cpu
  done
  for block in /sys/devices/system/memory/memory*/state; do
    [ -e $block ] && [ "$(cat $block)" = offline ] && echo online > $block
  done
  disks=; for d in /sys/block/vd*; do
    [ -e $d ] && [ "$(cat $d/size)" -gt 1 ] && disks="$disks $(readlink $d)"
  done
  nets=; for n in /sys/class/net/eth*; do [ -e $n ] && nets="$nets $(cat $n/address)"; done
  cpus=$(grep -c ^processor /proc/cpuinfo)
  mem=$(awk '/^MemTotal/{print int($2/131072)}' /proc/meminfo)
  now="STATE disks=[$disks ] nets=[$nets ] cpus=$cpus mem128=$mem."
  [ "$now" != "$was" ] && echo "$now"
  was=$now
  usleep 50000
done
"""


def missing() -> str:
    """Why no virtual machine can be started here; empty when it can."""
    for path, fix in (
        (KERNEL, "make guest"),
        (INITRD, "make guest"),
        (BUSYBOX, "apt install busybox-static"),
        (QEMU, "apt install qemu-system-x86"),
    ):
        if not path.exists():
            return f"{path} is missing: {fix}"
    return ""


def write_initrd(path: Path) -> Path:
    """Write the test guest's initrd."""
    tree = Tree()
    tree.file("init", INIT, 0o755)
    tree.file("bin/busybox", BUSYBOX.read_bytes(), 0o755)
    with path.open("wb") as stream:
        base = INITRD.read_bytes()
        stream.write(base + bytes(-len(base) % 4))
        stream.write(archive(tree))
    return path
