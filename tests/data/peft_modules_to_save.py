"""Writes oracles/peft: a tiny Llama with an untied head, a PEFT adapter with `modules_to_save`, and its logits in f32.

    pip install torch==2.15.0 transformers==5.23.0 peft==0.21.2
    python3 peft_modules_to_save.py oracles/peft

The seeds and scales are those the files here were made with; the ids of the logits are in tests/library/adapters.rs.
"""
import os, sys

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

OUT, SEED, CASE = sys.argv[1], 500, 6
VOCAB, TOKENS = 256, 16


def make_base():
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=VOCAB, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, attn_implementation="eager"))
    numbers = torch.Generator().manual_seed(SEED)
    for name, p in model.named_parameters():
        r = torch.randn(p.shape, generator=numbers)
        scale = 0.15 if "embed" in name else 0.9 / p.shape[-1] ** 0.5
        p.data = ((p.data + 0.2 * r) if p.dim() == 1 else scale * r).bfloat16().float()
    model.to(torch.bfloat16).save_pretrained(os.path.join(OUT, "base"))


make_base()
base = AutoModelForCausalLM.from_pretrained(os.path.join(OUT, "base"), dtype=torch.float32, attn_implementation="eager")
ids = torch.randint(3, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(SEED + 1))
torch.manual_seed(9000 + CASE)
numbers = torch.Generator().manual_seed(9100 + CASE)
model = get_peft_model(base.eval(), LoraConfig(
    task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0,
    bias="none", modules_to_save=["lm_head", "input_layernorm"])).eval()
for _, p in sorted(model.named_parameters()):
    if p.requires_grad:
        p.data = p.data + 0.03 * torch.randn(p.shape, generator=numbers)
model.save_pretrained(os.path.join(OUT, "modules_to_save"))
with torch.no_grad():
    logits = model(input_ids=ids, use_cache=False).logits.float().contiguous()
save_file({"logits": logits}, os.path.join(OUT, "modules_to_save", "logits.safetensors"))
