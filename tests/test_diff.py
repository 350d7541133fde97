"""The two coupled scripts stay comparable: little differs, and the same paragraphs come in the same order."""

import re
import subprocess

import pytest

from tests.launching import ROOT

SCRIPTS = ("train_torch.py", "train_fabric.py")
MOST_CHANGED_LINES, MOST_PLACES = 60, 19  # as many as there are: who adds one must want it


def paragraphs(script):
    """The comments that have lines of their own, each up to its colon: they name the paragraphs."""
    comments = re.findall(r"^ *# (.*)$", (ROOT / script).read_text(), re.MULTILINE)
    return [comment.partition(":")[0] for comment in comments]


def test_no_more_lines_and_places_differ_between_the_scripts_than_must():
    diff = subprocess.run(["diff", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert diff.returncode == 1, diff.stderr
    changed = [line for line in diff.stdout.splitlines() if line.startswith(("<", ">"))]
    assert len(changed) <= MOST_CHANGED_LINES, diff.stdout
    places = [line for line in diff.stdout.splitlines() if line[0].isdigit()]
    assert len(places) <= MOST_PLACES, diff.stdout


def test_the_same_paragraphs_stand_in_the_same_order():
    assert paragraphs("train_torch.py") == paragraphs("train_fabric.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_paragraphs_tell_the_whole_story(script):
    story = ["Launch", "Exchange", "Log", "Environments", "Agent", "Optimizer", "Gradient step", "Resume", "Compile"]
    story += ["Loop over updates", "Rollout", "Share", "Optimize", "Guard", "Log, evaluate and checkpoint", "Test"]
    names = paragraphs(script)
    rest = iter(names)
    assert all(name in rest for name in story), names
