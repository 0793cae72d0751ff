"""One model over several devices, by PyTorch's own means: FSDP2, tensor parallelism, or both.

mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("fsdp", "tp"))
model = DINOv3ViT.from_pretrained("checkpoint/", mesh=mesh)

Along "fsdp" each process holds a part of every tensor and fetches a block's whole weights while that block runs:
batches differ from process to process, outputs are those of the whole model, bit for bit. Along "tp" each process
computes with its own heads and hidden units: the processes of one group get the same images and share their time.

    wrapping.py          `shard`: all of it, over a mesh
    mesh.py              which meshes a model takes
    tensor_parallel.py   the projections, cut
    data_parallel.py     FSDP2, block by block
    parameters.py        which of a checkpoint's tensors lie in which parameter, and which part of it lies here
    loading.py           every process reads its own bytes
    saving.py            tensor by tensor into one file
    clipping.py          the norm of gradients that lie in parts
"""

from .clipping import clip_grad_norm_
from .loading import load_weights
from .wrapping import shard

__all__ = ["clip_grad_norm_", "load_weights", "shard"]
