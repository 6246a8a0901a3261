#!/usr/bin/env bash
# A Chromium for the tests of the page: the one that is there, else Debian's where we may install, else Playwright's own.
# Without any, those tests are skipped and say so; so this never fails.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}

found() { PYTHONPATH=tools "$python" -c "import sys, chromium; path = chromium.chromium_path(); print(path or ''); sys.exit(path is None)"; }

found && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing chromium with apt-get"
    apt-get update -q >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends chromium >/dev/null
    found && exit 0
fi
echo "asking playwright for a chromium"
timeout 300 "$python" -m playwright install chromium --no-shell >/dev/null 2>&1
found || echo "no Chromium could be had: the tests of the page will be skipped (CHROMIUM=/path/to/one names one)"
exit 0
