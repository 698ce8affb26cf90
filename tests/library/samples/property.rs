//! Of any conversation, by any template, with any tokenizer: what is learned decodes to the answers and their ends, whole.

use super::{byte_tokenizer, chat_file};
use pocketlora::chat::ChatTemplate;
use pocketlora::tokenizer::Tokenizer;
use pocketlora::train::{Dataset, Sample, SampleLimits};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// What contents are made of. Each is hard for some tokenizer or template.
const PIECES: [&str; 24] = [
    "yes",
    " no",
    "the answer",
    "\n",
    "\n\n",
    "    ",
    " ",
    ":",
    ".",
    "12",
    "3",
    "\u{e9}t\u{e9}",
    "\u{4f60}\u{597d}",
    "\u{1f980}",
    "if x:\n    y",
    "<|im_end|>",
    "</s>",
    "<s>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<",
    "|>",
    "\t",
    "**",
];
/// What byte-level tokenizers join: a space with a word, indentation, line ends, a word of two.
const JOINED: [&str; 17] =
    ["Ġy", "es", "Ġyes", "Ġn", "Ġno", "ĠĠ", "ĠĠĠ", "ĠĠĠĠ", "ĊĊ", "th", "the", "an", "ans", "Ġt", "Ġth", "Ġthe", "ye"];
const CASES: usize = 60;

/// A short random stream (Lehmer's, modulo 2^31 - 1).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 = self.0 * 48_271 % 2_147_483_647;
        self.0 as usize % below
    }

    fn content(&mut self) -> String {
        loop {
            let text: String = (0..1 + self.roll(5)).map(|_| PIECES[self.roll(PIECES.len())]).collect();
            if !text.trim().is_empty() {
                return text;
            }
        }
    }

    fn conversation(&mut self, system: bool) -> Vec<(&'static str, String)> {
        let mut turns = Vec::new();
        if system && self.roll(3) == 0 {
            turns.push(("system", self.content()));
        }
        for _ in 0..1 + self.roll(3) {
            turns.push(("user", self.content()));
            turns.push(("assistant", self.content()));
        }
        turns
    }
}

/// The tokenizer of single bytes, and what becomes of it by name.
fn tokenizers() -> Vec<(&'static str, Value)> {
    let bytes = byte_tokenizer();
    let mut joined = bytes.clone();
    let mut next = 300;
    let mut merges = Vec::new();
    for token in JOINED {
        let chars: Vec<char> = token.chars().collect();
        // The longest known beginning with what is left.
        let known = |part: &str, vocab: &Value| vocab.get(part).is_some();
        let vocab = joined["model"]["vocab"].clone();
        let cut = (1..chars.len()).rev().find(|&n| {
            let (a, b): (String, String) = (chars[..n].iter().collect(), chars[n..].iter().collect());
            known(&a, &vocab) && known(&b, &vocab)
        });
        let Some(n) = cut else { continue };
        let (a, b): (String, String) = (chars[..n].iter().collect(), chars[n..].iter().collect());
        merges.push(json!([a, b]));
        joined["model"]["vocab"][token] = next.into();
        next += 1;
    }
    joined["model"]["merges"] = merges.into();
    joined["pre_tokenizer"]["use_regex"] = true.into();
    let mut trimming = joined.clone();
    trimming["post_processor"] =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let mut prefixed = trimming.clone();
    prefixed["pre_tokenizer"]["add_prefix_space"] = true.into();
    vec![
        ("bytes", bytes.clone()),
        ("joined", joined),
        ("trimming", trimming),
        ("with a space before", prefixed),
        ("sentencepiece, prepended", sentencepiece(&bytes, true)),
        ("sentencepiece, metaspace", sentencepiece(&bytes, false)),
    ]
}

/// A tokenizer as SentencePiece's are converted: spaces are `▁`, unknown characters fall back to their bytes.
fn sentencepiece(bytes: &Value, prepend: bool) -> Value {
    let mut out = bytes.clone();
    let mut vocab = bytes["model"]["vocab"].clone();
    vocab.as_object_mut().unwrap().retain(|_, id| id.as_u64() >= Some(256));
    let mut next = 300;
    let mut add = |vocab: &mut Value, token: &str| {
        if vocab.get(token).is_none() {
            vocab[token] = next.into();
            next += 1;
        }
    };
    (0..256).for_each(|b| add(&mut vocab, &format!("<0x{b:02X}>")));
    for c in "▁yesnothawr:.123<|>\n\té*ifx".chars() {
        add(&mut vocab, &c.to_string());
    }
    let mut merges = Vec::new();
    for (a, b) in [("y", "e"), ("ye", "s"), ("▁", "yes"), ("n", "o"), ("▁", "no"), ("▁", "▁"), ("▁▁", "▁▁"), ("t", "h")]
    {
        merges.push(json!([a, b]));
        add(&mut vocab, &format!("{a}{b}"));
    }
    out["model"] = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocab,
        "merges": merges});
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    if prepend {
        out["normalizer"] = json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]});
        out["pre_tokenizer"] = Value::Null;
    } else {
        out["pre_tokenizer"] =
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    }
    // Without the step that strips the first space, so that what is learned is seen as it is.
    out["decoder"] = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]});
    out
}

/// Templates with their beginning- and end-of-text tokens, and whether they know a system's turn.
fn templates() -> Vec<(String, Option<String>, [&'static str; 2], bool)> {
    let families = [
        ("smollm2", ["<|im_start|>", "<|im_end|>"], true),
        ("llama3", ["<|begin_of_text|>", "<|eot_id|>"], true),
        ("mistral", ["<s>", "</s>"], true),
        ("mistral1", ["<s>", "</s>"], false),
        ("qwen2", ["<|endoftext|>", "<|im_end|>"], true),
        ("qwen3", ["<|endoftext|>", "<|im_end|>"], true),
        ("gemma", ["<bos>", "<eos>"], true),
        ("phi3", ["<s>", "<|endoftext|>"], true),
    ];
    let mut all = Vec::new();
    for (family, names, system) in families {
        let text = fs::read_to_string(chat_file(&format!("{family}.jinja"))).unwrap().trim_end_matches('\n').to_owned();
        all.push((format!("{family}, marked"), Some(text.clone()), names, system));
        all.push((family.to_owned(), Some(super::unmarked(text)), names, system));
    }
    let spaced = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '### Assistant: ' + \
                  m['content'] + eos_token }}{% else %}{{ '### User: ' + m['content'] + '\n' }}{% endif %}{% endfor %}\
                  {% if add_generation_prompt %}{{ '### Assistant: ' }}{% endif %}";
    let endless = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}\
                   assistant:{% endif %}";
    all.push(("asked with a space".to_owned(), Some(spaced.to_owned()), ["<s>", "</s>"], false));
    all.push(("without an end".to_owned(), Some(endless.to_owned()), ["<s>", "</s>"], true));
    all.push(("none".to_owned(), None, ["<s>", "</s>"], true));
    all
}

fn open(dir: &Path, tokenizer: &Value, template: Option<&str>, names: [&str; 2]) -> (Tokenizer, ChatTemplate) {
    fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"bos_token": names[0], "eos_token": names[1], "chat_template": template});
    fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
    let mut tokenizer = Tokenizer::open(dir).unwrap();
    let template = ChatTemplate::open(dir, &mut tokenizer).unwrap();
    (tokenizer, template)
}

/// The text of tokens `from..to` of a sample: what they add to the text before them.
fn text(tokenizer: &Tokenizer, sample: &Sample, from: usize, to: usize) -> String {
    let all = tokenizer.decode_with_special(&sample.ids[..to]).unwrap();
    let before = tokenizer.decode_with_special(&sample.ids[..from]).unwrap();
    all.strip_prefix(&before).map_or_else(|| format!("{all:?} without {before:?}"), str::to_owned)
}

/// Checks the samples of one conversation. Answers come in their order within each sample.
fn check(tokenizer: &Tokenizer, samples: &[Sample], answers: &[&str]) -> Result<(), String> {
    let mut found = Vec::new();
    for sample in samples {
        for run in sample.trained.runs() {
            let (from, to) = (run.start as usize, run.end as usize);
            let last = sample.ids[to - 1];
            if !tokenizer.stop.contains(&last) {
                return Err(format!("`{}` has no end", text(tokenizer, sample, from, to)));
            }
            if sample.ids[from..to - 1].iter().any(|id| tokenizer.stop.contains(id)) {
                return Err(format!("`{}` has an end within it", text(tokenizer, sample, from, to)));
            }
            found.push(text(tokenizer, sample, from, to - 1));
        }
    }
    if found.len() != answers.len() {
        return Err(format!("learned {found:?} of {answers:?}"));
    }
    for answer in answers {
        // A template may trim an answer, and the answer's first token may begin in the space before it.
        let same = |learned: &String| {
            let words = learned.trim_start();
            // One family writes an empty thought before an answer without one.
            let words = words.strip_prefix("<think>\n\n</think>\n\n").unwrap_or(words).trim_start();
            // A token may hold the answer's last line end and the template's.
            let but_one = words.strip_suffix('\n').unwrap_or(words);
            [words, but_one].contains(&answer.trim_start()) || words == answer.trim()
        };
        let Some(at) = found.iter().position(same) else {
            return Err(format!("`{answer:?}` is not among what is learned: {found:?}"));
        };
        found.remove(at);
    }
    Ok(())
}

#[test]
fn what_is_learned_decodes_to_the_answers_and_their_ends() {
    let dir = tempfile::tempdir().unwrap();
    let (mut failures, mut checked, mut dice) = (Vec::new(), 0, Dice(20_261_128));
    for (tokens, json) in tokenizers() {
        for (name, template, names, system) in templates() {
            let (tokenizer, chat) = open(dir.path(), &json, template.as_deref(), names);
            for _ in 0..CASES {
                let turns = dice.conversation(system);
                let messages: Vec<Value> =
                    turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
                let path = dir.path().join("data.jsonl");
                fs::write(&path, json!({ "messages": messages }).to_string()).unwrap();
                let answers: Vec<&str> =
                    turns.iter().filter(|(role, _)| *role == "assistant").map(|(_, c)| c.as_str()).collect();
                let limits = SampleLimits { tokens: 4096, vocab: 2000 };
                let result = Dataset::open(&path, &tokenizer, &chat, limits)
                    .map_err(|e| e.to_string())
                    .and_then(|data| check(&tokenizer, &data.samples, &answers));
                checked += 1;
                if let Err(e) = result {
                    failures.push(format!("{tokens}, {name}, {turns:?}: {e}"));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} of {checked}:\n{}", failures.len(), failures[..failures.len().min(8)].join("\n"));
}
