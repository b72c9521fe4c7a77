#!/bin/sh
# Make the environment `.venv` of this checkout: find a Python >= 3.12, get uv, install what uv.lock pins.
# Called by make; run it again at any time. PYTHON=/path/to/python3.12 chooses the interpreter, PYTHON_VERSION=3.13 its
# version.
set -eu
cd "$(dirname "$0")"

# Without uv, pip installs it into an environment of its own; Debian's Python lacks what that needs without python3-venv.
needed=venv
uv --version >/dev/null 2>&1 || .cache/uv/bin/uv --version >/dev/null 2>&1 || needed=ensurepip

works() { # a pyenv shim can be on PATH and still run nothing
    "$1" -c 'import sys; __import__("'"$needed"'"); sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1:])' \
        ${PYTHON_VERSION:-3.12 3.13} >/dev/null 2>&1
}

find_python() {
    for candidate in "${PYTHON:-}" python3.12 python3.13 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python3 \
        "$HOME"/.local/share/uv/python/cpython-3.1[23]*/bin/python3 \
        /usr/bin/python3.1[23] /usr/local/bin/python3.1[23] /opt/homebrew/bin/python3.1[23] \
        /opt/python/cp31[23]-cp31[23]/bin/python3 /opt/python*/bin/python3; do
        if [ -n "$candidate" ] && works "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    return 1
}

if ! python=$(find_python); then
    cat >&2 <<MESSAGE
No Python ${PYTHON_VERSION:-3.12 or 3.13} was found (on PATH, under pyenv, uv, /usr, /usr/local, /opt). LeRobot needs one. Install it with
one of
    sudo apt install python3.12 python3.12-venv
    pyenv install 3.12
    uv python install 3.12
    brew install python@3.12
or name one that you have: make PYTHON=/path/to/python3.12 (or PYTHON=... ./bootstrap.sh)
MESSAGE
    exit 1
fi

if command -v uv >/dev/null 2>&1 && uv --version >/dev/null 2>&1; then
    uv=uv
else
    uv=.cache/uv/bin/uv
    if ! "$uv" --version >/dev/null 2>&1; then
        echo "Getting uv from PyPI into .cache/uv ..."
        "$python" -m venv --clear .cache/uv
        .cache/uv/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'
    fi
fi

echo "Installing into ${UV_PROJECT_ENVIRONMENT:-.venv} with $python (the first time this takes minutes: PyTorch is large) ..."
# Where Python may not keep its bytecode (many containers), LeRobot would be compiled again in every process.
[ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || export UV_COMPILE_BYTECODE=1
UV_PYTHON_DOWNLOADS=never "$uv" sync --frozen --extra dev --python "$python"
