#!/usr/bin/env python3
"""Checks what `nibble quantize --format` wrote, with the packages of other programs.

    for format in gptq awq compressed-tensors; do
        nibble quantize MODEL OUT/$format --format $format --method rtn --group-size 64
    done
    pip install torch==2.15.0 transformers==5.24.0 compressed-tensors==0.20.0 accelerate==1.15.0
    pip download --no-deps --dest wheels autoawq==0.2.7
    python3 check_written_formats.py MODEL OUT wheels test.txt

Every matrix is unpacked three times, by compressed-tensors, by AutoAWQ and, for GPTQ, here; the three must be equal bit
for bit. Then transformers runs MODEL with these weights in float32, and loads OUT/compressed-tensors on its own; the
perplexities are to be compared with `nibble eval OUT/awq --text test.txt --window 512 --windows 4`.
"""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from quantized_layers import without_init
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

WINDOW, WINDOWS = 512, 4


def gptq(tensors, name):
    """Version 1, 4 bits."""
    words, zero_words = (tensors[f"{name}.{part}"].numpy().view(np.uint32) for part in ["qweight", "qzeros"])
    codes = np.stack([words >> 4 * nibble & 15 for nibble in range(8)], 1).reshape(-1, words.shape[1])
    zeros = np.stack([zero_words >> 4 * nibble & 15 for nibble in range(8)], 2).reshape(len(zero_words), -1) + 1
    group = tensors[f"{name}.g_idx"].long()
    codes, zeros = (torch.from_numpy(numbers.astype(np.float32)) for numbers in [codes, zeros])
    return ((codes - zeros[group]) * tensors[f"{name}.scales"].float()[group]).t()


def awq(tensors, name, dequantize):
    qweight, qzeros, scales = (tensors[f"{name}.{part}"] for part in ["qweight", "qzeros", "scales"])
    return dequantize(qweight, qzeros, scales.float(), 4, len(qweight) // len(qzeros)).t()


def compressed_tensors(tensors, name):
    scales = tensors[f"{name}.weight_scale"].float()
    out, inputs = shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
    codes = unpack_from_int32(tensors[f"{name}.weight_packed"], 4, shape).float()
    zeros = unpack_from_int32(tensors[f"{name}.weight_zero_point"], 4, torch.Size([out, scales.shape[1]]), packed_dim=0)
    size = inputs // scales.shape[1]
    return (codes - zeros.float().repeat_interleave(size, 1)) * scales.repeat_interleave(size, 1)


@torch.no_grad()
def perplexity(model, tokens):
    loss = []
    for window in tokens[: WINDOW * WINDOWS].reshape(WINDOWS, WINDOW):
        logits = model(window[None]).logits[0, :-1].double()
        loss.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    return math.exp(sum(loss) / WINDOWS)


def main():
    model, out, wheels, text = map(Path, sys.argv[1:])
    without_init(str(next(wheels.glob("autoawq-*.whl"))), "awq", "utils")
    dequantize = importlib.import_module("awq.utils.packing_utils").dequantize_gemm
    files = {format: load_file(out / format / "model.safetensors") for format in ["gptq", "awq", "compressed-tensors"]}
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    matrices = 0
    for name, module in original.named_modules():
        if name.endswith("_proj"):
            weights = compressed_tensors(files["compressed-tensors"], name)
            assert torch.equal(weights, awq(files["awq"], name, dequantize)), name
            assert torch.equal(weights, gptq(files["gptq"], name)), name
            module.weight.data = weights.contiguous()
            matrices += 1
    print(f"{matrices} matrices are equal in the three formats")
    tokens = AutoTokenizer.from_pretrained(model)(text.read_text()[:50000], add_special_tokens=False).input_ids
    tokens = torch.tensor(tokens)
    print(f"unpacked in float32: perplexity {perplexity(original, tokens):.6f}")
    # compressed-tensors 0.20 loads an asymmetric checkpoint, its own included, only so.
    config = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        out / "compressed-tensors", dtype=torch.float32, quantization_config=config
    )
    print(f"loaded by transformers, which rounds weights to F16: perplexity {perplexity(loaded.eval(), tokens):.6f}")


if __name__ == "__main__":
    main()
