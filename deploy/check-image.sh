#!/bin/sh
# Builds the image as `make image` does, on a base that is made here of Debian's packages, and runs from it what runs first on
# a node: the DaemonSet's init containers, twice, and the programs' --help. Needs root, buildah and debootstrap, Debian's
# packages and PyPI. All it makes lies below a temporary directory, which goes at the end.
#
#   deploy/check-image.sh [ROOT]        ROOT: a directory that debootstrap has filled before; it is left alone
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export BUILDAH_ISOLATION=chroot
storage="--root $work/storage --runroot $work/run --storage-driver vfs"
run() { buildah $storage run --volume "$work/bin:/host/bin" --volume "$work/net.d:/host/net.d" --volume "$work/configuration:/configuration:ro" \
  --volume "$work/state:/var/lib/podwire" --volume "$work/cni:/var/lib/cni:ro" "$container" -- "$@"; }

mkdir -p "$work/bin" "$work/net.d" "$work/configuration" "$work/state" "$work/cni/networks/cbr0"

echo "a base of Debian's packages"
root=${1:-$work/root}
[ -d "$root" ] || debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" >"$work/log" 2>&1 ||
  { tail "$work/log"; exit 1; }
container=$(buildah $storage from scratch)
buildah $storage add --quiet "$container" "$root" / >/dev/null
buildah $storage commit --quiet "$container" localhost/base >/dev/null
rm -rf "$work/root"

echo "the image"
make --no-print-directory image BUILDER="buildah $storage" BASE=localhost/base IMAGE=localhost/podwire \
  IMAGE_FLAGS="--quiet --volume /etc/ssl/certs:/etc/ssl/certs:ro" >"$work/log" 2>&1 || { tail -30 "$work/log"; exit 1; }
container=$(buildah $storage from localhost/podwire)

echo "its programs"
for command in "" cluster-agent proxy cni ipam; do run podwire $command --help >/dev/null; done
run iptables --version

echo "a node's first containers"
printf '%s\n%s' 0123456789abcdef eth0 >"$work/cni/networks/cbr0/10.244.1.7"
script='import sys, yaml
document = next(d for d in yaml.safe_load_all(sys.stdin) if d["kind"] == sys.argv[1])
if sys.argv[1] == "ConfigMap":
    print(document["data"][sys.argv[2]])
else:
    print(next(c for c in document["spec"]["template"]["spec"]["initContainers"] if c["name"] == sys.argv[2])["command"][2])'
run /opt/podwire/bin/python -c "$script" ConfigMap 05-podwire.conflist <deploy/kubernetes/agent/configuration.yaml >"$work/configuration/05-podwire.conflist"
for round in first second; do
  for name in install take-over; do
    run sh -ec "$(run /opt/podwire/bin/python -c "$script" DaemonSet $name <deploy/kubernetes/agent/daemonset.yaml)"
  done
done

echo "what they installed"
for plugin in podwire loopback; do CNI_COMMAND=VERSION "$work/bin/$plugin" </dev/null; done
cmp "$work/configuration/05-podwire.conflist" "$work/net.d/05-podwire.conflist"
test "$(ls -A "$work/bin" | wc -l)" = 2 && test "$(ls -A "$work/net.d" | wc -l)" = 1 # nothing half-made is left
run podwire ipam ls --state-dir /var/lib/podwire/cluster | tee "$work/log"
grep -q 10.244.1.7 "$work/log"
echo "the image is right"
