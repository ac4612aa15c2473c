"""Asks a running server one question over the OpenAI chat API and prints the answer as it comes.

    python3 scripts/ask.py http://127.0.0.1:8000 "What is the capital of France?"
"""

import json
import sys
import time
import urllib.error
import urllib.request


def main():
    address, question = sys.argv[1:3]
    body = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 200,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with urllib.request.urlopen(f"{address}/v1/models") as response:
        body["model"] = json.load(response)["data"][0]["id"]
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    started, first, usage = time.monotonic(), None, None
    try:
        response = urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        sys.exit(f"ask: the server answered {error.code}: {error.read().decode()}")
    with response:
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            chunk = json.loads(line[len(b"data: ") :])
            if "error" in chunk:
                sys.exit(f"\nask: the server broke off: {chunk['error']['message']}")
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text = choice["delta"].get("content") or ""
                if text and first is None:
                    first = time.monotonic()
                print(text, end="", flush=True)
    ended = time.monotonic()
    print()
    if usage is None or first is None:
        sys.exit("ask: the answer was empty")
    tokens = usage["completion_tokens"]
    print(
        f"({usage['prompt_tokens']} tokens read, first word after {first - started:.2f} s, "
        f"{tokens} tokens written at {tokens / max(ended - first, 1e-3):.0f} tokens/s)"
    )


if __name__ == "__main__":
    main()
