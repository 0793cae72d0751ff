"""Which of the networks in a file is meant: told by whole names, in the order written here, or asked.

A prefix is what stands before a backbone's own names: "teacher.backbone." in a training checkpoint, "" in a plain file.
Several of them are several backbones. The first kind of this list of which the file has any is taken, if it has one:

1. an exponential moving average of what was trained (`EMA`), which is what a training run publishes
2. its teacher (`TEACHERS`), which in self-distillation is that average too
3. any other

A Gram teacher (`GRAM`; arXiv 2508.10104, section 4) is an early copy that training is held to: never taken unasked.
Two of the same kind, such as a backbone for colours and one for depths, are for the caller to choose from.
"""

from __future__ import annotations

from collections.abc import Collection

EMA = {
    *("ema", "ema_model", "model_ema", "ema_backbone", "ema_module", "module_ema", "ema_weights", "params_ema"),
    *("ema_state_dict", "state_dict_ema", "model_ema_state_dict", "ema_model_state_dict", "model_state_dict_ema"),
}
TEACHERS = {"teacher", "teacher_model", "model_teacher", "teacher_backbone", "teacher_state_dict"}
GRAM = {"gram", "gram_teacher", "gram_model", "gram_backbone", "teacher_gram"}

# Modules that training code puts around others, between any two parts of a name.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module"}


def without_wrappers(name: str) -> str:
    """The tensor's name in the module that torch.compile, FSDP or activation checkpointing was put around."""
    *modules, last = name.split(".")
    return ".".join([*(module for module in modules if module not in WRAPPERS), last])


def prefixes(names: Collection[str], anchors: Collection[str], blocks: Collection[str]) -> list[str]:
    """What stands before the names of each backbone among `names`, sorted.

    anchors: names of a tensor that every backbone has, one for each way of naming. blocks: how the names of tensors in
        blocks begin. A prefix needs one of each: a decoder has a `cls_token` too.
    """
    ends = [name for name in names if name.endswith(tuple(anchors))]
    before = {name.removesuffix(anchor) for name in ends for anchor in anchors if name.endswith(anchor)}
    found = [prefix for prefix in before if not prefix or prefix.endswith(".")]
    return sorted(p for p in found if any(name.startswith(tuple(p + start for start in blocks)) for name in names))


def choose(found: Collection[str], wanted: str | None = None) -> str:
    """The prefix that is meant among those found: the one that `wanted` names, or by the order above.

    wanted: a prefix, with or without its last dot, or the beginning of one in whole parts, if that leaves one.
    Raises ValueError that lists those found, if none or several fit.
    """
    fitting = [prefix for prefix in found if wanted is None or _begins(prefix, wanted)]
    if wanted is not None:
        exact = [prefix for prefix in fitting if prefix.rstrip(".") == wanted.rstrip(".")]
        fitting = exact or fitting
        if not fitting:
            raise ValueError(f"has no backbone under {wanted!r}: there are {_listed(found)}")
    best = min(map(_rank, fitting))
    first = [prefix for prefix in fitting if _rank(prefix) == best]
    if len(first) > 1 or (best == _NEVER and wanted is None):
        raise ValueError(
            f"holds {len(found)} backbone{'s' * (len(found) > 1)}, under {_listed(found)}: "
            "name the one that is meant with prefix=, or make a file of it by `python -m convert --prefix`"
        )
    return first[0]


_NEVER = 3


def _rank(prefix: str) -> int:
    parts = set(prefix.split("."))
    return _NEVER if parts & GRAM else 0 if parts & EMA else 1 if parts & TEACHERS else 2


def _begins(prefix: str, wanted: str) -> bool:
    parts = [part for part in wanted.split(".") if part]
    return prefix.split(".")[: len(parts)] == parts if parts else prefix == ""


def _listed(found: Collection[str]) -> str:
    return ", ".join(repr(prefix) for prefix in sorted(found))
