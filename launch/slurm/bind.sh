#!/bin/bash
# Runs Python on the cores of the mask of this process: CPU_MASKS has one hexadecimal mask for each local rank.

IFS=, read -ra masks <<< "$CPU_MASKS"
if [ "$LOCAL_RANK" -ge ${#masks[@]} ]; then
    echo "bind.sh: CPU_MASKS has ${#masks[@]} masks and none for local rank $LOCAL_RANK: give one for each process" >&2
    exit 2
fi
exec taskset "0x${masks[$LOCAL_RANK]}" python "$@"
