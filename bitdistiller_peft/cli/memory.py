"""What each stage holds at its peak: plain arithmetic on the shapes of a model, nothing is loaded.

The terms are those of the code: frozen weights, fp32 master weights, gradients, optimizer moments, the fake-quantized
weights that autograd keeps, hidden states, a tile of logits. What is not modelled: fragmentation, other programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FP32 = 4
TILE_BYTES = 1 << 28  # logits and their gradient, a tile at a time; both sides
LAYER_COPIES = 6  # fp32 copies of the largest weight while it is fake-quantized and differentiated
BLOCK_STATES = 14  # activations of a decoder block in hidden sizes per token, kept for the backward pass
OPTIMIZERS = {"8bit": 2, "sgd": 0, "adafactor": 1, "lion": 4}  # bytes per weight, by a part of the name
RUNTIME = 700 << 20  # Python with torch, transformers and trl


@dataclass(frozen=True)
class Sizes:
    """A model in numbers.

    Attributes:
        base_bytes: the frozen weights as loaded.
        quantized: weights that are quantized, and so trained.
        learned: learned scales and zero points.
        packed_bytes: the weight file after packing.
        weights: all weights.
        largest: weights of the largest quantized matrix.
        hidden: hidden size.
        intermediate: width of the MLP.
        layers: decoder blocks.
        vocab: vocabulary.
        kv_width: width of the cached keys and values of a token, in one layer.
        compute_bytes: of one number in the dtype of activations.
    """

    base_bytes: int
    quantized: int
    learned: int
    packed_bytes: int
    weights: int
    largest: int
    hidden: int
    intermediate: int
    layers: int
    vocab: int
    kv_width: int
    compute_bytes: int

    @property
    def student_bytes(self) -> int:
        """The overlay: fp32 master weights, scales and zero points."""
        return FP32 * (self.quantized + self.learned)


def optimizer_bytes(name: str) -> int:
    """Bytes per trained weight that an optimizer keeps, by its name in transformers."""
    return next((value for part, value in OPTIMIZERS.items() if part in name.lower()), 8)


def calibrate_peak(sizes: Sizes, values: dict[str, Any]) -> int:
    """The clip search, or block-wise reconstruction with its optimizer for one block."""
    batch = values["batch_size"] or (8 if values["method"] == "clip" else 1)
    tokens = values["num_samples"] * values["seq_len"]
    states = 2 * tokens * sizes.hidden * sizes.compute_bytes
    active = batch * values["seq_len"] * (BLOCK_STATES * sizes.hidden + 3 * sizes.intermediate) * FP32
    block = sizes.quantized // max(1, sizes.layers)
    training = 4 * FP32 * block if values["method"] == "blockwise" else 0
    return sizes.base_bytes + sizes.student_bytes + states + active + training + LAYER_COPIES * FP32 * sizes.largest


def generate_peak(sizes: Sizes, values: dict[str, Any], prompt_tokens: int = 256) -> int:
    """The teacher with its cache and the logits of one position."""
    length = prompt_tokens + values["max_new_tokens"]
    cache = values["batch_size"] * length * 2 * sizes.kv_width * sizes.layers * sizes.compute_bytes
    return sizes.base_bytes + cache + values["batch_size"] * sizes.vocab * FP32 * 4


def distill_peak(sizes: Sizes, values: dict[str, Any]) -> int:
    """Teacher and student in one model, gradients, optimizer, what the backward pass needs."""
    trained = sizes.quantized + sizes.learned
    kept = FP32 * trained + optimizer_bytes(values["optim"]) * trained
    tokens = values["per_device_train_batch_size"] * values["max_length"]
    per_block = tokens * (BLOCK_STATES * sizes.hidden + 3 * sizes.intermediate) * sizes.compute_bytes
    fake_quantized = FP32 * sizes.quantized
    if values["gradient_checkpointing"]:
        states = sizes.layers * tokens * sizes.hidden * sizes.compute_bytes + per_block
        fake_quantized //= max(1, sizes.layers)
    else:
        states = sizes.layers * per_block
    loss = 2 * tokens * sizes.hidden * FP32 + min(TILE_BYTES, 6 * tokens * sizes.vocab * FP32)
    transient = LAYER_COPIES * FP32 * sizes.largest
    return sizes.base_bytes + sizes.student_bytes + kept + states + fake_quantized + loss + transient


def eval_peak(sizes: Sizes, values: dict[str, Any]) -> int:
    """Packed model and teacher side by side, a dense layer, logits of a batch."""
    tokens = values["batch_size"] * values["seq_len"]
    logits = 2 * tokens * sizes.vocab * sizes.compute_bytes + min(TILE_BYTES, 3 * tokens * sizes.vocab * FP32)
    return sizes.base_bytes + sizes.packed_bytes + logits + 2 * FP32 * sizes.largest


def checkpoint_bytes(sizes: Sizes, values: dict[str, Any]) -> int:
    """One training checkpoint on disk: the student and the optimizer."""
    return sizes.student_bytes + optimizer_bytes(values["optim"]) * (sizes.quantized + sizes.learned)
