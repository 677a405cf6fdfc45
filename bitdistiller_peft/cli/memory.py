"""What each stage holds at its peak: plain arithmetic on the shapes of a model, nothing is loaded.

The terms are those of the code, and but for `HEAP` no figure is fitted: frozen weights, fp32 master weights, gradients,
optimizer moments, the fake-quantized weights and activations that autograd keeps, hidden states, tiles of logits.
Activations are counted on a decoder block of the usual kind (two norms, attention with rotary positions, a gated MLP).
Not modelled: other programs, and the gaps between blocks on a GPU. `benchmarks/estimate.py` holds this against
measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FP32 = 4
CPU_TILE, GPU_TILE = 1 << 26, 1 << 28  # bytes of logits of one side in the loss, see `losses.checks`
TILES = 3  # both sides' logits, and temporaries of a strip
LAYER_COPIES = 6  # fp32 copies of the largest weight while it is fake-quantized and differentiated
GRAMS = 5  # the Gram matrix, reordered, damped, its factor and that of its inverse
OPTIMIZERS = {"8bit": 2, "sgd": 0, "adafactor": 1, "lion": 4}  # bytes per weight, by a part of the name
RUNTIME = 600 << 20  # Python with torch, transformers and trl
HEAP = 1 / 8
"""Share of what a stage holds that a CPU's heap keeps besides: freed blocks, between gradients that stay.

Fitted. In glibc 2.36 six stages of three models took 4 to 25 % more than they held; with a heap that gives every block
back (MALLOC_MMAP_THRESHOLD_=1048576) it was 3 %, for half as much time again.
"""


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
        tile: bytes of a tile of logits in the loss.
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
    tile: int = CPU_TILE

    @property
    def kept(self) -> int:
        """Activations of a block that its backward pass needs, in numbers per token.

        The inputs of the two norms, normalized; queries, keys, values and the attention's output; the input of the
        output projection and of both halves of the block; gate, its activation, up, and their product.
        """
        return 8 * self.hidden + 2 * self.kv_width + 4 * self.intermediate

    @property
    def passing(self) -> int:
        """Activations of a block that exist at once while nothing is kept, in numbers per token.

        In the attention, input, normalized input, queries, keys, values and the rotated ones on their way; in the MLP,
        input, normalized input, gate, its activation, and up or the product.
        """
        attention = 5 * self.hidden + 3 * self.kv_width
        return max(attention, 2 * self.hidden + 3 * self.intermediate)

    @property
    def student_bytes(self) -> int:
        """The overlay: fp32 master weights, scales and zero points."""
        return FP32 * (self.quantized + self.learned)


def process_bytes(held: int) -> int:
    """What a process on a CPU takes for a stage that holds so much."""
    return RUNTIME + held + int(HEAP * held)


def optimizer_bytes(name: str) -> int:
    """Bytes per trained weight that an optimizer keeps, by its name in transformers."""
    return next((value for part, value in OPTIMIZERS.items() if part in name.lower()), 8)


def calibrate_peak(sizes: Sizes, values: dict[str, Any]) -> int:
    """The clip search, and what a method holds besides.

    Block-wise reconstruction: an optimizer for one block. GPTQ: fp64 copies of the widest layer's Gram matrix and of
    its inverse, and every weight as it was rounded, which the student takes over at the end. AWQ: the student as it
    was, to put it back.
    """
    is_blockwise = values["method"] == "blockwise"
    batch = values["batch_size"] or (1 if is_blockwise else 8)
    tokens = values["num_samples"] * values["seq_len"]
    states = 2 * tokens * sizes.hidden * sizes.compute_bytes  # what enters a block, and what leaves it
    active = batch * values["seq_len"] * (sizes.passing + is_blockwise * sizes.kept) * sizes.compute_bytes
    block = sizes.quantized // max(1, sizes.layers)
    training = 4 * FP32 * block if is_blockwise else 0  # gradients, two moments, and the fake-quantized weights
    layer = LAYER_COPIES * FP32 * sizes.largest
    held = sizes.base_bytes + sizes.student_bytes + states + active + training + layer
    match values["method"]:
        case "gptq":
            gram = GRAMS * 2 * FP32 * max(sizes.hidden, sizes.intermediate) ** 2
            return held + gram + sizes.quantized * sizes.compute_bytes
        case "awq":
            return held + sizes.student_bytes
    return held


def generate_peak(sizes: Sizes, values: dict[str, Any], prompt_tokens: int = 256) -> int:
    """The teacher with its cache and the logits of one position."""
    length = prompt_tokens + values["max_new_tokens"]
    cache = values["batch_size"] * length * 2 * sizes.kv_width * sizes.layers * sizes.compute_bytes
    return sizes.base_bytes + cache + values["batch_size"] * sizes.vocab * FP32 * 4


def cache_peak(sizes: Sizes, values: dict[str, Any]) -> int:
    """The teacher over a batch of documents, and a tile of its logits where its likeliest tokens are kept."""
    tokens = values["batch_size"] * values["max_length"]
    logits = 2 * min(CPU_TILE, tokens * sizes.vocab * FP32) if values["kind"] == "topk" else 0
    return sizes.base_bytes + tokens * (sizes.passing + sizes.hidden) * sizes.compute_bytes + logits


def cache_bytes_per_token(sizes: Sizes, values: dict[str, Any]) -> int:
    """What a token takes in the teacher cache."""
    from bitdistiller_peft.training.cache_store import CacheLayout

    if values["kind"] == "topk":
        return CacheLayout("topk", values["stored_dtype"] or "float16", values["k"], sizes.vocab).bytes_per_token
    return CacheLayout("hidden", values["stored_dtype"] or "bfloat16", sizes.hidden, sizes.vocab).bytes_per_token


def distill_peak(sizes: Sizes, values: dict[str, Any]) -> int:
    """Teacher and student in one model: in the loss, when logits are there, or at the end of the backward pass."""
    trained = sizes.quantized + sizes.learned
    held = sizes.base_bytes + sizes.student_bytes + optimizer_bytes(values["optim"]) * trained
    tokens = values["per_device_train_batch_size"] * values["max_length"]
    values_bytes = sizes.compute_bytes * sizes.quantized // max(1, sizes.layers)  # of a block's weights, fake-quantized
    recomputes = values["gradient_checkpointing"]
    if values["quantize_once"] and (recomputes or values["gradient_accumulation_steps"] > 1):
        held += sizes.compute_bytes * sizes.quantized
        values_bytes = 0
    block = tokens * sizes.kept * sizes.compute_bytes + values_bytes
    until_backward = sizes.layers * (tokens * sizes.hidden * sizes.compute_bytes if recomputes else block)
    logits = TILES * min(sizes.tile, tokens * sizes.vocab * FP32)
    last_block = block + tokens * sizes.passing * sizes.compute_bytes + LAYER_COPIES * FP32 * sizes.largest
    return held + max(until_backward + logits, FP32 * trained + last_block)


def eval_peak(sizes: Sizes, values: dict[str, Any]) -> int:
    """Packed model and teacher side by side, a dense layer, logits of a batch."""
    tokens = values["batch_size"] * values["seq_len"]
    logits = 2 * tokens * sizes.vocab * sizes.compute_bytes + min(CPU_TILE, 3 * tokens * sizes.vocab * FP32)
    return sizes.base_bytes + sizes.packed_bytes + logits + 2 * FP32 * sizes.largest


def checkpoint_bytes(sizes: Sizes, values: dict[str, Any]) -> int:
    """One training checkpoint on disk: the student and the optimizer."""
    return sizes.student_bytes + optimizer_bytes(values["optim"]) * (sizes.quantized + sizes.learned)
