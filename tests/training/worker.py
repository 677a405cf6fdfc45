"""One rank of a distributed run: `python -m torch.distributed.run --nproc_per_node 2 worker.py OUT BASES SIZE`.

Trains two steps on the standard data and writes weights and figures of rank 0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.training import helpers

KEYS = ("loss", "forward_kl", "ce", "confidence", "num_tokens", "gamma", "flip_rate", "eval_loss", "eval_forward_kl")


def main(out: Path, bases: Path, size: int) -> None:
    """Run and write `weights.safetensors` and `figures.json`."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    rows = helpers.dataset(16)
    silent = rows.map(
        lambda row, i: {"labels": row["labels"] if i % 2 else [-100] * len(row["labels"])}, with_indices=True
    )
    run = helpers.trainer(
        helpers.student(bases),
        out / "run",
        data=silent,  # whole micro-batches, and with them ranks, without a target
        eval_data=helpers.dataset(8, seed=4),
        max_length=None,
        gamma="estimate",
        gamma_num_batches=2,
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        gradient_accumulation_steps=4,
        save_strategy="steps",
        save_steps=1,
    )
    run.train()
    run.evaluate()
    if run.is_world_process_zero():
        save_file(helpers.weights(run.model), out / "weights.safetensors")
        figures = {key: helpers.history(run, key) for key in KEYS}
        (out / "figures.json").write_text(json.dumps(figures | {"processes": run.accelerator.num_processes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
