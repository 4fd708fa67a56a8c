#!/bin/sh
# Makes the virtual environment .venv hold what a lock file names, or says in one line what is in the way. The environment of
# a Python other than the one asked for is remade.
#   build/here/venv.sh LOCK WHAT [PYTHON]
set -eu

lock=build/here/$1 installed=.venv/$1 what=$2 python=$3

fail() {
    echo "livenessprobe: $1" >&2
    exit 1
}

# The Python itself or, for one in an environment, the one that made it; nothing if it does not start.
origin() {
    "$1" -c 'import os, sys; print(os.path.realpath(sys._base_executable))' 2>/dev/null || true
}

for folder in .venv bin; do
    [ ! -e $folder ] || [ -w $folder ] ||
        fail "$folder belongs to $(stat -c %U $folder), and $(id -un) may not write there: be that user, or remove it"
done

is=$(origin .venv/bin/python)
if [ -z "$is" ] || { [ -n "$python" ] && [ "$(origin "$python")" != "$is" ]; }; then
    python=${python:-python3}
    command -v "$python" >/dev/null ||
        fail "there is no $python here: apt-get install python3 python3-venv (or make PYTHON=/path/of/python3)"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$python" --version 2>&1) is too old, 3.10 is needed: apt-get install python3 python3-venv on Debian 12 or later, or make PYTHON=/path/of/newer/python3"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no module venv with pip: apt-get install python3-venv"
    echo "Making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv
elif cmp -s "$lock" "$installed"; then
    exit 0
fi

echo "Installing into .venv what it takes $what"
# On a terminal, a progress bar shows what is being fetched.
[ -t 1 ] && quiet= || quiet=-q
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
# Every file is pinned by its hash, so a machine's own version constraints could only get in the way. Python compiles
# what it imports, which is a small part.
# shellcheck disable=SC2086  # quiet is not a word if it is empty
PIP_CONSTRAINT=/dev/null PIP_USER=0 .venv/bin/python -m pip install $quiet --no-compile --disable-pip-version-check \
    --require-hashes --only-binary=:all: --requirement "$lock" 2>"$errors" || {
    if grep -q 'after connection broken by' "$errors"; then
        fail "no network here, or no package index that answers: .venv cannot be filled"
    fi
    cat "$errors" >&2
    exit 1
}
cp "$lock" "$installed"
