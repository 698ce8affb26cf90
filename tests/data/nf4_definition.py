"""Logits of 4-bit models by the format's definition, as goldens for tests/library/golden.rs.

bitsandbytes' own CPU inference rounds block scales to bf16 (its in-memory layout), so the logits that its forward gives
are up to 0.04 away from those of the weights that it dequantizes to. This script dequantizes with bitsandbytes first
and runs the f32 weights.

usage: nf4_definition.py ORACLES OUT.safetensors
Made with torch 2.15.0, transformers 5.23.0, peft 0.21.2, bitsandbytes 0.50.2.
"""
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
import bitsandbytes as bnb
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

oracles, out = sys.argv[1:3]


def dequantized(model):
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight.data = weight.float()
            parent, leaf = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), leaf, plain)
    return model.eval()


def load(name, **kw):
    path = os.path.join(oracles, name)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", **kw)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float().contiguous()


nf4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
)
quantize = {"quantization_config": nf4, "device_map": {"": "cpu"}}
variants = load_file(os.path.join(oracles, "tiny_variants_logits.safetensors"))["ids"]
ids = load_file(os.path.join(oracles, "tiny_llama_logits.safetensors"))["ids"]
adapter = os.path.join(oracles, "adapters", "lora")
save_file(
    {
        "tiny-mistral-bnb4": logits(dequantized(load("tiny-mistral-bnb4")), variants),
        "base_nf4": logits(dequantized(load("tiny-llama", **quantize)), ids),
        "lora_on_nf4": logits(PeftModel.from_pretrained(dequantized(load("tiny-llama", **quantize)), adapter).eval(), ids),
    },
    out,
)
