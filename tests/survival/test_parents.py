"""A process that a comparison has started does not outlive it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .harness import PATIENCE_SECONDS, environment

CHILD = "from avatarl.process import *; end_with_parent(); print('begun', flush=True); import time; time.sleep(600)"
PARENT = f"""
import os, subprocess, sys
from avatarl.process import PARENT
subprocess.Popen([sys.executable, "-c", {CHILD!r}], env={{**os.environ, PARENT: %s}})
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process that its parent is gone")
@pytest.mark.parametrize("named", ["str(os.getpid())", "'0'"], ids=["killed later", "killed before it could ask"])
def test_a_child_ends_with_its_parent(named: str):
    """Its output ends when the last process that could write it has."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT % named],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if named != "'0'":
        assert parent.stdout.readline() == "begun\n"
        parent.kill()
    assert parent.communicate(timeout=PATIENCE_SECONDS)[0] == ""
