//! The architectures of llama.cpp that one of our families can be read from: how `config.json` comes of the metadata, and
//! where the checkpoint's tensors lie in the file. The facts are those of llama.cpp's converter and its gguf-py.

mod dense;
mod gemma;
mod granite;
mod latent;
mod lfm2;
mod llama;
mod olmo;
mod phi;
mod qwen;
mod state_space;
mod transposed;

pub(super) use llama::NO_ROPE_EVERY;

use super::config::Draft;
use super::places::{Place, of_qkv, same};
use crate::error::Result;

/// An architecture of llama.cpp.
#[derive(Debug)]
pub(crate) struct Family {
    /// `general.architecture`.
    pub name: &'static str,
    /// The families of Hugging Face that it stands for: `model_type` and class. The first is what is made of it, unless
    /// `config` says so.
    pub kinds: &'static [(&'static str, &'static str)],
    /// What a checkpoint calls a layer, up to its number.
    pub(super) layer: &'static str,
    /// Rows of each head of `attn_q` and `attn_k` lie in the order of interleaved RoPE, see [`super::interleaved_row`].
    pub interleaved: bool,
    /// Norms have 1 added in the file.
    pub plus_one: bool,
    /// Factors of the model are in its weights, so that adapters of the two do not fit each other.
    pub folded: bool,
    /// Layers may have experts.
    pub(super) experts: bool,
    /// Layers may have heads of keys in different numbers, or none.
    pub(super) varied: bool,
    /// Places of its own, which go before [`COMMON`].
    pub(super) places: &'static [Place],
    /// Keys of `known.rs` that it reads itself, or that have no meaning in it.
    pub(super) keys: &'static [&'static str],
    /// Reads what is its own of the metadata.
    pub(super) config: fn(&mut Draft<'_>) -> Result<()>,
}

impl Family {
    const fn new(
        name: &'static str,
        kinds: &'static [(&'static str, &'static str)],
        config: fn(&mut Draft<'_>) -> Result<()>,
    ) -> Self {
        Self {
            name,
            kinds,
            layer: "model.layers.",
            interleaved: false,
            plus_one: false,
            folded: false,
            experts: false,
            varied: false,
            places: &[],
            keys: &[],
            config,
        }
    }

    /// The same with rows in the order of interleaved RoPE.
    const fn interleaved(
        name: &'static str,
        kinds: &'static [(&'static str, &'static str)],
        config: fn(&mut Draft<'_>) -> Result<()>,
    ) -> Self {
        Self { interleaved: true, ..Self::new(name, kinds, config) }
    }

    /// The one called `name`.
    pub fn named(name: &str) -> Option<&'static Self> {
        ALL.iter().flat_map(|list| list.iter()).find(|family| family.name == name)
    }

    /// The one that stands for the family `model_type`, the most particular one first.
    pub fn of_model(model_type: &str) -> Option<&'static Self> {
        let all = || ALL.iter().flat_map(|list| list.iter());
        let at = |family: &&Self| family.kinds.iter().position(|(kind, _)| *kind == model_type);
        all().filter(|family| at(family).is_some()).min_by_key(at)
    }

    /// The families of Hugging Face that it stands for.
    pub fn model_types(&self) -> impl Iterator<Item = &'static str> {
        self.kinds.iter().map(|(kind, _)| *kind)
    }

    /// Names of all, for messages.
    pub fn names() -> String {
        ALL.iter().flat_map(|list| list.iter()).map(|family| family.name).collect::<Vec<_>>().join("`, `")
    }
}

/// All architectures.
const ALL: &[&[Family]] = &[
    llama::ALL,
    qwen::ALL,
    gemma::ALL,
    granite::ALL,
    lfm2::ALL,
    phi::ALL,
    olmo::ALL,
    dense::ALL,
    latent::ALL,
    state_space::ALL,
    transposed::ALL,
];

/// Places outside the layers, by what they are called in most checkpoints.
pub(super) const OUTSIDE: &[Place] =
    &[same("model.embed_tokens", "token_embd"), same("model.norm", "output_norm"), same("lm_head", "output")];

/// Places in a layer that most families have.
pub(super) const COMMON: &[Place] = &[
    same("input_layernorm", "attn_norm"),
    same("self_attn.q_proj", "attn_q"),
    same("self_attn.k_proj", "attn_k"),
    same("self_attn.v_proj", "attn_v"),
    same("self_attn.o_proj", "attn_output"),
    same("self_attn.q_norm", "attn_q_norm"),
    same("self_attn.k_norm", "attn_k_norm"),
    same("self_attn.sinks", "attn_sinks.weight"),
    same("post_attention_layernorm", "ffn_norm"),
    same("mlp.gate_proj", "ffn_gate"),
    same("mlp.up_proj", "ffn_up"),
    same("mlp.down_proj", "ffn_down"),
    same("mlp.gate", "ffn_gate_inp"),
    of_qkv("self_attn.q_proj", "attn_qkv"),
    of_qkv("self_attn.k_proj", "attn_qkv"),
    of_qkv("self_attn.v_proj", "attn_qkv"),
];
