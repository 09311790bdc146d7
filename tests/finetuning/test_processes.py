"""What launchers say in the environment: a batch job with and without srun."""

import pytest
import pytorch_lightning as pl
from helpers import refused, run_here
from test_reliability import CONFIG, SHORT

from dci.finetuning import distributed

pytestmark = pytest.mark.slow

TASKS = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NAME": "train",
}


@pytest.fixture(autouse=True)
def batch_job(monkeypatch):
    for name, value in TASKS.items():
        monkeypatch.setenv(name, value)


def trainer(plugins):
    return pl.Trainer(
        accelerator="cpu",
        devices=4,
        strategy="ddp",
        plugins=plugins,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_without_srun_a_batch_job_starts_its_own_processes(monkeypatch):
    assert trainer([]).strategy.cluster_environment.creates_processes_externally  # it would wait for them
    assert distributed.world_size() == 1
    environment = trainer(distributed.environments()).strategy.cluster_environment
    assert not environment.creates_processes_externally
    # With srun it is Lightning's own business.
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert distributed.world_size() == 2 and distributed.environments() == []


def test_as_many_processes_as_devices_or_a_word(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    result = run_here(capfd, "train_ico.py", "--config", CONFIG, "--logdir", tmp_path, *SHORT)
    refused(result, "2 processes", "training.devices")
    assert not list(tmp_path.iterdir())
