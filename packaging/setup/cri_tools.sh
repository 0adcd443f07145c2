#!/usr/bin/env bash
# Builds Kubernetes' CRI tools for the tests into the tool cache: crictl, and critest as a test
# binary. Every module's checksum is in tests/cri/tools/go.sum. The busybox for critest's images
# comes with them: Debian's ordinary one, which can't be installed beside the static one.
. packaging/setup/common.sh

go_wanted=1.24.3 # the go directive of tests/cri/tools/go.mod
. packaging/setup/go.sh

module=sigs.k8s.io/cri-tools
sources=tests/cri/tools
version=$(sed -n "s|.*$module v\([0-9.]*\)\$|\1|p" $sources/go.mod)
kept="$cache/cri-tools-$version"

build() (
    local go=$1 out=$2
    export CGO_ENABLED=0
    cd $sources
    "$go" build -mod=readonly -trimpath -o "$out/crictl" \
        -ldflags "-s -w -X $module/pkg/version.Version=$version" $module/cmd/crictl
    "$go" test -c -mod=readonly -trimpath -o "$out/critest" \
        -ldflags "-s -w -X $module/pkg/version.Version=$version" $module/cmd/critest
)

take_busybox() (
    local out=$1
    cd "$out"
    apt-get download busybox
    dpkg-deb --fsys-tarfile busybox_*.deb | tar --extract --to-stdout ./bin/busybox >busybox
    chmod 0755 busybox
    rm busybox_*.deb
)

complete() {
    local program
    for program in crictl critest busybox; do [ -x "$kept/$program" ] || return 1; done
}

if ! complete; then
    go=$(find_go)
    scratch=$(mktemp -d "$cache/.cri-tools.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    timed "building crictl and critest $version (two to five minutes)" build "$go" "$scratch"
    refresh_lists
    timed "fetching busybox for critest's images" take_busybox "$scratch"
    chmod 0755 "$scratch"
    rm -rf "$kept"
    mv "$scratch" "$kept"
fi
say "crictl and critest $version for the tests: $kept"
