"""A packed model in every format that can hold it, damaged, and served by the engines that people use.

Each row exports and reads back, changes single nibbles of a small model's export, one at a time (`verify_export` must
see each), and has an engine load the model, generate greedily and score a text. Where the engine's first token differs
from our packed model's, the gap between our two best tokens there is set against the engine's noise: 95 % of its
log-probabilities of the text's tokens are nearer to ours. What is asked of the text's perplexity is to be within 1 %,
or 3 % where an engine quantizes activations to 8 bits. Rows whose engine is not installed say so; their format was
compared by its reader.

    python -m benchmarks.export                       # a random tiny Llama
    python -m benchmarks.export --model PATH --text FILE --work FOLDER
    python -m benchmarks.export ... --rows gptq awq --python GPTQModel=OTHER/bin/python

The model is a folder that `save_pretrained` of a packed model wrote. Some formats hold other grids than its own:
`requantized` ones are the same weights rounded to nearest on that grid, so they are worse models but as good a test;
llama.cpp's ternary types need widths that are multiples of 256, and are shown on a random Llama. A row is in the
results file as soon as it ends; a row that is there already, of the same model, is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks._damage import caught
from benchmarks._engines import ENGINES, TOKENS, Generation, Transformers
from benchmarks._results import RESULTS, ROOT, figure, table, write_results
from bitdistiller_peft import BitDistillerConfig, export_model, get_bitdistiller_model
from bitdistiller_peft.errors import ExportError
from bitdistiller_peft.evaluation.protocol import cut_text

PROMPT = (504, 1507, 6354, 16438, 281)  # "The quick brown fox jumps" to SmolLM2; any ids will do for others
SEQ_LEN = 512


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        engine: who serves it.
        format: what it is exported to.
        options: options of the format.
        model: which model, see `MODELS`; the one that was given by default.
        percent: how far the perplexity may be from ours.
    """

    engine: str
    format: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "given"
    percent: float = 1.0


CASES = {
    "dequantized": Case("transformers", "dequantized"),
    "compressed-tensors": Case("transformers", "compressed-tensors"),
    "compressed-tensors, 4 bits": Case("vLLM", "compressed-tensors", {"widen_to": 4}),
    "bitnet": Case("transformers", "bitnet", model="ternary", percent=3.0),
    "gguf Q4_0": Case("llama.cpp", "gguf", {"carrier": "Q4_0"}, percent=3.0),
    "gguf Q2_0": Case("llama.cpp", "gguf", {"carrier": "Q2_0"}, model="llama.cpp", percent=3.0),
    "gguf F16": Case("llama.cpp", "gguf", {"carrier": "F16"}),
    "gguf TQ2_0": Case("llama.cpp", "gguf", {"carrier": "TQ2_0"}, model="wide", percent=3.0),
    "gguf TQ1_0": Case("llama.cpp", "gguf", {"carrier": "TQ1_0"}, model="wide ternary", percent=3.0),
    "onnx": Case("onnxruntime", "onnx"),
    "openvino": Case("OpenVINO", "openvino", percent=3.0),
    "mlx": Case("mlx-lm", "mlx"),
    "gptq": Case("GPTQModel", "gptq"),
    "awq": Case("GPTQModel", "awq"),
}

LLAMA_CPP = BitDistillerConfig(bits=2, group_size=64, target="llama.cpp")
TERNARY = BitDistillerConfig(grid="ternary", group_size="tensor", activation_bits=8, scale_dtype="float32")
WIDE = BitDistillerConfig(bits=2, group_size=256, target="llama.cpp")
WIDE_TERNARY = BitDistillerConfig(grid="ternary", group_size=256)
# of another grid: whether its weights are the given model's, and the grid
MODELS = {
    "llama.cpp": (True, LLAMA_CPP),
    "ternary": (True, TERNARY),
    "wide": (False, WIDE),
    "wide ternary": (False, WIDE_TERNARY),
}


def random_llama(hidden_size: int, vocab_size: int = 480) -> LlamaForCausalLM:
    """A random Llama of two layers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "intermediate_size": 2 * hidden_size}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4))


def ascii_tokenizer(folder: Path) -> None:
    """Save a tokenizer of ASCII characters and pairs, without which servers do not start."""
    ascii_chars = sorted(char for char in ByteLevel.alphabet() if char.isascii())
    merges = [(first, second) for second in "etao" for first in ascii_chars]
    vocabulary = [*ascii_chars, *("".join(pair) for pair in merges)]
    tokens = Tokenizer(models.BPE({text: index for index, text in enumerate(vocabulary)}, merges))
    tokens.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(folder)


def pack(model: Any, config: BitDistillerConfig, folder: Path) -> None:
    """Round a model to nearest, pack and save it."""
    get_bitdistiller_model(model, config).pack_and_unload(progressbar=False).save_pretrained(folder)


class Bench:
    """The models, made when a row wants them, and what all rows share."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.pythons = dict(item.split("=", 1) for item in options.python)

    def model(self, name: str) -> Path:
        """The folder of a packed model."""
        if name == "given" and self.options.model:
            return Path(self.options.model)
        folder = self.work / "models" / name
        if (folder / "config.json").exists():
            return folder
        if name == "given":
            pack(random_llama(64), BitDistillerConfig(bits=2, group_size=64), folder)
            ascii_tokenizer(folder)
            return folder
        given, (is_requantized, config) = self.model("given"), MODELS[name]
        settings = json.loads((given / "config.json").read_text(encoding="utf-8"))
        if not is_requantized:
            pack(random_llama(256, settings["vocab_size"]), config, folder)
        else:
            with tempfile.TemporaryDirectory() as dense:
                export_model(given, "dequantized", Path(dense) / "dense", dtype="float32")
                dtype = "float32" if config.scale_dtype == "float32" else settings["dtype"]  # bitnet has one for both
                pack(AutoModelForCausalLM.from_pretrained(Path(dense) / "dense", dtype=dtype), config, folder)
        for file in (*given.glob("tokenizer*"), *given.glob("chat_template*")):
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    def request(self, model: Path) -> dict[str, Any]:
        """What every engine is asked: ids to go on from, and chunks of a text to score."""
        vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
        prompt = [token for token in PROMPT if token < vocab_size] or [1, 2, 3]
        if self.options.text:
            text = Path(self.options.text).read_text(encoding="utf-8")
            tokenizer = AutoTokenizer.from_pretrained(model)
            chunks = cut_text(tokenizer, text, seq_len=SEQ_LEN, max_chunks=self.options.chunks).ids
        else:
            draw = torch.Generator().manual_seed(0)
            chunks = torch.randint(vocab_size, (self.options.chunks, 128), generator=draw)
        return {"prompt": prompt, "chunks": chunks.tolist(), "threads": torch.get_num_threads()}

    def ours(self, model: Path) -> dict[str, Any]:
        """What our packed model answers, in fp32; kept for the next row."""
        kept = self.work / f"{identity(model)}.json"
        if not kept.exists():
            request = self.request(model)
            served = Transformers(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval())
            answer = {
                "generation": asdict(served.generate(request["prompt"])),
                "scores": [served.score(chunk) for chunk in request["chunks"]],
            }
            kept.write_text(json.dumps(answer), encoding="utf-8")
        return dict(json.loads(kept.read_text(encoding="utf-8")))

    def serve(self, engine: str, folder: Path, model: Path) -> dict[str, Any]:
        """What an engine answers, from a process of its own."""
        python = self.pythons.get(engine, sys.executable)
        with tempfile.TemporaryDirectory() as name:
            paths = [str(Path(name) / file) for file in ("request.json", "answer.json")]
            Path(paths[0]).write_text(json.dumps(self.request(model)), encoding="utf-8")
            command = [python, "-m", "benchmarks._engines", engine, str(folder), *paths]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False)
            if done.returncode:
                return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:200]}
            return dict(json.loads(Path(paths[1]).read_text(encoding="utf-8")))

    def caught(self, case: Case) -> int:
        """How many nibbles are seen that change in the same export of a small model, which is read back in no time."""
        small = Bench(argparse.Namespace(**{**vars(self.options), "model": None}), self.work / "small")
        model, folder = small.model(case.model), small.work / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        return caught(model, export_model(model, case.format, folder, **case.options), self.options.nibbles)

    def row(self, name: str) -> dict[str, Any]:
        """Export, damage, serve."""
        case = CASES[name]
        model, folder = self.model(case.model), self.work / "exports" / name
        row: dict[str, Any] = {"row": name, "model": identity(model), "engine": case.engine, "version": None}
        row |= dict.fromkeys(("equal tokens", "gap", "noise", "perplexity", "ours", "off %"))
        row |= {"asked %": case.percent} | dict.fromkeys(("reader", "codes", "scales", "bits/weight", "s"))
        row |= {"caught": 0, "of": 0, "status": ""}
        shutil.rmtree(folder, ignore_errors=True)
        started = time.perf_counter()
        try:
            report = export_model(model, case.format, folder, **case.options)
        except ExportError as error:
            return row | {"status": f"refused: {str(error)[:200]}"}
        found = report.verification
        row |= {"reader": found.reader, "codes": found.num_codes, "scales": found.num_scales}
        row |= {"bits/weight": found.bits_per_weight, "s": time.perf_counter() - started}
        row |= {"caught": self.caught(case), "of": self.options.nibbles}
        answer = self.serve(case.engine, folder, model)
        if "failed" in answer:
            return row | {"status": f"failed: {answer['failed']}"}
        if "missing" in answer:
            return row | {"status": f"not installed: {answer['missing']}; checked by {found.reader}"}
        (self.work / f"{name}.json").write_text(json.dumps(answer), encoding="utf-8")
        return row | {"version": answer["version"], "status": "served"} | compare(self.ours(model), answer)


def identity(model: Path) -> str:
    """A model's name and what tells it from others of that name."""
    return f"{model.name} {zlib.crc32((model / 'bitdistiller.json').read_bytes()):08x}"


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Equal tokens from the start, our gap at the first difference, the engine's noise; both perplexities."""
    a, b = Generation(**ours["generation"]), Generation(**theirs["generation"])
    equal = next((i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=True)) if x != y), len(a.ids))
    gap = a.best[equal] - a.second[equal] if equal < len(a.ids) else 0.0
    mine, found = (torch.tensor(answer["scores"]).flatten() for answer in (ours, theirs))
    row = {"equal tokens": equal, "gap": gap, "noise": float((mine - found).abs().quantile(0.95))}
    perplexities = {"perplexity": math.exp(-found.mean()), "ours": math.exp(-mine.mean())}
    return row | perplexities | {"off %": 100 * abs(math.expm1(mine.mean() - found.mean()))}


def summarise(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures: what was held and caught, and how far engines agree."""
    figures = {
        "exports_compared_exactly": figure(sum(row["codes"] is not None for row in rows), "rows"),
        "nibbles_missed": figure(sum(row["of"] - row["caught"] for row in rows), "nibbles", at_most=0),
    }
    for row in rows:
        if row["status"] != "served":
            continue
        name = "".join(c if c.isalnum() else "_" for c in f"{row['row']} in {row['engine']}").replace("__", "_")
        figures[f"{name}_equal_tokens"] = figure(row["equal tokens"], f"of {TOKENS}")
        figures[f"{name}_gap_above_noise"] = figure(max(0.0, row["gap"] - row["noise"]), "nats", at_most=0)
        figures[f"{name}_perplexity_off"] = figure(row["off %"], "%", at_most=row["asked %"])
    return figures


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a packed model; a random tiny Llama by default")
    parser.add_argument("--text", help="text to score; random ids without it")
    parser.add_argument("--chunks", type=int, default=4, help=f"how many chunks of {SEQ_LEN} tokens of it")
    parser.add_argument("--rows", nargs="+", default=list(CASES), choices=list(CASES), metavar="ROW")
    parser.add_argument("--nibbles", type=int, default=8, help="nibbles to change for each row")
    parser.add_argument("--work", help="folder for models and exports, to go on from; a temporary one by default")
    parser.add_argument(
        "--python", nargs="+", default=[], metavar="ENGINE=PATH", help=f"Python to run {', '.join(ENGINES)} by"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(options, Path(options.work or name))
        run(bench, options.rows)


def run(bench: Bench, names: list[str]) -> None:
    """Run what has not been served yet; write after every row."""
    path = RESULTS / "export.cpu.json"
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = {row["row"]: row for row in known if row.get("row") in CASES}
    for name in names:
        row = rows.get(name)
        if row is None or row["status"] != "served" or row["model"] != identity(bench.model(CASES[name].model)):
            rows[name] = bench.row(name)
            ordered = [rows[case] for case in CASES if case in rows]
            write_results("export", ordered, summarise(ordered))
            print(table([rows[name]]), flush=True)
    print(table([rows[case] for case in CASES if case in rows]))


if __name__ == "__main__":
    main()
