#!/usr/bin/env bash
# Builds the nerdctl that the tests drive containerd with, into the tool cache.
. packaging/setup/common.sh

go_wanted=1.22.7 # the go directive of its module file
. packaging/setup/go.sh

version=2.0.3
module="github.com/containerd/nerdctl/v2"
# Of the module's files as git has them at the tag v2.0.3; go.sum in it vouches for all others. With it
# no checksum database is asked about this one module, which not every proxy passes on.
sum="h1:hdbDSsFHFNehQEbUortBTXpYUOY13bQmLAvtNHBthc8="
kept="$cache/nerdctl-$version"

if [ ! -x "$kept/nerdctl" ]; then
    go=$(find_go)
    scratch=$(mktemp -d "$cache/.nerdctl.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    found=$(GONOSUMDB="$module" "$go" mod download -json "$module@v$version")
    field() { sed -n "s/^\t\"$1\": \"\(.*\)\",\{0,1\}$/\1/p" <<<"$found"; }
    [ "$(field Sum)" = "$sum" ] || fail "$module v$version is not what it was: $(field Sum)"
    # From its own directory: only there its go.sum holds.
    timed "building nerdctl $version (two to five minutes)" \
        env GOFLAGS=-mod=readonly CGO_ENABLED=0 "$go" build -C "$(field Dir)" -trimpath \
        -ldflags "-s -w -X $module/pkg/version.Version=v$version" -o "$scratch/nerdctl" ./cmd/nerdctl
    rm -rf "$kept"
    mv "$scratch" "$kept"
fi
say "nerdctl $version for the tests: $kept"
