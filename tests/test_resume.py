"""E5: a run that is stopped and resumed equals the run that never stopped, bit for bit."""

import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.runs import checkpoint_path, differences, last_checkpoint, run_folders, scalars
from tests.launching import ROOT, fabric_run, python, run, torchrun

TORCH, FABRIC, DECOUPLED = "train_torch.py", "train_fabric.py", "train_fabric_decoupled.py"
UPDATES = 4
FLAGS = ["--num-envs=2", "--update-epochs=2", "--test-episodes=2", "--checkpoint-every=1", "--keep-checkpoints=9"]
VECTOR = ["--env-id=LunarLander-v3", "--num-steps=256", "--total-timesteps=1024"]
CONTINUOUS = ["--env-id=BipedalWalker-v3", "--num-steps=256", "--total-timesteps=1024", "--target-kl=0.02"]
CONTINUOUS += ["--normalize-observations", "--normalize-rewards", "--eval-every=2", "--eval-episodes=1"]
IMAGE = ["--env-id=CarRacing-v3", "--num-steps=48", "--total-timesteps=192", "--per-rank-batch-size=16"]
IMAGE += ["--env-kwargs", "max_episode_steps=20"]
# The command, its environment, and after which updates it is stopped.
CASES = {
    "torch, 1 process": (partial(python, TORCH, "--compile"), VECTOR, [2]),
    "torch, 2 processes": (partial(torchrun, 2, TORCH), CONTINUOUS, [1]),
    "torch, 3 processes": (
        partial(torchrun, 3, TORCH),
        ["--env-id=LunarLander-v3", "--num-steps=252", "--total-timesteps=1008"],
        [2],
    ),
    "fabric, 1 process": (partial(python, FABRIC), IMAGE, [3]),
    "decoupled, 1 trainer": (partial(fabric_run, 2, DECOUPLED), IMAGE, [2]),
    "decoupled, overlapping": (partial(fabric_run, 2, DECOUPLED, "--overlap"), CONTINUOUS, [2]),
}


def start(command, flags, cwd):
    cwd.mkdir(exist_ok=True)
    finished = run(command(*flags), cwd=cwd, timeout=300)  # to compile takes long on a busy machine
    assert finished.returncode == 0, finished.output
    (folder,) = run_folders(cwd)
    return folder


def resume(command, uninterrupted, after, cwd):
    """What is left of a run that was stopped after an update, resumed."""
    shutil.copytree(uninterrupted.parents[2], cwd)
    (folder,) = run_folders(cwd)
    for update in range(after + 1, UPDATES + 1):
        checkpoint_path(folder, update).unlink()
    return start(command, ["--resume", str(folder)], cwd)


def assert_equal_ends(folder, other):
    """Two runs ended after the last update with the same agent and the same state of the optimizer, bit for bit."""
    one, two = last_checkpoint(folder), last_checkpoint(other)
    assert one["update"] == two["update"] == UPDATES
    assert differences(one, two) == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each case: the run that was never stopped, and those that were; two launches at a time."""
    root = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor(2) as pool:

        def case(name):
            command, flags, cuts = CASES[name]
            folder = root / name / "uninterrupted"
            folder.mkdir(parents=True)
            uninterrupted = start(command, [*FLAGS, *flags], folder)
            return uninterrupted, {cut: resume(command, uninterrupted, cut, root / name / str(cut)) for cut in cuts}

        return dict(zip(CASES, pool.map(case, CASES), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_e5_a_run_that_was_stopped_and_resumed_equals_the_run_that_never_stopped(runs, name):
    uninterrupted, resumed = runs[name]
    expected_logs = scalars(uninterrupted, times=False)
    assert len(expected_logs["Loss/policy_loss"]) == UPDATES
    for folder in resumed.values():
        assert_equal_ends(folder, uninterrupted)
        assert scalars(folder, times=False) == expected_logs


def test_the_weights_go_on_changing_after_a_resume(runs):
    uninterrupted, _ = runs["torch, 1 process"]
    last, before = (torch.load(checkpoint_path(uninterrupted, update), weights_only=True)["agent"] for update in (4, 3))
    assert not torch.equal(last["actor.0.weight"], before["actor.0.weight"])


def test_with_overlap_a_policy_acts_that_is_one_update_older_than_the_one_it_improves(runs):
    folder, _ = runs["decoupled, overlapping"]
    assert [value for _, value in scalars(folder)["Info/staleness"]] == [0, 1, 1, 1]
    checkpoints = [torch.load(checkpoint_path(folder, update), weights_only=True) for update in range(1, UPDATES + 1)]
    weights = [
        torch.cat([tensor.flatten() for name, tensor in loaded["agent"].items() if "normalizer" not in name])
        for loaded in checkpoints
    ]
    for update in range(2, UPDATES + 1):  # what acts in the rollout after an update are the weights before it
        assert torch.equal(checkpoints[update - 1]["acting_weights"], weights[update - 2])
        assert not torch.equal(weights[update - 1], weights[update - 2])


@pytest.fixture
def stopped(runs, tmp_path):
    """A run of CarRacing in one process with two checkpoints."""
    shutil.copytree(runs["fabric, 1 process"][0].parents[2], tmp_path / "copy")
    (folder,) = run_folders(tmp_path / "copy")
    for update in (3, 4):
        checkpoint_path(folder, update).unlink()
    return folder


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    """Flip it in the middle of the largest tensor."""
    largest = max(zipfile.ZipFile(path).infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(runs, stopped, damage):
    newest = checkpoint_path(stopped, 2)
    damage(newest)
    finished = run(python(FABRIC, "--resume", str(stopped)), cwd=stopped.parents[2], timeout=60)
    assert finished.returncode == 0
    assert finished.stderr.count(f"{newest} cannot be read") == finished.stderr.count("going back") == 1
    assert_equal_ends(stopped, runs["fabric, 1 process"][0])


def test_a_damaged_checkpoint_that_was_asked_for_is_refused_in_one_line(stopped):
    flip_a_bit(newest := checkpoint_path(stopped, 2))
    finished = run(python(FABRIC, "--resume", str(newest)), cwd=stopped.parents[2], timeout=60)
    assert finished.returncode == 1
    (line,) = finished.output.splitlines()
    assert line.startswith(f"error: {newest} cannot be read")


def test_a_run_that_cannot_go_on_so_is_refused_in_one_line(stopped):
    flags = ["--resume", str(stopped), "--env-id", "CartPole-v1"]
    finished = run(python(FABRIC, *flags), cwd=stopped.parents[2], timeout=30)
    assert finished.returncode == 1
    assert finished.output == "error: --env-id cannot change when a run is resumed: it is 'CarRacing-v3'\n"


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    flags = ["--total-timesteps=640", "--num-steps=128", "--checkpoint-every=2", "--keep-checkpoints=2"]
    folder = start(partial(python, TORCH), flags, tmp_path)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "update_00000004.ckpt",
        "update_00000005.ckpt",
    ]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run of four updates whose checkpoints are all kept."""
    flags = ["--total-timesteps=512", "--num-steps=128", "--keep-checkpoints=9", "--test-episodes=1"]
    return start(partial(python, TORCH), flags, tmp_path_factory.mktemp("finished"))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["an older checkpoint", "a copy elsewhere"])
def test_a_resume_from_what_is_not_the_last_of_a_run_goes_on_in_a_new_folder_and_touches_nothing(
    finished_run, tmp_path, place
):
    cwd = finished_run.parents[2]
    resumed = checkpoint_path(finished_run, 2)
    if place == "a copy elsewhere":
        (tmp_path / "b").mkdir()
        resumed = Path(shutil.copy(resumed, tmp_path / "b" / "best.ckpt"))
    before, folders = contents(finished_run), set(run_folders(cwd))
    finished = run(python(TORCH, "--resume", str(resumed)), cwd, timeout=60)
    assert finished.returncode == 0, finished.output
    (new,) = set(run_folders(cwd)) - folders
    assert finished.stderr.count(f"{resumed} is not the last checkpoint of a run: going on in a new folder") == 1
    assert contents(finished_run) == before
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] in ([], ["best.ckpt"])
    assert_equal_ends(new, finished_run)
    assert scalars(new, times=False) == {
        tag: [point for point in points if point[0] > 256] for tag, points in scalars(finished_run, times=False).items()
    }


def test_a_raised_budget_that_makes_the_annealed_learning_rate_jump_is_said_in_one_line(finished_run, tmp_path):
    shutil.copytree(finished_run.parents[2], tmp_path / "copy")
    (folder,) = run_folders(tmp_path / "copy")[:1]
    flags = ["--resume", str(folder), "--total-timesteps=640"]
    finished = run(python(TORCH, *flags), tmp_path / "copy", timeout=60)
    assert finished.returncode == 0, finished.output
    words = "with another --total-timesteps the learning rate, annealed, goes from 0.00025 to 0.0002"
    assert finished.stderr.splitlines().count(words) == 1


RETIRED = ["--env-id=LunarLander-v2", "--num-steps=100", "--total-timesteps=400", "--num-envs=3", *FLAGS[1:]]


def test_a_run_is_resumed_with_its_own_command_line_retired_id_and_rounded_steps_included(tmp_path):
    folder = start(partial(python, TORCH), RETIRED, tmp_path)
    loaded = torch.load(checkpoint_path(folder, UPDATES), weights_only=True)
    assert (loaded["update"], loaded["global_step"], loaded["args"]["num_steps"]) == (UPDATES, 4 * 102, 100)
    checkpoint_path(folder, UPDATES).unlink()
    finished = run(python(TORCH, *RETIRED, "--resume", str(folder)), tmp_path, timeout=60)
    assert finished.returncode == 0, finished.output
    assert finished.stderr.count("LunarLander-v2 is retired, running its successor LunarLander-v3") == 1
    assert differences(last_checkpoint(folder), loaded) == []


def test_a_run_whose_environments_cannot_be_put_back_goes_on_with_new_episodes_and_one_line_says_so(tmp_path):
    flags = ["--env-id=tests.hard_envs:LivesOn-v0", "--num-steps=256", "--total-timesteps=1024", *FLAGS]
    folder = start(partial(torchrun, 2, TORCH), flags, tmp_path)
    for update in (3, 4):
        checkpoint_path(folder, update).unlink()
    finished = run(torchrun(2, TORCH, "--resume", str(folder)), tmp_path, timeout=60)
    assert finished.returncode == 0, finished.output
    assert finished.stderr.count("from here on the run is not bit for bit the one that was stopped") == 1
    assert run_folders(tmp_path) == [folder]
    assert checkpoint_path(folder, UPDATES).exists()


def test_a_run_with_an_environment_of_an_unusual_make_is_resumed_bit_for_bit(tmp_path):
    """The others of `tests/hard_envs.py` are put back in tests/test_replay.py."""
    flags = ["--env-id=tests.hard_envs:SeededOnce-v0", "--num-steps=256", "--total-timesteps=1024", *FLAGS]
    uninterrupted = start(partial(python, TORCH), [*flags, "--normalize-rewards"], tmp_path / "run")
    folder = resume(partial(python, TORCH), uninterrupted, 2, tmp_path / "resumed")
    assert_equal_ends(folder, uninterrupted)
    assert scalars(folder, times=False) == scalars(uninterrupted, times=False)


def test_an_edited_gradient_step_and_an_edited_agent_are_resumed_bit_for_bit(tmp_path):
    """The compiled step and NumPy step aside at the start of both processes, so both take the shown way."""
    edited = edit(tmp_path / "edited")
    flags = ["--num-steps=256", "--total-timesteps=1024", "--compile", *FLAGS]
    uninterrupted = start(partial(python, edited), flags, tmp_path / "run")
    folder = resume(partial(python, edited), uninterrupted, 2, tmp_path / "resumed")
    assert_equal_ends(folder, uninterrupted)


def edit(folder):
    """A fork of the suite with an L2 term in the script and an ELU in the agent."""
    shutil.copytree(ROOT / "rl", folder / "rl")
    script = (ROOT / TORCH).read_text()
    shown = "losses.loss.backward()"
    assert script.count(shown) == 1
    l2 = "(losses.loss + 1e-3 * sum(weight.square().sum() for weight in agent.parameters())).backward()"
    (folder / TORCH).write_text(script.replace(shown, l2))
    agent = folder / "rl" / "ppo" / "agent.py"
    assert agent.read_text().count("nn.ReLU") == 1
    agent.write_text(agent.read_text().replace("nn.ReLU", "nn.ELU"))
    return folder / TORCH


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"environments": {}}, "something else as environments", id="before the processes meet"),
        pytest.param({"agent": {}}, "does not fit", id="afterwards"),
    ],
)
def test_a_hostile_checkpoint_is_refused_in_one_line(finished_run, tmp_path, changes, words):
    """Many more are refused in tests/test_refused_checkpoints.py."""
    path = tmp_path / "hostile.ckpt"
    torch.save(torch.load(checkpoint_path(finished_run, 2), weights_only=True) | changes, path)
    finished = run(python(TORCH, "--resume", str(path), "--num-steps=128"), tmp_path, timeout=60)
    assert finished.returncode == 1
    (line,) = finished.error_lines
    assert words in line, line
    assert "Traceback" not in finished.output


def test_a_run_that_is_killed_when_all_but_its_test_is_done_only_tests_when_it_is_restarted(tmp_path):
    flags = [*VECTOR, *FLAGS, "--overlap"]
    expected = start(partial(torchrun, 2, DECOUPLED), flags, tmp_path / "undisturbed")
    dying = torchrun(2, "benchmarks/dying.py", str(ROOT / DECOUPLED), *flags, options=("--max-restarts=1",))
    environment = {
        "DYING_MOMENT": "after the rename",
        "DYING_CHECKPOINT": f"update_{UPDATES:08d}",
        "DYING_MARKER": str(tmp_path / "died"),
        "PYTHONPATH": str(ROOT),
    }
    (tmp_path / "killed").mkdir()
    finished = run(dying, tmp_path / "killed", timeout=120, env=environment)
    assert finished.returncode == 0, finished.output
    assert (tmp_path / "died").exists()
    (folder,) = run_folders(tmp_path / "killed")
    assert scalars(folder, times=False) == scalars(expected, times=False)
    assert finished.output.count(f"restarted: going on after update {UPDATES}") == 1
