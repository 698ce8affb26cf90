"""Writes peft_curve.json: the loss of 50 steps of LoRA training with PEFT on bitsandbytes' NF4, in f32.

    pip install torch==2.15.0 transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2
    pocketlora pull smollm2-135m
    pocketlora quantize smollm2-135m -o smollm2-nf4
    python3 peft_curve.py smollm2-nf4 > peft_curve.json

The base is the NF4 directory that Pocketlora writes, which transformers reads as any other of bitsandbytes. Samples are
stretches of oracles/ppl_text.txt, no two of the same length, so that a step's number of tokens tells which one it took.
Matrices A are numbers that any program can make; B starts at zero. Nothing depends on torch's random numbers.
"""
import json, os, pathlib, sys
from importlib.metadata import version

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TRANSFORMERS_VERBOSITY="error")
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
STEPS, SHORTEST, RANK, ALPHA, LR = 50, 38, 8, 16, 5e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MASK = (1 << 64) - 1


def mix(key, i):
    """SplitMix64, as kernels/src/random.rs has it."""
    z = (key + (i + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def first_epoch(n, seed=0):
    """The order in which Pocketlora takes n samples: Fisher-Yates (src/rng.rs) with the stream of epoch 0."""
    key, order = mix(mix(seed, 2), 0), list(range(n))
    for count, i in enumerate(range(n - 1, 0, -1)):
        j = mix(key, count) * (i + 1) >> 64
        order[i], order[j] = order[j], order[i]
    return order


def matrix_a(rows, columns):
    """Multiples of 2^-11 / 16 in +-1/16, which f16 holds exactly, from a multiplicative hash of the index."""
    i = torch.arange(rows * columns, dtype=torch.int64)
    return ((((i * 2654435761) >> 16) % 2048 - 1024).float() / 1024 / 16).reshape(rows, columns)


def samples():
    ids, out, at = json.loads((HERE / "oracles/smollm2_ppl_ids.json").read_text()), [], 0
    for length in range(SHORTEST, SHORTEST + STEPS):
        out.append(ids[at : at + length])
        at += length
    assert at <= len(ids)
    return out


def load(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map={"": "cpu"})
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            # Everything in f32: the file says bf16, which would round weights and products.
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            module.weight.quant_state.dtype = torch.float32
    for p in model.parameters():
        # Embeddings and norms stay in the file's f16 whatever is asked for above.
        p.data = p.data.float() if p.is_floating_point() else p.data
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0,
                                             bias="none", target_modules=TARGETS))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p.copy_(matrix_a(*p.shape))
            assert "lora_B" not in name or not p.any()
    # In training mode bitsandbytes keeps the weights as they are in the file; its inference path rounds their scales.
    return model.train()


torch.set_num_threads(2)
model, data = load(sys.argv[1]), samples()
params = [p for p in model.parameters() if p.requires_grad]
assert len(params) == 2 * 7 * 30 and all(p.dtype == torch.float32 for p in params)
optimizer = torch.optim.AdamW(params, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
steps = []
for index in first_epoch(STEPS):
    ids = torch.tensor([data[index]])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    steps.append({"tokens": len(data[index]), "loss": loss.item()})
print(json.dumps({
    "made_with": {p: version(p) for p in ("torch", "transformers", "peft", "bitsandbytes")},
    "rank": RANK, "alpha": ALPHA, "lr": LR, "shortest": SHORTEST, "steps": steps,
}))
