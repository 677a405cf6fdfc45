"""A sharded student packs to the bytes of a whole one, also with trained copies, tied weights and norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.errors import StateError
from bitdistiller_peft.tuner.whole import whole_copy
from tests import tiny
from tests.sharding import process_group, shard


def student(folder: Path, name: str, **config: Any) -> PeftModel:
    """A student whose every trained tensor has moved a little."""
    model = get_bitdistiller_model(
        tiny.load(tiny.save_base(name, folder)), BitDistillerConfig(**{"bits": 2, "group_size": 32, **config})
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", {}),
        ("llama-tied", {"train_other": "norms"}),
        ("llama", {"train_other": "all"}),
        ("qwen2", {"subln": "output", "grid": "ternary", "group_size": "tensor"}),
        ("llama-tied", {"embedding_bits": 8}),
        ("qwen3-moe", {}),
    ],
    ids=["plain", "tied", "trained copies", "norms and biases", "tied tables", "experts"],
)
def test_a_sharded_student_packs_to_the_same_bytes(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    student(tmp_path, name, **config).pack_and_unload().save_pretrained(tmp_path / "alone" / "packed")
    with process_group():
        sharded = shard(student(tmp_path, name, **config))
        packed = sharded.pack_and_unload()
        packed.save_pretrained(tmp_path / "sharded" / "packed")
        assert "FSDP" not in type(packed).__name__
        assert not any(parameter.is_meta for parameter in packed.parameters())
    folders = [tmp_path / how / "packed" for how in ("alone", "sharded")]
    files, theirs = (sorted(path.name for path in folder.iterdir()) for folder in folders)
    assert files == theirs
    for file in set(files) - {"README.md"}:  # which names its folder
        assert (folders[1] / file).read_bytes() == (folders[0] / file).read_bytes(), file
    tokens = tiny.token_ids()
    with torch.no_grad():
        assert torch.equal(packed(tokens).logits, tiny.load(folders[0])(tokens).logits)


def test_parameters_of_its_own_are_refused(tmp_path: Path) -> None:
    model = tiny.load(tiny.save_base("llama", tmp_path))
    del model.model.norm
    with pytest.raises(StateError, match=r"'model.norm.weight' is missing"):
        whole_copy(model, [], "default")
