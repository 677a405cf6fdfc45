"""What was trained is what is packed is what a fresh process loads: equal bits, over every pair of settings."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from bitdistiller_peft import use_backend
from bitdistiller_peft.layers import PackedLinear
from bitdistiller_peft.tuner import BitDistillerLayer
from tests.hub.models import logits, make_student, run_python
from tests.pairwise import Rules, check_coverage, is_possible, pairwise
from tests.quantizers.samples import WIDTHS
from tests.tiny import CONFIGS, MOE, token_ids

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Case(NamedTuple):
    """One way to quantize, train and pack a model."""

    arch: str
    grid: str
    bits: int
    group_size: int | str
    dtype: str
    scale_dtype: str
    learn: str


FACTORS: dict[str, tuple[Any, ...]] = {
    "arch": tuple(CONFIGS),
    "grid": ("int", "int_sym", "nf", "nf_sym", "fp", "fp_sym", "ternary", "r2q"),
    "bits": (2, 3, 4, 8),
    "group_size": (32, -1, "tensor", 4),
    "dtype": tuple(DTYPES),
    "scale_dtype": ("float16", "bfloat16", "float32"),
    "learn": ("scale", "nothing", "scale and zero point"),
}
# the matrix that is walked in full in the slow run; the rest varies along with it
MATRIX = ("arch", "grid", "bits", "group_size", "dtype")


RULES: Rules = {
    ("grid", "bits"): lambda grid, bits: bits in WIDTHS[grid],
    ("arch", "group_size"): lambda arch, size: arch not in MOE or size != "tensor",
    # four small random weights may need a scale that fp16 cannot hold
    ("group_size", "scale_dtype"): lambda size, scale_dtype: (size, scale_dtype) != (4, "float16"),
    ("grid", "learn"): lambda grid, learn: "zero" not in learn or grid == "int",
}


def pairwise_cases() -> list[Case]:
    """Cases in which every possible pair of values occurs."""
    return [Case(**values) for values in pairwise(FACTORS, RULES)]


def full_matrix(arch: str) -> list[Case]:
    """Every combination of the matrix for an architecture; the other settings take turns."""
    rng = random.Random(arch)
    free = [name for name in FACTORS if name not in MATRIX]
    cases = []
    for row in itertools.product(*(FACTORS[name] for name in MATRIX[1:])):
        fixed = {"arch": arch, **dict(zip(MATRIX[1:], row, strict=True))}
        while is_possible(fixed, RULES):
            values = fixed | {name: rng.choice(FACTORS[name]) for name in free}
            if is_possible(values, RULES):
                cases.append(Case(**values))
                break
    return cases


def save_and_expect(case: Case, bases: Path, folder: Path) -> None:
    """Train, pack and save a case, with the logits that its reload must give; what training saw is checked here."""
    student = make_student(
        case.arch,
        bases,
        dtype=DTYPES[case.dtype],
        bits=case.bits,
        grid=case.grid,
        group_size=case.group_size,
        scale_dtype=case.scale_dtype,
        learn_scale=case.learn != "nothing",
        learn_zero_point="zero" in case.learn,
        # 172 = 4 * 43: groups of an odd width, and a tail of unused bits behind the last code of a row
        overrides={"down_proj": {"group_size": 43}} if (case.arch, case.group_size) == ("llama-172", 32) else {},
    )
    with use_backend("reference"):  # the one backend whose logits are those of the training forward
        trained_logits = logits(student)
        trained = {
            name: layer.student("weight", "default")().detach()
            for name, layer in student.base_model.model.named_modules()
            if isinstance(layer, BitDistillerLayer) and layer.parameter_names == ("weight",)
        }
        packed = student.pack_and_unload(progressbar=False)
        assert torch.equal(logits(packed), trained_logits), "the packed logits are not those of the training forward"
    layers = {name: layer for name, layer in packed.named_modules() if isinstance(layer, PackedLinear)}
    assert layers.keys() == trained.keys()
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize(), trained[name]), f"{name} is packed otherwise than trained"
    packed.save_pretrained(folder)
    save_file(
        {"logits": logits(packed), "token_ids": token_ids()}
        | {f"state.{name}": tensor.contiguous().clone() for name, tensor in packed.state_dict().items()},
        folder.with_suffix(".expected"),
    )


LOAD_ALL = """
import json, sys
import bitdistiller_peft
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(int(sys.argv[1]))
faults = {}
for folder in json.load(sys.stdin):
    expected = load_file(folder + ".expected")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=expected.pop("token_ids")).logits
    found = {"logits": logits} | {"state." + name: tensor for name, tensor in model.state_dict().items()}
    wrong = sorted(found.keys() ^ expected.keys()) or [
        name for name, tensor in found.items()
        if tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name])
    ]
    if wrong:
        faults[folder] = wrong
print(json.dumps(faults))
"""


def check_round_trip(cases: Iterable[Case], folder: Path) -> None:
    bases = folder / "bases"
    saved: dict[str, Case] = {}
    for number, case in enumerate(cases):
        target = folder / f"case-{number}"
        try:
            save_and_expect(case, bases, target)
        except Exception as error:
            error.add_note(f"in {case}")
            raise
        saved[str(target)] = case
    child = run_python(LOAD_ALL, str(torch.get_num_threads()), stdin=json.dumps(list(saved)))
    assert child.returncode == 0, child.stderr[-4000:]
    faults = json.loads(child.stdout.splitlines()[-1])
    assert not faults, {saved[target]: names for target, names in faults.items()}


def test_every_pair_of_settings_survives_packing_saving_and_a_fresh_process(tmp_path: Path) -> None:
    """G33 (GPT-2's transposed layers) and G34 (Mixtral's other names on disk) are among the cases."""
    check_round_trip(pairwise_cases(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", CONFIGS)
def test_every_combination_survives_packing_saving_and_a_fresh_process(arch: str, tmp_path: Path) -> None:
    check_round_trip(full_matrix(arch), tmp_path)


def test_the_chosen_cases_hold_every_possible_pair_of_settings() -> None:
    check_coverage([case._asdict() for case in pairwise_cases()], FACTORS, RULES)
