# Shared by the setup steps: where things go, how progress is said, when a step is done already.
# Sourced with the repository as the current directory; every step may be run again at any time.
set -euo pipefail

cache="${KATA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kata-shimv2}"
stamps=build/setup
mkdir -p "$stamps" "$cache" build/bin

# Tools of a toolchain may be installed without being in a non-interactive shell's PATH.
export PATH="$PATH:$HOME/.cargo/bin:/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin"

say() { printf 'setup: %s\n' "$*"; }

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# at_least WANTED HAVE: is version HAVE the same as WANTED or newer?
at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

# timed WHAT COMMAND…: say what is being done, then how long it took; show its output if it fails.
timed() {
    local what=$1 started=$SECONDS log
    shift
    log=$(mktemp)
    say "$what …"
    if ! "$@" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        rm -f "$log"
        fail "$what failed"
    fi
    rm -f "$log"
    say "$what: done in $((SECONDS - started)) s"
}

# fresh STAMP FILE…: was the step that writes STAMP finished with these very files?
fresh() {
    local stamp=$stamps/$1
    shift
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(cat "$@" | sha256sum)" ]
}

finished() {
    local stamp=$stamps/$1
    shift
    cat "$@" | sha256sum >"$stamp"
}

# candidate PACKAGE: upstream version that apt would install, or nothing.
candidate() {
    command -v apt-cache >/dev/null || return 0
    LC_ALL=C apt-cache policy "$1" 2>/dev/null |
        sed -n 's/^  Candidate: \([0-9]*:\)\{0,1\}\([0-9][0-9.]*\).*/\2/p'
}

# install_packages PACKAGE…: as root by apt; otherwise name the command that has to be run.
install_packages() {
    [ $# -gt 0 ] || return 0
    command -v apt-get >/dev/null || fail "these Debian packages' programs are missing: $*"
    [ "$(id -u)" = 0 ] || fail "missing packages; run as root: apt-get install $*"
    export DEBIAN_FRONTEND=noninteractive
    refresh_lists
    timed "installing $* (a minute or two)" apt-get install --yes --no-install-recommends "$@"
}

refresh_lists() {
    [ "$(id -u)" = 0 ] || return 0
    # Lists younger than a day do; a fresh machine has none.
    [ -z "$(find "$stamps/apt-update" -mmin -1440 2>/dev/null)" ] || return 0
    timed "reading the package lists (apt-get update)" apt-get update
    touch "$stamps/apt-update"
}
