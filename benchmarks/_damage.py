"""Change single nibbles of an exported model, one at a time, and see whether `verify_export` notices."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from bitdistiller_peft import verify_export
from bitdistiller_peft.errors import ExportError
from bitdistiller_peft.export import ExportReport
from bitdistiller_peft.hub.header import read_header

Place = tuple[Path, int, int]


def places(folder: Path) -> list[Place]:
    """File, first and last byte of every tensor that can be damaged."""
    found: list[Place] = []
    for path in folder.glob("*.safetensors"):
        entries, start = read_header(path)
        found += [(path, *(start + offset for offset in entry["data_offsets"])) for entry in entries.values()]
    for path in (*folder.glob("*.gguf"), *folder.glob("*.onnx.data")):
        found.append((path, path.stat().st_size // 2, path.stat().st_size - 64))  # the second half is all weights
    for path in folder.glob("*.xml"):
        data = [entry.attrib for entry in ElementTree.parse(path).iterfind(".//layer[@type='Const']/data")]
        spans = [(int(entry["offset"]), int(entry["size"])) for entry in data]
        found += [(path.with_suffix(".bin"), start, start + size) for start, size in spans if size > 1024]
    return found


def caught(model: Path, report: ExportReport, times: int) -> int:
    """How many of `times` changed nibbles `verify_export` sees."""
    draw, seen = random.Random(report.format), 0
    for _ in range(times):
        path, start, end = draw.choice(places(report.folder))
        at, bit = draw.randrange(start, end), draw.choice((0x01, 0x02, 0x10, 0x20))
        kept = _change(path, at, bit)
        try:
            verify_export(model, report.folder, report.format)
        except ExportError:
            seen += 1
        finally:
            _change(path, at, bit)
        if path.read_bytes()[at] != kept:
            raise RuntimeError(f"{path} is not as it was")
    return seen


def _change(path: Path, at: int, bit: int) -> int:
    """Flip bits of one byte in place; returns what it was."""
    with path.open("r+b") as file:
        file.seek(at)
        kept = file.read(1)[0]
        file.seek(at)
        file.write(bytes([kept ^ bit]))
    return kept
