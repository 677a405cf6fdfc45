"""The model card that goes with a saved model: what it is, how large, how it was made, how to load it, its limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from bitdistiller_peft.hub.card_sections import MEASURED, mark, put_part, results_by_hand
from bitdistiller_peft.hub.config import BitDistillerQuantConfig
from bitdistiller_peft.hub.header import read_json
from bitdistiller_peft.hub.summary import QuantSummary

CARD_NAME = "README.md"

_TEMPLATE = """---
{header}
---

# {title}

{intro}

{size}

{made}

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

{limits}
"""

_WORDS = {
    "base_model": "base model",
    "calibration_data": "calibration data (SHA-256 of its tokens)",
    "data": "training data (SHA-256 of its tokens)",
    "grid": "grid",
    "group_size": "weights per scale",
    "scale_dtype": "dtype of the scales",
    "activation_bits": "bits of the activations",
    "subln": "SubLN in front of",
    "modules_to_not_convert": "left in full precision",
    "overrides": "layers that differ",
    "written_by": "written by",
}
_SHOWN = ("bits", "grid", "group_size", "scale_dtype", "activation_bits", "subln", "modules_to_not_convert")


def write_card(
    folder: Path, config: BitDistillerQuantConfig, summary: QuantSummary, location: str, tags: list[str] | None = None
) -> None:
    """Write README.md unless the folder has one."""
    target = folder / CARD_NAME
    if target.exists():
        return
    is_packed = config.state == "packed"
    size = f"{_files(folder)}: {_of_files(summary):.2f} bits per weight, embeddings, scales and file headers counted."
    if not is_packed:
        size = (
            "Latent weights, not yet the quantized model: "
            f"{summary.bits_per_weight:.2f} bits per weight once packed, embeddings and scales counted."
        )
    base = config.provenance.get("base_model")
    values = config.to_dict()
    header = card_header(base, library="transformers", bits=config.bits, tags=tags or [], task=_task(folder))
    text = _TEMPLATE.format(
        header=header,
        title=Path(location).name,
        intro=intro(base, values, "packed" if is_packed else "in training, as a latent checkpoint"),
        size=size_section(f"{size}\n\n{summary.to_markdown()}"),
        without="fails on purpose" if is_packed else "leaves the weights unquantized",
        made=how_it_was_made(values),
        location=location,
        limits=limits(values),
    )
    target.write_text(text, encoding="utf-8")


def hub_id(name: object) -> str | None:
    """A model's name if it is one on the Hub; a local path means nothing to others."""
    text = str(name or "")
    is_id = text.count("/") == 1 and not text.startswith((".", "/", "~")) and not Path(text).exists()
    return text if is_id else None


def card_header(
    base: object, *, library: str, bits: float | None, tags: Iterable[str], task: str | None, **more: Any
) -> str:
    """The metadata that the Hub reads, as YAML.

    Args:
        base: name of the full-precision model; named only if it is one on the Hub.
        library: that loads the model.
        bits: code width of most layers, if they are quantized.
        tags: further tags.
        task: the Hub's name for what the model does.
        more: further entries of `ModelCardData`.
    """
    name = hub_id(base)
    relation: dict[str, Any] = {"base_model": name, "base_model_relation": "quantized"} if name else {}
    own = ["bitdistiller", "quantized", *([f"{bits:g}-bit"] if bits else [])]
    data = ModelCardData(library_name=library, pipeline_tag=task, tags=[*own, *tags], **relation, **more)
    return data.to_yaml().strip()


def size_section(text: str) -> str:
    """The section on what the model takes."""
    return mark("size", f"## Size\n\n{text}")


def intro(base: object, values: Mapping[str, Any], state: str) -> str:
    """The first sentence: of what model, how quantized, in what state."""
    name = f"`{hub_id(base) or Path(str(base)).name}`" if base else "a model built in memory"
    if "bits" not in values:
        return mark("about", f"{name[0].upper()}{name[1:]}, trained with bitdistiller_peft; {state}.")
    group = values["group_size"]
    groups = {-1: "one scale per output row", "tensor": "one scale per matrix"}.get(group, f"{group} weights per scale")
    how = f"{values['bits']} bits, grid `{values['grid']}`, {groups}"
    return mark("about", f"{name[0].upper()}{name[1:]}, quantized with bitdistiller_peft: {how}; {state}.")


def how_it_was_made(values: Mapping[str, Any]) -> str:
    """The section with every setting and what the trainer noted.

    Args:
        values: a quantization or adapter config, with ``provenance``.
    """
    noted = {key: value for key, value in values.get("provenance", {}).items() if value is not None}
    if "base_model" in noted:
        noted["base_model"] = hub_id(noted["base_model"]) or Path(str(noted["base_model"])).name
    shown = {key: values[key] for key in _SHOWN if values.get(key) not in (None, [], {}, "none")}
    if values.get("overrides"):
        shown["overrides"] = f"{len(values['overrides'])}, see the config"
    if values.get("written_by"):
        noted["written_by"] = values["written_by"]
    rows = [f"| {_WORDS.get(key, key.replace('_', ' '))} | {_cell(value)} |" for key, value in (shown | noted).items()]
    return mark("made", "\n".join(["## How it was made", "", "| | |", "|---|---|", *rows]))


def limits(values: Mapping[str, Any]) -> str:
    """The section on what must not be expected, as far as the settings tell."""
    lines = [
        "It says less well what its base model says, and keeps that model's biases, license and limits. How much worse"
        " it is differs between tasks: measure it on yours.",
        "Only bitdistiller_peft reads this format; `bitdistiller export` writes others.",
    ]
    provenance = values.get("provenance", {})
    if not {"loss", "calibration", "imported_from"} & set(provenance) and values.get("bits", 16) <= 3:
        lines.insert(0, "**Neither calibrated nor trained.** At 2 or 3 bits such a model is as a rule unusable.")
    return mark("limits", "\n".join(["## Limits", "", *(f"- {line}" for line in lines)]))


def with_results(text: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A card with measurements: in the metadata, and as a section.

    Args:
        text: the card.
        rows: of each measurement ``metric``, ``value``, ``data`` (name of the text or task) and ``protocol``.
    """
    from huggingface_hub import EvalResult, ModelCard

    if not rows:
        return text
    card = ModelCard(text, ignore_metadata_errors=True)
    title = next((line.removeprefix("# ") for line in card.text.splitlines() if line.startswith("# ")), "model")
    data: Any = card.data
    data.model_name = title
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=str(row["data"]),
            dataset_name=str(row["data"]),
            dataset_args={"protocol": row["protocol"]},
            metric_type=str(row["metric"]),
            metric_value=row["value"],
        )
        for row in rows
    ]
    data.eval_results = [*results, *results_by_hand(data)]
    lines = [f"| {r['metric'].replace('_', ' ')} | {r['value']:.6g} | {r['data']} | `{r['protocol']}` |" for r in rows]
    section = ["## Measured", "", "| what | value | on | protocol |", "|---|---:|---|---|", *lines]
    card.text = put_part(card.text, MEASURED, mark(MEASURED, "\n".join(section)))
    return str(card)


def _of_files(summary: QuantSummary) -> float:
    """Bits per weight with all that the files take."""
    return sum(part.stored_bits for part in summary.parts) / max(1, sum(part.num_weights for part in summary.parts))


def _files(folder: Path) -> str:
    files = list(folder.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in files)
    return f"{total:,} bytes in {len(files)} {'file' if len(files) == 1 else 'files'}"


def _task(folder: Path) -> str | None:
    """What the Hub calls what the model does."""
    names = read_json(folder / "config.json").get("architectures") or []
    return "text-generation" if any("ForCausalLM" in str(name) or "LMHead" in str(name) for name in names) else None


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"`{entry}`" for entry in value[:8]) + (f" and {len(value) - 8} more" if value[8:] else "")
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("|", "\\|")
