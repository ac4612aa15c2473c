"""Makes tiny_embeddings.json: hidden states behind the final norm of the tiny models of tests/src/tiny_model.rs, that of
the last token and the mean over all, by Hugging Face transformers.

    pip install torch transformers
    cargo run -p nibble-tests --example write_tiny_models -- DIR
    python tests/golden/tiny_embeddings.py DIR

Everything is transformers' own, in float32; the mean is taken in float64.
"""

import json
import pathlib
import sys

import torch
import transformers

TOKENS = 70


def main():
    root = pathlib.Path(sys.argv[1])
    models = []
    for directory in sorted(root.iterdir()):
        description = json.loads((directory / "tiny_model.json").read_text())
        model = transformers.AutoModel.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
        tokens = torch.tensor([description["tokens"][:TOKENS]])
        with torch.no_grad():
            hidden = model(tokens).last_hidden_state[0].double()
        assert torch.isfinite(hidden).all()
        models.append({
            "name": description["name"],
            "tokens": tokens[0].tolist(),
            "last": [round(x, 6) for x in hidden[-1].tolist()],
            "mean": [round(x, 6) for x in hidden.mean(dim=0).tolist()],
        })
    document = {"transformers": transformers.__version__, "torch": torch.__version__, "models": models}
    out = pathlib.Path(__file__).with_suffix(".json")
    out.write_text(json.dumps(document).replace('{"name"', '\n{"name"') + "\n")
    print(f"wrote {out}: {len(models)} models")


if __name__ == "__main__":
    main()
