#!/usr/bin/env python3
"""Writes ggml_blocks.json: random blocks of each ggml format and their values by the package `gguf`.

    pip install gguf==0.19.0 && python3 ggml_blocks.py > ggml_blocks.json

Codes are random bytes; the F16 scales are random and finite. Values are hexadecimal little-endian F32, so that the
comparison is of bits.
"""

import json
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

BLOCKS = 2
# Where a block has F16 scales, in bytes from its start.
SCALES = {
    "F32": [], "F16": [0], "BF16": [], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip


def main():
    random = np.random.default_rng(20240613)
    golden = {}
    for name, scales in SCALES.items():
        kind = GGMLQuantizationType[name]
        elements, size = GGML_QUANT_SIZES[kind]
        count = 16 if elements == 1 else BLOCKS
        blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
        for offset in scales:
            values = random.normal(0, 0.1, count).astype(np.float16)
            blocks[:, offset : offset + 2] = values.view(np.uint8).reshape(count, 2)
        if name in ("F32", "BF16"):
            values = random.normal(0, 1, count).astype(np.float32)
            # The upper half of an F32 is its BF16.
            blocks = values.view(np.uint8).reshape(count, 4)[:, 4 - size :].copy()
        # Each block a row of its own; F32 and F16 the package takes as they are.
        if name in ("F32", "F16"):
            rows = blocks.reshape(-1).view(np.float32 if name == "F32" else np.float16)
        else:
            rows = blocks
        values = dequantize(rows, kind).astype("<f4").reshape(-1)
        assert np.isfinite(values).all() and values.size == count * elements
        golden[name] = {"blocks": blocks.tobytes().hex(), "values": values.tobytes().hex()}
    json.dump(golden, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
