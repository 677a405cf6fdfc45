"""Every setting of the command, by section: one YAML file serves all verbs."""

from __future__ import annotations

from functools import cache

from bitdistiller_peft.cli.inherited import calibrate_options, distill_options, quant_options
from bitdistiller_peft.cli.options import Option, Section

STAGES = ("calibrate", "generate", "cache", "distill", "eval", "export", "report", "push")
DEFAULT_STAGES = ["calibrate", "generate", "distill", "eval", "report"]
TEXT_HELP = "text files, 'wikitext2' (Hub) or 'python-topics' (offline)"

TOP = Section(
    "",
    "model and output",
    (
        Option("model", "text", "full-precision model: a folder, or a name on the Hub"),
        Option("revision", "text", "branch, tag or commit of a model on the Hub"),
        Option("output", "text", "folder to write to; must be new, empty, or from the same command"),
        Option("device", "text", "auto, cpu, cuda, cuda:1, mps", "auto"),
        Option("dtype", "text", "dtype of the weights", "auto", ("auto", "float32", "bfloat16", "float16")),
        Option("seed", "int", "seed of everything that draws", 0),
    ),
)
QUANT = Section(
    "quant",
    "quantization (BitDistillerConfig)",
    (
        Option("bits", "int", "code width: 2, 3, 4, or 8 for the integer grids", 2),
        Option("group_size", "any", "weights per scale; -1: one per output row, 'tensor': one per matrix", 128),
        Option("grid", "text", "what codes stand for: int, int_fine, int_sym, nf, nf_sym, ...", "int"),
        Option("scale_dtype", "text", "storage dtype of the scales", "float16", ("float16", "bfloat16", "float32")),
        Option("learn_scale", "bool", "train the scales too", True),
        Option("learn_zero_point", "bool", "train the zero points too (grids int, int_fine)", False),
    ),
    quant_options,
)
METHODS = ("clip", "gptq", "awq", "blockwise")
CALIBRATE = Section(
    "calibrate",
    "calibration",
    (
        Option("texts", "list", TEXT_HELP),
        Option("method", "text", "clip search, rounding with GPTQ, AWQ's scales, or blocks rebuilt", "clip", METHODS),
        Option("num_samples", "int", "windows of text", 128),
        Option("seq_len", "int", "tokens in a window", 512),
        Option("batch_size", "int", "windows at once (8 for clip, 1 for blockwise)"),
        Option("pack", "bool", "also write the packed model, without any training", False),
    ),
    calibrate_options,
)
GENERATE = Section(
    "generate",
    "data that the teacher writes",
    (
        Option("prompts", "text", "file with prompts: lines of .txt, or .jsonl with 'prompt' or 'messages'"),
        Option("prompt_format", "text", "chat: lines are questions; text: openings", "auto", ("auto", "chat", "text")),
        Option("max_prompts", "int", "use only that many"),
        Option("max_new_tokens", "int", "what an answer may take", 256),
        Option("temperature", "float", "of the sampling; 0 takes the likeliest token", 0.7),
        Option("top_p", "float", "sample among the likeliest tokens of this joint probability", 1.0),
        Option("top_k", "int", "sample among this many likeliest tokens; 0 for all", 0),
        Option("batch_size", "int", "prompts answered together", 8),
    ),
)
CACHE = Section(
    "cache",
    "what the teacher says, kept on the disk",
    (
        Option("teacher", "text", "another model to ask, of the same vocabulary: folder or Hub name"),
        Option("kind", "text", "hidden: last hidden states; topk: the likeliest tokens", "hidden", ("hidden", "topk")),
        Option("k", "int", "tokens per position, for kind topk", 64),
        Option("stored_dtype", "text", "float16, bfloat16, float32 (16 bits, those of the teacher)"),
        Option("batch_size", "int", "documents asked about together", 8),
    ),
)
DISTILL = Section(
    "distill",
    "training (DistillConfig)",
    (
        Option("data", "text", "folder from `generate`, or .jsonl, .json, .csv, .parquet, .txt"),
        Option("student", "text", "folder from `calibrate` to start from; else round to nearest"),
        Option("pack", "bool", "write the packed model when done", True),
        Option("resume", "bool", "go on from the last checkpoint in the output folder", True),
        Option("loss_type", "text", "cakld, forward_kl, reverse_kl, jsd, ce, mixture", "cakld"),
        Option("gamma", "any", "share of reverse KL in CAKLD: estimate, per_token, or 0 to 1", "estimate"),
        Option("teacher", "text", "'self', 'cached' (see `cache`), or another model: folder or Hub name", "self"),
        Option("learning_rate", "float", "of the master weights", 2e-5),
        Option("scale_learning_rate", "float", "of the scales (learning_rate)"),
        Option("lr_scheduler_type", "text", "linear, cosine, constant, ...", "linear"),
        Option("warmup_steps", "float", "steps of rising learning rate; below 1: a share of all", 0),
        Option("max_steps", "int", "steps; -1: as num_train_epochs says", -1),
        Option("num_train_epochs", "float", "passes over the data", 3.0),
        Option("per_device_train_batch_size", "int", "examples at once", 8),
        Option("gradient_accumulation_steps", "int", "times as many per step", 1),
        Option("max_length", "int", "tokens of an example", 1024),
        Option("packing", "bool", "put several examples into one sequence", False),
        Option("gradient_checkpointing", "bool", "less memory, more time", True),
        Option("quantize_once", "bool", "once per step, not per micro-batch; keeps one more copy", True),
        Option("bf16", "any", "compute in bf16 (where the device can)"),
        Option("optim", "text", "adamw_torch_fused, adamw_8bit, ...", "adamw_torch_fused"),
        Option("logging_steps", "float", "steps between log lines", 10),
        Option("save_steps", "float", "steps between checkpoints", 500),
        Option("save_total_limit", "int", "checkpoints to keep", 2),
        Option("report_to", "any", "none, trackio, wandb, tensorboard, ...", "none"),
    ),
    distill_options,
)
EVAL = Section(
    "eval",
    "evaluation",
    (
        Option("text", "list", TEXT_HELP),
        Option("seq_len", "int", "tokens per chunk", 512),
        Option("max_chunks", "int", "use only that many chunks"),
        Option("batch_size", "int", "chunks, or samples of a task, at once", 1),
        Option("tasks", "list", "tasks of lm-evaluation-harness: arc_easy, gsm8k, ... (extra [eval])"),
        Option("limit", "int", "use only that many samples of each task"),
        Option("num_fewshot", "int", "examples before a question (as the task is published)"),
        Option("apply_chat_template", "bool", "put questions into the chat template", False),
        Option("task_folder", "text", "folder with task files of your own"),
        Option("data_folder", "text", "read the tasks' data from here, <task>/<split>.jsonl, and nowhere else"),
        Option("allow_code_execution", "bool", "let tasks run what the model writes, on this machine", False),
        Option("allow_latent", "bool", "score the float weights of a latent checkpoint", False),
        Option("gallery", "int", "tokens of a greedy answer to each fixed prompt, checked for collapse; none without"),
        Option("verify", "text", "what loading checks", "fast", ("fast", "full", "none")),
    ),
)
EXPORT = Section(
    "export",
    "export",
    (
        Option("formats", "list", "formats to export to: gguf, compressed-tensors, ..."),
        Option("options", "any", "options of the formats, as {name: value}"),
    ),
)
PUSH = Section(
    "push",
    "upload",
    (
        Option("repo", "text", "repository on the Hub: user/name"),
        Option("private", "bool", "make a new repository private", True),
        Option("branch", "text", "branch to push to"),
        Option("results", "text", "folder of `eval` whose figures go into the card (that of the chain)"),
        Option("message", "text", "commit message", "Upload a model quantized with bitdistiller_peft"),
    ),
)
RUN = Section(
    "run",
    "the chain",
    (Option("stages", "list", f"stages, in this order, of: {', '.join(STAGES)}", DEFAULT_STAGES),),
)

SECTIONS = {
    section.name: section for section in (TOP, QUANT, CALIBRATE, GENERATE, CACHE, DISTILL, EVAL, EXPORT, PUSH, RUN)
}


@cache
def all_keys() -> dict[str, Option]:
    """Every declared setting by its full name."""
    return {s.key(option.name): option for s in SECTIONS.values() for option in s.options}
