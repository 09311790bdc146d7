"""A Slurm of one node for the tests of this folder; they are skipped where it cannot run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def why_not() -> str | None:
    """Why no Slurm can be started here."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    missing = [name for name in ("slurmctld", "slurmd", "munged") if not shutil.which(name)]
    return f"not installed: {', '.join(missing)} (tests/slurm/install.sh)" if missing else None


def pytest_collection_modifyitems(items):
    reason = why_not()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A running Slurm; sbatch and its like find it through the environment."""
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run(["bash", HERE / "start.sh", folder], capture_output=True, text=True)
    try:
        if started.returncode:
            pytest.skip(f"Slurm does not start here: {started.stderr.strip()}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            # Jobs inherit the environment: this Python, no hub, and as many threads everywhere.
            patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
            for name, value in (("HF_HUB_OFFLINE", "1"), ("TRANSFORMERS_OFFLINE", "1"), ("OMP_NUM_THREADS", "1")):
                patch.setenv(name, value)
            yield
    finally:
        subprocess.run(["bash", HERE / "stop.sh", folder])
