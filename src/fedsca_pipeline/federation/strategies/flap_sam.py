"""FLAP-SAM: LoRA's products B A are averaged and reduced to the rank by a truncated SVD.

Asokan et al., *A Federated Learning-Friendly Approach for Parameter-Efficient Fine-Tuning of SAM in 3D Segmentation*,
arXiv 2407.21739, for federated LoRA of SAM; here the SVD averages the products instead of the factors.
"""

from __future__ import annotations

from typing import ClassVar

from fedsca_pipeline.federation.strategies.lora import LoraStrategy
from fedsca_pipeline.federation.strategies.sharing import LoraMerge


class FlapSam(LoraStrategy):
    """A and B train and cross the wire."""

    name: ClassVar[str] = "flap_sam"
    merge_rule: ClassVar[LoraMerge] = "svd"
