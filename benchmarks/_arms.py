"""What benchmarks of training have in common: one model, texts, equal windows for every arm, and rows that survive.

An arm is a way from the full-precision model to a packed one. Arms that train see the same windows of the same texts.
A row is in the results file as soon as it ends; a row that is there already, under the same settings, is not run again.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks import _results
from bitdistiller_peft import (
    BitDistillerConfig,
    DistillConfig,
    DistillTrainer,
    calibrate,
    evaluate_divergence,
    evaluate_perplexity,
    get_bitdistiller_model,
    quant_summary,
)
from bitdistiller_peft.calibration import CalibrationResult
from bitdistiller_peft.calibration.texts import fingerprint, token_windows
from bitdistiller_peft.kernels import multiplies_bf16

SEQ_LEN, CHUNKS = 512, 40
CLIP_TOKENS = 16 * SEQ_LEN
MIN_MAX = {"learn_scale": False}


@dataclass(frozen=True)
class Arm:
    """One recipe: the student, what it starts from, and how the tokens are spent.

    Attributes:
        model: fields of `BitDistillerConfig`; its `bits` and `group_size` are in place of the benchmark's.
        clip: whether a clip search comes first.
        method: another way to calibrate on the same windows, `"gptq"` or `"awq"`.
        method_options: its options.
        blockwise: share of the tokens spent block by block, and its options.
        training: fields of `DistillConfig` for the rest of the tokens, and `step_tokens` and `seq_len`, the tokens of a
            step and of a window, where those are its own.
        share: of `--tokens`, all in all; 0 for rows that only look at text, or not even that.
        peer: another package's way, of `benchmarks._quality_peers`, in place of all that.
        is_own_text: train on what the full-precision model writes, not on the plain texts.
    """

    model: dict[str, Any] = field(default_factory=dict)
    clip: bool = False
    method: str = ""
    method_options: dict[str, Any] = field(default_factory=dict)
    blockwise: tuple[float, dict[str, Any]] | None = None
    training: dict[str, Any] | None = None
    share: float = 1.0
    peer: str = ""
    is_own_text: bool = False


class Bench:
    """The model, the texts and what is common to all rows.

    Args:
        options: `model`, `train_text`, `eval`, `chunks` and `seed`, see `add_arguments`.
        step_tokens: tokens of a training step, a multiple of `SEQ_LEN`.
    """

    def __init__(self, options: argparse.Namespace, *, step_tokens: int) -> None:
        self.options = options
        self.step_tokens = step_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.train_texts = [read_texts(path) for path in options.train_text]
        self.eval_texts = dict(named_texts(item) for item in options.eval)

    def load(self) -> Any:
        """The full-precision model, in bf16 where the machine multiplies it."""
        is_fast = torch.cuda.is_available() or multiplies_bf16("cpu")
        dtype = torch.bfloat16 if is_fast else torch.float32
        return AutoModelForCausalLM.from_pretrained(self.options.model, dtype=dtype)

    def prepare(self, model: nn.Module, arm: Arm, bits: int, group_size: int) -> Any:
        """The student, not yet calibrated."""
        config = BitDistillerConfig(**{"bits": bits, "group_size": group_size, **arm.model})
        return get_bitdistiller_model(model, config)

    def windows(self, tokens: int) -> Tensor:
        """The first windows of each training text in turn, as one row ``[1, >= tokens]``."""
        return windows_of(self.train_texts, self.tokenizer, tokens)

    def calibration_windows(self) -> Tensor:
        """What ranges are searched on, ``[windows, SEQ_LEN]``."""
        return self.windows(CLIP_TOKENS).reshape(-1, SEQ_LEN)[: CLIP_TOKENS // SEQ_LEN]

    def clip(self, student: Any, cache: Path | None = None) -> float:
        """Search clip ranges on the first training windows; return the seconds that the search takes, or took.

        Args:
            student: from `prepare`.
            cache: a folder for ranges, so that each setting is searched once; `None` searches anew.
        """
        windows = self.calibration_windows()
        config = student.peft_config["default"]
        what = (self.options.model, config.grid, config.bits, config.group_size, fingerprint(windows))
        found = cache and cache / f"clip-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.safetensors"
        if found and found.exists():
            CalibrationResult.load(found).apply(student)
            return float(found.with_suffix(".seconds").read_text(encoding="utf-8"))
        started = clock()
        result = calibrate(student, None, windows, num_samples=len(windows), seq_len=SEQ_LEN)
        seconds = clock() - started
        if found:
            found.parent.mkdir(parents=True, exist_ok=True)
            found.with_suffix(".seconds").write_text(str(seconds), encoding="utf-8")
            result.save(found)
        return seconds

    def train(
        self, student: Any, ids: Tensor, steps: int, values: dict[str, Any], callbacks: Sequence[TrainerCallback] = ()
    ) -> list[dict[str, float]]:
        """Train end to end on the first `steps` of a row of tokens; return the trainer's log."""
        values = dict(values)
        step_tokens, seq_len = values.pop("step_tokens", self.step_tokens), values.pop("seq_len", SEQ_LEN)
        ids = ids[:, : steps * step_tokens]
        rows = ids[:, : ids.shape[1] // seq_len * seq_len].reshape(-1, seq_len)
        common: dict[str, Any] = {"lr_scheduler_type": "cosine", "gamma_num_batches": 4}
        common["logging_steps"] = max(1, steps // 8)
        with tempfile.TemporaryDirectory() as folder:
            args = DistillConfig(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=step_tokens // seq_len,
                max_length=seq_len, gradient_checkpointing=False, save_strategy="no", report_to="none",
                use_cpu=not torch.cuda.is_available(), seed=self.options.seed, **common | _with_warmup(values, steps),
            )  # fmt: skip
            data = Dataset.from_dict({"input_ids": rows.tolist()})
            trainer = DistillTrainer(
                student, args, train_dataset=data, processing_class=self.tokenizer, callbacks=list(callbacks)
            )
            trainer.train()
        return list(trainer.state.log_history)

    def perplexity(self, model: nn.Module, text: list[str], **options: Any) -> float:
        """Of the first chunks."""
        options = {"seq_len": SEQ_LEN, "max_chunks": self.options.chunks, **options}
        return evaluate_perplexity(model, self.tokenizer, "\n\n".join(text), **options).perplexity

    def divergence(self, model: nn.Module, text: list[str], chunks: int | None = None) -> Any:
        """From the full-precision model, on the same chunks, or fewer of them."""
        chunks = chunks or self.options.chunks
        return evaluate_divergence(
            model, self.load(), self.tokenizer, "\n\n".join(text), seq_len=SEQ_LEN, max_chunks=chunks
        )


def stored_bits(model: nn.Module) -> float:
    """Bits per weight of all that is stored, with unquantized weights in 16 bits, whatever the machine computes in."""
    rows = quant_summary(model).rows
    bits = sum(16 * row.num_weights if row.state == "full precision" else row.stored_bits for row in rows)
    return bits / sum(row.num_weights for row in rows)


def clock() -> float:
    """Seconds: of the wall where there is a GPU, else of the processor, which do not count other work."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def windows_of(sources: Sequence[list[str]], tokenizer: Any, tokens: int) -> Tensor:
    """The first windows of each source in turn, as one row ``[1, >= tokens]`` (shorter where texts end)."""
    each = math.ceil(tokens / SEQ_LEN / len(sources))
    parts = [token_windows(texts, tokenizer, each, SEQ_LEN) for texts in sources]
    return torch.stack(parts, 1).reshape(1, -1)


def _with_warmup(values: dict[str, Any], steps: int) -> dict[str, Any]:
    values = dict(values)
    ratio = values.pop("warmup_ratio", 0.0)
    return {**values, "warmup_steps": round(ratio * steps)}


def measure(
    name: str,
    wanted: Iterable[dict[str, Any]],
    run: Callable[[dict[str, Any]], dict[str, Any]],
    figures: Callable[[list[dict[str, Any]]], dict[str, Any]],
    shown: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> list[dict[str, Any]]:
    """Run the rows that are missing, writing after each one.

    Args:
        name: of the results file.
        wanted: the settings of every row; a row that has all of them is not run again.
        run: measures one row; what it returns is added to the settings.
        figures: of all rows so far.
        shown: a row as it is printed.

    Returns:
        All rows of the file, others included.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = _results.RESULTS / f"{name}.{device}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    for setting in wanted:
        if any(all(row.get(key) == value for key, value in setting.items()) for row in rows):
            continue
        rows.append({**setting, **run(setting), "machine": _results.machine(device)})
        _results.write_results(name, rows, figures(rows), device=device)
        print(_results.table([shown(rows[-1])]), flush=True)
    print(f"results: {path.name}")
    return rows


def add_arguments(parser: argparse.ArgumentParser, *, tokens: int, chunks: int, name: str) -> None:
    """The arguments that all benchmarks of training take."""
    parser.add_argument("--model", required=True, help="folder or Hub name")
    parser.add_argument("--train-text", type=Path, nargs="+", required=True, help="files to train and calibrate on")
    parser.add_argument("--eval", nargs="+", required=True, metavar="NAME=FILE", help="texts to measure")
    parser.add_argument("--tokens", type=int, default=tokens, help="training tokens of a row")
    parser.add_argument("--chunks", type=int, default=chunks, help="chunks of each evaluation text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default=name, help="of the results file")


def read_texts(path: Path) -> list[str]:
    """Documents of a text file, or of JSON lines; gzipped or not."""
    content = _content(path)
    return [_text_of(row) for row in _rows(content)] if ".jsonl" in path.name else [content]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines, gzipped or not."""
    return _rows(_content(path))


def _content(path: Path) -> str:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return str(file.read())


def _rows(content: str) -> list[dict[str, Any]]:
    # `splitlines` would also cut at separators that stand inside of strings
    return [json.loads(line) for line in content.split("\n") if line.strip()]


def _text_of(row: dict[str, Any]) -> str:
    for key in ("text", "output"):
        if isinstance(row.get(key), str):
            return str(row[key])
    strings = [value for value in row.values() if isinstance(value, str)]
    if len(strings) != 1:
        raise ValueError(f"no text in a line with the fields {sorted(row)}")
    return strings[0]


def named_texts(item: str) -> tuple[str, list[str]]:
    """The name and the documents of `NAME=FILE`."""
    name, _, path = item.partition("=")
    return name, read_texts(Path(path))
