"""Writes tests/data/gguf_types.gguf (every supported type, by gguf-py) with gguf-py's dequantization beside each tensor,
tests/data/gguf_few_bits.gguf (the same of the types of few bits),
and tests/data/gguf_smollm2_rows.json (rows of the real model in Hugging Face order). usage: gguf_goldens.py OUT_DIR MODEL.gguf"""
import json, sys
import numpy as np, gguf
from gguf import GGMLQuantizationType as T, GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

out, model = sys.argv[1:3]
rng = np.random.default_rng(7)
w = GGUFWriter(f"{out}/gguf_types.gguf", "llama")
w.add_string("note", "one tensor of each type and its values by gguf-py")
HALF = {T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}
# f16: smallest subnormal, largest subnormal, smallest normal, one, largest, their negatives, zero of either sign
SCALES = [0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x8001, 0xFBFF, 0x8000, 0x0000, 0x2E66]
for t in [T.F32, T.F16, T.BF16] + list(HALF):
    n, size = GGML_QUANT_SIZES[t]
    if t in HALF:
        # random codes under extreme scales, two rows, and under ordinary ones
        rows = 4
        blocks = rng.integers(0, 256, (rows * 3, size), dtype=np.uint8)
        k = 0
        for b in range(len(blocks)):
            for at in HALF[t]:
                s = SCALES[k % len(SCALES)] if b < 9 else int(np.float16(rng.normal() * 0.01).view(np.uint16))
                blocks[b, at:at + 2] = np.frombuffer(np.uint16(s).tobytes(), dtype=np.uint8)
                k += 1 if at == HALF[t][-1] else 3
        data = blocks.reshape(rows, 3 * size)
        if t.name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
            real = quantize((rng.normal(size=(2, 96)) * 0.05).astype(np.float32), t)
            data = np.concatenate([data, real])
    else:
        x = np.concatenate([rng.normal(size=90), [0.0, -0.0, 1e-7, 6e-5, 65504.0, -1.0]]).astype(np.float32).reshape(2, 48)
        data = x if t == T.F32 else quantize(x, t)
    with np.errstate(over="ignore"):
        want = dequantize(data, t).astype(np.float32)
    assert np.isfinite(want).all(), t
    w.add_tensor(t.name, data, raw_dtype=t)
    w.add_tensor(t.name + ".f32", want)
w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()

# Types of few bits, which gguf-py cannot quantize to: random codes under ordinary scales.
FEW = {T.Q2_K: [80, 82], T.Q3_K: [108], T.IQ1_S: [0], T.IQ1_M: [], T.IQ2_XXS: [0], T.IQ2_XS: [0], T.IQ2_S: [0], T.IQ3_XXS: [0],
       T.IQ3_S: [0], T.IQ4_NL: [0], T.IQ4_XS: [0], T.TQ1_0: [52], T.TQ2_0: [64], T.MXFP4: [], T.NVFP4: []}
w = GGUFWriter(f"{out}/gguf_few_bits.gguf", "llama")
for t, scales in FEW.items():
    n, size = GGML_QUANT_SIZES[t]
    block = rng.integers(0, 256, (1 if n == 256 else 2, size), dtype=np.uint8)
    for b in block:
        for at in scales:
            b[at:at + 2] = np.frombuffer(np.float16(rng.normal() * 0.01).tobytes(), dtype=np.uint8)
        if t == T.IQ1_M:
            b[55] = b[55] & 15 | 0x20
        if t == T.MXFP4:
            b[0] = rng.choice([0, 1, 2, 118, 125])
        if t == T.NVFP4:
            b[:4] = rng.choice([0, 1, 7, 8, 0x38, 0x7e, 0x7f], 4, replace=False)
    w.add_tensor(t.name, block, raw_dtype=t)
    w.add_tensor(t.name + ".f32", dequantize(block, t).astype(np.float32))
w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()

r = GGUFReader(model)
tensors = {t.name: t for t in r.tensors}
heads = {"attn_q": 9, "attn_k": 3}
rows = []
for name, hf in [("token_embd.weight", "model.embed_tokens.weight"), ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"),
                 ("blk.29.attn_k.weight", "model.layers.29.self_attn.k_proj.weight"), ("blk.7.attn_v.weight", "model.layers.7.self_attn.v_proj.weight"),
                 ("blk.3.ffn_down.weight", "model.layers.3.mlp.down_proj.weight"), ("output_norm.weight", "model.norm.weight")]:
    t = tensors[name]
    x = dequantize(t.data, t.tensor_type).reshape(list(reversed([int(d) for d in t.shape])))
    h = next((n for k, n in heads.items() if k in name), None)
    if h:  # inverse of the converter's permute
        x = x.reshape(h, x.shape[0] // h // 2, 2, -1).swapaxes(1, 2).reshape(x.shape)
    x = np.atleast_2d(x)
    bits = x.view(np.uint32)
    # a 64-bit FNV-like checksum over all values, and the first values of some rows
    n = x.shape[0]
    picks = sorted({0, 1, 33, 100, n - 1} & set(range(n)))
    rows.append({"name": hf, "shape": list(x.shape) if t.name != "output_norm.weight" else [x.shape[1]],
                 "rows": {str(i): bits[i, :8].tolist() for i in picks},
                 "sum_of_bits": int(bits.astype(np.uint64).sum() % (1 << 53)),
                 "weighted_sum_of_bits": int((bits.reshape(-1).astype(np.uint64) * (np.arange(bits.size, dtype=np.uint64) % np.uint64(65521))).sum() % np.uint64(1 << 53))})
json.dump(rows, open(f"{out}/gguf_smollm2_rows.json", "w"), separators=(",", ":"))
