#!/usr/bin/env bash
# Makes build/venv with the versions that pyproject.toml and packaging/constraints.txt pin.
. packaging/setup/common.sh

inputs=(pyproject.toml packaging/constraints.txt)
venv=build/venv
if fresh venv "${inputs[@]}" && [ -x $venv/bin/python ]; then
    exit 0
fi
python=$(packaging/setup/python.sh)
say "Python: $python ($("$python" -c 'import platform; print(platform.python_version())'))"
[ -x $venv/bin/python ] || "$python" -m venv $venv
list=$(mktemp)
trap 'rm -f "$list"' EXIT
$venv/bin/python packaging/pins.py dev >"$list"
timed "installing $(grep -c . "$list") Python packages into $venv (half a minute)" \
    $venv/bin/python -m pip --disable-pip-version-check install \
    --requirement "$list" --constraint packaging/constraints.txt
finished venv "${inputs[@]}"
