"""A plan becomes files, with a bar of bytes."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

from dinov3_lite.checkpoint.saving import save
from dinov3_lite.console import progress as progress_bar

from .plan import Plan


def write(plan: Plan, *, progress: bool = False) -> Path:
    """Write what the plan says and return its path. All files appear, or none and what was there before stays.

    progress: show a bar of bytes, if standard error is a terminal. Warns of weights that are not
    finite, and of each file of an earlier output that had to go.
    """
    source, obsolete = plan.source, plan.obsolete
    with progress_bar(
        total=plan.nbytes, unit="B", unit_scale=True, desc=os.path.basename(source.path), shown=progress
    ) as bar:
        save(plan.folder, plan.files, bar.update, obsolete=obsolete)
    for path in obsolete:
        warnings.warn(f"{path}: removed: readers would mix it with what was written", stacklevel=3)
    not_finite = [name for name, parts in source.samples.items() if not all(part.isfinite().all() for part in parts)]
    if not_finite:
        more = f" (and {len(not_finite) - 1} more)" if len(not_finite) > 1 else ""
        warnings.warn(f"{source.path}: NaN or infinity in tensor {not_finite[0]!r}{more}: kept as it is", stacklevel=3)
    for license_file, target in plan.licenses.items():
        shutil.copyfile(license_file, target)
    return plan.path
