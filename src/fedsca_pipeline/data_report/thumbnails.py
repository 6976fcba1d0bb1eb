"""Images with the outlines of their classes, to be put on a page."""

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
    """Draw each class's outline in its colour on the image, with a dark line on both sides: uint8 [H, W, 3].

    An image whose longer side is below ``smallest`` pixels is repeated pixel by pixel first, so that lines stay thin.
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
    """Encode an image uint8 [H, W, 3] as a JPEG in a ``data:`` address."""
    stream = io.BytesIO()
    # Without subsampling of colours: outlines are a pixel wide.
    Image.fromarray(image).save(stream, "JPEG", quality=_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def sheet(pictures: Sequence[Picture], side: int = 192) -> np.ndarray:
    """Put outlined pictures on one sheet, uint8 [rows * side, columns * side, 3]; a grey square if there are none."""
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
