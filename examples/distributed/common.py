"""What the scripts of this folder share: where they run, made pictures with labels, and a classifier."""

from __future__ import annotations

import argparse
import os
import resource
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

CLASSES = 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoint", help="a checkpoint folder or file, or a hub id")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8, help="pictures a step, of all processes together")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--lr", type=float, default=1e-4)
    return parser


def start() -> torch.device:
    """Join the other processes that torchrun started, with gloo on CPUs and NCCL on GPUs: the device of this one."""
    device = torch.device(DEVICE, int(os.environ["LOCAL_RANK"])) if DEVICE == "cuda" else torch.device("cpu")
    if DEVICE == "cuda":
        torch.cuda.set_device(device)
    backends = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"  # both: what is offloaded has a norm
    store, rank, processes = next(rendezvous("env://"))
    # what torchrun starts again finds the same store, and in it, by the same names, the addresses of the dead
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backends, store=store, rank=rank, world_size=processes)
    return device


def make_mesh(tp: int = 1) -> DeviceMesh:
    """All processes: `tp` of them share each batch by tensor parallelism, the groups share the weights by FSDP."""
    sizes = {"fsdp": dist.get_world_size() // tp, "tp": tp}
    names = [name for name, size in sizes.items() if size > 1] or ["fsdp"]
    return init_device_mesh(DEVICE, tuple(sizes[name] for name in names), mesh_dim_names=tuple(names))


class Classifier(nn.Module):
    """(B, 3, H, W) -> (B, CLASSES), from the CLS token."""

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        torch.manual_seed(0)  # the same head in every process
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images).pooler_output.float())


def batches(args: argparse.Namespace, device: torch.device, part: int, parts: int, first: int = 0) -> Iterator:
    """(step, images, labels): the part of each step's batch that this process works on.

    All that is random in a step follows from its number, what the model draws too: a run that goes on at step n needs
    no more than n, and so does a run over more processes.
    """
    for step in range(first, args.steps):
        torch.manual_seed(step)
        labels = torch.randint(CLASSES, (args.batch,))
        images = torch.randn(args.batch, 3, args.size, args.size) / 2
        images[torch.arange(args.batch), labels % 3] += 1 + labels[:, None, None] // 3  # a colour for each class
        mine = slice(part * args.batch // parts, (part + 1) * args.batch // parts)
        yield step, images[mine].to(device), labels[mine].to(device)


def report(step: int, loss: Tensor) -> None:
    """Print the mean of the processes' losses, which have parts of one size."""
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    if dist.get_rank() == 0:
        print(f"step {step}  loss {mean.item() / dist.get_world_size():.8f}", flush=True)


def finish() -> None:
    """Say how much memory each process needed at its peak, and leave."""
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peaks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, peak)
    if dist.get_rank() == 0:
        print("peak memory of each process, MB:", " ".join(f"{peak / 1e6:.0f}" for peak in peaks))
    dist.destroy_process_group()
