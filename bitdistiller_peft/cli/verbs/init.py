"""`bitdistiller init`: write a commented YAML file for the whole chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitdistiller_peft.cli import models
from bitdistiller_peft.cli.options import Option
from bitdistiller_peft.cli.output import write_atomically
from bitdistiller_peft.cli.prompts import starter_prompts
from bitdistiller_peft.cli.schema import DISTILL, GENERATE, QUANT, TOP
from bitdistiller_peft.cli.verb import Console, Positional, Settings, Verb
from bitdistiller_peft.errors import ConfigError

PROMPTS = "prompts.txt"
"""Written beside the file, unless another is named or it is there."""

_TEMPLATE = """\
# The whole chain: bitdistiller run -c {name}
# Check first: bitdistiller estimate -c {name}; what would be done: bitdistiller run -c {name} --dry-run
# Any setting can be given on the command line too, and goes before this file: --distill.learning-rate 8e-6
# Every setting there is: bitdistiller run --help-all

model: {model}            # a folder, or a name on the Hub
output: {output}          # a folder of its own; every stage has one in it
seed: 0
# revision: main          # branch, tag or commit
# device: auto            # cpu, cuda, ...
# dtype: auto             # dtype of the frozen weights: float32, bfloat16, float16

quant:                    # how weights become codes
  bits: {bits}                 # 2, 3, 4
  group_size: {group_size}          # weights per scale; must divide the layers' input widths
  grid: int               # int (asymmetric), int_sym, nf, nf_sym
  learn_zero_point: {learn_zero_point}
  # overrides: {{down_proj: {{bits: 4}}}}

calibrate:                # 1. a good start, in minutes
  method: {method}       # clip, or blockwise: better, slower
  texts: [{texts}]      # text files; wikitext2 (Hub); python-topics (offline)
  num_samples: 64
  seq_len: 512

generate:                 # 2. what the student will learn on, written by the teacher
  prompts: {prompts}    # one per line, or .jsonl with `prompt` or `messages`
  max_new_tokens: 256
  temperature: 0.7

distill:                  # 3. training; every setting of DistillConfig and TRL's SFTConfig may stand here
  learning_rate: 5.0e-5   # 8e-6 with thousands of long texts a step, 1e-4 for short runs
  lr_scheduler_type: cosine
  num_train_epochs: 2
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 4
  max_length: 512
  packing: true
  save_steps: 50          # a stopped run goes on from the last checkpoint
  logging_steps: 10
  report_to: none         # or trackio, wandb, tensorboard
  # teacher: cached       # the teacher speaks once, to disk: for many passes, or little memory

eval:                     # 4. full precision and packed, side by side, and the divergence between them
  text: [{texts}]
  seq_len: 512
  max_chunks: 40
  gallery: 64             # tokens of a greedy answer to each of eight fixed prompts, checked for collapse

# push:                   # 5. only if `run: stages:` names it
#   repo: user/name
#   private: true

run:
  stages: [calibrate, generate, distill, eval, report]
"""


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Write the file; one that exists is never overwritten.

    Raises:
        ConfigError: the file exists, or `quant:` holds what cannot work.
    """
    path = Path(settings.arguments["file"] or "run.yaml")
    if path.exists():
        raise ConfigError(f"`FILE` must be new: got {str(path)!r}, which exists. Choose another name.")
    models.student_config(settings)  # a file that cannot work is not written
    bits, prompts = settings["quant.bits"], Path(settings["generate.prompts"] or path.with_name(PROMPTS))
    text = _TEMPLATE.format(
        name=path.name,
        model=settings["model"] or "HuggingFaceTB/SmolLM2-135M-Instruct",
        output=settings["output"] or f"runs/{path.stem}",
        bits=bits,
        group_size=settings["quant.group_size"] if "quant.group_size" in settings.origins else 64,
        learn_zero_point="true" if settings["quant.grid"] in ("int", "int_fine") else "false",
        method="blockwise" if bits == 2 else "clip",
        texts=settings.arguments["text"],
        prompts=prompts,
    ).replace("grid: int ", f"grid: {settings['quant.grid']} ")
    if settings.is_dry_run:
        console.say(text)
        return {"dry_run": True, "file": str(path)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    console.say(f"wrote {path}.")
    _say_prompts(settings, console, prompts)
    console.say(f"Next: bitdistiller estimate -c {path}, then: bitdistiller run -c {path}")
    return {"file": str(path), "prompts": str(prompts)}


def _say_prompts(settings: Settings, console: Console, prompts: Path) -> None:
    """Write the file of prompts if nobody has, or say that the one that was named is wanted."""
    if prompts.exists():
        return
    if settings["generate.prompts"] is not None:
        console.say(f"Before you run it, write {prompts}: a prompt per line, for the teacher to answer.")
        return
    lines = starter_prompts()
    write_atomically(prompts, "\n".join(lines) + "\n")
    console.say(f"wrote {prompts}: {len(lines)} questions of all kinds, one per line. Better: what your users ask.")


_WRITTEN = {
    "model", "output", "quant.bits", "quant.group_size", "quant.grid", "generate.prompts",
}  # fmt: skip

VERB = Verb(
    "init",
    "write a commented YAML file for the whole chain",
    run,
    sections=("", "quant", "generate"),
    positionals=(Positional("file", "the file to write; default: run.yaml", "?"),),
    own=(Option("text", "text", "text for calibration and evaluation: file, wikitext2, python-topics", "wikitext2"),),
    epilog="example: bitdistiller init run.yaml --model MODEL --bits 2",
    hidden=tuple(
        section.key(option.name)
        for section in (TOP, QUANT, GENERATE, DISTILL)
        for option in section.options
        if section.key(option.name) not in _WRITTEN
    ),
)
