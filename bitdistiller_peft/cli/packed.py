"""The last step of every way to a quantized model: pack, save, and say how large it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitdistiller_peft.cli.verb import Console


def save_packed(student: Any, tokenizer: Any, folder: Path, console: Console) -> dict[str, Any]:
    """Pack a student and save it with its tokenizer.

    Args:
        student: the `PeftModel`; it is used up.
        tokenizer: goes beside the weights.
        folder: where to.
        console: gets the summary.

    Returns:
        ``packed``, ``bits_per_weight`` and ``bytes``, of the weight files.
    """
    from bitdistiller_peft.hub import quant_summary

    model = student.pack_and_unload()
    summary = quant_summary(model)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)  # last: it writes the manifest
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    console.say(f"\n{summary.with_files(folder)}\npacked model: {folder}")
    return {"packed": str(folder), "bits_per_weight": summary.bits_per_weight, "bytes": num_bytes}
