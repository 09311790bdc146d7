"""Silence Lightning's needless messages."""

import logging
import warnings

_NOT_OUR_CASE = (
    ".*does not have many workers.*",  # images in memory need no loader processes
    ".*smaller than the logging interval.*",
    ".*module\\(s\\) in eval mode.*",  # the frozen networks have no dropout
    ".*LeafSpec.*",
    ".*`srun` command is available on your system but is not used.*",  # one process is what was asked for
)


def quiet() -> None:
    """Hide Lightning's advertisements and the warnings that do not apply; errors and the bar stay."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NOT_OUR_CASE:
        warnings.filterwarnings("ignore", message=message)
