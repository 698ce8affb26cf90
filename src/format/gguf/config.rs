//! The model's hyperparameters from metadata, and the Hugging Face `config.json` they make.

use super::container::Container;
use super::known;
use super::rope::Scaling;
use super::tied;
use super::value::{self, Metadata};
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};

/// The token embedding, whose rows are the vocabulary.
pub(super) const EMBEDDING: &str = "token_embd.weight";
/// The head; absent where it is tied to the embedding.
pub(super) const HEAD: &str = "output.weight";

/// Kinds of layers, as `layer_types` spells them.
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

/// Model families whose GGUF files can be expressed as Hugging Face checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Llama,
    /// GGUF calls it `llama`, too; only the sliding window tells.
    Mistral,
    Qwen2,
    Qwen3,
    Qwen3Moe,
    Gemma3,
    Lfm2,
    SmolLm3,
    Granite,
}

/// SmolLM3's layers without positions in llama.cpp: every so many.
pub(super) const NO_ROPE_EVERY: usize = 4;
/// Granite's factors: llama.cpp's keys, and Hugging Face's. Where a file has none, or 0, it is 1, on scores the usual one.
pub(super) const FACTORS: [(&str, &str); 4] = [
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("attention.scale", "attention_multiplier"),
    ("logit_scale", "logits_scaling"),
];

/// Sizes in elements, before any shape is checked against them.
#[derive(Clone, Debug)]
pub(super) struct Hyper {
    pub(super) family: Family,
    pub(super) hidden: usize,
    pub(super) ffn: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    /// Rows of all query heads, which is at least that of all key heads.
    pub(super) query: usize,
    pub(super) vocab: usize,
    pub(super) tied: bool,
    /// Of an embedding and a head that are one matrix in two roundings, the worse one.
    pub(super) copy: Option<&'static str>,
    pub(super) attention_bias: bool,
    pub(super) mlp_bias: bool,
    /// Experts of each layer, how many a token goes through, and what each has inside.
    pub(super) experts: usize,
    top: usize,
    pub(super) expert_ffn: usize,
    /// For LFM2: which layers are short convolutions, of so many taps.
    pub(super) convs: Vec<bool>,
    pub(super) taps: usize,
    context: usize,
    sliding_window: Option<usize>,
    /// For Gemma 3: every so many layers see all, the others a window.
    full_every: usize,
    /// For Gemma 3: the rotary base of layers with a window.
    local_theta: f64,
    epsilon: f64,
    theta: f64,
    scaling: Scaling,
    /// For Granite: [`FACTORS`].
    factors: [f64; 4],
}

impl Hyper {
    /// Reads and cross-checks the hyperparameters of `file`.
    ///
    /// # Errors
    /// The architecture or a feature is not supported; a key is missing or contradicts another.
    pub(super) fn read(file: &Container) -> Result<Self> {
        let meta = &file.metadata;
        refuse_other_kinds(meta)?;
        let arch = meta.required("general.architecture", meta.string("general.architecture")?)?;
        let family = match arch {
            "llama" => Family::Llama,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            "qwen3moe" => Family::Qwen3Moe,
            "gemma3" => Family::Gemma3,
            "lfm2" => Family::Lfm2,
            "smollm3" => Family::SmolLm3,
            "granite" => Family::Granite,
            other => {
                return Err(Error::unsupported(
                    meta.path(),
                    format_args!("architecture `{other}` in GGUF"),
                    "`llama` (with Mistral), `qwen2`, `qwen3`, `qwen3moe`, `gemma3`, `lfm2`, `smollm3` and `granite` run; use one of these families, as `pocketlora pull --list` has some",
                ));
            }
        };
        known::check(meta, arch)?;
        let keys = Keys { meta, arch };
        let hidden = keys.size("embedding_length")?;
        let heads = keys.size("attention.head_count")?;
        let layers = keys.size("block_count")?;
        let (kv_heads, convs) = match keys.sizes("attention.head_count_kv", layers)? {
            Some(list) if family == Family::Lfm2 => keys.kv_heads_of_layers(&list)?,
            Some(_) => return Err(keys.fail("attention.head_count_kv", "a number", "a list")),
            None => (keys.optional_size("attention.head_count_kv")?.unwrap_or(heads), Vec::new()),
        };
        let head_dim = match keys.optional_size("attention.key_length")? {
            Some(n) => n,
            None if hidden % heads == 0 => hidden / heads,
            None => return Err(keys.fail("attention.head_count", format_args!("a divisor of {hidden}"), heads)),
        };
        if heads % kv_heads != 0 {
            return Err(keys.fail("attention.head_count_kv", format_args!("a divisor of {heads}"), kv_heads));
        }
        // RoPE rotates pairs.
        if head_dim % 2 != 0 {
            return Err(keys.fail("attention.key_length", "an even head size", head_dim));
        }
        let Some(query) = heads.checked_mul(head_dim) else {
            return Err(keys.fail("attention.key_length", "heads that fit in memory", head_dim));
        };
        keys.same("attention.value_length", head_dim)?;
        keys.same("rope.dimension_count", head_dim)?;
        let vocab = vocabulary(&keys, file)?;
        // The GGUF specification's default, which is also Hugging Face's.
        let theta = keys.positive("rope.freq_base")?.unwrap_or(10_000.0);
        let epsilon = keys.positive("attention.layer_norm_rms_epsilon")?;
        let sliding_window = keys.optional_size("attention.sliding_window")?;
        let context = keys.size("context_length")?;
        let plain = matches!(family, Family::SmolLm3 | Family::Granite);
        if (plain || matches!(family, Family::Qwen2 | Family::Qwen3 | Family::Qwen3Moe | Family::Lfm2))
            && sliding_window.is_some_and(|window| window < context)
        {
            let what = format_args!("a sliding window ({}) in `{arch}`", keys.name("attention.sliding_window"));
            return Err(Error::unsupported(meta.path(), what, "use the model's safetensors files"));
        }
        let has = |name: &str| file.tensors.iter().any(|t| t.name == name);
        let copy = tied::copy(file);
        let hyper = Self {
            family: if family == Family::Llama && sliding_window.is_some() { Family::Mistral } else { family },
            hidden,
            ffn: keys.optional_size("feed_forward_length")?.map_or_else(
                || if family == Family::Qwen3Moe { Ok(hidden) } else { keys.size("feed_forward_length") },
                Ok,
            )?,
            layers,
            heads,
            kv_heads,
            head_dim,
            query,
            vocab,
            tied: copy.is_some() || !has(HEAD),
            copy,
            attention_bias: has("blk.0.attn_q.bias"),
            mlp_bias: has("blk.0.ffn_gate.bias"),
            experts: if family == Family::Qwen3Moe { keys.size("expert_count")? } else { 0 },
            top: if family == Family::Qwen3Moe { keys.size("expert_used_count")? } else { 0 },
            expert_ffn: if family == Family::Qwen3Moe { keys.size("expert_feed_forward_length")? } else { 0 },
            convs,
            taps: if family == Family::Lfm2 { keys.size("shortconv.l_cache")? } else { 0 },
            context,
            sliding_window,
            // llama.cpp's defaults, which its converter does not write.
            full_every: keys.optional_size("attention.sliding_window_pattern")?.unwrap_or(6),
            local_theta: keys.positive("rope.freq_base_swa")?.unwrap_or(10_000.0),
            epsilon: meta.required(&keys.name("attention.layer_norm_rms_epsilon"), epsilon)?,
            theta,
            scaling: Scaling::read(file, arch, head_dim, theta)?,
            factors: if family == Family::Granite { factors(&keys, head_dim)? } else { [1.0; 4] },
        };
        hyper.check_biases(meta)?;
        Ok(hyper)
    }

    /// Biases that the family's Hugging Face model has no place for. (Qwen2's are part of it, so that their absence is
    /// a missing tensor.)
    fn check_biases(&self, meta: &Metadata) -> Result<()> {
        let what = match self.family {
            Family::Mistral if self.attention_bias || self.mlp_bias => "a Mistral model with biases",
            Family::Qwen2 | Family::Qwen3 | Family::Qwen3Moe | Family::Gemma3 | Family::Lfm2 if self.mlp_bias => {
                "a Qwen, Gemma or LFM2 model with feed-forward biases"
            }
            Family::Lfm2 if self.attention_bias => "an LFM2 model with biases",
            Family::SmolLm3 | Family::Granite if self.attention_bias || self.mlp_bias => {
                "a SmolLM3 or Granite with biases"
            }
            _ => return Ok(()),
        };
        Err(Error::unsupported(meta.path(), what, "use a model of the plain family"))
    }

    /// Hugging Face's `config.json`.
    pub(super) fn to_json(&self, meta: &Metadata) -> Result<Map<String, Value>> {
        let (model_type, class) = match self.family {
            Family::Llama => ("llama", "LlamaForCausalLM"),
            Family::Mistral => ("mistral", "MistralForCausalLM"),
            Family::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
            Family::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
            Family::Qwen3Moe => ("qwen3_moe", "Qwen3MoeForCausalLM"),
            Family::Gemma3 => ("gemma3_text", "Gemma3ForCausalLM"),
            Family::Lfm2 => ("lfm2", "Lfm2ForCausalLM"),
            Family::SmolLm3 => ("smollm3", "SmolLM3ForCausalLM"),
            Family::Granite => ("granite", "GraniteForCausalLM"),
        };
        let mut config = Map::new();
        let mut set = |key: &str, value: Value| config.insert(key.to_owned(), value);
        set("architectures", json!([class]));
        set("model_type", json!(model_type));
        set("hidden_size", json!(self.hidden));
        set("intermediate_size", json!(self.ffn));
        set("num_hidden_layers", json!(self.layers));
        set("num_attention_heads", json!(self.heads));
        set("num_key_value_heads", json!(self.kv_heads));
        set("head_dim", json!(self.head_dim));
        match self.family {
            Family::Gemma3 => set("hidden_activation", json!("gelu_pytorch_tanh")),
            _ => set("hidden_act", json!("silu")),
        };
        set("vocab_size", json!(self.vocab));
        set("max_position_embeddings", json!(self.context));
        set("rms_norm_eps", json!(self.epsilon));
        set("tie_word_embeddings", json!(self.tied));
        match self.family {
            Family::Llama => {
                set("attention_bias", json!(self.attention_bias));
                set("mlp_bias", json!(self.mlp_bias));
            }
            Family::Mistral => {
                set("sliding_window", json!(self.sliding_window));
            }
            Family::Qwen2 => {
                set("use_sliding_window", json!(false));
            }
            Family::Qwen3 => {
                set("attention_bias", json!(self.attention_bias));
                set("use_sliding_window", json!(false));
            }
            Family::Qwen3Moe => {
                set("attention_bias", json!(self.attention_bias));
                set("use_sliding_window", json!(false));
                set("num_experts", json!(self.experts));
                set("num_experts_per_tok", json!(self.top));
                set("moe_intermediate_size", json!(self.expert_ffn));
                // All layers have experts in llama.cpp's model, and their weights are divided by their sum.
                set("norm_topk_prob", json!(true));
                set("decoder_sparse_step", json!(1));
                set("mlp_only_layers", json!([]));
            }
            Family::SmolLm3 => {
                let turned = |i: usize| u8::from(!i.is_multiple_of(NO_ROPE_EVERY));
                set("no_rope_layer_interval", json!(NO_ROPE_EVERY));
                set("no_rope_layers", json!((1..=self.layers).map(turned).collect::<Vec<_>>()));
                set("use_sliding_window", json!(false));
            }
            Family::Granite => {
                for ((_, key), factor) in FACTORS.iter().zip(self.factors) {
                    set(key, json!(factor));
                }
            }
            Family::Lfm2 => {
                let kind = |conv: &bool| if *conv { "conv" } else { FULL };
                let all = vec![FULL; self.layers];
                let kinds = if self.convs.is_empty() { all } else { self.convs.iter().map(kind).collect() };
                set("layer_types", json!(kinds));
                set("conv_L_cache", json!(self.taps));
                set("conv_bias", json!(false));
                set("norm_eps", json!(self.epsilon));
                set("block_auto_adjust_ff_dim", json!(false));
            }
            Family::Gemma3 => {
                let full = |i| self.sliding_window.is_none() || i % self.full_every == 0;
                let kinds = (1..=self.layers).map(|i| if full(i) { FULL } else { SLIDING });
                set("layer_types", json!(kinds.collect::<Vec<_>>()));
                set("sliding_window", json!(self.sliding_window));
                set("rope_local_base_freq", json!(self.local_theta));
                set("attention_bias", json!(self.attention_bias));
                // llama.cpp knows the 27B, which alone has another factor, by its layers.
                let scalar = if self.layers == 62 { self.hidden / self.heads } else { self.head_dim };
                set("query_pre_attn_scalar", json!(scalar));
            }
        }
        // transformers 5 reads `rope_parameters`, older versions and most other tools the other two.
        set("rope_theta", json!(self.theta));
        let mut rope = self.scaling.to_json();
        if self.scaling != Scaling::None {
            set("rope_scaling", Value::Object(rope.clone()));
        }
        rope.insert("rope_theta".to_owned(), json!(self.theta));
        set(
            "rope_parameters",
            match self.family {
                Family::Gemma3 => {
                    let local = json!({"rope_type": "default", "rope_theta": self.local_theta});
                    json!({FULL: rope, SLIDING: local})
                }
                _ => Value::Object(rope),
            },
        );
        for (key, name) in [
            ("bos_token_id", "tokenizer.ggml.bos_token_id"),
            ("eos_token_id", "tokenizer.ggml.eos_token_id"),
            ("pad_token_id", "tokenizer.ggml.padding_token_id"),
        ] {
            match meta.uint(name)? {
                Some(id) if id >= self.vocab => return Err(meta.fail(name, format_args!("below {}", self.vocab), id)),
                Some(id) => set(key, json!(id)),
                None => set(key, Value::Null),
            };
        }
        set("torch_dtype", json!("float16"));
        Ok(config)
    }
}

/// The keys of one architecture.
struct Keys<'a> {
    meta: &'a Metadata,
    arch: &'a str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn fail(&self, key: &str, expected: impl std::fmt::Display, got: impl std::fmt::Display) -> Error {
        self.meta.fail(&self.name(key), expected, got)
    }

    /// A size that may be absent; zero, which some writers use for "none", counts as absent.
    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        Ok(self.meta.uint(&self.name(key))?.filter(|&n| n > 0))
    }

    fn size(&self, key: &str) -> Result<usize> {
        let size = self.optional_size(key)?;
        size.ok_or_else(|| self.fail(key, "a positive size", "none"))
    }

    /// The whole numbers of a list with one for each of `layers`; `None` where there is no list.
    fn sizes(&self, key: &str, layers: usize) -> Result<Option<Vec<usize>>> {
        let name = self.name(key);
        let Some(value::Value::Array(list)) = self.meta.get(&name) else { return Ok(None) };
        if list.len() != layers {
            return Err(self.fail(key, format_args!("one for each of {layers} layers"), list.len()));
        }
        let number = |value: Result<value::Value>| {
            let value = value?;
            let size = value.as_u64().and_then(|n| usize::try_from(n).ok());
            size.ok_or_else(|| self.fail(key, "whole numbers", format_args!("{value:?}")))
        };
        list.values(self.meta.path(), &name).map(number).collect::<Result<_>>().map(Some)
    }

    /// The heads of keys of LFM2's layers of attention, and which layers have none and are convolutions.
    fn kv_heads_of_layers(&self, list: &[usize]) -> Result<(usize, Vec<bool>)> {
        let mut some: Vec<usize> = list.iter().copied().filter(|heads| *heads > 0).collect();
        some.dedup();
        match some[..] {
            [heads] => Ok((heads, list.iter().map(|heads| *heads == 0).collect())),
            _ => Err(self.fail("attention.head_count_kv", "0 or one other number", format_args!("{some:?}"))),
        }
    }

    fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.meta.float(&self.name(key))? {
            Some(x) if x <= 0.0 => Err(self.fail(key, "a positive number", x)),
            x => Ok(x),
        }
    }

    /// Checks that a size, where given, is `size`: heads whose keys and values differ, or that rotate only in part,
    /// are no Llama.
    fn same(&self, key: &str, size: usize) -> Result<()> {
        match self.optional_size(key)? {
            Some(n) if n != size => Err(self.fail(key, format_args!("the head size {size}"), n)),
            _ => Ok(()),
        }
    }
}

/// Granite's factors.
fn factors(keys: &Keys<'_>, head_dim: usize) -> Result<[f64; 4]> {
    // By this key, the hybrids say that they have no positions at all.
    if keys.meta.bool(&keys.name("rope.scaling.finetuned"))? == Some(false) {
        let what = "a Granite model without positions";
        return Err(Error::unsupported(keys.meta.path(), what, "use the model's safetensors files"));
    }
    let mut factors = [1.0, 1.0, (head_dim as f64).powf(-0.5), 1.0];
    for (factor, (key, _)) in factors.iter_mut().zip(FACTORS) {
        let said = keys.meta.float(&keys.name(key))?.filter(|said| *said != 0.0);
        match said {
            Some(bad) if bad < 0.0 || !bad.is_finite() => return Err(keys.fail(key, "a positive number", bad)),
            said => *factor = said.unwrap_or(*factor),
        }
    }
    Ok(factors)
}

/// Files that are GGUF, but no whole dense language model.
fn refuse_other_kinds(meta: &Metadata) -> Result<()> {
    if let Some(kind) = meta.string("general.type")?.filter(|&kind| kind != "model") {
        let what = format_args!("a GGUF file of type `{kind}` as a model");
        return Err(Error::unsupported(meta.path(), what, "give the language model's file"));
    }
    if let Some(arch) = meta.string("general.architecture")? {
        let key = format!("{arch}.expert_count");
        if let Some(experts) = meta.uint(&key)?.filter(|&n| n > 0 && arch != "qwen3moe") {
            let what = format_args!("a mixture of {experts} experts");
            return Err(Error::unsupported(meta.path(), what, "use a dense model"));
        }
    }
    Ok(())
}

/// Rows of the embedding, checked against what metadata says about the vocabulary.
fn vocabulary(keys: &Keys<'_>, file: &Container) -> Result<usize> {
    let embedding = file.tensors.iter().find(|t| t.name == EMBEDDING);
    let Some(rows) = embedding.map(super::container::GgufTensor::rows) else {
        let item = format_args!("tensor `{EMBEDDING}`");
        return Err(Error::format(keys.meta.path(), item, "a tensor", "none"));
    };
    let tokens = "tokenizer.ggml.tokens";
    if let Some(value::Value::Array(list)) = keys.meta.get(tokens)
        && list.len() > rows
    {
        return Err(keys.meta.fail(tokens, format_args!("at most the {rows} rows of `{EMBEDDING}`"), list.len()));
    }
    match keys.optional_size("vocab_size")? {
        Some(n) if n != rows => Err(keys.fail("vocab_size", format_args!("the {rows} rows of `{EMBEDDING}`"), n)),
        _ => Ok(rows),
    }
}
