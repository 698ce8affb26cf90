//! Architectures, written against the [`Exec`] trait: what a model computes, and nothing about how.
//!
//! A family declares its parameters under the checkpoint's names and spells out its forward pass. Bytes, devices,
//! quantization, adapters and gradients are the executor's concern.
#![forbid(unsafe_code)]

mod apertus;
mod arcee;
mod attention;
mod bitnet;
mod cohere2;
mod config;
mod decoder;
mod ernie4_5;
mod exaone4;
mod exec;
mod falcon_h1;
mod feed_forward;
mod gated_delta_net;
mod gemma;
mod gemma2;
mod gemma3_text;
mod gemma4_attention;
mod gemma4_experts;
mod gemma4_text;
mod glm4;
mod gpt2;
mod gpt_oss;
mod granite;
mod granite_swa;
mod granitemoehybrid;
mod helium;
mod hunyuan_v1_dense;
mod internlm3;
mod keys;
mod known;
mod latent_attention;
mod lfm2;
mod lfm2_moe;
mod lfm3;
mod llama;
mod mamba;
mod mamba2;
mod minicpm3;
mod ministral;
mod ministral3;
mod mistral;
mod nanochat;
mod olmo2;
mod olmo3;
mod olmo_hybrid;
mod op;
mod outline;
mod params;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_5_text;
mod qwen3_moe;
mod qwen3_next;
mod rope;
mod seed_oss;
mod smollm3;
mod starcoder2;
#[cfg(test)]
mod testing;
mod windows;
mod wrapped;
mod youtu;

pub use config::{Config, ConfigError};
pub use exec::Exec;
pub use op::{
    Activation, AttentionShape, Conv, DeltaRuleShape, Expert, GateUp, Linear, Map, Norm, Op, Param, Piece, RopeTable,
    Routing, Scores, StateId, StateSpace, StateSpec, Value, Width, Xielu,
};
pub use outline::{Outline, Scaled};
pub use params::{Layout, ParamSpec, Role, Stack};
pub use rope::{Growth, LongRope, Rope};
pub use wrapped::{Wrapped, full_name, parts_of, text_config, wrapped};

use keys::Keys;

/// A decoder-only language model: embedding, layers, head. Executors may run a layer more than once.
pub trait Model: Send + Sync {
    /// What the model consists of.
    fn outline(&self) -> &Outline;
    /// Layer number `index` applied to `x` `[T, C]`.
    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value;

    /// Token embeddings `[T, C]` of the executor's current tokens.
    fn embed(&self, ex: &mut dyn Exec) -> Value {
        ex.embed(self.outline().embedding)
    }

    /// The last norm of hidden states `x` `[T, C]`, as [`Model::head`] takes it first.
    fn norm(&self, ex: &mut dyn Exec, x: Value) -> Value {
        ex.norm(self.outline().norm, x)
    }

    /// The layer that makes logits of what [`Model::norm`] returns, if it is all that does: an executor may then compute
    /// what follows from logits without holding them. `None` where a family does more to them.
    fn plain_head(&self) -> Option<Linear> {
        Some(self.outline().head)
    }

    /// Logits `[T, V]` of hidden states `x` `[T, C]`.
    fn head(&self, ex: &mut dyn Exec, x: Value) -> Value {
        let h = self.norm(ex, x);
        ex.linear(self.outline().head, h)
    }

    /// Sizes and constants.
    fn config(&self) -> &Config {
        &self.outline().config
    }

    /// The layers that PEFT scales by default in this family, if it names any.
    fn scaled_by_default(&self) -> Option<Scaled> {
        FAMILIES.iter().find(|family| family.model_type == self.config().model_type)?.scaled
    }

    /// All parameters; a [`Param`] is an index into this list.
    fn params(&self) -> &[ParamSpec] {
        &self.outline().params
    }

    /// Rotary tables in use; a [`RopeTable`] is an index into this list.
    fn ropes(&self) -> &[Rope] {
        &self.outline().ropes
    }

    /// How many of them turn a text of so many tokens by [`LongRope`]'s angles. Where a text that grows comes to more of
    /// them, what is remembered of it no longer holds.
    fn long_ropes(&self, tokens: usize) -> usize {
        let long = |rope: &&Rope| rope.long.as_ref().is_some_and(|long| tokens > long.beyond);
        self.ropes().iter().filter(long).count()
    }

    /// What layers remember of earlier tokens; a [`StateId`] is an index into this list.
    fn states(&self) -> &[StateSpec] {
        &self.outline().states
    }

    /// The weight of the last product, `[V, C]`; the embedding's where they are tied.
    fn head_param(&self) -> Param {
        self.outline().head.weight
    }
}

/// A kind of model: its name, what it reads of a config, and how it is made.
pub(crate) struct Family {
    /// `model_type`, as `config.json` spells it.
    pub(crate) model_type: &'static str,
    /// Keys of the table in `known.rs` that the family reads itself, or that have no meaning in it.
    pub(crate) honoured: &'static [&'static str],
    /// See [`Model::scaled_by_default`].
    pub(crate) scaled: Option<Scaled>,
    /// The model that the keys describe.
    pub(crate) build: fn(&Keys<'_>) -> Result<Box<dyn Model>, ConfigError>,
}

/// All that [`build`] knows.
const FAMILIES: &[Family] = &[
    apertus::FAMILY,
    arcee::FAMILY,
    bitnet::FAMILY,
    cohere2::FAMILY,
    ernie4_5::FAMILY,
    exaone4::FAMILY,
    falcon_h1::FAMILY,
    gemma2::FAMILY,
    gemma3_text::FAMILY,
    gemma4_text::FAMILY,
    glm4::FAMILY,
    gpt2::FAMILY,
    gpt_oss::FAMILY,
    granite::FAMILY,
    granite_swa::FAMILY,
    granitemoehybrid::FAMILY,
    helium::FAMILY,
    hunyuan_v1_dense::FAMILY,
    internlm3::FAMILY,
    lfm2::FAMILY,
    lfm2_moe::FAMILY,
    lfm3::FAMILY,
    llama::FAMILY,
    mamba2::FAMILY,
    minicpm3::FAMILY,
    ministral::FAMILY,
    ministral3::FAMILY,
    mistral::FAMILY,
    nanochat::FAMILY,
    olmo2::FAMILY,
    olmo3::FAMILY,
    olmo_hybrid::FAMILY,
    phi3::FAMILY,
    qwen2::FAMILY,
    qwen3::FAMILY,
    qwen3_5_text::FAMILY,
    qwen3_moe::FAMILY,
    qwen3_next::FAMILY,
    seed_oss::FAMILY,
    smollm3::FAMILY,
    starcoder2::FAMILY,
    youtu::FAMILY,
];

/// Names of the supported families, as `config.json` spells them.
pub fn families() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.model_type)
}

/// The model that a Hugging Face `config.json` describes: of a model for more than text, the text model in it.
///
/// # Errors
/// A key is missing or out of range, or the family is unknown.
pub fn build(config: &serde_json::Map<String, serde_json::Value>) -> Result<Box<dyn Model>, ConfigError> {
    let nested = text_config(config);
    let config = nested.as_ref().unwrap_or(config);
    // The family first: what else its config has, or lacks, means something there alone.
    let known = || format!("one of `{}`", families().collect::<Vec<_>>().join("`, `"));
    let model_type = match config.get("model_type") {
        Some(serde_json::Value::String(name)) => name,
        other => return Err(ConfigError::new("model_type", known(), other.unwrap_or(&serde_json::Value::Null))),
    };
    let family = FAMILIES.iter().find(|family| family.model_type == model_type);
    let family = family.ok_or_else(|| ConfigError::unsupported("model_type", known(), model_type))?;
    let keys = Keys(config);
    known::check(&keys, family.model_type, family.honoured)?;
    (family.build)(&keys)
}
