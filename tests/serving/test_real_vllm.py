"""vLLM itself, where it is installed, serves packed checkpoints by the plug-in: our tokens, our log-probabilities.

The model in memory is ours in fp32 on the reference backend; vLLM's attention adds in another order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model, use_backend

pytest.importorskip("vllm", reason="vLLM is not installed; the plug-in is tested against a double of its interfaces")
pytestmark = pytest.mark.slow

TOKENS = 16
MODELS: dict[str, dict[str, Any]] = {
    "int2": {"bits": 2},
    "nf3": {"grid": "nf", "bits": 3},
    "fp4 with biases": {"grid": "fp", "bits": 4},
    "r2q": {"grid": "r2q"},
    "ternary with SubLN and int8 activations": {
        "grid": "ternary",
        "group_size": "tensor",
        "activation_bits": 8,
        "subln": "all",
    },
    "other settings for each part": {
        "bits": 2,
        "overrides": {"q_proj": {"bits": 4}, "k_proj": {"bits": 3}, "up_proj": {"grid": "nf", "bits": 4}},
    },
    "quantized head": {"bits": 3, "target_modules": r".*(_proj|lm_head)"},
}
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
from bitdistiller_peft.serving import register_vllm

register_vllm()  # also where the package is not installed, so that vLLM does not find its entry point
if __name__ == "__main__":
    ids, tokens, answers = json.loads(sys.argv[2]), int(sys.argv[3]), {}
    for folder in sys.argv[4:]:
        llm = LLM(folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64, seed=0)
        how = SamplingParams(temperature=0, max_tokens=tokens, prompt_logprobs=3, ignore_eos=True, detokenize=False)
        (done,) = llm.generate([{"prompt_token_ids": ids}], how, use_tqdm=False)
        scores = [[(token, value.logprob) for token, value in place.items()] for place in done.prompt_logprobs[1:]]
        answers[folder] = {"tokens": list(done.outputs[0].token_ids), "scores": scores}
        del llm
    open(sys.argv[1], "w").write(json.dumps(answers))
"""


def packed_model(settings: dict[str, Any], *, has_biases: bool) -> Any:
    """A tiny random model with heads as wide as vLLM's attention wants them."""
    sizes: dict[str, Any] = {"vocab_size": 500, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    cls = Qwen2Config if has_biases else LlamaConfig
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(cls(**sizes, **heads, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():  # as drawn, all tokens would be about as likely
            parameter.normal_(std=0.1) if name.endswith("bias") else parameter.mul_(4 if parameter.ndim == 2 else 1)
    student = get_bitdistiller_model(base, BitDistillerConfig(**{"group_size": 32, **settings}))
    return student.eval().pack_and_unload(progressbar=False)


def test_vllm_answers_as_the_packed_model_does(tmp_path: Path) -> None:
    ids = torch.randint(3, 500, (1, 12), generator=torch.Generator().manual_seed(1))
    ours = {}
    for name, settings in MODELS.items():
        model, folder = packed_model(settings, has_biases="biases" in name), str(tmp_path / name.replace(" ", "-"))
        model.save_pretrained(folder)
        with torch.no_grad(), use_backend("reference"):
            scores = torch.log_softmax(model(ids).logits[0].double(), -1)
            made = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
        ours[folder] = scores, made[0, ids.shape[1] :].tolist()
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    answers = tmp_path / "answers.json"
    arguments = [str(answers), json.dumps(ids[0].tolist()), str(TOKENS), *ours]
    script = tmp_path / "serve.py"  # a file: vLLM starts processes that import it again
    script.write_text(SERVE)
    subprocess.run([sys.executable, str(script), *arguments], env={**os.environ, **environment}, check=True)
    for folder, answer in json.loads(answers.read_text()).items():
        scores, tokens = ours[folder]
        assert answer["tokens"] == tokens, folder
        for place, found in enumerate(answer["scores"]):
            for token, logprob in found:
                assert logprob == pytest.approx(scores[place, token].item(), abs=1e-4), (folder, place, token)
