"""A training as torchrun starts it, which goes on from its last checkpoint; on the first start a rank is killed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from distributed.runs import Training

STEPS, DIES_AT = 8, 5


def main(folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    training = Training(name, ranks, rank)
    parts = {"net": training.net, "balancer": training.balancer, "optimizer": training.optimizer}
    checkpoint, first = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        first = saved.pop("step")
        for key, state in saved.items():
            parts[key].load_state_dict(state)
    start = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if rank == 0:
        with (folder / "starts").open("a") as starts:
            starts.write(start)
    for step in range(first, STEPS):
        if step == DIES_AT and rank == 1 and start == "0":
            losses = training.losses(step)
            losses[1].register_hook(lambda grad: os.kill(os.getpid(), signal.SIGKILL))
            training.balancer.backward(losses)
        training.step(step)
        states = {key: part.state_dict() for key, part in parts.items()}  # all ranks: averages are gathered
        if rank == 0:
            torch.save({"step": step + 1, **states}, folder / "new.pt")
            os.replace(folder / "new.pt", checkpoint)  # there is always a whole one
    if rank == 0:
        torch.save([p.detach() for p in training.params], folder / "params.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
