"""What is written is, byte for byte, what it has always been."""

from __future__ import annotations

import json
from pathlib import Path

import written

EXPECTED = Path(__file__).parent / "data" / "written.json"


def test_the_bytes_of_all_layouts_are_those_of_the_committed_digests():
    assert written.written() == json.loads(EXPECTED.read_text())
