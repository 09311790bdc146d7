#!/usr/bin/env bash
# Start a Slurm of one node on this machine, as root; everything it writes is in the folder DIR.
#   bash tests/slurm/start.sh DIR; export SLURM_CONF=DIR/slurm.conf; sinfo; ...; bash tests/slurm/stop.sh DIR
# It has its own key, socket and ports, so that it meets no other Slurm.
set -euo pipefail
dir=$(mkdir -p "$1" && cd "$1" && pwd)
host=$(hostname -s)
mkdir -p "$dir"/{state,spool,log,munge}
chmod 700 "$dir/munge"

dd if=/dev/urandom of="$dir/munge/key" bs=1024 count=1 status=none
chmod 600 "$dir/munge/key"
munged --force --key-file="$dir/munge/key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed"

cpus=$(nproc --all)    # without --all it heeds OMP_NUM_THREADS
[ "$cpus" -ge 2 ] || cpus=2

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
cat > "$dir/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/ctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/log/ctld.log
SlurmdLogFile=$dir/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
KillWait=15
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF

export SLURM_CONF="$dir/slurm.conf"
slurmctld
slurmd
for _ in $(seq 30); do
    sinfo -h -o %T 2>/dev/null | grep -q idle && exit 0
    sleep 1
done
echo "Slurm did not start; the logs are in $dir/log" >&2
exit 1
