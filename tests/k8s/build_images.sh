#!/usr/bin/env bash
# Builds the images of gate, registry and evaluator without a container engine. Runs them as Kubernetes does: as their
# user, without capabilities, on a read-only root with a /tmp. Not part of the suite: it needs root, Debian's packages
# buildah and debootstrap, 5 GB and four minutes.
#
# A minimal Debian stands for the base image, under the name in the Dockerfile. It has a copy of this machine's Python
# 3.11 in /usr/local, which must have been built from source: Debian's 3.11.2 is too old for the evaluator.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-$PWD/build/images}
mkdir -p "$folder"
export BUILDAH_ISOLATION=chroot
engine="buildah --root $folder/storage --runroot $folder/run --storage-driver vfs"

fail() {
    echo "build_images: $1" >&2
    exit 1
}

base=docker.io/library/$(sed -n 's/^FROM \(python:.*\) AS base/\1/p' Dockerfile)
if ! $engine inspect --type image "$base" >/dev/null 2>&1; then
    python=$(python3.11 -c 'import sys; print(sys.base_prefix)')
    [[ $python != /usr ]] || fail 'python3.11 was not built from source'
    debootstrap --variant=minbase --include=ca-certificates,libffi8,libsqlite3-0 bookworm "$folder/base"
    cp -r "$python"/{bin,lib} "$folder/base/usr/local"
    find "$folder"/base/usr/local/lib/python3.11/site-packages -mindepth 1 -maxdepth 1 -not -name 'pip*' -exec rm -r {} +
    sed -i '1s|^#!.*python.*|#!/usr/local/bin/python3|' "$folder"/base/usr/local/bin/pip*
    ln -sf python3 "$folder/base/usr/local/bin/python"
    chroot "$folder/base" ldconfig
    rm -rf "$folder"/base/var/cache/apt/*.bin "$folder"/base/var/cache/apt/archives/*.deb "$folder"/base/var/lib/apt/lists/*
    # The certificate of the package index may come from an authority that only this machine knows.
    cp /etc/ssl/certs/ca-certificates.crt "$folder/base/etc/ssl/certs/"
    container=$($engine from scratch)
    $engine add --quiet "$container" "$folder/base" /
    $engine config --env PATH=/usr/local/bin:/usr/bin:/bin --env PIP_CERT=/etc/ssl/certs/ca-certificates.crt "$container"
    $engine commit --quiet --rm "$container" "$base"
    rm -rf "$folder/base"
fi

make images ENGINE="$engine" IMAGES='gate registry evaluator'
$engine rmi --prune >/dev/null
$engine images

# run COMMAND...: runs it in the container, as the image's config says
run() {
    unshare --mount --pid --fork sh -euc '
        root=$1 release=$2
        shift 2
        mount --bind "$root" "$root"
        mount -o remount,ro,bind "$root"
        mount -t tmpfs tmpfs "$root/tmp"
        mount -t proc proc "$root/proc"
        cp "$release" "$root/tmp/release.tar"
        cd "$root"
        exec chroot "$root" "$@"
    ' sh "$root" "$PWD/examples/digits/digits-v1.tar" \
        setpriv --reuid "${user%:*}" --regid "${user#*:}" --clear-groups --bounding-set=-all --no-new-privs \
        env --ignore-environment "${variables[@]}" "$@"
}

version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' atserving/__init__.py)
for name in gate registry evaluator; do
    container=$($engine from --pull-never "localhost/atserving/$name:$version")
    root=$($engine mount "$container")
    user=$($engine inspect --format '{{.OCIv1.Config.User}}' "$container")
    mapfile -t variables < <($engine inspect --format '{{range .OCIv1.Config.Env}}{{.}}{{"\n"}}{{end}}' "$container")
    mapfile -t entrypoint < <($engine inspect --format '{{range .OCIv1.Config.Entrypoint}}{{.}}{{"\n"}}{{end}}' "$container")
    echo "--- $name: ${entrypoint[*]}"
    run "${entrypoint[@]}" --help | grep "^Usage: $name" || fail "$name --help"
    run id --user | grep -x 10001 || fail "$name is not the user 10001"
    ! run touch /opt/atserving/new || fail "$name can write to its root"
    ! run sh -c 'command -v cc gcc c++ ld make' || fail "$name has a compiler"
    case $name in
        gate)
            said=$(run "${entrypoint[@]}" --wait 0.5 2>&1) || true
            [[ $said == *'gate: no config within 0.5 s'* ]] || fail "gate: $said"
            ;;
        evaluator) run "${entrypoint[@]}" check /tmp/release.tar || fail "$name check" ;;
    esac
    $engine rm "$container" >/dev/null
done
echo 'All images build and run.'
