#!/usr/bin/env bash
# Stop the Slurm that start.sh has started in DIR, and its jobs.
dir=$1
export SLURM_CONF="$dir/slurm.conf"
scancel --signal=KILL --full --state=RUNNING --user="$(id -un)" 2>/dev/null
scancel --user="$(id -un)" 2>/dev/null
for _ in $(seq 40); do [ -z "$(squeue -h 2>/dev/null)" ] && break; sleep 0.5; done
for daemon in slurmd ctld munged; do
    pid=$(cat "$dir/$daemon.pid" 2>/dev/null) || continue
    kill "$pid" 2>/dev/null
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
done
exit 0
