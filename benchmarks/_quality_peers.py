"""Other people's packages as rows of `benchmarks.quality`, on the same windows; imported only where a row asks for one.

pip install auto-round torchao
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

WINDOW, BATCH_SIZE = 128, 8
ZERO_POINT_BITS_PER_BIT = 1  # a zero point is stored in as many bits as a code
SCALE_BITS = 16


def autoround(model: nn.Module, tokenizer: Any, windows: Tensor, *, bits: int, group_size: int) -> nn.Module:
    """AutoRound's own recipe (arXiv 2309.05516) with its 200 steps a block; the windows are seen more than once.

    Args:
        model: full precision.
        tokenizer: its tokenizer.
        windows: tokens ``[1, n]``.
        bits: of a weight.
        group_size: weights that share a scale.

    Returns:
        The model with the values that it would store.
    """
    from auto_round import AutoRound

    ids = windows[:, : windows.shape[1] // WINDOW * WINDOW].reshape(-1, 1, WINDOW)
    tuner = AutoRound(
        model,
        tokenizer,
        bits=bits,
        group_size=group_size,
        sym=False,
        nsamples=len(ids),
        seqlen=WINDOW,
        batch_size=BATCH_SIZE,
        dataset=list(ids),
        device_map="cuda" if torch.cuda.is_available() else "cpu",
    )
    quantized: nn.Module = tuner.quantize()[0]
    return quantized


def torchao_qat(
    model: nn.Module, rows: Tensor, *, bits: int, group_size: int, learning_rate: float, batch_size: int, seed: int
) -> nn.Module:
    """Train as torchao does: asymmetric min-max, recomputed at every step, and cross-entropy on the windows.

    Args:
        model: full precision.
        rows: tokens ``[n, length]``, each trained on once.
        bits: of a weight.
        group_size: weights that share a scale.
        learning_rate: of AdamW, with a cosine and a tenth of warm-up.
        batch_size: rows of a step.
        seed: order of the rows.

    Returns:
        The model, which still quantizes as it computes.
    """
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model.float()  # master weights
    weights = IntxFakeQuantizeConfig(getattr(torch, f"uint{bits}"), group_size=group_size, is_symmetric=False)

    quantize_(model, QATConfig(weight_config=weights, step="prepare"), filter_fn=_is_quantized)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}).with_format("torch")
    steps = len(rows) // batch_size
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=learning_rate,
            lr_scheduler_type="cosine", warmup_steps=round(0.1 * steps), save_strategy="no", report_to="none",
            weight_decay=0.0, use_cpu=not torch.cuda.is_available(), bf16=True, seed=seed,
            logging_steps=max(1, steps // 8),
        )  # fmt: skip
        Trainer(model, args, train_dataset=data).train()
    return model.eval()


def bits_of(model: nn.Module, *, bits: int, group_size: int) -> float:
    """Bits per weight of what such a model would store: codes, scales and zero points, the rest in 16 bits."""
    linears = sum(m.weight.numel() for name, m in model.named_modules() if _is_quantized(m, name))
    total = sum(parameter.numel() for parameter in model.parameters())
    each = bits + (SCALE_BITS + ZERO_POINT_BITS_PER_BIT * bits) / group_size
    return (linears * each + (total - linears) * 16) / total


def _is_quantized(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name
