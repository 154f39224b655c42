"""Train a head whose identities are spread over processes, and go on with another number of them.

    torchrun --nproc_per_node=2 examples/many_identities.py --folder runs/many --steps 60
    torchrun --nproc_per_node=1 examples/many_identities.py --folder runs/many --steps 90

Identities are points, and pictures noisy copies of them: what is shown is the head, not a data set.
The backbone is in DDP; each process holds its part of the rows. The second command goes on from the
checkpoint of the first, optimizer included: a folder in use is always resumed. `head/` in it holds
all rows for any other program.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from partlocal import ArcFace, ArcFaceHead
from partlocal.optim import SGD, clip_grad_norm


def main() -> None:
    """Train from the last checkpoint on, and leave one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the checkpoint")
    parser.add_argument("--identities", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=128, help="over all processes")
    parser.add_argument("--sample-rate", type=float, default=1.0, help="share of identities a step")
    options = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun --nproc_per_node=1, or more processes")
    ranks = int(os.environ["WORLD_SIZE"])
    if options.batch_size < 1 or options.batch_size % ranks:
        parser.error(
            f"--batch-size must be a multiple of the {ranks} processes; got {options.batch_size}"
        )

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()

    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128)).to(device)
    head = ArcFaceHead(
        128, options.identities, 16.0, ArcFace(0.2),
        sample_rate=options.sample_rate, process_group=dist.group.WORLD, device=device,
    )  # fmt: skip
    trained = DistributedDataParallel(backbone)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = SGD(parameters, lr=0.2, momentum=0.9, weight_decay=1e-5)
    begin = load(options, backbone, head, optimizer)

    own = options.batch_size // ranks
    for step in range(begin, options.steps):
        views, identities = pictures(options, step)
        part = slice(rank * own, (rank + 1) * own)
        embeddings = trained(views[part].to(device))
        loss, seen = head(embeddings, identities[part].to(device), diagnostics=True)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm(parameters, 5.0)
        optimizer.step()
        if rank == 0 and (step % 10 == 0 or step + 1 == options.steps):
            print(
                f"step {step:3}  loss {loss.item():.3f}  accuracy {seen.accuracy.item():.2f}  "
                f"angle {seen.angle.item():.2f} rad  {len(head.weight.to_local())} rows here"
            )
    if begin < options.steps:
        save(options, backbone, head, optimizer)
        head.save_pretrained(options.folder / "head")
    dist.barrier()
    if rank == 0:
        at_end = f"{options.folder} is at step {begin} already: nothing to do"
        print(f"saved in {options.folder}" if begin < options.steps else at_end, flush=True)
    del trained, head, optimizer, parameters  # which hold the group that ends here
    dist.destroy_process_group()


def pictures(options: argparse.Namespace, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pictures of a step and whose they are, the same on any number of processes."""
    rng = torch.Generator().manual_seed(step)
    identities = torch.randint(options.identities, (options.batch_size,), generator=rng)
    identities = identities % 500  # of which 500 are seen, that a minute shows something
    points = torch.randn(500, 64, generator=torch.Generator().manual_seed(-1))
    noise = torch.randn(len(identities), 64, generator=rng)
    return points[identities] + 0.2 * noise, identities


def save(options: argparse.Namespace, backbone: nn.Module, head: nn.Module, optimizer: SGD) -> None:
    """Write one logical checkpoint, each process its part."""
    model, state = get_state_dict(nn.ModuleList([backbone, head]), optimizer)
    held = {"model": model, "optimizer": state, "made": made_with(options)}
    dcp.save(held, checkpoint_id=options.folder / "checkpoint")


def load(options: argparse.Namespace, backbone: nn.Module, head: nn.Module, optimizer: SGD) -> int:
    """Read it, whatever number of processes wrote it; return after how many steps."""
    path = options.folder / "checkpoint"
    if not path.exists():
        return 0
    made = made_with(options)
    dcp.load({"made": made}, checkpoint_id=path)
    for name in ("identities", "sample_rate"):
        saved, given = made[name].item(), getattr(options, name)
        if saved != given:
            raise SystemExit(
                f"--{name.replace('_', '-')} must be {saved}, with which {options.folder} was "
                f"made; got {given}: pass {saved}, or another --folder"
            )
    both = nn.ModuleList([backbone, head])
    model, state = get_state_dict(both, optimizer)
    dcp.load({"model": model, "optimizer": state}, checkpoint_id=path)
    set_state_dict(both, optimizer, model_state_dict=model, optim_state_dict=state)
    return int(made["steps"])


def made_with(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Return what a checkpoint says of its making, in the types it is saved in."""
    return {
        "steps": torch.tensor(options.steps),
        "identities": torch.tensor(options.identities),
        "sample_rate": torch.tensor(options.sample_rate, dtype=torch.float64),
    }


if __name__ == "__main__":
    main()
