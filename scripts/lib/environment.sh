# shellcheck shell=bash
# Sourced by scripts/serve and scripts/test: finds or makes the Python environment they run in.
#
# ensure_environment EXTRAS [--with-demo-model]
#                      sets PYTHON to an interpreter that has SGLang, this project and EXTRAS; the
#                      demo model, if it is wanted and missing, is made while that is installed
# ensure_demo_model    sets DEMO_MODEL to the demo model's folder
#
# take_sglang ARGUMENTS...  sets ARGUMENTS to them without `--sglang RELEASE`, and goes by that
#
# TIERED_KV_SGLANG   the release of SGLang, or --sglang: 0.5.23 (default without a GPU) or 0.5.17
#                    (default with one)
# TIERED_KV_PYTHON   an interpreter that has everything already: nothing is installed
# TIERED_KV_VENV     where the virtual environment goes (default: .venv in the repository, and
#                    .venv-RELEASE for a release that is not the default)

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PROGRAM=${PROGRAM:-$(basename "$0")}
PYTHON_WANTED=3.12
VENV_GB_NEEDED=14
UV_CACHE_GB_NEEDED=10
REPORT_EVERY_S=20
SGLANG_RELEASES=(0.5.17 0.5.23)
SGLANG_ON_GPUS=0.5.17 # of bundles and images, too: docs/adr/0024
SGLANG_DEFAULT=0.5.23

# Only chooses defaults, so a look at the device files will do; asking torch takes seconds.
has_gpu() {
    case ${CUDA_VISIBLE_DEVICES-unset} in
    '' | -1) return 1 ;;
    esac
    compgen -G '/dev/nvidia[0-9]*' >/dev/null || [[ -e /dev/kfd || -e /dev/dxg ]]
}

if has_gpu; then SGLANG_DEFAULT=$SGLANG_ON_GPUS; fi
SGLANG=${TIERED_KV_SGLANG:-$SGLANG_DEFAULT}

say() { printf '[%s] %s\n' "$PROGRAM" "$*" >&2; }
die() {
    say "error: $*"
    exit 1
}

# shellcheck disable=SC2034  # ARGUMENTS is for the caller
take_sglang() {
    ARGUMENTS=()
    while (($#)); do
        case $1 in
        --sglang)
            (($# > 1)) || die "--sglang needs a release: ${SGLANG_RELEASES[*]}."
            TIERED_KV_SGLANG=$2
            shift
            ;;
        --sglang=*) TIERED_KV_SGLANG=${1#*=} ;;
        *) ARGUMENTS+=("$1") ;;
        esac
        shift
    done
    SGLANG=${TIERED_KV_SGLANG:-$SGLANG_DEFAULT}
}

default_venv() {
    if [[ $SGLANG == "$SGLANG_DEFAULT" ]]; then
        echo "$REPOSITORY/.venv"
    else
        echo "$REPOSITORY/.venv-$SGLANG"
    fi
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

# A container's user may be a number that no password file knows, without a home or with one that
# it may not write. torch, FlashInfer and uv want both.
ensure_home() {
    id -un >/dev/null 2>&1 || export USER=${USER:-$UID}
    [[ -d ${HOME:-} && -w $HOME ]] && return
    [[ -n ${TIERED_KV_CACHE_DIR:-} ]] ||
        die "this user has no home that can be written to: set HOME, or TIERED_KV_CACHE_DIR, to a" \
            "folder that you may write."
    if ! mkdir -p "$TIERED_KV_CACHE_DIR" || [[ ! -w $TIERED_KV_CACHE_DIR ]]; then
        die "TIERED_KV_CACHE_DIR=$TIERED_KV_CACHE_DIR cannot be written to: name another folder."
    fi
    HOME=$(cd "$TIERED_KV_CACHE_DIR" && pwd)
    export HOME
}

# find_base_python: sets BASE_PYTHON to one of the versions that SGLang runs on.
find_base_python() {
    local candidate
    for candidate in python3.12 python3.11 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
            2>/dev/null; then
            BASE_PYTHON=$(command -v "$candidate")
            return
        fi
    done
    return 1
}

# find_uv FOLDER: sets UV. Where there is none, any Python with pip, or that can make an environment
# with pip, puts one into FOLDER.
find_uv() {
    local folder=$1 python pip
    UV=$(command -v uv) && "$UV" --version >/dev/null 2>&1 && return
    UV=$folder/bin/uv
    [[ -x $UV ]] && return
    for python in python3.12 python3.11 python3 python3.13 python3.14 python; do
        pip=(-m pip install --quiet --disable-pip-version-check --root-user-action ignore)
        if "$python" -m pip --version >/dev/null 2>&1; then
            timed "get uv" "$python" "${pip[@]}" --target "$folder" uv && return
        elif "$python" -c 'import ensurepip, venv' 2>/dev/null && "$python" -m venv "$folder"; then
            timed "get uv" "$folder/bin/python" "${pip[@]}" uv && return
        else
            continue
        fi
        break # what one pip can't get, another won't
    done
    UV=''
    return 1
}

# uv makes environments of a Python that lacks the venv module, too, and gets one where none fits.
make_venv() {
    local venv=$1 problem='there is none on PATH, and uv could not get one'
    BASE_PYTHON=''
    if find_base_python; then
        problem="$BASE_PYTHON cannot make a virtual environment, and uv could not either"
    fi
    if [[ -n $UV ]] && timed "create $venv with ${BASE_PYTHON:-Python $PYTHON_WANTED, from uv}" \
        "$UV" venv --quiet --allow-existing --python "${BASE_PYTHON:-$PYTHON_WANTED}" "$venv"; then
        return
    fi
    if [[ -n $BASE_PYTHON ]] && "$BASE_PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
        timed "create $venv with $BASE_PYTHON" "$BASE_PYTHON" -m venv "$venv" && return
        die "could not create $venv: see above."
    fi
    die "Python 3.11 or 3.12 is needed, but $problem: install Python $PYTHON_WANTED with its venv" \
        "module (on Debian or Ubuntu: python$PYTHON_WANTED-venv), or set TIERED_KV_PYTHON to an" \
        "interpreter that has sglang and this project."
}

free_gb() { df -Pk "$1" | awk 'NR == 2 { print int($4 / 1024 / 1024) }'; }

# check_free_space FOLDER: uv links what it installs from its cache, or copies it where that lies on
# another file system, which then has to hold as much.
check_free_space() {
    local folder=$1 cache missing_gb
    mkdir -p "$folder"
    if (($(free_gb "$folder") < VENV_GB_NEEDED)); then
        die "$folder has $(free_gb "$folder") GB free and the installation takes $VENV_GB_NEEDED" \
            "GB: free some, or set TIERED_KV_VENV to a folder elsewhere."
    fi
    if [[ -z $UV ]] || ! cache=$("$UV" cache dir 2>/dev/null); then return; fi
    mkdir -p "$cache"
    [[ $(stat -c %d "$cache") == "$(stat -c %d "$folder")" ]] && return
    missing_gb=$((UV_CACHE_GB_NEEDED - $(free_gb "$cache")))
    ((missing_gb > 0)) || return 0
    # What an earlier installation left in the cache need not come again.
    if (($(du -sk "$cache" | awk '{ print int($1 / 1024 / 1024) }') < missing_gb)); then
        die "uv's cache, $cache, has $(free_gb "$cache") GB free and takes $UV_CACHE_GB_NEEDED GB:" \
            "free some, or set UV_CACHE_DIR to a folder elsewhere."
    fi
}

# uv installs these 9 GB several times faster than pip. It doesn't read pip's settings, though, so
# where it fails (a mirror named in pip.conf, a proxy) pip gets its turn.
install_project() {
    local extras=$1 requirement="${REPOSITORY}[$1]" quiet=()
    # Without a terminal there is no progress bar, only two hundred lines of package names.
    if [[ ! -t 2 ]]; then quiet=(--quiet); fi
    if [[ -n $UV ]] &&
        timed "install sglang $SGLANG and the project [$extras] (9 GB, several minutes)" \
            "$UV" pip install "${quiet[@]}" --python "$PYTHON" "sglang==$SGLANG" \
            --editable "$requirement"; then
        return
    fi
    say "uv did not manage; trying pip"
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null || return
    timed "install sglang and the project [$extras] with pip" \
        "$PYTHON" -m pip install "${quiet[@]}" --disable-pip-version-check "sglang==$SGLANG" \
        --editable "$requirement"
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

# prepare_installation WITH_DEMO_MODEL: what the first start would wait for. Importing is one core's
# work, and begins with torch: meanwhile another core compiles SGLang itself and makes the model.
prepare_installation() {
    local jobs status=0
    env -u PYTHONDONTWRITEBYTECODE "$PYTHON" -W ignore -c 'import compileall, importlib.util as u
compileall.compile_dir(u.find_spec("sglang").submodule_search_locations[0], quiet=2)' &
    jobs=($!)
    if [[ -n $1 ]]; then
        # Should it fail, ensure_demo_model says so.
        "$PYTHON" "$REPOSITORY/scripts/get_demo_model" >/dev/null &
        jobs+=($!)
    fi
    # Without job control a background job doesn't see Ctrl-C.
    # shellcheck disable=SC2064
    trap "kill ${jobs[*]} 2>/dev/null || true" EXIT
    timed "compile what the server imports (once)" compile_imports || status=$?
    wait "${jobs[@]}" || true
    trap - EXIT
    return "$status"
}

# What is installed is known by the file that says what to install, and where the code lies.
installation_id() {
    { cat "$REPOSITORY/pyproject.toml" && echo "$REPOSITORY $SGLANG"; } | sha256sum | cut -c1-32
}

install_into_venv() {
    local venv=$1 extras=$2 with_demo_model=$3 stamp=$4
    PYTHON=$venv/bin/python
    find_uv "$venv/.uv" || true
    if [[ ! -x $PYTHON ]]; then
        check_free_space "$(dirname "$venv")"
        make_venv "$venv"
    fi
    rm -f "$stamp"
    install_project "$extras" ||
        die "the installation failed, see above; running this again goes on from there."
    prepare_installation "$with_demo_model" ||
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
    local extras=$1 with_demo_model=${2:-} venv=${TIERED_KV_VENV:-$(default_venv)}
    [[ " ${SGLANG_RELEASES[*]} " == *" $SGLANG "* ]] ||
        die "SGLang $SGLANG is not supported: choose one of ${SGLANG_RELEASES[*]}."
    [[ $(uname -s) == Linux ]] || die "SGLang serves on Linux only; this is $(uname -s)."
    ensure_home
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
    has_stamp "$stamp" "$extras" || install_into_venv "$venv" "$extras" "$with_demo_model" "$stamp"
    exec {lock}>&-
}

# shellcheck disable=SC2034  # DEMO_MODEL is for the caller
ensure_demo_model() {
    DEMO_MODEL=$("$PYTHON" "$REPOSITORY/scripts/get_demo_model" --where) && return
    DEMO_MODEL=$("$PYTHON" -W ignore "$REPOSITORY/scripts/get_demo_model") ||
        die "the demo model could not be made, see above; --model-path serves another one."
}
