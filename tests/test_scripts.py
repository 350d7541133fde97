"""Each script, launched for real by each launcher, does its updates and leaves what the design promises."""

import csv
import hashlib
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import NamedTuple

import imageio.v3 as iio
import pytest
from tensorboard.plugins.hparams import plugin_data_pb2

from benchmarks.runs import hyperparameters, read_events, run_folders, scalars
from rl.args import DecoupledArgs, FabricArgs, TorchArgs
from tests.launching import assert_no_process_is_left, fabric_run, python, run, torchrun

TIMEOUT = 120
SEED = 7
EXPERIMENT = "launched"
TORCH, FABRIC, DECOUPLED = "train_torch.py", "train_fabric.py", "train_fabric_decoupled.py"
SCRIPT_ARGS = {TORCH: TorchArgs, FABRIC: FabricArgs, DECOUPLED: DecoupledArgs}
COUPLED_OPTIONS = ("--accelerator=cpu", "--strategy=ddp")


class Launch(NamedTuple):
    launcher: str
    processes: int
    script: str
    flags: str = ""
    updates: int = 3
    num_steps: int = 512  # those of the log
    env_id: str = "CartPole-v1"
    notices: tuple[str, ...] = ()  # lines of ours that this launch must print, once


LAUNCHES = {
    "decoupled": Launch("fabric run", 3, DECOUPLED, "--num-envs 4 --logger csv tensorboard"),
    # 512 rows for 3 trainers
    "decoupled, uneven, shared": Launch("fabric run", 4, DECOUPLED, "--num-envs 4 --share-data", updates=4),
    # 513 rows for 2 trainers
    "decoupled, uneven, torchrun": Launch(
        "torchrun",
        3,
        DECOUPLED,
        "--num-envs 3",
        num_steps=513,
        notices=("--num-steps 512 rounded up to 513, the same for every environment",),
    ),
    "fabric": Launch("fabric run", 2, FABRIC, "--logger csv tensorboard"),
    # One environment, and a policy that hardly learns: short episodes, so more to record and less to render.
    "fabric, alone, videos": Launch(
        "python", 1, FABRIC, "--capture-video --num-envs 1 --num-steps 128 --learning-rate 1e-6", num_steps=128
    ),
    "torch": Launch("torchrun", 2, TORCH, "--logger csv tensorboard"),
    "torch, alone": Launch(
        "python",
        1,
        TORCH,
        "--env-id LunarLander-v2",
        env_id="LunarLander-v3",
        notices=("LunarLander-v2 is retired, running its successor LunarLander-v3",),
    ),
}
VIDEOS = "fabric, alone, videos"

# What a launcher itself says on stderr.
LAUNCHER_NOTICES = {"torchrun": r"W\d{4} .* torch/distributed/run\.py:\d+\] (\*+|Setting OMP_NUM_THREADS .*)?"}

ONCE_PER_UPDATE = (
    "Loss/policy_loss",
    "Loss/value_loss",
    "Loss/entropy_loss",
    "Info/learning_rate",
    "Time/step_per_second",
)
OF_EPISODES = ("Rewards/rew_avg", "Game/ep_len_avg")
GROUPS = {"Rewards", "Game", "Loss", "Info", "Time", "Test"}

every_launch = pytest.mark.parametrize("name", LAUNCHES)


def command(launch):
    # A few steps more than the updates need: they do not make one more update.
    total = launch.updates * launch.num_steps + 100
    flags = f"--num-steps 512 --total-timesteps {total} --exp-name {EXPERIMENT} --seed {SEED} {launch.flags}".split()
    if launch.launcher == "python":
        return python(launch.script, *flags)
    if launch.launcher == "torchrun":
        return torchrun(launch.processes, launch.script, *flags)
    options = COUPLED_OPTIONS if launch.script == FABRIC else ()
    return fabric_run(launch.processes, launch.script, *flags, options=options)


@pytest.fixture(scope="module")
def finished(request, tmp_path_factory):
    """A function that returns a finished launch.

    What the selected tests need is launched once, two at a time: a launcher that imports leaves a core idle.
    """
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    wanted = {item.callspec.params["name"] for item in here}
    tmp_path_factory.getbasetemp()  # makes it, which threads must not do at once
    with ThreadPoolExecutor(2) as pool:
        futures = {
            name: pool.submit(run, command(launch), tmp_path_factory.mktemp("launch"), TIMEOUT)
            for name, launch in LAUNCHES.items()
            if name in wanted
        }

        def get(name):
            finished = futures[name].result()
            assert finished.returncode == 0, finished.output
            return finished

        yield get
        pool.shutdown(cancel_futures=True)


def run_folder(finished):
    (folder,) = run_folders(finished.cwd)
    return folder


@every_launch
def test_a_launch_leaves_no_process_behind(finished, name):
    assert_no_process_is_left(finished(name))


@every_launch
def test_the_one_run_folder_lies_where_the_script_logs_and_names_environment_experiment_and_seed(finished, name):
    folder, launch = run_folder(finished(name)), LAUNCHES[name]
    logs = {TORCH: "torch_logs", FABRIC: "fabric_logs", DECOUPLED: "fabric_decoupled_logs"}[launch.script]
    assert folder.relative_to(finished(name).cwd).parts[:2] == ("logs", logs)
    date = r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d"
    assert re.fullmatch(f"{date}_{launch.env_id}_{EXPERIMENT}_seed{SEED}_[0-9a-f]+", folder.name)
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    assert (folder / "train_videos").exists() == (folder / "test_videos").exists() == (name == VIDEOS)


@every_launch
def test_every_scalar_has_one_finite_point_per_update(finished, name):
    logged, launch = scalars(run_folder(finished(name))), LAUNCHES[name]
    steps = [update * launch.num_steps for update in range(1, launch.updates + 1)]
    assert {tag.partition("/")[0] for tag in logged} == GROUPS
    for tag in ONCE_PER_UPDATE:
        assert [step for step, _ in logged[tag]] == steps, tag
    for tag in OF_EPISODES:  # they start with the first episode that ended
        points = [step for step, _ in logged[tag]]
        assert points and points == steps[-len(points) :], tag
    assert [step for step, _ in logged["Test/cumulative_reward"]] == steps[-1:]
    for tag, points in logged.items():
        assert all(math.isfinite(value) for _, value in points), tag
        assert len(points) == len({step for step, _ in points}), tag


@every_launch
def test_the_logged_values_are_possible(finished, name):
    logged, launch = scalars(run_folder(finished(name))), LAUNCHES[name]
    values = {tag: [value for _, value in points] for tag, points in logged.items()}
    rates = [1 - update / launch.updates for update in range(launch.updates)]
    assert values["Info/learning_rate"] == pytest.approx([values["Info/learning_rate"][0] * rate for rate in rates])
    assert min(values["Time/step_per_second"]) > 0
    assert min(values["Loss/value_loss"]) > 0
    actions = {"CartPole-v1": 2, "LunarLander-v3": 4}[launch.env_id]
    assert all(-math.log(actions) - 1e-6 <= value < 0 for value in values["Loss/entropy_loss"])
    if launch.env_id == "CartPole-v1":  # a reward of 1 for each step
        assert values["Rewards/rew_avg"] == values["Game/ep_len_avg"]
        assert min(values["Rewards/rew_avg"]) >= 8
        assert 8 <= values["Test/cumulative_reward"][0] <= 500


@every_launch
def test_the_hyperparameters_are_logged_as_text(finished, name):
    launch = LAUNCHES[name]
    table = hyperparameters(run_folder(finished(name)))
    assert set(asdict(SCRIPT_ARGS[launch.script]())) <= set(table)
    expected = {
        "env_id": launch.env_id,
        "seed": str(SEED),
        "exp_name": EXPERIMENT,
        "num_steps": "128" if name == VIDEOS else "512",
    }
    expected["share_data"] = str("--share-data" in launch.flags)
    assert expected.items() <= table.items()


@every_launch
def test_the_flags_are_in_a_file_and_in_the_tab_of_tensorboard_that_compares_runs(finished, name):
    folder = run_folder(finished(name))
    flags = json.loads((folder / "args.json").read_text())
    assert (flags["env_id"], flags["seed"]) == (LAUNCHES[name].env_id, SEED)
    data = read_events(folder).PluginTagToContent("hparams")
    started = plugin_data_pb2.HParamsPluginData.FromString(data["_hparams_/session_start_info"]).session_start_info
    assert started.hparams["env_id"].string_value == LAUNCHES[name].env_id
    assert started.hparams["seed"].number_value == SEED


@pytest.mark.parametrize("name", [name for name, launch in LAUNCHES.items() if "csv" in launch.flags])
def test_the_table_holds_what_tensorboard_shows(finished, name):
    folder = run_folder(finished(name))
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {
        tag: [(int(row["step"]), pytest.approx(float(row[tag]))) for row in rows if row[tag]]
        for tag in rows[0]
        if tag != "step"
    }
    assert columns == scalars(folder)


@every_launch
def test_stdout_is_one_line_with_the_test_return_and_the_run_folder(finished, name):
    (line,) = finished(name).stdout.splitlines()
    folder = run_folder(finished(name))
    match = re.fullmatch(r"mean return of 10 test episodes: (-?\d+\.\d), run: (\S+)", line)
    assert match, line
    ((_, test_return),) = scalars(folder)["Test/cumulative_reward"]
    assert float(match[1]) == pytest.approx(test_return, abs=0.051)
    assert finished(name).cwd / match[2] == folder


@every_launch
def test_stderr_holds_nothing_but_our_lines_and_the_notice_of_the_launcher(finished, name):
    launch = LAUNCHES[name]
    notice = LAUNCHER_NOTICES.get(launch.launcher)
    ours = [re.escape(line) for line in launch.notices]
    total = launch.updates * launch.num_steps
    for update in range(1, launch.updates + 1):
        steps = update * launch.num_steps
        ours.append(
            rf"steps {steps}/{total}, update {update}/{launch.updates}, "
            r"return (none yet|-?\d+\.\d), \d+ steps/s, \d+:\d\d:\d\d left"
        )
    lines = [line for line in finished(name).stderr.splitlines() if not (notice and re.fullmatch(notice, line))]
    foreign = [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in ours)]
    assert not foreign, "\n".join(foreign)
    assert len(lines) == len(ours)
    assert all(re.fullmatch(*both) for both in zip(ours, lines, strict=True)), lines  # in this order, each once


@pytest.mark.parametrize("name", [VIDEOS])
def test_every_video_shows_a_different_episode(finished, name):
    folder = run_folder(finished(name))
    training, test = (sorted((folder / kind).iterdir()) for kind in ("train_videos", "test_videos"))
    assert len(training) >= 3
    assert len(test) == 10
    contents = {}
    for video in (*training, *test):
        assert video.suffix == ".mp4"
        frames = iio.imread(video, plugin="FFMPEG")
        assert len(frames) > 1, video
        assert all(frame.min() < frame.max() for frame in frames), video
        contents[hashlib.sha256(frames.tobytes()).hexdigest()] = video
    assert len(contents) == len(training) + len(test)
