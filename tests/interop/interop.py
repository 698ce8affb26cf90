"""Pocketlora beside the programs whose files it reads and writes. Prints a table; exits with 1 if a check fails.

Called by `run`, which says how. Every check compares numbers or texts of two programs; none of them shares code.
"""

import difflib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import tiny

WORK = Path(sys.argv[1])
# What is of none of the models below, and done once.
ONCE = ("types", "methods", "exports", "forms")
# Each by its name for `pull`, with how a turn of a chat looks in it.
MODELS = {
    "smollm2-135m": "<|im_start|>{}<|im_end|>",
    "gemma3-270m": "<start_of_turn>{}<end_of_turn>",
    "qwen2.5-coder-0.5b": "<|im_start|>{}<|im_end|>",
}
POCKETLORA = os.environ["POCKETLORA"]
TEXT = (
    "The Louvre is a museum in Paris. It opened in 1793, and its most visited painting is small.\n"
    "def area(r):\n    return 3.14159 * r ** 2\n"
    "Zürich, Москва, 東京 and القاهرة are cities 🏙️.\n"
)
PROMPT = "The three primary colours are"
# Largest difference of a logit (they reach 30) between two programs that compute in f32.
EXACT = 5e-3
# The same where a program rounds what lies between layers to 16 bits.
ROUNDED = 0.5
# Largest difference of a logarithm of a probability that llama.cpp gives, whose products round activations to 16 bits.
HALVES = 0.1
# Likeliest tokens of each place that are compared with llama.cpp.
LIKELIEST = 1000


def pocketlora(*args):
    done = subprocess.run([POCKETLORA, *map(str, args)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"pocketlora {' '.join(map(str, args))}: {done.stderr.strip()}")
    return done.stdout


def once(path, *args):
    """Makes `path` by a command unless it is there."""
    if not path.exists():
        pocketlora(*args)
    return path


def materials(name):
    """The model in 16 bits and in NF4, an adapter, and what is exported of them."""
    gguf = Path(pocketlora("pull", name).strip().splitlines()[-1])
    f16 = once(WORK / "f16", "quantize", gguf, "--to", "f16", "-o", WORK / "f16")
    nf4 = once(WORK / "nf4", "quantize", f16, "-o", WORK / "nf4")
    data = WORK / "data.jsonl"
    lines = [{"prompt": f"{PROMPT} of lamp {n}:", "completion": f" teal, amber and {n} greys."} for n in range(24)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    adapter = WORK / "adapter"
    once(adapter / "adapter_config.json", "train", "--auto", "off", "--keep", "off", "--skip-check", "-m", f16,
         "--no-quantize", "-d", data, "-o", adapter, "--steps", "8", "--lr", "1e-3", "--targets", "all")
    model_gguf = once(WORK / "model.gguf", "export", f16, "--to", "gguf", "--type", "f16", "-o", WORK / "model.gguf")
    adapter_gguf = once(WORK / "adapter.gguf", "export", adapter, "-m", f16, "--to", "gguf", "-o", WORK / "adapter.gguf")
    once(WORK / "mlx" / "adapters.safetensors", "export", adapter, "-m", f16, "--to", "mlx", "-o", WORK / "mlx")
    return {"name": name, "gguf": gguf, "f16": f16, "nf4": nf4, "adapter": adapter, "model_gguf": model_gguf, "adapter_gguf": adapter_gguf,
            "mlx": WORK / "mlx"}


def ids_of(made, text=TEXT):
    (WORK / "text.txt").write_bytes(text.encode())
    report = pocketlora("generate", "-m", made["f16"], "--no-quantize", "-f", WORK / "text.txt", "-n", "1", "--json")
    return json.loads(report)["prompt_ids"]


def ours(model, ids, *more):
    """Our logits `[tokens, vocabulary]` in f32 arithmetic."""
    import torch
    from safetensors.torch import load_file

    (WORK / "ids.json").write_text(json.dumps([ids]))
    out = WORK / "logits.safetensors"
    out.unlink(missing_ok=True)
    pocketlora("eval", "-m", model, "--no-quantize", "--precision", "exact", "--ids", WORK / "ids.json", "--save-logits", out,
               "--json", *more)
    return load_file(out)["logits.0"].to(torch.float32)


def theirs(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].to(torch.float32)


def compared(a, b, bound):
    worst = (a - b).abs().max().item()
    same = (a.argmax(-1) == b.argmax(-1)).float().mean().item()
    return worst <= bound, f"logits within {worst:.1e}, likeliest token the same at {100 * same:.1f} % of {len(a)} places"


def in_f32(model):
    """Has the layers multiply in f32 by what bitsandbytes dequantizes: its own products on CPUs round to 16 bits."""
    import bitsandbytes as bnb
    import torch

    for name, module in list(model.named_modules()):
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).to(torch.float32)
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        plain.weight, plain.bias = torch.nn.Parameter(weight, requires_grad=False), module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32)
    return model


def check_nf4_ours(made):
    """transformers + bitsandbytes load our NF4 folder and give our logits"""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made["nf4"], dtype=torch.float32, device_map="cpu")
    ids = ids_of(made)
    return compared(theirs(in_f32(model), ids), ours(made["nf4"], ids), EXACT)


def check_nf4_theirs(made):
    """we load an NF4 folder that transformers + bitsandbytes wrote and give its logits"""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(made["f16"], quantization_config=config, dtype=torch.float32,
                                                 device_map="cpu")
    out = WORK / "theirs"
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(made["f16"] / name, out / name)
    ids = ids_of(made)
    return compared(theirs(in_f32(model), ids), ours(out, ids), EXACT)


def check_peft(made):
    """PEFT loads our adapter and gives our logits"""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(made["f16"], dtype=torch.float32)
    ids = ids_of(made)
    plain = theirs(base, ids)
    model = PeftModel.from_pretrained(base, made["adapter"])
    adapted = theirs(model, ids)
    if (adapted - plain).abs().max() < 0.1:
        return False, "the adapter does nothing in PEFT"
    return compared(adapted, ours(made["f16"], ids, "-a", made["adapter"]), EXACT)


def check_methods(made):
    """PEFT loads adapters of every method that we train and it has, and gives our logits"""
    return tiny.methods(WORK, pocketlora, ours, theirs)


def check_exports(made):
    """llama.cpp runs the exported tiny model of every family and gives our probabilities"""
    return tiny.exports(WORK, pocketlora, ours, serve, HALVES)


def check_forms(made):
    """we read what bitsandbytes and mlx-lm write in 4 and 8 bits, and give its logits"""
    return tiny.forms(WORK, pocketlora, ours, theirs, in_f32)


def check_tokens(made):
    """tokens of a text in five scripts, with code, emoji and special tokens"""
    from transformers import AutoTokenizer

    text = TEXT + MODELS[made["name"]].format("user\n1234567  tabs\there\r\n") + "¿Qué?\n\n\n    naïve ﬁ 3.5e-7 ½ 日本語テスト한국어"
    ours = ids_of(made, text)
    # Both from the file as it was pulled, not from what we made of it. transformers' reader of such files does not know every
    # way to cut a text into words, so that its ids are told, and llama.cpp's decide.
    theirs = {"llama.cpp": serve(made["gguf"]).post("tokenize", content=text, add_special=True, parse_special=True)["tokens"],
              "transformers": AutoTokenizer.from_pretrained(made["gguf"].parent, gguf_file=made["gguf"].name)(text)["input_ids"]}
    same = {who: sum(m.size for m in difflib.SequenceMatcher(None, ours, ids, False).get_matching_blocks()) for who, ids in
            theirs.items()}
    said = ", ".join(f"{same[who]} of {who}'s {len(ids)}" for who, ids in theirs.items())
    return theirs["llama.cpp"] == ours, f"{len(ours)} ids; the same: {said}"


# Where a block of each type has its f16 scales; random bits stand elsewhere.
SCALES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2],
          "Q5_K": [0, 2], "Q6_K": [208], "IQ1_S": [0], "IQ1_M": [], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0], "IQ3_XXS": [0],
          "IQ3_S": [0], "IQ4_NL": [0], "IQ4_XS": [0], "TQ1_0": [52], "TQ2_0": [64], "MXFP4": [], "NVFP4": [], "Q1_0": [0]}


def check_types(made):
    """values of every type of GGUF files are ggml's, bit for bit"""
    import ctypes

    import gguf
    import numpy as np
    import xllamacpp
    from gguf.constants import GGML_QUANT_SIZES
    from safetensors.numpy import load_file

    side, rng, path, out = 256, np.random.default_rng(1), WORK / "types.gguf", WORK / "types"
    layers = -(-len(SCALES) // 3)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (("block_count", layers), ("context_length", 64), ("embedding_length", side), ("feed_forward_length", side),
                       ("attention.head_count", 4)):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    plain = lambda *shape: np.ones(shape, dtype=np.float32)
    writer.add_tensor("token_embd.weight", plain(32, side))
    writer.add_tensor("output_norm.weight", plain(side))
    blocks, free = {}, iter(SCALES)
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", plain(side))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", plain(side, side))
        for part in ("gate", "up", "down"):
            name = next(free, "Q8_0")
            kind = gguf.GGMLQuantizationType[name]
            values, size = GGML_QUANT_SIZES[kind]
            data = rng.integers(0, 256, (side * side // values, size), dtype=np.uint8)
            for at in SCALES[name]:
                data[:, at:at + 2] = (rng.normal(size=len(data)) * 0.01).astype(np.float16).view(np.uint8).reshape(-1, 2)
            if name == "IQ1_M":
                # Its scale is spread over the upper bits of four numbers.
                data[:, 55] = data[:, 55] & 15 | 0x20
            if name == "MXFP4":
                data[:, 0] = rng.integers(0, 200, len(data))
            blocks[f"model.layers.{layer}.mlp.{part}_proj.weight"] = (name, data)
            writer.add_tensor(f"blk.{layer}.ffn_{part}.weight", data.reshape(side, -1), raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    shutil.rmtree(out, ignore_errors=True)
    pocketlora("quantize", path, "--to", "f32", "-o", out)
    ggml, read, wrong = ctypes.CDLL(xllamacpp.xllamacpp.__file__), load_file(out / "model.safetensors"), []
    for tensor, (name, data) in blocks.items():
        expected = np.empty(side * side, dtype=np.float32)
        decode = getattr(ggml, f"dequantize_row_{name.lower().replace('_k', '_K')}")
        decode(data.ctypes.data_as(ctypes.c_void_p), expected.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(side * side))
        if not np.array_equal(read[tensor].reshape(-1).view(np.uint32), expected.view(np.uint32)):
            wrong.append(name)
    return not wrong, f"{len(SCALES)} types, {side * side} values of each" + (f"; not of {', '.join(wrong)}" if wrong else "")


def check_llama_logits(made):
    """llama.cpp runs our exported model and gives our probabilities"""
    ids = ids_of(made)
    mine = ours(made["f16"], ids).log_softmax(-1)
    server, worst, same, compared_at = serve(made["model_gguf"]), 0.0, 0, 0
    for end in range(4, len(ids) + 1, 4):
        answer = server.post("completion", prompt=ids[:end], n_predict=1, n_probs=LIKELIEST, temperature=0,
                             ignore_eos=True)
        # Nothing is said of a token that is a part of a letter.
        if "completion_probabilities" not in answer:
            continue
        compared_at += 1
        tops = answer["completion_probabilities"][0]["top_logprobs"]
        worst = max(worst, *(abs(top["logprob"] - mine[end - 1, top["id"]].item()) for top in tops))
        same += tops[0]["id"] == mine[end - 1].argmax().item()
    found = f"of the {LIKELIEST} likeliest tokens within {worst:.1e}, likeliest the same at {same} of {compared_at} places"
    return compared_at > 0 and worst <= HALVES, found


class serve:
    """A server of llama.cpp in this process."""

    def __init__(self, model, lora=None):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx = 512
        params.n_parallel = 1
        params.warmup = False
        if lora:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        self.server = xllamacpp.Server(params)

    def post(self, what, **body):
        request = urllib.request.Request(f"{self.server.listening_address}/{what}", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        return json.loads(urllib.request.urlopen(request).read())


def greedy(made, lora):
    return serve(made["model_gguf"], lora).post("completion", prompt=PROMPT, n_predict=32, temperature=0)["content"]


def our_text(made, *more):
    report = pocketlora("generate", "-m", made["f16"], "--no-quantize", "--precision", "exact", "--no-guard", "-p", PROMPT, "-n",
                        "32", "--json", *more)
    return json.loads(report)["text"]


def check_llama_model(made):
    """llama.cpp runs our exported model and says what we say, greedily"""
    a, b = our_text(made), greedy(made, None)
    return a == b, f"{a!r}" if a == b else f"{a!r} / {b!r}"


def check_llama_adapter(made):
    """llama.cpp runs our GGUF adapter and says what we say, greedily"""
    a, b = our_text(made, "-a", made["adapter"]), greedy(made, made["adapter_gguf"])
    if a == our_text(made):
        return False, "the adapter changes nothing"
    return a == b, f"{a!r}" if a == b else f"{a!r} / {b!r}"


def check_mlx(made):
    """mlx-lm loads our exported adapter and gives our logits"""
    import mlx.core as mx
    import torch
    from mlx_lm.utils import load_model
    from mlx_lm.tuner.utils import load_adapters

    mx.set_default_device(mx.cpu)
    model, _ = load_model(made["f16"])
    ids = ids_of(made)
    plain = model(mx.array([ids]))
    model = load_adapters(model, str(made["mlx"]))
    # Gemma's numbers do not fit f16, in which its weights are here.
    model.set_dtype(mx.float32)
    logits = model(mx.array([ids]))
    if mx.abs(logits - plain).max().item() < 0.1:
        return False, "the adapter does nothing in mlx-lm"
    logits = torch.tensor(logits[0].astype(mx.float32).tolist())
    return compared(logits, ours(made["f16"], ids, "-a", made["adapter"]), ROUNDED)


CHECKS = {
    "nf4-ours": (check_nf4_ours, ["transformers", "bitsandbytes", "torch"]),
    "nf4-theirs": (check_nf4_theirs, ["transformers", "bitsandbytes", "torch"]),
    "peft": (check_peft, ["peft", "transformers"]),
    "methods": (check_methods, ["peft", "transformers"]),
    "tokens": (check_tokens, ["transformers", "xllamacpp"]),
    "types": (check_types, ["xllamacpp", "gguf"]),
    "llama-logits": (check_llama_logits, ["xllamacpp"]),
    "llama-model": (check_llama_model, ["xllamacpp"]),
    "llama-adapter": (check_llama_adapter, ["xllamacpp"]),
    "mlx": (check_mlx, ["mlx-lm", "mlx"]),
    "exports": (check_exports, ["xllamacpp"]),
    "forms": (check_forms, ["transformers", "bitsandbytes", "mlx-lm"]),
}


def main():
    global WORK
    models = [name for name in sys.argv[2:] if name in MODELS] or list(MODELS)
    chosen = [name for name in sys.argv[2:] if name not in MODELS] or list(CHECKS)
    whole, rows = WORK, []
    for model in models:
        WORK = whole / model
        WORK.mkdir(parents=True, exist_ok=True)
        made = materials(model)
        own = [name for name in chosen if name not in ONCE or model == models[0]]
        # Each in a process of its own: a library that crashes is one failure, and their memory is not added up.
        for name in own:
            check, packages = CHECKS[name]
            if os.environ.get("INTEROP_CHILD"):
                print(json.dumps(check(made)))
                return 0
            child = subprocess.run([sys.executable, __file__, str(whole), model, name], capture_output=True, text=True,
                                   env={**os.environ, "INTEROP_CHILD": "1"})
            try:
                passed, found = json.loads(child.stdout.strip().splitlines()[-1])
            except (IndexError, ValueError):
                passed, found = False, "failed: " + " ".join(child.stderr.strip().splitlines()[-1:])
            versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
            rows.append((("yes" if passed else "NO"), model, check.__doc__, versions, found))
            print("| " + " | ".join(rows[-1]) + " |", file=sys.stderr, flush=True)
    print("| | model | what | with | found |\n|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    return 0 if all(row[0] == "yes" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
