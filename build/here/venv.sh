#!/bin/sh
# Makes the virtual environment .venv from the lock file, or says in one line what the machine lacks.
#   build/here/venv.sh PYTHON
set -eu

python=$1

lack() {
    echo "livenessprobe: $1" >&2
    exit 1
}

command -v "$python" >/dev/null ||
    lack "there is no $python here: apt-get install python3 python3-venv (or make PYTHON=/path/of/python3)"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    lack "$("$python" --version 2>&1) is too old, 3.10 is needed: apt-get install python3 python3-venv on Debian 12 or later, or make PYTHON=/path/of/newer/python3"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    lack "$python has no module venv with pip: apt-get install python3-venv"

rm -rf .venv
"$python" -m venv .venv

# Every file is held by its hash, so a machine's own version constraints could only get in the way.
PIP_CONSTRAINT=/dev/null PIP_USER=0 .venv/bin/python -m pip install -qq --disable-pip-version-check \
    --require-hashes --only-binary=:all: --requirement build/here/requirements-test.lock
touch .venv/done
