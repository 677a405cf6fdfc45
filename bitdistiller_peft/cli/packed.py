"""The last step of every way to a quantized model: pack, save, and say how large it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitdistiller_peft.cli.ranks import is_main_process
from bitdistiller_peft.cli.verb import Console, Settings


def save_packed(student: Any, tokenizer: Any, folder: Path, console: Console, settings: Settings) -> dict[str, Any]:
    """Pack a student and save it with its tokenizer; of several processes, all pack, and the first saves.

    Args:
        student: the `PeftModel`; it is used up.
        tokenizer: goes beside the weights.
        folder: where to.
        console: gets the summary.
        settings: for `dtype` and `model`, whose dtype the plain weights are stored in where it is free.

    Returns:
        ``packed``, ``bits_per_weight`` and, of the weight files, ``bytes``.
    """
    from bitdistiller_peft.hub import quant_summary, restore_dtype, stored_dtype

    model = student.pack_and_unload()
    if settings["dtype"] == "auto":
        restore_dtype(model, stored_dtype(settings["model"], settings["revision"]))
    summary = quant_summary(model)
    if not is_main_process():
        return {"packed": str(folder), "bits_per_weight": summary.bits_per_weight}
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)  # last: it writes the manifest
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    console.say(f"\n{summary.with_files(folder)}\npacked model: {folder}")
    return {"packed": str(folder), "bits_per_weight": summary.bits_per_weight, "bytes": num_bytes}
