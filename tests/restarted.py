"""What ``torchrun`` starts in the test of restarts: a loop, one of whose ranks is killed once."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import distributed_programs as programs
import torch
import torch.distributed as dist

import hypergrad as hg

OUTER_STEPS, KILLED_AT, KILLED_RANK = 6, 3, 1


def join(folder: Path) -> None:
    """Join the other ranks as the example does, by a file of this attempt's own."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    attempt = f"{os.environ['TORCHELASTIC_RUN_ID']}-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{attempt}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


class Killed(hg.bilevel.Callback):
    """SIGKILL in the middle of a run that was not restarted."""

    def on_step(self, solver: Any, record: Any) -> None:
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and record.step == KILLED_AT and dist.get_rank() == KILLED_RANK:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    join(folder)
    callbacks = [hg.bilevel.Checkpoint(folder), Killed()]
    params = programs.start()
    solver, hparams = programs.loop_solver(dist.group.WORLD, "cg", OUTER_STEPS, params, callbacks)
    resumed = solver.outer_step if solver.resume(folder) else None
    solver.run()
    if dist.get_rank() == 0:
        end = {"params": params, "hparams": hparams.detach(), "resumed": resumed}
        torch.save(end, folder / "end.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
