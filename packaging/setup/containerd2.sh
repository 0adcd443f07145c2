#!/usr/bin/env bash
# Builds the containerd 2.x that the tests run beside the distribution's, into the tool cache.
. packaging/setup/common.sh

version=2.2.2
go_wanted=1.24.3 # the go directive of containerd 2.2.2's module file
kept="$cache/containerd-$version"
programs=(containerd ctr containerd-shim-runc-v2)

complete() {
    local program
    for program in "${programs[@]}"; do [ -x "$1/$program" ] || return 1; done
}

# Prints the go command to use: PATH's, the distribution's, or the one Go's own installer brings.
find_go() {
    local have
    have=$(go env GOVERSION 2>/dev/null | sed 's/^go//') || true
    if [ -n "$have" ] && at_least "$go_wanted" "$have"; then
        say "Go: $have from PATH" >&2
        echo go
        return
    fi
    if [ -z "$have" ]; then
        refresh_lists >&2
        install_packages golang-go >&2
        have=$(go env GOVERSION | sed 's/^go//')
    fi
    if at_least "$go_wanted" "$have"; then
        say "Go: $have from the distribution's package" >&2
        echo go
        return
    fi
    if at_least 1.21 "$have"; then
        say "Go: $go_wanted, which Go $have fetches by itself" >&2
        echo go
        return
    fi
    # An older Go does by hand what a newer one does by itself: the toolchain is a module. A module
    # holds no modes, so what has to be executable is made so.
    local module="golang.org/toolchain@v0.0.1-go$go_wanted.linux-amd64" root
    export GOMODCACHE="$cache/go-$go_wanted" GOFLAGS=-modcacherw
    root="$GOMODCACHE/$module"
    timed "fetching Go $go_wanted (70 MB)" go mod download "$module" >&2
    chmod -R +x "$root/bin" "$root/pkg/tool"
    say "Go: $go_wanted, as Go's own module" >&2
    echo "$root/bin/go"
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
