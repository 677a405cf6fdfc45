"""The command turns the telemetry of what it calls off, before any of it is imported; what the user says is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bitdistiller_peft.cli.schema import all_keys
from tests.hub.models import ROOT

NAMES = ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
SCRIPT = """
import json, os, sys
from bitdistiller_peft.cli import main

early = [name for name in ("huggingface_hub", "trl", "transformers") if name in sys.modules]
main(["--version"])
from huggingface_hub import constants
found = {name: os.environ[name] for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")}
print(json.dumps([early, found, constants.HF_HUB_DISABLE_TELEMETRY]))
"""


@pytest.mark.parametrize(("said", "expected"), [(None, "1"), ("0", "0")], ids=["unsaid", "said"])
def test_the_command_turns_telemetry_off_unless_it_is_asked_for(said: str | None, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in (*NAMES, "HF_HUB_OFFLINE")}
    environment |= {} if said is None else dict.fromkeys(NAMES, said)
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    early, found, is_disabled = json.loads(child.stdout.splitlines()[-1])
    assert early == [], "read by these when they are imported"
    assert found == dict.fromkeys(NAMES, expected)
    assert is_disabled is (expected == "1")


def test_no_tracker_is_reported_to_unless_one_is_named() -> None:
    assert all_keys()["distill.report_to"].default == "none"
