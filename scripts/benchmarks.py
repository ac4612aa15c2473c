"""What the scripts that measure Nibble beside others share. Needs nothing but Python."""

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
INPUT_TOKENS, OUTPUT_TOKENS = 60, 64
SCRIPT = pathlib.Path(sys.argv[0]).name


def run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, text=True, stdout=subprocess.PIPE).stdout


def build() -> pathlib.Path:
    """The nibble of this directory."""
    subprocess.run(["cargo", "build", "--release", "--locked", "--bin", "nibble"], cwd=ROOT, check=True)
    return ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "release/nibble"


class Server:
    """A server process; it is gone at the end of the with statement."""

    def __init__(self, command: list[object], port: int, library_path: str = ""):
        environment = {**os.environ, "RUST_LOG": "warn"}
        if library_path:
            environment["LD_LIBRARY_PATH"] = library_path
        self.url = f"http://127.0.0.1:{port}"
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen([str(part) for part in command], stdout=quiet, stderr=quiet, env=environment)

    def __enter__(self):
        deadline = time.monotonic() + 120
        while True:
            if self.process.poll() is not None:
                sys.exit(f"{SCRIPT}: {self.process.args[0]} ended with code {self.process.returncode}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return self
            except OSError:
                if time.monotonic() > deadline:
                    self.process.kill()
                    sys.exit(f"{SCRIPT}: {self.process.args[0]} is not healthy after two minutes")
                time.sleep(0.01)

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def load(nibble: pathlib.Path, url: str, streams: int, seed: int) -> dict:
    command = [
        *(nibble, "bench", "serve", "--url", url, "--max-concurrency", streams, "--num-prompts", max(8, 4 * streams)),
        *("--random-input-len", INPUT_TOKENS, "--random-output-len", OUTPUT_TOKENS, "--ignore-eos"),
        *("--seed", seed, "--json"),
    ]
    result = json.loads(run(*command))
    expected = result["completed"] * OUTPUT_TOKENS
    if result["failed"]:
        sys.exit(f"{SCRIPT}: {result['failed']} requests failed; the first: {result['first_error']}")
    if result["output_tokens"] != expected:
        sys.exit(f"{SCRIPT}: {result['output_tokens']} tokens were generated, expected {expected}")
    return result


def median(results: list[dict], *keys: str) -> float:
    def value(result):
        for key in keys:
            result = result[key]
        return result

    return statistics.median(value(result) for result in results)


def busy_cores(seconds: float = 3) -> float:
    """Cores that other programs use now."""

    def busy_ticks() -> int:
        user, nice, system, _idle, _wait, *rest = (int(part) for part in stat.read_text().split("\n")[0].split()[1:])
        # Guest time is in user time already.
        return user + nice + system + sum(rest[:3])

    stat = pathlib.Path("/proc/stat")
    before, started = busy_ticks(), time.monotonic()
    time.sleep(seconds)
    return (busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - started)


def processor() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def write_between(document: pathlib.Path, begin: str, end: str, text: str) -> None:
    """Replaces what lies between the lines `begin` and `end` of `document`."""
    before, rest = document.read_text().split(begin)
    document.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{rest.split(end)[1]}")
