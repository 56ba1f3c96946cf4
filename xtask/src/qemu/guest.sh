# The guest's first process: brings up what a booted Debian has, runs the tests, turns the machine off.
#
# The first serial line is the console, for a person who looks for what went wrong. The second is read by `cargo xtask`:
# the test programs' own lines, and between them those that begin with `guest: `. The calls of `part` follow this file.

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
stty -F /dev/ttyS1 raw -echo
exec 3>/dev/ttyS1

mounted() { mountpoint -q "$1"; }
mounted /proc || mount -t proc proc /proc
mounted /sys || mount -t sysfs sysfs /sys
mounted /dev || mount -t devtmpfs devtmpfs /dev
mounted /run || mount -t tmpfs -o mode=755,nosuid,nodev tmpfs /run
mkdir -p /dev/pts /dev/shm
mounted /dev/pts || mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mounted /dev/shm || mount -t tmpfs -o nosuid,nodev tmpfs /dev/shm
# As systemd mounts it, and nothing of version 1 beside it.
mount -t cgroup2 -o nosuid,nodev,noexec,nsdelegate,memory_recursiveprot cgroup2 /sys/fs/cgroup
echo '+cpu +memory +pids' >/sys/fs/cgroup/cgroup.subtree_control
mount --make-rshared /
# As udev makes it.
modprobe tun && chmod 666 /dev/net/tun
ip link set lo up
hostname guest
# It stays on the disk: a tmpfs maps no owners before Linux 6.3.
chmod 1777 /tmp

echo "guest: up $(uname -r)" >&3

# part NAME USER ARGUMENT…: runs the tests that the arguments choose, as a user; those of another program than the first
# where TESTS says so.
part() {
    local name=$1 user=$2 skips=/tmp/skips-$1 group=/sys/fs/cgroup/part-$1 as=()
    shift 2
    install -m 666 /dev/null "$skips"
    mkdir "$group"
    if [ "$user" != 0 ]; then
        # What systemd gives to a user: the group, and what moves processes in it and controllers below it.
        chown "$user:$user" "$group" "$group"/cgroup.{procs,threads,subtree_control}
        install -d -m 700 -o "$user" -g "$user" "/run/user-$user"
        as=(env "XDG_RUNTIME_DIR=/run/user-$user" setpriv --reuid "$user" --regid "$user" --clear-groups --)
    fi
    echo "guest: begin $name" >&3
    (
        cd / && echo "$BASHPID" >"$group/cgroup.procs"
        SEALCI_SKIPS=$skips HOME=/tmp exec "${as[@]}" "${TESTS:-/sealci/tests}" --color=never "$@" >&3 2>&1 3>&-
    )
    local status=$?
    sed 's/^/guest: skipped /' "$skips" >&3
    echo "guest: end $name $status" >&3
}

