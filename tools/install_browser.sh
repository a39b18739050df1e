#!/bin/sh
# Finds or installs a browser for the tests of the report's page; never fails the build.
# $1: the environment's Python, whose playwright can bring a browser of its own.
present() {
  for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null 2>&1 && return 0
  done
  "$1" - <<'END' 2>/dev/null
import os, sys
from playwright.sync_api import sync_playwright
with sync_playwright() as play:
    sys.exit(not os.path.exists(play.chromium.executable_path))
END
}
present "$1" && exit 0
if [ "$(uname -s)" = Linux ] && command -v apt-get >/dev/null 2>&1; then
  if [ "$(id -u)" = 0 ]; then run=""; else run="sudo -n"; fi
  $run apt-get update -qq >/dev/null 2>&1
  # Ubuntu's package is a wrapper around a snap: there playwright's own is taken below.
  if ! grep -qi '^ID=ubuntu' /etc/os-release 2>/dev/null; then
    $run apt-get install -y -qq --no-install-recommends chromium >/dev/null 2>&1
  fi
  present "$1" || "$1" -m playwright install --with-deps chromium >/dev/null 2>&1
fi
present "$1" || echo "hint: no browser found, so the tests of the report's page will be skipped;" \
  "install one with: $1 -m playwright install --with-deps chromium"
exit 0
