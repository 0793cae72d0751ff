"""Fine-tune a backbone and a head: every process has the whole model and a part of each batch.

torchrun --nproc-per-node 2 examples/distributed/ddp.py --model checkpoint
"""

import torch
import torch.distributed as dist
from common import Classifier, arguments, batches, finish, report, start
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from dinov3_lite import DINOv3ViT, parameter_groups


def main() -> None:
    args = arguments(__doc__).parse_args()
    device = start()
    backbone = DINOv3ViT.from_pretrained(args.model, device=device).train()
    backbone.mask_token.requires_grad_(False)  # without masked patches it has no part in the loss
    model = DistributedDataParallel(Classifier(backbone, backbone.embed_dim).to(device))
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr, layer_decay=0.8))
    for step, images, labels in batches(args, device, dist.get_rank(), dist.get_world_size()):
        loss = cross_entropy(model(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report(step, loss)
    finish()


if __name__ == "__main__":
    main()
