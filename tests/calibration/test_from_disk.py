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
    import os, sys, threading, time
    from pathlib import Path
    from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
    from bitdistiller_peft.calibration import calibrate, pack_from_disk
    from tests import tiny
    from tests.calibration.models import IDS

    folder, out, budget, how = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    config = BitDistillerConfig(bits=2, group_size=64)
    options = {"factors": (1.0, 0.8), "show_progress": False, "batch_size": 1}

    def private() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    def limit(most: int) -> None:  # RLIMIT_DATA would count every page of a mapped file that nobody has touched
        while True:
            if private() > most:
                os._exit(77)
            time.sleep(0.001)

    # everything that is loaded or compiled at first use comes before the limit
    pack_from_disk(tiny.save_base("llama", out), None, IDS, config=config, **options)
    threading.Thread(target=limit, args=(private() + budget,), daemon=True).start()
    if how == "whole":
        student = get_bitdistiller_model(tiny.load(folder), config)
        calibrate(student, None, IDS, **options)
        student.pack_and_unload()
    else:
        packed, _ = pack_from_disk(folder, None, IDS, config=config, **options)
        packed.save_pretrained(out / "packed")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_larger_than_memory_is_packed(tmp_path: Path) -> None:
    config = LlamaConfig(
        **{**tiny.DECODER, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 40},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "model", max_shard_size="8MB")

    def run(how: str) -> int:
        command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(tmp_path / "model"), str(tmp_path)]
        done = subprocess.run(
            [*command, str(size // 2), how],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_ENABLE_PARALLEL_LOADING": "false"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (0, 77), done.stderr[-3000:]
        return done.returncode

    assert run("whole") == 77  # it does not fit
    assert run("disk") == 0
    assert tiny.load(tmp_path / "packed").config.num_hidden_layers == 40
