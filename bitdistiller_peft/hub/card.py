"""The model card that goes with a saved model: what it is, and how to load it."""

from __future__ import annotations

from pathlib import Path

from bitdistiller_peft.hub.config import BitDistillerQuantConfig
from bitdistiller_peft.hub.summary import QuantSummary

CARD_NAME = "README.md"

_TEMPLATE = """---
library_name: transformers
{base_model}tags:
- bitdistiller
- quantized
{tags}---

# {title}

{size}, embeddings and scales counted.

{summary}

## How to load

```
pip install bitdistiller_peft
```

```python
import bitdistiller_peft  # needed: it teaches transformers this format
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{location}")
```

Without that import, `from_pretrained` {without}. `bitdistiller.json` holds checksums of the weights;
loading verifies them.
"""


def write_card(
    folder: Path, config: BitDistillerQuantConfig, summary: QuantSummary, location: str, tags: list[str] | None = None
) -> None:
    """Write README.md unless the folder has one."""
    target = folder / CARD_NAME
    if target.exists():
        return
    base_model = str(config.provenance.get("base_model") or "")
    is_hub_id = base_model.count("/") == 1 and not base_model.startswith((".", "/"))
    size, without = "Packed low-bit weights: {:.2f} bits per weight over the whole file", "fails on purpose"
    if config.state == "latent":
        size = "Latent weights, not yet the quantized model: {:.2f} bits per weight once packed"
        without = "leaves the weights unquantized"
    target.write_text(
        _TEMPLATE.format(
            base_model=f"base_model: {base_model}\nbase_model_relation: quantized\n" if is_hub_id else "",
            tags="".join(f"- {tag}\n" for tag in tags or []),
            title=Path(location).name,
            size=size.format(summary.bits_per_weight),
            without=without,
            summary=summary.to_markdown(),
            location=location,
        ),
        encoding="utf-8",
    )
