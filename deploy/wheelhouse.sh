#!/usr/bin/env bash
# Collects all that the nodes install, so that they need no package index: dllama from this checkout as a wheel, and
# the wheels of what it needs, for each kind of node.
#
#     deploy/wheelhouse.sh [-o FOLDER] [-m MACHINE]... [-p PYTHON]...
#
#   -o FOLDER   where to; by default deploy/wheelhouse
#   -m MACHINE  aarch64 (a Raspberry Pi) or x86_64; by default aarch64 and this machine's own
#   -p PYTHON   the nodes' Python; by default 3.11 and 3.13: Debian 12 and 13, and Raspberry Pi OS made of them
#
# Needs Python with pip, and the package index. Tells the release that the wheel makes, which is also in FOLDER/release
# and in each wheel house: the same sources make the same release.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$repository/deploy/wheelhouse
machines=() pythons=()
while getopts o:m:p: option; do
    case $option in
        o) folder=$OPTARG ;;
        m) machines+=("$OPTARG") ;;
        p) pythons+=("$OPTARG") ;;
        *) sed -n '5,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
done
[ ${#machines[@]} -gt 0 ] || mapfile -t machines < <(printf '%s\n' aarch64 "$(uname -m)" | sort -u)
[ ${#pythons[@]} -gt 0 ] || pythons=(3.11 3.13)
for machine in "${machines[@]}"; do
    case $machine in
        aarch64 | x86_64) ;;
        *) echo "wheelhouse.sh: $machine: nodes are aarch64 or x86_64" >&2; exit 2 ;;
    esac
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip=("${PYTHON:-python3}" -m pip --quiet --disable-pip-version-check)

# The wheel is built from a copy, as a build leaves files beside the sources.
mkdir -p "$work/source" "$work/wheel" "$folder"
(cd "$repository" && cp -r dllama converter setup.cfg pyproject.toml README.md LICENSE NOTICE "$work/source")
find "$work/source" -name __pycache__ -prune -exec rm -r {} +
SOURCE_DATE_EPOCH=315532800 "${pip[@]}" wheel --no-deps --wheel-dir "$work/wheel" "$work/source"
wheel=$(ls "$work/wheel")
version=${wheel#dllama-}
release=${version%%-*}-$(sha256sum "$work/wheel/$wheel" | cut -c 1-8)

for machine in "${machines[@]}"; do
    for python in "${pythons[@]}"; do
        platforms=()
        for tag in manylinux_2_28 manylinux_2_27 manylinux_2_26 manylinux_2_17 manylinux2014; do
            platforms+=(--platform "${tag}_$machine")
        done
        house=$folder/$machine-${python//./}
        "${pip[@]}" download --only-binary=:all: --implementation cp --python-version "$python" "${platforms[@]}" \
            --dest "$work/$machine-$python" "$work/wheel/$wheel"
        echo "$release" >"$work/$machine-$python/release"
        rm -rf "$house"
        mv "$work/$machine-$python" "$house"
        echo "$house: $(find "$house" -name '*.whl' | wc -l) wheels, $(du -sh "$house" | cut -f 1)"
    done
done
echo "$release" >"$folder/release"
for house in "$folder"/*/; do
    [ "$(cat "$house/release" 2>/dev/null)" = "$release" ] ||
        echo "${house%/}: of another release; make it again with -m and -p, where nodes need it" >&2
done
echo "release $release"
