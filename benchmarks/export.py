"""A packed model in every format that can hold it: size, what was compared, damage caught, and the same greedy tokens.

Each format is exported and read back; then single nibbles of the exported file are changed, one at a time, and
`verify_export` must see each of them. What an installed engine loads is served: transformers (`dequantized`,
`compressed-tensors`) and llama.cpp through `xllamacpp` (`gguf`) generate greedily, and are compared with our packed
model. Where an engine's first token differs, the gap between our two best tokens there is set against the engine's
noise, the largest difference of the chosen tokens' log-probabilities up to that point.

    python -m benchmarks.export                       # a random tiny Llama
    python -m benchmarks.export --model PATH          # a folder that save_pretrained of a packed model wrote
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks._results import figure, table, write_results
from bitdistiller_peft import BitDistillerConfig, export_model, get_bitdistiller_model, verify_export
from bitdistiller_peft.errors import ExportError
from bitdistiller_peft.export import ExportReport, export_format_names
from bitdistiller_peft.hub.header import read_header

PROMPT = (504, 1507, 6354, 16438, 281)  # "The quick brown fox jumps" to SmolLM2; any ids will do for others
TOKENS = 32


@dataclass(frozen=True)
class Generation:
    """Greedy tokens with the log-probabilities of the chosen and of the second best one."""

    ids: list[int]
    best: list[float]
    second: list[float]


def tiny(folder: Path) -> Path:
    """A random packed Llama whose every format is small."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = get_bitdistiller_model(LlamaForCausalLM(config), BitDistillerConfig(bits=2, group_size=64))
    model.pack_and_unload(progressbar=False).save_pretrained(folder)
    return folder


@torch.no_grad()
def generate(model: PreTrainedModel, prompt: list[int]) -> Generation:
    """Take the best token `TOKENS` times; the whole sequence is run each time, so no cache enters."""
    ids, best, second = list(prompt), [], []
    for _ in range(TOKENS):
        top = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1).topk(2)
        ids.append(int(top.indices[0]))
        best.append(float(top.values[0]))
        second.append(float(top.values[1]))
    return Generation(ids[len(prompt) :], best, second)


def by_transformers(folder: Path, prompt: list[int]) -> Generation:
    """What transformers generates from an exported folder, in fp32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that the checkpoint has a config of its own
        is_packed = "compressed-tensors" in (folder / "config.json").read_text(encoding="utf-8")
        extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if is_packed else {}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **extra)
    return generate(model.eval(), prompt)


def by_llama_cpp(folder: Path, prompt: list[int]) -> Generation:
    """What llama.cpp generates from an exported GGUF."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "model.gguf")
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params = 256, 1, False, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    request = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 2, "ignore_eos": True}
    answer = xllamacpp.Server(params).handle_completions(request)
    content = answer["choices"][0]["logprobs"]["content"]
    tops = [[entry["logprob"] for entry in token["top_logprobs"]] for token in content]
    return Generation([token["id"] for token in content], [top[0] for top in tops], [top[1] for top in tops])


ENGINES: dict[str, tuple[str, Callable[[Path, list[int]], Generation]]] = {
    "dequantized": ("transformers", by_transformers),
    "compressed-tensors": ("transformers", by_transformers),
    "gguf": ("xllamacpp", by_llama_cpp),
}


def compare(ours: Generation, theirs: Generation) -> dict[str, Any]:
    """Equal tokens from the start, the engine's noise up to there, and our gap at the first difference."""
    pairs = zip(ours.ids, theirs.ids, strict=False)
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours.ids), len(theirs.ids)))
    noise = max((abs(a - b) for a, b in zip(ours.best[:equal], theirs.best[:equal], strict=True)), default=0.0)
    gap = ours.best[equal] - ours.second[equal] if equal < TOKENS else 0.0
    return {"equal tokens": equal, "noise": noise, "gap": gap}


def weight_bytes(folder: Path) -> list[tuple[Path, int, int]]:
    """File, first and last byte of every tensor that the readers' packages list."""
    found = []
    for path in folder.glob("*.safetensors"):
        entries, start = read_header(path)
        found += [(path, *(start + offset for offset in entry["data_offsets"])) for entry in entries.values()]
    for path in folder.glob("*.gguf"):
        found.append((path, path.stat().st_size // 2, path.stat().st_size - 64))  # the second half is all weights
    return found


def caught(model: Path, report: ExportReport, times: int) -> int:
    """How many of `times` changed nibbles `verify_export` sees."""
    draw, seen = random.Random(report.format), 0
    for _ in range(times):
        path, start, end = draw.choice(weight_bytes(report.folder))
        at, bit = draw.randrange(start, end), draw.choice((0x01, 0x02, 0x10, 0x20))
        with path.open("r+b") as file:
            file.seek(at)
            kept = file.read(1)[0]
            file.seek(at)
            file.write(bytes([kept ^ bit]))
        try:
            verify_export(model, report.folder, report.format)
        except ExportError:
            seen += 1
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([kept]))
    return seen


def measure(model: Path, name: str, folder: Path, nibbles: int) -> tuple[dict[str, Any], ExportReport | None]:
    """Export to one format; a refusal is a row too."""
    empty = {"matrices": 0, "codes": 0, "scales": 0, "bits/weight": 0.0, "s": 0.0, "caught": 0, "of": 0}
    started = time.perf_counter()
    try:
        report = export_model(model, name, folder / name)
    except ExportError as error:
        return {"format": name, "reader": str(error).partition("it cannot, ")[2][:60], **empty}, None
    found, seconds = report.verification, time.perf_counter() - started
    row = {
        "format": name,
        "reader": found.reader,
        "matrices": found.num_weights,
        "codes": found.num_codes,
        "scales": found.num_scales,
        "bits/weight": found.bits_per_weight,
        "s": seconds,
        "caught": caught(model, report, nibbles),
        "of": nibbles,
    }
    return row, report


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a packed model; a random tiny Llama by default")
    parser.add_argument("--formats", nargs="+", default=export_format_names(), choices=export_format_names())
    parser.add_argument("--nibbles", type=int, default=3, help="nibbles to change in each exported model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model = Path(args.model) if args.model else tiny(work / "packed")
        ours = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        prompt = [token for token in PROMPT if token < ours.config.vocab_size] or [1, 2, 3]
        expected = generate(ours, prompt)
        rows, served = [], []
        for format_name in args.formats:
            row, report = measure(model, format_name, work / "out", args.nibbles)
            rows.append(row)
            package, run = ENGINES.get(format_name, ("", None))
            if report is not None and run is not None and find_spec(package):
                result = compare(expected, run(report.folder, prompt))
                served.append({"format": format_name, "engine": package, **result})
    print(f"{table(rows)}\n\n{table(served)}")
    print(f"written to {write_results('export', [*rows, *served], summarise(rows, served))}")


def summarise(rows: list[dict[str, Any]], served: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures: what was held and caught, and how far engines agree."""
    figures = {
        "formats_that_hold_the_model": figure(sum(row["matrices"] > 0 for row in rows), "formats"),
        "nibbles_missed": figure(sum(row["of"] - row["caught"] for row in rows), "nibbles", at_most=0),
    }
    for row in served:
        name = f"{row['format']}_in_{row['engine']}".replace("-", "_")
        figures[f"{name}_equal_tokens"] = figure(row["equal tokens"], f"of {TOKENS}")
        excess = max(0.0, row["gap"] - row["noise"])
        figures[f"{name}_gap_above_noise"] = figure(excess, "nats", at_most=0)
    return figures


if __name__ == "__main__":
    main()
