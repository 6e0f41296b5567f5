"""Hypergradients over the ranks of ``torch.distributed``: replicated, sharded, or task by task."""

from hypergrad.distributed.data_parallel import DataParallel
from hypergrad.distributed.ranks import map_tasks
from hypergrad.distributed.whole_module import WholeModule
from hypergrad.errors import DistributedError

__all__ = ["DataParallel", "DistributedError", "WholeModule", "map_tasks"]
