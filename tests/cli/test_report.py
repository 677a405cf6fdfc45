"""`bitdistiller report`, the last stage of `run`, and the gallery of `eval`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command, chain_yaml


def test_report_writes_both_files_and_says_what_is_missing(
    command: Command, packed: Path, base: Path, tmp_path: Path
) -> None:
    arguments = ["report", packed, "--model", base, "--output", tmp_path]
    dry = command(*arguments, "--dry-run", "--json")
    assert (dry.code, dry.json["output"]) == (0, str(tmp_path))
    assert not list(tmp_path.iterdir())
    done = command(*arguments, "--json")
    assert done.code == 0, done.err
    assert done.json == {
        "html": str(tmp_path / "report.html"),
        "markdown": str(tmp_path / "report.md"),
        "missing": ["scores", "training", "costs", "gallery"],
    }
    assert "without data: scores, training, costs, gallery" in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.md"}
    assert "reported before" not in done.err
    assert command(*arguments, "--weight", "model.layers.0.mlp.up_proj.weight").code == 0
    assert (
        f"reported before: {tmp_path / 'report.html'}"
        in command(*arguments, "--weight", "model.layers.0.mlp.up_proj.weight").out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "`FOLDER` must be given"),
        (["report", "nowhere"], "`FOLDER` must be a folder that exists"),
        (["report", "BASE"], "holds none of it"),
        (["report", "PACKED", "--weight", "lm_head"], "`weight` must be one of"),
        (["report", "PACKED", "--model", "nobody/nothing"], "`model` must be a folder, or in the cache"),
    ],
)
def test_a_fault_of_the_user_has_code_2(
    arguments: list[str], message: str, command: Command, base: Path, packed: Path, tmp_path: Path
) -> None:
    places = {"BASE": base, "PACKED": packed}
    done = command(*(places.get(a, a) for a in arguments), *(["--output", tmp_path] if len(arguments) > 1 else []))
    assert (done.code, message in done.err) == (2, True), done.err


def test_a_damaged_file_has_code_3(command: Command, tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "result.json").write_text("{")
    done = command("report", tmp_path)
    assert (done.code, "result.json" in done.err) == (3, True)


def test_a_chain_measures_its_stages_shows_a_gallery_and_ends_with_a_report(
    command: Command, base: Path, files: Path, tmp_path: Path
) -> None:
    path, output = tmp_path / "run.yaml", tmp_path / "out"
    text = chain_yaml(base, files, output).replace("max_chunks: 6", "max_chunks: 6\n  gallery: 4")
    path.write_text(text, encoding="utf-8")
    done = command("run", "-c", path, "--json")
    assert done.code == 0, done.err
    assert list(done.json["stages"]) == ["calibrate", "generate", "distill", "eval", "report"]
    assert done.json["stages"]["report"]["missing"] == []
    costs = json.loads((output / "costs.json").read_text())
    assert list(costs) == ["calibrate", "generate", "distill", "eval"]
    assert all(0 < cost["seconds"] < 300 for cost in costs.values())
    first, second = json.loads((output / "eval" / "result.json").read_text())["rows"]
    assert "gallery" not in first, "its answers stand beside those of the packed model"
    gallery = second["gallery"]
    assert (gallery["state"], gallery["teacher_state"]) == ("packed", "full_precision")
    assert len(gallery["entries"]) == 8
    assert all(entry["answer"]["num_tokens"] <= 4 for entry in gallery["entries"])
    assert f"{gallery['num_collapsed']} of 8 greedy answers collapsed" in done.err
    html = (output / "report.html").read_text(encoding="utf-8")
    assert f"{costs['distill']['seconds']:.1f} s" in html
    again = command("run", "-c", path, "--json")
    assert again.json == done.json
    assert "reported before" in again.err
    assert (output / "report.html").read_text(encoding="utf-8") == html
    assert json.loads((output / "costs.json").read_text()) == costs
    dry = command("run", "-c", path, "--dry-run")
    assert f"to do     {output / 'report.html'}" in dry.out
    alone = command("report", "-c", path, "--json")
    assert alone.json == done.json["stages"]["report"]


def test_a_stage_that_is_cut_off_adds_up(tmp_path: Path) -> None:
    from bitdistiller_peft.cli.cost import recorded

    (tmp_path / "costs.json").write_text('{"eval": {"seconds": 2.0, "peak_memory_bytes": 1}}')
    with pytest.raises(KeyboardInterrupt), recorded(tmp_path, "eval"):
        raise KeyboardInterrupt
    with recorded(tmp_path, "distill"):
        pass
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert 2.0 <= costs["eval"]["seconds"] < 3.0
    assert set(costs) == {"eval", "distill"}
    (tmp_path / "costs.json").write_text("damaged")
    with recorded(tmp_path, "eval"):
        pass
    assert list(json.loads((tmp_path / "costs.json").read_text())) == ["eval"]
