"""Time and peak memory of preparing one large photograph, each contender in a process of its own.

python benchmarks/pictures.py [--megapixels 36] [--size 224] [--rounds 5]    # on Linux, from the repository's root

transformers needs torchvision: PYTHONPATH=.venv/references/torchvision after `make test`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

MEASURE = """
import json, re, statistics, sys, time
from pathlib import Path
from PIL import Image
Image.MAX_IMAGE_PIXELS = None
small, large, size, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
{prepare}
run(small)
def peak():  # of this program, in MiB: getrusage counts what the process was before it, too
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
before = peak()
run(large)
growth = peak() - before
seconds = []
for _ in range(rounds):
    start = time.perf_counter()
    run(large)
    seconds.append(time.perf_counter() - start)
print(json.dumps({{"growth": growth, "seconds": statistics.median(seconds)}}))
"""
CONTENDERS = {
    "decoding alone (Pillow)": "def run(file): Image.open(file).load()",
    "dinov3-lite": """
from dinov3_lite import ImageProcessor
run = ImageProcessor(size)
""",
    "transformers": """
from contextlib import suppress
sys.path.append("tests/support")  # for a torchvision that was built for another torch
with suppress(ImportError):
    import torchvision_shim
from transformers import DINOv3ViTImageProcessor
processor = DINOv3ViTImageProcessor(size={"height": size, "width": size})
def run(file): processor(Image.open(file), return_tensors="pt")
""",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megapixels", type=float, default=36)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    from PIL import Image

    height = round((args.megapixels * 1e6 * 2 / 3) ** 0.5)
    width = round(height * 1.5)
    nbytes = 3 * height * width / 2**20
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small.jpg", Path(folder) / "large.jpg"
        noise = Image.effect_noise((width // 16, height // 16), 100).convert("RGB")
        noise.save(small)
        noise.resize((width, height)).save(large, quality=90)
        print(f"{width} x {height} pixels, {nbytes:.0f} MiB as uint8, to {args.size} x {args.size}")
        print(f"{'':26}{'peak':>10}{'of its bytes':>14}{'time':>10}")
        for name, prepare in CONTENDERS.items():
            code = MEASURE.replace("{prepare}", prepare).replace("{{", "{").replace("}}", "}")
            command = [sys.executable, "-c", code, str(small), str(large), str(args.size), str(args.rounds)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{name:26}{done.stderr.strip().splitlines()[-1]}")
                continue
            result = json.loads(done.stdout.splitlines()[-1])
            growth = result["growth"]
            print(f"{name:26}{growth:>6.0f} MiB{growth / nbytes:>13.1f}x{result['seconds'] * 1e3:>7.0f} ms")


if __name__ == "__main__":
    main()
