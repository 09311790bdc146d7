#!/usr/bin/env bash
# Install what the tests of the page need: Chromium (Debian, Ubuntu; as root) and axe-core, the checker of accessibility
# (npm; MPL-2.0, not kept here). Says why where that is not possible; never fails, for the tests are skipped then.
cd "$(dirname "$0")"
log=$(mktemp)
if ! command -v chromium >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    if [ "$(id -u)" != 0 ]; then echo "Chromium is not installed: not root"
    elif ! command -v apt-get >/dev/null; then echo "Chromium is not installed: no apt-get"
    elif (timeout 120 apt-get update -q &&
        timeout 400 apt-get install -y -q -o DPkg::Lock::Timeout=200 --no-install-recommends chromium) >"$log" 2>&1
    then echo "Chromium is installed"
    else echo "Chromium is not installed: $(grep -m1 '^E:' "$log" || tail -n1 "$log")"
    fi
fi
if [ ! -f node_modules/axe-core/axe.min.js ]; then
    if ! command -v npm >/dev/null; then echo "axe-core is not installed: no npm"
    elif timeout 120 npm install --prefix . --no-save --no-package-lock --no-audit --no-fund axe-core@4 >"$log" 2>&1
    then echo "axe-core is installed"
    else echo "axe-core is not installed: $(tail -n1 "$log")"
    fi
fi
rm -f "$log"
