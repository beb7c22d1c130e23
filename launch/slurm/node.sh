#!/bin/bash
# What srun starts once on each node of a job of launch/slurm/train.sbatch: accelerate launch with the processes of this
# node. Ends with 75 if it was asked to stop, by which the batch script tells that from a failure.

set -u
cd "$SLURM_SUBMIT_DIR" || exit 2  # a container may start elsewhere

# When a run is stopped the first node's launcher ends before the others, which print their lost connections as C++ stacks.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}

num_processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
options=(
    --config_file "${CONFIG:-launch/accelerate/ddp.yaml}"
    # These win over the numbers in the file, so that each file for one machine works here too.
    --num_machines "$SLURM_NNODES"
    --num_processes $((SLURM_NNODES * num_processes))
    --machine_rank "$SLURM_NODEID"
    --main_process_ip "$HEAD_ADDRESS"
    --main_process_port "$HEAD_PORT"
    # No --same_network: Accelerate would then give static rendezvous' options, and c10d would wait on localhost.
    --rdzv_backend "${RDZV_BACKEND:-c10d}"
    # The first node keeps the store, said outright: c10d compares names otherwise, and on many clusters none is it.
    --rdzv_conf "is_host=$((SLURM_NODEID == 0)),join_timeout=600"
    # For DeepSpeed. Without it Accelerate starts pdsh, which logs in to the other nodes by ssh.
    --deepspeed_multinode_launcher standard
)
program=(launch/train.py)
# CPU_MASKS binds each process to the cores beside its GPU; srun could only bind the one task of the node.
[ -n "${CPU_MASKS:-}" ] && program=(--no_python launch/slurm/bind.sh launch/train.py)

asked_to_stop=
# From the shell of the batch script or from --signal. The launcher would die of it without a word to its processes: it
# ignores it, and gets SIGTERM, which it passes on.
trap 'asked_to_stop=yes; kill -TERM $launcher' USR1
# From SLURM, at a preemption. The launcher has got it as well, and a second one would end its patience.
trap 'asked_to_stop=yes' TERM
(trap '' USR1; exec accelerate launch "${options[@]}" "${program[@]}" "$@") &
launcher=$!
status=0
while kill -0 $launcher 2>/dev/null; do  # a trap ends wait as well
    wait $launcher
    status=$?
done
[ $status -ne 0 ] && [ -n "$asked_to_stop" ] && exit 75
exit $status
