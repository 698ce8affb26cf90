"""Makes adamw8.safetensors: bitsandbytes 0.50.2's AdamW8bit on the CPU, five steps on 1000 values.

Needs torch, bitsandbytes and safetensors: `python adamw8.py adamw8.safetensors`.
"""
import sys

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import create_dynamic_map
from safetensors.torch import save_file

torch.manual_seed(7)
# Gradients of several sizes; one block of zeros at first, one tail shorter than a block.
size = torch.logspace(-4, 0, 1000)
start = torch.randn(1000)
grads = torch.randn(5, 1000) * size
grads[:2, 256:512] = 0
param = torch.nn.Parameter(start.clone())
optimizer = bnb.optim.AdamW8bit([param], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, min_8bit_size=1)
out = {"start": start, "grads": grads, "map": create_dynamic_map(signed=False)}
for step, grad in enumerate(grads):
    param.grad = grad.clone()
    optimizer.step()
    state = optimizer.state[param]
    out[f"param.{step}"] = param.detach().clone()
    for name, codes, absmax in [("m", "state1", "absmax1"), ("v", "state2", "absmax2")]:
        out[f"{name}.codes.{step}"] = state[codes].flatten().clone()
        out[f"{name}.absmax.{step}"] = state[absmax].clone()
save_file(out, sys.argv[1])
