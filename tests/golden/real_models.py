"""Makes real_models.json: what Hugging Face transformers computes from the real test models' GGUF files.

    pip install torch transformers gguf sentencepiece accelerate
    python tests/golden/real_models.py smollm2-135m=FILE.gguf qwen2.5-coder-0.5b=FILE.gguf

The weights are dequantized by transformers and the `gguf` package, rounded to F16 as `nibble import` stores
them, and computed with in float32.
"""

import json
import math
import pathlib
import sys

import torch
import transformers

HERE = pathlib.Path(__file__).parent
ROWS = [0, 1, 7, 63, 64, 200, 255]
WINDOW = 256
QUESTION = "What is the capital of France?"


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def perplexity(model, tokens):
    """Windows that do not overlap, each scored alone, WINDOW - 1 predictions each."""
    total, count = 0.0, 0
    for start in range(0, len(tokens) - WINDOW + 1, WINDOW):
        window = tokens[start : start + WINDOW]
        log_probabilities = torch.log_softmax(logits_of(model, window)[:-1].double(), dim=-1)
        targets = torch.tensor(window[1:])
        total -= log_probabilities[torch.arange(WINDOW - 1), targets].sum().item()
        count += WINDOW - 1
    return math.exp(total / count), count


def answer(model, tokenizer):
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tokens, generated = list(prompt_ids), []
    for _ in range(24):
        token = int(logits_of(model, tokens)[-1].argmax())
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
        generated.append(token)
    return {"prompt_ids": prompt_ids, "token_ids": generated, "text": tokenizer.decode(generated)}


def measure(name, file):
    file = pathlib.Path(file).resolve()
    arguments = {"gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **arguments)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **arguments)
    for parameter in model.eval().parameters():
        parameter.data = parameter.data.half().float()
    text = (HERE / "wikitext-2-excerpt.txt").read_text()
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    logits = logits_of(model, tokens[:WINDOW])
    value, predictions = perplexity(model, tokens)
    rows = []
    for row in ROWS:
        top = logits[row].topk(16)
        rows.append({
            "row": row,
            "top_ids": top.indices.tolist(),
            "top_logits": [round(x, 5) for x in top.values.tolist()],
            "every_997th": [round(x, 5) for x in logits[row][::997].tolist()],
        })
    return {
        "name": name,
        "tokens": tokens,
        "rows": rows,
        "perplexity": {"window": WINDOW, "predicted_tokens": predictions, "value": value},
        "answer": answer(model, tokenizer),
    }


def main():
    models = [measure(*argument.split("=", 1)) for argument in sys.argv[1:]]
    document = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "question": QUESTION,
        "models": models,
    }
    out = HERE / "real_models.json"
    out.write_text(json.dumps(document).replace('{"row"', '\n{"row"').replace('{"name"', '\n{"name"') + "\n")
    for model in models:
        print(model["name"], len(model["tokens"]), model["perplexity"], model["answer"]["text"])


if __name__ == "__main__":
    main()
