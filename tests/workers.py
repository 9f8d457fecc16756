"""What runs in a process of its own. Only light imports: a spawned process imports all of this
module.
"""

from __future__ import annotations

import torch

from fusegpt_ray.training.losses import LOSSES


def split_loss(rank: int, workers: int, folder: str) -> None:
    """One of several data-parallel workers: its rows of a loss batch; saves its loss and the
    averaged gradient.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers
    )
    data = torch.load(f"{folder}/data.pt")
    x, teacher = (data[name].chunk(workers)[rank] for name in ("x", "teacher"))
    out = {}
    for name, loss_function in LOSSES.items():
        weight = data["weight"].clone().requires_grad_()
        loss = loss_function(x @ weight, teacher, True)
        loss.backward()
        torch.distributed.all_reduce(weight.grad)  # as data-parallel training does
        out[name] = (loss.detach(), weight.grad / workers)
    torch.save(out, f"{folder}/out{rank}.pt")
    torch.distributed.destroy_process_group()
