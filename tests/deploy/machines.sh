# shellcheck shell=bash
# Booted Debian machines to deploy to: systemd-nspawn containers with systemd, sshd and addresses of their own.
# Sourced by `run`, inside mount, network and process namespaces of its own, with which all of them end.
#
#   $cache     a folder that is kept: the base system that all machines share
#   $scratch   a folder of this run: what each machine writes, its console, the key to log in with

network=10.77.0

# machine_packages: what the host needs that is not there, one package a line.
machine_packages() {
    command -v systemd-nspawn >/dev/null || echo systemd-container
    command -v debootstrap >/dev/null || echo debootstrap
    command -v ip >/dev/null || echo iproute2
    command -v ssh >/dev/null || echo openssh-client
}

# make_base: a system as it is on a new board: sshd, Python, and a user who may use sudo. What the playbook installs
# is not there, only its packages, as the machines cannot reach any mirror.
make_base() {
    local base=$cache/base later=(python3-venv systemd-timesyncd)
    [ ! -e "$base/.dllama" ] || return 0
    use_mirror
    rm -rf --one-file-system "$base.partial" "$base"
    debootstrap --variant=minbase \
        --include=systemd,systemd-sysv,dbus,openssh-server,python3,python3-apt,sudo,iproute2,procps \
        bookworm "$base.partial" "$mirror"
    cp -L /etc/resolv.conf "$base.partial/etc/resolv.conf"
    chroot "$base.partial" apt-get update -q
    chroot "$base.partial" apt-get install -qy --download-only --no-install-recommends "${later[@]}"
    chroot "$base.partial" useradd --create-home --shell /bin/bash pi
    echo 'pi ALL=(ALL) NOPASSWD: ALL' >"$base.partial/etc/sudoers.d/pi"
    mkdir -m 700 "$base.partial/home/pi/.ssh"
    chroot "$base.partial" systemctl enable systemd-networkd
    : >"$base.partial/etc/machine-id"
    : >"$base.partial/etc/resolv.conf"
    touch "$base.partial/.dllama"
    mv "$base.partial" "$base"
}

# make_network: a switch, with this machine at it.
make_network() {
    ip link set lo up
    ip link add dllama0 type bridge
    ip address add "$network.1/24" dev dllama0
    ip link set dllama0 up
    ssh-keygen -q -t ed25519 -N '' -f "$scratch/login"
}

# boot NAME NUMBER [OPTION ...]: starts a machine at the address $network.NUMBER, with options of systemd-nspawn. What
# it writes is in a layer over the base, and there again at its next boot.
boot() {
    local name=$1 address=$network.$2 place=$scratch/$1
    if [ ! -d "$place" ]; then
        mkdir -p "$place/upper" "$place/work" "$place/root"
        mount -t overlay overlay "$place/root" \
            -o "lowerdir=$cache/base,upperdir=$place/upper,workdir=$place/work"
        printf '[Match]\nName=host0\n[Network]\nAddress=%s/24\nLinkLocalAddressing=no\n' "$address" \
            >"$place/root/etc/systemd/network/10-board.network"
        echo "$name" >"$place/root/etc/hostname"
        printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$name" >"$place/root/etc/hosts"
        mkdir -p "$place/root/boot/firmware"
        echo 'console=tty1 root=PARTUUID=4e639091-02 rootwait' >"$place/root/boot/firmware/cmdline.txt" # as on a Pi
        cp "$scratch/login.pub" "$place/root/home/pi/.ssh/authorized_keys"
        chown -R --reference="$place/root/home/pi" "$place/root/home/pi/.ssh"
        touch "$place/root/var/lib/apt/lists" # fresh: apt need not ask its mirror
    fi
    (
        # Each in a control group of its own: else their systemds would take each other's groups for theirs.
        for_groups "$name" enter_group
        exec systemd-nspawn --quiet -D "$place/root" --machine="$name" --register=no --keep-unit \
            --network-bridge=dllama0 --console=pipe "${@:3}" --boot
    ) >>"$place/console" 2>&1 </dev/null &
    echo $! >"$place/pid"
}

# for_groups NAME FUNCTION: calls the function with the machine's control group in each of systemd's hierarchies.
for_groups() {
    local hierarchy
    for hierarchy in /sys/fs/cgroup{,/systemd,/unified}; do
        [ ! -w "$hierarchy/cgroup.procs" ] || "$2" "$hierarchy/dllama-$1"
    done
}

enter_group() { mkdir -p "$1" && echo "$BASHPID" >"$1/cgroup.procs"; }
leave_group() { find "$1" -depth -type d -exec rmdir {} + 2>/dev/null || true; }

# halt NAME: shuts a machine down, as its power button would.
halt() {
    local pid
    pid=$(cat "$scratch/$1/pid")
    kill "$pid"
    wait "$pid" || true
}

# on NAME COMMAND ...: runs a command on a machine, as the user pi.
on() {
    local address
    address=$(sed -n 's/^Address=\(.*\)\/24$/\1/p' "$scratch/$1/root/etc/systemd/network/10-board.network")
    ssh -q -i "$scratch/login" -o BatchMode=yes -o ConnectTimeout=5 -o StrictHostKeyChecking=no \
        -o UserKnownHostsFile=/dev/null "pi@$address" "${@:2}"
}

# await_boot NAME ...: returns when these machines let somebody log in.
await_boot() {
    local name tries
    for name in "$@"; do
        for ((tries = 0; ; tries++)); do
            on "$name" systemctl is-system-running --wait >/dev/null 2>&1 && break
            [ "$(on "$name" systemctl is-system-running 2>/dev/null)" != degraded ] || break
            [ "$tries" -lt 60 ] || { tail "$scratch/$name/console"; return 1; }
            sleep 1
        done
    done
}
