"""The examples in docstrings run, and the functions that users call have one."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "fedsca_pipeline"
WITH_EXAMPLES = sorted(
    path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_of_a_module_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)

    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("model.site_model", "load_site_model"),
        ("federation.strategies.base", "Strategy"),
        ("federation.messages.codec", "encode"),
        ("federation.messages.codec", "decode"),
        ("data.readers.volumes", "read_volume"),
        ("metrics.images", "dice_per_image"),
        ("metrics.images", "score_images"),
        ("metrics.volumes", "score_volume"),
    ],
)
def test_what_users_call_has_a_runnable_example(module: str, name: str) -> None:
    documented = getattr(importlib.import_module(f"fedsca_pipeline.{module}"), name)

    assert doctest.DocTestFinder(recurse=False).find(documented, name)[0].examples
