#!/bin/bash
# One machine with 8 GPUs. docs/many-processes.md says what happens at a stop, a crash and a restart.
#
# bash recipes/cluster/one-node.sh --config recipes/article-124m.yaml
#
# The options are those of `avatarl train`. Give the same ones again to go on, and another GPUS where that changed.
# Not run on a GPU by us yet.
torchrun \
  --standalone \
  --nproc_per_node "${GPUS:-8}" \
  --max_restarts 3 \
  --shutdown_timeout 240 \
  -m avatarl train "$@" --resume
