"""Which linear layers get a `SubLN`: all quantized ones, or those that end an attention or MLP block.

transformers has no word for "output projection", but few names: those of the table cover its decoders. A model that
calls them otherwise is served by naming them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bitdistiller_peft.errors import ConfigError, TargetError

OUTPUT_PROJECTIONS = (
    "o_proj",  # Llama, Qwen, Gemma, Mistral, Phi-3 and most others
    "out_proj",  # OPT, BART, CLIP
    "c_proj",  # GPT-2, of attention and of the MLP
    "self_attn.dense",  # Phi
    "attention.dense",  # GPT-NeoX
    "self_attention.dense",  # Falcon, BLOOM
    "down_proj",
    "fc2",
    "dense_4h_to_h",
    "fc_out",
    "wo",  # T5
)


def check_subln_modules(placement: str, names: object) -> None:
    """Refuse names where there is nothing to choose, and what is no list of names.

    Raises:
        ConfigError: either.
    """
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"`subln_modules` must be a list of names: got {names!r}. Use e.g. ['o_proj', 'down_proj'].")
    if placement != "output":
        raise ConfigError(
            f"`subln_modules` must come with subln='output': got subln={placement!r}, subln_modules={names!r}. "
            "Leave it out, or set subln='output'."
        )


def has_subln(name: str, placement: str, endings: Sequence[str] | None) -> bool:
    """Whether the quantized layer of this name gets a `SubLN`.

    Args:
        name: dotted name of a layer.
        placement: ``"none"``, ``"output"`` or ``"all"``.
        endings: for ``"output"``: endings of names; `None` for the table's.
    """
    if placement != "output":
        return placement == "all"
    chosen = OUTPUT_PROJECTIONS if endings is None else endings
    # both ways: a model loaded without its head lacks a prefix that stored names have
    return any(f".{name}".endswith(f".{ending}") or f".{ending}".endswith(f".{name}") for ending in chosen)


def check_projections(names: Iterable[str], placement: str, endings: Sequence[str] | None) -> None:
    """Refuse a placement that finds no layer, and endings that match none.

    Args:
        names: the quantized layers.
        placement: as for `has_subln`.
        endings: as for `has_subln`.

    Raises:
        TargetError: nothing is found.
    """
    if placement != "output":
        return
    known = list(names)
    unmatched = [ending for ending in endings or () if not any(has_subln(n, placement, [ending]) for n in known)]
    if unmatched or not any(has_subln(name, placement, endings) for name in known):
        got = f"no layer ends in {unmatched[0]!r}" if unmatched else "no quantized layer has a known name of one"
        there = sorted({name.rpartition(".")[2] for name in known})
        raise TargetError(
            f"`subln='output'` must find the output projections of attention and MLP: {got}. Name them in "
            f"subln_modules; the quantized layers end in {there}. Or use subln='all' or 'none'."
        )
