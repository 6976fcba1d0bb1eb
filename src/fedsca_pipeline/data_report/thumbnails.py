"""Images with the outlines of their classes, for pages and previews."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from itertools import cycle

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation
from skimage.segmentation import find_boundaries

from fedsca_pipeline.data_report.inspection import Picture
from fedsca_pipeline.evaluation.figures import CLASS_COLOURS

_QUALITY = 85


def outlined(picture: Picture, smallest: int = 192) -> np.ndarray:
    """Return the image with each class's outline in its colour between two dark lines, uint8 [H, W, 3].

    If the longer side is below ``smallest`` pixels, pixels are repeated first, so that lines stay thin.
    """
    times = max(1, math.ceil(smallest / max(picture.classes.shape)))
    image = np.moveaxis(picture.pixels, 0, -1).repeat(times, 0).repeat(times, 1)
    classes = picture.classes.repeat(times, 0).repeat(times, 1)
    for label, colour in zip(range(1, int(classes.max()) + 1), cycle(CLASS_COLOURS), strict=False):
        line = find_boundaries(classes == label, mode="thick")
        image[binary_dilation(line)] = 0
        image[line] = tuple(bytes.fromhex(colour[1:]))
    return image


def data_uri(image: np.ndarray) -> str:
    """Return an image uint8 [H, W, 3] as a ``data:`` address of a JPEG."""
    stream = io.BytesIO()
    # No colour subsampling: outlines are one pixel wide.
    Image.fromarray(image).save(stream, "JPEG", quality=_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def sheet(pictures: Sequence[Picture], side: int = 192) -> np.ndarray:
    """Return one sheet of outlined pictures, uint8 [rows * side, columns * side, 3]; no picture gives a grey square."""
    from skimage.util import montage

    if not pictures:
        return np.full((side, side, 3), 226, np.uint8)
    tiles = []
    for picture in pictures:
        tile = Image.fromarray(outlined(picture))
        tile.thumbnail((side, side))
        square = Image.new("RGB", (side, side), "white")
        square.paste(tile)
        tiles.append(np.asarray(square))
    return montage(np.stack(tiles), channel_axis=-1, fill=(255, 255, 255))
