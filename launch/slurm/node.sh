#!/bin/bash
# What srun starts once on each node of a job of launch/slurm/train.sbatch: accelerate launch for the processes of this
# node. It takes this shell's place, so that SIGTERM comes to it; it passes that on and waits for its processes.

set -u
cd "$SLURM_SUBMIT_DIR" || exit 2  # a container may start elsewhere

# When a run is stopped one launcher ends before the others, which print their lost connections as C++ stacks.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}

rdzv_backend=${RDZV_BACKEND:-c10d}
# On one node Accelerate gives c10d no address, so that all jobs there would meet at its default port.
[ "$SLURM_NNODES" -eq 1 ] && rdzv_backend=static
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
    --rdzv_backend "$rdzv_backend"
    # The first node keeps the store, said outright: c10d compares names otherwise, and on many clusters none is it.
    --rdzv_conf "is_host=$((SLURM_NODEID == 0)),join_timeout=600"
    # For DeepSpeed. Without it Accelerate starts pdsh, which logs in to the other nodes by ssh.
    --deepspeed_multinode_launcher standard
)
program=(launch/train.py)
# CPU_MASKS binds each process to the cores beside its GPU; srun could only bind the one task of the node.
[ -n "${CPU_MASKS:-}" ] && program=(--no_python launch/slurm/bind.sh launch/train.py)

exec accelerate launch "${options[@]}" "${program[@]}" "$@"
