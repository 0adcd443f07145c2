#!/usr/bin/env bash
# Prints the Python that the project's environment is made from: the distribution's when it is new
# enough (it stays where it is for as long as the system does), else the newest in PATH.
set -euo pipefail
for python in /usr/bin/python3 python3.13 python3.12 python3.11 python3; do
    path=$(command -v "$python") || continue
    if "$path" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "$path"
        exit 0
    fi
done
echo "setup: no Python 3.11 or newer with venv; apt-get install python3 python3-venv" >&2
exit 1
