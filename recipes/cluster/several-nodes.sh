#!/bin/bash
# Several machines of 8 GPUs: the same command on each of them, within ten minutes. The repository's folder (the run,
# the prepared data, the critic) is one that all of them see under the same path.
#
# HEAD=node1 NODES=2 RUN=article-124m bash recipes/cluster/several-nodes.sh --config recipes/article-124m.yaml
#
# HEAD is the name or address of one of the machines, as all of them know it; port 29400 of it has to be open to them.
# RUN is any name, the same on all. Not run on several machines by us yet.
torchrun \
  --nnodes "${NODES:?how many machines}" \
  --nproc_per_node "${GPUS:-8}" \
  --rdzv_backend c10d \
  --rdzv_endpoint "${HEAD:?one of the machines}:29400" \
  --rdzv_id "${RUN:?a name, the same on all machines}" \
  --max_restarts 3 \
  --shutdown_timeout 240 \
  -m avatarl train "$@" --resume
