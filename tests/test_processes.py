"""What launchers say in the environment: a batch job with and without srun."""

import pytest
from test_reliability import CONFIG, SHORT, train
from test_scripts import refused, run_here

TASKS = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_PROCID": "0",
         "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "train"}  # fmt: skip


@pytest.fixture(autouse=True)
def batch_job(monkeypatch):
    for name, value in TASKS.items():
        monkeypatch.setenv(name, value)


def test_without_srun_a_process_of_a_batch_job_is_alone(tmp_path):
    train(tmp_path, "training.steps=1")
    assert len(list(tmp_path.glob("*/concept.safetensors"))) == 1


def test_as_many_processes_as_devices_or_a_word(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    result = run_here(capfd, "train_ico.py", "--config", CONFIG, "--logdir", tmp_path, *SHORT)
    refused(result, "2 processes", "training.devices")
    assert not list(tmp_path.iterdir())
