"""Makes chat/goldens.json and chat/tokenizer.json: the masks that transformers (`return_assistant_tokens_mask`) gives
for the templates in chat/, on a tokenizer of single bytes. The templates are small ones of ours with the structure of
the families'; their {% generation %} blocks say what is learned. Made with transformers 5.23.0, tokenizers 0.23.3.

    python chat_goldens.py
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent / "chat"
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|endoftext|>", "<|end|>", "<|user|>",
           "<|assistant|>", "<|system|>"]
# Template: its beginning-of-text and end-of-text tokens, and the conversations it takes.
FAMILIES = {
    "smollm2": ("<|im_start|>", "<|im_end|>", ["one", "two", "system", "parts"]),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ["one", "two", "system"]),
    "mistral": ("<s>", "</s>", ["one", "two", "system"]),
    "mistral1": ("<s>", "</s>", ["one", "two"]),
    "qwen2": ("<|endoftext|>", "<|im_end|>", ["one", "two", "system", "tools", "json_arguments"]),
    "gemma": ("<bos>", "<eos>", ["one", "two", "system"]),
    "phi3": ("<s>", "<|endoftext|>", ["one", "two", "system"]),
}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def call(arguments):
    return [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Today's <weather> & more, \u00e9t\u00e9",
          "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]
TOOL_CHAT = [turn("user", "Weather in Rome?"), turn("assistant", None, tool_calls=call({"city": "Rome", "days": [1, 2]})),
             turn("tool", "sunny"), turn("assistant", "It is sunny.")]
CHATS = {
    "one": ([turn("user", "echo"), turn("assistant", "echo")], None),
    # The answers repeat each other, the questions and the markers' words.
    "two": ([turn("user", "say user assistant"), turn("assistant", "user assistant"), turn("user", "a\u00f1o \U0001f980?"),
             turn("assistant", "a\u00f1o \U0001f980?\n\nassistant"), turn("user", "x"), turn("assistant", "x")], None),
    "system": ([turn("system", "Be short."), turn("user", "Hi"), turn("assistant", "Be short."), turn("user", "Bye"),
                turn("assistant", "Bye")], None),
    "parts": ([turn("user", "in parts"), turn("assistant", "in parts")], None),
    "tools": (TOOL_CHAT, TOOLS),
    "json_arguments": (TOOL_CHAT, TOOLS),
}


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return inner


def line(name, messages, tools):
    """The data line our side reads; the content and arguments may have forms that mean the same."""
    messages = json.loads(json.dumps(messages))
    if name == "parts":
        for m in messages:
            half = len(m["content"]) // 2
            m["content"] = [{"type": "text", "text": m["content"][:half]}, {"type": "text", "text": m["content"][half:]}]
    if name == "json_arguments":
        for m in messages:
            for c in m.get("tool_calls", []):
                c["function"]["arguments"] = json.dumps(c["function"]["arguments"])
    return {"messages": messages} | ({"tools": tools} if tools else {})


def runs(mask):
    """Where the mask is 1, as [start, end) pairs."""
    edges = [i for i, (a, b) in enumerate(zip([0, *mask], [*mask, 0])) if a != b]
    return [list(pair) for pair in zip(edges[::2], edges[1::2])]


def main():
    inner = byte_tokenizer()
    inner.save(str(HERE / "tokenizer.json"))
    cases = []
    for family, (bos, eos, chats) in FAMILIES.items():
        template = (HERE / f"{family}.jinja").read_text().removesuffix("\n")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos, chat_template=template)
        for chat in chats:
            messages, tools = CHATS[chat]
            text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
            coded = tokenizer.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
            cases.append({"template": family, "chat": chat, "bos_token": bos, "eos_token": eos,
                          "line": line(chat, messages, tools), "text": text, "tokens": len(coded["input_ids"]),
                          "learned": runs(coded["assistant_masks"])})
    rows = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (HERE / "goldens.json").write_text(f"[\n{rows}\n]\n")


if __name__ == "__main__":
    main()
