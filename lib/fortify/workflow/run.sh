#!/bin/sh
# Runs one step of the paper on a machine without a network. Of the archive that `make bundle` makes.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
started=$(date +%s)

usage() {
    cat <<EOF
sh run.sh [--cpu] [--limit SECONDS] [--out FOLDER] STEP

  list                                 the profiles and benchmarks
  seed PROFILE SEED [name=value ...]   a seed of a profile; as 'splits=[random]' for a part of it
  benchmark NAME [its options]         as: benchmark speed --device cuda
  tests [pytest's arguments]           the tests that need a GPU

  --cpu      use no GPU: for a rehearsal. Without it a GPU must be there.
  --limit    seconds from now after which the step is ended, set-up included; what was whole is kept.
             Leave the machine's own limit 20 seconds more.
  --out      where results-*.tar.gz and its log are written (OUT, else $here/out)
  PYTHON     the Python to use (python3)
EOF
}

fail() {
    echo "run.sh: $*" >&2
    exit 2
}

cpu= limit=0 out=${OUT:-$here/out}
while [ $# -gt 0 ]; do
    case $1 in
        --cpu) cpu=1 ;;
        --limit | --out)
            [ $# -gt 1 ] || fail "$1 needs a value"
            if [ "$1" = --out ]; then out=$2; else limit=$2; fi
            shift ;;
        -h | --help) usage; exit 0 ;;
        -*) fail "there is no option $1; sh run.sh --help lists them" ;;
        *) break ;;
    esac
    shift
done
case $limit in '' | *[!0-9]*) fail "--limit is a number of seconds, not '$limit'" ;; esac

case ${1:-} in
    list)
        echo "profiles:"
        for file in "$here"/checkout/notebooks/profiles/*.yaml; do
            printf '  %-12s %s\n' "$(basename "$file" .yaml)" "$(sed -n 's/^title: *//p' "$file")"
        done
        echo "benchmarks:"
        for file in "$here"/checkout/benchmarks/*.py; do
            name=$(basename "$file" .py)
            [ "$name" = results ] || printf '  %-14s %s\n' "$name" "$(sed -n '1s/^r*"""//p' "$file")"
        done
        exit 0 ;;
    seed | benchmark | tests) ;;
    *) usage >&2; exit 2 ;;
esac

command -v "$python" >/dev/null || fail "there is no $python here; set PYTHON to a Python"
# Nothing of this machine's settings, and no file outside this folder.
export PIP_CONFIG_FILE=/dev/null PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export PYTHONUNBUFFERED=1 PYTHONUTF8=1 GIT_PYTHON_REFRESH=quiet
export XDG_CACHE_HOME="$here/cache" IPYTHONDIR="$here/cache/ipython"
export JUPYTER_RUNTIME_DIR="$here/cache/jupyter" JUPYTER_PLATFORM_DIRS=1 JUPYTER_PREFER_ENV_PATH=1
# A variable of the shell that called might point to another checkout.
export FORTIFY_ROOT="$here/checkout"
theirs=${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH="$here/checkout/lib$theirs"
if [ -d "$here/data" ]; then export FORTIFY_DATA="$here/data"; else unset FORTIFY_DATA; fi
if [ -n "$cpu" ]; then export CUDA_VISIBLE_DEVICES=; fi

if [ -d "$here/wheels" ]; then
    "$python" - "$here/bundle.json" <<'EOF' || exit 2
import json, sys

wanted = json.load(open(sys.argv[1]))["python"]
here = ".".join(map(str, sys.version_info[:2]))
if here != wanted:
    sys.exit(f"run.sh: the wheels are for Python {wanted}, and this is {here}: set PYTHON, or make bundle PYTHON_VERSION={here}")
EOF
fi
if command -v nvidia-smi >/dev/null; then nvidia-smi || true; else echo "there is no nvidia-smi here"; fi
# 3 where torch is not installed, 1 where a GPU is wanted and there is none.
device() {
    "$python" - "$cpu" <<'EOF'
import sys

try:
    import torch
except ImportError:
    sys.exit(3)
there = torch.cuda.is_available()
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA is available: {there}", flush=True)
if there:
    print(f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory >> 30} GiB")
sys.exit(not there and not sys.argv[1])
EOF
}
check_device() {
    status=0
    device || status=$?
    [ $status != 1 ] || fail "torch finds no GPU here. For a rehearsal without one: sh run.sh --cpu ..."
    [ $status = 0 ]
}
if check_device; then checked=1; else checked=; fi

install() {
    with=$1
    shift
    "$with" -m pip install --quiet --no-index --no-deps --no-compile --no-warn-script-location "$@" "$here"/wheels/*.whl
}

if [ -d "$here/wheels" ]; then
    env=$here/env
    if [ ! -e "$env/installed" ]; then
        rm -rf "$env"
        echo "installing $(ls "$here"/wheels | wc -l) wheels"
        # Without pip of its own, for some machines' Python cannot give it one: it uses the machine's.
        if "$python" -m venv --system-site-packages --without-pip "$env" 2>/dev/null; then
            # The machine's Python may be of an environment itself, whose packages are not the system's.
            "$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
                >"$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/machine.pth"
            install "$env/bin/python"
        else
            echo "Python cannot make a virtual environment here; using a folder"
            mkdir -p "$env/bin"
            printf '#!/bin/sh\nexec "%s" "$@"\n' "$(command -v "$python")" >"$env/bin/python"
            chmod +x "$env/bin/python"
            install "$python" --target "$env/site"
        fi
        touch "$env/installed"
    fi
    if [ -d "$env/site" ]; then
        export PYTHONPATH="$here/checkout/lib:$env/site$theirs" JUPYTER_PATH="$env/site/share/jupyter"
    fi
    export PATH="$env/bin:$env/site/bin:$PATH"
    python=$env/bin/python
fi
if [ -z "$checked" ]; then check_device || fail "torch is neither here nor in the archive"; fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$here/checkout"
exec "$python" -u -m fortify.workflow.away --started "$started" --seconds "$limit" --out "$out" "$@"
