"""Pocketlora beside the programs whose files it reads and writes. Prints a table; exits with 1 if a check fails.

Called by `run`, which says how. Every check compares numbers or texts of two programs; none of them shares code.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

WORK = Path(sys.argv[1])
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
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
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


def check_tokens(made):
    """tokens of a text in five scripts, with code, emoji and special tokens"""
    from transformers import AutoTokenizer

    text = TEXT + MODELS[made["name"]].format("user\n1234567  tabs\there\r\n") + "¿Qué?\n\n\n    naïve ﬁ 3.5e-7 ½ 日本語テスト한국어"
    ours = ids_of(made, text)
    # Both from the file as it was pulled, not from what we made of it.
    theirs = {"llama.cpp": serve(made["gguf"]).post("tokenize", content=text, add_special=True, parse_special=True)["tokens"],
              "transformers": AutoTokenizer.from_pretrained(made["gguf"].parent, gguf_file=made["gguf"].name)(text)["input_ids"]}
    apart = [f"{who}'s differ from the {first(ours, ids)}th on ({len(ours)} of ours, {len(ids)})" for who, ids in theirs.items()
             if ids != ours]
    return not apart, "; ".join(apart) or f"{len(ours)} ids, the same in all three"


def first(a, b):
    """The first place, from 1, at which two lists differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b), 1) if x != y), min(len(a), len(b)) + 1)


def check_llama_logits(made):
    """llama.cpp runs our exported model and gives our probabilities"""
    ids = ids_of(made)
    mine = ours(made["f16"], ids).log_softmax(-1)
    server, worst, same, places = serve(made["model_gguf"]), 0.0, 0, range(4, len(ids) + 1, 4)
    for end in places:
        answer = server.post("completion", prompt=ids[:end], n_predict=1, n_probs=LIKELIEST, temperature=0)
        tops = answer["completion_probabilities"][0]["top_logprobs"]
        worst = max(worst, *(abs(top["logprob"] - mine[end - 1, top["id"]].item()) for top in tops))
        same += tops[0]["id"] == mine[end - 1].argmax().item()
    found = f"of the {LIKELIEST} likeliest tokens within {worst:.1e}, likeliest the same at {same} of {len(places)} places"
    return worst <= HALVES, found


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
    logits = model(mx.array([ids]))
    if mx.abs(logits - plain).max().item() < 0.1:
        return False, "the adapter does nothing in mlx-lm"
    logits = torch.tensor(logits[0].astype(mx.float32).tolist())
    return compared(logits, ours(made["f16"], ids, "-a", made["adapter"]), ROUNDED)


CHECKS = {
    "nf4-ours": (check_nf4_ours, ["transformers", "bitsandbytes", "torch"]),
    "nf4-theirs": (check_nf4_theirs, ["transformers", "bitsandbytes", "torch"]),
    "peft": (check_peft, ["peft", "transformers"]),
    "tokens": (check_tokens, ["transformers", "xllamacpp"]),
    "llama-logits": (check_llama_logits, ["xllamacpp"]),
    "llama-model": (check_llama_model, ["xllamacpp"]),
    "llama-adapter": (check_llama_adapter, ["xllamacpp"]),
    "mlx": (check_mlx, ["mlx-lm", "mlx"]),
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
        # Each in a process of its own: a library that crashes is one failure, and their memory is not added up.
        for name in chosen:
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
