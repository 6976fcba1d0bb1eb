"""One cell: its training images, its scores, and its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsca_pipeline.comparison import cell as cell_module
from fedsca_pipeline.comparison.cell import CellInputs, run_cell, traffic, training_rows, unseen_halves
from fedsca_pipeline.data.arrays import SiteArrays
from fedsca_pipeline.errors import DataError, FedscaError
from fedsca_pipeline.evaluation.scoring import score_batches
from fedsca_pipeline.federation.fleets.data import POOLED
from fedsca_pipeline.federation.fleets.in_process import InProcessFleet
from fedsca_pipeline.federation.server.records import RoundRecord, SiteRecord
from fedsca_pipeline.federation.site.batches import plain_batches
from fedsca_pipeline.federation.site.store import SiteStore, Snapshot
from fedsca_pipeline.federation.site.worker import LocalWorker


class TestTrainingRows:
    def test_a_larger_draw_contains_a_smaller_one_and_has_training_images_only(self, arrays) -> None:
        drawn = {count: training_rows(arrays["a"], "a", 0, count) for count in (1, 2, 4, 6, 99, None)}

        assert [len(rows) for rows in drawn.values()] == [1, 2, 4, 6, 6, 6]
        assert set(drawn[1]) < set(drawn[2]) < set(drawn[4]) < set(drawn[6])
        assert drawn[6] == drawn[99] == drawn[None] == arrays["a"].rows("train").tolist()

    def test_seeds_and_sites_draw_different_images(self, arrays) -> None:
        of_seeds = {tuple(training_rows(arrays["a"], "a", seed, 3)) for seed in range(8)}
        of_sites = {tuple(training_rows(arrays["a"], site, 0, 3)) for site in "abcdefgh"}

        assert len(of_seeds) > 1
        assert len(of_sites) > 1

    def test_all_methods_of_a_seed_train_on_the_same_images(self, make_setting, grid, inputs, trained_on) -> None:
        methods = {"fedsca": {}, "local": {}, "ditto": {}, "centralised": {}}
        setting = make_setting(methods, strategies={"centralised": {"allow_pooling": True}}, train_images=[3])

        for cell in grid(setting):
            run_cell(cell, inputs, ignore_round)

        apart = [found for found in trained_on if POOLED not in found]
        assert len(apart) == 3
        assert apart[0] == apart[1] == apart[2]
        assert apart[0] == {site: training_rows(inputs.arrays[site], site, 0, 3) for site in "abc"}
        (pooled,) = (found[POOLED] for found in trained_on if POOLED in found)
        assert pooled == [10 * index + row for index, site in enumerate("abc") for row in apart[0][site]]


class TestUnseenHalves:
    def test_the_test_half_does_not_depend_on_the_seed_and_is_never_drawn_from(self, arrays) -> None:
        halves = [unseen_halves(arrays["a"], "a", seed) for seed in range(4)]

        assert {tuple(test) for test, _ in halves} == {tuple(halves[0][0])}
        for test, drawn in halves:
            assert len(test) == 5
            assert sorted([*test, *drawn]) == list(range(10))
        assert len({tuple(drawn) for _, drawn in halves}) > 1

    def test_with_an_odd_number_of_images_the_drawing_half_is_larger(self, make_site) -> None:
        test, drawn = unseen_halves(SiteArrays(*make_site("odd", training=3)), "odd", 0)

        assert (len(test), len(drawn)) == (3, 4)

    def test_slices_of_a_volume_are_in_one_half(self, make_site) -> None:
        path, manifest = make_site("sliced", training=12)
        volumes = [f"images/v{row // 4}.nii.gz" for row in range(16)]
        arrays = SiteArrays(path, manifest)
        arrays._images_of_rows = volumes

        test, drawn = unseen_halves(arrays, "sliced", 0)

        assert sorted([*test, *drawn]) == list(range(16))
        assert len(test) == 8
        assert {volumes[row] for row in test}.isdisjoint(volumes[row] for row in drawn)


def record(round_: int, dice: Mapping[str, float | None], *, final: bool = False, up: int = 10, down: int = 5) -> Any:
    sites = {site: SiteRecord(bytes_up=up, bytes_down=down, dice_validation=value) for site, value in dice.items()}
    return RoundRecord(round=round_, final=final, sites=sites)


class TestTraffic:
    def test_means_are_per_site_and_training_round(self) -> None:
        records = [
            record(1, {"a": 0.0, "b": 0.0}, up=10, down=1),
            record(2, {"a": 0.1, "b": 0.1}, up=20, down=3),
            record(3, {"a": 0.1, "b": 0.1}, final=True, up=1000, down=1000),
        ]

        assert traffic(records, 2) | {"bytes_to_95": 0} == {"bytes_up": 15.0, "bytes_down": 2.0, "bytes_to_95": 0}

    @pytest.mark.parametrize(
        ("after", "rounds"),
        [
            # Mean validation Dice after rounds 1, 2, 3, 4, and the first of at least 95 % of the best.
            ([0.2, 0.94, 0.951, 1.0], 3),
            ([0.95, 0.2, 0.3, 1.0], 1),
            ([0.5, 0.6, 0.9, 0.2], 3),
            ([0.0, 0.0, 0.0, 0.0], 1),
        ],
    )
    def test_all_bytes_count_until_the_first_round_that_reaches_95_percent(
        self, after: list[float], rounds: int
    ) -> None:
        # The foundation's Dice comes before any byte and does not count.
        known = [1.0, *after]
        records = [
            record(number, {"a": dice - 0.1, "b": dice + 0.1}, final=number == 5, up=10 * number, down=number)
            for number, dice in enumerate(known, start=1)
        ]

        assert traffic(records, 2)["bytes_to_95"] == sum(2 * 11 * number for number in range(1, rounds + 1))

    def test_rounds_without_validation_reach_nothing_but_their_bytes_count(self) -> None:
        dice = [0.1, None, 0.8, None, 0.9]
        records = [record(number, {"a": value}, final=number == 5) for number, value in enumerate(dice, start=1)]

        assert traffic(records, 1)["bytes_to_95"] == 4 * 15
        assert traffic([record(1, {"a": None}), record(2, {"a": None}, final=True)], 1)["bytes_to_95"] is None


def ignore_round(done: int, rounds: int) -> None:
    """Do nothing after a round."""


@pytest.fixture
def inputs(arrays, tmp_path: Path) -> CellInputs:
    return CellInputs(arrays, Path("unused"), tmp_path / "scratch", "now")


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, list[int]]]:
    """The training rows of each cell's fleet, by site, as cells run."""
    seen: list[dict[str, list[int]]] = []
    made = InProcessFleet.__init__

    def spy(fleet: InProcessFleet, worker: LocalWorker, data: Mapping[str, Any], *rest: Any, **more: Any) -> None:
        seen.append({site: part.rows("train").tolist() for site, part in data.items()})
        made(fleet, worker, data, *rest, **more)

    monkeypatch.setattr(InProcessFleet, "__init__", spy)
    return seen


@pytest.fixture
def chosen_models(monkeypatch: pytest.MonkeyPatch) -> dict[str, Snapshot]:
    """The chosen models that a cell scores, by folder: a finished cell removes their files."""
    seen: dict[str, Snapshot] = {}
    read = SiteStore.snapshot

    def spy(store: SiteStore, name: str) -> Snapshot | None:
        found = read(store, name)
        if found is not None:
            tensors = {name: tensor.clone() for name, tensor in found.tensors.items()}
            seen[store.folder.name] = Snapshot(found.round, found.dice, tensors)
        return found

    monkeypatch.setattr(SiteStore, "snapshot", spy)
    return seen


@pytest.fixture
def run_method(make_setting, grid, inputs) -> Callable[..., dict[str, Any]]:
    """Run the only cell of one method and return its result; keywords are keys of ``comparison``."""

    def run(method: str, own: Mapping[str, Any] | None = None, **comparison: Any) -> dict[str, Any]:
        setting = make_setting(
            {method: own or {}}, reference=method, strategies={"centralised": {"allow_pooling": True}}, **comparison
        )
        return run_cell(grid(setting)[0], inputs, ignore_round)

    return run


def numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers that must be equal bit for bit. Messages hold their seconds, so that their sizes vary."""
    rounds = [{key: value for key, value in record.items() if key != "bytes"} for record in result["rounds"]]
    rest = {key: value for key, value in result.items() if key not in ("seconds", "peak_memory", "traffic")}
    return {**rest, "rounds": rounds}


class TestRunCell:
    def test_a_cell_scores_every_site_s_test_images_and_leaves_no_scratch_file(
        self, make_setting, grid, inputs
    ) -> None:
        (cell,) = grid(make_setting({"fedsca": {}}))
        reported: list[tuple[int, int]] = []

        result = run_cell(cell, inputs, lambda done, rounds: reported.append((done, rounds)))

        assert result["description"] == cell.description
        assert (result["fingerprint"], result["code"], result["method"]) == (cell.fingerprint, "now", "fedsca")
        assert [(site, found["images"]) for site, found in result["sites"].items()] == [
            (site, ["008", "009"]) for site in "abc"
        ]
        assert [record["round"] for record in result["rounds"]] == [1, 2, 3]
        assert reported == [(1, 2), (2, 2), (2, 2)]
        assert np.shape(result["rounds"][0]["weights"]) == (3, 3)
        assert list(inputs.scratch.iterdir()) == []

    def test_the_same_cell_gives_the_same_numbers(self, run_method) -> None:
        assert numbers(run_method("fedsca", unseen_sites=["c"], shots=[1])) == numbers(
            run_method("fedsca", unseen_sites=["c"], shots=[1])
        )

    def test_a_stopped_cell_resumes_and_ends_with_the_same_numbers(self, make_setting, grid, inputs) -> None:
        (cell,) = grid(make_setting({"fedsca": {}}, base={"federation": {"rounds": 3}}, unseen_sites=["c"], shots=[1]))
        unbroken = run_cell(cell, inputs, ignore_round)
        trained: list[int] = []

        def stop(done: int, rounds: int) -> None:
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_cell(cell, inputs, stop)
        assert not list(inputs.scratch.rglob("*.partial"))
        worked = LocalWorker.work

        def count(worker: LocalWorker, payload: bytes, round_: int, *rest: Any) -> bytes:
            trained.append(round_)
            return worked(worker, payload, round_, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalWorker, "work", count)
            resumed = run_cell(cell, inputs, ignore_round)

        assert sorted(set(trained)) == [3, 4]
        assert numbers(resumed) == numbers(unbroken)
        assert resumed["traffic"] == pytest.approx(unbroken["traffic"], rel=0.02)

    def test_a_cell_does_not_resume_from_another_code_version(self, make_setting, grid, inputs) -> None:
        (cell,) = grid(make_setting({"local": {}}, reference="local"))

        def stop(done: int, rounds: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_cell(cell, inputs, stop)
        reported: list[int] = []
        new = CellInputs(inputs.arrays, inputs.foundations, inputs.scratch, "new")
        trained = []
        worked = LocalWorker.work
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalWorker, "work", lambda w, p, r, *rest: trained.append(r) or worked(w, p, r, *rest))
            result = run_cell(cell, new, lambda done, rounds: reported.append(done))

        assert sorted(set(trained)) == [1, 2, 3]
        assert result["code"] == "new"
        assert list(inputs.scratch.iterdir()) == []

    def test_a_site_without_test_images_is_named_before_anything_is_trained(
        self, make_setting, make_site, grid, inputs
    ) -> None:
        empty = SiteArrays(*make_site("b", splits=["train"] * 4 + ["validation"] * 2))
        (cell,) = grid(make_setting({"fedsca": {}}))

        with pytest.raises(DataError, match=r"^b: no test image; raise preprocessing\.split\.test"):
            run_cell(
                cell, CellInputs({**inputs.arrays, "b": empty}, inputs.foundations, inputs.scratch, "now"), ignore_round
            )
        assert not inputs.scratch.exists()

    def test_a_cell_whose_sites_all_fail_raises_with_the_reason(self, run_method) -> None:
        failing = {"set": {"federation.inject_failures": {site: [2] for site in "abc"}}}

        with pytest.raises(FedscaError, match=r"round 2: 0 valid replies.*injected"):
            run_method("fedsca", failing)

    def test_a_site_that_misses_one_round_is_still_scored(self, run_method) -> None:
        result = run_method("fedsca", {"set": {"federation.inject_failures": {"b": [1]}}})

        assert sorted(result["sites"]) == ["a", "b", "c"]
        assert result["rounds"][0]["accepted"] == ["a", "c"]
        assert np.shape(result["rounds"][0]["weights"]) == (2, 2)

    def test_a_seed_and_a_number_of_images_change_the_numbers(self, run_method) -> None:
        rounds = [run_method("local", **change)["rounds"] for change in ({}, {"seeds": [1]}, {"train_images": [2]})]

        assert rounds[0] != rounds[1]
        assert rounds[0] != rounds[2]


class TestCentralised:
    def test_pooled_training_takes_as_many_steps_as_all_sites_together(
        self, run_method, trained_on, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[int] = []
        run_phase = LocalWorker._run_phase

        def count(worker: LocalWorker, phase: Any, stream: Any, *rest: Any) -> None:
            def counted() -> Any:
                for batch in stream:
                    steps.append(len(batch.masks))
                    yield batch

            run_phase(worker, phase, counted(), *rest)

        monkeypatch.setattr(LocalWorker, "_run_phase", count)
        run_method("fedavg")
        apart, steps[:] = list(steps), []
        result = run_method("centralised")

        assert len(apart) == len(steps) == 2 * 2 * 3
        assert [list(found) for found in trained_on] == [["a", "b", "c"], [POOLED]]
        assert len(trained_on[1][POOLED]) == 18
        assert sorted(result["sites"]) == ["a", "b", "c"]
        assert {len(found["images"]) for found in result["sites"].values()} == {2}
        assert len({found["dice_validation"] for found in result["sites"].values()}) == 1

    def test_pooled_training_meets_any_quorum_of_sites(self, run_method) -> None:
        result = run_method("centralised", base={"federation": {"quorum": 3}})

        assert [record["round"] for record in result["rounds"]] == [1, 2, 3]

    def test_an_unseen_site_is_tested_with_the_pooled_model_as_it_is(self, run_method) -> None:
        result = run_method("centralised", unseen_sites=["c"], shots=[1])

        assert list(result["unseen"]["c"]) == ["as it is", "1 image"]


class TestDitto:
    def test_ditto_is_scored_by_the_personal_model(
        self, make_setting, grid, inputs, chosen_models, monkeypatch
    ) -> None:
        (cell,) = grid(make_setting({"ditto": {}}, reference="ditto"))
        personal: dict[tuple[str, int], Mapping[str, torch.Tensor]] = {}
        save = SiteStore.save_state
        monkeypatch.setattr(
            SiteStore,
            "save_state",
            lambda store, state, answered: (
                personal.update({(store.folder.name, state.round): state.personal}) or save(store, state, answered)
            ),
        )

        result = run_cell(cell, inputs, ignore_round)

        for site, found in result["sites"].items():
            model = chosen_models[site].tensors
            own = personal[site, found["round"]]
            assert own.keys() == model.keys()
            assert all(own[name].equal(model[name]) for name in model)
        assert any(
            not chosen_models["a"].tensors[name].equal(chosen_models["b"].tensors[name])
            for name in chosen_models["a"].tensors
        )


class TestUnseen:
    def test_more_shots_than_two_fifths_of_the_images_are_left_out(self, run_method) -> None:
        result = run_method("fedsca", unseen_sites=["c"], shots=[1, 4, 5, 16])

        assert list(result["unseen"]["c"]) == ["1 image", "4 images"]

    def test_only_strategies_that_share_the_decoder_have_a_model_as_it_is(self, run_method) -> None:
        assert "as it is" in run_method("fedavg", unseen_sites=["c"], shots=[1])["unseen"]["c"]
        assert "as it is" not in run_method("local", unseen_sites=["c"], shots=[1])["unseen"]["c"]

    def test_every_column_has_the_same_test_images(self, run_method, arrays) -> None:
        result = run_method("fedavg", unseen_sites=["c"], shots=[1, 2], release_private=True)["unseen"]["c"]

        test, _ = unseen_halves(arrays["c"], "c", 0)
        assert list(result) == ["as it is", "ensemble", "1 image", "2 images"]
        assert {tuple(found["images"]) for found in result.values()} == {tuple(f"{row:03d}" for row in test)}

    @pytest.mark.parametrize(("method", "everything"), [("fedsca", False), ("fedavg", True), ("local", True)])
    def test_tuning_trains_the_private_tensors_on_the_first_images_drawn(
        self, run_method, arrays, monkeypatch: pytest.MonkeyPatch, method: str, everything: bool
    ) -> None:
        tuned: list[tuple[list[int], set[str], int]] = []
        general: list[Mapping[str, torch.Tensor]] = []
        tune = LocalWorker.tune

        def spy(worker: LocalWorker, data: SiteArrays, tensors: Any, names: Any, steps: int, *, site: str) -> Any:
            tuned.append((data.rows("train").tolist(), set(names), steps))
            general.append(tensors)
            assert (set(names) == set(worker.parameters)) == everything
            assert everything or set(names) == set(worker.parameters) - set(worker.shared)
            found = tune(worker, data, tensors, names, steps, site=site)
            assert {name for name in found if not found[name].equal(tensors[name])} == set(names)
            return found

        monkeypatch.setattr(LocalWorker, "tune", spy)
        run_method(method, unseen_sites=["c"], shots=[1, 2, 4], shot_steps=3)

        _, drawn = unseen_halves(arrays["c"], "c", 0)
        assert [(rows, steps) for rows, _, steps in tuned] == [(sorted(drawn[:count]), 3) for count in (1, 2, 4)]
        assert all(general[0][name].equal(other[name]) for other in general for name in other)

    def test_a_left_out_site_is_tested_and_does_not_train(self, make_setting, grid, inputs, trained_on) -> None:
        setting = make_setting({"local": {}}, reference="local", leave_one_out=True, shots=[1])
        (cell,) = (cell for cell in grid(setting) if cell.left_out == "b")

        result = run_cell(cell, inputs, ignore_round)

        assert result["left_out"] == "b"
        assert sorted(result["sites"]) == ["a", "c"]
        assert list(result["unseen"]) == ["b"]
        assert [sorted(found) for found in trained_on] == [["a", "c"]]

    @pytest.mark.parametrize("head", ["sigmoid", "softmax"])
    def test_an_ensemble_of_identical_models_is_the_single_model(
        self, make_setting, grid, inputs, monkeypatch, head: str
    ) -> None:
        setting = make_setting(
            {"local": {}},
            reference="local",
            unseen_sites=["c"],
            shots=[1],
            release_private=True,
            base={**FAST, "foundation": {"name": "random", "head": head}},
        )
        (cell,) = grid(setting)
        read = SiteStore.snapshot
        monkeypatch.setattr(
            SiteStore, "snapshot", lambda store, name: read(SiteStore(store.folder.parent / "a", store.run), name)
        )
        singles = []
        ensemble = cell_module._Training._ensemble

        def beside(training: Any, arrays: SiteArrays, batches: Any) -> dict[str, Any]:
            training.worker.install(training._chosen("a").tensors)
            singles.append(training._scores(arrays, "test", batches, (1,)))
            return ensemble(training, arrays, batches)

        monkeypatch.setattr(cell_module._Training, "_ensemble", beside)

        found = run_cell(cell, inputs, ignore_round)["unseen"]["c"]["ensemble"]

        assert [found] == singles
        assert any(found["dice"])

    def test_an_ensemble_averages_probabilities(self, make_setting, grid, inputs, monkeypatch) -> None:
        (cell,) = grid(make_setting({"local": {}}, reference="local", unseen_sites=["c"], shots=[1],
                                    release_private=True, base=FAST))  # fmt: skip
        expected = []
        ensemble = cell_module._Training._ensemble

        def by_hand(training: Any, arrays: SiteArrays, batches: Any) -> dict[str, Any]:
            model, forward = training.worker.model, training.forward
            parts = []
            for site in cell.sites:
                training.worker.install(training._chosen(site).tensors)
                with torch.inference_mode():
                    parts.append([torch.sigmoid(forward(batch)) for batch in batches])
            means = iter([torch.logit(sum(part) / len(part)) for part in zip(*parts, strict=True)])
            expected.extend(round(score["dice"], 5) for score in
                            score_batches(model, lambda _: next(means), batches, 1, 0.5))  # fmt: skip
            return ensemble(training, arrays, batches)

        monkeypatch.setattr(cell_module._Training, "_ensemble", by_hand)

        assert run_cell(cell, inputs, ignore_round)["unseen"]["c"]["ensemble"]["dice"] == expected


# With this rate a few steps of a random foundation change its masks.
FAST = {"training": {"steps_per_round": 20, "learning_rate": 0.03}, "federation": {"rounds": 2}}


def test_each_site_is_scored_by_its_chosen_model(make_setting, grid, inputs, chosen_models) -> None:
    (cell,) = grid(make_setting({"local": {}}, reference="local", base=FAST))
    training: list[Any] = []
    at_site = cell_module._Training.at_site

    def hold(found: Any, site: str) -> dict[str, Any]:
        training.append(found)
        return at_site(found, site)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cell_module._Training, "at_site", hold)
        result = run_cell(cell, inputs, ignore_round)

    for site, found in result["sites"].items():
        worker = training[0].worker
        worker.install(chosen_models[site].tensors)
        batches = plain_batches(inputs.arrays[site], "test", 8)
        scores = score_batches(worker.model, training[0].forward, batches, 1, 0.5)
        assert found["dice"] == [round(score["dice"], 5) for score in scores]
        assert found["dice_validation"] == chosen_models[site].dice


class TestSeveralClasses:
    @pytest.fixture
    def inputs(self, make_site, tmp_path: Path) -> CellInputs:
        labels = {"a": (1, 2, 3), "b": (1, 3), "c": (2, 3)}
        arrays = {site: SiteArrays(*make_site(site, seed, labels=labels[site])) for seed, site in enumerate(labels)}
        return CellInputs(arrays, tmp_path / "foundations", tmp_path / "scratch", "now")

    @pytest.mark.parametrize("head", ["sigmoid", "softmax"])
    @pytest.mark.parametrize("method", ["local", "fedavg"])
    def test_every_score_is_the_mean_over_the_site_s_classes(
        self, make_setting, grid, inputs, head: str, method: str
    ) -> None:
        base = {**FAST, "preprocessing": {"classes": 3}, "foundation": {"head": head}}
        (cell,) = grid(make_setting({method: {}}, reference=method, base=base, unseen_sites=["c"], shots=[1],
                                    release_private=True))  # fmt: skip

        result = run_cell(cell, inputs, ignore_round)

        scores = {"a": result["sites"]["a"], "b": result["sites"]["b"]}
        expected = {"a": {"1", "2", "3"}, "b": {"1", "3"}}
        for received, found in result["unseen"]["c"].items():
            scores[received], expected[received] = found, {"2", "3"}
        assert ("as it is" in scores) == (method == "fedavg")
        assert {"ensemble", "1 image"} < set(scores)
        for name, found in scores.items():
            assert set(found["dice_by_class"]) == expected[name]
            means = np.mean(list(found["dice_by_class"].values()), axis=0)
            assert found["dice"] == pytest.approx(means.tolist(), abs=2e-5)
            assert np.isfinite([*found["dice"], *found["hd95"]]).all()

    def test_an_ensemble_averages_each_class_over_the_models_that_predict_it(
        self, make_setting, grid, inputs, monkeypatch
    ):
        """Every model is most certain of class 2, which site b does not have."""
        base = {"preprocessing": {"classes": 3}}
        (cell,) = grid(make_setting({"local": {}}, reference="local", base=base, unseen_sites=["c"], shots=[1],
                                    release_private=True))  # fmt: skip

        def sure_of_class_2(model: Any, forward: Any, batches: Any) -> Any:
            for batch in batches:
                logits = torch.full((len(batch.masks), 3, *batch.masks.shape[1:]), -9.0)
                logits[:, 1] = torch.where(batch.masks == 2, 1.0, -9.0)
                yield batch, logits

        monkeypatch.setattr(cell_module, "predict_logits", sure_of_class_2)

        found = run_cell(cell, inputs, ignore_round)["unseen"]["c"]["ensemble"]

        assert found["dice_by_class"]["2"] == [1.0] * len(found["images"])
