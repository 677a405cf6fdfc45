"""Ordinary LoRA stands on packed weights: it trains, saves, reloads, and cannot be merged into codes unnoticed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from bitdistiller_peft import BitDistillerQuantConfig
from bitdistiller_peft.errors import TargetError
from bitdistiller_peft.layers import PackedLinear, iter_quantized
from tests.hub.models import Saved, logits
from tests.hub.test_latent import train
from tests.tiny import MOE, load, save_base, token_ids

GetSaved = Callable[..., Saved]


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]  # all linear layers of a mixture of experts


def make_lora(base: PreTrainedModel, targets: list[str] | str = "all-linear") -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=4))


def take_steps(model: PeftModel, steps: int = 3) -> list[float]:
    """Train in place; the losses."""
    ids, losses = token_ids(), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("arch", ["llama", "llama-tied", "gpt2", "opt", "qwen3-moe"])
def test_lora_trains_on_every_packed_layer_and_loads_again(saved: GetSaved, arch: str, tmp_path: Path) -> None:
    original = saved(arch, group_size=-1)
    model = make_lora(load(original.folder), ATTENTION if arch in MOE else "all-linear").eval()
    wrapped = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert len(wrapped) == sum(isinstance(module, PackedLinear) for module in original.model.modules())
    assert torch.equal(logits(model), original.logits)
    losses = take_steps(model)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    trained = logits(model)
    assert not torch.equal(trained, original.logits)
    with model.disable_adapter():
        assert torch.equal(logits(model), original.logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(original.folder), tmp_path).eval()), trained)
    assert torch.equal(logits(load(tmp_path)), trained), "AutoModelForCausalLM finds base and adapter by itself"
    attached = load(original.folder)
    attached.load_adapter(str(tmp_path))
    assert torch.equal(logits(attached), trained)


def test_a_plain_trainer_trains_lora_on_packed_weights(saved: GetSaved, tmp_path: Path) -> None:
    original = saved("llama")
    model = make_lora(load(original.folder))
    train(model, tmp_path, steps=2)
    assert not torch.equal(logits(model.eval()), original.logits)
    for (_, module, name, _), (_, ours, _, _) in zip(
        iter_quantized(model.base_model.model), iter_quantized(original.model), strict=True
    ):
        for suffix in ("", "_scale", "_zero_point"):
            assert torch.equal(getattr(module, name + suffix), getattr(ours, name + suffix))


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_merging_into_codes_fails_loudly_and_changes_nothing(saved: GetSaved, bits: int, method: str) -> None:
    model = make_lora(load(saved("llama", bits=bits).folder)).eval()
    take_steps(model)
    trained = logits(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="size of tensor"):
        getattr(model, method)()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), trained)


@pytest.mark.parametrize("arch", MOE)
@pytest.mark.parametrize("state", ["packed", "latent"])
# PEFT says this of any Mixtral: it looks for the experts' old names too
@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")
def test_lora_on_quantized_experts_is_refused_with_the_way_out(bases: Path, arch: str, state: str) -> None:
    """PEFT adds its update to the parameter itself: to codes, or around the fake quantization."""
    config = BitDistillerQuantConfig(group_size=32, state=state)
    model = make_lora(load(save_base(arch, bases), quantization_config=config))
    with pytest.raises(TargetError, match=r"must not wrap quantized experts.*target_modules"):
        logits(model)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_rewrite_the_base_weight_are_refused(saved: GetSaved, start: str) -> None:
    config = LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=start)
    with pytest.raises(TypeError, match=r"float32, float16, or bfloat16|Got torch\.int32"):
        get_peft_model(load(saved("llama").folder), config)


def test_saving_a_model_with_an_adapter_attached_saves_the_adapter_alone(saved: GetSaved, tmp_path: Path) -> None:
    original = saved("llama")
    lora = make_lora(load(original.folder))
    take_steps(lora)
    lora.save_pretrained(tmp_path / "lora")
    model = load(original.folder)
    model.load_adapter(str(tmp_path / "lora"))
    model.save_pretrained(tmp_path / "again")
    found = {file.name for file in (tmp_path / "again").iterdir()}
    assert found == {"adapter_config.json", "adapter_model.safetensors", "generation_config.json"}
