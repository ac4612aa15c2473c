"""OpenAI's Node client, in a process of its own: node/openai.test.js holds the tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "node"
# Beside this Python: Node comes as a Python package.
NODE = Path(sys.executable).parent / "node"


def test_the_node_client_works_unmodified(server):
    if not NODE.exists() or not (HERE / "node_modules").exists():
        pytest.fail(f"{NODE} and {HERE}/node_modules are needed: scripts/test installs both")
    environment = {**os.environ, "NIBBLE_BASE_URL": server.url, "NIBBLE_MODEL": server.model}
    command = [NODE, "--test", "--test-reporter=spec", "openai.test.js"]
    run = subprocess.run(command, cwd=HERE, env=environment, text=True, capture_output=True, timeout=600)
    print(run.stdout, run.stderr)
    assert run.returncode == 0, run.stdout
    assert "ℹ pass 0\n" not in run.stdout
