"""Makes tiny_models.json: logits of the tiny models of tests/src/tiny_model.rs by Hugging Face transformers.

    pip install torch transformers
    cargo run -p nibble-tests --example write_tiny_models -- DIR
    python tests/golden/tiny_models.py DIR

The checkpoints are written by Nibble's own test support; configuration classes, rotary scaling, attention and
everything else is transformers' own, in float32.
"""

import json
import pathlib
import sys

import torch
import transformers

TOKENS = 150
ROWS = [0, 1, 20, 21, 22, 63, 64, 100, 149]


def main():
    root = pathlib.Path(sys.argv[1])
    models = []
    for directory in sorted(root.iterdir()):
        description = json.loads((directory / "tiny_model.json").read_text())
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
        tokens = torch.tensor([description["tokens"][:TOKENS]])
        with torch.no_grad():
            logits = model(tokens).logits[0]
        assert torch.isfinite(logits).all()
        models.append({
            "name": description["name"],
            "tokens": tokens[0].tolist(),
            "rows": [{"row": row, "logits": [round(x, 6) for x in logits[row].tolist()]} for row in ROWS],
        })
    document = {"transformers": transformers.__version__, "torch": torch.__version__, "models": models}
    out = pathlib.Path(__file__).with_suffix(".json")
    out.write_text(json.dumps(document).replace('{"name"', '\n{"name"').replace('{"row"', '\n {"row"') + "\n")
    print(f"wrote {out}: {len(models)} models")


if __name__ == "__main__":
    main()
