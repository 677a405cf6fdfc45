"""Importing the library plugs it into PEFT and transformers in whatever order they are imported, and costs nothing."""

from __future__ import annotations

import copy
import importlib.machinery
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import bitdistiller_peft
from bitdistiller_peft import _plug

ROOT = Path(__file__).parents[1]

CHECKS = """
import sys

def peft_knows():
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from bitdistiller_peft.tuner import BitDistillerConfig, BitDistillerModel
    member = PeftType("BITDISTILLER")
    assert member is PeftType.BITDISTILLER
    assert [name for name in PeftType.__members__].count("BITDISTILLER") == 1
    assert [m.value for m in PeftType].count("BITDISTILLER") == 1
    assert PEFT_TYPE_TO_CONFIG_MAPPING["BITDISTILLER"] is BitDistillerConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is BitDistillerModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "bitdistiller_"

def transformers_knows():
    from transformers.quantizers import auto
    from bitdistiller_peft.hub import BitDistillerHfQuantizer, BitDistillerQuantConfig
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["bitdistiller"] is BitDistillerQuantConfig
    assert auto.AUTO_QUANTIZER_MAPPING["bitdistiller"] is BitDistillerHfQuantizer
    assert auto.LOADING_ATTRIBUTES_CONFIG_TYPES.count(BitDistillerQuantConfig) == 1

def finders():
    return sum(type(finder).__name__ == "SocketFinder" for finder in sys.meta_path)

def heavy():
    return sorted({"torch", "peft", "transformers", "accelerate", "trl", "numpy", "safetensors"} & set(sys.modules))
"""


def fresh(script: str, *arguments: str, folder: Path | None = None) -> str:
    """Run a script in a process of its own and return what it printed."""
    command = [sys.executable, *(arguments or ("-c", CHECKS + textwrap.dedent(script)))]
    paths = [*(str(path) for path in (folder, ROOT) if path is not None), os.environ["PYTHONPATH"]]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_library_imports_nothing_heavy() -> None:
    fresh("""
        import bitdistiller_peft
        assert heavy() == [], heavy()
        assert finders() == 1
        assert bitdistiller_peft.__version__
        assert "BitDistillerConfig" in dir(bitdistiller_peft)
        assert heavy() == [], heavy()
    """)


ORDERS = {
    # PEFT's own import brings transformers, but not its quantizers
    "ours-peft": """
        import bitdistiller_peft
        import peft
        peft_knows()
        transformers_knows()
        bitdistiller_peft.BitDistillerConfig(bits=3)
    """,
    "peft-ours": """
        import peft
        assert "BITDISTILLER" not in peft.PeftType.__members__
        import bitdistiller_peft
        assert "BITDISTILLER" in peft.PeftType.__members__
        peft_knows()
        transformers_knows()

        import importlib
        for _ in range(2):
            for name in ("bitdistiller_peft._plug", "bitdistiller_peft", "bitdistiller_peft.tuner._socket"):
                importlib.reload(sys.modules[name])
        importlib.reload(peft)
        bitdistiller_peft._plug.plug_in()
        assert finders() == 1
        peft_knows()
        transformers_knows()
    """,
    "ours-transformers-peft": """
        import bitdistiller_peft
        import transformers
        from transformers import AutoModelForCausalLM
        transformers_knows()
        assert "peft" not in sys.modules, "transformers alone must not pull PEFT in"
        from peft import PeftConfig
        peft_knows()
    """,
    "the-hub-first": """
        from bitdistiller_peft import BitDistillerQuantConfig
        transformers_knows()
        assert "peft" not in sys.modules
        BitDistillerQuantConfig(bits=3)
    """,
    "transformers-ours": """
        from transformers.quantizers import AutoQuantizationConfig
        import bitdistiller_peft
        assert "peft" not in sys.modules
        config = AutoQuantizationConfig.from_dict({"quant_method": "bitdistiller", "bits": 3, "group_size": 64})
        assert type(config) is bitdistiller_peft.BitDistillerQuantConfig
        transformers_knows()
    """,
}
SLOW_ORDERS = {
    "ours-torch-peft": """
        import bitdistiller_peft
        import torch
        import peft
        peft_knows()
    """,
    "torch-ours-transformers": """
        import torch
        import bitdistiller_peft
        from transformers import AutoModelForCausalLM
        transformers_knows()
        peft_knows()
    """,
    "transformers-peft-ours": """
        import transformers
        import peft
        import bitdistiller_peft
        peft_knows()
        transformers_knows()
    """,
    "ours-trl": """
        import bitdistiller_peft
        from trl import SFTTrainer
        peft_knows()
        transformers_knows()
    """,
    "a-name-of-ours-first": """
        from bitdistiller_peft import BitDistillerConfig
        BitDistillerConfig(bits=4)
        peft_knows()
        transformers_knows()
    """,
    "the-tuner-first": """
        import bitdistiller_peft.tuner
        peft_knows()
        transformers_knows()
    """,
    "one-module-of-the-hub-first": """
        import bitdistiller_peft.hub.quantizer
        transformers_knows()
    """,
    "the-quantizers-of-transformers-directly": """
        import bitdistiller_peft
        import transformers.quantizers.auto
        transformers_knows()
    """,
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_imports_does_not_matter(order: str) -> None:
    fresh(ORDERS[order])


@pytest.mark.slow
@pytest.mark.parametrize("order", SLOW_ORDERS)
def test_no_order_of_imports_matters(order: str) -> None:
    fresh(SLOW_ORDERS[order])


@pytest.mark.slow
@pytest.mark.parametrize("home", sorted(set(bitdistiller_peft._HOMES.values())))
def test_any_floor_of_ours_can_be_the_first_import(home: str) -> None:
    name = next(name for name, place in bitdistiller_peft._HOMES.items() if place == home)
    fresh(f"""
        from bitdistiller_peft import {name}
        peft_knows()
        transformers_knows()
    """)


def test_a_module_run_by_name_and_its_spawned_workers_are_plugged_in(tmp_path: Path) -> None:
    """`python -m`, and a worker that gets a config by pickle."""
    from bitdistiller_peft import BitDistillerConfig

    (tmp_path / "config.pickle").write_bytes(pickle.dumps(BitDistillerConfig(bits=3)))
    (tmp_path / "job.py").write_text(
        textwrap.dedent("""
            import multiprocessing
            import pickle
            import sys
            from pathlib import Path

            import bitdistiller_peft

            def work(pickled):
                assert "__mp_main__" in sys.modules, "not spawned"
                config = pickle.loads(pickled)
                from peft import PeftType, get_peft_model
                assert config.peft_type is PeftType.BITDISTILLER
                return config.bits

            if __name__ == "__main__":
                assert "peft" not in sys.modules
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    pickled = Path(__file__).with_name("config.pickle").read_bytes()
                    print("worker:", pool.apply(work, [pickled]))
        """)
    )
    assert "worker: 3" in fresh("", "-m", "job", folder=tmp_path)


@pytest.mark.slow
def test_without_the_library_an_adapter_says_whose_it_is(tmp_path: Path) -> None:
    """G1: nothing is registered behind the user's back, and nothing loads as something else."""
    from bitdistiller_peft import BitDistillerConfig

    BitDistillerConfig().save_pretrained(tmp_path)
    fresh(f"""
        from peft import PeftConfig
        try:
            PeftConfig.from_pretrained({str(tmp_path)!r})
        except Exception as error:
            assert "BITDISTILLER" in str(error), error
        else:
            raise SystemExit("loaded without the library")
    """)


# ------------------------------------------------------------------------------------------------ the enum's member


def test_the_type_is_a_real_member_of_pefts_enum() -> None:
    """G1: transformers' `load_adapter` reads `.value`."""
    from peft import PeftType

    from bitdistiller_peft import BitDistillerConfig
    from bitdistiller_peft.tuner._socket import NAME, add_peft_type

    member = PeftType.BITDISTILLER
    assert isinstance(member, PeftType)
    assert (member.name, member.value, str(member.value)) == ("BITDISTILLER", "BITDISTILLER", "BITDISTILLER")
    assert member == "BITDISTILLER"
    assert hash(member) == hash("BITDISTILLER")
    assert PeftType("BITDISTILLER") is PeftType["BITDISTILLER"] is member
    assert member in PeftType
    assert list(PeftType).count(member) == 1
    assert len(PeftType) == len(list(PeftType)) == len({m.value for m in PeftType})
    assert add_peft_type(NAME.upper()) is member, "adding it again adds nothing"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    assert copy.copy(member) is copy.deepcopy(member) is member
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": "BITDISTILLER"}
    assert "BITDISTILLER" in repr(member)
    config = BitDistillerConfig(bits=3)
    assert config.peft_type is member
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config


def test_registering_again_changes_nothing() -> None:
    from peft import mapping
    from peft.tuners.tuners_utils import BaseTuner
    from transformers.quantizers import auto

    from bitdistiller_peft.hub import _socket as hub_socket
    from bitdistiller_peft.tuner import BitDistillerConfig, BitDistillerModel
    from bitdistiller_peft.tuner import _socket as tuner_socket

    def state() -> tuple[object, ...]:
        return (
            dict(mapping.PEFT_TYPE_TO_CONFIG_MAPPING),
            dict(mapping.PEFT_TYPE_TO_TUNER_MAPPING),
            dict(auto.AUTO_QUANTIZER_MAPPING),
            dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING),
            auto.LOADING_ATTRIBUTES_CONFIG_TYPES,
            BaseTuner.__init__,
            list(sys.meta_path),
        )

    before = state()
    tuner_socket.register(BitDistillerConfig, BitDistillerModel)
    hub_socket.register()
    _plug.plug_in()
    assert state() == before


# ---------------------------------------------------------------------------------------------------- the mechanism


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A made-up package ``plug_host`` with a socket; the list notes every time that it is filled."""
    (tmp_path / "plug_host").mkdir()
    (tmp_path / "plug_host" / "__init__.py").write_text("ready = True\n")
    (tmp_path / "plug_host" / "part.py").write_text("import plug_host\n")
    (tmp_path / "plug_broken.py").write_text("raise RuntimeError('broken host')\n")
    calls: list[str] = []

    def filler(name: str) -> Callable[[], None]:
        def fill() -> None:
            assert name == "plug_broken" or sys.modules[name].ready, "filled before the host was executed"
            calls.append(name)

        return fill

    monkeypatch.syspath_prepend(str(tmp_path))
    sockets = {name: filler(name) for name in ("plug_host", "plug_broken", "plug_absent")}
    monkeypatch.setattr(_plug, "_SOCKETS", sockets)
    yield calls
    for name in [name for name in sys.modules if name.startswith("plug_")]:
        del sys.modules[name]


def test_a_socket_is_filled_once_right_after_its_host_is_executed(host: list[str]) -> None:
    import plug_host
    import plug_host.part

    assert host == ["plug_host"]
    assert plug_host.ready
    assert type(plug_host.__loader__) is importlib.machinery.SourceFileLoader, "the host keeps its own loader"
    assert plug_host.__spec__.loader is plug_host.__loader__
    assert plug_host.__spec__.submodule_search_locations


def test_a_socket_of_a_host_that_is_there_is_filled_at_once(host: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without_finder:
        finders = [finder for finder in sys.meta_path if type(finder).__name__ != "SocketFinder"]
        without_finder.setattr(sys, "meta_path", finders)
        import plug_host  # noqa: F401
    assert host == []
    _plug.plug_in()
    assert host == ["plug_host"]


def test_looking_for_a_host_does_not_fill_its_socket(host: list[str]) -> None:
    spec = importlib.util.find_spec("plug_host")
    assert spec is not None
    assert spec.origin.endswith("__init__.py")
    assert host == []


def test_a_reloaded_host_is_filled_again(host: list[str]) -> None:
    import plug_host

    importlib.reload(plug_host)
    assert host == ["plug_host", "plug_host"]


def test_a_host_that_fails_fails_as_without_us(host: list[str]) -> None:
    with pytest.raises(RuntimeError, match="broken host"):
        import plug_broken  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="plug_absent"):
        import plug_absent  # noqa: F401
    assert importlib.util.find_spec("plug_absent") is None
    assert host == []


def test_reloading_the_plug_itself_keeps_one_working_finder(monkeypatch: pytest.MonkeyPatch, host: list[str]) -> None:
    sockets = _plug._SOCKETS
    before = list(sys.meta_path)
    monkeypatch.setattr(sys, "meta_path", before.copy())
    kept = vars(_plug).copy()
    try:
        importlib.reload(_plug)
        _plug.plug_in()
        assert [type(finder).__name__ for finder in sys.meta_path].count("SocketFinder") == 1
        _plug._SOCKETS = sockets
        import plug_host  # noqa: F401

        assert host == ["plug_host"]
    finally:
        vars(_plug).update(kept)
