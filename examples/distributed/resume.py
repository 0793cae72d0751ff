"""Fine-tune with checkpoints that every process writes its own part of: killed at any moment, the same command goes on.

torchrun --nproc-per-node 2 --max-restarts 3 examples/distributed/resume.py --model checkpoint --folder run

--kill-at 5 kills this process before step 5, the first time, to show it.
"""

import os
import shutil
import signal
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import Classifier, arguments, batches, finish, make_mesh, report, start
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from dinov3_lite import DINOv3ViT, parameter_groups


class Training:
    """All that a run is at a step, in a folder for each step that was saved. The newest two are kept."""

    def __init__(self, folder: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.folder, self.model, self.optimizer = Path(folder), model, optimizer

    def saved(self) -> list[int]:
        """Steps of the checkpoints that are whole: .metadata is written last."""
        return sorted(int(file.parent.name.removeprefix("step-")) for file in self.folder.glob("step-*/.metadata"))

    def state(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, step: int) -> None:
        dcp.save(self.state(), checkpoint_id=self.folder / f"step-{step}")
        if dist.get_rank() == 0:
            for old in self.saved()[:-2]:
                shutil.rmtree(self.folder / f"step-{old}")

    def resume(self) -> int:
        """Go on from the last checkpoint, if there is one: the step to begin at."""
        if not (steps := self.saved()):
            return 0
        state = self.state()
        dcp.load(state, checkpoint_id=self.folder / f"step-{steps[-1]}")
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return steps[-1]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tp", type=int, default=1, help="processes that share each batch")
    parser.add_argument("--folder", default="run", help="where checkpoints are (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=2, metavar="N", help="steps (default: %(default)s)")
    parser.add_argument("--kill-at", type=int, metavar="N")
    args = parser.parse_args()
    device = start()
    mesh = make_mesh(args.tp)
    backbone = DINOv3ViT.from_pretrained(args.model, mesh=mesh).train()
    backbone.mask_token.requires_grad_(False)
    model = Classifier(backbone, backbone.embed_dim)
    model.head.to(device)
    if "fsdp" in mesh.mesh_dim_names:
        fully_shard(model.head, mesh=mesh["fsdp"])
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr))
    training = Training(args.folder, model, optimizer)
    first = training.resume()
    groups = dist.get_world_size() // args.tp
    for step, images, labels in batches(args, device, dist.get_rank() // args.tp, groups, first):
        if step == args.kill_at and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            dist.barrier()  # or the others might be gone before they have reported the step before
            os.kill(os.getpid(), signal.SIGKILL)
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report(step, loss)
        if (step + 1) % args.save_every == 0:
            training.save(step + 1)
    finish()


if __name__ == "__main__":
    main()
