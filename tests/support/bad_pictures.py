"""What people have among their pictures that is none: bytes, and the word by which the reason for a reject is known."""

from __future__ import annotations

import zlib

from pictures import picture


def png_bomb() -> bytes:
    """A whole PNG of 30,000 x 30,000 pixels in 100 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = (30000).to_bytes(4, "big") * 2
    rows = zlib.compressobj()
    data = b"".join(rows.compress(bytes(30001)) for _ in range(30000)) + rows.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\0\0\0\0") + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


BAD = {  # what the file is, and a word of the reason
    "text": (lambda: b"no picture", "not an image"),
    "empty": (lambda: b"", "an empty file"),
    "half a jpeg": (lambda: picture(1, size=(90, 90))[:900], "damaged .*truncated"),
    "half a png": (lambda: picture(1, ".png")[:200], "damaged|not an image"),
    "half a webp": (lambda: picture(1, ".webp")[:100], "damaged|not an image"),
    "a header alone": (lambda: picture(1)[:3], "not an image"),
    "zeros": (lambda: bytes(5000), "not an image"),
    "an html page": (lambda: b"<!DOCTYPE html><html>404</html>", "not an image"),
    "a git-lfs pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
        "not an image",
    ),
    "a bomb": (png_bomb, "bomb|900000000|30000"),
    "a wrong checksum": (lambda: flip(picture(1, ".png", size=(60, 60)), 60), "damaged|not an image"),
    "a tiff without its data": (lambda: picture(1, ".tif")[:60], "damaged|not an image"),
}
