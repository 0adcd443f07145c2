#!/usr/bin/env bash
# Puts vhost-device-vsock, the vsock device for hosts without /dev/vhost-vsock, into build/bin.
. packaging/setup/common.sh

version=0.3.0
program=vhost-device-vsock
kept="$cache/$program-$version"
if [ ! -x "$kept/bin/$program" ]; then
    packaging/setup/rust.sh
    # shellcheck disable=SC1091
    . $stamps/rust.env
    scratch=$(mktemp -d "$cache/.$program.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    timed "building $program $version by cargo install (one to three minutes)" \
        cargo install --locked --root "$scratch" --target-dir "$scratch/target" \
        "$program@$version"
    rm -rf "$scratch/target" "$kept"
    mv "$scratch" "$kept"
fi
cmp -s "$kept/bin/$program" build/bin/$program || install -m 0755 "$kept/bin/$program" build/bin/$program
