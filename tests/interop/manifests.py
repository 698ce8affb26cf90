"""Makes `tests/data/gguf_manifests.json`: what llama.cpp's converter writes for each golden, and what every tensor is made of.

`python tests/interop/manifests.py LLAMA_CPP OUT`, with the source of llama.cpp and the packages of requirements.txt. The converter
runs on a copy of each golden, some with constants that llama.cpp has in its code (`CHANGES`). The values of each tensor of its file
are looked for among those of the golden: as they are, turned, or in another order.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

LLAMA, OUT = Path(sys.argv[1]), Path(sys.argv[2])
sys.path[:0] = [str(LLAMA), str(LLAMA / "gguf-py")]
logging.disable(logging.WARNING)
import gguf  # noqa: E402
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class  # noqa: E402

GOLDENS = Path(__file__).resolve().parents[1] / "data/oracles/families"
SLIDING = "sliding_attention"
CHANGES = {name: {} for name in """apertus arcee cohere2 ernie4_5 exaone4 falcon_h1 gemma4_text glm4 gpt2 gpt_oss granite lfm2
    mamba2 ministral3 olmo2 olmo3 phi3 phi4_mini qwen3 qwen3_5_text seed_oss youtu""".split()}
CHANGES |= {
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
    "gemma2": {"query_pre_attn_scalar": 24},
    "gemma4_text_moe": {"dtype": "bfloat16"},
    "mistral": {"sliding_window": None},
    "gemma3_text": {"query_pre_attn_scalar": 24, "layer_types": [SLIDING] * 3},
    "granite_swa": {"layer_rope_theta": [0, 1e4, 1e4, 0]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "granitemoehybrid_moe": {"layer_types": ["mamba", "attention"], "position_embedding_type": "nope"},
    "hunyuan_v1_dense": {"max_position_embeddings": 32768},
    "internlm3": {"architectures": ["InternLM3ForCausalLM"]},
    "lfm2_moe": {"routed_scaling_factor": 1.0},
    "minicpm3": {"scale_emb": 12.0, "dim_model_base": 256},
    "qwen2": {"use_sliding_window": False, "layer_types": None},
    "qwen3_moe": {"mlp_only_layers": [], "num_hidden_layers": 2},
    "qwen3_next": {"mlp_only_layers": [], "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "smollm3": {"use_sliding_window": False, "layer_types": None, "sliding_window": None},
    "starcoder2": {"sliding_window": None},
}
# Keys of older configs, which the converter asks for.
OLDER = {"cohere2": {"rotary_pct": 1.0}, "gpt2": {"n_ctx": 64}, "granite_swa": {"no_rope_layers": [0, 1, 1, 0]}}
# A layer without experts among those with some, which llama.cpp has not, and the one that takes its place.
DROPPED = {"qwen3_moe": ["layers.1.", "layers.2."], "qwen3_next": ["layers.2.", ""]}


def convert(name, folder):
    """Runs the converter; returns the config and the weights that it saw, and its file."""
    config = json.loads((GOLDENS / name / "config.json").read_text()) | CHANGES[name] | OLDER.get(name, {})
    config = {key: value for key, value in config.items() if value is not None}
    weights = load_file(GOLDENS / name / "model.safetensors")
    if name in DROPPED:
        dropped, last = DROPPED[name]
        weights = {key: value for key, value in weights.items() if dropped not in key}
        weights = {key.replace(last, dropped) if last else key: value for key, value in weights.items()}
    (folder / "config.json").write_text(json.dumps(config))
    # One of the converters counts its tokens.
    vocabulary = {"model": {"vocab": {str(i): i for i in range(config["vocab_size"])}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    kind = get_model_class(get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT))
    for each in [*ModelBase._model_classes[ModelType.TEXT].values(), *(c for c in vars(kind).values() if isinstance(c, type))]:
        each.set_vocab = lambda self: self.gguf_writer.add_tokenizer_model("no_vocab")
    if kind.supports_mtp_export:
        kind.no_mtp = True
    with torch.inference_mode():
        kind(folder, gguf.LlamaFileType.ALL_F32, folder / "model.gguf", eager=True, model_name=name).write()
    return config, {key: value.float().numpy() for key, value in weights.items()}, gguf.GGUFReader(folder / "model.gguf")


def falcons_factors(c):
    """The factors that the converter multiplies into Falcon-H1's weights, by module: rows, and theirs one after the other."""
    inner, states, into = c["mamba_d_ssm"], c["mamba_n_groups"] * c["mamba_d_state"], c["attention_in_multiplier"]
    parts = zip([inner, inner, states, states, c["mamba_n_heads"]], c["ssm_multipliers"])
    all_rows = {"down_proj": [c["mlp_multipliers"][1]], "gate_proj": [c["mlp_multipliers"][0]],
                "k_proj": [c["key_multiplier"], into], "q_proj": [into], "v_proj": [into],
                "o_proj": [c["attention_out_multiplier"]], "out_proj": [c["ssm_out_multiplier"]],
                "lm_head": [c["lm_head_multiplier"]], "embed_tokens": [c["embedding_multiplier"]]}
    return all_rows, {"in_proj": [[rows, [c["ssm_in_multiplier"], factor]] for rows, factor in parts]}


def scale(weights, config):
    all_rows, parts = falcons_factors(config)
    scaled = dict(parts)
    for name, value in weights.items():
        module = name.rsplit(".", 2)[-2]
        if module in all_rows:
            scaled[module] = [[value.shape[0], all_rows[module]]]
        at, value = 0, value.copy()
        for rows, factors in scaled.get(module, []):
            for factor in factors:
                value[at:at + rows] *= np.float32(factor)
            at += rows
        weights[name] = value
    return scaled


def runs(rows):
    """Numbers as `[first, how many, step]`."""
    found = []
    while rows:
        step = rows[1] - rows[0] if len(rows) > 1 else 1
        count = 1
        while count < len(rows) and rows[count] == rows[0] + count * step:
            count += 1
        found.append([rows[0], count, step])
        rows = rows[count:]
    return found


def rows_of(weights):
    """Every row of the golden's matrices, and of the same turned: name, first row and rows of the matrix, its number."""
    plain, turned = {}, {}
    for name, value in weights.items():
        if value.ndim < 2:
            continue
        flat = value.reshape(-1, value.shape[-1])
        for row in range(len(flat)):
            plain.setdefault(flat[row].tobytes(), (name, 0, len(flat), row))
        for number, matrix in enumerate(value.reshape(-1, *value.shape[-2:])):
            for row, values in enumerate(np.ascontiguousarray(matrix.T)):
                turned.setdefault(values.tobytes(), (name, number * value.shape[-2], value.shape[-2], row))
    return plain, turned


def matrix(values, tables):
    """The pieces of a matrix: name, first row, rows, whether turned before, which rows, whether turned after."""
    for after in (0, 1):
        for before, table in enumerate(tables):
            found = [table.get(np.ascontiguousarray(row).tobytes()) for row in (values.T if after else values)]
            if None in found or (after and len({key[:2] for key in found}) > 1):
                continue
            pieces = []
            for name, first, count, row in found:
                if not pieces or pieces[-1][:2] != [name, first]:
                    pieces.append([name, first, count, before, [], after])
                pieces[-1][4].append(row)
            return [[*piece[:4], runs(piece[4]), piece[5]] for piece in pieces]
    return None


def vector(values, weights):
    """The piece of a vector, and what is done to it."""
    for function, apply in (("same", lambda v: v), ("plus1", lambda v: v + np.float32(1)),
                            ("negexp", lambda v: -torch.exp(torch.from_numpy(v.copy())).numpy())):
        for name, own in weights.items():
            if own.size != values.size:
                continue
            own = apply(own.ravel())
            place = {float(v): i for i, v in enumerate(own)}
            if np.array_equal(own, values):
                return function, [name]
            if len(place) == values.size and all(float(v) in place for v in values):
                return function, [[name, 0, values.size, 0, runs([place[float(v)] for v in values]), 0]]
    return None, None


def explain(name, folder):
    config, weights, file = convert(name, folder)
    scaled = scale(weights, config) if name == "falcon_h1" else {}
    kinds = {gguf.GGUFValueType.STRING: "text", gguf.GGUFValueType.UINT32: "u32", gguf.GGUFValueType.INT32: "i32",
             gguf.GGUFValueType.FLOAT32: "f32", gguf.GGUFValueType.BOOL: "bool"}
    metadata, tensors, tables = {}, [], rows_of(weights)
    for key, field in file.fields.items():
        if key.startswith("GGUF.") or key.startswith("general.") and key not in ("general.architecture", "general.type"):
            continue
        listed = field.types[0] == gguf.GGUFValueType.ARRAY
        metadata[key] = [kinds[field.types[-1]] + "s" * listed, field.contents()]
    for tensor in file.tensors:
        values = np.array(tensor.data, dtype=np.float32).reshape([int(n) for n in reversed(tensor.shape)])
        layer = tensor.name.split(".")[1] if tensor.name.startswith("blk.") else None
        near = {n: v for n, v in weights.items() if (f"s.{layer}." in n or f".h.{layer}." in n if layer else "layers." not in n)}
        function = "same"
        if tensor.name.startswith("rope_f"):
            function, pieces = "given", [values.ravel().tolist()]
        elif values.squeeze().ndim < 2 or tensor.name.endswith("ssm_norm.weight"):
            function, pieces = vector(values.ravel(), near)
        else:
            parts = [matrix(part, tables) for part in values.reshape(-1, *values.shape[-2:])]
            pieces = None if None in parts else [piece for part in parts for piece in part]
        assert pieces, f"{name}: {tensor.name} is not made of the golden"
        if function != "given":
            whole = lambda n: int(np.prod(weights[n].shape[:-1])) if weights[n].ndim > 1 else weights[n].size
            pieces = [p if isinstance(p, str) else p[0] if p[1:] == [0, whole(p[0]), 0, [[0, whole(p[0]), 1]], 0] else p for p in pieces]
        bits = values.ravel().view(np.uint32).astype(np.uint64)
        weighted = bits * (np.arange(bits.size, dtype=np.uint64) % np.uint64(65521) + np.uint64(1))
        tensors.append([tensor.name, list(values.shape), function, pieces, int(weighted.sum(dtype=np.uint64)) % 2**32])
    found = {"change": CHANGES[name], "drop": DROPPED.get(name), "scaled": scaled}
    return {key: value for key, value in found.items() if value} | {"metadata": metadata, "tensors": tensors}


lines = []
for family in sorted(CHANGES):
    with tempfile.TemporaryDirectory() as folder:
        lines.append(json.dumps(family) + ":" + json.dumps(explain(family, Path(folder)), separators=(",", ":")))
OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
