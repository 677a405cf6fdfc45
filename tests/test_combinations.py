"""Every combination of settings trains with the gradients of fp64, packs and reloads bit for bit, or is refused.

A step through a whole model; what entered and left each quantized layer is then given to a slow fp64 formula of the
layer. Each trainable tensor has a finite gradient, equal to the formula's, and not zero where that is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.layers import SUFFIXES, PackedLinear, companion, quant_specs
from bitdistiller_peft.quantizers import QuantParams, find_params, store_learned_params
from bitdistiller_peft.tuner import BitDistillerLayer
from tests.hub.models import assert_same_state, logits
from tests.pairwise import Rules, check_coverage, is_possible, pairwise
from tests.quantizers.samples import WIDTHS
from tests.reference import layer as reference
from tests.tiny import load, save_base, token_ids

# how much of its largest entry a gradient may be off: in 16 bits each product is rounded to so many digits
DTYPES = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}
LOSS_SCALE = 256.0  # as mixed-precision training has it, so that fp16 gradients do not vanish

FACTORS: dict[str, tuple[Any, ...]] = {
    "grid": tuple(WIDTHS),
    "bits": (2, 3, 4, 8),
    "group_size": (32, 64, -1, "tensor"),
    "activation_bits": (None, 8),
    "subln": ("none", "output", "all"),
    "learn": ("nothing", "scale", "scale and zero point"),
    "gradient": ("exact", "ste"),
    "dtype": tuple(DTYPES),
    "master_dtype": ("float32", "base"),
    "packing": ("bitstream", "base3"),
}
RULES: Rules = {
    ("grid", "bits"): lambda grid, bits: bits in WIDTHS[grid],
    ("grid", "learn"): lambda grid, learn: "zero" not in learn or grid in ("int", "int_fine"),
    ("grid", "packing"): lambda grid, packing: packing == "bitstream" or grid == "ternary",
    # what follows from these
    ("bits", "packing"): lambda bits, packing: packing == "bitstream" or bits == 2,
    ("learn", "packing"): lambda learn, packing: packing == "bitstream" or "zero" not in learn,
}
CASES = pairwise(FACTORS, RULES)


def settings(case: dict[str, Any]) -> dict[str, Any]:
    """The fields of the config."""
    values = {key: value for key, value in case.items() if key not in ("learn", "dtype")}
    return values | {"learn_scale": case["learn"] != "nothing", "learn_zero_point": "zero" in case["learn"]}


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value).replace(" ", "_") for value in case.values())


@dataclass
class Seen:
    """What went through a layer: inputs, outputs, and the gradients of both."""

    inputs: Tensor
    outputs: Tensor
    to_inputs: Tensor | None = None
    to_outputs: Tensor | None = None


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, Seen]]:
    """Note what goes through every overlay, by its name."""
    seen: dict[str, Seen] = {}

    def forward(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = Seen(args[0].detach(), output.detach())

        return note

    def backward(name: str) -> Any:
        def note(module: nn.Module, to_inputs: Any, to_outputs: Any) -> None:
            seen[name].to_inputs, seen[name].to_outputs = to_inputs[0], to_outputs[0]

        return note

    with ExitStack() as stack:
        for name, module in overlays(model).items():
            stack.callback(module.register_forward_hook(forward(name)).remove)
            stack.callback(module.register_full_backward_hook(backward(name)).remove)
        yield seen


def overlays(model: nn.Module) -> dict[str, BitDistillerLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BitDistillerLayer)}


@torch.no_grad()
def unsettle(model: nn.Module) -> None:
    """Move what is learned away from its start, where some weights are clamped and no gain is one."""
    random = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "weight_scale" in name:
            parameter.mul_(0.83)
        elif "weight_zero_point" in name:
            parameter.add_(0.2)
        elif "subln" in name:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))


def wanted(layer: BitDistillerLayer, seen: Seen, case: dict[str, Any]) -> dict[str, Tensor]:
    """The fp64 gradients of a layer's inputs and trained tensors, by name."""
    student, norm = layer.student("weight", "default"), layer.input_norm("default")
    spec = quant_specs(student)["weight"]
    assert seen.to_outputs is not None
    how = reference.Layer(spec, getattr(torch, case["dtype"]), case["activation_bits"], 1e-8 if norm else 0.0)
    leaves = {
        "inputs": seen.inputs.double().requires_grad_(),
        "weight": student.weight.detach().double().requires_grad_(),
    }
    if norm is not None:
        leaves["gain"] = norm.weight.detach().double().requires_grad_()
    learned: dict[str, Tensor] | None = None
    stored = None
    if case["learn"] == "nothing":
        stored = find_params(student.weight.detach(), spec)
    else:
        params = QuantParams(*(companion(student, "weight", suffix) for suffix in SUFFIXES))
        kept = zip(QuantParams._fields, store_learned_params(params, spec), strict=True)
        learned = {name: tensor.double().requires_grad_() for name, tensor in kept if tensor is not None}
        leaves |= learned
    outputs = reference.forward(
        leaves["inputs"], leaves["weight"], how, gain=leaves.get("gain"), learned=learned, stored=stored
    )
    tolerance = 1e-5 if case["dtype"] == "float32" else 2**-6
    assert_near(seen.outputs, outputs.detach(), tolerance * float(outputs.detach().abs().max()), "the outputs")
    grads = torch.autograd.grad(outputs, list(leaves.values()), seen.to_outputs.double())
    return dict(zip(leaves, grads, strict=True))


def assert_near(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert bool(found.isfinite().all()), f"{what}: not finite"
    off = float((found.double() - expected).abs().max())
    assert off <= tolerance, f"{what}: off by {off}, largest {float(expected.abs().max())}"
    assert bool(found.any()) == bool(expected.any()), f"{what}: only one of both is zero"


def trained_tensors(layer: BitDistillerLayer) -> dict[str, Tensor]:
    """The trainable tensors of a layer by the names that `wanted` has."""
    student, norm = layer.student("weight", "default"), layer.input_norm("default")
    named = dict(zip(QuantParams._fields, (companion(student, "weight", suffix) for suffix in SUFFIXES), strict=True))
    named |= {"weight": student.weight, "gain": None if norm is None else norm.weight}
    return {name: tensor for name, tensor in named.items() if tensor is not None and tensor.requires_grad}


def check_gradients(model: nn.Module, seen: dict[str, Seen], case: dict[str, Any]) -> None:
    expected = {name: wanted(layer, seen[name], case) for name, layer in overlays(model).items()}
    relative = DTYPES[case["dtype"]]
    checked = set()
    for name, layer in overlays(model).items():
        tensors = trained_tensors(layer)
        checked |= {id(tensor) for tensor in tensors.values()}
        found = {key: tensor.grad for key, tensor in tensors.items()} | {"inputs": seen[name].to_inputs}
        for key, grad in found.items():
            assert grad is not None, f"{name}: {key}"
            size = float(expected[name][key].abs().max())
            if case["dtype"] != "float32" and key not in ("weight", "inputs"):
                # a sum of many products, which may cancel, while the rounding of each stays
                size = max(float(grads[key].abs().max()) for grads in expected.values() if key in grads)
            assert_near(grad, expected[name][key], relative * size, f"{name}: {key}")
            assert bool(grad.any()) or key == "zero_point", f"{name}: {key} has no gradient"
    assert checked == {id(p) for p in model.parameters() if p.requires_grad}


def check(case: dict[str, Any], bases: Path, folder: Path) -> None:
    base = load(save_base("llama", bases, dtype=getattr(torch, case["dtype"])))
    model = get_bitdistiller_model(base, BitDistillerConfig(**settings(case)))
    unsettle(model)
    base.enable_input_require_grads()  # so that all layers have a gradient at their inputs
    ids = token_ids()
    with watched(model) as seen:
        (LOSS_SCALE * model(input_ids=ids, labels=ids).loss).backward()
    check_gradients(model, seen, case)
    trainable = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(trainable, lr=1e-2 / LOSS_SCALE).step()

    base.disable_input_require_grads()
    model.eval()
    trained = {name: layer.student("weight", "default")().detach() for name, layer in overlays(model).items()}
    expected = logits(model)
    packed = model.pack_and_unload(progressbar=False)
    for name, values in trained.items():
        layer = packed.get_submodule(name.removeprefix("base_model.model."))
        assert isinstance(layer, PackedLinear)
        assert torch.equal(layer.dequantize(), values), name
    assert torch.equal(logits(packed), expected)
    packed.save_pretrained(folder)
    loaded = load(folder)
    assert_same_state(loaded, packed)
    assert torch.equal(logits(loaded), expected)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_pair_of_settings_trains_packs_and_reloads(case: dict[str, Any], bases: Path, tmp_path: Path) -> None:
    check(case, bases, tmp_path)


def test_the_chosen_cases_hold_every_possible_pair_of_settings() -> None:
    check_coverage(CASES, FACTORS, RULES)


@pytest.mark.parametrize("grid", WIDTHS)
def test_what_is_not_possible_is_refused_with_a_reason(grid: str) -> None:
    """The whole matrix: a config is made, or the error names a setting that is to blame, and its value."""
    for row in itertools.product(*(values for name, values in FACTORS.items() if name != "grid")):
        case = {"grid": grid, **dict(zip([name for name in FACTORS if name != "grid"], row, strict=True))}
        if is_possible(case, RULES):
            BitDistillerConfig(**settings(case))
            continue
        with pytest.raises(ConfigError) as caught:
            BitDistillerConfig(**settings(case))
        broken = {name for pair, rule in RULES.items() if not rule(*(case[key] for key in pair)) for name in pair}
        culprits = {"learn_zero_point" if name == "learn" else name for name in broken}
        message = str(caught.value)
        assert any(message.startswith(f"`{name}` must be ") for name in culprits), message
        assert "use " in message.lower(), message


@pytest.mark.slow
@pytest.mark.parametrize("grid", WIDTHS)
def test_every_combination_trains_packs_and_reloads(grid: str, bases: Path, tmp_path: Path) -> None:
    """Grid x bits x group size x activations x SubLN x learned parameters x dtype; the other settings take turns."""
    matrix = ("bits", "group_size", "activation_bits", "subln", "learn", "dtype")
    free = itertools.cycle(itertools.product(*(FACTORS[name] for name in ("gradient", "master_dtype", "packing"))))
    for number, row in enumerate(itertools.product(*(FACTORS[name] for name in matrix))):
        gradient, master_dtype, packing = next(free)
        case = {"grid": grid, **dict(zip(matrix, row, strict=True)), "gradient": gradient, "master_dtype": master_dtype}
        case["packing"] = packing if grid == "ternary" else "bitstream"
        if not is_possible(case, RULES):
            continue  # refused, see above
        try:
            check(case, bases, tmp_path / str(number))
        except Exception as error:
            error.add_note(f"in {case}")
            raise
