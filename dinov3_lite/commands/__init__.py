"""The small commands of `python -m dinov3_lite`, a module each; large ones lie with what they do."""
