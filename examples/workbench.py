"""What the examples of the methods share: a model, a text and an output folder; load, score, save, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from demo_measure import Row, measured, say, table, weight_bytes, write_summary
from demo_text import DemoText
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitdistiller_peft import BitDistillerQuantConfig, evaluate_perplexity, quant_summary
from bitdistiller_peft.hub import loading_dtype, restore_dtype, stored_dtype

SEQ_LEN = 512


def load_fast(source: str | Path, **kwargs: Any) -> Any:
    """Load a model in the dtype that this processor is fast in."""
    dtype = loading_dtype(stored_dtype(str(source)), "cpu")
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **kwargs)


class Workbench:
    """One run.

    Args:
        model: name on the Hub or folder of the full-precision model.
        text: to calibrate and to evaluate on.
        output: folder for everything.
        chunks: of `SEQ_LEN` tokens, to evaluate on.
    """

    def __init__(self, model: str, text: DemoText, output: Path, *, chunks: int) -> None:
        self.model, self.text, self.output, self.chunks = model, text, output, chunks
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.stored = stored_dtype(model)
        self.rows: list[Row] = []

    def load(self, **kwargs: Any) -> Any:
        """The full-precision model, fresh; in fp32 where the processor has no instructions for its 16 bits."""
        return load_fast(self.model, **kwargs)

    def evaluate(self, row: Row, model: Any) -> None:
        """Note a model's perplexity."""
        result = evaluate_perplexity(
            model, self.tokenizer, self.text.evaluation, seq_len=SEQ_LEN, max_chunks=self.chunks
        )
        row.perplexity, row.protocol = result.perplexity, result.protocol

    def save(self, row: Row, model: Any) -> Path:
        """Save a packed model and its tokenizer, in the dtype that the model came in, and note its size."""
        folder = self.output / row.name
        restore_dtype(model, self.stored)
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        row.bits_per_weight, row.file_bytes = quant_summary(model).bits_per_weight, weight_bytes(folder)
        return folder

    def full_precision(self) -> None:
        """Score the model as it is."""
        with measured("full_precision", self.rows) as row:
            model = self.load()
            self.evaluate(row, model)
            restore_dtype(model, self.stored)
            row.bits_per_weight, row.file_bytes = quant_summary(model).bits_per_weight, weight_bytes(Path(self.model))

    def rounded(self, name: str, **settings: Any) -> None:
        """Score and save the model rounded to nearest while it is loaded; `settings` are of the quantization."""
        with measured(name, self.rows) as row:
            model = self.load(quantization_config=BitDistillerQuantConfig(**settings))
            self.evaluate(row, model)
            self.save(row, model)

    def reloaded(self, row: Row, packed: Any) -> None:
        """Save a packed model, and score what comes back from disk."""
        self.evaluate(row, load_fast(self.save(row, packed)))

    def perplexity(self, name: str) -> float:
        """The perplexity of a row."""
        return next(row.perplexity for row in self.rows if row.name == name)

    def finish(self, packed: str) -> None:
        """Print the table and where everything is, and write summary.json.

        Args:
            packed: the row whose model the next step reads.
        """
        folder = self.output / packed
        write_summary(self.output / "summary.json", self.rows, packed_dir=str(folder), text=self.text.name)
        say(f"\n{table(self.rows)}\n\npacked model: {folder}; figures: {self.output / 'summary.json'}")
        say(f"next: bitdistiller chat {folder}")
