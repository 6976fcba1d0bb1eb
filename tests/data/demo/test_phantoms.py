from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import splev, splprep

from fedsca_pipeline.data.demo.phantoms import spline_through


@given(st.integers(0, 2**32 - 1))
def test_a_vessel_follows_the_spline_that_scipy_draws_through_its_points(seed: int) -> None:
    points = np.linspace([-0.8, 0.1], [0.6, -0.2], 6) + np.random.default_rng(seed).normal(0.0, 0.17, (6, 2))

    drawn = spline_through(points, 200)

    expected = np.array(splev(np.linspace(0.0, 1.0, 200), splprep(points.T, s=0.0)[0])).T
    # Both solve the same equations in another order.
    np.testing.assert_allclose(drawn, expected, atol=1e-8)
