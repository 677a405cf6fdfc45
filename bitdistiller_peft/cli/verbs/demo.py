"""`bitdistiller demo`: the whole path in a minute or two, offline, on a toy model or one of yours."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli import models, output
from bitdistiller_peft.cli.folder import bits_per_weight, read_folder
from bitdistiller_peft.cli.options import Option
from bitdistiller_peft.cli.parse import parse
from bitdistiller_peft.cli.schema import TOP
from bitdistiller_peft.cli.tables import table
from bitdistiller_peft.cli.texts import load_texts
from bitdistiller_peft.cli.verb import Console, Settings, Verb
from bitdistiller_peft.cli.verbs import compare
from bitdistiller_peft.cli.verbs import run as chain

SECTIONS = ("",)
TEXT = "python-topics"
FOLDER = "runs/demo"
HEADER = ("model", "perplexity", "MiB", "bits per weight")
_QUESTIONS = (
    "The for statement is used to", "A class definition", "An exception is raised when", "Slicing a sequence",
    "The import statement", "Comparison operators", "A dictionary maps", "Integer division", "The with statement",
    "A generator function", "String literals", "Function calls bind", "The assert statement", "Boolean operations",
    "Attribute references", "The try statement",
)  # fmt: skip
_YAML = """\
model: {model}
output: {output}
device: {device}
seed: {seed}

quant: {{bits: 2, group_size: 64, learn_zero_point: true}}
calibrate: {{method: clip, texts: [{text}], num_samples: {samples}, seq_len: 128, pack: true}}
generate: {{prompts: {prompts}, prompt_format: text, max_new_tokens: {new_tokens}, temperature: 1.0, batch_size: 16}}
distill:
  learning_rate: {learning_rate}
  lr_scheduler_type: cosine
  max_steps: {steps}
  per_device_train_batch_size: 8
  max_length: 128
  gamma_num_batches: 2
  gradient_checkpointing: false
  bf16: false
  logging_steps: 10
  save_steps: 1000
eval: {{text: [{text}], seq_len: 128, max_chunks: {chunks}}}
run: {{stages: [calibrate, generate, distill, eval, report]}}
"""


@dataclass(frozen=True)
class Budget:
    """How much of everything."""

    toy_steps: int
    samples: int
    prompts: int
    new_tokens: int
    steps: int
    chunks: int


FULL = Budget(toy_steps=600, samples=32, prompts=160, new_tokens=96, steps=80, chunks=40)
QUICK = Budget(toy_steps=300, samples=8, prompts=32, new_tokens=64, steps=24, chunks=10)


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Make a teacher, a YAML file and prompts; run the chain; compare what came out."""
    folder, budget = Path(settings["output"] or FOLDER), QUICK if settings.arguments["quick"] else FULL
    arguments = {"quick": settings.arguments["quick"]}
    settings = settings.with_values(output=str(folder))
    done = output.settled(folder, settings, sections=SECTIONS, console=console, arguments=arguments)
    if done is not None:
        return done
    teacher = _teacher(settings, console, folder, budget)
    path = folder / "run.yaml"
    _write(path, settings, teacher, budget)
    console.say(f"\nwrote {path}, the settings of all that follows:\n\n{path.read_text(encoding='utf-8')}")
    _step(console, chain.VERB, ["-c", path])
    rounded = _rounded(console, settings, teacher, folder / "rounded")
    made = [rounded, folder / "run" / "calibrate" / "packed", folder / "run" / "distill" / "packed"]
    found = _step(console, compare.VERB, [teacher, *made, "-c", path])
    rows = [_row(name, scored) for name, scored in zip(_NAMES, found["rows"], strict=True)]
    cells = [(r["name"], f"{r['perplexity']:,.2f}", f"{r['bytes'] / 2**20:.2f}", f"{r['bits']:.2f}") for r in rows]
    console.say(f"\n{table(HEADER, cells)}\n\nbits per weight count scales, embeddings and all; everything: {folder}")
    if settings["model"] is None:
        console.say("The teacher is a toy: these figures show the steps, not what to expect of a real model.")
    console.say(f"Next, with yours: bitdistiller demo --model MODEL, or: bitdistiller chat {made[-1]}")
    return output.finish(folder, {"rows": rows, "packed": str(made[-1])})


_NAMES = ("full precision", "rounded to 2 bits", "clip search", "distilled")


def _teacher(settings: Settings, console: Console, folder: Path, budget: Budget) -> str:
    if settings["model"] is not None:
        return str(settings["model"])
    console.say(f"training a toy on Python's help topics, {budget.toy_steps} steps; --model takes a real model")
    from bitdistiller_peft.cli.toy import make_toy

    texts = load_texts([TEXT], "calibration")
    count = make_toy(folder / "teacher", texts, steps=budget.toy_steps, seed=settings["seed"])
    console.say(f"teacher: {folder / 'teacher'}, {count:,} weights")
    return str(folder / "teacher")


def _write(path: Path, settings: Settings, teacher: str, budget: Budget) -> None:
    prompts = path.with_name("prompts.txt")
    lines = [_QUESTIONS[i % len(_QUESTIONS)] for i in range(budget.prompts)]
    output.write_atomically(prompts, "\n".join(lines) + "\n")
    text = _YAML.format(
        model=teacher,
        output=path.with_name("run"),
        device=settings["device"],
        seed=settings["seed"],
        text=TEXT,
        prompts=prompts,
        samples=budget.samples,
        new_tokens=budget.new_tokens,
        # a toy wants large steps; of a real model they would unlearn too much
        learning_rate=1e-3 if settings["model"] is None else 1e-4,
        steps=budget.steps,
        chunks=budget.chunks,
    )
    output.write_atomically(path, text)


def _step(console: Console, verb: Verb, arguments: list[Any]) -> dict[str, Any]:
    """Say and do what can also be typed."""
    words = [str(argument) for argument in arguments]
    console.say(f"\n$ bitdistiller {verb.name} {shlex.join(words)}")
    do: Callable[[Settings, Console], dict[str, Any]] = verb.run
    return do(parse(verb, words), console)


def _rounded(console: Console, settings: Settings, teacher: str, folder: Path) -> Path:
    """What 2 bits are without any of this: the teacher's weights rounded to nearest while loading."""
    from transformers import AutoModelForCausalLM

    from bitdistiller_peft.hub import BitDistillerQuantConfig

    if not (folder / "config.json").is_file():
        console.say("\nfor comparison, the same bits without calibration and training: rounding to nearest")
        config = BitDistillerQuantConfig(bits=2, group_size=64)
        model = AutoModelForCausalLM.from_pretrained(teacher, quantization_config=config, dtype=settings["dtype"])
        models.load_tokenizer(teacher).save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def _row(name: str, scored: dict[str, Any]) -> dict[str, Any]:
    folder = read_folder(scored["model"]) if Path(scored["model"]).is_dir() else None
    size = 0 if folder is None else sum(tensor.num_bytes for tensor in folder.tensors)
    bits = float("nan") if folder is None else bits_per_weight(folder)
    return {"name": name, "perplexity": scored["perplexity"]["perplexity"], "bytes": size, "bits": bits}


_KEPT = {"model", "output", "device", "seed"}

VERB = Verb(
    "demo",
    "the whole path on a toy model: a minute or two, no network",
    run,
    sections=SECTIONS,
    own=(Option("quick", "bool", "less of everything: still in order, in half the time or less", False),),
    hidden=tuple(option.name for option in TOP.options if option.name not in _KEPT),
    epilog=f"""
Trains a small teacher on the help topics that every Python carries, calibrates, lets it write texts, distils a 2-bit
student, packs it, and compares: each step is an ordinary command, which is shown. Everything lands in {FOLDER}
(--output). --model takes a model of yours, a folder, instead of the toy.

example: bitdistiller demo && bitdistiller chat {FOLDER}/run/distill/packed""",
)
