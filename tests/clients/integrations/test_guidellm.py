"""guidellm, the load generator of the vLLM project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 8, 32, 16


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_short_load_succeeds(server, tmp_path, path):
    report = tmp_path / "report.json"
    command = [
        Path(sys.executable).parent / "guidellm",
        "run",
        "--disable-console",
        *("--backend", f"kind=openai_http,target={server.url},model={server.model},request_format={path}"),
        *("--tokenizer", f"kind=hf_auto,model={os.environ['NIBBLE_TEST_MODEL']}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"),
        *("--profile", "kind=concurrent,streams=4"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--output", f"kind=json,path={report}"),
    ]
    run = subprocess.run(command, text=True, capture_output=True, timeout=300, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (REQUESTS, 0), totals
    produced = benchmark["metrics"]["output_token_count"]["successful"]
    assert produced["mean"] == OUTPUT_TOKENS, produced
