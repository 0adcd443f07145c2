# Finds a Go for the tools of the tests. Sourced after common.sh by a step that has set `go_wanted`.
# shellcheck shell=bash

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
