"""Train a head on a frozen backbone that no process has whole: FSDP2, weights in bfloat16, no activations kept.

torchrun --nproc-per-node 2 examples/distributed/frozen.py --model checkpoint
"""

import torch
import torch.distributed as dist
from common import Classifier, arguments, batches, finish, make_mesh, report, start
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from dinov3_lite import DINOv3ViT


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dtype", default="bfloat16", help="of the backbone (default: %(default)s)")
    args = parser.parse_args()
    device = start()
    backbone = DINOv3ViT.from_pretrained(args.model, mesh=make_mesh(), dtype=getattr(torch, args.dtype))
    head = Classifier(nn.Identity(), backbone.embed_dim).head.to(device)
    head = DistributedDataParallel(head)
    optimizer = torch.optim.AdamW(head.parameters(), args.lr)
    for step, images, labels in batches(args, device, dist.get_rank(), dist.get_world_size()):
        with torch.no_grad():
            features = backbone(images).cls_token
        loss = cross_entropy(head(features.float()), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report(step, loss)
    finish()


if __name__ == "__main__":
    main()
