"""One network lent as the foundation and as each saved model equals, bit for bit, each model loaded by itself."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsca_pipeline import load_site_model
from fedsca_pipeline.config import AdaptersConfig, FoundationConfig, NormaliseConfig, PreprocessingConfig
from fedsca_pipeline.errors import WeightsError
from fedsca_pipeline.files import read_json, sealed, unsealed, write_json
from fedsca_pipeline.model.adapters.attach import attach_adapters, tensor_layout
from fedsca_pipeline.model.foundation import load_foundation, prepare_foundation
from fedsca_pipeline.model.foundation.model import SegmentationModel
from fedsca_pipeline.model.in_turn import ModelsInTurn
from fedsca_pipeline.model.site_model import CARD, save_site_model

SIZE = 32
FOUNDATION = FoundationConfig(name="random")
CPU = torch.device("cpu")
KINDS = {
    "fel": AdaptersConfig(width=4),
    "lora with dropout": AdaptersConfig(method="lora", options={"r": 2, "lora_dropout": 0.5}),
    "lora that changes something untrained": AdaptersConfig(
        method="lora", options={"r": 2, "init_lora_weights": False}
    ),
    "lora that trains the foundation's biases": AdaptersConfig(method="lora", options={"r": 2, "bias": "lora_only"}),
}
# Prefixes of the tensors that each saved model trained besides its adapters.
TRAINED = {"north": ("decoder.",), "adapters_only": (), "whole": ("decoder.", "encoder.")}
MODELS = ("foundation", *TRAINED)


@dataclass(frozen=True)
class Saved:
    """Saved models of one kind of adapters, the logits of each loaded by itself, and a network that was trained."""

    root: Path
    logits: Mapping[str, Tensor]
    trained: SegmentationModel
    start: Mapping[str, Tensor]

    @property
    def sha256(self) -> str:
        return prepare_foundation(FOUNDATION, self.root).sha256

    def in_turn(self, *, trained: bool) -> ModelsInTurn:
        if trained:
            return ModelsInTurn(copy.deepcopy(self.trained), self.sha256, self.start)
        return ModelsInTurn.load(FOUNDATION, self.root, PreprocessingConfig(image_size=SIZE), CPU)

    def lent(self, in_turn: ModelsInTurn, name: str) -> Tensor:
        with in_turn.foundation() if name == "foundation" else in_turn.saved(self.root / name) as network:
            return logits_of(network)


def bare(root: Path) -> SegmentationModel:
    return load_foundation(FOUNDATION, root, image_size=SIZE, classes=1)


@torch.inference_mode()
def logits_of(network: SegmentationModel) -> Tensor:
    return network(torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))


def changed(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: t + 0.3 * torch.randn(t.shape, generator=draw) for name, t in tensors.items()}


def save(folder: Path, root: Path, config: AdaptersConfig, beside: Sequence[str], seed: int) -> None:
    network = attach_adapters(bare(root), config)
    layout = tensor_layout(network)
    values = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    names = [*layout.adapters, *(n for n in values if n.startswith(tuple(beside)) and n not in layout.adapters)]
    card = {
        "site": folder.name, "strategy": "fedsca", "round": 1, "dice_validation": None, "run": "0" * 16,
        "foundation": FOUNDATION, "foundation_sha256": prepare_foundation(FOUNDATION, root).sha256,
        "foundation_root": root, "image_size": SIZE, "classes": 1, "normalise": NormaliseConfig(), "threshold": 0.5,
    }  # fmt: skip
    save_site_model(folder, network, changed({name: values[name] for name in names}, seed), card, layout.encoder)


@pytest.fixture(scope="module", params=list(KINDS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    root, config = tmp_path_factory.mktemp("models"), KINDS[request.param]
    for seed, (name, beside) in enumerate(TRAINED.items()):
        save(root / name, root, config, beside, seed)
    trained = attach_adapters(bare(root), config)
    start = {name: parameter.detach().clone() for name, parameter in trained.named_parameters()}
    trained.load_state_dict(changed(start, 9), strict=False)
    found = {name: logits_of(load_site_model(root / name).network) for name in TRAINED}
    return Saved(root, {"foundation": logits_of(bare(root)), **found}, trained.train(), start)


def test_the_saved_models_differ(saved: Saved) -> None:
    values = [*saved.logits.values(), logits_of(copy.deepcopy(saved.trained).eval())]

    assert all(not torch.equal(a, b) for place, a in enumerate(values) for b in values[:place])


@settings(max_examples=12)
@given(order=st.lists(st.sampled_from(MODELS), min_size=1, max_size=6), trained=st.booleans())
def test_in_any_order_each_model_equals_the_one_loaded_by_itself(saved: Saved, order: list[str], trained: bool) -> None:
    in_turn = saved.in_turn(trained=trained)

    for name in order:
        assert torch.equal(saved.lent(in_turn, name), saved.logits[name])


def test_a_network_in_training_keeps_its_mode_and_its_trainable_tensors(saved: Saved) -> None:
    network = copy.deepcopy(saved.trained)
    next(parameter for parameter in network.encoder.parameters() if parameter.requires_grad).requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    in_turn = ModelsInTurn(network, saved.sha256, saved.start)

    for name in MODELS:
        saved.lent(in_turn, name)

    assert network.training
    assert {name: parameter.requires_grad for name, parameter in network.named_parameters()} == before


def test_a_failed_load_leaves_no_tensor_of_that_model(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved.root / "whole", tmp_path / "broken")
    (tmp_path / "broken" / "decoder.safetensors").write_bytes(b"broken")
    in_turn = saved.in_turn(trained=False)
    assert torch.equal(saved.lent(in_turn, "north"), saved.logits["north"])

    with (
        pytest.raises(WeightsError, match=r"not as it was saved.*=training"),
        in_turn.saved(tmp_path / "broken"),
    ):
        pass

    assert torch.equal(saved.lent(in_turn, "foundation"), saved.logits["foundation"])
    assert torch.equal(saved.lent(in_turn, "adapters_only"), saved.logits["adapters_only"])


def test_a_model_of_another_kind_of_adapters_is_refused(saved: Saved, tmp_path: Path) -> None:
    save(tmp_path / "other", saved.root, AdaptersConfig(width=4, scale=0.7), TRAINED["north"], 0)
    in_turn = saved.in_turn(trained=True)

    with pytest.raises(WeightsError, match="of another kind"), in_turn.saved(tmp_path / "other"):
        pass


@pytest.mark.parametrize(("field", "value"), [("foundation_sha256", "ab" * 32), ("image_size", 64)])
def test_a_model_of_another_foundation_or_size_is_refused(
    saved: Saved, tmp_path: Path, field: str, value: object
) -> None:
    shutil.copytree(saved.root / "north", tmp_path / "other")
    card = tmp_path / "other" / CARD
    write_json(card, sealed({**unsealed(read_json(card)), field: value}))

    with (
        pytest.raises(WeightsError, match="foundation, head and image size"),
        saved.in_turn(trained=False).saved(tmp_path / "other"),
    ):
        pass
