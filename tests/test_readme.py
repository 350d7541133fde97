"""Every command of the README and of docs/ is one that works: its files exist, its flags parse."""

import math
import os
import re
import shlex
import subprocess

import pytest
from packaging.requirements import Requirement

from rl.args import DecoupledArgs, FabricArgs, TorchArgs
from rl.run.command_line import parse
from rl.voice import LAUNCH_VARIABLES
from tests.launching import BIN, ROOT

README = "\n".join(page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    command.strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    for command in line.split("&&")
]
SCRIPTS = {
    "train_torch.py": TorchArgs,
    "train_fabric.py": FabricArgs,
    "train_fabric_decoupled.py": DecoupledArgs,
}


def test_the_readme_has_the_commands_that_the_suite_promises():
    for command in (
        "torchrun --nproc_per_node=2 --standalone train_torch.py",
        "fabric run --accelerator=cpu --strategy=ddp --devices=2 train_fabric.py",
        "fabric run --devices=3 train_fabric_decoupled.py --num-envs 4",
        "fabric run --devices=3 train_fabric_decoupled.py --num-envs 4 --cuda",
        "fabric run --devices=3 train_fabric_decoupled.py --num-envs 4 --cuda --player-on-gpu",
        "pip install -r requirements.txt",
        "tensorboard --logdir logs",
    ):
        assert command in COMMANDS


@pytest.mark.parametrize("command", [c for c in COMMANDS if any(script in c for script in SCRIPTS) and " -m " not in c])
def test_the_flags_of_a_training_command_parse(command, tmp_path, monkeypatch):
    command = re.sub(r"--resume \S+", "", command)  # tests/test_resume.py resumes real runs
    launcher, script, flags = re.fullmatch(r"(.*?)(\w+\.py)(.*)", command).groups()
    counts = re.findall(r"--(?:nproc_per_node|devices|nnodes|num-nodes)=(\d+)", launcher)
    world_size = str(math.prod(map(int, counts)))
    for name, value in zip(LAUNCH_VARIABLES, ("0", "0", world_size, world_size, "localhost", "0"), strict=True):
        monkeypatch.setenv(name, value)
    if "fabric run" in launcher:
        monkeypatch.setenv("LT_CLI_USED", "1")
    for flag, package in (
        ("ALE/", "ale_py"),
        ("envpool", "envpool"),
        ("HalfCheetah", "mujoco"),
        ("MinAtar", "minatar"),
        ("minigrid", "minigrid"),
    ):
        if flag in flags:
            pytest.importorskip(package, reason=f"{package} is optional")
    monkeypatch.chdir(tmp_path)
    args = parse(SCRIPTS[script], shlex.split(flags))
    for flag in re.findall(r"--([\w-]+)", flags):
        assert hasattr(args, flag.replace("-", "_"))


@pytest.mark.processes
@pytest.mark.parametrize("launcher", ["fabric run", "torchrun"])
def test_the_options_of_a_launcher_are_ones_it_has(launcher):
    program, *subcommand = launcher.split()
    shown = subprocess.run(
        [BIN / program, *subcommand, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"COLUMNS": "200"},
    ).stdout.replace("-", "_")
    commands = [command for command in COMMANDS if command.startswith(launcher)]
    options = {flag for command in commands for flag in re.findall(r"--[\w-]+", command.split(".py")[0])}
    assert len(options) >= 2
    assert [option for option in options if option.replace("-", "_") not in shown] == []


@pytest.mark.parametrize("command", [c for c in COMMANDS if " -m rl." in c or " -m benchmarks." in c])
def test_a_module_that_a_command_runs_exists(command):
    module = re.search(r" -m ([\w.]+)", command)[1]
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


@pytest.mark.parametrize(("sign", "script"), [("-", "train_torch.py"), ("+", "train_fabric.py")])
def test_the_lines_of_the_diff_blocks_are_those_of_the_scripts(sign, script):
    blocks = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shown = [line[1:] for block in blocks for line in block.splitlines() if line.startswith(sign)]
    assert len(shown) >= 8
    assert [line for line in shown if line not in (ROOT / script).read_text().splitlines()] == []


def test_every_file_that_the_readme_names_exists():
    files = re.findall(
        r"\]\((assets/[\w.-]+)\)|-r ([\w.-]+\.txt)|^(\w[\w/]*\.py) {2}|(tests/\w+\.py)", README, re.MULTILINE
    )
    names = {name for groups in files for name in groups if name}
    assert len(names) > 25
    assert not [name for name in names if not (ROOT / name).is_file()]


def test_the_file_tree_names_every_file_of_the_suite():
    for file in (*ROOT.glob("*.py"), *(ROOT / "rl").glob("*.py")):
        if file.name != "__init__.py":
            assert re.search(rf"^{file.relative_to(ROOT)} ", README, re.MULTILINE), file
    for file in (ROOT / "rl").glob("*/*.py"):
        if file.name != "__init__.py":
            in_wing = rf"^{file.parent.relative_to(ROOT)}/ .*\n(    .*\n)*    {file.name} "
            assert re.search(in_wing, README, re.MULTILINE), file


def test_an_older_python_is_answered_by_the_first_line_of_the_requirements():
    requirement = Requirement((ROOT / "requirements.txt").read_text().splitlines()[0].partition("  #")[0])
    versions = ("3.9", "3.10", "3.11", "3.12", "3.13")
    needed = [requirement.marker.evaluate({"python_version": version}) for version in versions]
    assert needed == [True, True, False, False, False]
    assert "Python-3.11-or-newer" in requirement.url
