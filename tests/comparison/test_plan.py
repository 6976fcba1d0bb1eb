"""The plan of a comparison: its cells, their fingerprints, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from fedsca_pipeline.comparison.plan import cells, choose_rates, resolve_methods, tuning_cells, unique
from fedsca_pipeline.config import ComparisonConfig
from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.federation.strategies import STRATEGIES


@pytest.fixture
def prints(grid) -> Callable[..., dict[tuple[Any, ...], str]]:
    """Return the cells' fingerprints by method, seed, number of images and left-out site."""
    return lambda setting: {
        (cell.method, cell.seed, cell.train_images, cell.left_out): cell.fingerprint for cell in grid(setting)
    }


LORA = {"adapters.method": "lora"}
LORA_STRATEGIES = ("fedsa_lora", "ffa_lora", "flap_sam")


class TestMethods:
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_each_strategy_needs_one_entry_only(self, make_setting, grid, strategy: str) -> None:
        setting = make_setting(
            {strategy: {"set": LORA} if strategy in LORA_STRATEGIES else None},
            reference=strategy,
            strategies={"centralised": {"allow_pooling": True}},
        )

        assert [cell.strategy for cell in grid(setting)] == [strategy]

    def test_a_method_without_permission_is_left_out_and_refused_if_only_names_it(self, make_setting) -> None:
        both = {"fedsca": {}, "centralised": {}}

        assert list(resolve_methods(make_setting(both))) == ["fedsca"]
        assert list(resolve_methods(make_setting(both, strategies={"centralised": {"allow_pooling": True}}))) == list(
            both
        )
        with pytest.raises(
            ConfigError, match=r"comparison\.methods\.centralised: strategies\.centralised\.allow_pooling"
        ):
            resolve_methods(make_setting(both, only=["fedsca", "centralised"]))

    @pytest.mark.parametrize(
        ("quorum", "comparison", "said"),
        [
            (4, {}, r"methods\.fedsca: federation\.quorum: 4, but only 3 of 3 sites"),
            (3, {"unseen_sites": ["c"]}, r"federation\.quorum: 3, but only 2 of 2 sites"),
            (3, {"leave_one_out": True}, r"federation\.quorum: 3, but only 2 of 2 sites.*comparison\.leave_one_out"),
            (1, {"methods": {"fedsca": {"set": {"federation.quorum": 4}}}}, r"federation\.quorum: 4, but only 3 of 3"),
        ],
    )
    def test_a_quorum_that_some_cell_cannot_reach_is_refused(self, make_setting, quorum, comparison, said):
        with pytest.raises(ConfigError, match=said):
            resolve_methods(make_setting(base={"federation": {"quorum": quorum}}, **comparison))

    def test_a_quorum_that_every_cell_can_reach_is_accepted(self, make_setting) -> None:
        methods = {"fedsca": {"set": {"federation.quorum": 2}}, "centralised": {}}
        methods["hard"] = {"strategy": "fedsca", "options": {"gate": "hard"}, "ablation": "gate"}
        setting = make_setting(
            methods,
            base={"federation": {"quorum": 3}},
            strategies={"centralised": {"allow_pooling": True}},
            leave_one_out=True,
        )

        assert list(resolve_methods(setting)) == list(methods)

    def test_the_options_of_an_entry_override_those_of_its_strategy(self, make_setting) -> None:
        setting = make_setting(
            {
                "fedprox": {},
                "strong": {"strategy": "fedprox", "options": {"mu": 0.7}, "set": {"training.augment.flip": 0.0}},
            },
            reference="fedprox",
            strategies={"fedprox": {"mu": 0.2, "share_decoder": False}},
        )

        methods = resolve_methods(setting)

        assert [(name, m.options.mu) for name, m in methods.items()] == [("fedprox", 0.2), ("strong", 0.7)]
        assert methods["strong"].options.share_decoder is False
        assert methods["strong"].groups["training"]["augment"]["flip"] == 0.0
        assert methods["fedprox"].groups["training"]["augment"]["flip"] == 0.5
        assert setting.base["training"]["augment"]["flip"] == 0.5

    def test_an_ablation_uses_the_reference_s_rate_and_the_first_number_of_images(self, make_setting, grid) -> None:
        setting = make_setting(
            {"fedsca": {}, "wide": {"strategy": "fedsca", "set": {"adapters.width": 8}, "ablation": "adapter"}},
            train_images=[2, 4],
            learning_rates=[0.01, 0.1],
        )

        found = [(cell.method, cell.train_images, cell.learning_rate) for cell in grid(setting, {"fedsca": 0.1})]

        assert found == [("fedsca", 2, 0.1), ("fedsca", 4, 0.1), ("wide", 2, 0.1)]
        assert {cell.method for cell in tuning_cells(resolve_methods(setting), setting)} == {"fedsca"}

    @pytest.mark.parametrize("own", [{"learning_rates": [0.3]}, {"set": {"training.learning_rate": 0.3}}])
    @pytest.mark.parametrize("ablation", [None, "rate"])
    def test_a_method_s_learning_rate_overrides_the_comparison_s(self, make_setting, grid, own, ablation) -> None:
        setting = make_setting(
            {"fedsca": {}, "fast": {"strategy": "fedsca", "ablation": ablation, **own}}, learning_rates=[0.01, 0.02]
        )

        assert {cell.learning_rate for cell in grid(setting) if cell.method == "fast"} == {0.3}

    def test_a_value_that_is_listed_twice_makes_one_cell(self, make_setting, grid) -> None:
        setting = make_setting(seeds=[1, 1], train_images=[2, 2], learning_rates=[0.1, 0.1])

        assert len(grid(setting)) == 3
        assert len(tuning_cells(resolve_methods(setting), setting)) == 3


class TestRefusals:
    @pytest.mark.parametrize(
        ("method", "said"),
        [
            (
                {"strategy": "fedprx"},
                r"comparison\.methods\.odd\.strategy: 'fedprx' is no strategy; did you mean 'fedprox'\?",
            ),
            ({"strategy": "zzz"}, r"comparison\.methods\.odd\.strategy: 'zzz' is no strategy\. Allowed: fedsca, local"),
            ({}, r"comparison\.methods\.odd\.strategy: 'odd' is no strategy"),
            (
                {"strategy": "fedsca", "options": {"rhoo": 0.4}},
                r"comparison\.methods\.odd: strategies\.fedsca\.rhoo is no option; did you mean 'rho'\?",
            ),
            ({"strategy": "fedsca", "options": {"rho": 7}}, r"comparison\.methods\.odd: strategies\.fedsca\.rho is 7"),
            ({"strategy": "fedsa_lora"}, r"comparison\.methods\.odd: .*fedsa_lora needs adapters\.method lora.*'fel'"),
            (
                {"strategy": "fedsca", "set": {"adapters.widht": 8}},
                r"comparison\.methods\.odd\.set: adapters\.widht: Extra inputs",
            ),
            (
                {"strategy": "fedsca", "set": {"training.augment.flip": 3}},
                r"comparison\.methods\.odd\.set: training\.augment\.flip: .*less than or equal to 1",
            ),
            (
                {"strategy": "fedsca", "set": {"adapters.width.x": 8}},
                r"comparison\.methods\.odd\.set: adapters\.width\.x .*adapters\.width has no keys",
            ),
            (
                {"strategy": "fedsca", "set": {"foundation.name": "sam"}},
                r"comparison\.methods\.odd\.set: foundation\.name cannot be set here; only keys of adapters, training",
            ),
            ({"strategy": "fedsca", "set": {"training": 1}}, r"comparison\.methods\.odd\.set: training cannot be set"),
            (
                {"strategy": "fedsca", "set": {"federation.strategy": "local"}},
                r"comparison\.methods\.odd\.set: federation\.strategy .*use comparison\.methods\.odd\.strategy",
            ),
            (
                {"strategy": "fedsca", "set": {"adapters.seed": 3}},
                r"comparison\.methods\.odd\.set: adapters\.seed .*use comparison\.methods\.odd\.seeds",
            ),
            (
                {"strategy": "fedsca", "train_images": [0]},
                r"comparison\.methods\.odd\.train_images: \[0\]; each number must be at least 1",
            ),
        ],
    )
    def test_an_invalid_method_is_refused_with_its_key(self, make_setting, method: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            resolve_methods(make_setting({"fedsca": {}, "odd": method}))

    def test_a_method_may_set_the_adapter_that_its_strategy_needs(self, make_setting) -> None:
        setting = make_setting({"fedsca": {}, "fedsa_lora": {"set": LORA}})

        assert resolve_methods(setting)["fedsa_lora"].groups["adapters"]["method"] == "lora"

    @pytest.mark.parametrize(
        ("comparison", "said"),
        [
            ({"unseen_sites": ["d"]}, r"comparison\.unseen_sites: no such site: d; there are a, b, c"),
            ({"unseen_sites": ["a", "b", "c"]}, r"comparison\.unseen_sites: no site is left to train"),
            ({"unseen_sites": ["a", "b"], "leave_one_out": True}, r"comparison\.unseen_sites: no site is left"),
        ],
    )
    def test_unknown_sites_and_too_few_sites_are_refused(
        self, make_setting, comparison: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(ConfigError, match=said):
            resolve_methods(make_setting(**comparison))

    def test_one_training_site_is_enough(self, make_setting, grid) -> None:
        assert {cell.sites for cell in grid(make_setting(unseen_sites=["a", "b"]))} == {("c",)}

    @pytest.mark.parametrize(
        ("comparison", "said"),
        [
            ({"seeds": []}, "seeds"),
            ({"seeds": [-1]}, "seeds"),
            ({"train_images": []}, "train_images"),
            ({"train_images": [0]}, "train_images"),
            ({"only": ["fedsac"]}, r"only: 'fedsac' is no method; did you mean 'fedsca'\?"),
            ({"only": ["zzz"]}, r"only: 'zzz' is no method\. Allowed: fedsca, local"),
            ({"only": ["local"]}, "reference: 'fedsca' is not among the methods: local"),
            ({"reference": "fedsac"}, "reference: 'fedsac' is not among the methods: fedsca, local"),
            (
                {"methods": {"fedsca": {}, "wide": {"ablation": "width"}}, "ablated": "fedsac"},
                "ablated: 'fedsac' is not among the methods: fedsca, wide",
            ),
            ({"methods": {"fedsca": {"seeds": []}}}, r"methods\.fedsca\.seeds"),
            ({"methods": {"fedsca": {"sed": [1]}}}, r"methods\.fedsca\.sed"),
            ({"methods": {"fedsca": {"learning_rates": [0.0]}}}, r"methods\.fedsca\.learning_rates"),
            ({"jobs": 0}, "jobs"),
        ],
    )
    def test_an_invalid_comparison_is_refused_with_its_key(self, comparison: dict[str, Any], said: str) -> None:
        with pytest.raises(ValidationError, match=said):
            ComparisonConfig.model_validate({"methods": {"fedsca": {}, "local": {}}, **comparison})


class TestCells:
    def test_each_method_seed_and_number_of_images_has_one_cell_and_first_seeds_come_first(
        self, make_setting, grid
    ) -> None:
        setting = make_setting({"fedsca": {}, "local": {"seeds": [5]}}, seeds=[3, 4], train_images=[2, None])

        found = [(cell.method, cell.seed, cell.train_images) for cell in grid(setting)]

        assert found == [
            ("fedsca", 3, 2), ("fedsca", 3, None), ("local", 5, 2), ("local", 5, None), ("fedsca", 4, 2),
            ("fedsca", 4, None),
        ]  # fmt: skip

    def test_unseen_sites_never_train_and_are_tested_with_the_first_number_of_images(self, make_setting, grid) -> None:
        setting = make_setting({"fedsca": {}}, unseen_sites=["b"], train_images=[2, 4])

        assert [(cell.sites, cell.unseen) for cell in grid(setting)] == [(("a", "c"), ("b",)), (("a", "c"), ())]
        assert all("b" not in cell.description["data"] for cell in grid(setting) if not cell.unseen)

    def test_each_site_is_left_out_once_and_then_unseen(self, make_setting, grid) -> None:
        setting = make_setting({"fedsca": {}}, leave_one_out=True)

        found = {cell.left_out: (cell.sites, cell.unseen) for cell in grid(setting)}

        assert found == {
            None: (("a", "b", "c"), ()),
            "a": (("b", "c"), ("a",)),
            "b": (("a", "c"), ("b",)),
            "c": (("a", "b"), ("c",)),
        }

    def test_an_ablation_leaves_no_site_out(self, make_setting, grid) -> None:
        setting = make_setting(
            {"fedsca": {}, "wide": {"strategy": "fedsca", "set": {"adapters.width": 8}, "ablation": "adapter"}},
            leave_one_out=True,
        )

        assert [cell.left_out for cell in grid(setting) if cell.method == "wide"] == [None]

    def test_a_method_without_a_learning_rate_has_no_cell(self, make_setting) -> None:
        setting = make_setting()
        methods = resolve_methods(setting)

        assert choose_rates(methods, []) == {}
        assert {cell.method for cell in cells(methods, setting, {"fedsca": 0.1, "local": 0.1})} == {"fedsca", "local"}
        assert cells(methods, setting, {}) == []

    def test_a_cell_s_name_says_method_seed_images_rate_and_left_out_site(self, make_setting, grid) -> None:
        named = [str(cell) for cell in grid(make_setting({"fedsca": {}}, train_images=[4, None], leave_one_out=True))]

        assert named[0] == "fedsca, seed 0, 4 images, rate 0.01"
        assert named[-1] == "fedsca, seed 0, all images, rate 0.01, without c"


class TestRates:
    def test_each_method_chooses_its_best_rate_on_its_first_seed_and_number_of_images(self, make_setting) -> None:
        setting = make_setting(
            {"fedsca": {}, "local": {"learning_rates": [0.5]}},
            seeds=[7, 8],
            train_images=[4, 2],
            learning_rates=[0.1, 0.2],
        )
        methods = resolve_methods(setting)

        tuning = tuning_cells(methods, setting)
        dice = {("fedsca", 0.1): 0.3, ("fedsca", 0.2): 0.4, ("local", 0.5): 0.1}

        assert {(cell.seed, cell.train_images) for cell in tuning} == {(7, 4)}
        assert choose_rates(methods, [(cell, dice[cell.method, cell.learning_rate]) for cell in tuning]) == {
            "fedsca": 0.2,
            "local": 0.5,
        }

    def test_at_a_tie_the_lower_rate_wins(self, make_setting) -> None:
        setting = make_setting({"fedsca": {}}, learning_rates=[0.2, 0.1])
        methods = resolve_methods(setting)

        assert choose_rates(methods, [(cell, 0.5) for cell in tuning_cells(methods, setting)]) == {"fedsca": 0.1}

    def test_a_method_with_a_failed_rate_chooses_none(self, make_setting) -> None:
        setting = make_setting({"fedsca": {}, "local": {}}, learning_rates=[0.2, 0.1])
        methods = resolve_methods(setting)
        tuned = [(cell, 0.5) for cell in tuning_cells(methods, setting)]

        assert choose_rates(methods, tuned[1:]) == {"local": 0.1}

    def test_a_tuning_cell_with_the_chosen_rate_is_a_cell_of_the_grid(self, make_setting, grid) -> None:
        setting = make_setting({"fedsca": {}}, seeds=[0, 1], unseen_sites=["a"])
        methods = resolve_methods(setting)

        assert [cell.fingerprint for cell in tuning_cells(methods, setting)] == [grid(setting)[0].fingerprint]


class TestFingerprints:
    def test_a_new_method_or_seed_changes_no_cell(self, make_setting, prints) -> None:
        before = prints(make_setting(unseen_sites=["c"]))
        after = prints(
            make_setting(
                {"fedprox": {}, "fedsca": {}, "local": {}, "fedavg": {}}, seeds=[2, 0], unseen_sites=["c"], jobs=3
            )
        )

        assert before.items() <= after.items()
        assert len(after) == 8
        assert len(set(after.values())) == 8

    def test_a_default_in_the_yaml_does_not_change_the_fingerprint(self, make_setting, prints) -> None:
        given = make_setting(
            {"fedsca": {"options": {"rho": 0.5}, "set": {"training.weight_decay": 1e-4, "adapters.scale": 0.5}}},
            base={"federation": {"wire_dtype": "fp16"}, "evaluation": {"every": 1}},
            strategies={"fedsca": {"weighting": "gate"}},
        )

        assert prints(given) == prints(make_setting({"fedsca": {}}))

    def test_a_description_has_no_default_values(self, make_setting, grid) -> None:
        (cell,) = grid(make_setting({"fedsca": {}}))

        configuration = cell.description["configuration"]
        assert configuration["training"] == {"steps_per_round": 2, "learning_rate": 0.01}
        assert configuration["strategies"] == {"fedsca": {}}
        assert configuration["evaluation"] == {}

    def test_rows_with_the_same_parameters_share_a_cell(self, make_setting, grid) -> None:
        setting = make_setting(
            {"fedsca": {}, "local": {}, "blocks_none": {"strategy": "local", "ablation": "blocks"}, "again": {
                "strategy": "fedsca", "options": {"rho": 0.5}}},
        )  # fmt: skip
        by_method = {cell.method: cell.fingerprint for cell in grid(setting)}

        assert by_method["local"] == by_method["blocks_none"]
        assert by_method["fedsca"] == by_method["again"]
        assert [cell.method for cell in unique(grid(setting))] == ["fedsca", "local"]

    @pytest.mark.parametrize(
        "change",
        [
            {"data": {"a": "new", "b": "data of b", "c": "data of c"}},
            {"foundation": "another"},
            {"seeds": [1]},
            {"train_images": [4]},
            {"learning_rates": [0.02]},
            {"strategies": {"fedsca": {"rho": 0.4}}},
            {"methods": {"fedsca": {"options": {"rho": 0.4}}}},
            {"methods": {"fedsca": {"set": {"adapters.width": 8}}}},
            {"base": {"training": {"steps_per_round": 3}}},
            {"base": {"preprocessing": {"image_size": 48}}},
            {"base": {"foundation": {"seed": 1}}},
            {"base": {"run": {"device": "cpu"}}},
            {"unseen_sites": ["c"]},
        ],
    )
    def test_everything_that_decides_the_numbers_changes_the_fingerprint(
        self, make_setting, grid, change: dict[str, Any]
    ) -> None:
        before = grid(make_setting({"fedsca": {}}))
        after = grid(make_setting(**{"methods": {"fedsca": {}}, **change}))

        assert len(before) == len(after) == 1
        assert before[0].fingerprint != after[0].fingerprint

    @pytest.mark.parametrize("key", [{"shots": [3]}, {"shot_steps": 3}, {"release_private": True}])
    def test_what_unseen_sites_receive_changes_the_cells_that_test_them_only(
        self, make_setting, grid, key: dict[str, Any]
    ) -> None:
        settings = [make_setting({"fedsca": {}}, unseen_sites=["c"], train_images=[2, 4], **more) for more in ({}, key)]
        asked, unasked = zip(*([cell.fingerprint for cell in grid(setting)] for setting in settings), strict=True)

        assert asked[0] != asked[1]
        assert unasked[0] == unasked[1]

    @pytest.mark.parametrize(
        "change",
        [
            {"base": {"federation": {"fleet": "processes", "workers": 2, "devices": [0], "server_memory": 1.0}}},
            {"methods": {"fedsca": {"set": {"federation.workers": 3, "federation.fleet": "processes"}}}},
            {"base": {"federation": {"quorum": 2, "deadline": 9.0, "grace": 1.0}}},
            {"base": {"run": {"threads": 4, "seed": 9}}},
            {"base": {"federation": {"strategy": "local"}, "adapters": {"seed": 9}}},
            {"jobs": 4},
            {"same_code": False},
        ],
    )
    def test_how_the_work_is_distributed_does_not_change_the_fingerprint(
        self, make_setting, prints, change: dict[str, Any]
    ) -> None:
        assert prints(make_setting({"fedsca": {}})) == prints(make_setting(**{"methods": {"fedsca": {}}, **change}))
