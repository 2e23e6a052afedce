#!/usr/bin/env bash
# bash reproduce.sh              set up, train, evaluate, print paper against measured
# bash reproduce.sh --test       set up, then the tests (the long ones too: --test -m 'slow or not slow')
#
# With Human3.6M in data/ (or in the folder that DATA names) this runs the headline rows of both papers, on one CUDA GPU
# or on a CPU. Without it, the same pipeline runs on the embedded procedural motion, in minutes on two CPU cores. It says
# first what it will run and about how long that takes, and writes results/report.md and results/report.json.
#
#   --only ROW,...   these rows alone (.venv/bin/python train.py --list shows them)
#   --all            every published row whose data is there; the C = 512 row, days on any GPU, only by --only
#   --seeds N        seeds 0 to N-1, with mean and spread
#   --quick          a tenth of the epochs, labelled so
#   --batch 100 ...  any option of a recipe, for every row; the report says which settings were changed
#
# An interrupted run goes on where it stopped when the command is given again; finished runs are not repeated.
# DATA: the data folder (data); RESULTS: where results go (results); PYTHON: a Python to use as it is, with no set-up.
set -euo pipefail
cd "$(dirname "$0")"
DATA=${DATA:-data}
RESULTS=${RESULTS:-results}

has() { "$1" -c "import ${*:2}" 2>/dev/null; }

setup() {  # sets $python to one that has what requirements.txt lists
    local want
    if [ -n "${PYTHON:-}" ]; then python=$PYTHON; return; fi
    want=$(command -v python3 || command -v python) || { echo "error: no python3 found; install Python 3.10 or newer" >&2; exit 2; }
    if cmp -s requirements.txt .venv/installed.txt; then python=.venv/bin/python; return; fi
    echo "Setting up .venv from requirements.txt (once; some minutes)."
    if "$want" -m venv .venv && .venv/bin/python -m pip install --quiet --retries 2 --disable-pip-version-check -r requirements.txt; then
        cp requirements.txt .venv/installed.txt
        python=.venv/bin/python
    elif has "$want" "torch, numpy${1:+, $1}"; then
        echo "Could not install; using $want, which has torch and numpy."
        python=$want
    else
        echo "error: could not install requirements.txt, and $want has no torch and numpy${1:+, $1}: check the network," \
             "or install them yourself" >&2
        exit 2
    fi
}

if [ "${1:-}" = --test ]; then
    setup "pytest, hypothesis"
    exec "$python" -m pytest "${@:2}"
fi
setup ""
exec "$python" train.py reproduce --data "$DATA" --out "$RESULTS" "$@"  # exec: a signal reaches the training
