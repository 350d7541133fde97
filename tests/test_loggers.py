"""The loggers take the scalars of a run, and a run that is resumed goes on where it was."""

import csv
import time
from types import SimpleNamespace

import pytest
from tensorboard.plugins.hparams import plugin_data_pb2

from benchmarks.runs import hyperparameters, read_events, scalars
from rl.args import TorchArgs
from rl.run.loggers import CsvLog, TensorBoardLog, WandbLog


def a_run(folder, updates_done=0, steps=10):
    return SimpleNamespace(folder=folder, purge_step=updates_done * steps + 1, args=TorchArgs(seed=7), is_first=True)


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_a_row_for_each_step_and_a_column_for_each_name(tmp_path):
    log = CsvLog(a_run(tmp_path))
    log.log({"Loss": 1.5}, 10)
    log.log({"Loss": 1.0}, 20)
    assert rows(tmp_path) == [{"step": "10", "Loss": "1.5"}, {"step": "20", "Loss": "1.0"}]
    log.log({"Loss": 0.5, "Return": 3.0}, 30)
    log.log({"Test": 4.0}, 30)
    assert rows(tmp_path) == [
        {"step": "10", "Loss": "1.5", "Return": "", "Test": ""},
        {"step": "20", "Loss": "1.0", "Return": "", "Test": ""},
        {"step": "30", "Loss": "0.5", "Return": "3.0", "Test": "4.0"},
    ]


@pytest.mark.parametrize("updates_done", [0, 1, 2, 3])
def test_a_resumed_run_writes_the_table_that_the_run_would_have_written_which_never_stopped(tmp_path, updates_done):
    points = [({"Loss": 1.5}, 10), ({"Loss": 1.0, "Return": 2.0}, 20), ({"Loss": 0.5, "Return": 3.0}, 30)]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
        log = CsvLog(a_run(folder))
        for scalars_, step in points:
            log.log(scalars_, step)
    log = CsvLog(a_run(stopped, updates_done))
    for scalars_, step in points[updates_done:]:
        log.log(scalars_, step)
    assert (stopped / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_tensorboard_has_the_scalars_the_flags_as_a_table_and_the_flags_by_which_runs_are_compared(tmp_path):
    log = TensorBoardLog(a_run(tmp_path))
    log.log({"Loss": 1.5}, 10)
    log.close()
    assert scalars(tmp_path) == {"Loss": [(10, 1.5)]}
    table = hyperparameters(tmp_path)
    assert set(table) == set(vars(TorchArgs()))
    assert {"seed": "7", "hidden_sizes": "(64, 64)"}.items() <= table.items()
    data = read_events(tmp_path).PluginTagToContent("hparams")["_hparams_/session_start_info"]
    flags = plugin_data_pb2.HParamsPluginData.FromString(data).session_start_info.hparams
    assert flags["seed"].number_value == 7


def test_weights_and_biases_keeps_the_scalars_and_the_flags_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = WandbLog(a_run(tmp_path))
    log.log({"Loss": 1.5}, 10)
    log.close()
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    until = time.monotonic() + 60  # a process of its own writes it
    while not (b"Loss" in (found := kept.read_bytes()) and b"hidden_sizes" in found):
        assert time.monotonic() < until, found
        time.sleep(0.1)
