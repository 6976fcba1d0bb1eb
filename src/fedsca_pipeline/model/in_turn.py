"""One network in memory that serves as the foundation and as each saved model of a site, one after the other.

Loading a foundation costs its size in memory and seconds, while models of one foundation differ in a few per cent of
their values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fedsca_pipeline.config import FoundationConfig, PreprocessingConfig
from fedsca_pipeline.errors import WeightsError
from fedsca_pipeline.model.adapters.attach import attach_like, has_adapters, load_adapters, without_adapters
from fedsca_pipeline.model.foundation import load_foundation, prepare_foundation
from fedsca_pipeline.model.foundation.model import SegmentationModel
from fedsca_pipeline.model.inference import evaluation_mode
from fedsca_pipeline.model.site_model import SiteModelCard, read_card, read_saved_tensors, set_parameters


class ModelsInTurn:
    """Lends its network as one model at a time, in evaluation mode, bit for bit as that model loaded by itself.

    To train the network afterwards, set all trained tensors first.

    Args:
        network: a foundation on any device, as loaded or with adapters attached and trained.
        foundation_sha256: SHA-256 of the foundation's weights.
        start: the foundation's values, by name, of every tensor that was trained. Default: no tensor was trained.
    """

    def __init__(
        self, network: SegmentationModel, foundation_sha256: str, start: Mapping[str, Tensor] | None = None
    ) -> None:
        self._network = network
        self._foundation_sha256 = foundation_sha256
        self._start = dict(start or {})

    @classmethod
    def load(
        cls, foundation: FoundationConfig, root: Path, preprocessing: PreprocessingConfig, device: torch.device
    ) -> ModelsInTurn:
        """Load the foundation from ``root``.

        Raises:
            WeightsError: its weights are missing or damaged.
        """
        network = load_foundation(foundation, root, image_size=preprocessing.image_size, classes=preprocessing.classes)
        return cls(network.to(device), prepare_foundation(foundation, root).sha256)

    @contextmanager
    def foundation(self) -> Iterator[SegmentationModel]:
        """Lend the foundation itself."""
        set_parameters(self._network, self._start)
        with without_adapters(self._network), evaluation_mode(self._network):
            yield self._network

    @contextmanager
    def saved(self, folder: Path) -> Iterator[SegmentationModel]:
        """Lend the model that ``save_site_model`` wrote into ``folder``.

        Raises:
            WeightsError: the folder holds no model, or its foundation, image size or kind of adapters differs.
        """
        card = self._check(folder)
        if not has_adapters(self._network):
            attach_like(self._network, folder)
            self._remember(name for name, p in self._network.named_parameters() if p.requires_grad)
        tensors = read_saved_tensors(folder, card, self._network)
        self._remember(tensors)
        # Undo all earlier changes first: this model may lack tensors that another one changed.
        set_parameters(self._network, self._start)
        load_adapters(self._network, folder)
        set_parameters(self._network, tensors)
        with evaluation_mode(self._network):
            yield self._network

    def _check(self, folder: Path) -> SiteModelCard:
        card, network = read_card(folder), self._network
        theirs = (card.foundation_sha256[:16], card.foundation.head, card.image_size)
        ours = (self._foundation_sha256[:16], network.head, network.image_size)
        if theirs != ours:
            raise WeightsError(
                f"{folder}: this model has foundation, head and image size {theirs}, but this run has {ours}; train "
                "again, or set foundation and preprocessing as they were"
            )
        return card

    def _remember(self, names: Iterable[str]) -> None:
        """Store the foundation's values of the tensors that a model is about to change for the first time."""
        parameters = dict(self._network.named_parameters())
        self._start |= {
            name: parameters[name].detach().clone() for name in names if name in parameters and name not in self._start
        }
