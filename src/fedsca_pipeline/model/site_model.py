"""A site's finished model: save it, load it, segment images and volumes with it.

On disk it is a folder with the adapter in PEFT's format, the decoder as safetensors, and a card.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import Tensor, nn

from fedsca_pipeline.config import FoundationConfig, NormaliseConfig, VolumeConfig
from fedsca_pipeline.data.preprocessing.geometry import fit_image, normalise
from fedsca_pipeline.data.preprocessing.slices import VolumeSlices
from fedsca_pipeline.data.readers.volume import Volume
from fedsca_pipeline.data.readers.volumes import read_volume
from fedsca_pipeline.errors import WeightsError
from fedsca_pipeline.files import move, read_json, read_tensors, write_bytes, write_json, write_tensors
from fedsca_pipeline.model.adapters.attach import EXPORT_AGAIN, load_adapters
from fedsca_pipeline.model.foundation import load_foundation, prepare_foundation
from fedsca_pipeline.model.foundation.model import SegmentationModel
from fedsca_pipeline.model.heads import predict_masks

GENERAL_MODEL = "_general_model"
CARD, DECODER, ENCODER = "site_model.json", "decoder.safetensors", "encoder.safetensors"


class SiteModelCard(BaseModel):
    """Content of ``site_model.json``: all that is needed to rebuild the model, and where it came from.

    ``known_classes`` are the classes that the model may predict; None: all of 1..``classes``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: str
    strategy: str
    round: int
    dice_validation: float | None
    run: str
    foundation: FoundationConfig
    foundation_sha256: str
    foundation_root: str
    image_size: int
    classes: int
    class_names: tuple[str, ...] | None = None
    known_classes: tuple[int, ...] | None = None
    normalise: NormaliseConfig
    volume: VolumeConfig = VolumeConfig()
    threshold: float
    note: str = ""


class SiteModel(nn.Module):
    """The segmentation model of one site.

    ``segment`` takes raw images, ``segment_volume`` raw volumes or their files; the model as a module takes
    normalised pixels. Only the classes of ``card.known_classes`` are predicted.

    Attributes:
        network: the foundation with the site's adapters and decoder.
        card: how the model was made.
    """

    def __init__(self, network: SegmentationModel, card: SiteModelCard) -> None:
        super().__init__()
        self.network = network
        self.card = card

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [B, C, S, S] of normalised pixels float32 [B, 3, S, S]."""
        logits: Tensor = self.network(pixels)
        return logits

    def segment(self, image: np.ndarray) -> np.ndarray:
        """Return the label map of one raw image, at the image's own size.

        Args:
            image: grey [H, W] or colour [H, W, 3], of any size and any integer or floating dtype.

        Returns:
            uint8 [H, W], 0 = background, 1..K.
        """
        levels, _ = normalise(image, self.card.normalise)
        height, width = image.shape[:2]
        fitted = fit_image(levels, self.card.image_size)[None]
        labels: np.ndarray = _segment(
            self.network, fitted, (height, width), self.card.image_size, self.card.threshold, self.card.known_classes
        )[0]
        return labels

    def segment_volume(self, source: Volume | str | Path, batch_size: int = 8) -> np.ndarray:
        """Return the label map of a volume in any orientation, on the volume's own grid.

        Args:
            source: the volume, or a NIfTI, NRRD, MetaImage or DICOM file, or the folder of a DICOM series.
            batch_size: slices at a time.

        Returns:
            uint8 [X, Y, Z], 0 = background, 1..K. ``data.readers.volume.write_nifti`` saves it with the volume's
            affine.

        Raises:
            BrokenSampleError: the file cannot be read, or the model was trained on other modalities.
        """
        volume = source if isinstance(source, Volume) else read_volume(Path(source))
        slices = VolumeSlices(volume, self.card.volume, self.card.normalise, self.card.image_size)
        return segment_slices(
            self.network, slices, self.card.image_size, self.card.threshold, self.card.known_classes, batch_size
        )


def segment_slices(
    network: SegmentationModel,
    slices: VolumeSlices,
    side: int,
    threshold: float,
    known: Sequence[int] | None = None,
    batch_size: int = 8,
) -> np.ndarray:
    """Return the label map of a volume, segmented slice by slice. Where classes overlap, the highest number wins.

    Args:
        network: on any device.
        slices: the volume's slices, resized to ``side``.
        side: S, the network's image size.
        threshold: as in ``heads.predict_masks``.
        known: classes that may be predicted; None: all.
        batch_size: slices at a time.

    Returns:
        uint8 [X, Y, Z], 0 = background, 1..K, on the volume's own grid.
    """
    planes: list[np.ndarray] = []
    for start in range(0, len(slices), batch_size):
        fitted = np.stack([slices.image(index) for index in range(start, min(start + batch_size, len(slices)))])
        planes.extend(_segment(network, fitted, slices.size, side, threshold, known))
    return slices.restack(planes)


@torch.inference_mode()
def _segment(
    network: SegmentationModel,
    fitted: np.ndarray,
    size: tuple[int, int],
    side: int,
    threshold: float,
    known: Sequence[int] | None,
) -> np.ndarray:
    """Return label maps uint8 [B, *size] of resized images uint8 [B, 3, h, w]; logits, not masks, are resized."""
    count, _, height, width = fitted.shape
    device = next(network.parameters()).device
    pixels = torch.zeros(count, 3, side, side, dtype=torch.uint8, device=device)
    pixels[..., :height, :width] = torch.from_numpy(fitted.copy())
    valid = torch.zeros(count, 1, side, side, dtype=torch.bool, device=device)
    valid[..., :height, :width] = True
    logits = network(network.normalise(pixels, valid))[..., :height, :width]
    full = nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    masks = predict_masks(full, network.head, threshold, known)
    labels = torch.arange(1, masks.shape[1] + 1, device=device, dtype=torch.uint8).view(-1, 1, 1)
    return (masks * labels).amax(dim=1).cpu().numpy()


def save_site_model(
    folder: Path,
    network: SegmentationModel,
    tensors: Mapping[str, Tensor],
    card: Mapping[str, Any],
    foundation_names: Collection[str] = (),
) -> None:
    """Set the network's parameters to ``tensors``, then write adapter, decoder and, last, the card.

    All files are written to a scratch folder first, so that a full disk leaves an earlier model whole. A folder
    without a card is not a model, so an interrupted move is never mistaken for one.

    Args:
        folder: the site's folder.
        network: with adapters attached; its parameters change.
        tensors: values by name.
        card: fields of ``SiteModelCard``.
        foundation_names: the pretrained encoder's tensors; those among ``tensors`` were trained and are saved too.

    Raises:
        WeightsError: the tensors are not the network's, or they cannot be written.
    """
    set_parameters(network, tensors)
    site_card = SiteModelCard(**{**card, "foundation_root": os.path.relpath(card["foundation_root"], folder)})
    scratch = folder / ".site_model.partial"
    try:
        # A killed command may have left one.
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        _save_adapter(network, scratch)
        write_tensors(scratch / DECODER, {n: t for n, t in tensors.items() if n.startswith("decoder.")})
        if own := {name: tensors[name] for name in foundation_names if name in tensors}:
            write_tensors(scratch / ENCODER, own)
        write_bytes(scratch / "README.md", _readme(site_card).encode())
        write_json(scratch / CARD, site_card.model_dump(mode="json"))
        discard_site_model(folder)
        for file in sorted(scratch.iterdir(), key=lambda path: path.name == CARD):
            move(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"{folder}: the model cannot be written ({error}); make room there and run the same command again"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def discard_site_model(folder: Path) -> None:
    """Remove the card, without which the folder is no model, and the encoder's tensors."""
    (folder / CARD).unlink(missing_ok=True)
    # Not every model has encoder tensors, and the next one must not be read with these.
    (folder / ENCODER).unlink(missing_ok=True)


def set_parameters(network: SegmentationModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy named tensors into the network's parameters.

    Raises:
        WeightsError: the network has no parameter of that name and shape.
    """
    parameters = dict(network.named_parameters())
    wrong = [n for n, t in tensors.items() if n not in parameters or parameters[n].shape != t.shape]
    if wrong:
        raise WeightsError(
            f"these tensors do not belong to this model: {', '.join(wrong[:5])}; was it saved by another version?"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def load_site_model(path: str | Path, foundation_root: str | Path | None = None, device: str = "cpu") -> SiteModel:
    """Return the model of one site, in evaluation mode, ready to segment.

    Args:
        path: the site's folder, ``data/06_models/<site>``.
        foundation_root: folder of the foundations. Default: where it was when the model was saved, relative to
            ``path``.
        device: torch device for the model.

    Raises:
        WeightsError: the folder holds no model, or the foundation is missing or not the one it was trained on.

    A tiny random foundation stands in for a trained model here:

    >>> import tempfile
    >>> from fedsca_pipeline.config import AdaptersConfig
    >>> from fedsca_pipeline.model.adapters.attach import attach_adapters
    >>> root = Path(tempfile.mkdtemp())
    >>> foundation = FoundationConfig(name="random")
    >>> network = attach_adapters(load_foundation(foundation, root, image_size=32, classes=1), AdaptersConfig())
    >>> card = dict(
    ...     site="north", strategy="fedsca", round=3, dice_validation=0.5, run="0123456789abcdef",
    ...     foundation=foundation, foundation_sha256=prepare_foundation(foundation, root).sha256, foundation_root=root,
    ...     image_size=32, classes=1, normalise=NormaliseConfig(), threshold=0.5,
    ... )
    >>> save_site_model(root / "north", network, {}, card)

    >>> model = load_site_model(root / "north")
    >>> mask = model.segment(np.zeros((40, 28), np.uint16))
    >>> mask.shape, mask.dtype
    ((40, 28), dtype('uint8'))
    >>> shutil.rmtree(root)
    """
    folder = Path(path)
    card = read_card(folder)
    root = Path(foundation_root) if foundation_root else (folder / card.foundation_root).resolve()
    provenance = prepare_foundation(card.foundation, root)
    if provenance.sha256 != card.foundation_sha256:
        raise WeightsError(
            f"{root}: this {card.foundation.name} has SHA-256 {provenance.sha256[:16]}, but the model was trained on "
            f"{card.foundation_sha256[:16]}; pass foundation_root= with the folder of that one"
        )
    network = load_foundation(card.foundation, root, image_size=card.image_size, classes=card.classes)
    load_adapters(network, folder)
    set_parameters(network, read_saved_tensors(folder))
    return SiteModel(network, card).eval().to(device)


def read_card(folder: Path) -> SiteModelCard:
    """Return the card of the model in a folder.

    Raises:
        WeightsError: the folder holds no model.
    """
    if not (folder / CARD).is_file():
        raise WeightsError(f"{folder}: no {CARD}; give the folder of one site, such as data/06_models/<site>")
    try:
        return SiteModelCard.model_validate(read_json(folder / CARD))
    except ValueError as error:
        raise WeightsError(f"{folder / CARD}: cannot be read ({error}); {EXPORT_AGAIN}") from error


def read_saved_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the saved tensors that are not adapters, by name: the decoder's, and the encoder's if it was trained.

    Raises:
        WeightsError: a file is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in (folder / DECODER, folder / ENCODER):
        if file.name == ENCODER and not file.is_file():
            continue
        tensors |= read_tensors(file, cure=EXPORT_AGAIN)
    return tensors


def _readme(card: SiteModelCard) -> str:
    """Return the text of the model's README, which replaces PEFT's empty template."""
    return f"""# Segmentation model: {card.site}

Adapter (PEFT) and mask decoder for the frozen foundation `{card.foundation.name}`, trained by `{card.strategy}` in
round {card.round}. {card.note}

```python
from fedsca_pipeline import load_site_model

mask = load_site_model("this/folder").segment(image)
```

`{CARD}` says how the model was made. PEFT by itself can read the adapter, but not the decoder. If the adapter's method
is `fel`, call `fedsca_pipeline.model.adapters.fel.register()` before `PeftModel.from_pretrained`. Not a medical device.
"""


def _save_adapter(network: SegmentationModel, folder: Path) -> None:
    encoder: Any = network.encoder
    encoder.save_pretrained(str(folder), safe_serialization=True)
    for file in sorted(folder.iterdir()):
        # PEFT does not fsync, so every file is written once more.
        write_bytes(file, file.read_bytes())
