from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsca_pipeline.config import FederationConfig, Settings
from fedsca_pipeline.errors import ResumeError
from fedsca_pipeline.federation import run as runs
from fedsca_pipeline.federation.run import (
    changes,
    code_version,
    configuration_of,
    describe_run,
    differences,
    finish_run,
    open_run,
    refuse_another_run,
    resolve_threads,
    shorter_run,
)
from fedsca_pipeline.files import read_json, unsealed

VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda values: st.dictionaries(st.sampled_from("abcd"), values, max_size=3),
    max_leaves=8,
)
MAPPINGS = st.dictionaries(st.sampled_from("abcd"), VALUES, max_size=3)


def described(rounds: int = 4, data: str = "d0", threads: int = 1) -> dict[str, Any]:
    configuration = {"federation": {"rounds": rounds}, "run": {"seed": 0}}
    return describe_run(configuration, {"site_a": data, "site_b": "d1"}, "f" * 64, threads)


def settled(rounds: int, values: dict[str, Any] | None = None) -> dict[str, Any]:
    groups = dict(values or {})
    groups["federation"] = {"rounds": rounds, **groups.get("federation", {})}
    return describe_run(configuration_of(Settings(**groups)), {"a": "d0"}, "f" * 64, 1)


def leave_a_checkpoint(checkpoints: Path, description: dict[str, Any]) -> Path:
    path = open_run(checkpoints, description, force=False).server / "round_00001.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    return path


class TestDifferences:
    def test_they_are_named_like_yaml_keys(self) -> None:
        old = {"federation": {"rounds": 8, "strategy": "fedsca"}, "threads": 1}
        new = {"federation": {"rounds": 10, "strategy": "fedsca"}, "threads": 1}

        assert differences(old, new) == ["federation.rounds: 8 -> 10"]

    def test_what_is_new_or_gone_is_none_on_the_other_side(self) -> None:
        assert differences({"a": 1}, {"b": 2}) == ["a: 1 -> None", "b: None -> 2"]

    @given(value=MAPPINGS)
    def test_a_mapping_does_not_differ_from_itself(self, value: dict[str, Any]) -> None:
        assert differences(value, value) == []

    @given(old=MAPPINGS, new=MAPPINGS)
    def test_there_are_as_many_both_ways(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        assert len(differences(old, new)) == len(differences(new, old))


class TestDescription:
    def test_the_same_run_has_the_same_fingerprint(self) -> None:
        assert described() == described()

    @pytest.mark.parametrize("change", [{"rounds": 5}, {"data": "d9"}, {"threads": 2}])
    def test_everything_that_decides_the_numbers_enters_the_fingerprint(self, change: dict[str, Any]) -> None:
        assert described(**change)["fingerprint"] != described()["fingerprint"]

    @pytest.mark.parametrize("change", [{"max_share": 0.4}, {"clip_to_median": True}, {"max_norm_ratio": 5.0}], ids=str)
    def test_the_limits_on_a_site_enter_the_fingerprint(self, change: dict[str, Any]) -> None:
        ((key, value),) = change.items()
        one, other = settled(4), settled(4, {"federation": change})

        assert one["fingerprint"] != other["fingerprint"]
        assert changes(one, other) == [f"federation.{key}: {FederationConfig().model_dump()[key]} -> {value}"]

    def test_changed_code_is_another_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = described()
        monkeypatch.setattr(runs, "version", lambda library: "0.0.1")

        assert described()["fingerprint"] != before["fingerprint"]
        assert described()["code"] != before["code"]

    def test_the_code_version_does_not_change_by_itself(self) -> None:
        assert code_version() == code_version()
        assert len(code_version()) == 16

    @pytest.mark.parametrize(
        ("file", "counts"),
        [
            ("config.py", True),
            ("compute.py", True),
            ("data/arrays.py", True),
            ("federation/strategies/sgca.py", True),
            ("federation/server/rounds.py", True),
            ("metrics/images.py", True),
            ("model/adapters/fel.py", True),
            ("evaluation/scoring.py", True),
            ("evaluation/volume_scoring.py", True),
            ("evaluation/figures.py", False),
            ("comparison/page.py", False),
            ("comparison/cell.py", False),
            ("data_report/page.py", False),
            ("hooks/checks.py", False),
            ("tracking/run.py", False),
            ("pipelines/federated_training/nodes.py", False),
            ("flower/site/command.py", False),
            ("cli.py", False),
            ("terminal.py", False),
            ("errors.py", False),
        ],
    )
    def test_the_code_version_covers_the_code_that_decides_numbers_and_no_other(
        self, tmp_path: Path, file: str, counts: bool
    ) -> None:
        package = tmp_path / "package"
        shutil.copytree(Path(runs.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
        before = code_version(root=package)
        with (package / file).open("a") as source:
            source.write("# changed\n")

        assert (code_version(root=package) != before) is counts

    def test_a_cell_s_code_version_covers_the_cell_too(self, tmp_path: Path) -> None:
        package = tmp_path / "package"
        shutil.copytree(Path(runs.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
        before = code_version("comparison/cell.py", root=package)
        (package / "comparison" / "cell.py").write_text("")

        assert code_version("comparison/cell.py", root=package) != before

    def test_configured_threads_win(self) -> None:
        assert resolve_threads(3) == 3
        assert resolve_threads(None) >= 1


class TestShorterRun:
    def finished(self, checkpoints: Path, **federation: Any) -> dict[str, Any]:
        description = settled(rounds=8, **federation)
        open_run(checkpoints, description, force=False)
        finish_run(checkpoints)
        return description

    def test_a_finished_run_is_prolonged_by_more_rounds(self, tmp_path: Path) -> None:
        shorter = self.finished(tmp_path)

        folder, rounds = shorter_run(tmp_path, settled(rounds=12))

        assert (folder.fingerprint, rounds) == (shorter["fingerprint"], 8)
        assert shorter_run(tmp_path, settled(rounds=6)) is None
        assert shorter_run(tmp_path, settled(rounds=8)) is None

    @pytest.mark.parametrize(
        "values",
        [
            {"federation": {"wire_dtype": "int8"}},
            {"run": {"seed": 1}},
            {"evaluation": {"every": 3}},
        ],
    )
    def test_a_run_of_which_more_has_changed_is_not_prolonged(self, tmp_path: Path, values: dict[str, Any]) -> None:
        self.finished(tmp_path)

        assert shorter_run(tmp_path, settled(rounds=12, values=values)) is None

    @pytest.mark.parametrize(
        "values",
        [
            {"federation": {"participation": 0.5}},
            {"federation": {"inject_failures": {"a": [9]}}},
            {"evaluation": {"every": 3}},
            {"training": {"privacy": {"epsilon": 3.0}}},
        ],
    )
    def test_a_run_that_would_not_end_in_the_same_bits_is_not_prolonged(
        self, tmp_path: Path, values: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        self.finished(tmp_path, values=values)

        assert shorter_run(tmp_path, settled(rounds=12, values=values)) is None
        assert "8 rounds are done but cannot be prolonged" in caplog.text

    def test_an_unfinished_run_and_none_are_not_prolonged(self, tmp_path: Path) -> None:
        assert shorter_run(tmp_path, settled(rounds=12)) is None
        open_run(tmp_path, settled(rounds=8), force=False)
        assert shorter_run(tmp_path, settled(rounds=12)) is None


class TestOpenRun:
    def test_a_first_run_is_marked_as_unfinished_until_it_is_finished(self, tmp_path: Path) -> None:
        folder = open_run(tmp_path, described(), force=False)

        assert folder.fingerprint == described()["fingerprint"]
        assert unsealed(read_json(tmp_path / "current.json")) == {"finished": False, "description": described()}

        finish_run(tmp_path)

        assert unsealed(read_json(tmp_path / "current.json")) == {"finished": True, "description": described()}

    def test_the_same_run_goes_on_with_its_checkpoints(self, tmp_path: Path) -> None:
        checkpoint = leave_a_checkpoint(tmp_path, described())

        folder = open_run(tmp_path, described(), force=False)

        assert list(folder.server.iterdir()) == [checkpoint]

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"rounds": 5}, "federation.rounds: 4 -> 5"),
            ({"data": "d9"}, "data.site_a: d0 -> d9"),
            ({"threads": 2}, "threads: 1 -> 2"),
        ],
    )
    def test_an_unfinished_run_is_not_continued_as_another(
        self, tmp_path: Path, change: dict[str, Any], said: str
    ) -> None:
        checkpoint = leave_a_checkpoint(tmp_path, described())

        with pytest.raises(ResumeError, match=said):
            open_run(tmp_path, described(**change), force=False)

        assert checkpoint.exists()
        assert read_json(tmp_path / "current.json")["description"] == described()

    def test_after_a_finished_run_another_may_start_beside_it(self, tmp_path: Path) -> None:
        checkpoint = leave_a_checkpoint(tmp_path, described())
        finish_run(tmp_path)

        folder = open_run(tmp_path, described(rounds=5), force=False)

        assert checkpoint.exists()
        assert not folder.server.exists()

    def test_force_starts_the_same_run_anew(self, tmp_path: Path) -> None:
        checkpoint = leave_a_checkpoint(tmp_path, described())

        folder = open_run(tmp_path, described(), force=True)

        assert not checkpoint.exists()
        assert not folder.server.exists()

    def test_force_starts_another_run_and_lets_the_unfinished_one_lie(self, tmp_path: Path) -> None:
        checkpoint = leave_a_checkpoint(tmp_path, described())

        open_run(tmp_path, described(rounds=5), force=True)

        assert checkpoint.exists()
        assert read_json(tmp_path / "current.json")["description"] == described(rounds=5)

    def test_what_a_killed_command_left_half_written_is_cleared_away(self, tmp_path: Path) -> None:
        checkpoint = leave_a_checkpoint(tmp_path, described())
        left = checkpoint.with_name(".round_00002.safetensors.x1y2.partial")
        left.write_bytes(b"half")

        open_run(tmp_path, described(), force=False)

        assert not left.exists()
        assert checkpoint.exists()

    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"finished": false}', None])
    def test_a_damaged_description_is_one_line_with_a_cure_that_keeps_the_checkpoints(
        self, tmp_path: Path, content: str | None
    ) -> None:
        checkpoint, marker = leave_a_checkpoint(tmp_path, described()), tmp_path / "current.json"
        marker.write_text(marker.read_text().replace("site_a", "site_x") if content is None else content)

        cure = r"current\.json: damaged .*; delete it\. The checkpoints stay"
        for command in (lambda: open_run(tmp_path, described(), force=False), lambda: finish_run(tmp_path)):
            with pytest.raises(ResumeError, match=cure) as caught:
                command()
            assert "\n" not in str(caught.value)

        marker.unlink()
        assert list(open_run(tmp_path, described(), force=False).server.iterdir()) == [checkpoint]

    @pytest.mark.parametrize("content", ["", '"0a', "{}", '"../secret"'])
    def test_a_damaged_start_of_a_deployed_run_is_named_with_the_cure(self, tmp_path: Path, content: str) -> None:
        folder = open_run(tmp_path, described(), force=False)
        begun = folder.begun()
        assert folder.begun() == begun
        (tmp_path / folder.fingerprint / "begun.json").write_text(content)

        with pytest.raises(ResumeError, match=r"begun\.json: damaged; restore it"):
            folder.begun()

    def test_asking_alone_writes_nothing(self, tmp_path: Path) -> None:
        refuse_another_run(tmp_path, described())

        assert list(tmp_path.iterdir()) == []
