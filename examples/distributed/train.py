r"""Distil a model on one or many devices, and pack it: the same script under every launcher and config beside it.

    accelerate launch --config_file examples/distributed/one_node_fsdp2.yaml \\
        examples/distributed/train.py --model MODEL --text FILE --output FOLDER

MODEL is a Hub name or a folder, FILE a text whose paragraphs are learned on. Stopped or killed, the same command goes
on from the newest whole checkpoint. Settings of DistillConfig follow as they are: --learning_rate 1e-4 ...

Two CPU processes on one core, a model of 260,000 weights at 2 bits and groups of 4, `torchrun --nproc_per_node 2 ...
--max_steps 40 --learning_rate 1e-3 --per_device_train_batch_size 4 --max_length 128`: half a minute, CAKLD .85 to .42.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.training import DistillConfig, DistillTrainer


@dataclass
class Job:
    """What is trained on what."""

    model: str = field(metadata={"help": "Hub name or folder."})
    text: Path = field(metadata={"help": "A text file; its paragraphs are learned on."})
    output: Path = field(metadata={"help": "Folder for checkpoints and the packed model."})
    bits: int = field(default=2, metadata={"help": "Bits per weight."})
    group_size: int = field(default=64, metadata={"help": "Weights that share a scale."})


def main() -> None:
    """Train, pack, save."""
    job, args = HfArgumentParser([Job, DistillConfig]).parse_args_into_dataclasses()
    args.output_dir = str(job.output / "trainer")
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    # `args` comes first: under ZeRO-3, transformers then loads the model in parts
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    student = get_bitdistiller_model(model, BitDistillerConfig(bits=job.bits, group_size=job.group_size))
    paragraphs = [block for block in job.text.read_text(encoding="utf-8").split("\n\n") if block.strip()]
    trainer = DistillTrainer(
        student, args, train_dataset=Dataset.from_dict({"text": paragraphs}), processing_class=tokenizer
    )
    trainer.train(resume_from_checkpoint="auto")
    packed = trainer.model.pack_and_unload()  # every process takes part
    if trainer.is_world_process_zero():
        packed.save_pretrained(job.output / "packed")
        tokenizer.save_pretrained(job.output / "packed")
        print(f"packed model: {job.output / 'packed'}")


if __name__ == "__main__":
    main()
