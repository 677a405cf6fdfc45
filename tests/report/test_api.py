"""A report is written whole, again only when something changed, and never over a file that is not its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bitdistiller_peft.errors import CheckpointError, ConfigError, UnknownNameError
from bitdistiller_peft.report import write_report
from bitdistiller_peft.report.find import find
from tests.report.conftest import log, write
from tests.report.page import parse, section

KEYS = ["scores", "training", "errors", "histogram", "sizes", "costs", "gallery", "provenance"]


@pytest.fixture
def run(make_chain: Callable[..., Path], tmp_path: Path) -> Path:
    return make_chain(tmp_path / "run")


def test_a_whole_chain_lacks_nothing(run: Path) -> None:
    files = write_report(run, show_progress=False)
    assert (files.html, files.markdown) == (run / "report.html", run / "report.md")
    assert (files.missing, files.was_there) == ((), False)
    page = parse(files.html.read_text(encoding="utf-8"))
    assert [element.attributes["id"] for element in page.all("section")] == KEYS


def test_the_same_folder_gives_the_same_bytes_and_is_not_read_twice(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_report(run, tmp_path / "a", show_progress=False)
    second = write_report(run, tmp_path / "b", show_progress=False)
    assert first.html.read_bytes() == second.html.read_bytes()
    assert first.markdown.read_bytes() == second.markdown.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("bitdistiller_peft.report.api.measure_weights", None)
        again = write_report(run, tmp_path / "a", show_progress=False)
    assert again.was_there
    assert again.missing == first.missing
    write(run / "distill" / "result.json", {"steps": 31})
    assert not write_report(run, tmp_path / "a", show_progress=False).was_there
    name = "model.layers.0.mlp.up_proj.weight"
    assert not write_report(run, tmp_path / "a", weight=name, show_progress=False).was_there


def test_what_is_missing_is_named_with_the_command_that_makes_it(run: Path) -> None:
    for path in ("eval", "distill/metrics.jsonl", "costs.json", "calibrate", "generate", "distill/result.json"):
        shutil.rmtree(run / path) if (run / path).is_dir() else (run / path).unlink()
    config = json.loads((run / "distill" / "packed" / "config.json").read_text())
    config["quantization_config"]["provenance"]["base_model"] = "nobody/nothing"
    write(run / "distill" / "packed" / "config.json", config)
    files = write_report(run, show_progress=False)
    assert files.missing == ("scores", "training", "errors", "costs", "gallery")
    assert write_report(run, show_progress=False).missing == files.missing, "read from the report that is there"
    page, text = parse(files.html.read_text(encoding="utf-8")), files.markdown.read_text(encoding="utf-8")
    commands = {
        "scores": "bitdistiller eval MODEL --text TEXT --teacher BASE --output FOLDER/eval",
        "training": "bitdistiller distill",
        "errors": "bitdistiller report FOLDER --model BASE",
        "costs": "bitdistiller run -c run.yaml",
        "gallery": "--gallery 64",
    }
    for key, command in commands.items():
        assert command in section(page, key).all("p", kind="missing")[0].text
        assert command in text


def test_only_a_report_is_overwritten(run: Path) -> None:
    (run / "report.html").write_text("<p>my thesis</p>")
    with pytest.raises(ConfigError, match=r"nothing was overwritten"):
        write_report(run, show_progress=False)
    assert (run / "report.html").read_text() == "<p>my thesis</p>"
    assert not (run / "report.md").exists()


def test_a_packed_model_alone_will_do(packed: Path, base: Path, tmp_path: Path) -> None:
    files = write_report(packed, tmp_path, show_progress=False)
    assert files.missing == ("scores", "training", "costs", "gallery")
    other = write_report(packed, tmp_path / "named", base=str(base), show_progress=False)
    assert "errors" not in other.missing


@pytest.mark.parametrize("stage", ["distill", "eval"])
def test_the_folder_of_one_stage_will_do(stage: str, run: Path, tmp_path: Path) -> None:
    write(run / stage / "resolved.yaml", f"# bitdistiller {stage}, bitdistiller_peft 0.1.0. Works as --config.\n")
    files = write_report(run / stage, tmp_path, show_progress=False)
    has = set(KEYS) - set(files.missing)
    assert has >= ({"training", "errors", "sizes"} if stage == "distill" else {"scores", "gallery", "costs"})


def test_the_state_of_the_newest_checkpoint_stands_in_for_the_log_of_a_run_that_still_trains(tmp_path: Path) -> None:
    for step in (5, 10):
        write(tmp_path / f"trainer/checkpoint-{step}/trainer_state.json", {"log_history": log(step)})
    found = find(tmp_path)
    assert len(found.log) == 11
    files = write_report(tmp_path, show_progress=False)
    assert "training" not in files.missing
    assert "sizes" in files.missing


def test_a_log_with_values_that_are_not_finite_is_drawn_without_them(run: Path) -> None:
    lines = [*log(4), {"step": 5, "loss": float("nan"), "forward_kl": float("inf"), "reverse_kl": 1.0}]
    write(run / "distill" / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    page = parse(write_report(run, show_progress=False).html.read_text(encoding="utf-8"))
    words = [p.text for p in section(page, "training").all("p")]
    assert "2 logged values are not finite; the curves leave them out." in words
    assert [len(line.attributes["points"].split()) for line in section(page, "training").all("polyline")][:3] == [
        4,
        4,
        5,
    ]


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("eval/result.json", "{"),
        ("eval/result.json", "[]"),
        ("distill/metrics.jsonl", '{"step": 1}\n{"step"'),
        ("costs.json", "nonsense"),
        ("distill/packed/config.json", "{"),
        ("distill/trainer/doctor.json", "[" * 100_000),
    ],
    ids=["cut-off", "a-list", "a-line", "costs", "config", "deep"],
)
def test_a_damaged_file_is_named(path: str, content: str, run: Path) -> None:
    (run / path).write_text(content)
    with pytest.raises(CheckpointError, match=Path(path).name):
        write_report(run, show_progress=False)


@pytest.mark.parametrize(
    ("rows", "tasks"),
    [(None, 1), ([1, None, "x"], None), ([{"perplexity": "low"}], [1]), ([{"gallery": {"entries": [1]}}], {})],
    ids=["none", "no-rows", "a-word", "no-entries"],
)
def test_a_result_of_another_shape_leaves_gaps_and_stops_nothing(rows: object, tasks: object, run: Path) -> None:
    if isinstance(rows, list) and isinstance(rows[0], dict):
        rows[0]["tasks"] = {"scores": tasks}
    write(run / "eval" / "result.json", {"rows": rows, "pairs": tasks})
    write(run / "export" / "result.json", {"reports": rows})
    write(run / "costs.json", {"distill": 1, "calibrate": {"seconds": "long"}})
    parse(write_report(run, show_progress=False).html.read_text(encoding="utf-8"))


def test_what_cannot_be_reported_on_is_refused(tmp_path: Path, run: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match="must be a folder that exists"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="which holds none of it"):
        write_report(base)
    with pytest.raises(ConfigError, match="in the cache of the Hub"):
        write_report(run, base="nobody/nothing")
    with pytest.raises(UnknownNameError, match="`weight` must be one of"):
        write_report(run, weight="lm_head")
