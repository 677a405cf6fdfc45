"""What a block-wise reconstruction has done so far, kept on disk block by block: a killed run goes on from there.

- ``calibration.json``: all that the blocks depend on, and digests of the student as it began; written first.
- ``model.layers.0.safetensors`` ...: what was trained in a block and what was found on the way; whole or not there.

Blocks are built on one another, so they are taken over from the first one up to the first that is missing or damaged;
files of later ones are then removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bitdistiller_peft.calibration.result import HIGH, LOW, BlockReport, report_from, without_nan
from bitdistiller_peft.calibration.slots import Slot
from bitdistiller_peft.calibration.sweep import Finding, Sweep
from bitdistiller_peft.errors import CheckpointError, ConfigError
from bitdistiller_peft.hub.atomic import write_tensors, write_text
from bitdistiller_peft.jsonfile import check_entries, read_object, strict_json

logger = logging.getLogger(__name__)

MANIFEST_NAME = "calibration.json"
FORMAT = "bitdistiller_calibration_block"
FORMAT_VERSION = 1
_TRAINED = ".trained"
_ANEW = "Delete its folder to begin anew."


class Progress:
    """The finished blocks of one run.

    Args:
        folder: where they are kept; `None` keeps nothing.
        model: the transformers model with the overlays in it.
        slots: the quantized parameters, as they are before the run.
        about: plain values that the result depends on, options and data.

    Raises:
        ConfigError: the folder holds another run, or something else; the differences are named.
        CheckpointError: its ``calibration.json`` cannot be read.
    """

    def __init__(self, folder: Path | None, model: nn.Module, slots: Sequence[Slot], about: Mapping[str, Any]) -> None:
        self.folder = folder
        self._may_restore = folder is not None
        self._taken_over: set[Path] = set()
        self._began: dict[str, str] = {}
        if folder is None:
            return
        now = json.loads(json.dumps({**about, "format_version": FORMAT_VERSION, "model": _digest_around(model, slots)}))
        now["students"] = [f"{slot.name} {json.dumps(slot.spec.to_dict(), sort_keys=True)}" for slot in slots]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / MANIFEST_NAME
        if path.exists():
            was = _read_manifest(path)
            self._began = was.pop("began")
            _refuse_differences(folder, was, now)
            return
        if any(folder.iterdir()):
            raise ConfigError(f"`resume_dir` must be a folder of its own: {str(folder)!r} holds other files.")
        self._began = {slot.name: _digest(slot.trained_tensors()) for slot in slots}
        write_text(path, json.dumps({**now, "began": self._began}, indent=1, sort_keys=True) + "\n")

    @torch.no_grad()
    def restore(self, block: str, slots: Sequence[Slot], sweep: Sweep) -> BlockReport | None:
        """Take a finished block over.

        Args:
            block: its name.
            slots: the quantized parameters in it, which are overwritten.
            sweep: gets what was found for them.

        Returns:
            The block's report, or `None` if it is still to be done.

        Raises:
            ConfigError: a parameter is neither as it was when the run began nor as the run left it.
        """
        if self.folder is None or not slots:
            return None
        report = self._read(block, slots, sweep) if self._may_restore else None
        if report is None:
            self.check_untouched(slots)
            self._discard_rest()
        return report

    def keep(self, report: BlockReport, slots: Sequence[Slot], sweep: Sweep) -> None:
        """Write a finished block to disk; when this returns, it survives a power cut."""
        if self.folder is None:
            return
        tensors = {key: tensor.cpu() for key, tensor in _trained(slots)}
        findings: dict[str, dict[str, Any]] = {}
        for slot in slots:
            values = asdict(sweep.findings[slot.name])
            for key, end in ((LOW, values.pop("low")), (HIGH, values.pop("high"))):
                if end is not None:
                    tensors[slot.name + key] = end.cpu()
            findings[slot.name] = without_nan(values)
        about = {
            "format_version": FORMAT_VERSION,
            "report": without_nan(asdict(report)),
            "findings": findings,
            "sha256": _digest(tensors),
        }
        metadata = {FORMAT: json.dumps(about, allow_nan=False, sort_keys=True)}
        write_tensors(self._path(report.name), tensors, metadata)

    def _path(self, block: str) -> Path:
        return Path(self.folder or "") / f"{block}.safetensors"

    def _read(self, block: str, slots: Sequence[Slot], sweep: Sweep) -> BlockReport | None:
        path = self._path(block)
        if not path.exists():
            return None
        try:
            about, tensors = _read_block(path)
            stored = [(tensor, tensors[key]) for key, tensor in _trained(slots)]
            findings = {slot.name: _finding(slot.name, about["findings"], tensors) for slot in slots}
            report = report_from(BlockReport, about["report"])
            if any(new.shape != old.shape or new.dtype != old.dtype for old, new in stored):
                raise ValueError("a tensor of another shape or dtype")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("Damaged block passed over: %s: %s. It is calibrated again.", path, error)
            return None
        self.check_untouched(slots, tensors)
        for old, new in stored:
            old.copy_(new)
        sweep.findings.update(findings)
        for slot in slots:
            sweep.on_slot(slot.name)
        self._taken_over.add(path)
        return report

    def check_untouched(self, slots: Sequence[Slot], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Refuse parameters that are not as they were when the run began.

        Args:
            slots: the parameters.
            tensors: what the run made of them, by key, which is as good.

        Raises:
            ConfigError: there is one; it is named.
        """
        if self.folder is None:
            return
        for slot in slots:
            found = slot.trained_tensors()
            if _digest(found) == self._began.get(slot.name):
                continue
            if tensors is None or any(not torch.equal(t.cpu(), tensors[_key(slot, s)]) for s, t in found.items()):
                raise ConfigError(
                    f"`model` must be as it was when the run in `resume_dir` began: {slot.name!r} has other weights "
                    f"(resume_dir={str(self.folder)!r}). Load the model anew, or use another resume_dir."
                )

    def _discard_rest(self) -> None:
        """Remove what was built on a block that is now done again."""
        if self._may_restore and self.folder is not None:
            for path in set(self.folder.glob("*.safetensors")) - self._taken_over:
                path.unlink()
        self._may_restore = False


def _key(slot: Slot, suffix: str) -> str:
    return f"{slot.name}{suffix}{_TRAINED}"


def _trained(slots: Iterable[Slot]) -> Iterator[tuple[str, Tensor]]:
    for slot in slots:
        for suffix, tensor in slot.trained_tensors().items():
            yield _key(slot, suffix), tensor


def _read_block(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        about = strict_json((file.metadata() or {}).get(FORMAT, "null").encode())
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
    if about["format_version"] != FORMAT_VERSION or about["sha256"] != _digest(tensors):
        raise ValueError("it differs from what was written")
    return about, tensors


def _finding(name: str, findings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Finding:
    return report_from(Finding, findings[name], low=tensors.get(name + LOW), high=tensors.get(name + HIGH))


def _read_manifest(path: Path) -> dict[str, Any]:
    content = read_object(path, _ANEW)
    check_entries(content, {"format_version": int, "began": dict}, path, _ANEW)
    if content["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} must be of format version {FORMAT_VERSION}: got {content['format_version']}. {_ANEW}"
        )
    return content


def _refuse_differences(folder: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    keys = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    said = [
        f"{key} was {was.get(key)!r}, is {now.get(key)!r}"
        if key not in ("model", "students")
        else {"model": "the full-precision weights differ", "students": "layers are quantized otherwise"}[key]
        for key in keys
    ]
    if said:
        raise ConfigError(
            f"`resume_dir` must hold the same run, or nothing: in {str(folder)!r}, {'; '.join(said)}. Use the same "
            "model, data and options to go on, or another resume_dir."
        )


def _digest_around(model: nn.Module, slots: Sequence[Slot]) -> str:
    """Digest of every weight that is not calibrated: the teacher's, norms, embeddings."""
    trained = {id(parameter) for slot in slots for parameter in slot.student.parameters()}
    return _digest({name: p for name, p in model.named_parameters() if id(p) not in trained})


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return sha.hexdigest()
