"""A GPU's first half hour: what has to be run where there is one, the most valuable first, and nothing twice.

    python tools/gpu.py [--minutes 28] [--output gpu-results] [--only STEP ...] [--again] [--list]
    python tools/gpu.py --dry-run

Every step is a process of its own with a time limit; what it prints goes to OUTPUT/STEP.log as it comes, files that it
writes under benchmarks/results, and kernels/measured.py, are copied to OUTPUT, and OUTPUT/steps.json says what is done.
A step that is done is not done again, unless the sources have changed or --again says so; one that failed or ran out
of time is. --minutes is all the time there is: a step that would not get a third of its own waits for another day.

Needs torch, triton, safetensors, numpy and pytest, no network and no installation: a folder with links makes the
checkout importable. transformers and timm are compared with where they are. --dry-run needs no GPU either: the kernels
run in Triton's interpreter on a few small shapes, builds are compiled for sm_90, and what is timed is skipped and said
so.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT))
WORKERS = ("-n", str(min(8, (os.cpu_count() or 1) // 2))) if importlib.util.find_spec("xdist") else ()  # they compile
KERNEL_TESTS = tuple(str(file) for file in sorted((ROOT / "tests").glob("test_kernels_*.py")))
ON_GPU = (*PYTEST, *WORKERS, *KERNEL_TESTS)
FIRST_TESTS = (
    "released_models or packed or strides or thousands or graph or add_layer_norm_and or swiglu_and or replaced"
)
DRY_FILES = tuple(file for file in KERNEL_TESTS if file.endswith(("rope_attention.py", "layer_norm.py", "swiglu.py")))
DRY_TESTS = "one_gradient_alone or (no_rows and layer_norm) or (saturates and swiglu)"


class Step(NamedTuple):
    """What to run, and for how long at most. Words are those of Python's command line."""

    name: str
    seconds: int
    words: tuple[str, ...]
    dry: tuple[str, ...] | None = None  # in a dry run; None: it is timed, and skipped
    needs: str = ""  # a program without which it is skipped


def script(*words: str) -> tuple[str, ...]:
    file, *others = words
    return (str(ROOT / file), *others)


MODELS, LAUNCHES, ODD = "benchmarks/whole_models.py", "benchmarks/launch_overhead.py", "tools/odd_shapes.py"
ROPE, NORM, GATE = (f"benchmarks/{name}.py" for name in ("rope_attention", "layer_norm", "swiglu"))
TUNING = ("tools/tune.py", "--minutes", "5", "--write", "--json", str(RESULTS / "tuning_cuda.json"))
PEERS = ("--variants", "vits16", "vitb16", "vitl16", "--rows", "224x1", "224x64", "512x16", "--dtypes", "bfloat16")
PEERS = ("benchmarks/compare.py", *PEERS, "--seconds", "10", "--save", "compare_cuda")
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", sys.executable, *script(ODD))
# in the order of their value
STEPS = [
    Step("environment", 60, script("tools/gpu.py", "--environment"), script("tools/gpu.py", "--environment")),
    Step("first tests", 240, (*ON_GPU, "-k", FIRST_TESTS), (*PYTEST, *DRY_FILES, "-k", DRY_TESTS)),
    Step(
        "tuning", 420, script(*TUNING), script("tools/tune.py", "--dry-run", "--candidates", "1", "--head-dims", "64")
    ),
    Step("graphs", 90, script(MODELS, "graphs")),
    Step("forwards", 240, script(MODELS, "forward"), script(MODELS, "forward", "parity", "training", "packed")),
    Step("rope_attention", 180, script(ROPE), script(ROPE, "--small")),
    Step("parity", 120, script(MODELS, "parity")),
    Step("training", 150, script(MODELS, "training")),
    Step("packed", 60, script(MODELS, "packed")),
    Step("launches", 45, script(LAUNCHES), script(LAUNCHES, "--no-save", "--rounds", "2")),
    Step("layer_norm", 60, script(NORM), script(NORM, "--small")),
    Step("swiglu", 60, script(GATE), script(GATE, "--small")),
    Step("odd shapes", 60, script(ODD), script(ODD, "--small")),
    Step("sanitizer", 150, SANITIZER, needs="compute-sanitizer"),
    Step("peers", 300, script(*PEERS, "--again")),
    Step("peers' memory", 240, script(*PEERS, "--memory")),
    Step("all tests", 600, ON_GPU),
]


def links(folder: Path) -> Path:
    """A folder from which the checkout's packages are imported, dinov3_lite.kernels too, without installation."""
    package = folder / "dinov3_lite"
    package.mkdir(parents=True, exist_ok=True)
    wanted = {package / file.name: file for file in (ROOT / "dinov3_lite").iterdir() if file.name != "__pycache__"}
    wanted |= {package / "kernels": ROOT / "kernels", folder / "convert": ROOT / "convert"}
    for link, target in wanted.items():
        if not link.is_symlink():
            link.symlink_to(target)
    return folder


def environment_lines() -> list[str]:
    """Machine, driver and versions."""
    import platform

    import torch

    lines = [f"python {platform.python_version()}, torch {torch.__version__}"]
    for name in ("triton", "safetensors", "numpy", "pytest", "transformers", "timm"):
        try:
            lines.append(f"{name} {getattr(__import__(name), '__version__', '?')}")
        except ImportError:
            lines.append(f"{name}: not installed")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        lines.append(f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}")
    else:
        lines.append("no GPU")
    if shutil.which("nvidia-smi"):
        query = (
            "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu",
            "--format=csv,noheader",
        )
        lines.append(subprocess.run(["nvidia-smi", *query], capture_output=True, text=True).stdout.strip())
    return lines


def fingerprint(step: Step) -> str:
    """Of a step and of the sources: if it changes, the step is no longer done. What a sweep finds is no source."""
    digest = hashlib.sha256(repr(step).encode())
    for folder in ("dinov3_lite", "kernels", "benchmarks", "tools", "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if file.name != "measured.py":
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def run(step: Step, output: Path, seconds: float, dry: bool) -> dict[str, object]:
    """Run a step, its words to OUTPUT/STEP.log; how it ended."""
    words = step.dry if dry else step.words
    assert words is not None
    command = [*words] if step.needs else [sys.executable, *words]
    path = os.pathsep.join(filter(None, (str(links(output / "checkout")), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if dry else {}
    started, begun = time.time(), time.monotonic()
    with (output / f"{step.name.replace(' ', '_')}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=output, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            status = process.wait(seconds)
            ended = "done" if status == 0 else f"failed, exit status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # and what it started
            process.wait()
            ended = f"ran out of its {seconds:.0f} seconds"
    for file in (*RESULTS.glob("*"), ROOT / "kernels" / "measured.py"):
        if not dry and file.stat().st_mtime >= started:
            shutil.copy(file, output)
    when = datetime.now().isoformat(timespec="seconds")
    return {"ended": ended, "seconds": round(time.monotonic() - begun, 1), "when": when, "of": fingerprint(step)}


def run_all(steps: list[Step], output: Path, minutes: float, dry: bool, again: bool) -> dict[str, dict[str, object]]:
    """All steps that time allows; the state is written after each."""
    output.mkdir(parents=True, exist_ok=True)
    file, deadline = output / "steps.json", time.monotonic() + 60 * minutes
    state: dict[str, dict[str, object]] = json.loads(file.read_text()) if file.exists() else {}
    for step in steps:
        before, left = state.get(step.name, {}), deadline - time.monotonic()
        if not again and before.get("ended") == "done" and before["of"] == fingerprint(step):
            print(f"{step.name}: done before", flush=True)
            continue
        if dry and step.dry is None:
            ended = "skipped: it is timed, and a dry run times nothing"
        elif step.needs and not shutil.which(step.needs):
            ended = f"skipped: {step.needs} is not installed"
        elif left < step.seconds / 3:
            ended = f"skipped: it wants {step.seconds} seconds, {max(left, 0):.0f} are left"
        else:
            print(f"{step.name} ..", flush=True)
            state[step.name] = run(step, output, min(step.seconds, left), dry)
            ended = ""
        if ended:
            state[step.name] = {"ended": ended}
        print(f"{step.name}: {state[step.name]['ended']}", flush=True)
        file.write_text(json.dumps(state, indent=1) + "\n")
    return state


def summary(state: dict[str, dict[str, object]], output: Path) -> str:
    """A line a step, and the last lines of those that failed."""
    lines = ["", f"{'step':16}{'seconds':>8}  how it ended"]
    for name, how in state.items():
        lines.append(f"{name:16}{how.get('seconds', ''):>8}  {how['ended']}")
        if str(how["ended"]).startswith(("failed", "ran out")):
            log = (output / f"{name.replace(' ', '_')}.log").read_text(errors="replace").splitlines()
            lines += [f"    {line}" for line in log[-6:]]
    return "\n".join([*lines, f"logs and results: {output}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=28.0, help="all the time there is")
    parser.add_argument("--output", type=Path, help="for logs and results; gpu-results unless given")
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=[step.name for step in STEPS])
    parser.add_argument("--again", action="store_true", help="do what is done once more")
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: everything but the timings, on small shapes"
    )
    parser.add_argument("--list", action="store_true", help="name the steps in order, with their limits")
    parser.add_argument("--environment", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.environment or args.list:
        print("\n".join(environment_lines() if args.environment else [f"{s.name}: {s.seconds} s" for s in STEPS]))
        return 0
    steps = [step for step in STEPS if not args.only or step.name in args.only]
    if args.dry_run and args.output is None:
        with tempfile.TemporaryDirectory() as folder:
            state = run_all(steps, Path(folder), args.minutes, dry=True, again=args.again)
            print(summary(state, Path(folder)))
    else:
        output = (args.output or ROOT / "gpu-results").resolve()
        state = run_all(steps, output, args.minutes, dry=args.dry_run, again=args.again)
        print(summary(state, output))
    return int(any(str(how["ended"]).startswith(("failed", "ran out")) for how in state.values()))


if __name__ == "__main__":
    raise SystemExit(main())
