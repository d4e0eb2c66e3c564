"""Which process of a training this is, as long as no trainer is there that knows it.

A training on several devices is one process each: started by torchrun or srun all at once, or by Lightning, which
starts the command again for every further device. All of them read; only rank 0 owns and writes the run directory.
"""

from __future__ import annotations

import os

NUMBERS = ("NODE_RANK", "GROUP_RANK", "LOCAL_RANK", "SLURM_PROCID")
"""Set by Lightning, torchrun or Slurm; any that is not 0 belongs to another process than rank 0."""


def is_rank_zero() -> bool:
    """Whether this process is the only one, or the first of several."""
    if "RANK" in os.environ:  # torchrun's, over all nodes
        return int(os.environ["RANK"]) == 0
    return all(int(os.environ.get(name) or 0) == 0 for name in NUMBERS)
