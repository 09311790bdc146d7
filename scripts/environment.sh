# Sourced by quickstart.sh and test.sh with the name of an extra, or "": a Python environment that
# has this clone of the package installed.
extra=$1

# A virtual or conda environment that is active is used as it is; conda's base does not count.
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ]; then
    if [ ! -x .venv/bin/python ]; then
        echo "== Making a virtual environment in .venv"
        python3 -m venv .venv
    fi
    source .venv/bin/activate
fi

# The stamp says which clone is installed, so that another clone in the same environment is not taken for it.
stamp="$(python -c 'import sys; print(sys.prefix)')/.dci-installed${extra:+-$extra}"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$PWD" ] || [ setup.py -nt "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    echo "== Installing the package${extra:+ with its extra '$extra'} (PyTorch is large: a few minutes the first time)"
    python -m pip install --disable-pip-version-check -e ".${extra:+[$extra]}"
    echo "$PWD" > "$stamp"
fi

# Everything ships with the project: nothing is fetched from a model hub.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
