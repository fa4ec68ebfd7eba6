# shellcheck shell=bash
# Sourced by scripts/serve and scripts/test: finds or makes the Python environment they run in.
#
# ensure_environment EXTRAS   sets PYTHON to an interpreter that has SGLang, this project and EXTRAS
# ensure_demo_model           sets DEMO_MODEL to the demo model's folder
#
# TIERED_KV_PYTHON   an interpreter that has everything already: nothing is installed
# TIERED_KV_VENV     where the virtual environment goes (default: .venv in the repository)

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PROGRAM=${PROGRAM:-$(basename "$0")}
VENV_GB_NEEDED=14
REPORT_EVERY_S=20

say() { printf '[%s] %s\n' "$PROGRAM" "$*" >&2; }
die() {
    say "error: $*"
    exit 1
}

# timed WHAT COMMAND...: runs it and says how long it took; without a terminal, where there is no
# progress bar to watch, a line now and then shows that it is still at work.
timed() {
    local what=$1 start=$SECONDS reporter='' status=0
    shift
    say "$what ..."
    if [[ ! -t 2 ]]; then
        report_every_so_often "$what" &
        reporter=$!
    fi
    "$@" || status=$?
    if [[ -n $reporter ]]; then
        kill "$reporter" 2>/dev/null || true
        wait "$reporter" 2>/dev/null || true
    fi
    if ((status == 0)); then say "$what: $((SECONDS - start)) s"; fi
    return "$status"
}

# Sleeps in `read`, which leaves no child behind when this is killed, and ends with the script.
report_every_so_often() {
    local what=$1 start=$SECONDS tick
    exec {tick}<> <(:)
    while kill -0 $$ 2>/dev/null; do
        read -r -t "$REPORT_EVERY_S" -u "$tick" || true
        kill -0 $$ 2>/dev/null && say "$what: $((SECONDS - start)) s so far"
    done
}

find_base_python() {
    local candidate found_version=''
    for candidate in python3.12 python3.11 python3; do
        "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
            2>/dev/null || continue
        found_version=$candidate
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            BASE_PYTHON=$(command -v "$candidate")
            return
        fi
    done
    if [[ -n $found_version ]]; then
        die "$found_version cannot make virtual environments: install its venv module (on Debian" \
            "or Ubuntu: apt install $found_version-venv)."
    fi
    die "Python 3.11 or 3.12 is needed and none was found on PATH: install one, or set" \
        "TIERED_KV_PYTHON to an interpreter that has sglang and this project."
}

check_free_space() {
    local folder=$1 free_gb
    mkdir -p "$folder"
    free_gb=$(($(df -Pk "$folder" | awk 'NR == 2 { print $4 }') / 1024 / 1024))
    if ((free_gb < VENV_GB_NEEDED)); then
        die "$folder has $free_gb GB free and the installation takes $VENV_GB_NEEDED GB: free" \
            "some, or set TIERED_KV_VENV to a folder elsewhere."
    fi
}

# uv installs these 9 GB several times faster than pip. It doesn't read pip's settings, though, so
# where it fails (a mirror named in pip.conf, a proxy) pip gets its turn.
install_project() {
    local extras=$1 requirement="${REPOSITORY}[$1]" quiet=()
    # Without a terminal there is no progress bar, only two hundred lines of package names.
    if [[ ! -t 2 ]]; then quiet=(--quiet); fi
    if timed "install uv" "$PYTHON" -m pip install --quiet --disable-pip-version-check uv &&
        timed "install sglang and the project [$extras] (9 GB, several minutes)" \
            "$PYTHON" -m uv pip install "${quiet[@]}" --python "$PYTHON" --editable "$requirement"; then
        return
    fi
    say "uv did not manage; trying pip"
    timed "install sglang and the project [$extras] with pip" \
        "$PYTHON" -m pip install "${quiet[@]}" --disable-pip-version-check --editable "$requirement"
}

# Python would do this while the server starts for the first time; where PYTHONDONTWRITEBYTECODE is
# set, it would do it again at every start, which doubles the time.
compile_imports() {
    local log
    log=$(mktemp)
    # The log is shown only if this fails: SGLang has much to say about hardware that isn't there.
    if ! env -u PYTHONDONTWRITEBYTECODE "$PYTHON" - >"$log" 2>&1 <<'PYTHON_END'; then
import sglang.srt.entrypoints.http_server
import sglang.srt.managers.detokenizer_manager
import sglang.srt.managers.scheduler
import sglang.srt.models.registry

sglang.srt.models.registry.import_model_classes("sglang.srt.models")
PYTHON_END
        cat "$log" >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

# What is installed is known by the file that says what to install, and where the code lies.
installation_id() {
    { cat "$REPOSITORY/pyproject.toml" && echo "$REPOSITORY"; } | sha256sum | cut -c1-32
}

install_into_venv() {
    local venv=$1 extras=$2 stamp=$3
    if [[ ! -x $venv/bin/python ]]; then
        find_base_python
        check_free_space "$(dirname "$venv")"
        timed "create $venv with $BASE_PYTHON" "$BASE_PYTHON" -m venv "$venv" ||
            die "could not create $venv: see above."
    fi
    PYTHON=$venv/bin/python
    rm -f "$stamp"
    install_project "$extras" ||
        die "the installation failed, see above; running this again goes on from there."
    timed "compile what the server imports (once)" compile_imports ||
        die "sglang was installed but cannot be imported: see above."
    echo "$(installation_id) $extras" >"$stamp"
}

# has_stamp STAMP EXTRAS: "dev" includes every other extra.
has_stamp() {
    [[ -x $PYTHON && -f $1 ]] || return 1
    local found
    found=$(<"$1")
    [[ $found == "$(installation_id) $2" || $found == "$(installation_id) dev" ]]
}

ensure_environment() {
    local extras=$1 venv=${TIERED_KV_VENV:-$REPOSITORY/.venv}
    [[ $(uname -s) == Linux ]] || die "SGLang serves on Linux only; this is $(uname -s)."
    if [[ -n ${TIERED_KV_PYTHON:-} ]]; then
        PYTHON=$(command -v "$TIERED_KV_PYTHON") ||
            die "TIERED_KV_PYTHON=$TIERED_KV_PYTHON is not an interpreter that can be run."
        "$PYTHON" -c 'import importlib.util as u, sys
sys.exit(not all(u.find_spec(name) for name in ("sglang", "tiered_kv")))' 2>/dev/null ||
            die "TIERED_KV_PYTHON=$TIERED_KV_PYTHON lacks sglang or tiered_kv: unset it, and they" \
                "are installed into a virtual environment."
        return
    fi
    PYTHON=$venv/bin/python
    local stamp=$venv/.tiered_kv_installed
    has_stamp "$stamp" "$extras" && return
    mkdir -p "$venv" || die "cannot create $venv: set TIERED_KV_VENV to a folder that you may write."
    exec {lock}>"$venv/.tiered_kv_lock"  # uv has a .lock of its own there
    if command -v flock >/dev/null && ! flock --nonblock "$lock"; then
        say "waiting for another installation into $venv"
        flock "$lock"
    fi
    has_stamp "$stamp" "$extras" || install_into_venv "$venv" "$extras" "$stamp"
    exec {lock}>&-
}

# shellcheck disable=SC2034  # DEMO_MODEL is for the caller
ensure_demo_model() {
    DEMO_MODEL=$("$PYTHON" "$REPOSITORY/scripts/get_demo_model" --where) && return
    DEMO_MODEL=$("$PYTHON" -W ignore "$REPOSITORY/scripts/get_demo_model") ||
        die "the demo model could not be made, see above; --model-path serves another one."
}
