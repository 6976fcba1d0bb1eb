"""A layout for tests of the server step, which sees one flat vector."""

from __future__ import annotations

from fedsca_pipeline.model.layout import TensorLayout


def flat_layout(*sizes: int) -> TensorLayout:
    """Return a layout of one block per size, each with one adapter tensor of that many values."""
    names = [f"block{number}" for number in range(len(sizes))]
    return TensorLayout(
        tuple((name,) for name in names), (), {n: (size,) for n, size in zip(names, sizes, strict=True)}
    )
