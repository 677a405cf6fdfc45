"""Seconds of a stage from a short probe: the real work on random models of one and two blocks, and a line through it.

Time is taken for one and two decoder blocks and for two amounts of work (tokens of a step, windows, new tokens), twice
after a first, untimed run; the faster one counts. What a block costs and what a piece of work costs follow from the
four numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from bitdistiller_peft.cli.precision import asked_dtype
from bitdistiller_peft.cli.verb import Settings

PROBE_TOKENS = 256
"""Tokens of the longest step of a probe."""

_OF_VERB = {"texts", "method", "num_samples", "seq_len", "batch_size", "pack"}
Work = Callable[[Any, Settings, int], Callable[[], object]]


def seconds_of(stage: str, settings: Settings, device: str, amount: float) -> float | None:
    """How long a stage, or one step of training, will take.

    Args:
        stage: name of the stage.
        settings: for the model, `quant:` and the stage.
        device: where to run.
        amount: the work at full size: tokens of a training step, windows, or new tokens of an answer.

    Returns:
        Seconds; `None` for a stage that has no probe.
    """
    if stage not in _WORK:
        return None
    make, pieces = _WORK[stage]
    amounts = pieces(settings)
    config = _config(settings)
    times = {
        (blocks, piece): _time(make(_model(config, settings, blocks, device), settings, piece), device)
        for blocks in (1, 2)
        for piece in amounts
    }
    return extrapolate(times, int(config.get_text_config().num_hidden_layers), amount)


def extrapolate(times: dict[tuple[int, int], float], blocks: int, amount: float) -> float:
    """Read a time off the surface ``(a + b * blocks) + (c + d * blocks) * amount`` through four measurements.

    Args:
        times: seconds by blocks, 1 and 2, and amount of work, two of them.
        blocks: of the whole model.
        amount: of the whole work.
    """
    low, high = sorted({piece for _, piece in times})
    at_low, at_high = (
        times[1, piece] + (blocks - 1) * max(0.0, times[2, piece] - times[1, piece]) for piece in (low, high)
    )
    return max(0.0, at_low + (amount - low) / (high - low) * max(0.0, at_high - at_low))


def _config(settings: Settings) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(settings["model"], revision=settings["revision"])


def _model(config: Any, settings: Settings, blocks: int, device: str) -> Any:
    """The model with its first blocks alone, of random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    small = deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers = blocks
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:blocks]
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    dtype = getattr(torch, asked_dtype(settings["dtype"], stored, device))
    with torch.random.fork_rng():
        return AutoModelForCausalLM.from_config(small, dtype=dtype).to(device)


def _student(model: Any, settings: Settings) -> Any:
    from bitdistiller_peft.tuner import BitDistillerConfig, get_bitdistiller_model

    values = {key: value for key, value in settings.section("quant").items() if value is not None}
    return get_bitdistiller_model(model, BitDistillerConfig(**values))


def _ids(model: Any, rows: int, length: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(vocab, (rows, length), generator=generator).to(model.device)


def _step(model: Any, settings: Settings, tokens: int) -> Callable[[], object]:
    """One step of training: teacher, student, loss, backward pass, optimizer."""
    import torch

    from bitdistiller_peft.losses import Objective, distillation_loss

    student = _student(model, settings).train()
    if settings["distill.gradient_checkpointing"]:
        model.gradient_checkpointing_enable()
    ids, head = _ids(model, 1, tokens), model.get_output_embeddings().weight
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad])

    def run() -> None:
        with torch.no_grad(), student.disable_adapter():
            teacher = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        objective = Objective("cakld", gamma=0.5)
        output = distillation_loss(hidden[0], head, teacher[0], head, ids[0].roll(-1), objective=objective)
        output.loss_sum.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return run


def _calibration(model: Any, settings: Settings, windows: int) -> Callable[[], object]:
    from bitdistiller_peft.calibration import calibrate

    values = settings.section("calibrate")
    options = {key: value for key, value in values.items() if key not in _OF_VERB and value is not None}
    student, ids = _student(model, settings), _ids(model, windows, values["seq_len"])
    how = {key: values[key] for key in ("method", "seq_len", "batch_size")}
    return lambda: calibrate(student, None, ids, num_samples=windows, show_progress=False, **how, **options)


def _generation(model: Any, settings: Settings, new_tokens: int) -> Callable[[], object]:
    ids = _ids(model, settings["generate.batch_size"], 32)
    return lambda: model.generate(
        ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip


def _step_pieces(settings: Settings) -> tuple[int, int]:
    length = min(PROBE_TOKENS, settings["distill.max_length"])
    return length // 2, length


_WORK: dict[str, tuple[Work, Callable[[Settings], tuple[int, int]]]] = {
    "distill": (_step, _step_pieces),
    "calibrate": (_calibration, lambda settings: (1, 2)),
    "generate": (_generation, lambda settings: (4, 8)),
}


def _time(work: Callable[[], object], device: str) -> float:
    """Seconds of the faster of two runs after a first: other work on the machine must not look like a block's cost."""
    _run(work, device)
    return min(_run(work, device) for _ in range(2))


def _run(work: Callable[[], object], device: str) -> float:
    import torch

    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start
