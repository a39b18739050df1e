#!/bin/sh
# Installs OpenBLAS on Linux where apt-get is allowed; elsewhere says how. Never fails the build.
[ "$(uname -s)" = Linux ] || exit 0
present() { ldconfig -p 2>/dev/null | grep -q 'libopenblas\.so\.0'; }
present && exit 0
if command -v apt-get >/dev/null 2>&1; then
  if [ "$(id -u)" = 0 ]; then run=""; else run="sudo -n"; fi
  $run apt-get update -qq >/dev/null 2>&1
  $run apt-get install -y -qq libopenblas0-pthread >/dev/null 2>&1
fi
present || echo "hint: no OpenBLAS found, so matrix products on the CPU will be slow;" \
  "install it with: sudo apt-get install libopenblas0-pthread (Fedora: dnf install openblas-openblas; conda: conda install libopenblas)"
exit 0
