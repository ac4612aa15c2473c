#!/usr/bin/env python3
"""Checks the golden logits that `nibble quantize` wrote, with the loaders of other programs.

    nibble quantize MODEL OUT ...
    pip install torch==2.15.0 transformers==5.24.0 compressed-tensors==0.20.0 accelerate==1.15.0 gptqmodel==7.7.0
    python3 check_self_test.py OUT...

Each OUT, whatever is mixed, padded or kept in it, is loaded by

- GPTQ and AWQ: gptqmodel, with its plain torch kernels;
- compressed-tensors: that package, which applies the config of OUT to an empty model and unpacks its weights, and by
  transformers itself where version 5.24 can: symmetric, or one setting for all matrices.

Each runs the prompt of nibble_self_test.json; its logits must lie within the tolerance stated there.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig


def by_gptqmodel(directory, config):
    from gptqmodel import BACKEND, GPTQModel

    backend = BACKEND.TORCH_AWQ if config["quant_method"] == "awq" else BACKEND.TORCH
    return GPTQModel.load(str(directory), backend=backend, device="cpu", dtype=torch.float16).model


def by_compressed_tensors(directory, config):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model_config = AutoConfig.from_pretrained(directory)
    del model_config.quantization_config
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    quantization = QuantizationConfig.model_validate(config)
    apply_quantization_config(model, quantization, run_compressed=True)
    compressor = ModelCompressor(quantization_config=quantization)
    compressor.compress_model(model)
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    compressor.decompress_model(model)
    return model.float()


def by_transformers(directory, config):
    groups = list(config["config_groups"].values())
    symmetric = all(group["weights"]["symmetric"] for group in groups)
    if not symmetric and len(groups) > 1:
        return None
    # compressed-tensors 0.20 loads an asymmetric checkpoint, its own included, only so.
    how = {} if symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **how)


@torch.no_grad()
def main():
    for directory in map(Path, sys.argv[1:]):
        test = json.loads((directory / "nibble_self_test.json").read_text())
        config = json.loads((directory / "config.json").read_text())["quantization_config"]
        loaders = [by_compressed_tensors, by_transformers]
        if config["quant_method"] != "compressed-tensors":
            loaders = [by_gptqmodel]
        for load in loaders:
            model = load(directory, config)
            if model is None:
                print(f"{directory} {load.__name__}: mixed and asymmetric, not possible")
                continue
            logits = model.eval()(torch.tensor([test["tokens"]])).logits[0, -1]
            largest = max(abs(logits[golden["token"]].item() - golden["logit"]) for golden in test["logits"])
            print(f"{directory} {load.__name__}: logits differ by {largest:.5f}, tolerance {test['tolerance']:.5f}")
            assert largest <= test["tolerance"], directory


if __name__ == "__main__":
    main()
