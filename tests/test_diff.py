"""The two coupled scripts stay comparable: little differs, and the same paragraphs come in the same order."""

import re
import subprocess

import pytest

from tests.launching import ROOT

SCRIPTS = ("train_torch.py", "train_fabric.py")
MOST_CHANGED_LINES = 90


def paragraphs(script):
    """The comments that have lines of their own, each up to its colon: they name the paragraphs."""
    comments = re.findall(r"^ *# (.*)$", (ROOT / script).read_text(), re.MULTILINE)
    return [comment.partition(":")[0] for comment in comments]


def test_few_lines_differ_between_the_scripts():
    diff = subprocess.run(["diff", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert diff.returncode == 1, diff.stderr
    changed = [line for line in diff.stdout.splitlines() if line.startswith(("<", ">"))]
    assert len(changed) <= MOST_CHANGED_LINES, diff.stdout


def test_the_same_paragraphs_stand_in_the_same_order():
    assert paragraphs("train_torch.py") == paragraphs("train_fabric.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_paragraphs_tell_the_whole_story(script):
    story = ["Launch", "Log", "Agent", "Optimizer", "Environments", "Loop over updates", "Rollout", "Advantages"]
    story += ["Share", "Optimize", "Log", "Test"]
    names = [name.partition(",")[0] for name in paragraphs(script)]
    rest = iter(names)
    assert all(name in rest for name in story), names
