r"""Make one small mistake after the other in a copy of the sources, and say which of them no test notices.

    python tools/mutants.py [--only WORD ...] [--tests FILE ...] [FILE]

FILE (tools/mutants.txt) lists the mistakes, each a line "@ path", a line "- old text" and a line "+ new text"; the old
text must stand once in the file, the new may be empty, and " \n " is a line break in either. Each is tried on the
tests of its room (TESTS), which is enough to be told of it, in a process forked from one that has imported torch and
transformers already; a line "? test_file.py::test_name" says which of them is tried first, since it has noticed that
mistake before. A mistake that survives deserves a test; exit status 1 if there is one.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600  # seconds for the tests of one mistake: one that hangs is noticed, too

TESTS = {
    "dinov3_lite/config.py": "config model",
    "dinov3_lite/model.py": "model model_dtypes model_training pretrained packing attention",
    "dinov3_lite/features.py": "model interfaces",
    "dinov3_lite/checks.py": "model packing window",
    "dinov3_lite/packing.py": "packing kernels_model",
    "dinov3_lite/layers.py": "model model_dtypes model_training kernels_block_tail kernels_model modules",
    "dinov3_lite/tracing.py": "modules model_training attention",
    "dinov3_lite/rope.py": "rope model_dtypes parity",
    "dinov3_lite/attention.py": "attention model_dtypes kernels_model",
    "dinov3_lite/encoder.py": "encoder convnext_uses",
    "dinov3_lite/interfaces.py": "interfaces convnext_uses pretrained",
    "dinov3_lite/image.py": "image",
    "dinov3_lite/pixels.py": "image",
    "dinov3_lite/window.py": "window",
    "dinov3_lite/finetune.py": "finetune",
    "dinov3_lite/pages.py": "pages lent checkpoint_loading",
    "dinov3_lite/pretrained.py": "pretrained model",
    "dinov3_lite/checkpoint/layouts/lite.py": "pretrained convnext_checkpoints checkpoint_loading convert_whole "
    "checkpoint_bad_inputs convert_written",
    "dinov3_lite/checkpoint/layouts/timm.py": "convert_timm checkpoint_cards",
    "dinov3_lite/checkpoint/__init__.py": "convert_timm checkpoint_loading saving",
    "dinov3_lite/checkpoint/saving.py": "saving",
    "dinov3_lite/checkpoint/spans.py": "saving",
    "dinov3_lite/checkpoint/pickles.py": "checkpoint_pth",
    "dinov3_lite/extraction/job.py": "saving extract",
    "convert/verify.py": "convert_inspect",
    "convert/plan.py": "convert_command",
    "dinov3_lite/checkpoint/hub.py": "checkpoint_hub cli",
    "dinov3_lite/attention_ways.py": "choices",
    "dinov3_lite/choices.py": "choices inference",
    "dinov3_lite/inference.py": "inference modules",
    "dinov3_lite/prepared.py": "inference modules graphs choices lent convnext_uses",
    "dinov3_lite/twin.py": "inference lent modules graphs convnext_uses",
    "dinov3_lite/lent.py": "lent",
    "dinov3_lite/graphs.py": "graphs inference",
    "dinov3_lite/folding.py": "inference modules convnext_uses",
    "dinov3_lite/prepacked.py": "choices lent inference prepared_exactness",
    "dinov3_lite/projection.py": "choices lent inference",
    "dinov3_lite/stand_ins.py": "choices lent convnext_uses inference prepared_exactness",
    "dinov3_lite/convnext.py": "convnext convnext_training convnext_uses convnext_checkpoints convnext_parity",
    "dinov3_lite/extraction/decode.py": "extract_pixels extract extract_faults",
    "dinov3_lite/extraction/parts.py": "extract_engines",
    "dinov3_lite/extraction/": "extract extract_inputs extract_faults extract_deaths",
    "dinov3_lite/commands/": "cli explore probe_match_track segmentation tasks_bad_inputs",
    "dinov3_lite/tasks/data.py": "segmentation tasks_bad_inputs",
    "dinov3_lite/extras.py": "imports",
    "dinov3_lite/visualize.py": "cli probe_match_track",
    "dinov3_lite/tasks/drawing.py": "probe_match_track cli",
    "dinov3_lite/tasks/tracking.py": "probe_match_track tasks_bad_inputs",
    "dinov3_lite/tasks/head.py": "segmentation tasks_bad_inputs",
    "dinov3_lite/sharding/": "sharding",
    "kernels/tuning.py": "kernels_tuning kernels_first_use",
    "kernels/plain.py": "kernels_first_use",
    "kernels/first_use.py": "kernels_first_use",
    "kernels/layer_norm.py": "kernels_layer_norm kernels_block_tail",
    "kernels/swiglu.py": "kernels_swiglu",
    "kernels/": "kernels_rope_attention_inputs kernels_rope_attention_ops kernels_rope_attention kernels_model",
}
SLOW = "not inductor and not compile and not export and not two_processes"


class Mutant(NamedTuple):
    """One mistake."""

    path: str
    old: str
    new: str
    first: str = ""
    """The test that is tried first."""


def read(file: Path) -> list[Mutant]:
    """The mistakes of a list."""
    found: list[list[str]] = []
    for line in file.read_text().splitlines():
        kind, text = line[:1], line[2:].replace(" \\n ", "\n")
        if kind == "@":
            found.append([text.strip()])
        elif kind in ("-", "+", "?"):
            found[-1].append(text)
    return [Mutant(*parts) for parts in found]


def tests_of(path: str) -> list[str]:
    """The test files of a room; of those that lie in a folder of its own, all of it."""
    room = next(names for prefix, names in TESTS.items() if path.startswith(prefix))
    return [str(ROOT / "tests" / f"test_{name}.py") for name in room.split()]


def apply(mutant: Mutant, folder: Path) -> None:
    """Write the sources with this mistake, as they are installed."""
    for name in ("dinov3_lite", "convert"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", folder / "dinov3_lite/kernels", ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / mutant.path.replace("kernels/", "dinov3_lite/kernels/", 1)
    text = file.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.path}: {mutant.old!r} stands there {text.count(mutant.old)} times: expected once")
    file.write_text(text.replace(mutant.old, mutant.new))


def noticed(mutant: Mutant, tests: list[str], log: Path) -> str:
    """The test that fails with this mistake, or what ended the tests; nothing if all pass."""
    with tempfile.TemporaryDirectory() as name:
        apply(mutant, Path(name))
        if child := os.fork():
            end = time.monotonic() + LIMIT
            while not (status := os.waitpid(child, os.WNOHANG))[0]:
                if time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
                time.sleep(0.1)
            failed = re.findall(r"^(?:FAILED|ERROR) .*?(test_\w+\.py(?:::\w+)?)", log.read_text(), re.MULTILINE)
            return (failed[0] if failed else f"status {status[1]}") if status[1] else ""
        os.environ["PYTHONPATH"] = name  # for processes that tests start
        sys.path.insert(0, name)
        with log.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            import pytest

            options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
            first = [str(ROOT / "tests" / mutant.first)] if mutant.first else []
            status = int(pytest.main([*options, *first])) if first else 0
            status = status or int(pytest.main([*options, "-k", SLOW, *tests]))
            out.flush()
            os._exit(status)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=ROOT / "tools/mutants.txt")
    parser.add_argument("--only", nargs="+", default=[""], help="mistakes whose path or text has one of these words")
    parser.add_argument("--tests", nargs="+", help="run these files instead of the room's")
    args = parser.parse_args()
    os.chdir(ROOT / "tests")
    for name in ("hypothesis", "pytest", "torch", "transformers"):  # once, for all forks
        importlib.import_module(name)

    survived = 0
    chosen = [mutant for mutant in read(args.file) if any(word in "\n".join(mutant) for word in args.only)]
    with tempfile.TemporaryDirectory() as logs:
        for i, mutant in enumerate(chosen):
            found = noticed(mutant, args.tests or tests_of(mutant.path), Path(logs) / f"{i}.log")
            survived += not found
            change = f"{mutant.old!r} -> {mutant.new!r}"
            print(f"{f'noticed by {found}' if found else 'SURVIVED'}: {mutant.path}: {change[:150]}", flush=True)
    print(f"{len(chosen)} mistakes, {survived} that no test noticed")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
