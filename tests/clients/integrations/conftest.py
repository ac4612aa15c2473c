"""One line for each client at the end: what was run, in which version, and how it went."""

from collections import Counter
from importlib.metadata import version

PACKAGES = {
    "test_guidellm.py": "guidellm",
    "test_langchain.py": "langchain-openai",
    "test_litellm.py": "litellm",
    "test_lm_eval.py": "lm_eval",
}


def pytest_terminal_summary(terminalreporter):
    outcomes = {file: Counter() for file in PACKAGES}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            file = report.nodeid.split("::")[0].rsplit("/", 1)[-1]
            if file in outcomes:
                outcomes[file][outcome] += 1
    for file, counts in outcomes.items():
        package = PACKAGES[file]
        result = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "not run"
        terminalreporter.write_line(f"{package} {version(package)}: {result}")
