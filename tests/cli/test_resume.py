"""A run that was stopped goes on: by a signal after a clean save, or killed, in fresh processes too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback

from bitdistiller_peft.calibration import blockwise
from bitdistiller_peft.training import DistillTrainer
from tests.cli.conftest import Command, chain_yaml


@pytest.fixture
def chain(base: Path, files: Path, tmp_path: Path) -> tuple[Path, Path]:
    path, output = tmp_path / "run.yaml", tmp_path / "out"
    text = chain_yaml(base, files, output).replace("max_steps: 2", "max_steps: 4")
    path.write_text(f"{text}run: {{stages: [generate, distill]}}\n", encoding="utf-8")
    return path, output


class _At(TrainerCallback):
    """Does something to its own process at the end of a step."""

    def __init__(self, step: int, error: BaseException | None = None) -> None:
        self.step, self.error = step, error

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            if self.error is not None:
                raise self.error
            os.kill(os.getpid(), signal.SIGTERM)


def inject(monkeypatch: pytest.MonkeyPatch, callback: TrainerCallback) -> list[int]:
    """Give every trainer the callback; the list collects at which step training began."""
    began: list[int] = []
    build = DistillTrainer.__init__

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            began.append(state.global_step)

    def init(self, *args, **kwargs) -> None:
        build(self, *args, **kwargs)
        self.add_callback(Begin())
        self.add_callback(callback)

    monkeypatch.setattr(DistillTrainer, "__init__", init)
    return began


def test_a_signal_saves_and_leaves_with_130_and_the_same_command_goes_on(
    command: Command, chain: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = chain
    with monkeypatch.context() as patch:
        inject(patch, _At(1))
        done = command("run", "-c", path)
    assert done.code == 130
    assert "the same command goes on" in done.err
    assert (output / "distill" / "trainer" / "checkpoint-2").is_dir()
    assert not (output / "distill" / "result.json").exists()
    assert not (output / "distill" / "packed").exists()
    with monkeypatch.context() as patch:
        began = inject(patch, _At(99))
        done = command("run", "-c", path, "--json")
    assert done.code == 0, done.err
    assert began == [2]
    assert "generated before" in done.err
    assert done.json["stages"]["distill"]["steps"] == 4


def test_a_crash_goes_on_from_the_last_whole_checkpoint_and_ends_with_the_same_weights(
    command: Command, chain: tuple[Path, Path], base: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = chain
    with monkeypatch.context() as patch:
        inject(patch, _At(3, RuntimeError("the power went")))
        done = command("run", "-c", path)
    assert done.code == 1
    assert "RuntimeError: the power went (--debug shows the traceback.)" in done.err
    (output / "distill" / "trainer" / "checkpoint-3" / "optimizer.pt").write_bytes(b"torn")
    with monkeypatch.context() as patch:
        began = inject(patch, _At(99))
        assert command("run", "-c", path).code == 0
    assert began == [2], "checkpoint-3 is damaged, so the one before it"
    other = tmp_path / "other.yaml"
    other.write_text(path.read_text().replace(str(output), str(tmp_path / "straight")))
    assert command("run", "-c", other).code == 0
    weights = Path("distill") / "packed" / "model.safetensors"
    assert (output / weights).read_bytes() == (tmp_path / "straight" / weights).read_bytes()


def test_a_run_killed_within_its_first_checkpoint_starts_anew_by_itself(
    command: Command, chain: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = chain
    with monkeypatch.context() as patch:
        inject(patch, _At(2, RuntimeError("the power went")))
        assert command("run", "-c", path).code == 1
    for torn in (output / "distill" / "trainer").glob("checkpoint-*"):
        (torn / "trainer_state.json").unlink()
    with monkeypatch.context() as patch:
        began = inject(patch, _At(99))
        done = command("run", "-c", path)
    assert (done.code, began) == (0, [0]), done.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "ctrl-c"])
def test_a_blockwise_calibration_keeps_its_blocks_and_the_same_command_goes_on(
    number: int, command: Command, base: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = f"model: {base}\ndevice: cpu\nquant: {{bits: 2, group_size: 32}}\ncalibrate: {{method: blockwise, "
    settings += f"epochs: 1, texts: [{files / 'text.txt'}], num_samples: 2, seq_len: 32, pack: true}}\n"
    path, train, trained = tmp_path / "run.yaml", blockwise._Block._train, []
    path.write_text(settings, encoding="utf-8")

    def interrupted(self, options) -> None:
        trained.append(self.name)
        if self.name.endswith(".1"):
            os.kill(os.getpid(), number)
        train(self, options)

    before = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(blockwise._Block, "_train", interrupted)
        done = command("calibrate", "-c", path, "--output", tmp_path / "a")
        assert done.code == 130
        assert "the same command goes on" in done.err
        number = 0  # nothing more is sent
        assert command("calibrate", "-c", path, "--output", tmp_path / "a").code == 0
    assert signal.signal(signal.SIGINT, before[0]) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == before[1]
    assert [name[-2:] for name in trained] == [".0", ".1", ".1"]
    assert not (tmp_path / "a" / "blocks").exists()
    assert command("calibrate", "-c", path, "--output", tmp_path / "b").code == 0
    weights = Path("packed") / "model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()


# ------------------------------------------------------------------------------------------------ fresh processes


def python(*arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment, **more
    )


def test_the_command_and_its_help_import_nothing_heavy() -> None:
    code = """
import json, sys
from bitdistiller_peft.cli import main
from bitdistiller_peft.cli.dispatch import VERBS
import bitdistiller_peft.__main__
main(["--help"])
codes = [main([verb, "--help"]) for verb in VERBS] + [main(["distil"]), main(["distill", "--dry-run"])]
heavy = ["torch", "transformers", "peft", "trl", "datasets", "numpy", "pandas", "accelerate"]
sys.stderr.write(json.dumps([codes, [name for name in heavy if name in sys.modules]]))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    codes, heavy = json.loads(done.stderr.splitlines()[-1])
    assert heavy == []
    assert codes[:-2] == [0] * (len(codes) - 2)
    assert codes[-2:] == [2, 2]


@pytest.mark.slow
def test_a_killed_chain_goes_on_in_a_new_process(chain: tuple[Path, Path]) -> None:
    path, output = chain
    process = subprocess.Popen(
        [sys.executable, "-m", "bitdistiller_peft", "run", "-c", str(path), "--distill.max-steps", "40"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        while process.poll() is None and not list(
            output.glob("distill/trainer/checkpoint-*/bitdistiller-checkpoint.json")
        ):
            time.sleep(0.1)
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        process.kill()
    finally:
        process.kill()
        process.communicate()
    done = python("-m", "bitdistiller_peft", "run", "-c", str(path), "--distill.max-steps", "40", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["stages"]["distill"]["steps"] == 40
