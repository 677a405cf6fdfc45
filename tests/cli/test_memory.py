"""The memory model against what is really there: parameters, what autograd keeps of a block, and plain monotony."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.cli import memory
from bitdistiller_peft.cli.memory import Sizes

HIDDEN, INTERMEDIATE, TOKENS = 64, 192, 512
SIZES = Sizes(
    base_bytes=10**6, quantized=2 * 10**5, learned=10**4, packed_bytes=10**5, weights=3 * 10**5, largest=10**4,
    hidden=HIDDEN, intermediate=INTERMEDIATE, layers=2, vocab=512, kv_width=HIDDEN, compute_bytes=4,
)  # fmt: skip
TRAINING: dict[str, Any] = {
    "optim": "adamw_torch_fused",
    "per_device_train_batch_size": 2,
    "max_length": 128,
    "gradient_checkpointing": True,
    "gradient_accumulation_steps": 1,
    "quantize_once": True,
}


def model(layers: int) -> Any:
    config = LlamaConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    return get_bitdistiller_model(LlamaForCausalLM(config), BitDistillerConfig(bits=2, group_size=32))


def kept_for_backward(layers: int) -> int:
    """Bytes of activations that a forward pass leaves for the backward pass; parameters and their values left out."""
    student = model(layers)
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.numel() >= TOKENS * HIDDEN // 4 and TOKENS in tensor.shape:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = student.get_base_model().model(torch.zeros(1, TOKENS, dtype=torch.long)).last_hidden_state
    assert hidden.requires_grad
    return sum(found.values())


def test_what_a_block_keeps_is_what_autograd_keeps() -> None:
    """The difference of three blocks and one: the embedding's and the last norm's share falls out."""
    per_block = (kept_for_backward(3) - kept_for_backward(1)) / 2
    assert SIZES.kept * 4 * TOKENS == pytest.approx(per_block, rel=0.15)


def test_the_student_is_its_trained_tensors() -> None:
    student = model(2)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.shape[-1] in (HIDDEN, INTERMEDIATE)]
    quantized = sum(parameter.numel() for parameter in matrices)
    learned = sum(parameter.numel() for parameter in trained) - quantized
    sizes = replace(SIZES, quantized=quantized, learned=learned)
    assert sizes.student_bytes == sum(parameter.nbytes for parameter in trained)


@given(st.sampled_from(["adamw_torch_fused", "adamw_8bit", "sgd", "lion_32bit", "adafactor"]), st.integers(1, 64))
def test_more_at_once_never_takes_less_and_checkpointing_never_more(optimizer: str, batch: int) -> None:
    values = {**TRAINING, "optim": optimizer, "per_device_train_batch_size": batch}
    peak = memory.distill_peak(SIZES, values)
    assert peak <= memory.distill_peak(SIZES, {**values, "per_device_train_batch_size": batch + 1})
    assert memory.distill_peak(SIZES, {**values, "quantize_once": False}) <= peak
    rarely = {**values, "quantize_once": False}
    assert memory.distill_peak(SIZES, rarely) <= memory.distill_peak(SIZES, {**rarely, "gradient_checkpointing": False})
    several = {**values, "gradient_checkpointing": False, "gradient_accumulation_steps": 4}
    assert memory.distill_peak(SIZES, several) >= memory.distill_peak(SIZES, {**several, "quantize_once": False})
    assert peak <= memory.distill_peak(SIZES, {**values, "optim": "adamw_torch"})


def test_peaks_by_hand() -> None:
    """Few tokens: the peak is at the end of the backward pass, when all gradients are there."""
    trained = SIZES.quantized + SIZES.learned
    tokens = 2 * 128
    block = tokens * (10 * HIDDEN + 4 * INTERMEDIATE) * 4 + SIZES.quantized // 2 * 4
    passing = tokens * max(8 * HIDDEN, 2 * HIDDEN + 3 * INTERMEDIATE) * 4 + 6 * 4 * SIZES.largest
    end = SIZES.base_bytes + 4 * trained + 8 * trained + 4 * trained + block + passing
    assert memory.distill_peak(SIZES, {**TRAINING, "quantize_once": False}) == end
    kept = 4 * SIZES.quantized  # of all blocks at once, in place of this one's
    assert memory.distill_peak(SIZES, TRAINING) == end + kept - SIZES.quantized // 2 * 4
    many = {**TRAINING, "max_length": 1 << 17}  # the loss: three tiles of 64 MiB, and a hidden state per block
    states = 2 * 2 * (1 << 17) * HIDDEN * 4
    assert memory.distill_peak(replace(SIZES, hidden=HIDDEN, intermediate=1, kv_width=1), many) >= states
    calibration = {"method": "clip", "batch_size": None, "num_samples": 4, "seq_len": 64}
    expected = (
        SIZES.base_bytes + 4 * trained + 2 * 4 * 64 * HIDDEN * 4 + 8 * 64 * SIZES.passing * 4 + 24 * SIZES.largest
    )
    assert memory.calibrate_peak(SIZES, calibration) == expected
    grams = memory.GRAMS * 8 * max(HIDDEN, INTERMEDIATE) ** 2
    rounded = SIZES.quantized * SIZES.compute_bytes
    assert memory.calibrate_peak(SIZES, calibration | {"method": "gptq"}) == expected + grams + rounded
    assert memory.calibrate_peak(SIZES, calibration | {"method": "awq"}) == expected + 4 * trained


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [("hidden", None, 2 * HIDDEN), ("hidden", "float32", 4 * HIDDEN), ("topk", None, 8 * (4 + 2) + 4)],
    ids=["hidden", "float32", "topk"],
)
def test_a_token_of_the_cache_takes_what_its_layout_says(kind: str, dtype: str | None, expected: int) -> None:
    values = SimpleNamespace(kind=kind, stored_dtype=dtype, k=8).__dict__
    assert memory.cache_bytes_per_token(SIZES, values) == expected


def test_a_process_takes_more_than_a_stage_holds_and_more_of_a_larger_one() -> None:
    small, large = (memory.process_bytes(held) - memory.RUNTIME - held for held in (1 << 30, 1 << 31))
    assert (small, large) == (1 << 27, 1 << 28)  # an eighth
