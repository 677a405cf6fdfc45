"""`export_model`: refuse what a format cannot hold, write, read back, compare, then put the folder in place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bitdistiller_peft._version import library_version
from bitdistiller_peft.errors import ExportError
from bitdistiller_peft.export.formats import ExportFormat, Options, export_format_names, get_export_format
from bitdistiller_peft.export.source import PackedSource, open_source
from bitdistiller_peft.export.verify import VerifyReport, compare


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        format: the format's name.
        folder: where it lies.
        options: the options in force.
        verification: what the foreign reader was compared on.
    """

    format: str
    folder: Path
    options: dict[str, Any]
    verification: VerifyReport

    def __str__(self) -> str:
        return f"{self.folder}: {self.verification}"


def export_model(
    model: nn.Module | str | os.PathLike[str],
    format: str,
    output_dir: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    **options: Any,
) -> ExportReport:
    """Write a packed model in a foreign format, exactly, and prove it by reading the result back.

    The very integers and scales that were trained are written; nothing is quantized again. A model that the format
    cannot hold is refused before anything is written.

    Args:
        model: a packed model, or the folder that its `save_pretrained` wrote.
        format: one of `export_format_names()`.
        output_dir: folder to write to; it must be empty or not exist, and appears only when everything was compared.
        tokenizer: saved beside the weights; a folder's own tokenizer goes along without it.
        options: options of the format, e.g. ``widen_to=4``; see `docs/guides/export.md`.

    Returns:
        Where the model lies, and what was compared.

    Raises:
        ExportError: the format cannot hold the model (the reason and the nearest format that can are named), a needed
            package is missing, the folder is not empty, or the foreign reader sees something else.
        UnknownNameError, ConfigError: no such format or option, or a value that it does not take.
        StateError, CheckpointError: the model is not packed, or damaged.
    """
    chosen = get_export_format(format)
    resolved = chosen.resolve(options)
    target = Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"`output_dir` must be an empty folder: got {str(output_dir)!r}. Choose a new one.")
    with open_source(model) as source, _working_folder(target) as folder:
        check_fits(source, chosen, resolved)
        chosen.check_installed()  # last: what cannot be held is refused on every machine
        _add_tokenizer(source, tokenizer, folder)
        chosen.write(source, folder, resolved)
        verification = compare(source, folder, chosen)
        _write_card(source, folder, chosen, verification)
        folder.chmod(0o755)  # a temporary folder is private
        if target.exists():
            target.rmdir()
        folder.replace(target)
    return ExportReport(chosen.name, target, resolved, verification)


def check_fits(source: PackedSource, chosen: ExportFormat, options: Options) -> None:
    """Refuse a model that a format cannot hold exactly.

    Raises:
        ExportError: the layer, the reason, and the nearest format that can.
    """
    reason = refusal(source, chosen, options)
    if reason is None:
        return
    nearest = nearest_format(source, chosen)
    advice = "No other format can either; keep the packed checkpoint."
    if nearest is not None:
        how = "".join(f", {key}={value!r}" for key, value in nearest[1].items())
        advice = f"The nearest format that can: export_model(model, {nearest[0]!r}, output_dir{how})."
    raise ExportError(f"format {chosen.name!r} must hold the model exactly: it cannot, {reason}. {advice}")


def refusal(source: PackedSource, chosen: ExportFormat, options: Options) -> str | None:
    """Why a format cannot hold a model, or `None`."""
    reason = _refuse_inputs(source, chosen) or chosen.refuse_model(source, options)
    if reason is not None:
        return reason
    for weight in source.weights():
        reason = chosen.refuse_weight(weight, options)
        if reason is not None:
            return f"layer {weight.layer!r}: {reason}"
    return None


def _refuse_inputs(source: PackedSource, chosen: ExportFormat) -> str | None:
    """Why a format's engines cannot do to the inputs of a layer what the model does."""
    if source.has_sub_norms:
        return f"subln={source.quant_config.subln!r} puts norms in front of layers that other engines do not know"
    if source.activation_bits not in chosen.activation_bits:
        return f"activation_bits={source.activation_bits!r} is not what its engines do, {chosen.activation_bits}"
    return None


def nearest_format(source: PackedSource, asked: ExportFormat) -> tuple[str, Options] | None:
    """The format, with options, that holds a model: the one asked for with other options first, then in order."""
    others = [get_export_format(name) for name in export_format_names() if name != asked.name]
    for candidate in (asked, *others):
        for variant in candidate.variants:
            if refusal(source, candidate, candidate.resolve(variant)) is None:
                return candidate.name, variant
    return None


@contextmanager
def _working_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target that is gone afterwards, unless it has become the target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _add_tokenizer(source: PackedSource, tokenizer: Any, folder: Path) -> None:
    source.copy_companions(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


_CARD = """---
library_name: {library}
tags:
- bitdistiller
- quantized
---

# {title}

Low-bit weights trained with quantization-aware distillation and exported by bitdistiller_peft {version} to
`{name}` ({engines}). Nothing was quantized again: {compared}.
"""


def _write_card(source: PackedSource, folder: Path, chosen: ExportFormat, verification: VerifyReport) -> None:
    base = str(source.quant_config.provenance.get("base_model") or "").rstrip("/").rpartition("/")[2]
    text = _CARD.format(
        library="gguf" if chosen.name == "gguf" else "transformers",
        title=f"{base or source.architecture} ({chosen.name})",
        version=library_version(),
        name=chosen.name,
        engines=chosen.engines,
        compared=verification,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
