"""Files as an enemy, a bad disk or a bad export makes them, from seeds: site folders full of them.

Run as a program it prepares such sites in its own process and prints, as JSON, what came of it: see ``main``.
"""

from __future__ import annotations

import csv
import faulthandler
import gzip
import io
import json
import os
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Of the clock, on a machine that others use too; the processor's own seconds are counted apart. The limit on decoding a
# file is 60 seconds, and has to end it before.
HANG_SECONDS = 180
SIDE = 24
# 2**25 pixels, and not one row more.
_LARGEST = 5792
Place = Callable[[Path, int, Path, str], "Hostile"]


@dataclass(frozen=True)
class Hostile:
    """A file that was written, its name relative to the site, and whether there is no way to use it."""

    file: str
    kind: str
    hopeless: bool

    @property
    def pair(self) -> set[str]:
        """What the report may name: the file, or the partner that does not fit what it has become."""
        image = self.file.replace("masks/", "images/")
        stem = image.removeprefix("images/").split(".")[0]
        partners = {f"{kind}/{stem}{end}" for kind in ("images", "masks") for end in (".png", ".nii.gz")}
        return {self.file, self.file.replace("images/", "masks/"), *partners}


def write_hostile_sites(raw: Path, count: int, seed: int, outside: Path) -> dict[str, list[Hostile]]:
    """Write ``count`` hostile files into two sites, each with a sound partner, and a few sound pairs beside them.

    One file in ten is in a site with DICOM files, which only an import reads. ``outside`` gets what links, headers and
    names try to reach: a picture, and a pipe that hangs whoever opens it.
    """
    outside.mkdir(parents=True)
    (outside / "secret.png").write_bytes(_png(_pixels(0)))
    os.mkfifo(outside / "pipe.raw")
    rng = np.random.default_rng(seed)
    plain = [suffix for suffix in sorted(sources()) if suffix != ".dcm"]
    mixed = [partial(_damaged, suffixes=plain)] * 17 + [_special] * 2 + [partial(_place, places=PLACES)]
    dicom = [partial(_damaged, suffixes=[".dcm"])] * 9 + [partial(_place, places=DICOM_PLACES)]
    written = {}
    for site, makers, files in (("hostile", mixed, count - count // 10), ("hostile_dicom", dicom, count // 10)):
        _write_sound_pairs(raw / site)
        written[site] = [makers[number % len(makers)](raw / site, number, rng, outside) for number in range(files)]
    return written


def write_sound_site(folder: Path) -> None:
    """Write one undamaged file of every kind there is."""
    _write_sound_pairs(folder)
    files = [(suffix, content) for suffix, variants in sources().items() for content in variants]
    for number, (suffix, content) in enumerate(files):
        (folder / "images" / f"{number:06d}{suffix}").write_bytes(content)
        _partner(folder, number, suffix, False)


def _write_sound_pairs(folder: Path) -> None:
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(6):
        (folder / "images" / f"sound_{number}.png").write_bytes(_png(_pixels(number + 1)))
        (folder / "masks" / f"sound_{number}.png").write_bytes(_png(_labels()))


def _damaged(folder: Path, number: int, rng: np.random.Generator, _outside: Path, *, suffixes: list[str]) -> Hostile:
    """Write a sound file of some format with some damage, as image or as mask."""
    suffix = _choice(rng, suffixes)
    sound = _choice(rng, sources()[suffix])
    name, (damage, hopeless) = _choice(rng, sorted(DAMAGES.items()))
    as_mask = bool(rng.integers(3) == 0) and suffix not in (".jpg", ".jpeg", ".dcm")
    file = f"{'masks' if as_mask else 'images'}/{number:06d}{suffix}"
    (folder / file).write_bytes(damage(sound, rng))
    _partner(folder, number, suffix, as_mask)
    return Hostile(file, f"{name} {suffix}", hopeless)


def _special(folder: Path, number: int, rng: np.random.Generator, outside: Path) -> Hostile:
    """Write a file that promises what it does not hold, or more than anybody could hold."""
    name, (suffix, make) = _choice(rng, sorted(SPECIALS.items()))
    file = f"images/{number:06d}{suffix}"
    (folder / file).write_bytes(make(outside))
    _partner(folder, number, suffix, False)
    return Hostile(file, name, True)


def _place(
    folder: Path, number: int, rng: np.random.Generator, outside: Path, *, places: Mapping[str, Place]
) -> Hostile:
    """Write something that is no file, lies elsewhere, or has a name that is an attack itself."""
    name, place = _choice(rng, sorted(places.items()))
    return place(folder, number, outside, name)


def _partner(folder: Path, number: int, suffix: str, as_mask: bool) -> None:
    volume = suffix in VOLUMES
    kind, end = "images" if as_mask else "masks", ".nii.gz" if volume else ".png"
    flat = _png(_pixels(number) if as_mask else _labels())
    content = (sources()[end][0] if as_mask else _volume_mask()) if volume else flat
    (folder / kind / f"{number:06d}{end}").write_bytes(content)


def _choice(rng: np.random.Generator, items: list[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


# ---------------------------------------------------------------- sound files


def _pixels(seed: int, shape: tuple[int, ...] = (SIDE, SIDE), dtype: type = np.uint8) -> np.ndarray:
    top = 256 if dtype == np.uint8 else 4096
    return np.random.default_rng([7, seed]).integers(0, top, shape).astype(dtype)


def _labels() -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[4:12, 6:15] = 255
    return mask


def _saved(image: Image.Image, format_: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_, **options)
    return stream.getvalue()


def _png(pixels: np.ndarray) -> bytes:
    return _saved(Image.fromarray(pixels), "PNG")


@cache
def sources() -> Mapping[str, list[bytes]]:
    """Suffix to sound files of many kinds."""
    grey, colour = Image.fromarray(_pixels(1)), Image.fromarray(_pixels(2, (SIDE, SIDE, 3)))
    deep = Image.fromarray(_pixels(3, dtype=np.uint16))
    modes = [grey, colour, deep, *(colour.convert(mode) for mode in ("P", "LA", "RGBA", "1"))]
    flat = {
        ".png": [_saved(image, "PNG") for image in modes],
        ".jpg": [_saved(image, "JPEG", progressive=step) for image in (grey, colour) for step in (False, True)],
        ".bmp": [_saved(image, "BMP") for image in (grey, colour, colour.convert("P"), colour.convert("1"))],
        ".gif": [_saved(colour.convert("P"), "GIF"), _saved(grey, "GIF")],
        ".ppm": [_saved(colour, "PPM")],
        ".pgm": [_saved(grey, "PPM"), _saved(deep, "PPM")],
        ".tif": _tiffs(),
    }
    return {**flat, ".jpeg": flat[".jpg"], ".tiff": flat[".tif"], **_volumes(), ".dcm": _dicoms()}


def _tiffs() -> list[bytes]:
    import tifffile

    def tiff(pixels: np.ndarray, **options: Any) -> bytes:
        stream = io.BytesIO()
        tifffile.imwrite(stream, pixels, **options)
        return stream.getvalue()

    grey, colour, deep = _pixels(1), _pixels(2, (SIDE, SIDE, 3)), _pixels(3, dtype=np.uint16)
    made = [tiff(pixels) for pixels in (grey, colour, deep, deep.astype(np.float32), deep.astype(np.int32))]
    made += [tiff(pixels, compression="deflate") for pixels in (grey, colour, deep)]
    made += [tiff(grey, bigtiff=True), tiff(deep, byteorder=">"), tiff(_pixels(4, (32, 32)), tile=(16, 16))]
    made += [tiff(np.moveaxis(colour, -1, 0), photometric="rgb", planarconfig="separate")]
    image = Image.fromarray(colour)
    kinds = ("tiff_lzw", "packbits", "tiff_adobe_deflate", "jpeg", "tiff_deflate")
    made += [_saved(image, "TIFF", compression=kind) for kind in kinds]
    return [*made, _saved(image.convert("1"), "TIFF", compression="group4"), _saved(image.convert("P"), "TIFF")]


def _volumes() -> dict[str, list[bytes]]:
    import nibabel
    import nrrd

    voxels = _pixels(5, (6, 7, 4), np.int16)
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".nii", ".nii.gz"):
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), Path(folder, f"x{suffix}"))
            made[suffix] = [Path(folder, f"x{suffix}").read_bytes()]
        made[".nrrd"] = []
        for encoding in ("raw", "gzip", "bzip2", "ascii"):
            header = {"space": "RAS", "space directions": np.eye(3), "space origin": np.zeros(3), "encoding": encoding}
            nrrd.write(str(Path(folder, "x.nrrd")), voxels, header)
            made[".nrrd"].append(Path(folder, "x.nrrd").read_bytes())
    made[".mha"] = [_mha(voxels.shape, voxels.tobytes("F")), _mha(voxels.shape, zlib.compress(voxels.tobytes("F")))]
    return made


@cache
def _volume_mask() -> bytes:
    import nibabel

    mask = np.zeros((6, 7, 4), np.uint8)
    mask[1:4, 2:5] = 1
    return gzip.compress(nibabel.Nifti1Image(mask, np.eye(4)).to_bytes(), mtime=0)


def _mha(shape: tuple[int, ...], data: bytes, where: str = "LOCAL") -> bytes:
    packed = data[:1] == b"\x78"
    lines = {
        "ObjectType": "Image",
        "NDims": str(len(shape)),
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": str(packed),
        **({"CompressedDataSize": str(len(data))} if packed else {}),
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "0 0 0",
        "ElementSpacing": "1 1 1",
        "DimSize": " ".join(map(str, shape)),
        "ElementType": "MET_SHORT",
        "ElementDataFile": where,
    }
    return "".join(f"{key} = {value}\n" for key, value in lines.items()).encode() + data


def _dicoms() -> list[bytes]:
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid

    def frame(pixels: np.ndarray) -> Dataset:
        item = Dataset()
        item.file_meta = FileMetaDataset()
        item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        item.file_meta.MediaStorageSOPClassUID = item.SOPClassUID = CTImageStorage
        item.file_meta.MediaStorageSOPInstanceUID = item.SOPInstanceUID = generate_uid(entropy_srcs=["hostile"])
        item.PatientID, item.Modality = "hostile", "CT"
        item.Rows, item.Columns = pixels.shape
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated = item.BitsStored = 8 * pixels.itemsize
        item.HighBit, item.PixelRepresentation = item.BitsStored - 1, 0
        item.PixelData = pixels.tobytes()
        return item

    def written(item: Dataset) -> bytes:
        stream = io.BytesIO()
        item.save_as(stream, enforce_file_format=True)
        return stream.getvalue()

    packed = frame(_pixels(6))
    packed.compress(RLELossless, generate_instance_uid=False)
    return [written(frame(_pixels(6))), written(frame(_pixels(6, dtype=np.uint16))), written(packed)]


VOLUMES = (".nii", ".nii.gz", ".nrrd", ".mha")


# ---------------------------------------------------------------- damages


def _cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(1, len(data)))]


def _flipped(data: bytes, rng: np.random.Generator, upto: int | None = None) -> bytes:
    found = bytearray(data)
    for place in rng.integers(0, min(upto or len(found), len(found)), int(rng.integers(1, 17))):
        found[place] ^= 1 << int(rng.integers(8))
    return bytes(found)


def _absurd_number(data: bytes, rng: np.random.Generator) -> bytes:
    number = _choice(
        rng, [b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\0" * 4, b"\xff" * 8]
    )
    place = int(rng.integers(0, min(len(data), 400)))
    return data[:place] + number + data[place + len(number) :]


def _zeros(data: bytes, rng: np.random.Generator) -> bytes:
    begin = int(rng.integers(0, len(data)))
    end = begin + int(rng.integers(1, 200))
    return data[:begin] + b"\0" * len(data[begin:end]) + data[end:]


def _doubled(data: bytes, rng: np.random.Generator) -> bytes:
    begin, end = sorted(int(place) for place in rng.integers(0, len(data), 2))
    return data[:end] + data[begin:]


def _of_another_format(data: bytes, rng: np.random.Generator) -> bytes:
    return _choice(
        rng, [b"MZ\x90\0" + data, b"%PDF-1.7\n", b"PK\x03\x04" + data, b"<svg/>", b"\x7fELF" + data, b"GIF89a"]
    )


DAMAGES: Mapping[str, tuple[Callable[[bytes, np.random.Generator], bytes], bool]] = {
    "cut": (_cut, False),
    "bits flipped": (_flipped, False),
    "header flipped": (lambda data, rng: _flipped(data, rng, 120), False),
    "absurd number": (_absurd_number, False),
    "zeros": (_zeros, False),
    "doubled": (_doubled, False),
    "wrong magic": (_of_another_format, False),
    "noise": (lambda data, rng: rng.bytes(len(data)), True),
    "empty": (lambda data, rng: b"", True),
    "one byte": (lambda data, rng: data[:1], True),
}


# ---------------------------------------------------------------- promises


def _png_of(width: int, height: int, depth: int, colour: int, data: bytes, extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@cache
def _deflated_zeros(megabytes: int) -> bytes:
    """The same compressed block over and over: made at once, whatever it grows to."""
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * megabytes + b"\x03\0"


def _nothing(megabytes: int) -> bytes:
    """So many MiB of zeros, zlib-compressed."""
    # Adler's sums over zeros: the first stays 1, the second counts the bytes.
    return b"\x78\x01" + _deflated_zeros(megabytes) + struct.pack(">HH", (megabytes * 2**20) % 65521, 1)


@cache
def _gzipped_nothing(head: bytes, megabytes: int) -> bytes:
    """Two members, as gzip allows: a head, and so many MiB of zeros."""
    crc = 0
    for _ in range(megabytes):
        crc = zlib.crc32(bytes(2**20), crc)
    end = struct.pack("<II", crc, megabytes * 2**20 % 2**32)
    return gzip.compress(head, mtime=0) + gzip.compress(b"", mtime=0)[:10] + _deflated_zeros(megabytes) + end


def _nifti_head(shape: tuple[int, ...], code: int = 16) -> bytes:
    head = bytearray(sources()[".nii"][0][:352])
    struct.pack_into("<8h", head, 40, len(shape), *shape, *[1] * (7 - len(shape)))
    struct.pack_into("<2h", head, 70, code, 32)
    return bytes(head)


def _compressed_text(megabytes: int) -> bytes:
    content = b"Comment\0\0" + _nothing(megabytes)
    return struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))


def _nrrd(lines: str) -> bytes:
    return f"NRRD0004\ntype: short\ndimension: 3\nspace: RAS\nendian: little\n{lines}\n\n".encode() + bytes(100)


def _tiff_of(width: int, height: int, compression: int, data: bytes) -> bytes:
    entries = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, compression), (262, 3, 1), (273, 4, 8)]
    entries += [(277, 3, 1), (278, 4, height), (279, 4, len(data))]
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(entries)) + table + bytes(4)


_RAW = "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\nencoding: raw"
_WIDE_FRAME = b",\0\0\0\0" + b"\xff" * 4 + b"\0\x08\0;"
_WIDE_BITMAP = (99, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 1, 1, 0, 0)
SPECIALS: Mapping[str, tuple[str, Callable[[Path], bytes]]] = {
    "bomb of grey": (".png", lambda _: _png_of(30_000, 30_000, 8, 0, _nothing(900))),
    "bomb of colour": (".png", lambda _: _png_of(13_000, 13_000, 8, 2, _nothing(508))),
    "bomb of 16 bit": (".png", lambda _: _png_of(13_000, 13_000, 16, 2, _nothing(1015))),
    "bomb of bits": (".png", lambda _: _png_of(13_000, 13_000, 1, 0, _nothing(22))),
    "largest sizes": (".png", lambda _: _png_of(2**31 - 1, 2**31 - 1, 8, 2, b"")),
    "bomb of text": (".png", lambda _: _png_of(SIDE, SIDE, 8, 0, _nothing(1), _compressed_text(300))),
    "bomb of deflated strip": (".tif", lambda _: _tiff_of(30_000, 30_000, 8, _nothing(900))),
    "deflated strip of 160 M pixels": (".tif", lambda _: _tiff_of(13_000, 13_000, 8, _nothing(170))),
    "bomb of strip with no data": (".tif", lambda _: _tiff_of(2**32 - 1, 2**32 - 1, 1, b"")),
    "strip beyond the end": (".tif", lambda _: _tiff_of(13_000, 13_000, 1, b"")),
    "wide header": (".ppm", lambda _: b"P6 1000000 1000000 255\n"),
    "wide plain header": (".pgm", lambda _: b"P2 13000 13000 255\n" + b"1 " * 1000),
    "number without end": (".pgm", lambda _: b"P5 " + b"9" * 100_000 + b" 1 255\n"),
    "large screen": (".gif", lambda _: b"GIF89a" + b"\xff" * 4 + b"\x80\0\0" + bytes(6) + _WIDE_FRAME),
    "wide bitmap": (".bmp", lambda _: b"BM" + struct.pack("<4I2i2H2I2i2I", *_WIDE_BITMAP)),
    "volume of nothing": (".nii", lambda _: _nifti_head((32_000, 32_000, 32_000))),
    "negative sides": (".nii", lambda _: _nifti_head((-5, -5, -5)) + bytes(1000)),
    "bomb of zeros": (".nii.gz", lambda _: _gzipped_nothing(_nifti_head((1024, 1024, 512)), 2048)),
    "gzip without end": (".nii.gz", lambda _: _gzipped_nothing(_nifti_head((4, 4, 4)), 512)[:-20]),
    "large header": (".nrrd", lambda _: _nrrd("x:=" + "y" * 1_000_000 + f"\nsizes: 4 4 4\n{_RAW}")),
    "endless sizes": (".nrrd", lambda _: _nrrd(f"sizes: 99999 99999 99999\n{_RAW}")),
    "detached voxels": (".nrrd", lambda out: _nrrd(f"sizes: 4 4 4\n{_RAW}\ndata file: {out}/pipe.raw")),
    "detached list": (".nrrd", lambda out: _nrrd(f"sizes: 4 4 4\n{_RAW}\ndatafile: LIST\n{out}/pipe.raw")),
    "absurd size": (".mha", lambda _: _mha((99_999, 99_999, 99_999), b"")),
    "large size": (".mha", lambda _: _mha((1024, 1024, 512), b"")),
    "detached file": (".mha", lambda out: _mha((4, 4, 4), b"", f"{out}/pipe.raw")),
    "detached pattern": (".mha", lambda out: _mha((4, 4, 4), b"", f"{out}/pipe%03d.raw 1 4 1")),
    "second name": (".mha", lambda out: b"ElementDataFile = LOCAL\n" + _mha((4, 4, 4), b"", f"{out}/pipe.raw")),
}


# ---------------------------------------------------------------- places and names


def _linked(folder: Path, number: int, target: Path | str, name: str, suffix: str = ".png") -> Hostile:
    file = f"images/{number:06d}{suffix}"
    (folder / file).symlink_to(target)
    _partner(folder, number, suffix, False)
    return Hostile(file, name, True)


def _series(folder: Path, number: int, target: Path, name: str) -> Hostile:
    """A folder of DICOM files, one of which is a link elsewhere."""
    file = f"images/{number:06d}"
    (folder / file).mkdir()
    (folder / file / "1.dcm").write_bytes(sources()[".dcm"][0])
    (folder / file / "2.dcm").symlink_to(target)
    _partner(folder, number, ".nii.gz", False)
    return Hostile(file, name, True)


def _folder(folder: Path, number: int, _outside: Path, name: str) -> Hostile:
    file = f"images/{number:06d}.png"
    (folder / file).mkdir()
    _partner(folder, number, ".png", False)
    return Hostile(file, name, True)


def _largest(suffix: str, make: Callable[[], bytes]) -> Place:
    """An image of zeros that is as large as an image may be, and its mask."""

    def place(folder: Path, number: int, _outside: Path, name: str) -> Hostile:
        file = f"images/{number:06d}{suffix}"
        (folder / file).write_bytes(make())
        (folder / "masks" / f"{number:06d}.png").write_bytes(_png_of(_LARGEST, _LARGEST, 8, 0, _nothing(32)))
        return Hostile(file, name, False)

    return place


def _pipe(suffix: str) -> Place:
    def make(folder: Path, number: int, _outside: Path, name: str) -> Hostile:
        file = f"images/{number:06d}{suffix}"
        os.mkfifo(folder / file)
        _partner(folder, number, suffix, False)
        return Hostile(file, name, True)

    return make


def _named(stem: str | bytes) -> Place:
    """A sound pair under a name that could be mistaken, break a table or steer a terminal."""

    def make(folder: Path, number: int, _outside: Path, name: str) -> Hostile:
        whole = f"{number:06d}{os.fsdecode(stem)}"
        for kind, content in (("images", _png(_pixels(number))), ("masks", _png(_labels()))):
            (folder / kind / f"{whole}.png").write_bytes(content)
        return Hostile(f"images/{whole}.png", name, not whole.isprintable())

    return make


PLACES: Mapping[str, Place] = {
    "link to a picture outside": lambda f, n, out, name: _linked(f, n, out / "secret.png", name),
    "link to a pipe outside": lambda f, n, out, name: _linked(f, n, out / "pipe.raw", name),
    "link up and out": lambda f, n, out, name: _linked(f, n, f"../../../{out.name}/secret.png", name),
    "link to zeros without end": lambda f, n, out, name: _linked(f, n, "/dev/zero", name),
    "link to nothing": lambda f, n, out, name: _linked(f, n, "nothing.png", name),
    "link to itself": lambda f, n, out, name: _linked(f, n, f"{n:06d}.png", name),
    "largest colour image": _largest(".png", lambda: _png_of(_LARGEST, _LARGEST, 8, 2, _nothing(96))),
    "largest colour image of 16 bit": _largest(".png", lambda: _png_of(_LARGEST, _LARGEST, 16, 2, _nothing(192))),
    "largest strip": _largest(".tif", lambda: _tiff_of(_LARGEST, _LARGEST, 8, _nothing(32))),
    "folder": _folder,
    "pipe": _pipe(".png"),
    "pipe as TIFF": _pipe(".tif"),
    "pipe as volume": _pipe(".nii.gz"),
    "name of two lines": _named("a\nERROR: all is lost"),
    "name that colours the terminal": _named("\x1b[31mred\x1b[2J"),
    "name that is no UTF-8": _named(b"\xff\xfe\x80"),
    "name that turns the direction": _named("\u202egnp.exe"),
    "name with markup": _named("[bold red]x[-] %s {0}"),
    "name of a formula": _named("=cmd|' calc'!A0"),
    "name with quotes and commas": _named("\"x\",'y';z"),
    "name in other letters": _named("Größe-日本-ملف"),
    "name with a tab and a bell": _named("\t\a"),
    "name as long as may be": _named("n" * 240),
}
DICOM_PLACES: Mapping[str, Place] = {
    "pipe as DICOM": _pipe(".dcm"),
    "link to a picture outside, as DICOM": lambda f, n, out, name: _linked(f, n, out / "secret.png", name, ".dcm"),
    "link to a pipe outside, as DICOM": lambda f, n, out, name: _linked(f, n, out / "pipe.raw", name, ".dcm"),
    "link to zeros without end, as DICOM": lambda f, n, out, name: _linked(f, n, "/dev/zero", name, ".dcm"),
    "series with a link outside": lambda f, n, out, name: _series(f, n, out / "secret.png", name),
    "series with a link to a pipe": lambda f, n, out, name: _series(f, n, out / "pipe.raw", name),
}


# ---------------------------------------------------------------- the process under watch


def main() -> None:
    """Prepare the sites of ``argv[1]`` and print what was used, broken, reached, how long and how large it got.

    A file that takes longer than ``HANG_SECONDS`` ends the process with a trace of all threads; ``slowest`` are in
    seconds of the processor.
    """
    from importing import import_sites

    from fedsca_pipeline.config import PreprocessingConfig, SplitConfig
    from fedsca_pipeline.data.importers import find_importer
    from fedsca_pipeline.data.preprocessing.prepare import prepare_site

    raw, scratch, outside = (Path(argument) for argument in sys.argv[1:4])
    config = PreprocessingConfig(image_size=32, on_bad_sample="quarantine", split=SplitConfig(validation=1, test=1))
    warnings.simplefilter("ignore")
    # What libraries need in any case is not to be charged to a file.
    import_sites(scratch / "sound", find_importer("dicom", raw / "sound", {}), raw / "sound", quarantine=True)
    prepare_site(scratch / "sound", "sound", config, seed=0, scratch=scratch)
    before = _resident()
    watch = _Watch(raw, outside)
    sys.addaudithook(watch)
    prepared = prepare_site(raw, "hostile", config, seed=0, scratch=scratch)
    prepared.manifest.to_csv(scratch / "manifest.csv", index=False)
    used = [*prepared.manifest["image"], *prepared.manifest["mask"]]
    found = {"hostile": {"used": used, "broken": prepared.report["broken"]}}

    site, source = "hostile_dicom", raw / "hostile_dicom"
    importer = find_importer("dicom", source, {"site": site})
    broken = import_sites(scratch / "raw", importer, source, quarantine=True)[site]["broken"]
    prepare_site(scratch / "raw", site, config, seed=0, scratch=scratch)
    named = _names(scratch / "private" / site / "names.csv")
    imported = [named[path.name.split(".")[0]] for path in (scratch / "raw" / site / "images").iterdir()]
    broken = [{**entry, "file": named[entry["file"].removeprefix("image ")]} for entry in broken]
    found[site] = {"used": imported, "broken": broken}
    faulthandler.cancel_dump_traceback_later()
    peak = _peak() - before
    json.dump({"sites": found, "peak": peak, **watch.findings()}, sys.stdout)


def _names(path: Path) -> dict[str, str]:
    """Return the source file of each hashed name."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
        return {row["name"]: row["file"] for row in csv.DictReader(stream)}


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    # What getrusage tells begins with the memory of the process that started this one.
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


class _Watch:
    """An audit hook: which files are opened, the work until the next one is, by how much memory's peak rose."""

    def __init__(self, raw: Path, outside: Path) -> None:
        self._site, self._outside = f"{raw.resolve()}/", f"{outside.resolve()}/"
        self._last, self._since, self._peak = "", 0.0, 0
        self.reached: set[str] = set()
        self.seconds: dict[str, float] = {}
        self.grown: dict[str, int] = {}

    def findings(self) -> dict[str, Any]:
        """Return the worst of it."""

        def most(found: Mapping[str, float]) -> list[tuple[str, float]]:
            return sorted(found.items(), key=lambda item: -item[1])[:12]

        return {"reached": sorted(self.reached), "slowest": most(self.seconds), "grown": most(self.grown)}

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str | bytes):
            return
        path = os.fsdecode(arguments[0])
        if path.startswith((self._outside, "/dev/zero", "/etc/passwd")):
            self.reached.add(path)
        if not path.startswith(self._site):
            return
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        now, peak = time.process_time(), _peak()
        if self._last:
            self.seconds[self._last] = max(self.seconds.get(self._last, 0.0), now - self._since)
            self.grown[self._last] = self.grown.get(self._last, 0) + peak - self._peak
        self._last, self._since, self._peak = path.removeprefix(self._site), now, peak


if __name__ == "__main__":
    main()
