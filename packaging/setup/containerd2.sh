#!/usr/bin/env bash
# Builds the containerd 2.x that the tests run beside the distribution's, into the tool cache.
. packaging/setup/common.sh

version=2.2.2
go_wanted=1.24.3 # the go directive of containerd 2.2.2's module file
. packaging/setup/go.sh

kept="$cache/containerd-$version"
programs=(containerd ctr containerd-shim-runc-v2)

complete() {
    local program
    for program in "${programs[@]}"; do [ -x "$1/$program" ] || return 1; done
}

if ! complete "$kept"; then
    go=$(find_go)
    scratch=$(mktemp -d "$cache/.containerd.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    packages=()
    for program in "${programs[@]}"; do
        packages+=("github.com/containerd/containerd/v2/cmd/$program@v$version")
    done
    # Without cgo the programs run on any C library; btrfs and devmapper are not tested.
    timed "building containerd $version by go install (two to five minutes)" \
        env GOBIN="$scratch" CGO_ENABLED=0 "$go" install -tags "no_btrfs no_devmapper" "${packages[@]}"
    rm -rf "$kept"
    mv "$scratch" "$kept"
fi
complete "$kept" && say "containerd $version for the tests: $kept"
