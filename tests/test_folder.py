"""A run has a folder of its own, and goes on in it only after its last checkpoint."""

import re
from zipfile import ZipFile

import pytest

from rl.args import TorchArgs
from rl.run.folder import choose_run_folder, is_whole, run_before_restart


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def checkpoints(tmp_path):
    """Three checkpoints of a run; their content does not matter here."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    paths = [folder / f"update_{update:08d}.ckpt" for update in (1, 2, 10)]
    for path in paths:
        with ZipFile(path, "w") as file:
            file.writestr("data", b"weights" * 100)
    return paths


def test_a_new_folder_names_date_environment_experiment_and_seed_and_no_two_are_alike(tmp_path):
    args = TorchArgs(env_id="ALE/Pong-v5", exp_name="try", seed=7)
    folders = {choose_run_folder(args) for _ in range(20)}
    assert len(folders) == 20
    for folder in folders:
        assert folder.parent == TorchArgs.log_root
        assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_ALE-Pong-v5_try_seed7_[0-9a-f]{4}", folder.name)
    assert list(tmp_path.iterdir()) == []  # chosen, not made


def test_a_run_goes_on_in_its_folder_after_its_last_checkpoint(checkpoints, capsys):
    assert choose_run_folder(TorchArgs(resume=str(checkpoints[-1]))) == checkpoints[0].parents[1]
    assert capsys.readouterr().err == ""


def test_after_an_earlier_checkpoint_it_goes_on_in_a_new_folder_and_a_line_says_so(checkpoints, capsys):
    folder = choose_run_folder(TorchArgs(resume=str(checkpoints[1])))
    assert folder.parent == TorchArgs.log_root
    words = "is not the last checkpoint of a run: going on in a new folder"
    assert capsys.readouterr().err == f"{checkpoints[1]} {words}, {folder}\n"


def test_a_later_checkpoint_that_is_damaged_does_not_count(checkpoints):
    content = bytearray(checkpoints[2].read_bytes())
    content[50] ^= 1
    checkpoints[2].write_bytes(content)
    assert choose_run_folder(TorchArgs(resume=str(checkpoints[1]))) == checkpoints[0].parents[1]


@pytest.mark.parametrize("place", ["elsewhere/update_00000010.ckpt", "run/checkpoints/best.ckpt"])
def test_a_checkpoint_that_was_copied_or_renamed_is_no_last_one_of_a_run(checkpoints, tmp_path, place):
    copy = tmp_path / place
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(checkpoints[2].read_bytes())
    assert choose_run_folder(TorchArgs(resume=str(copy))).parent == TorchArgs.log_root


def test_a_checkpoint_is_whole_until_a_bit_of_it_flips_or_its_end_is_cut(checkpoints, tmp_path):
    content = checkpoints[0].read_bytes()
    assert is_whole(checkpoints[0])
    flipped = bytearray(content)
    flipped[len("PK") + 50] ^= 4  # in the data
    for damaged in (bytes(flipped), content[: len(content) // 2], b"", b"text"):
        (tmp_path / "file").write_bytes(damaged)
        assert not is_whole(tmp_path / "file")
    assert not is_whole(tmp_path / "nowhere")
    assert not is_whole(tmp_path)


def test_what_the_launcher_restarts_goes_on_in_the_folder_of_before(tmp_path, monkeypatch):
    for attempt in (0, 1):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"attempt_{attempt}" / "0" / "error.json"))
        if attempt == 0:
            assert run_before_restart() is None
            first = choose_run_folder(TorchArgs())
        assert run_before_restart() == first
        assert choose_run_folder(TorchArgs(seed=2)) == first


def test_only_the_first_process_leaves_a_note_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / "1" / "error.json"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    choose_run_folder(TorchArgs())
    assert run_before_restart() is None
