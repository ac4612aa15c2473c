#!/usr/bin/env python3
"""Writes quantized_layers/: one linear layer each, packed by the programs that define the formats.

    pip install torch==2.15.0 transformers==5.24.0 compressed-tensors==0.20.0 accelerate==1.15.0
    pip download --no-deps --dest wheels auto-gptq==0.7.1 autoawq==0.2.7 compressed-tensors==0.17.0
    python3 quantized_layers.py wheels

The wheels are only looked into: their packing code runs without their kernels and without the packages' own imports.
compressed-tensors 0.17 is the last that packs with `actorder: group`.

Each folder is a checkpoint of one layer "x" with its config.json, and "expected.weight", the weights in F32 that were
packed: (code - zero) * scale of random codes, computed before packing. quantization_schemes.json holds which scheme
compressed-tensors chooses for which module.
"""

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
OUT = HERE / "quantized_layers"
MODEL = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "torch_dtype": "float16",
}  # fmt: skip


class Layer:
    """Random codes, zero points and scales, and the weights they stand for. Shapes as in PyTorch: outputs first."""

    def __init__(self, seed, out, inputs, bits, group_size, symmetric, dtype=torch.float16, permuted=False, lowest_zero=0):
        generator = torch.Generator().manual_seed(seed)
        groups = -(-inputs // group_size)

        def integers(low, *shape):
            return torch.randint(low, 2**bits, shape, generator=generator)

        self.codes = integers(0, out, inputs)
        self.zeros = integers(lowest_zero, out, groups)
        if symmetric:
            self.zeros = torch.full_like(self.zeros, 2 ** (bits - 1))
        self.scales = (torch.rand(out, groups, generator=generator) * 0.05 + 0.001).to(dtype)
        self.group_of_input = torch.arange(inputs, dtype=torch.int32) // group_size
        if permuted:
            self.group_of_input = self.group_of_input[torch.randperm(inputs, generator=generator)]
        group = self.group_of_input.long()
        self.weights = (self.codes - self.zeros[:, group]).float() * self.scales.float()[:, group]

    def linear(self):
        linear = torch.nn.Linear(self.weights.shape[1], self.weights.shape[0], bias=False)
        linear.weight.data = self.weights.clone()
        return linear


def write(name, layer, tensors, quantization):
    directory = OUT / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**MODEL, "quantization_config": quantization}, indent=1) + "\n")
    tensors = {f"x.{part}": tensor.contiguous() for part, tensor in tensors.items()}
    save_file({**tensors, "expected.weight": layer.weights}, directory / "model.safetensors")


def without_init(wheel, package, *subpackages):
    """Makes the modules of a wheel importable without running the `__init__` of its packages."""
    for name in [package, *(f"{package}.{subpackage}" for subpackage in subpackages)]:
        module = types.ModuleType(name)
        module.__path__ = [f"{wheel}/{name.replace('.', '/')}"]
        sys.modules[name] = module


def gptq(wheel):
    without_init(wheel, "auto_gptq", "nn_modules", "nn_modules.qlinear")
    pack = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda").QuantLinear
    cases = [
        ("gptq-2-bit", dict(seed=1, out=32, inputs=64, bits=2, group_size=32, symmetric=False)),
        ("gptq-3-bit", dict(seed=2, out=32, inputs=96, bits=3, group_size=32, symmetric=False)),
        ("gptq-3-bit-act-order", dict(seed=3, out=32, inputs=64, bits=3, group_size=16, symmetric=True, permuted=True)),
        ("gptq-4-bit", dict(seed=4, out=32, inputs=64, bits=4, group_size=16, symmetric=False)),
        ("gptq-4-bit-symmetric-per-channel", dict(seed=5, out=32, inputs=64, bits=4, group_size=64, symmetric=True)),
        ("gptq-4-bit-act-order", dict(seed=6, out=32, inputs=64, bits=4, group_size=16, symmetric=False, permuted=True)),
        ("gptq-4-bit-partial-group", dict(seed=7, out=32, inputs=96, bits=4, group_size=64, symmetric=False)),
        ("gptq-8-bit", dict(seed=8, out=32, inputs=64, bits=8, group_size=32, symmetric=False)),
    ]
    for name, case in cases:
        # Version 1 stores the zero point minus one.
        layer = Layer(**case, lowest_zero=1)
        inputs = case["inputs"]
        packed = pack(case["bits"], case["group_size"], inputs, case["out"], bias=False)
        packed.pack(layer.linear(), layer.scales.float(), layer.zeros.float(), layer.group_of_input)
        tensors = {part: getattr(packed, part) for part in ["qweight", "qzeros", "g_idx"]}
        tensors["scales"] = packed.scales.half()
        quantization = {
            "bits": case["bits"], "group_size": -1 if case["group_size"] == inputs else case["group_size"],
            "damp_percent": 0.01, "desc_act": case.get("permuted", False), "sym": case["symmetric"],
            "true_sequential": True, "quant_method": "gptq", "checkpoint_format": "gptq",
        }  # fmt: skip
        write(name, layer, tensors, quantization)


def awq(wheel):
    without_init(wheel, "awq", "modules", "modules.linear", "utils")
    pack = importlib.import_module("awq.modules.linear.gemm").WQLinear_GEMM
    for name, case in [
        ("awq", dict(seed=11, out=32, inputs=64, bits=4, group_size=16, symmetric=False)),
        ("awq-per-channel", dict(seed=12, out=32, inputs=36, bits=4, group_size=36, symmetric=False)),
    ]:
        layer = Layer(**case)
        zeros, scales = layer.zeros.t().contiguous(), layer.scales.float().t().contiguous()
        packed = pack.from_linear(layer.linear(), 4, case["group_size"], scales=scales, zeros=zeros)
        tensors = {part: getattr(packed, part) for part in ["qweight", "qzeros", "scales"]}
        group_size = -1 if case["group_size"] == case["inputs"] else case["group_size"]
        write(name, layer, tensors, {
            "quant_method": "awq", "zero_point": True, "group_size": group_size, "bits": 4, "version": "gemm",
            "modules_to_not_convert": None,
        })  # fmt: skip


def compressed_tensors(cases):
    import compressed_tensors as package
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for name, case in cases:
        layer = Layer(**case)
        bits, group_size, permuted = case["bits"], case["group_size"], case.get("permuted", False)
        channel = group_size == case["inputs"]
        weights = {
            "num_bits": bits, "type": "int", "symmetric": case["symmetric"],
            "strategy": "channel" if channel else "group", "group_size": None if channel else group_size,
            "actorder": "group" if permuted else None,
        }  # fmt: skip
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        signed = (layer.zeros - 2 ** (bits - 1)).to(torch.int8)
        state = {"weight": layer.weights, "weight_scale": layer.scales.float(), "weight_zero_point": signed}
        if permuted:
            state["weight_g_idx"] = layer.group_of_input
        tensors = compressor.compress(state, scheme=scheme)
        tensors["weight_scale"] = layer.scales
        tensors = {part: tensor for part, tensor in tensors.items() if part.startswith("weight_")}
        config = QuantizationConfig(config_groups={"group_0": scheme}, format="pack-quantized", ignore=["lm_head"])
        config = {**config.model_dump(mode="json"), "version": package.__version__}
        write(name, layer, tensors, {"quant_method": "compressed-tensors", **config})


NEW_CASES = [
    ("compressed-tensors-4-bit", dict(seed=21, out=32, inputs=64, bits=4, group_size=16, symmetric=False)),
    (
        "compressed-tensors-4-bit-symmetric-bf16",
        dict(seed=22, out=24, inputs=64, bits=4, group_size=32, symmetric=True, dtype=torch.bfloat16),
    ),
    (
        "compressed-tensors-8-bit-channel-f32",
        dict(seed=23, out=16, inputs=64, bits=8, group_size=64, symmetric=True, dtype=torch.float32),
    ),
    ("compressed-tensors-8-bit", dict(seed=24, out=18, inputs=32, bits=8, group_size=8, symmetric=False)),
    ("compressed-tensors-4-bit-ragged", dict(seed=25, out=21, inputs=36, bits=4, group_size=12, symmetric=False)),
    ("compressed-tensors-3-bit-ragged", dict(seed=26, out=21, inputs=45, bits=3, group_size=15, symmetric=False)),
]
GROUP_CASES = [
    (
        "compressed-tensors-4-bit-actorder-group",
        dict(seed=31, out=16, inputs=64, bits=4, group_size=16, symmetric=False, permuted=True),
    ),
]


def schemes():
    """Which group of a config the package takes for a linear layer of some name."""
    from compressed_tensors.utils.match import is_match, match_targets

    groups = {
        "group_0": ["Linear"],
        "group_1": ["re:.*down_proj$", r"re:model\.layers\.1\."],
        "group_2": ["model.layers.1.mlp.down_proj", r"re:.*layers\.2\.(?!mlp)"],
        "group_3": ["re:.*layers\\.2\\.self_attn\\.[qk]_proj", "layers.3"],
    }
    ignore = ["lm_head", "re:.*layers\\.0\\.mlp", "gate_proj"]
    targets = {target: group for group, targets in groups.items() for target in targets}
    linear = torch.nn.Linear(1, 1)
    names = ["lm_head"] + [
        f"model.layers.{layer}.{part}"
        for layer in range(12)
        for part in ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    ]
    chosen = {
        name: None if is_match(name, linear, ignore) else targets[match_targets(name, linear, targets)[0]]
        for name in names
    }
    golden = {"groups": groups, "ignore": ignore, "chosen": chosen}
    (HERE / "quantization_schemes.json").write_text(json.dumps(golden, indent=1) + "\n")


def main():
    [wheels, *part] = sys.argv[1:]
    wheel = {path.name.split("-")[0]: str(path) for path in Path(wheels).glob("*.whl")}
    if part == ["actorder-group"]:
        sys.path.insert(0, wheel["compressed_tensors"])
        compressed_tensors(GROUP_CASES)
        return
    subprocess.run([sys.executable, __file__, wheels, "actorder-group"], check=True)
    gptq(wheel["auto_gptq"])
    awq(wheel["autoawq"])
    compressed_tensors(NEW_CASES)
    schemes()


if __name__ == "__main__":
    main()
