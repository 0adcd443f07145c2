#!/usr/bin/env bash
# Installs the distribution's packages whose programs are missing. With "build" as its argument only
# those that the build and the tests without root need.
. packaging/setup/common.sh

missing=()
# want PACKAGE TEST…: put PACKAGE on the list unless the command TEST succeeds.
want() {
    local package=$1
    shift
    "$@" >/dev/null 2>&1 || missing+=("$package")
}
have() { command -v "$1"; }
any() { local path; for path in "$@"; do [ -e "$path" ] && return 0; done; return 1; }
static_busybox() { busybox true && ! ldd "$(command -v busybox)"; }
header() { echo "#include <$1>" | cc -E -; }
usable_python() { packaging/setup/python.sh; }

# The build.
want gcc have cc
want libc6-dev header stdio.h
want binutils have readelf
want lz4 have lz4
want zstd have zstd
want kmod have depmod
want ca-certificates any /etc/ssl/certs/ca-certificates.crt
if ! usable_python >/dev/null 2>&1; then
    if at_least 3.11 "$(candidate python3)"; then
        missing+=(python3 python3-venv)
    else
        missing+=(python3.11 python3.11-venv)
    fi
fi

# What a pod and the tests with root use.
if [ "${1:-}" != build ]; then
    want qemu-system-x86 have qemu-system-x86_64
    if [ -n "$(candidate virtiofsd)" ]; then virtiofsd_package=virtiofsd; else virtiofsd_package=qemu-system-common; fi
    want "$virtiofsd_package" any /usr/libexec/virtiofsd /usr/lib/qemu/virtiofsd
    want e2fsprogs have mkfs.ext4
    want containerd have containerd
    want runc have runc
    want busybox-static static_busybox
    want iproute2 have tc
    want iptables have iptables
    want nftables have nft
    want util-linux have unshare
    want procps have ps
    want cpio have cpio
    want containernetworking-plugins any /usr/lib/cni/bridge /opt/cni/bin/bridge
fi

if [ ${#missing[@]} = 0 ]; then
    say "packages: all there"
else
    install_packages "${missing[@]}"
fi
