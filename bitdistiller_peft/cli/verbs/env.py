"""`bitdistiller env`: versions and devices, for a bug report."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bitdistiller_peft._version import library_version
from bitdistiller_peft.cli.verb import Console, Settings, Verb

PACKAGES = (
    *("torch", "transformers", "peft", "trl", "accelerate", "safetensors", "datasets", "huggingface_hub", "numpy"),
    *("bitsandbytes", "deepspeed", "triton", "gguf", "lm_eval"),
)
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "OMP_NUM_THREADS")


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Print one line per fact."""
    facts: dict[str, Any] = {
        "bitdistiller_peft": library_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
    }
    if not settings.is_dry_run:
        facts |= _hardware() | _sockets()
    facts |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        console.say(f"{name:<{width}}{value}")
    return facts


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _hardware() -> dict[str, Any]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    facts: dict[str, Any] = {"cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}, {capability}"}
    if not torch.accelerator.is_available():
        return facts | {"accelerator": "none: everything runs on the CPU"}
    kind = torch.accelerator.current_accelerator()
    facts["accelerator"] = f"{torch.accelerator.device_count()} x {kind}"
    if torch.cuda.is_available():
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        facts["accelerator"] += f", {name}, {memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return facts


def _sockets() -> dict[str, Any]:
    """Whether peft and transformers know us."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    in_peft = any(str(getattr(key, "value", key)) == "BITDISTILLER" for key in PEFT_TYPE_TO_CONFIG_MAPPING)
    known = {"peft": in_peft, "transformers": "bitdistiller" in AUTO_QUANTIZER_MAPPING}
    names = [name for name, is_known in known.items() if is_known]
    sys.stdout.flush()
    return {"plugged into": ", ".join(names) or "nothing"}


VERB = Verb("env", "versions and devices, for a bug report", run)
