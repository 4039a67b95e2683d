# shellcheck shell=bash
# What `run` and `arm` have in common: how they end, what they tell, what they need. Sourced by them.
#
#   $scratch   a folder of this run; its log holds what the last command said

skip() { echo "skipped: $1"; exit 77; }
fail() {
    grep -A 12 -E '^(fatal|failed): ' "$scratch/log" | head -n 40 >&2 || true
    tail -n 40 "$scratch/log" >&2
    echo "failed: $1" >&2
    exit 1
}

# what the last steps were, and how long they took
phase() {
    printf '[%4d s] %s\n' $((SECONDS - phase_start)) "$1"
    phase_start=$SECONDS
}
phase_start=$SECONDS

# check_machine NAMESPACE ...: whether this machine can do it, in namespaces of its own.
check_machine() {
    [ "$(uname -s)" = Linux ] || skip "this is $(uname -s), not Debian Linux"
    # shellcheck source=/dev/null
    . /etc/os-release
    [ "${ID:-}" = debian ] || skip "this is ${PRETTY_NAME:-not Debian}; packages are fetched with Debian's apt-get"
    [ "$(id -u)" = 0 ] || skip "not root; namespaces and other systems need it"
    unshare "${@/#/--}" true 2>/dev/null || skip "this container may not have any of its own"
}

# install_packages PACKAGE ...: those of the host that are not there.
install_packages() {
    [ $# -eq 0 ] || { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy \
        --no-install-recommends "$@"; } >"$scratch/log" 2>&1 || skip "apt-get could not install $*"
}

# use_mirror: $mirror is where apt gets Debian 12 from, and $http_proxy how.
use_mirror() {
    local proxy=
    # shellcheck disable=SC2016
    mirror=$(apt-get indextargets --format '$(REPO_URI)' "Created-By: Packages" "Codename: bookworm" | sed -n 1p)
    mirror=${mirror:-http://deb.debian.org/debian}
    eval "$(apt-config shell proxy Acquire::http::Proxy)"
    export http_proxy=${http_proxy:-${proxy#DIRECT}}
}
