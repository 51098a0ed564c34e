#!/usr/bin/env bash
# One run on every GPU of this machine, or of several:
#
#     launch/torchrun.sh configs/audiollm.yaml [--KEY VALUE …]
#     NNODES=2 HEAD=node-0 launch/torchrun.sh configs/audiollm.yaml      # the same on each of the two machines
#
# It goes on from the run's last checkpoint when there is one, so that the same command starts a run and starts it
# again.
#
#     RUN_DIR         the run's folder, which all machines must see; by default runs/NAME of the config
#     NPROC_PER_NODE  processes on a machine; by default one for each of its GPUs
#     NNODES, HEAD    number of machines, and the name of the one that the others find each other at
#     PORT            of HEAD; 29500 by default
#     JOB_ID          the same on all machines, another for every job that shares HEAD
set -euo pipefail

if [[ $# -eq 0 || $1 == -* ]]; then
    echo "usage: launch/torchrun.sh CONFIG [--KEY VALUE …]" >&2
    exit 2
fi
config=$1
shift
name=$(basename "$config")
run_dir=${RUN_DIR:-runs/${name%.*}}

resume=
# Every machine looks before the first step, so that all come to the same answer. The half-written begin with a dot.
if compgen -G "$run_dir/checkpoints/*-*" > /dev/null; then
    resume=--resume
fi

if [[ ${NNODES:-1} == 1 ]]; then
    place=(--standalone)
else
    meeting=${HEAD:?names the first machine}:${PORT:-29500}
    place=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-endpoint="$meeting" --rdzv-id="${JOB_ID:-ultravox}")
fi

# On SIGTERM torchrun passes it on and waits this long for the checkpoint (30 s by default). `exec`: the signal reaches
# it.
exec torchrun "${place[@]}" --nproc-per-node="${NPROC_PER_NODE:-gpu}" --shutdown-timeout="${SHUTDOWN_SECONDS:-110}" \
    -m ultravox train "$config" --run_dir "$run_dir" ${resume:+"$resume"} "$@"
