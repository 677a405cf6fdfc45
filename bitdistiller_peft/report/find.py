"""What lies in the folder of a run: results, logs, the packed model, its base. Files are read, no weight is."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdistiller_peft.errors import CheckpointError, ConfigError
from bitdistiller_peft.hub.config import QUANT_METHOD
from bitdistiller_peft.hub.files import weight_files
from bitdistiller_peft.hub.header import read_json
from bitdistiller_peft.hub.manifest import MANIFEST_NAME
from bitdistiller_peft.jsonfile import MAX_JSON, strict_json

STAGES = ("calibrate", "generate", "cache", "distill", "eval", "export")
RESULT, SETTINGS, COSTS = "result.json", "resolved.yaml", "costs.json"
METRICS, STATE, DOCTOR = "metrics.jsonl", "trainer_state.json", "doctor.json"
_AGAIN = "Delete it, and run its stage again."
_COMMAND = re.compile(r"# bitdistiller ([a-z-]+),")


@dataclass(frozen=True)
class Findings:
    """What there is to report on.

    Attributes:
        folder: where was looked.
        stages: the result of each finished stage, by name.
        settings: text of the resolved settings; empty without.
        log: entries of the trainer's log, in order.
        doctor: what the training doctor found, in its own words.
        costs: time and memory of each stage, as `run` recorded them.
        packed: folder of the packed model, if there is one.
        config: its config.json.
        base: folder of the full-precision model, if it is on this machine.
        base_name: what it is called, if anything says so.
        files: everything that was read, small files only.
    """

    folder: Path
    stages: dict[str, dict[str, Any]]
    settings: str
    log: tuple[dict[str, Any], ...]
    doctor: tuple[dict[str, Any], ...]
    costs: dict[str, dict[str, Any]]
    packed: Path | None
    config: dict[str, Any]
    base: Path | None
    base_name: str | None
    files: tuple[Path, ...]

    @property
    def quantization(self) -> dict[str, Any]:
        """How the packed model is quantized; empty without one."""
        return dict(self.config.get("quantization_config") or {})

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the evaluation; none without."""
        found = self.stages.get("eval", {}).get("rows")
        return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []

    def fingerprint(self, *more: object) -> str:
        """SHA-256 of all that the report is made from; of weights, of what the manifest says about them.

        Args:
            more: what else it depends on.
        """
        digest = hashlib.sha256(repr((str(self.base), *more)).encode())
        for path in self.files:
            digest.update(f"\n{path.relative_to(self.folder)}\n".encode() + path.read_bytes())
        for path in self._weights():
            about = path.stat()
            digest.update(f"\n{path.name} {about.st_size} {about.st_mtime_ns}".encode())
        return digest.hexdigest()

    def _weights(self) -> list[Path]:
        return [] if self.packed is None else weight_files(self.packed)


def find(folder: Path, base: str | None = None) -> Findings:
    """Look through the folder of `bitdistiller run`, of one stage, or of a packed model.

    Args:
        folder: where to look.
        base: the full-precision model, a folder or a name on the Hub; the packed model names its own.

    Raises:
        ConfigError: the folder holds nothing of that kind, or `base` is not on this machine.
        CheckpointError: a file is damaged; it is named.
    """
    if not folder.is_dir():
        raise ConfigError(f"`FOLDER` must be a folder that exists: got {str(folder)!r}.")
    read: list[Path] = []
    stages = dict(_stages(folder, read))
    log = _log(folder, read)
    packed, config = _packed(folder, read)
    if not (stages or log or packed):
        raise ConfigError(
            f"`FOLDER` must hold what `bitdistiller run` or one of its stages left, or a packed model: got "
            f"{str(folder)!r}, which holds none of it. Name the `output` of the run."
        )
    costs = _json(folder / COSTS, read) if (folder / COSTS).is_file() else {}
    name = base or _name_of_base(config)
    place = None if name is None else locate(name)
    if base is not None and place is None:
        raise ConfigError(f"`model` must be a folder, or in the cache of the Hub: got {base!r}. Download it first.")
    return Findings(
        folder=folder,
        stages=stages,
        settings=_text(folder / SETTINGS, read),
        log=log,
        doctor=_doctor(folder, read),
        costs={key: value for key, value in costs.items() if isinstance(value, dict)},
        packed=packed,
        config=config,
        base=place,
        base_name=name,
        files=tuple(read),
    )


def locate(name: str) -> Path | None:
    """The folder of a model: that folder itself, or its snapshot in the cache of the Hub; nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def _stages(folder: Path, read: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for stage in STAGES:
        if (folder / stage / RESULT).is_file():
            yield stage, _json(folder / stage / RESULT, read)
    if (folder / RESULT).is_file():  # the folder of one command
        head = _COMMAND.match(_text(folder / SETTINGS, []))
        command = "eval" if head and head[1] == "compare" else head[1] if head else ""
        if command in STAGES:
            yield command, _json(folder / RESULT, read)


def _log(folder: Path, read: list[Path]) -> tuple[dict[str, Any], ...]:
    """What the trainer logged: the file of `distill`, or the state of the newest checkpoint while it still trains."""
    for path in (folder / METRICS, folder / "distill" / METRICS):
        if path.is_file():
            lines = _text(path, read).splitlines()
            return tuple(_entry(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip())
    for place in (folder, folder / "trainer", folder / "distill" / "trainer"):
        numbered = [path for path in place.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
        newest = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
        for path in (place / STATE, *(checkpoint / STATE for checkpoint in newest)):
            if path.is_file():
                history = _entry(_text(path, read), str(path)).get("log_history")
                return tuple(entry for entry in items(history) if isinstance(entry, dict))
    return ()


def _doctor(folder: Path, read: list[Path]) -> tuple[dict[str, Any], ...]:
    for place in (folder, folder / "trainer", folder / "distill" / "trainer"):
        if (place / DOCTOR).is_file():
            found = _json(place / DOCTOR, read).get("findings")
            return tuple(finding for finding in items(found) if isinstance(finding, dict))
    return ()


def _packed(folder: Path, read: list[Path]) -> tuple[Path | None, dict[str, Any]]:
    for place in (folder, folder / "packed", folder / "distill" / "packed", folder / "calibrate" / "packed"):
        if not (place / "config.json").is_file():
            continue
        config = read_json(place / "config.json")
        section = config.get("quantization_config")
        kind = (section.get("quant_method"), section.get("state")) if isinstance(section, dict) else ()
        if kind == (QUANT_METHOD, "packed"):
            read.append(place / "config.json")
            if (place / MANIFEST_NAME).is_file():
                read.append(place / MANIFEST_NAME)
            return place, config
    return None, {}


def _name_of_base(config: dict[str, Any]) -> str | None:
    section = config.get("quantization_config") or {}
    provenance = section.get("provenance")
    name = provenance.get("base_model") if isinstance(provenance, dict) else None
    return name if isinstance(name, str) and name else None


def items(value: Any) -> list[Any]:
    """A list of a file as it is, and anything else as an empty one."""
    return value if isinstance(value, list) else []


def _json(path: Path, read: list[Path]) -> dict[str, Any]:
    return _entry(_text(path, read), str(path))


def _entry(text: str, where: str) -> dict[str, Any]:
    """A JSON object; NaN may stand in it, since a log of a run that went wrong has some."""
    try:
        entry = strict_json(text.encode(), allow_nan=True, allow_halves=True)
    except ValueError as error:
        raise CheckpointError(f"{where} must be a JSON object: {error}. {_AGAIN}") from None
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} must be a JSON object: got {type(entry).__name__}. {_AGAIN}")
    return entry


def _text(path: Path, read: list[Path]) -> str:
    if not path.is_file():
        return ""
    if path.stat().st_size > MAX_JSON:
        raise CheckpointError(f"{path} must be at most {MAX_JSON:,} bytes long: got {path.stat().st_size:,}. {_AGAIN}")
    read.append(path)
    return path.read_text(encoding="utf-8", errors="replace")
