"""What a suite's report has besides its tables."""

import numpy as np
import pytest

from dci.experiments.comparison import _label


@pytest.mark.parametrize("width", [100, 128])
def test_a_rows_label_is_whole_on_its_tile(width):
    """Settings that differ in their last digit alone are told apart, and nothing is cut off at the right."""
    texts = [f"custom-diffusion-steps=200-learning_rate=0.0005,\nlambda-agg_lambda={value}" for value in (-2, -1, 1, 2)]
    tiles = [np.asarray(_label(text, width)) for text in [*texts, "ico,\nplain"]]
    assert len({tile.tobytes() for tile in tiles}) == 5
    assert all(tile.shape == (width, width, 3) and tile.min() < 128 and (tile[:, -1] == 255).all() for tile in tiles)
