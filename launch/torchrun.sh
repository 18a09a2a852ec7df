#!/usr/bin/env bash
# Train with torchrun, on one node or on several: the same command on each of them.
#
#   launch/torchrun.sh CONFIG.yaml key=value ...                                     one node
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node-0 launch/torchrun.sh CONFIG.yaml ...       node 0 of two
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node-0 launch/torchrun.sh CONFIG.yaml ...       node 1 of two
#   NNODES=2 MASTER_ADDR=node-0 launch/torchrun.sh CONFIG.yaml ...                   both, unnumbered
#
# Without arguments it trains the embedded demo. What can be set:
#
#   NPROC_PER_NODE  processes on this node (auto: one per GPU; without GPUs one per CPU core)
#   NNODES          nodes (1); 1:2 = go on with one of two, for nodes without numbers only
#   NODE_RANK       number of this node: with it the nodes are numbered, without it they meet (c10d)
#   MASTER_ADDR     name or address of node 0, where all meet. Nodes without numbers need the name:
#                   torchrun knows the meeting node by its host name
#   MASTER_PORT     a port that is free there (29500)
#   MAX_RESTARTS    how often torchrun itself starts failed processes again (0); see docs/cluster.md
#   RDZV_ID         name of the job, where several jobs meet at one port (sfed)
#
# torchrun's own variables (PET_NNODES, PET_MASTER_ADDR, ..., which Kubeflow sets) go before these.
# On nodes with several networks, name the one to use: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME.
set -euo pipefail

export PET_NNODES=${PET_NNODES:-${NNODES:-1}}
export PET_NPROC_PER_NODE=${PET_NPROC_PER_NODE:-${NPROC_PER_NODE:-auto}}
export PET_MAX_RESTARTS=${PET_MAX_RESTARTS:-${MAX_RESTARTS:-0}}
node_number=${PET_NODE_RANK:-${NODE_RANK:-}}
address=${PET_MASTER_ADDR:-${MASTER_ADDR:-}}
port=${PET_MASTER_PORT:-${MASTER_PORT:-29500}}

if [[ -n ${PET_RDZV_ENDPOINT:-} ]]; then
    : # the platform has said where the nodes meet
elif [[ $PET_NNODES == 1 ]]; then
    export PET_STANDALONE=1 # any free port, so that two jobs on one node do not clash
elif [[ -z $address ]]; then
    echo "torchrun.sh: NNODES=$PET_NNODES needs MASTER_ADDR, the name of node 0" >&2
    exit 2
elif [[ -n $node_number ]]; then
    export PET_NODE_RANK=$node_number PET_MASTER_ADDR=$address PET_MASTER_PORT=$port
else
    export PET_RDZV_BACKEND=c10d PET_RDZV_ENDPOINT=$address:$port PET_RDZV_ID=${RDZV_ID:-sfed}
    # Otherwise a node that comes back waits for an address that the others never publish again.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
fi

# exec: signals of the platform reach torchrun itself, which passes them to its processes.
exec torchrun -m sfed.train "$@"
