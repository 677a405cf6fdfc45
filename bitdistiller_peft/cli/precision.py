"""What a model is loaded in, where the command is free to choose (`dtype: auto`): by the rule of `hub.precision`."""

from __future__ import annotations

from functools import cache

from bitdistiller_peft.cli.verb import Console, Settings


def asked_dtype(asked: str, stored: str, device: str) -> str:
    """What to load a model in.

    Args:
        asked: `dtype:` of the settings.
        stored: what the model's config names.
        device: where it will run.
    """
    from bitdistiller_peft.hub.precision import loading_dtype

    return loading_dtype(stored, device) if asked == "auto" else asked


def load_dtype(source: str, settings: Settings, device: str, revision: str | None = None) -> str:
    """What to load the model `source` in; a choice that is not the model's own is said once.

    Raises:
        OSError: there is no such model.
    """
    from bitdistiller_peft.hub.precision import stored_dtype

    asked = str(settings["dtype"] or "auto")
    if asked != "auto" or not device.startswith("cpu"):
        return asked
    stored = stored_dtype(source, revision)
    chosen = asked_dtype(asked, stored, device)
    if chosen == stored:
        return asked
    _say(f"this processor has no instructions for {stored}: computing in {chosen} (dtype: {stored} keeps it).")
    return chosen


@cache
def _say(text: str) -> None:
    Console().note(text)
