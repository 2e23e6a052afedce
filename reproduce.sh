#!/usr/bin/env bash
# bash reproduce.sh              set up, train, evaluate, print paper against measured
# bash reproduce.sh --test       set up, then the tests (the long ones too: --test -m 'slow or not slow')
# bash reproduce.sh --setup      the set-up alone
#
# With Human3.6M in data/ (or in the folder that DATA names) this runs the headline rows of both
# papers, on one CUDA GPU or on a CPU. Without it, the same pipeline runs on procedural motion, in
# minutes on two CPU cores. It says first what it will run, on what and in about how much memory,
# and writes results/report.md.
#
#   --only ROW,...   these rows alone (.venv/bin/python train.py --list shows them)
#   --all            every published row whose data is there; the C = 512 row only by --only
#   --seeds N        seeds 0 to N-1, with mean and spread
#   --batch 100 ...  any option of a recipe, for every row; the report says which were changed
#
# An interrupted run goes on where it stopped when the command is given again; finished runs are
# not repeated; a row that fails does not stop the others (exit status 2 at the end).
# DATA: the data folder (data); RESULTS: where results go (results); PYTHON: a Python to use as it
# is, with no set-up.
set -euo pipefail
cd "$(dirname "$0")"
DATA=${DATA:-data}
RESULTS=${RESULTS:-results}
if [ -z "${OMP_WAIT_POLICY:-}" ]; then
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}  # as data.py: threads that spin for long slow busy machines
fi

has() { "$1" -c "import ${*:2}" 2>/dev/null; }

in_venv() {  # the Python of .venv: Windows has it elsewhere
    if [ -e .venv/Scripts/python.exe ]; then echo .venv/Scripts/python.exe; else echo .venv/bin/python; fi
}

setup() {  # sets $python to one that has what requirements.txt lists
    local base
    if [ -n "${PYTHON:-}" ]; then python=$PYTHON; return; fi
    base=$(command -v python3 || command -v python) ||
        { echo "error: no python3 found; install Python 3.10 or newer" >&2; exit 2; }
    python=$(in_venv)
    if cmp -s requirements.txt .venv/installed.txt; then return; fi
    echo "Setting up .venv from requirements.txt (once; some minutes)."
    if "$base" -m venv .venv && python=$(in_venv) &&
        "$python" -m pip install --quiet --retries 2 --disable-pip-version-check -r requirements.txt; then
        cp requirements.txt .venv/installed.txt
    elif has "$base" "torch, numpy${1:+, $1}"; then
        echo "Could not install; using $base, which has torch and numpy."
        python=$base
    else
        echo "error: could not install requirements.txt, and $base has no torch and numpy${1:+, $1}:" \
             "check the network, or install them yourself" >&2
        exit 2
    fi
}

case "${1:-}" in
--setup) setup "" ;;
--test)
    setup "pytest, hypothesis"
    exec "$python" -m pytest "${@:2}" ;;
*)
    setup ""
    exec "$python" train.py reproduce --data "$DATA" --out "$RESULTS" "$@" ;;  # a signal reaches the training
esac
