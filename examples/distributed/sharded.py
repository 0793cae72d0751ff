"""Fine-tune a backbone and a head whose weights, gradients and optimizer states are shared by the processes.

torchrun --nproc-per-node 2 examples/distributed/sharded.py --model checkpoint              FSDP2
torchrun --nproc-per-node 2 examples/distributed/sharded.py --model checkpoint --tp 2       tensor parallelism
torchrun --nproc-per-node 4 examples/distributed/sharded.py --model checkpoint --tp 2       both
torchrun --nproc-per-node 2 examples/distributed/sharded.py --model checkpoint --offload    FSDP2, weights on the host
"""

import torch
import torch.distributed as dist
from common import DEVICE, Classifier, arguments, batches, finish, make_mesh, report, start
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.functional import cross_entropy

from dinov3_lite import DINOv3ViT, parameter_groups
from dinov3_lite.sharding import clip_grad_norm_, shard


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tp", type=int, default=1, help="processes that share each batch")
    parser.add_argument("--offload", action="store_true", help="keep weights and optimizer states in host memory")
    parser.add_argument("--save", metavar="FOLDER", help="write the backbone there, as one checkpoint")
    args = parser.parse_args()
    device = start()
    mesh = make_mesh(args.tp)
    if args.offload:
        policy = CPUOffloadPolicy(pin_memory=DEVICE == "cuda")
        backbone = shard(DINOv3ViT.from_pretrained(args.model), mesh, offload_policy=policy)
    else:
        backbone = DINOv3ViT.from_pretrained(args.model, mesh=mesh)
    backbone.train().mask_token.requires_grad_(False)
    model = Classifier(backbone, backbone.embed_dim)
    model.head.to(device)
    if "fsdp" in mesh.mesh_dim_names:  # which then averages its gradients as it does the backbone's
        fully_shard(model.head, mesh=mesh["fsdp"])
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr, layer_decay=0.8))
    for step, images, labels in batches(args, device, dist.get_rank() // args.tp, dist.get_world_size() // args.tp):
        loss = cross_entropy(model(images), labels)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report(step, loss)
    if args.save:
        backbone.save_pretrained(args.save)
    finish()


if __name__ == "__main__":
    main()
