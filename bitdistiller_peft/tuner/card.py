"""The model card of a student in training: a latent adapter, which is not the quantized model yet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.hub.card import CARD_NAME, card_header, how_it_was_made, hub_id, intro, limits, size_section
from bitdistiller_peft.hub.header import read_header
from bitdistiller_peft.layers import packed_bytes

if TYPE_CHECKING:
    from bitdistiller_peft.tuner.config import BitDistillerConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
LOCATION = "this-folder-or-its-name-on-the-hub"
_OF_PEFT = "[More Information Needed]"
_PREFIX, _INSIDE = "base_model.model.", ".bitdistiller_weight."

_TEMPLATE = """---
{header}
---

# {title}

{intro}

This folder holds a checkpoint in training (latent weights), not the packed model itself. To go on from it:

```python
{load}
```

{size}

{made}

{limits}
"""


_ADAPTER = """import bitdistiller_peft  # needed: it teaches PEFT this method
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r})
packed = PeftModel.from_pretrained(model, {location!r}).pack_and_unload()
packed.save_pretrained("packed")"""

_IN_PLACE = """import bitdistiller_peft  # needed: it teaches transformers this format
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({location!r})  # ready to go on training"""


def student_card(
    values: Mapping[str, Any],
    *,
    title: str,
    location: str,
    size: str,
    task: str | None = None,
    is_adapter: bool = True,
    **metadata: Any,
) -> str:
    """Write the card.

    Args:
        values: the adapter's config, or the quantization config of a model that is trained in place.
        title: heading.
        location: where it lies, or its Hub name.
        size: what it takes, and what the packed model will.
        task: the Hub's name for what the model does.
        is_adapter: whether PEFT loads it.
        metadata: further entries of `ModelCardData`, e.g. ``tags``.
    """
    base = values.get("base_model_name_or_path") or ""
    library = "peft" if is_adapter else "transformers"
    tags = metadata.pop("tags", ())
    load = _ADAPTER if is_adapter else _IN_PLACE
    base_model = hub_id(base) or "path/to/the/base/model"
    return _TEMPLATE.format(
        header=card_header(base, library=library, bits=values.get("bits"), tags=tags, task=task, **metadata),
        title=title,
        intro=intro(base, values, "in training, latent"),
        load=load.format(base=base_model, location=location),
        size=size_section(size),
        made=how_it_was_made(values),
        limits=limits(values),
    )


def replace_card_of_peft(folder: Path, config: BitDistillerConfig) -> None:
    """Put our card in the place of the form that PEFT leaves to be filled in, which also names local paths.

    Args:
        folder: where an adapter was just saved; any other card in it stays.
        config: of the adapter.
    """
    card = folder / CARD_NAME
    if card.is_file() and _OF_PEFT in card.read_text(encoding="utf-8"):
        size = adapter_size(folder, config)
        text = student_card(config.to_dict(), title=folder.name, location=LOCATION, size=size)
        card.write_text(text, encoding="utf-8")


def adapter_size(folder: Path, config: BitDistillerConfig) -> str:
    """What the saved adapter takes, and what its codes, scales and zero points will take once packed.

    Args:
        folder: holds ``adapter_model.safetensors``.
        config: of the adapter.
    """
    file = folder / ADAPTER_WEIGHTS
    try:
        shapes = {name: tuple(entry["shape"]) for name, entry in read_header(file)[0].items()} if file.exists() else {}
    except CheckpointError:
        shapes = {}
    bits = weights = 0
    for name, shape in shapes.items():
        layer, inside, parameter = name.partition(_INSIDE)
        if inside and f"{name}_scale" in shapes:
            layer = layer.removeprefix(_PREFIX)
            whole = layer if parameter == "weight" else f"{layer}.{parameter}"
            bits += 8 * packed_bytes(config.spec(whole), shape)
            weights += math.prod(shape)
    if not weights:
        return "Latent weights, not packed."
    return (
        f"{file.stat().st_size:,} bytes of latent weights. Once packed, the {weights:,} quantized weights take "
        f"{bits / weights:.3f} bits each, scales and zero points counted; embeddings, head and norms come on top, as "
        "the base model has them. `pack_and_unload` writes the size of the whole into the packed model's card."
    )
