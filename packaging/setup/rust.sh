#!/usr/bin/env bash
# Finds or installs Rust new enough for the guest agent; leaves the choice in build/setup/rust.env.
. packaging/setup/common.sh

wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' guest/agent/Cargo.toml)
installer_home="$cache/rust-$wanted"

version_of() { "$1" --version 2>/dev/null | sed 's/^[a-z]* \([0-9.]*\).*/\1/'; }
good() { [ -x "$1/cargo" ] && [ -x "$1/rustc" ] && at_least "$wanted" "$(version_of "$1/rustc")"; }

# take DIRECTORY WHERE [VARIABLE=…]: record the toolchain for the steps that follow.
take() {
    local directory=$1 where=$2 variable
    shift 2
    {
        for variable in "$@"; do echo "export $variable"; done
        echo "export PATH=\"$directory:\$PATH\""
    } >$stamps/rust.env
    say "Rust: $(version_of "$directory/rustc") from $where"
}

from_path() {
    local cargo
    cargo=$(command -v cargo) && good "$(dirname "$cargo")" && take "$(dirname "$cargo")" "PATH ($(dirname "$cargo"))"
}

# Debian stable carries a current Rust under another name beside the release's own.
from_distribution() {
    local suffix
    for suffix in "" -web; do
        if at_least "$wanted" "$(candidate "rustc$suffix")"; then
            install_packages "rustc$suffix" "cargo$suffix"
            good /usr/bin && take /usr/bin "the distribution's package rustc$suffix" && return
        fi
    done
    return 1
}

from_installer() {
    command -v curl >/dev/null || install_packages curl
    mkdir -p "$installer_home"
    export CARGO_HOME="$installer_home/cargo" RUSTUP_HOME="$installer_home/rustup"
    if ! good "$CARGO_HOME/bin"; then
        timed "downloading rustup's installer" curl --proto '=https' --tlsv1.2 --fail --silent \
            --show-error --location --output "$installer_home/rustup-init.sh" https://sh.rustup.rs
        timed "installing Rust $wanted by rustup (a minute)" sh "$installer_home/rustup-init.sh" -y \
            --no-modify-path --profile minimal --component clippy --component rustfmt \
            --default-toolchain "$wanted"
    fi
    take "$CARGO_HOME/bin" "rustup's installer" "CARGO_HOME='$CARGO_HOME'" "RUSTUP_HOME='$RUSTUP_HOME'"
}

from_path || { refresh_lists; from_distribution; } || from_installer ||
    fail "no Rust $wanted or newer: install it from your distribution or with rustup"
