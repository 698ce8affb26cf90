//! The Hugging Face `config.json` that a file's metadata make: what all families have, and the pieces that several share.

use super::container::GgufTensor;
use super::families::Family;
use super::keys::Keys;
use super::known;
use super::rope::Scaling;
use super::tied;
use super::value::{Metadata, Value as Found};
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};

/// The token embedding, whose rows are the vocabulary.
pub(super) const EMBEDDING: &str = "token_embd.weight";
/// The head; absent where it is tied to the embedding.
pub(super) const HEAD: &str = "output.weight";

/// Kinds of layers, as `layer_types` spells them.
pub(super) const FULL: &str = "full_attention";
pub(super) const SLIDING: &str = "sliding_attention";

/// Granite's factors: llama.cpp's keys, and Hugging Face's. Where a file has none, or 0, it is 1, on scores the usual one.
pub(super) const FACTORS: [(&str, &str); 4] = [
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("attention.scale", "attention_multiplier"),
    ("logit_scale", "logits_scaling"),
];

/// A config under way.
pub(super) struct Draft<'a> {
    pub(super) keys: Keys<'a>,
    family: &'static Family,
    pub(super) json: Map<String, Value>,
    pub(super) hidden: usize,
    /// Layers that a token goes through.
    pub(super) layers: usize,
    /// Layers of the file: the last ones may predict further tokens.
    blocks: usize,
    pub(super) context: usize,
    pub(super) vocab: usize,
    /// Of an embedding and a head that are one matrix in two roundings, the worse one.
    pub(super) copy: Option<&'static str>,
}

impl<'a> Draft<'a> {
    /// Reads what all architectures have, then what `family` has.
    ///
    /// # Errors
    /// A feature is not supported; a key is missing or contradicts another.
    pub(super) fn read(keys: Keys<'a>, family: &'static Family) -> Result<Self> {
        let (meta, file) = (keys.meta(), keys.file);
        refuse_experts(&keys, family)?;
        known::check(meta, family)?;
        let (hidden, blocks) = (keys.size("embedding_length")?, keys.size("block_count")?);
        // Each has a tensor at the very least.
        if blocks > file.tensors.len() {
            let expected = format_args!("no more than the file's {} tensors", file.tensors.len());
            return Err(keys.fail("block_count", expected, blocks));
        }
        let further = keys.optional_size("nextn_predict_layers")?.unwrap_or(0);
        let layers = blocks.checked_sub(further).filter(|layers| *layers > 0);
        let layers = layers.ok_or_else(|| keys.fail("nextn_predict_layers", "some of the layers", further))?;
        let (vocab, context) = (vocabulary(&keys)?, keys.size("context_length")?);
        let copy = tied::copy(file);
        let tied = copy.is_some() || !keys.has(HEAD);
        let mut draft = Self { keys, family, json: Map::new(), hidden, layers, blocks, context, vocab, copy };
        draft.named(family.kinds[0].0);
        draft.set("hidden_size", hidden);
        draft.set("num_hidden_layers", layers);
        draft.set("vocab_size", vocab);
        draft.set("max_position_embeddings", context);
        draft.set("tie_word_embeddings", tied);
        draft.set("torch_dtype", "float16");
        draft.marks(meta)?;
        (family.config)(&mut draft)?;
        Ok(draft)
    }

    pub(super) fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.json.insert(key.to_owned(), value.into());
    }

    /// Says which of the families it is that the architecture stands for.
    pub(super) fn named(&mut self, model_type: &str) {
        let class = self.family.kinds.iter().find(|(name, _)| *name == model_type).map(|(_, class)| *class);
        self.set("model_type", model_type);
        self.set("architectures", json!([class]));
    }

    /// Whether a layer of this number predicts further tokens.
    pub(super) fn further(&self, layer: usize) -> bool {
        (self.layers..self.blocks).contains(&layer)
    }

    fn marks(&mut self, meta: &Metadata) -> Result<()> {
        for (key, name) in [
            ("bos_token_id", "tokenizer.ggml.bos_token_id"),
            ("eos_token_id", "tokenizer.ggml.eos_token_id"),
            ("pad_token_id", "tokenizer.ggml.padding_token_id"),
        ] {
            match meta.uint(name)? {
                Some(id) if id >= self.vocab => return Err(meta.fail(name, format_args!("below {}", self.vocab), id)),
                id => self.set(key, id),
            }
        }
        Ok(())
    }

    /// Heads of attention, their width, and a feed-forward part with a SiLU gate between norms: what most decoders have.
    /// Returns the width of a head.
    pub(super) fn decoder(&mut self) -> Result<usize> {
        let heads = self.heads()?;
        self.kv_heads(heads)?;
        let head_dim = self.head_dim(heads)?;
        self.keys.same("attention.value_length", head_dim)?;
        self.feed_forward()?;
        self.rms_norm("rms_norm_eps")?;
        self.set("hidden_act", "silu");
        Ok(head_dim)
    }

    pub(super) fn heads(&mut self) -> Result<usize> {
        let heads = self.keys.size("attention.head_count")?;
        self.set("num_attention_heads", heads);
        Ok(heads)
    }

    /// Heads of keys and values, the same in all layers.
    pub(super) fn kv_heads(&mut self, heads: usize) -> Result<()> {
        const KEY: &str = "attention.head_count_kv";
        let kv_heads = match self.keys.meta().get(&self.keys.name(KEY)) {
            Some(Found::Array(_)) if self.family.varied => self.some_kv_heads()?,
            Some(Found::Array(_)) => return Err(self.keys.fail(KEY, "a number", "a list")),
            _ => self.keys.optional_size(KEY)?.unwrap_or(heads),
        };
        if !heads.is_multiple_of(kv_heads) {
            return Err(self.keys.fail(KEY, format_args!("a divisor of {heads}"), kv_heads));
        }
        self.set("num_key_value_heads", kv_heads);
        Ok(())
    }

    /// The heads of keys of the layers that have some.
    fn some_kv_heads(&self) -> Result<usize> {
        let mut some = self.kv_heads_of_layers()?;
        some.retain(|heads| *heads > 0);
        some.sort_unstable();
        some.dedup();
        match some[..] {
            [heads] => Ok(heads),
            _ => {
                let got = format_args!("{some:?}");
                Err(self.keys.fail("attention.head_count_kv", "0 or one other number", got))
            }
        }
    }

    /// The heads of keys of each layer: 0 where it has no attention.
    pub(super) fn kv_heads_of_layers(&self) -> Result<Vec<usize>> {
        const KEY: &str = "attention.head_count_kv";
        match self.keys.sizes(KEY, self.layers)? {
            Some(list) => Ok(list),
            None => {
                let heads = self.keys.size("attention.head_count")?;
                Ok(vec![self.keys.optional_size(KEY)?.unwrap_or(heads); self.layers])
            }
        }
    }

    /// The width of a head.
    pub(super) fn head_dim(&mut self, heads: usize) -> Result<usize> {
        let (keys, hidden) = (&self.keys, self.hidden);
        let head_dim = match keys.optional_size("attention.key_length")? {
            Some(n) => n,
            None if hidden % heads == 0 => hidden / heads,
            None => return Err(keys.fail("attention.head_count", format_args!("a divisor of {hidden}"), heads)),
        };
        // RoPE rotates pairs.
        if head_dim % 2 != 0 {
            return Err(keys.fail("attention.key_length", "an even head size", head_dim));
        }
        self.set("head_dim", head_dim);
        Ok(head_dim)
    }

    pub(super) fn feed_forward(&mut self) -> Result<()> {
        let width = self.keys.size("feed_forward_length")?;
        self.set("intermediate_size", width);
        Ok(())
    }

    pub(super) fn rms_norm(&mut self, key: &str) -> Result<()> {
        self.epsilon(key, "attention.layer_norm_rms_epsilon")
    }

    /// What norms add to the mean square: Hugging Face's `key`, llama.cpp's `name`.
    pub(super) fn epsilon(&mut self, key: &str, name: &str) -> Result<()> {
        let epsilon = self.keys.positive(name)?;
        let epsilon = self.keys.meta().required(&self.keys.name(name), epsilon)?;
        self.set(key, epsilon);
        Ok(())
    }

    /// Whether attention and the feed-forward part have biases, as the first layer has them.
    pub(super) fn biases(&mut self) {
        self.set("attention_bias", self.keys.biased_queries());
        let names = ["blk.0.ffn_gate.bias", "blk.0.ffn_up.bias"];
        self.set("mlp_bias", names.iter().any(|name| self.keys.has(name)));
    }

    /// A window that hides something, in tokens.
    pub(super) fn window(&self) -> Result<Option<usize>> {
        self.keys.optional_size("attention.sliding_window")
    }

    /// Refuses a window, for families that have none.
    pub(super) fn no_window(&self) -> Result<()> {
        if self.window()?.is_some_and(|window| window < self.context) {
            let name = self.keys.name("attention.sliding_window");
            return Err(self.keys.refuse(format_args!("a sliding window ({name}) in `{}`", self.keys.arch)));
        }
        Ok(())
    }

    /// Sets the kind of each layer: those that the file lists, or all slide but every so many. `first` says that the first of
    /// these sees all, rather than the last.
    pub(super) fn layer_types(&mut self, every: usize, first: bool) -> Result<()> {
        const KEY: &str = "attention.sliding_window_pattern";
        let slides = match self.keys.switches(KEY, self.layers)? {
            Some(list) => list,
            None => {
                let every = self.keys.optional_size(KEY)?.unwrap_or(every);
                let full = if first { 0 } else { every - 1 };
                (0..self.layers).map(|i| i % every != full).collect()
            }
        };
        let kinds: Vec<&str> = slides.iter().map(|slides| if *slides { SLIDING } else { FULL }).collect();
        self.set("layer_types", kinds);
        Ok(())
    }

    /// The base of positions: the GGUF specification's default is also Hugging Face's.
    pub(super) fn theta(&self) -> Result<f64> {
        Ok(self.keys.positive("rope.freq_base")?.unwrap_or(10_000.0))
    }

    /// Positions that turn whole heads in all layers by the same angles.
    pub(super) fn rope(&mut self, head_dim: usize) -> Result<()> {
        self.keys.same("rope.dimension_count", head_dim)?;
        let rope = self.angles(head_dim)?;
        self.everywhere(rope)
    }

    /// The same for families that may turn only the first part of each head.
    pub(super) fn partial_rope(&mut self, head_dim: usize) -> Result<()> {
        let turned = self.keys.optional_size("rope.dimension_count")?.unwrap_or(head_dim);
        let share = share(turned, head_dim);
        let mut rope = self.angles(turned)?;
        rope.insert("partial_rotary_factor".to_owned(), json!(share));
        self.set("partial_rotary_factor", share);
        self.everywhere(rope)
    }

    /// Base and scaling of positions that turn so many dimensions of a head, as `rope_parameters` has them.
    pub(super) fn angles(&self, turned: usize) -> Result<Map<String, Value>> {
        let theta = self.theta()?;
        let mut rope =
            Scaling::read(self.keys.file, self.keys.arch, turned, theta, self.context)?.into_json(self.context);
        rope.insert("rope_theta".to_owned(), json!(theta));
        Ok(rope)
    }

    /// Sets `rope` for all layers: transformers 5 reads `rope_parameters`, older versions and most other tools the other two.
    pub(super) fn everywhere(&mut self, rope: Map<String, Value>) -> Result<()> {
        self.set("rope_theta", rope["rope_theta"].clone());
        if rope["rope_type"] != "default" {
            let mut old = rope.clone();
            old.remove("rope_theta");
            self.set("rope_scaling", old);
        }
        self.set("rope_parameters", rope);
        Ok(())
    }

    /// Sets `full` and `sliding` for the two kinds of layers.
    pub(super) fn by_kind(&mut self, full: Map<String, Value>, sliding: Map<String, Value>) {
        self.set("rope_parameters", json!({FULL: full, SLIDING: sliding}));
    }

    /// How many experts a layer has, how many a token goes through, and what each has inside, under these keys.
    pub(super) fn experts(&mut self, names: [&str; 3]) -> Result<()> {
        for (name, key) in names.into_iter().zip(["expert_count", "expert_used_count", "expert_feed_forward_length"]) {
            let size = self.keys.size(key)?;
            self.set(name, size);
        }
        Ok(())
    }

    /// Granite's factors, for heads of this width.
    pub(super) fn factors(&mut self, head_dim: usize) -> Result<()> {
        for (key, hf) in FACTORS {
            let usual = if key == "attention.scale" { (head_dim as f64).powf(-0.5) } else { 1.0 };
            let factor = self.keys.factor(key, usual)?;
            self.set(hf, factor);
        }
        Ok(())
    }
}

/// The share of `whole` that, rounded down, is `part`.
pub(super) fn share(part: usize, whole: usize) -> f64 {
    let mut share = part as f64 / whole as f64;
    while ((whole as f64 * share) as usize) < part {
        share = share.next_up();
    }
    share
}

/// Files that are GGUF, but no whole language model.
pub(super) fn refuse_other_kinds(meta: &Metadata) -> Result<()> {
    if let Some(kind) = meta.string("general.type")?.filter(|&kind| kind != "model") {
        let what = format_args!("a GGUF file of type `{kind}` as a model");
        return Err(Error::unsupported(meta.path(), what, "give the language model's file"));
    }
    Ok(())
}

fn refuse_experts(keys: &Keys<'_>, family: &Family) -> Result<()> {
    if let Some(experts) = keys.optional_size("expert_count")?.filter(|_| !family.experts) {
        let what = format_args!("a mixture of {experts} experts in `{}`", keys.arch);
        return Err(Error::unsupported(keys.meta().path(), what, "use a dense model"));
    }
    Ok(())
}

/// Rows of the embedding, checked against what metadata says about the vocabulary.
fn vocabulary(keys: &Keys<'_>) -> Result<usize> {
    let (meta, embedding) = (keys.meta(), keys.file.tensors.iter().find(|t| t.name == EMBEDDING));
    let Some(rows) = embedding.map(GgufTensor::rows) else {
        let item = format_args!("tensor `{EMBEDDING}`");
        return Err(Error::format(meta.path(), item, "a tensor", "none"));
    };
    let tokens = "tokenizer.ggml.tokens";
    if let Some(Found::Array(list)) = meta.get(tokens)
        && list.len() > rows
    {
        return Err(meta.fail(tokens, format_args!("at most the {rows} rows of `{EMBEDDING}`"), list.len()));
    }
    match keys.optional_size("vocab_size")? {
        Some(n) if n != rows => Err(keys.fail("vocab_size", format_args!("the {rows} rows of `{EMBEDDING}`"), n)),
        _ => Ok(rows),
    }
}
