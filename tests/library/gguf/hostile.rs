//! Files that lie: every one gives a typed error that names the culprit, none a panic or a huge allocation.

use super::writer::{self, ARRAY, Random, U8, Writer, all, small_llama, small_qwen2};
use bytes::Bytes;
use pocketlora::ErrorCode::{self, Format, Unsupported};
use pocketlora::format::Source;
use pocketlora::format::gguf::Gguf;
use std::path::Path;

/// Opens a model and uses everything in it.
fn use_all(bytes: Vec<u8>) -> pocketlora::Result<()> {
    let gguf = Gguf::from_bytes(Bytes::from(bytes), Path::new("hostile.gguf"))?;
    for (i, t) in gguf.tensors().iter().enumerate() {
        let (rows, columns) = if let [rows, columns] = t.shape[..] { (rows, columns) } else { (1, t.shape[0]) };
        gguf.read_rows(i, 0..rows, &mut vec![0.0; rows * columns])?;
    }
    gguf.sidecars().map(|_| ())
}

type Case = (&'static str, fn(&mut Writer), ErrorCode, &'static str);

/// What is wrong, how, and what the message must name.
const CASES: &[Case] = &[
    ("no GGUF", |w| w.magic = *b"GGML", Format, "magic"),
    ("version 0", |w| w.version = 0, Unsupported, "version 0"),
    ("version 1", |w| w.version = 1, Unsupported, "version 1"),
    ("version 4", |w| w.version = 4, Unsupported, "version 4"),
    ("big-endian", |w| w.version = 3 << 24, Unsupported, "big-endian"),
    ("tensor count", |w| w.counts.0 = Some(u64::MAX), Format, "tensor "),
    ("pair count", |w| w.counts.1 = Some(u64::MAX), Format, "metadata"),
    ("pair twice", |w| w.pairs.push(w.pairs[0].clone()), Format, "`general.architecture`"),
    ("value type", |w| _ = w.set("x", 13, [0; 8]), Format, "`x`"),
    ("bool of 2", |w| _ = w.set("x", writer::BOOL, [2]), Format, "`x`"),
    ("key not UTF-8", |w| w.pairs[0].2 = [&1u64.to_le_bytes()[..], &[0xff]].concat(), Format, "UTF-8"),
    ("string too long", |w| _ = w.set("x", writer::STRING, u64::MAX.to_le_bytes()), Format, "`x`"),
    ("array too long", |w| _ = w.set("x", ARRAY, hostile_array(writer::U64, u64::MAX / 4)), Format, "`x`"),
    ("bytes too long", |w| _ = w.set("x", ARRAY, hostile_array(U8, 1 << 40)), Format, "`x`"),
    ("strings too many", |w| _ = w.set("x", ARRAY, hostile_array(writer::STRING, 1 << 60)), Format, "`x`"),
    ("nest too deep", |w| _ = w.set("x", ARRAY, nest(20_000)), Format, "`x`"),
    ("alignment 0", |w| _ = w.u32("general.alignment", 0), Format, "`general.alignment`"),
    ("alignment 33", |w| _ = w.u32("general.alignment", 33), Format, "`general.alignment`"),
    ("alignment huge", |w| _ = w.set("general.alignment", writer::U64, (1u64 << 63).to_le_bytes()), Format, "tensor"),
    ("tensor twice", |w| w.tensors.push(w.tensors[1].clone()), Format, "`blk.0.attn_norm.weight`"),
    ("no dimensions", |w| w.tensors[1].dims.clear(), Format, "`blk.0.attn_norm.weight`"),
    ("five dimensions", |w| w.tensors[1].dims = vec![1; 5], Format, "`blk.0.attn_norm.weight`"),
    ("zero dimension", |w| w.tensors[1].dims = vec![0], Format, "`blk.0.attn_norm.weight`"),
    ("product overflows", |w| w.tensors[1].dims = vec![1 << 32; 4], Format, "`blk.0.attn_norm.weight`"),
    ("bytes overflow", |w| w.tensors[1].dims = vec![1 << 62], Format, "`blk.0.attn_norm.weight`"),
    ("past the end", |w| w.tensors[1].dims = vec![1 << 40], Format, "`blk.0.attn_norm.weight`"),
    ("offset past the end", |w| w.tensors[1].offset = Some(1 << 40), Format, "`blk.0.attn_norm.weight`"),
    ("offset overflows", |w| w.tensors[1].offset = Some(!31), Format, "`blk.0.attn_norm.weight`"),
    ("offset misaligned", |w| w.tensors[1].offset = Some(4), Format, "aligned to 32"),
    ("overlap", |w| w.tensors[1].offset = Some(0), Format, "`blk.0.attn_norm.weight`"),
    ("half a block", |w| w.tensors[1].dtype = 2, Format, "`blk.0.attn_norm.weight`"),
    ("Q8_K", |w| w.tensors[1].dtype = 15, Unsupported, "Q8_K"),
    ("no such type", |w| w.tensors[1].dtype = 4_000, Unsupported, "number 4000"),
    ("no architecture", |w| _ = w.remove("general.architecture"), Format, "`general.architecture`"),
    ("other architecture", |w| _ = w.string("general.architecture", "mamba"), Unsupported, "`mamba`"),
    ("architecture no string", |w| _ = w.u32("general.architecture", 1), Format, "`general.architecture`"),
    ("adapter", |w| _ = w.string("general.type", "adapter"), Unsupported, "`adapter`"),
    ("parts", |w| _ = w.u32("split.count", 3), Unsupported, "one of 3 parts"),
    ("experts", |w| _ = w.u32("llama.expert_count", 8), Unsupported, "8 experts"),
    ("no layers", |w| _ = w.u32("llama.block_count", 0), Format, "`llama.block_count`"),
    ("too many layers", |w| _ = w.u32("llama.block_count", u32::MAX), Format, "`llama.block_count`"),
    ("one layer more", |w| _ = w.u32("llama.block_count", 2), Format, "`blk.1.attn_norm.weight`"),
    (
        "too few layers",
        |w| w.tensors[1].name = "blk.1.attn_norm.weight".into(),
        Unsupported,
        "`blk.1.attn_norm.weight`",
    ),
    ("second name", |w| w.tensors[1].name = "blk.00.attn_norm.weight".into(), Unsupported, "`blk.00."),
    ("negative size", |w| _ = w.set("llama.block_count", writer::I32, [255; 4]), Format, "`llama.block_count`"),
    ("size of floats", |w| _ = w.f32("llama.block_count", 1.0), Format, "`llama.block_count`"),
    ("heads per layer", |w| _ = w.i32s("llama.attention.head_count_kv", &[1]), Format, "head_count_kv"),
    ("heads", |w| _ = w.u32("llama.attention.head_count", 3), Format, "head_count"),
    ("KV heads", |w| _ = w.u32("llama.attention.head_count_kv", 3), Format, "head_count_kv"),
    ("odd head", |w| _ = w.u32("llama.attention.key_length", 3), Format, "key_length"),
    (
        "head too large",
        |w| _ = w.set("llama.attention.key_length", writer::U64, (1u64 << 63).to_le_bytes()),
        Format,
        "head",
    ),
    ("partial RoPE", |w| _ = w.u32("llama.rope.dimension_count", 2), Format, "rope.dimension_count"),
    ("no epsilon", |w| _ = w.remove("llama.attention.layer_norm_rms_epsilon"), Format, "layer_norm_rms_epsilon"),
    ("NaN base", |w| _ = w.f32("llama.rope.freq_base", f32::NAN), Format, "freq_base"),
    ("LongRoPE", |w| _ = w.string("llama.rope.scaling.type", "longrope"), Format, "`rope_factors_short.weight`"),
    ("YaRN without factor", |w| _ = w.string("llama.rope.scaling.type", "yarn"), Format, "rope.scaling.factor"),
    ("linear without factor", |w| _ = w.string("llama.rope.scaling.type", "linear"), Format, "rope.scaling.factor"),
    (
        "RoPE of another kind",
        |w| _ = w.i32s("llama.rope.dimension_sections", &[1, 1]),
        Unsupported,
        "dimension_sections",
    ),
    ("YaRN by halves", |w| _ = w.f32("llama.rope.scaling.yarn_ext_factor", 0.5), Unsupported, "yarn_ext_factor"),
    ("attention factor", |w| _ = w.f32("llama.rope.scaling.attn_factor", 1.2), Unsupported, "attn_factor"),
    ("scale of scores", |w| _ = w.f32("llama.attention.scale", 0.5), Unsupported, "`llama.attention.scale`"),
    ("soft caps", |w| _ = w.f32("llama.final_logit_softcapping", 30.0), Unsupported, "final_logit_softcapping"),
    ("scale of logits", |w| _ = w.f32("llama.logit_scale", 0.5), Unsupported, "logit_scale"),
    ("not causal", |w| _ = w.bool("llama.attention.causal", false), Unsupported, "attention.causal"),
    ("attention of tomorrow", |w| _ = w.u32("llama.attention.new", 1), Unsupported, "`llama.attention.new`"),
    ("unknown divisors", |w| _ = w.tensor("rope_freqs.weight", &[2], &[1.0, 3.0]), Unsupported, "`rope_freqs.weight`"),
    ("divisors NaN", |w| _ = w.tensor("rope_freqs.weight", &[2], &[f32::NAN; 2]), Unsupported, "`rope_freqs.weight`"),
    ("divisors too many", |w| _ = w.tensor("rope_freqs.weight", &[4], &[1.0; 4]), Format, "`rope_freqs.weight`"),
    ("vocabulary", |w| _ = w.u32("llama.vocab_size", 3), Format, "`llama.vocab_size`"),
    ("no embedding", |w| _ = w.tensors.remove(0), Format, "`token_embd.weight`"),
    ("no norm", |w| _ = w.tensors.pop(), Format, "`output_norm.weight`"),
    ("shape", |w| w.find("blk.0.ffn_down.weight").dims = vec![8, 16], Format, "`blk.0.ffn_down.weight`"),
    ("unknown tensor", |w| _ = w.tensor("blk.0.surprise", &[1], &[0.0]), Unsupported, "`blk.0.surprise`"),
    ("a bias alone", |w| _ = w.tensor("blk.0.attn_q.bias", &[8], &[0.0; 8]), Format, "`blk.0.attn_k.bias`"),
    ("BOS out of range", |w| _ = w.u32("tokenizer.ggml.bos_token_id", 9_999), Format, "bos_token_id"),
    ("tokenizer model", |w| _ = w.string("tokenizer.ggml.model", "rwkv"), Unsupported, "`rwkv`"),
    ("no scores of Unigram", |w| _ = w.string("tokenizer.ggml.model", "t5"), Format, "`tokenizer.ggml.scores`"),
    ("no scores", |w| _ = w.string("tokenizer.ggml.model", "llama"), Format, "`tokenizer.ggml.scores`"),
    ("pre-tokenizer", |w| _ = w.string("tokenizer.ggml.pre", "kimi-k2"), Unsupported, "`kimi-k2`"),
    ("new pre-tokenizer", |w| _ = w.string("tokenizer.ggml.pre", "tomorrow"), Unsupported, "`llama-bpe`"),
    ("separator", |w| _ = w.bool("tokenizer.ggml.add_sep_token", true), Unsupported, "add_sep_token"),
    ("suppressed", |w| _ = w.i32s("tokenizer.ggml.suppress_tokens", &[1]), Unsupported, "suppress_tokens"),
    ("no pre-tokenizer", |w| _ = w.remove("tokenizer.ggml.pre"), Unsupported, "tokenizer.ggml.pre"),
    ("tokens without rows", |w| w.tensors[0].dims[1] = 200, Format, "`tokenizer.ggml.tokens`"),
    ("no tokens", |w| _ = w.remove("tokenizer.ggml.tokens"), Format, "`tokenizer.ggml.tokens`"),
    ("tokens of numbers", |w| _ = w.i32s("tokenizer.ggml.tokens", &[1]), Format, "`tokenizer.ggml.tokens`"),
    ("token types", |w| _ = w.i32s("tokenizer.ggml.token_type", &[1]), Format, "`tokenizer.ggml.token_type`"),
    ("no merges", |w| _ = w.remove("tokenizer.ggml.merges"), Format, "`tokenizer.ggml.merges`"),
    ("merge of strangers", |w| _ = w.strings("tokenizer.ggml.merges", &["a b"]), Format, "`a b`"),
    ("merge of one", |w| _ = w.strings("tokenizer.ggml.merges", &["a"]), Format, "`a`"),
    (
        "BOS asked for, not named",
        |w| _ = w.bool("tokenizer.ggml.add_bos_token", true).remove("tokenizer.ggml.bos_token_id"),
        Format,
        "bos_token_id",
    ),
];

fn hostile_array(kind: u32, len: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &len.to_le_bytes()].concat()
}

fn nest(depth: usize) -> Vec<u8> {
    hostile_array(ARRAY, 1).repeat(depth)
}

#[test]
fn every_lie_is_named() {
    all(CASES.iter().map(|(name, spoil, code, names)| {
        let mut w = small_llama();
        spoil(&mut w);
        let outcome = match use_all(w.build()) {
            Ok(()) => Err("accepted".to_owned()),
            Err(e) if e.code() != *code => Err(format!("{:?} instead of {code:?}: {e}", e.code())),
            Err(e) if !e.to_string().contains("`hostile.gguf`") => Err(format!("does not name the file: {e}")),
            Err(e) if !e.to_string().contains(names) => Err(format!("does not name {names}: {e}")),
            Err(_) => Ok(()),
        };
        (name, outcome)
    }));
}

#[test]
fn tokens_must_be_distinct() {
    let mut w = small_llama();
    let tokens = vec!["a"; w.find("token_embd.weight").dims[1] as usize];
    w.strings("tokenizer.ggml.tokens", &tokens);
    let message = use_all(w.build()).unwrap_err().to_string();
    assert!(message.contains("`a` as 0 and 1"), "{message}");
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let whole = small_qwen2().build();
    assert!(use_all(whole.clone()).is_ok());
    for len in 0..whole.len() {
        let e = use_all(whole[..len].to_vec()).expect_err("a part was accepted");
        assert_eq!(e.code(), Format, "cut at {len}: {e}");
    }
}

#[test]
fn flipped_bits_never_panic() {
    let mut random = Random(0x5eed);
    for whole in [small_llama().build(), small_qwen2().build()] {
        // Most of the file is weights, where a flip changes nothing but a value.
        let header = whole.len() * 2 / 5;
        let mut refused = 0;
        for _ in 0..4_000 {
            let mut bytes = whole.clone();
            for _ in 0..=random.below(4) {
                bytes[random.below(header)] ^= 1 << random.below(8);
            }
            refused += usize::from(use_all(bytes).is_err());
        }
        assert!(refused > 1_000, "only {refused} of 4000 refused: the flips miss the header");
    }
}

#[test]
fn random_bytes_after_the_magic_never_panic() {
    let mut random = Random(0xf00d);
    for _ in 0..4_000 {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend((0..random.below(400)).map(|_| [0, 1, 4, 8, 9, 255, random.below(256) as u8][random.below(7)]));
        assert!(use_all(bytes).is_err());
    }
}
