"""Fine-tune LoRA adapters and a head; the frozen backbone is shared by the processes (FSDP2).

torchrun --nproc-per-node 2 examples/distributed/lora.py --model checkpoint --save adapters
"""

import torch
import torch.distributed as dist
from common import Classifier, arguments, batches, finish, make_mesh, report, start
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from dinov3_lite import DINOv3ViT
from dinov3_lite.sharding import shard


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--save", metavar="FOLDER", help="write the adapters there, as peft does")
    args = parser.parse_args()
    device = start()
    mesh = make_mesh()
    backbone = DINOv3ViT.from_pretrained(args.model)  # of a converted file nothing is read yet
    torch.manual_seed(0)  # the same adapters in every process
    adapted = get_peft_model(backbone, LoraConfig(r=8, lora_alpha=16, target_modules=["attn.qkv", "attn.proj"]))
    shard(backbone, mesh)  # with the adapters inside, and each process reads its own part
    model = Classifier(adapted, backbone.embed_dim)
    fully_shard(model.head.to(device), mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], args.lr)
    for step, images, labels in batches(args, device, dist.get_rank(), dist.get_world_size()):
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report(step, loss)
    if args.save:
        save(adapted, args.save)
    finish()


def save(adapted: torch.nn.Module, folder: str) -> None:
    """Gather the adapters, which are small, in every process, and write them in the first."""
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in adapted.named_parameters() if "lora_" in n}
    if dist.get_rank() == 0:
        adapted.save_pretrained(folder, state_dict={name: p.detach().cpu() for name, p in whole.items()})


if __name__ == "__main__":
    main()
