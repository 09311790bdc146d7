#!/usr/bin/env bash
# Install Slurm's packages where that is possible (Debian, Ubuntu; as root). Says why where it is not; never fails.
command -v slurmctld slurmd munged >/dev/null && exit 0
[ "$(id -u)" = 0 ] || { echo "Slurm is not installed: not root"; exit 0; }
command -v apt-get >/dev/null || { echo "Slurm is not installed: no apt-get"; exit 0; }
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
if (timeout 120 apt-get update -q && timeout 240 apt-get install -y -q --no-install-recommends slurm-wlm munge) >"$log" 2>&1
then echo "Slurm is installed"
else echo "Slurm is not installed: $(grep -m1 '^E:' "$log" || tail -n1 "$log")"
fi
rm -f "$log"
