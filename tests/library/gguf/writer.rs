//! A small GGUF writer that writes whatever it is told, also what no sane program would.

use std::fmt::Debug;

// Value types, numbered as in the format.
pub const U8: u32 = 0;
pub const I8: u32 = 1;
pub const U16: u32 = 2;
pub const I16: u32 = 3;
pub const U32: u32 = 4;
pub const I32: u32 = 5;
pub const F32: u32 = 6;
pub const BOOL: u32 = 7;
pub const STRING: u32 = 8;
pub const ARRAY: u32 = 9;
pub const U64: u32 = 10;
pub const I64: u32 = 11;
pub const F64: u32 = 12;

/// One tensor; `dims` are in file order, fastest first.
#[derive(Clone)]
pub struct TensorSpec {
    pub name: String,
    pub dims: Vec<u64>,
    pub dtype: u32,
    pub data: Vec<u8>,
    /// Instead of the next aligned offset.
    pub offset: Option<u64>,
}

#[derive(Clone)]
pub struct Writer {
    pub magic: [u8; 4],
    pub version: u32,
    pub alignment: usize,
    pub pairs: Vec<(String, u32, Vec<u8>)>,
    pub tensors: Vec<TensorSpec>,
    /// Instead of the true number of tensors, and of pairs.
    pub counts: (Option<u64>, Option<u64>),
}

pub fn string(s: &str) -> Vec<u8> {
    let mut out = (s.len() as u64).to_le_bytes().to_vec();
    out.extend(s.as_bytes());
    out
}

/// The bytes of an array value.
pub fn array(kind: u32, elements: &[Vec<u8>]) -> Vec<u8> {
    let mut out = kind.to_le_bytes().to_vec();
    out.extend((elements.len() as u64).to_le_bytes());
    out.extend(elements.concat());
    out
}

impl Writer {
    pub fn new() -> Self {
        Self {
            magic: *b"GGUF",
            version: 3,
            alignment: 32,
            pairs: Vec::new(),
            tensors: Vec::new(),
            counts: (None, None),
        }
    }

    /// Sets a value from its bytes; an earlier one under this key goes.
    pub fn set(&mut self, key: &str, kind: u32, bytes: impl Into<Vec<u8>>) -> &mut Self {
        self.remove(key);
        self.pairs.push((key.to_owned(), kind, bytes.into()));
        self
    }

    pub fn remove(&mut self, key: &str) -> &mut Self {
        self.pairs.retain(|(k, _, _)| k != key);
        self
    }

    pub fn u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.set(key, U32, value.to_le_bytes())
    }

    pub fn f32(&mut self, key: &str, value: f32) -> &mut Self {
        self.set(key, F32, value.to_le_bytes())
    }

    pub fn bool(&mut self, key: &str, value: bool) -> &mut Self {
        self.set(key, BOOL, [value.into()])
    }

    pub fn string(&mut self, key: &str, value: &str) -> &mut Self {
        self.set(key, STRING, string(value))
    }

    pub fn strings<S: AsRef<str>>(&mut self, key: &str, values: &[S]) -> &mut Self {
        let elements: Vec<_> = values.iter().map(|s| string(s.as_ref())).collect();
        self.set(key, ARRAY, array(STRING, &elements))
    }

    pub fn i32s(&mut self, key: &str, values: &[i32]) -> &mut Self {
        let elements: Vec<_> = values.iter().map(|v| v.to_le_bytes().to_vec()).collect();
        self.set(key, ARRAY, array(I32, &elements))
    }

    pub fn f32s(&mut self, key: &str, values: &[f32]) -> &mut Self {
        let elements: Vec<_> = values.iter().map(|v| v.to_le_bytes().to_vec()).collect();
        self.set(key, ARRAY, array(F32, &elements))
    }

    pub fn bools(&mut self, key: &str, values: &[bool]) -> &mut Self {
        let elements: Vec<_> = values.iter().map(|v| vec![u8::from(*v)]).collect();
        self.set(key, ARRAY, array(BOOL, &elements))
    }

    /// Adds an F32 tensor of row-major `shape`.
    pub fn tensor(&mut self, name: &str, shape: &[usize], values: &[f32]) -> &mut Self {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
        self.tensors.push(TensorSpec {
            name: name.to_owned(),
            dims: shape.iter().rev().map(|&n| n as u64).collect(),
            dtype: 0,
            data: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            offset: None,
        });
        self
    }

    pub fn find(&mut self, name: &str) -> &mut TensorSpec {
        self.tensors.iter_mut().find(|t| t.name == name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    pub fn build(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.counts.0.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.counts.1.unwrap_or(self.pairs.len() as u64).to_le_bytes());
        for (key, kind, bytes) in &self.pairs {
            out.extend(string(key));
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        }
        let mut data: Vec<u8> = Vec::new();
        for t in &self.tensors {
            data.resize(data.len().next_multiple_of(self.alignment), 0);
            out.extend(string(&t.name));
            out.extend((t.dims.len() as u32).to_le_bytes());
            out.extend(t.dims.iter().flat_map(|d| d.to_le_bytes()));
            out.extend(t.dtype.to_le_bytes());
            out.extend(t.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&t.data);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(data);
        out
    }
}

/// GPT-2's byte alphabet: printable Latin-1 stands for itself, the other bytes for the code points from 256 on.
pub fn byte_alphabet() -> Vec<String> {
    let itself = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    let character = |b: u8| {
        if itself(b) {
            return char::from(b).to_string();
        }
        next += 1;
        char::from_u32(next - 1).unwrap().to_string()
    };
    (0..=255).map(character).collect()
}

/// Tokens after the 256 bytes that merges make, in merge order.
pub const MERGES: &[&str] = &["1 2", "12 3", "123 4", "' S", "! Ċ", "h i"];
/// Tokens after those of the merges: one that no merge makes, then marks and a user-defined word.
pub const EXTRA: &[&str] = &["Ġhello", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "[WORD]"];

/// A llama of one layer, hidden 8, 2 heads, 1 KV head, with a byte-level vocabulary; every weight is distinct.
pub fn small_llama() -> Writer {
    let mut tokens = byte_alphabet();
    tokens.extend(MERGES.iter().map(|m| m.replace(' ', "")));
    tokens.extend(EXTRA.iter().map(|&t| t.to_owned()));
    let vocab = tokens.len();
    let mut types = vec![1; vocab];
    types[vocab - 4..].copy_from_slice(&[3, 3, 3, 4]);
    let id = |t: &str| tokens.iter().position(|x| x == t).unwrap() as u32;

    let mut w = Writer::new();
    w.string("general.architecture", "llama")
        .u32("llama.block_count", 1)
        .u32("llama.context_length", 64)
        .u32("llama.embedding_length", 8)
        .u32("llama.feed_forward_length", 16)
        .u32("llama.attention.head_count", 2)
        .u32("llama.attention.head_count_kv", 1)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .f32("llama.rope.freq_base", 100_000.0)
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", "smollm")
        .strings("tokenizer.ggml.tokens", &tokens)
        .i32s("tokenizer.ggml.token_type", &types)
        .strings("tokenizer.ggml.merges", MERGES)
        .u32("tokenizer.ggml.bos_token_id", id("<|im_start|>"))
        .u32("tokenizer.ggml.eos_token_id", id("<|im_end|>"))
        .string("tokenizer.chat_template", "{{ messages }}");
    for (name, shape) in [
        ("token_embd.weight", vec![vocab, 8]),
        ("blk.0.attn_norm.weight", vec![8]),
        ("blk.0.attn_q.weight", vec![8, 8]),
        ("blk.0.attn_k.weight", vec![4, 8]),
        ("blk.0.attn_v.weight", vec![4, 8]),
        ("blk.0.attn_output.weight", vec![8, 8]),
        ("blk.0.ffn_norm.weight", vec![8]),
        ("blk.0.ffn_gate.weight", vec![16, 8]),
        ("blk.0.ffn_up.weight", vec![16, 8]),
        ("blk.0.ffn_down.weight", vec![8, 16]),
        ("output_norm.weight", vec![8]),
    ] {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| i as f32).collect();
        w.tensor(name, &shape, &values);
    }
    w
}

/// The small model with the keys of the architecture `arch`.
fn renamed(arch: &str) -> Writer {
    let mut w = small_llama();
    for (key, _, bytes) in &mut w.pairs {
        if let Some(rest) = key.strip_prefix("llama.") {
            *key = format!("{arch}.{rest}");
        }
        if key == "general.architecture" {
            *bytes = string(arch);
        }
    }
    w
}

/// The values that count up from zero.
fn counting(len: usize) -> Vec<f32> {
    (0..len).map(|i| i as f32).collect()
}

/// The same model as a qwen2, with its biases.
pub fn small_qwen2() -> Writer {
    let mut w = renamed("qwen2");
    w.string("tokenizer.ggml.pre", "qwen2");
    for (name, len) in [("q", 8), ("k", 4), ("v", 4)] {
        w.tensor(&format!("blk.0.attn_{name}.bias"), &[len], &counting(len));
    }
    w
}

/// The same model as a qwen3, with norms of heads.
pub fn small_qwen3() -> Writer {
    let mut w = renamed("qwen3");
    w.string("tokenizer.ggml.pre", "qwen2");
    for name in ["q", "k"] {
        w.tensor(&format!("blk.0.attn_{name}_norm.weight"), &[4], &counting(4));
    }
    w
}

/// The same model as a `smollm3` or `granite`, whose layers have the same parts.
pub fn small_plain(arch: &str) -> Writer {
    renamed(arch)
}

/// The same model as a gemma3, with its norms and a window of 16.
pub fn small_gemma3() -> Writer {
    let mut w = renamed("gemma3");
    w.u32("gemma3.attention.sliding_window", 16);
    for name in ["q", "k"] {
        w.tensor(&format!("blk.0.attn_{name}_norm.weight"), &[4], &counting(4));
    }
    for name in ["post_attention_norm", "post_ffw_norm"] {
        w.tensor(&format!("blk.0.{name}.weight"), &[8], &counting(8));
    }
    w
}

/// A generator for tests (xorshift64*): the same sequence on every machine.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }
}

/// Runs a table of cases and reports every failure, not only the first.
pub fn all<T: Debug>(cases: impl IntoIterator<Item = (T, Result<(), String>)>) {
    let failures: Vec<_> =
        cases.into_iter().filter_map(|(case, r)| r.err().map(|e| format!("{case:?}: {e}"))).collect();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}
