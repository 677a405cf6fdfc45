"""A model that stays on disk is packed to the very codes of one in memory, in less memory than it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bitdistiller_peft import BitDistillerConfig
from bitdistiller_peft.calibration import calibrate, pack_from_disk
from bitdistiller_peft.errors import ConfigError
from tests import tiny
from tests.calibration.models import IDS, student

ROOT = Path(__file__).parents[2]
CONFIG = {"bits": 2, "group_size": 32}


@pytest.mark.parametrize(
    ("name", "options", "config"),
    [
        ("llama", {}, {}),
        ("llama-tied", {"method": "gptq"}, {}),
        ("gpt2", {"skip": ("c_fc",), "batch_size": 4}, {"learn_scale": False}),
        ("qwen3-moe", {}, {"overrides": {"o_proj": {"bits": 4}}}),
        ("qwen2", {}, {"exclude_modules": ["v_proj"], "subln": "output"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_codes_are_those_of_a_model_in_memory(
    models: Path, tmp_path: Path, name: str, options: dict[str, Any], config: dict[str, Any]
) -> None:
    batches = {"batch_size": 8, **options}
    whole = student(models, name, **config)
    expected = calibrate(whole, None, IDS, show_progress=False, **batches)
    whole.pack_and_unload(progressbar=False).save_pretrained(tmp_path / "whole" / "packed")
    base = tiny.save_base(name, models)
    packed, result = pack_from_disk(
        base, None, IDS, config=BitDistillerConfig(**{**CONFIG, **config}), show_progress=False, **batches
    )
    packed.save_pretrained(tmp_path / "streamed" / "packed")
    assert [layer.name for layer in result.layers] == [layer.name for layer in expected.layers]
    assert result.data == expected.data
    folders = [tmp_path / how / "packed" for how in ("whole", "streamed")]
    assert (folders[1] / "model.safetensors").read_bytes() == (folders[0] / "model.safetensors").read_bytes()
    assert json.loads((folders[1] / "config.json").read_text()) == json.loads((folders[0] / "config.json").read_text())
    with torch.no_grad():
        assert torch.equal(packed(IDS).logits, tiny.load(folders[0])(IDS).logits)


def test_what_needs_the_student_in_memory_is_refused(models: Path) -> None:
    base = tiny.save_base("llama", models)
    with pytest.raises(ConfigError, match=r"got method='blockwise'.*call calibrate\(\)"):
        pack_from_disk(base, None, IDS, method="blockwise")
    with pytest.raises(ConfigError, match=r"got \['lm_head'\]"):
        pack_from_disk(
            base, None, IDS, config=BitDistillerConfig(**CONFIG, target_modules=["q_proj", "lm_head"]), method="clip"
        )
    with pytest.raises(ConfigError, match="got 8 and None"):
        pack_from_disk(base, None, IDS, config=BitDistillerConfig(**CONFIG, embedding_bits=8))
    with pytest.raises(ConfigError, match="got none"):
        pack_from_disk(base, None, IDS, config=BitDistillerConfig(**CONFIG, target_modules=["nothing"]))


LIMITED = """
    import resource, sys, torch
    from pathlib import Path
    from transformers import AutoModelForCausalLM
    from bitdistiller_peft import BitDistillerConfig
    from bitdistiller_peft.calibration import pack_from_disk
    from tests import tiny
    from tests.calibration.models import IDS

    folder, out, budget = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    config = BitDistillerConfig(bits=2, group_size=64)
    options = {"config": config, "factors": (1.0, 0.8), "show_progress": False, "batch_size": 1}
    # everything that is loaded or compiled at first use, before the limit
    pack_from_disk(tiny.save_base("llama", out), None, IDS, **options)
    status = Path("/proc/self/status").read_text()
    used = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + budget, resource.RLIM_INFINITY))
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except (MemoryError, RuntimeError, OSError) as error:
        print("whole:", type(error).__name__)
    packed, _ = pack_from_disk(folder, None, IDS, **options)
    packed.save_pretrained(out / "packed")
    print("packed")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what a process maps on Linux only")
def test_a_model_larger_than_memory_is_packed(tmp_path: Path) -> None:
    config = LlamaConfig(
        **{**tiny.DECODER, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 20},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "model", max_shard_size="16MB")
    budget = size // 2
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(tmp_path / "model"), str(tmp_path), str(budget)]
    single = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "HF_ENABLE_PARALLEL_LOADING": "false"}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **single}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[0].startswith("whole: "), done.stdout  # it does not fit
    assert done.stdout.splitlines()[-1] == "packed"
    assert tiny.load(tmp_path / "packed").config.num_hidden_layers == 20
