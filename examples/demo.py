"""The whole path on a real model: calibrate, distil from itself, pack, reload, evaluate, chat; on a CPU.

    python examples/demo.py            # under a quarter of an hour on two cores
    python examples/demo.py --quick    # under four minutes

SmolLM2-135M-Instruct is fetched once (MODEL=... or --model takes another); the text is Python's own help topics
(--text takes a file such as WikiText-2's test split, or "hub"). Everything lands in runs/demo: the packed model, the
teacher's texts, and summary.json.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from demo_budget import FULL, QUICK, TRAINING, Budget
from demo_measure import measured, say, table, write_summary
from demo_prompts import demo_prompts
from demo_reload import QUESTION, evaluate_elsewhere
from demo_text import DemoText, load_text
from smollm2 import demo_model
from transformers import set_seed
from workbench import SEQ_LEN, Workbench

from bitdistiller_peft import (
    BitDistillerConfig,
    DistillConfig,
    DistillTrainer,
    calibrate,
    generate_teacher_data,
    get_bitdistiller_model,
)

BITS, GROUP_SIZE = 2, 64
BLOCK_SEQ_LEN = 128  # short windows: each begins with another token, and first tokens are what a decoder leans on


class Demo(Workbench):
    """One run: the model, the text, the budget, and the rows so far."""

    def __init__(self, model: str, text: DemoText, budget: Budget, output: Path) -> None:
        super().__init__(model, text, output, chunks=budget.chunks)
        self.budget = budget

    def baselines(self) -> None:
        """Full precision, and rounding to nearest while loading."""
        self.full_precision()
        self.rounded("rtn", bits=BITS, group_size=GROUP_SIZE)

    def clip(self) -> torch.nn.Module:
        """The student, its ranges chosen by the asymmetric clip search."""
        with measured("clip", self.rows) as row:
            config = BitDistillerConfig(bits=BITS, group_size=GROUP_SIZE, learn_zero_point=True)
            student = get_bitdistiller_model(self.load(), config)
            calibrate(student, self.tokenizer, self.text.calibration, num_samples=self.budget.clip_samples)
            self.evaluate(row, student)
            self.save(row, copy.deepcopy(student).pack_and_unload())
        return student

    def distil(self, student: torch.nn.Module) -> Path:
        """Block-wise warm start, then self-distillation on texts that the teacher wrote; packed and saved."""
        with measured("distilled", self.rows) as row:
            data = generate_teacher_data(
                student,
                self.tokenizer,
                [[{"role": "user", "content": prompt}] for prompt in demo_prompts()[: self.budget.prompts]],
                output_dir=self.output / f"teacher_data_{self.budget.prompts}x{self.budget.new_tokens}",
                max_new_tokens=self.budget.new_tokens,
                batch_size=16,
            )
            written = [self.tokenizer.apply_chat_template(r["prompt"] + r["completion"], tokenize=False) for r in data]
            calibrate(
                student,
                self.tokenizer,
                [*written, *self.text.calibration],
                method="blockwise",
                num_samples=self.budget.block_samples,
                seq_len=BLOCK_SEQ_LEN,
                batch_size=2,
                epochs=self.budget.epochs,
                learning_rate=1.5e-2,
                scale_learning_rate=1e-2,
            )
            self.train(student, data)
            folder = self.save(row, student.pack_and_unload())
            answer = evaluate_elsewhere(folder, self.text.evaluation, self.budget.chunks)
            row.perplexity, row.protocol = answer["perplexity"], answer["protocol"]
            say(f"{QUESTION}\n{answer['answer']}")
        return folder

    def train(self, student: torch.nn.Module, data: object) -> None:
        args = DistillConfig(
            str(self.output / "trainer"), max_steps=self.budget.steps, max_length=SEQ_LEN, report_to=[], **TRAINING
        )
        DistillTrainer(model=student, args=args, train_dataset=data, processing_class=self.tokenizer).train()


def main() -> None:
    """Parse arguments and run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the budget")
    parser.add_argument("--model", help="Hub name or folder; default: $MODEL, or SmolLM2-135M-Instruct")
    parser.add_argument("--text", help='a text file, or "hub" for WikiText-2; default: Python\'s help topics')
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for everything")
    args = parser.parse_args()
    set_seed(0)
    demo = Demo(demo_model(args.model), load_text(args.text), QUICK if args.quick else FULL, args.output)
    demo.baselines()
    folder = demo.distil(demo.clip())
    write_summary(args.output / "summary.json", demo.rows, packed_dir=str(folder), text=demo.text.name)
    say(f"\n{table(demo.rows)}\n\npacked model: {folder}; figures: {args.output / 'summary.json'}")


if __name__ == "__main__":
    main()
