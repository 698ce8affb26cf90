"""Checks on tiny models of random weights, the goldens of the test suite: adapters of every method, exports of every family, and
checkpoints in few bits as other programs write them."""

import json
import shutil
from pathlib import Path

ORACLES = Path(__file__).resolve().parents[1] / "data/oracles"
# Every method of `train` that PEFT has, and settings that change what is in the file. `bottleneck` PEFT has not.
METHODS = [
    "lora", "lora --rslora", "lora --trainable-token-indices 18,19", "lora --targets embed_tokens,q_proj,lm_head",
    "lora --init-lora-weights pissa", "lora-fa", "dora", "adalora", "gralora", "vera", "miss", "delora", "loha", "lokr", "oft",
    "c3a --option block_size=16", "fourierft --option n_frequency=500", "hira", "glora", "boft",
    "hra", "road --option group_size=16", "shira", "beft", "ia3", "ln-tuning", "trainable-tokens --trainable-token-indices 18,19",
    "prompt-tuning", "p-tuning", "prefix-tuning", "cartridge",
    'bdlora --targets q_proj --option use_bdlora={"target_modules_bd_a":["q_proj"],"nblocks":2}',
    # Those that are saved as a plain LoRA.
    "lora-xs", "dylora", "sora", "melora --option mini_loras=2", "hydra", "delta-lora",
]
# Families that `export` writes.
FAMILIES = "arcee ernie4_5 gemma3_text granite llama mistral olmo2 qwen2 qwen3 seed_oss smollm3".split()
# Keys of the goldens' configs of which llama.cpp knows one value only.
WINDOWLESS = {"sliding_window": None, "use_sliding_window": False, "layer_types": None}
CHANGES = {"gemma3_text": {"query_pre_attn_scalar": 24, "layer_types": ["sliding_attention"] * 3}, "mistral": WINDOWLESS,
           "qwen2": WINDOWLESS, "smollm3": WINDOWLESS}
# Largest difference of a logit where both programs compute in f32.
BOUND = 2e-3
# What an adapter must change of a logit at least, for that to say anything.
LEAST = 2e-2
# Ids of a text. The digits 1 and 2, which the adapters have learned, are among them.
IDS = [5, 18, 7, 33, 19, 90, 64, 77, 31, 66]


def model_of(golden, folder, **changes):
    """The golden with a token for each byte, or for the first bytes where its vocabulary is smaller."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(ORACLES / golden / "model.safetensors", folder)
    config = json.loads((ORACLES / golden / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:config["vocab_size"]]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def methods(work, pocketlora, ours, theirs):
    """Trains, loads and compares each method; returns whether all agree, and what was found."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, data, out = model_of("peft/base", work / "tiny"), work / "tiny.jsonl", work / "method"
    lines = [{"prompt": f"{n} is", "completion": f" {n * 7 % 11} and {n % 3}"} for n in range(24)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    load = lambda: AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain, worst, failed = theirs(load(), IDS), 0.0, []
    for method in METHODS:
        shutil.rmtree(out, ignore_errors=True)
        try:
            pocketlora("train", "--auto", "off", "--keep", "off", "--skip-check", "-m", model, "--no-quantize", "-d", data,
                       "-o", out, "--steps", "12", "--lr", "3e-2", "--method", *method.split())
            # Tokens that an adapter puts before the text have logits in PEFT.
            adapted = theirs(PeftModel.from_pretrained(load(), out), IDS)[-len(IDS):]
            own = ours(model, IDS, "-a", out)
        except Exception as e:
            failed.append(f"{method}: {' '.join(str(e).split())}")
            continue
        off, changed = (adapted - own).abs().max().item(), (adapted - plain).abs().max().item()
        worst = max(worst, off)
        if not off <= BOUND:
            failed.append(f"{method}: {off:.1e}")
        elif changed < LEAST:
            failed.append(f"{method}: it changes no logit by more than {changed:.1e}")
    found = f"{len(METHODS)} methods and settings of them, logits within {worst:.1e}"
    return not failed, "; ".join([found, *failed])


def exports(work, pocketlora, ours, serve, bound):
    """Exports each family and has llama.cpp read it; returns whether all agree, and what was found."""
    worst, failed, out = 0.0, [], work / "tiny.gguf"
    for family in FAMILIES:
        try:
            model = model_of(f"families/{family}", work / "tiny", **CHANGES.get(family, {}))
            out.unlink(missing_ok=True)
            pocketlora("export", model, "--to", "gguf", "--type", "f16", "-o", out)
            mine, server, off, places = ours(model, IDS).log_softmax(-1), serve(out), 0.0, 0
            for end in range(1, len(IDS) + 1):
                answer = server.post("completion", prompt=IDS[:end], n_predict=1, n_probs=mine.shape[1], temperature=0)
                for top in answer["completion_probabilities"][0]["top_logprobs"]:
                    places += 1
                    off = max(off, abs(top["logprob"] - mine[end - 1, top["id"]].item()))
        except Exception as e:
            failed.append(f"{family}: {type(e).__name__} {' '.join(str(e).split())}")
            continue
        worst = max(worst, off)
        if not off <= bound or places < len(IDS) * mine.shape[1] // 2:
            failed.append(f"{family}: {off:.1e} at {places} places")
    found = f"{len(FAMILIES)} families, logarithms of probabilities within {worst:.1e}"
    return not failed, "; ".join([found, *failed])


# How bitsandbytes is told to write a model, beside `load_in_4bit`, and into shards of what size.
SKIPPED = ["lm_head", "model.layers.0.self_attn", "model.layers.1.mlp.down_proj"]
KINDS = [{"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double} for kind in ("nf4", "fp4") for double in (True, False)]
KINDS += [{"bnb_4bit_quant_storage": storage} for storage in ("bfloat16", "float16", "float32")]
KINDS += [{"llm_int8_skip_modules": SKIPPED}]
BITSANDBYTES = [({"bnb_4bit_quant_type": "nf4"} | kind, None) for kind in KINDS] + [({"bnb_4bit_quant_type": "nf4"}, "100KB")]


def forms(work, pocketlora, ours, theirs, in_f32):
    """Reads what bitsandbytes and mlx-lm write; returns whether the logits agree, and what was found."""
    import bitsandbytes
    import mlx.core as mx
    import torch
    from mlx_lm.utils import load_model, quantize_model, save_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base, out, plain = model_of("tiny-llama", work / "tiny"), work / "form", work / "plain"
    load = lambda **more: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map="cpu", **more)
    worst, failed = 0.0, []

    def compare(what, wanted, quantized):
        nonlocal worst
        shutil.copy(base / "tokenizer.json", out)
        shutil.rmtree(plain, ignore_errors=True)
        if quantized:
            pocketlora("quantize", out, "--to", "f32", "-o", plain)
        off = (wanted - ours(plain if quantized else out, IDS)).abs().max().item()
        worst = max(worst, off)
        if not off <= BOUND:
            failed.append(f"{what}: {off:.1e}")

    def fresh():
        shutil.rmtree(out, ignore_errors=True)
        return out

    for config, shard in BITSANDBYTES:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **config)
        model = load(quantization_config=config)
        model.save_pretrained(fresh(), **({"max_shard_size": shard} if shard else {}))
        compare(config.to_diff_dict(), theirs(in_f32(model), IDS), False)
    model, wide = load(quantization_config=BitsAndBytesConfig(load_in_8bit=True)), load()
    model.save_pretrained(fresh())
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            # By the definition: the products of bitsandbytes round what is multiplied to 8 bits, too.
            weight = module.weight.data.float() * module.weight.SCB.float()[:, None] / 127
            wide.get_submodule(name).weight.data = weight
    compare("int8", theirs(wide, IDS), True)
    mx.set_default_device(mx.cpu)
    for bits in (4, 8):
        model, config = load_model(base)
        model.set_dtype(mx.float32)
        model, config = quantize_model(model, config, 64, bits)
        save_model(fresh(), model)
        (out / "config.json").write_text(json.dumps(config))
        compare(f"mlx, {bits} bits", torch.tensor(model(mx.array([IDS]))[0].tolist()), True)
    return not failed, "; ".join([f"{len(BITSANDBYTES) + 3} forms, logits within {worst:.1e}", *failed])
