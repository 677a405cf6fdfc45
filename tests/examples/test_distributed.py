"""The launch configs can be read by accelerate and say what their names promise; the script trains and packs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from tests import tiny
from tests.training import helpers

FOLDER = Path(__file__).parents[2] / "examples" / "distributed"


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"),
    [
        ("one_gpu", DistributedType.NO, 1, 1),
        ("one_node_ddp", DistributedType.MULTI_GPU, 1, 8),
        ("one_node_fsdp2", DistributedType.FSDP, 1, 8),
        ("one_node_zero3", DistributedType.DEEPSPEED, 1, 8),
        ("many_nodes_fsdp2", DistributedType.FSDP, 4, 32),
    ],
)
def test_accelerate_reads_the_configs(name: str, kind: DistributedType, machines: int, processes: int) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses keys that it does not know
    assert (config.distributed_type, config.num_machines, config.num_processes) == (kind, machines, processes)
    if kind == DistributedType.FSDP:
        assert config.fsdp_config["fsdp_version"] == 2
    if kind == DistributedType.DEEPSPEED:
        path = FOLDER.parents[1] / config.deepspeed_config["deepspeed_config_file"]
        assert json.loads(path.read_text())["zero_optimization"]["stage"] == 3


def test_every_config_is_tested() -> None:
    assert len(list(FOLDER.glob("*.yaml"))) == 5


def test_the_slurm_script_starts_what_is_there() -> None:
    text = (FOLDER / "train.slurm").read_text()
    for path in re.findall(r"examples/distributed/\w+\.(?:yaml|py)", text):
        assert (FOLDER.parents[1] / path).is_file(), path
    nodes = int(re.search(r"--nodes=(\d+)", text)[1])
    gpus = int(re.search(r"--gpus-per-node=(\d+)", text)[1])
    config = yaml.safe_load((FOLDER / "many_nodes_fsdp2.yaml").read_text())
    assert (nodes, nodes * gpus) == (config["num_machines"], config["num_processes"])
    subprocess.run(["bash", "-n", str(FOLDER / "train.slurm")], check=True)


@pytest.mark.slow
def test_two_processes_train_pack_and_go_on(tmp_path: Path) -> None:
    model = tiny.save_base("llama", tmp_path)
    helpers.tokenizer().save_pretrained(model)
    words = [" ".join(helpers.WORDS[i : i + 12]) for i in range(0, 60, 6)]
    (tmp_path / "text.txt").write_text("\n\n".join(words))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = f"--model {model} --text {tmp_path / 'text.txt'} --output {tmp_path / 'out'} --group_size 32"
    settings = "--use_cpu true --bf16 false --max_steps 2 --save_steps 1 --per_device_train_batch_size 1"
    for _ in range(2):  # the second time, there is a checkpoint of the last step
        done = subprocess.run(
            [*command, str(FOLDER / "train.py"), *arguments.split(), *settings.split(), "--report_to", "none"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("packed model: ") == 1
    assert tiny.load(tmp_path / "out" / "packed").config.quantization_config.state == "packed"
