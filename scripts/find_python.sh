#!/bin/sh
# Prints the Python that the virtual environment is made with: the one named in $1, else the first of the usual names
# that is new enough and complete. Plain python3 comes first: prebuilt packages are most likely to exist for it.
set -eu

complaint() {
    "$1" - <<'PYTHON' 2>/dev/null || echo "cannot be started"
import importlib.util, os, sys, sysconfig
if sys.version_info < (3, 11):
    print("is Python %d.%d" % sys.version_info[:2])
elif not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
    print("lacks the venv module (install the package python3-venv)")
elif not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("lacks its headers (install the package python3-dev)")
PYTHON
}

seen=""
for name in ${1:-python3 python3.13 python3.12 python3.11 python3.14}; do
    path=$(command -v "$name" 2>/dev/null) || path=""
    if [ -z "$path" ]; then
        seen="$seen; $name was not found"
        continue
    fi
    reason=$(complaint "$path")
    if [ -z "$reason" ]; then
        echo "$path"
        exit 0
    fi
    seen="$seen; $name $reason"
done
echo "kvstore needs Python 3.11 or later with venv and headers: ${seen#; }; name one with 'make PYTHON=/path/to/python3'." >&2
exit 1
