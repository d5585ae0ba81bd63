#!/bin/bash
# Checks the lab itself.  usage: test-lab.sh [TEST...]   (default: all; -l lists them)
# ROUNDS (default: 5) is how often test_cycle goes up and down.
# shellcheck disable=SC2016  # single quotes: those commands are for the shell inside a node
set -Eeuo pipefail

here=$(cd "$(dirname "$0")" && pwd)
base=selftest$$
export LAB_NAME=$base
scratch=$(mktemp -d)

lab() { "$here/lab" "$@"; }
on() {
    local node=$1
    shift
    lab exec "$node" -- "$@"
}
die() {
    echo "FAILED: $*" >&2
    exit 1
}
# await SECONDS DESCRIPTION COMMAND...
await() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        ((SECONDS < deadline)) || die "timeout: $what"
        sleep 0.2
    done
}
refute() { ! "$@"; }
pings() { on "$1" ping -c 1 -W 1 "$2" >/dev/null 2>&1; }
has_quorum() { on "$1" crm_mon -1 2>/dev/null | grep 'partition with quorum' >/dev/null; }
online() { on "$1" crm_mon -1 2>/dev/null | grep "Online: \[.* $2 .*\]" >/dev/null; }
runs_somewhere() { on "$1" crm_resource --resource "$2" --locate 2>/dev/null | grep 'on:' >/dev/null; }
event() { lab events | grep "$1" >/dev/null; }

cleanup() {
    lab down || true
    lab down --name "$base-b" || true
    rm -rf "$scratch"
}
trap cleanup EXIT
trap 'echo "FAILED: line $LINENO: $BASH_COMMAND" >&2' ERR

# What a lab could leave behind: its processes, mounts, links, loop devices, cgroups, files.
leftovers() {
    pgrep -af "labd.py|labnode.py|labdelay.py" | grep "$base" || true
    grep "$base" /proc/mounts || true
    ip -o link | grep -E 'alice|bob|charlie' || true
    losetup --all | grep "$base" || true
    find /sys/fs/cgroup -maxdepth 3 -name "lab-$base*" || true
    ls -d "/run/lab/$base"* "/var/tmp/lab/$base"* 2>/dev/null || true
    lsns -o NS,COMMAND 2>/dev/null | grep "$base" || true
}
assert_clean() {
    local found
    found=$(leftovers)
    [[ -z $found ]] || die "left behind: $found"
}

test_cycle() {
    local i made number
    for ((i = 1; i <= ${ROUNDS:-5}; i++)); do
        lab up -n 3 --disks 3
        lab up -n 3 >/dev/null # again: nothing to do
        [[ $(lab status | grep -c 'DC .*, quorum, online alice,bob,charlie') == 3 ]]
        made=$(python3 -c 'import json, sys; print(*json.load(sys.stdin)["loops_created"])' \
            <"/run/lab/$LAB_NAME/run.json")
        lab down
        lab down # again: nothing to do
        assert_clean
        for number in $made; do # gone, or in use by somebody else meanwhile
            [[ ! -e /sys/block/loop$number || -e /sys/block/loop$number/loop/backing_file ]] ||
                die "loop device $number left"
        done
    done
}

test_isolation() {
    local path capabilities
    lab up -n 2
    [[ $(on alice hostname) == alice && $(on bob uname -n) == bob ]]
    [[ $(on alice cat /proc/1/comm) == lab-init ]]
    on alice touch /etc/only-alice /tmp/only-alice /dev/shm/only-alice /run/only-alice
    for path in /etc /tmp /dev/shm /run; do
        refute on bob test -e $path/only-alice
        refute test -e $path/only-alice
    done
    # Nothing in a node may act on the whole machine.
    refute on alice sh -c 'echo 1 > /proc/sys/vm/drop_caches' 2>/dev/null
    on alice sh -c 'test ! -e /proc/sysrq-trigger || test "$(stat -c %t:%T /proc/sysrq-trigger)" = 1:3'
    capabilities=$(on alice sed -n 's/^CapEff:\t*//p' /proc/self/status)
    (((0x$capabilities & (1 << 25 | 1 << 16)) == 0)) || die "exec keeps CAP_SYS_TIME"
    capabilities=$(on alice sh -c 'sed -n "s/^CapEff:\t*//p" /proc/$(pidof pacemakerd)/status')
    (((0x$capabilities & (1 << 25 | 1 << 16)) == 0)) || die "services keep CAP_SYS_TIME"
    local status=0
    on alice sh -c 'exit 7' || status=$?
    [[ $status == 7 ]]
    [[ $(echo input | on alice cat) == input ]]
    [[ $(lab exec -e COLOUR=green alice -- printenv COLOUR) == green ]]
    lab down
}

test_bind() {
    mkdir "$scratch/shared" "$scratch/fixed"
    lab up -n 2 --no-cluster --bind "$scratch/shared:/srv/shared" --bind "$scratch/fixed:/srv/fixed:ro"
    on alice sh -c 'echo hello > /srv/shared/file'
    [[ $(on bob cat /srv/shared/file) == hello && $(cat "$scratch/shared/file") == hello ]]
    refute on alice touch /srv/fixed/file 2>/dev/null
    lab down
    [[ -e $scratch/shared/file ]] || die "down removed a shared file"
}

test_persistence() {
    lab up -n 3
    on bob sh -c 'echo kept > /root/file; echo lost > /tmp/file; echo kept > /srv/file'
    on bob crm_attribute --name lab-test --update stays >/dev/null
    lab kill bob
    refute on bob true 2>/dev/null
    await 10 "alice notices" refute online alice bob
    lab start bob
    lab wait >/dev/null
    [[ $(on bob cat /root/file) == kept ]]
    refute on bob test -e /tmp/file
    lab down --keep
    assert_files_kept
    lab up >/dev/null
    [[ $(on bob cat /srv/file) == kept ]]
    [[ $(on charlie crm_attribute --name lab-test --query --quiet) == stays ]]
    lab stop bob
    event "bob: shut down"
    lab down
    assert_clean
}
assert_files_kept() {
    [[ -d /var/tmp/lab/$base/nodes/bob && ! -e /run/lab/$base ]] || die "files not kept"
    [[ -z $(losetup --all | grep "$base" || true) ]] || die "loop device left"
}

test_disks() {
    lab up -n 2 --no-cluster --disks 2 --disk-size 64M
    on alice sh -c 'mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt'
    on alice sh -c 'echo synced > /mnt/a && sync /mnt/a && sync -f /mnt'
    on alice sh -c 'echo unsynced > /mnt/b'
    on alice sh -c 'printf raw | dd of=/dev/vdc conv=fsync status=none'
    [[ $(on bob head -c 3 /dev/vdc | tr -d '\0' | wc -c) == 0 ]] || die "bob sees alice's disk"
    lab kill alice
    event "alice: lost unwritten data of /mnt"
    lab start alice
    on alice mount /dev/vdb /mnt
    [[ $(on alice cat /mnt/a) == synced ]]
    refute on alice test -s /mnt/b
    [[ $(on alice head -c 3 /dev/vdc) == raw ]]
    lab down
    lab up -n 1 --no-cluster --disk-kind file
    on alice sh -c 'echo x > /srv/disks/disk0.img'
    lab down
    assert_clean
}

# A program of the node serves a FUSE file, with a loop device and a busy file system on top.
test_fuse() {
    fuse_survives cut
    fuse_survives reboot
}
# fuse_survives cut|reboot: how the node ends.
fuse_survives() {
    local number
    lab up -n 1 --no-cluster --disk-size 64M
    on alice bash -s <<'NODE' >"$scratch/number"
set -e
touch /tmp/export
qemu-storage-daemon --daemonize \
    --blockdev driver=host_device,node-name=disk,filename=/dev/vdb,cache.direct=on \
    --blockdev driver=raw,node-name=raw,file=disk \
    --export type=fuse,id=export,node-name=raw,mountpoint=/tmp/export,writable=on
number=$(losetup -f | tr -dc 0-9)
mknod /dev/replica b 7 "$number"
losetup /dev/replica /tmp/export
echo "$number"
mkfs.ext4 -q /dev/replica
mount /dev/replica /mnt
echo synced > /mnt/a
sync
echo unsynced > /mnt/b
(while dd if=/dev/zero of=/mnt/c bs=4k count=100 conv=fsync status=none; do :; done) &> /dev/null &
NODE
    if [[ $1 == cut ]]; then
        lab kill alice
    else # a Pacemaker that panics does this
        on alice python3 -c 'import ctypes; ctypes.CDLL(None).reboot(0x01234567)' || true
        await 5 "alice reboots" event "alice: reboots itself"
    fi
    number=$(cat "$scratch/number")
    await 5 "loop device over a dead FUSE file detached" refute test -e "/sys/block/loop$number/loop"
    [[ $1 == reboot ]] || lab start alice
    await 10 "alice runs again" on alice true 2>/dev/null
    on alice mount /dev/vdb /mnt
    [[ $(on alice cat /mnt/a) == synced ]]
    refute on alice test -s /mnt/b
    lab down
    assert_clean
}

test_partition() {
    lab up -n 3
    lab partition --net repl alice bob,charlie
    pings alice bob
    refute pings alice bob-repl
    sleep 3
    has_quorum alice && online alice charlie
    lab heal
    pings alice bob-repl
    lab partition alice,bob '|' charlie
    lab wait alice,bob >/dev/null
    await 10 "charlie loses quorum" refute has_quorum charlie
    refute pings bob charlie
    pings alice bob
    lab heal
    lab wait >/dev/null
    lab partition --net repl --one-way alice bob
    refute pings alice bob-repl
    pings bob charlie-repl
    lab down
}

test_links() {
    lab up -n 2 --no-cluster
    local time
    time=$(on alice ping -c 3 -q bob-repl | sed -n 's/^rtt.*= [^/]*\/\([0-9]*\)\..*/\1/p')
    ((time < 5)) || die "plain round trip takes $time ms"
    lab link alice --net repl --delay 20
    time=$(on alice ping -c 3 -q bob-repl | sed -n 's/^rtt.*= [^/]*\/\([0-9]*\)\..*/\1/p')
    ((time >= 40 && time < 60)) || die "round trip with 20 ms each way takes $time ms"
    lab link alice --net repl --reset --rate 8mbit
    time=$(transfer 2000000)
    ((time > 1500 && time < 4000)) || die "2 MB at 8 Mbit/s took $time ms"
    lab link alice --net repl --reset --delay 5
    time=$(transfer 20000000)
    ((time < 4000)) || die "20 MB with 5 ms delay took $time ms"
    lab link alice --net repl --reset --loss 100
    refute pings alice bob-repl
    pings alice bob
    lab link alice --net repl --reset --down
    on alice sh -c 'ip link show eth1 | grep NO-CARRIER' >/dev/null
    lab link alice --net repl --up
    await 5 "cable plugged in again" pings alice bob-repl
    lab link alice --net repl --delay 20
    lab kill alice
    lab start alice
    pings alice bob-repl
    time=$(on alice ping -c 3 -q bob-repl | sed -n 's/^rtt.*= [^/]*\/\([0-9]*\)\..*/\1/p')
    ((time >= 40)) || die "the delay was lost over a reboot"
    lab down
    assert_clean
}
# transfer BYTES: milliseconds to send BYTES from alice to bob over the replication network.
transfer() {
    on bob python3 -c '
import socket
s = socket.create_server(("0.0.0.0", 9000))
c, _ = s.accept()
while c.recv(1 << 16): pass
c.close()' &
    local server=$!
    await 5 "server" on bob sh -c 'ss -ltn | grep :9000' >/dev/null
    on alice python3 -c '
import socket, sys, time
t = time.time()
c = socket.create_connection(("bob-repl", 9000))
c.sendall(bytes(int(sys.argv[1])))
c.shutdown(socket.SHUT_WR)
c.recv(1)
print(int((time.time() - t) * 1000))' "$1"
    wait "$server"
}

test_freeze() {
    lab up -n 3
    lab freeze charlie
    await 10 "charlie gone" refute online alice charlie
    refute on charlie true 2>/dev/null
    lab thaw charlie
    lab wait >/dev/null
    lab freeze charlie
    lab kill charlie
    lab start charlie
    lab wait >/dev/null
    lab down
}

test_fencing() {
    lab up -n 3 --stonith
    [[ $(on alice fence_lab -o list | wc -l) == 3 ]]
    on alice fence_lab -o status -n bob | grep 'Status: ON' >/dev/null
    on alice stonith_admin --reboot charlie --timeout 20
    event "charlie: fence reboot done for"
    lab wait >/dev/null
    # A frozen node is fenced and comes back.
    lab freeze bob
    await 15 "bob fenced" event "bob: fence reboot done for"
    lab wait alice,bob,charlie >/dev/null
    # A node that is cut off is fenced by the others.
    lab partition alice
    await 15 "alice fenced" event "alice: fence reboot done for"
    lab heal
    lab wait alice,bob,charlie >/dev/null
    # A fence device that fails.
    lab fencing fail bob
    refute on alice stonith_admin --reboot bob --timeout 5 2>/dev/null
    lab fencing ok
    # Power off and on by hand.
    on alice stonith_admin --fence bob --timeout 20
    lab status --brief | grep 'bob  *off' >/dev/null
    on alice stonith_admin --unfence bob --timeout 20 || on alice fence_lab -o on -n bob
    lab wait alice,bob,charlie >/dev/null
    lab down
}

test_reboot() {
    lab up -n 3 --stonith
    # A reboot from inside ends the node only.
    on alice python3 -c 'import ctypes; ctypes.CDLL(None).reboot(0x01234567)' || true
    await 5 "alice reboots" event "alice: reboots itself"
    lab wait alice,bob,charlie >/dev/null
    # A pacemaker panic does the same.
    on bob sh -c 'echo PCMK_fail_fast=yes >> /etc/default/pacemaker'
    lab cluster stop bob
    await 20 "stack stopped" on bob sh -c '! pidof corosync pacemakerd >/dev/null'
    lab cluster start bob
    lab wait >/dev/null
    on bob pkill -KILL pacemaker-contr
    await 10 "bob panics" event "bob: reboots itself"
    lab wait alice,bob,charlie >/dev/null
    lab down
}

test_systemd() {
    lab up -n 3 --stonith --init systemd
    [[ $(on alice systemctl is-system-running) == running ]]
    printf '[Service]\nExecStart=/bin/sleep 1d\n' |
        on alice tee /etc/systemd/system/sleeper.service >/dev/null
    for node in bob charlie; do
        on alice cat /etc/systemd/system/sleeper.service |
            on $node tee /etc/systemd/system/sleeper.service >/dev/null
    done
    on alice crm configure primitive sleeper systemd:sleeper op monitor interval=5s
    await 15 "systemd resource" runs_somewhere alice sleeper
    lab kill alice
    await 15 "alice fenced" event "alice: fence reboot done for"
    lab wait alice,bob,charlie >/dev/null
    await 15 "systemd resource" runs_somewhere bob sleeper
    lab cluster stop bob
    refute on bob systemctl is-active --quiet pacemaker
    lab cluster start bob
    lab wait >/dev/null
    on charlie systemctl reboot || true
    await 20 "charlie reboots" event "charlie: reboots itself"
    lab wait alice,bob,charlie >/dev/null
    lab stop bob
    event "bob: shut down"
    lab start bob
    lab freeze bob
    lab kill bob
    lab down
}

test_agents() {
    lab up -n 1
    on alice ocf-tester -n d /usr/lib/ocf/resource.d/heartbeat/Dummy >/dev/null
    on alice ocf-tester -n s /usr/lib/ocf/resource.d/heartbeat/Stateful >/dev/null
    on alice crm configure property stonith-enabled=false
    on alice crm configure primitive ip ocf:heartbeat:IPaddr2 params ip=10.43.70.99 op monitor interval=5s
    await 15 "address" on alice sh -c 'ip address show eth0 | grep 10.43.70.99' >/dev/null
    on alice sh -c 'mkfs.ext4 -q /dev/vdb'
    on alice crm configure primitive fs ocf:heartbeat:Filesystem \
        params device=/dev/vdb directory=/mnt fstype=ext4 op monitor interval=5s
    await 15 "file system" on alice mountpoint -q /mnt
    lab down
}

test_parallel() {
    lab up -n 3 >"$scratch/a" &
    local first=$!
    lab up -n 3 --name "$base-b" >"$scratch/b"
    wait "$first"
    cat "$scratch/a" "$scratch/b"
    on alice touch /root/a
    refute lab exec --name "$base-b" alice -- test -e /root/a
    lab kill alice
    [[ $(lab status --json --name "$base-b" | grep -c '"power": "on"') == 3 ]]
    lab down
    lab wait --name "$base-b" >/dev/null
    lab down --name "$base-b"
    assert_clean
}

test_crash() {
    # The supervisor is killed: the nodes die with it, and down removes the rest.
    lab up -n 3 --disks 4
    local pid
    pid=$(lab status --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["pid"])')
    kill -KILL "$pid"
    sleep 1
    refute lab status >/dev/null
    lab down
    assert_clean
    lab up -n 2
    pid=$(lab status --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["pid"])')
    kill -KILL "$pid"
    lab up # after a crash: starts again with the same files
    lab down
    assert_clean
}

mapfile -t all < <(declare -F | sed -n 's/^declare -f test_//p')
if [[ ${1:-} == -l ]]; then
    printf '%s\n' "${all[@]}"
    exit
fi
(($#)) || set -- "${all[@]}"
for name; do
    began=$SECONDS
    echo "== $name"
    "test_$name"
    assert_clean
    echo "== $name passed in $((SECONDS - began)) s"
done
echo "PASSED: $*"
