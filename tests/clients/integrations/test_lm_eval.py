"""EleutherAI's lm_eval over /v1/completions: log probabilities of prompts, against transformers on the same weights.

NIBBLE_TEST_MODEL is the directory that is served, in F16, so that transformers can open it too.
"""

import os
from pathlib import Path

import lm_eval
import pytest

HERE = Path(__file__).parent
EXCERPT = HERE.parents[1] / "golden/wikitext-2-excerpt.txt"
# float32 arithmetic in another order, on F16 weights: measured 0.00005, x 20.
TOLERANCE = 0.001
# Short enough that texts are scored in several windows.
WINDOW_TOKENS = 128

FACTS = {
    "task": "facts",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(HERE / "facts.jsonl")}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
TEXT = {
    "task": "text",
    "dataset_path": "text",
    "dataset_kwargs": {"data_files": {"test": str(EXCERPT)}, "sample_by": "line"},
    "test_split": "test",
    "process_docs": lambda lines: lines.filter(lambda line: line["text"].strip()).select(range(12)),
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
}


@pytest.fixture(scope="module")
def directory():
    return os.environ["NIBBLE_TEST_MODEL"]


def evaluate(model: str, arguments: dict, task: dict) -> dict:
    return lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[dict(task)], batch_size=1, bootstrap_iters=0, log_samples=True
    )


def over_http(server, directory: str, task: dict) -> dict:
    arguments = {
        "model": server.model,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": directory,
        "num_concurrent": 4,
        "max_retries": 1,
        # lm_eval keeps two tokens of this for itself, over HTTP only.
        "max_length": WINDOW_TOKENS + 2,
    }
    return evaluate("local-completions", arguments, task)


def with_transformers(directory: str, task: dict) -> dict:
    arguments = {"pretrained": directory, "dtype": "float32", "device": "cpu", "max_length": WINDOW_TOKENS}
    return evaluate("hf", arguments, task)


def responses(results: dict, task: dict) -> list:
    samples = sorted(results["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for response in sample["filtered_resps"]]


def test_choices_have_the_log_probabilities_of_transformers(server, directory):
    ours, theirs = over_http(server, directory, FACTS), with_transformers(directory, FACTS)
    ours_by_choice, theirs_by_choice = responses(ours, FACTS), responses(theirs, FACTS)
    assert len(ours_by_choice) == len(theirs_by_choice) == 48
    largest = max(abs(a[0] - b[0]) for a, b in zip(ours_by_choice, theirs_by_choice, strict=True))
    print(f"largest difference of {len(ours_by_choice)} log probabilities: {largest:.6f}")
    assert largest < TOLERANCE
    assert [greedy for _, greedy in ours_by_choice] == [greedy for _, greedy in theirs_by_choice]
    accuracy = ours["results"]["facts"]["acc,none"]
    assert accuracy == theirs["results"]["facts"]["acc,none"]
    assert accuracy > 0.5, "chance is 0.25"


def test_a_text_has_the_perplexity_of_transformers(server, directory):
    ours, theirs = over_http(server, directory, TEXT), with_transformers(directory, TEXT)
    found, expected = (result["results"]["text"]["byte_perplexity,none"] for result in (ours, theirs))
    print(f"perplexity of a byte: {found:.6f}, transformers {expected:.6f}")
    assert abs(found - expected) < 1e-4 * expected
