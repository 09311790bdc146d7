# Sourced by quickstart.sh and test.sh: a Python environment with the package and its extra $1.
if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        echo "== Making a virtual environment in .venv"
        python3 -m venv .venv
    fi
    source .venv/bin/activate
fi
extra=${1:-}
stamp="$(python -c 'import sys; print(sys.prefix)')/.dci-installed${extra:+-$extra}"
if [ ! -f "$stamp" ] || [ setup.py -nt "$stamp" ]; then
    echo "== Installing the package${extra:+ with its extra '$extra'} (PyTorch is large: a few minutes the first time)"
    python -m pip install --progress-bar on -e ".${extra:+[$extra]}"
    touch "$stamp"
fi
# Everything ships with the project: nothing is fetched from a model hub.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
