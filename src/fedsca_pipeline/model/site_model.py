"""A site's finished model: save it, load it, segment images and volumes with it.

On disk it is a folder with the adapter in PEFT's format, the decoder as safetensors, and a card.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from fedsca_pipeline.config import FoundationConfig, NormaliseConfig, VolumeConfig
from fedsca_pipeline.data.preprocessing.geometry import fit_image, normalise
from fedsca_pipeline.data.preprocessing.slices import VolumeSlices
from fedsca_pipeline.data.readers.common import MAX_PIXELS, BrokenSampleError, finite_values
from fedsca_pipeline.data.readers.images import read_image
from fedsca_pipeline.data.readers.volume import Volume, check_voxels
from fedsca_pipeline.data.readers.volumes import is_volume, read_volume
from fedsca_pipeline.errors import WeightsError, faults_by_key
from fedsca_pipeline.files import (
    move,
    read_tensors,
    sealed,
    sha256_file,
    unsealed,
    write_bytes,
    write_json,
    write_tensors,
)
from fedsca_pipeline.model.adapters.attach import EXPORT_AGAIN, load_adapters, read_object
from fedsca_pipeline.model.foundation import load_foundation, prepare_foundation
from fedsca_pipeline.model.foundation.model import SegmentationModel
from fedsca_pipeline.model.layout import faults
from fedsca_pipeline.model.segmentation import full_logits, labels_of, segment_slices

GENERAL_MODEL = "_general_model"
CARD, DECODER, ENCODER = "site_model.json", "decoder.safetensors", "encoder.safetensors"
_FILES = frozenset({CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, DECODER, "README.md"})
# What loads by unpickling, which runs its author's code.
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SiteModelCard(BaseModel):
    """Content of ``site_model.json``: all that is needed to rebuild the model, and where it came from.

    ``known_classes`` are the classes that the model may predict; None: all of 1..``classes``. ``files`` holds the
    SHA-256 of every other file of the model. On disk a checksum of the card itself is added.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    site: str
    strategy: str
    round: int = Field(ge=0)
    dice_validation: float | None
    run: str
    foundation: FoundationConfig
    foundation_sha256: Sha256
    foundation_root: str = Field(pattern=r"^[^\x00]*$")
    image_size: int = Field(ge=16, le=4096, multiple_of=16)
    classes: int = Field(ge=1, le=254)
    class_names: tuple[str, ...] | None = None
    known_classes: tuple[int, ...] | None = None
    normalise: NormaliseConfig
    volume: VolumeConfig = VolumeConfig()
    threshold: float = Field(gt=0.0, lt=1.0)
    note: str = ""
    files: dict[str, Sha256] = {}

    @model_validator(mode="after")
    def _consistent(self) -> SiteModelCard:
        if self.class_names is not None and len(self.class_names) != self.classes:
            raise ValueError(f"class_names: {len(self.class_names)} names for {self.classes} classes")
        if others := set(self.known_classes or ()).difference(range(1, self.classes + 1)):
            raise ValueError(f"known_classes: {min(others)} is none of the classes 1 to {self.classes}")
        return self


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

    def segment(self, source: np.ndarray | str | Path) -> np.ndarray:
        """Return the label map of one raw image, at the image's own size.

        Args:
            source: an image file, which is read as training reads it, or its pixels: grey [H, W] or colour [H, W, 3],
                of any size and any boolean, integer or floating dtype. A fourth channel, alpha, is dropped. The indices
                of a palette image look like grey values: give its path.

        Returns:
            uint8 [H, W], 0 = background, 1..K.

        Raises:
            BrokenSampleError: the file cannot be read, or the pixels are no image.
            WeightsError: the model computes values that are not finite.
        """
        image = _image(source)
        (logits,) = full_logits(self.network, [self.fit(image)], [image.shape[:2]], self.card.image_size)
        return labels_of(logits, self.network.head, self.card.threshold, self.card.known_classes)

    def fit(self, image: np.ndarray) -> np.ndarray:
        """Return an image [H, W] or [H, W, 3] as training prepares it: uint8 [3, h, w], its longer side S pixels."""
        levels, _ = normalise(image, self.card.normalise)
        return fit_image(levels, self.card.image_size)

    def segment_volume(self, source: Volume | str | Path, batch_size: int = 8) -> np.ndarray:
        """Return the label map of a volume in any orientation, on the volume's own grid.

        Args:
            source: the volume, or a NIfTI, NRRD, MetaImage or DICOM file, or the folder of a DICOM series.
            batch_size: slices at a time.

        Returns:
            uint8 [X, Y, Z], 0 = background, 1..K. ``data.readers.volume.write_nifti`` saves it with the volume's
            affine.

        Raises:
            BrokenSampleError: the file cannot be read, the voxels are no volume, or the model was trained on other
                modalities.
            WeightsError: the model computes values that are not finite.
        """
        volume = _volume(source)
        slices = VolumeSlices(volume, self.card.volume, self.card.normalise, self.card.image_size)
        return segment_slices(
            self.network, slices, self.card.image_size, self.card.threshold, self.card.known_classes, batch_size
        )


def _image(source: np.ndarray | str | Path) -> np.ndarray:
    """Return the pixels of a file, or pixels after the same checks, as ``read_image`` does."""
    if isinstance(source, str | Path):
        with _named(source):
            if is_volume(Path(source).name):
                raise BrokenSampleError("is a volume", "use segment_volume")
            return read_image(Path(source))
    pixels = np.asarray(source)
    _check_numbers(pixels)
    if pixels.ndim not in (2, 3) or 0 in pixels.shape or (pixels.ndim == 3 and pixels.shape[2] > 4):
        raise BrokenSampleError(
            f"an array {list(pixels.shape)} is no image", "give [height, width] or [height, width, 3]"
        )
    if math.prod(pixels.shape[:2]) > MAX_PIXELS:
        raise BrokenSampleError(f"has more than {MAX_PIXELS:,} pixels", "cut the image into tiles")
    if pixels.ndim == 3:
        pixels = pixels[..., 0] if pixels.shape[2] < 3 else pixels[..., :3]
    return pixels.astype(np.uint8) * np.uint8(255) if pixels.dtype == bool else finite_values(pixels)


def _volume(source: Volume | str | Path) -> Volume:
    """Return the volume of a file, or a volume after the same checks, as ``read_volume`` does."""
    if isinstance(source, str | Path):
        with _named(source):
            return read_volume(Path(source))
    _check_numbers(source.voxels)
    check_voxels(source.voxels.shape)
    if not np.isfinite(source.affine).all() or not np.linalg.det(source.affine[:3, :3]):
        raise BrokenSampleError("its affine is singular or not finite", "give the one of its file")
    finite_values(source.voxels)
    return source


def _check_numbers(values: np.ndarray) -> None:
    """Check that an array holds real numbers.

    Raises:
        BrokenSampleError: it holds others, or objects.
    """
    if values.dtype.kind not in "buif":
        raise BrokenSampleError(f"an array of {values.dtype} holds no plain numbers", "give integers or floats")


@contextmanager
def _named(source: str | Path) -> Iterator[None]:
    """Name the file in a BrokenSampleError of the block."""
    try:
        yield
    except BrokenSampleError as error:
        raise BrokenSampleError(f"{source}: {error.reason}", error.cure) from error


def save_site_model(
    folder: Path,
    network: SegmentationModel,
    tensors: Mapping[str, Tensor],
    card: Mapping[str, Any],
    foundation_names: Collection[str] = (),
) -> None:
    """Set the network's parameters to ``tensors``, then write adapter, decoder and, last, the card with their hashes.

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
        write_tensors(scratch / DECODER, _decoder(network))
        if own := {name: tensors[name] for name in foundation_names if name in tensors}:
            write_tensors(scratch / ENCODER, own)
        write_bytes(scratch / "README.md", _readme(site_card).encode())
        hashes = {file.name: sha256_file(file) for file in sorted(scratch.iterdir())}
        write_json(scratch / CARD, sealed(site_card.model_copy(update={"files": hashes}).model_dump(mode="json")))
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

    The folder may come from a stranger: no network is used, nothing is unpickled, no file outside the folder is read
    but the foundation, and every file must be as it was saved.

    Args:
        path: the site's folder, ``data/06_models/<site>``.
        foundation_root: folder of the foundations. Default: where it was when the model was saved, relative to
            ``path``.
        device: torch device for the model.

    Raises:
        WeightsError: the folder holds no model, or one that was changed; or the foundation is missing or not the one
            it was trained on.

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
    provenance = prepare_foundation(card.foundation, root, download=False)
    if provenance.sha256 != card.foundation_sha256:
        raise WeightsError(
            f"{root}: this {card.foundation.name} has SHA-256 {provenance.sha256[:16]}, but the model was trained on "
            f"{card.foundation_sha256[:16]}; pass foundation_root= with the folder of that one"
        )
    try:
        network = load_foundation(card.foundation, root, image_size=card.image_size, classes=card.classes)
    except (ValueError, RuntimeError) as error:
        raise WeightsError(f"{folder / CARD}: its foundation cannot be built ({error}); {EXPORT_AGAIN}") from error
    load_adapters(network, folder)
    set_parameters(network, read_saved_tensors(folder, card, network))
    return SiteModel(network, card).eval().to(device)


def read_card(folder: Path) -> SiteModelCard:
    """Return the card of the model in a folder, after checking that every file of the model is as it was saved.

    Raises:
        WeightsError: the folder holds no model, or a file is missing, changed, a pickle, no plain file, or a link that
            leads out of the folder.
    """
    if not (folder / CARD).is_file():
        raise WeightsError(f"{folder}: no {CARD}; give the folder of one site, such as data/06_models/<site>")
    _check_place(folder, CARD)
    try:
        content = read_object(folder / CARD)
        if "files" not in content:
            raise ValueError("it has no hashes of the model's files, as cards of an older version")
        card = SiteModelCard.model_validate(unsealed(content))
    except ValidationError as error:
        raise WeightsError(f"{folder / CARD}: {'; '.join(faults_by_key(error))}; {EXPORT_AGAIN}") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder / CARD}: cannot be read ({error}); {EXPORT_AGAIN}") from error
    if not _FILES <= card.files.keys() <= _FILES | {ENCODER}:
        raise WeightsError(f"{folder / CARD}: it lists other files than a model has; {EXPORT_AGAIN}")
    for name, sha256 in card.files.items():
        _check_place(folder, name)
        if sha256_file(folder / name) != sha256:
            raise WeightsError(f"{folder / name}: is not as it was saved; copy it again, or {EXPORT_AGAIN}")
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES):
        raise WeightsError(
            f"{folder / pickles[0]}: a pickle, which can run code; delete it, since models are safetensors only"
        )
    return card


def _check_place(folder: Path, name: str) -> None:
    """Check that a file of a model is a plain one, in its folder or in the DVC cache of the project around it.

    Raises:
        WeightsError: it is missing, a pipe or a device, or a link that leads elsewhere.
    """
    path, own = folder / name, folder.resolve()
    if not path.is_file():
        raise WeightsError(f"{path}: missing, or no plain file; copy it again, or {EXPORT_AGAIN}")
    places = (own, *(parent / ".dvc" / "cache" for parent in own.parents))
    if not any(path.resolve().is_relative_to(place) for place in places):
        raise WeightsError(f"{path}: a link that leads out of the folder; put the file itself there")


def read_saved_tensors(folder: Path, card: SiteModelCard, network: SegmentationModel) -> dict[str, Tensor]:
    """Return the saved tensors that are not adapters, by name: the decoder's, and the encoder's if it was trained.

    Raises:
        WeightsError: a file is damaged, or its tensors are not like the network's, or not finite.
    """
    decoder = read_tensors(folder / DECODER, cure=EXPORT_AGAIN)
    _check_tensors(folder / DECODER, decoder, _decoder(network))
    if ENCODER not in card.files:
        return decoder
    encoder = read_tensors(folder / ENCODER, cure=EXPORT_AGAIN)
    own = {name: p for name, p in network.named_parameters() if name.startswith("encoder.") and name in encoder}
    _check_tensors(folder / ENCODER, encoder, own)
    return decoder | encoder


def _check_tensors(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if wrong := faults(found, expected):
        raise WeightsError(f"{path}: does not fit its foundation ({'; '.join(wrong[:3])}); {EXPORT_AGAIN}")


def _decoder(network: SegmentationModel) -> dict[str, Tensor]:
    return {name: p for name, p in network.named_parameters() if name.startswith("decoder.")}


def _readme(card: SiteModelCard) -> str:
    """Return the text of the model's README, which replaces PEFT's empty template."""
    return f"""# Segmentation model: {card.site}

Adapter (PEFT) and mask decoder for the frozen foundation `{card.foundation.name}`, trained by `{card.strategy}` in
round {card.round}. {card.note}

```python
from fedsca_pipeline import load_site_model

mask = load_site_model("this/folder").segment("image.png")
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
