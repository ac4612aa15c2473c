"""A running server for the client tests.

Either NIBBLE_BASE_URL (http://127.0.0.1:8000) and NIBBLE_MODEL name one, or NIBBLE_BIN (the binary) and
NIBBLE_TEST_MODEL (a model directory) let the tests start their own.
"""

import os
import re
import subprocess
import time
from dataclasses import dataclass

import httpx
import openai
import pytest

START_SECONDS = 120


@dataclass
class Server:
    """Where a server listens and what it serves."""

    url: str
    model: str
    process: subprocess.Popen | None = None

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def metric(self, name: str, label: str = "") -> float:
        """The value of a metric; 0 when it was not counted yet."""
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith(name + "{") and label in line:
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def eventually(self, what: str, condition, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.02)

    def is_idle(self) -> bool:
        running, waiting = self.metric("nibble:num_requests_running"), self.metric("nibble:num_requests_waiting")
        return running == waiting == self.metric("nibble:kv_cache_usage_perc") == 0


def start(*options: str) -> Server:
    """Starts a server on a free port and waits until it says that it is ready."""
    binary, model = os.environ["NIBBLE_BIN"], os.environ["NIBBLE_TEST_MODEL"]
    command = [binary, "serve", model, "--port", "0", "--kv-cache-memory", "512MiB", *options]
    environment = {**os.environ, "RUST_LOG": "warn"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    line = process.stdout.readline()
    ready = re.fullmatch(r"serving (\S+) at (http://\S+)\n", line)
    if ready is None:
        process.kill()
        raise RuntimeError(f"{' '.join(command)} did not start: {line!r}")
    return Server(ready[2], ready[1], process)


@pytest.fixture
def start_server():
    """Starts servers of a test's own; they are gone after it."""
    if "NIBBLE_BIN" not in os.environ or "NIBBLE_TEST_MODEL" not in os.environ:
        pytest.skip("NIBBLE_BIN and NIBBLE_TEST_MODEL are not set: no server of the test's own")
    servers = []

    def start_one(*options: str) -> Server:
        servers.append(start(*options))
        return servers[-1]

    yield start_one
    for server in servers:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="session")
def server():
    """The server that most tests share."""
    if "NIBBLE_BASE_URL" in os.environ:
        url = os.environ["NIBBLE_BASE_URL"].rstrip("/").removesuffix("/v1")
        yield Server(url, os.environ["NIBBLE_MODEL"])
        return
    if "NIBBLE_BIN" not in os.environ or "NIBBLE_TEST_MODEL" not in os.environ:
        pytest.exit("set NIBBLE_BASE_URL and NIBBLE_MODEL, or NIBBLE_BIN and NIBBLE_TEST_MODEL", returncode=2)
    server = start()
    yield server
    server.process.terminate()
    assert server.process.wait(START_SECONDS) == 0, "the server ended with an error"


@pytest.fixture
def client(server):
    """OpenAI's client, connected to the server."""
    with server.client() as client:
        yield client
