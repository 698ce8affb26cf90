//! Which GGUF tensor is which Hugging Face weight: names, shapes, and the order of rows.

use super::config::{EMBEDDING, Family, HEAD, Hyper};
use super::container::Container;
use super::rope;
use crate::error::{Error, Result};
use crate::format::TensorMeta;
use std::collections::HashSet;

/// One weight of the model: its Hugging Face description and where it comes from.
#[derive(Clone, Debug)]
pub(super) struct FoundWeight {
    pub(super) meta: TensorMeta,
    /// Number of its tensor in the directory.
    pub(super) tensor: usize,
    /// The tensor's row where it begins: one of several experts lies behind the others.
    pub(super) first: usize,
    /// For query and key projections of Llama: the rows of each head are interleaved in the file. Size of a head.
    pub(super) interleaved: Option<usize>,
    /// For norms of Gemma: the file has 1 added, as the norm itself does in Hugging Face's model.
    pub(super) plus_one: bool,
}

/// A dimension of a weight, by its role.
#[derive(Clone, Copy)]
enum Dim {
    Hidden,
    Ffn,
    Vocab,
    /// All query heads.
    Query,
    /// All key or value heads.
    Key,
    /// One head.
    Head,
    /// The experts of a layer.
    Experts,
    /// What an expert has inside.
    ExpertFfn,
    /// What a convolution reads and gates: three times the hidden width.
    Thrice,
    /// Inputs of one output of a convolution.
    Taps,
}
use Dim::{ExpertFfn, Experts, Ffn, Head, Hidden, Key, Query, Taps, Thrice, Vocab};

/// A place in the model for a tensor.
struct Slot {
    gguf: &'static str,
    hf: &'static str,
    shape: &'static [Dim],
    /// Whether its rows, head by head, are stored in the order of interleaved RoPE in `llama` files.
    rotary: bool,
}

const fn slot(gguf: &'static str, hf: &'static str, shape: &'static [Dim]) -> Slot {
    Slot { gguf, hf, shape, rotary: false }
}

const fn rotary(gguf: &'static str, hf: &'static str, shape: &'static [Dim]) -> Slot {
    Slot { gguf, hf, shape, rotary: true }
}

/// What LFM2 has in the place of the last norm.
const LFM2_NORM: &str = "token_embd_norm.weight";

/// Tensors outside the layers.
const MODEL: &[Slot] = &[
    slot(EMBEDDING, "model.embed_tokens.weight", &[Vocab, Hidden]),
    slot("output_norm.weight", "model.norm.weight", &[Hidden]),
    slot(LFM2_NORM, "model.embedding_norm.weight", &[Hidden]),
    slot(HEAD, "lm_head.weight", &[Vocab, Hidden]),
];

/// Tensors of each layer, after `blk.N.` and `model.layers.N.`.
const LAYER: &[Slot] = &[
    slot("attn_norm.weight", "input_layernorm.weight", &[Hidden]),
    rotary("attn_q.weight", "self_attn.q_proj.weight", &[Query, Hidden]),
    rotary("attn_q.bias", "self_attn.q_proj.bias", &[Query]),
    rotary("attn_k.weight", "self_attn.k_proj.weight", &[Key, Hidden]),
    rotary("attn_k.bias", "self_attn.k_proj.bias", &[Key]),
    slot("attn_v.weight", "self_attn.v_proj.weight", &[Key, Hidden]),
    slot("attn_v.bias", "self_attn.v_proj.bias", &[Key]),
    slot("attn_output.weight", "self_attn.o_proj.weight", &[Hidden, Query]),
    slot("attn_output.bias", "self_attn.o_proj.bias", &[Hidden]),
    slot("attn_q_norm.weight", "self_attn.q_norm.weight", &[Head]),
    slot("attn_k_norm.weight", "self_attn.k_norm.weight", &[Head]),
    slot("post_attention_norm.weight", "post_attention_layernorm.weight", &[Hidden]),
    slot("ffn_norm.weight", "post_attention_layernorm.weight", &[Hidden]),
    slot("ffn_gate.weight", "mlp.gate_proj.weight", &[Ffn, Hidden]),
    slot("ffn_gate.bias", "mlp.gate_proj.bias", &[Ffn]),
    slot("ffn_up.weight", "mlp.up_proj.weight", &[Ffn, Hidden]),
    slot("ffn_up.bias", "mlp.up_proj.bias", &[Ffn]),
    slot("ffn_down.weight", "mlp.down_proj.weight", &[Hidden, Ffn]),
    slot("ffn_down.bias", "mlp.down_proj.bias", &[Hidden]),
    slot("post_ffw_norm.weight", "post_feedforward_layernorm.weight", &[Hidden]),
    slot("ffn_gate_inp.weight", "mlp.gate.weight", &[Experts, Hidden]),
    slot("ffn_gate_exps.weight", "gate_proj.weight", &[Experts, ExpertFfn, Hidden]),
    slot("ffn_up_exps.weight", "up_proj.weight", &[Experts, ExpertFfn, Hidden]),
    slot("ffn_down_exps.weight", "down_proj.weight", &[Experts, Hidden, ExpertFfn]),
    slot("shortconv.in_proj.weight", "conv.in_proj.weight", &[Thrice, Hidden]),
    slot("shortconv.conv.weight", "conv.conv.weight", &[Hidden, Taps]),
    slot("shortconv.out_proj.weight", "conv.out_proj.weight", &[Hidden, Hidden]),
];

/// The GGUF name of the weight of a linear layer or of the embedding, given its Hugging Face name.
pub(crate) fn to_gguf(hf: &str) -> Option<String> {
    if let Some((layer, rest)) = hf.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
        let slot = LAYER.iter().find(|slot| slot.hf == rest && slot.shape.len() == 2)?;
        return layer.parse::<usize>().ok().map(|layer| format!("blk.{layer}.{}", slot.gguf));
    }
    MODEL.iter().find(|slot| slot.hf == hf && slot.shape.len() == 2).map(|slot| slot.gguf.to_owned())
}

/// The GGUF name of the tensor that Hugging Face calls `hf` in `family`, and whether its rows, head by head, are in the order
/// of rotary positions.
pub(super) fn of_hf(hf: &str, family: Family) -> Option<(String, bool)> {
    let Some((layer, rest)) = hf.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) else {
        return MODEL.iter().find(|slot| slot.hf == hf).map(|slot| (slot.gguf.to_owned(), false));
    };
    // Norms behind the parts are Gemma's; others have none, and that name for another one.
    let there = |slot: &&Slot| family == Family::Gemma3 || !slot.gguf.starts_with("post_");
    let slot = LAYER.iter().filter(there).find(|slot| layer_name(slot, family) == rest)?;
    Some((format!("blk.{layer}.{}", slot.gguf), slot.rotary))
}

/// The Hugging Face name of such a weight, given its GGUF name.
pub(crate) fn to_hf(gguf: &str) -> Option<String> {
    if let Some((layer, rest)) = gguf.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        let slot = LAYER.iter().find(|slot| slot.gguf == rest && slot.shape.len() == 2)?;
        return layer.parse::<usize>().ok().map(|layer| format!("model.layers.{layer}.{}", slot.hf));
    }
    MODEL.iter().find(|slot| slot.gguf == gguf && slot.shape.len() == 2).map(|slot| slot.hf.to_owned())
}

/// The Hugging Face name for a slot of a layer. Gemma has a norm on either side of each part, and the one that llama.cpp
/// calls `ffn_norm` comes before the feed-forward part.
fn layer_name(slot: &Slot, family: Family) -> &'static str {
    match (slot.gguf, family) {
        ("ffn_norm.weight", Family::Gemma3) => "pre_feedforward_layernorm.weight",
        ("attn_norm.weight", Family::Lfm2) => "operator_norm.weight",
        ("attn_output.weight", Family::Lfm2) => "self_attn.out_proj.weight",
        ("attn_q_norm.weight", Family::Lfm2) => "self_attn.q_layernorm.weight",
        ("attn_k_norm.weight", Family::Lfm2) => "self_attn.k_layernorm.weight",
        ("ffn_norm.weight", Family::Lfm2) => "ffn_norm.weight",
        ("ffn_gate.weight", Family::Lfm2) => "feed_forward.w1.weight",
        ("ffn_down.weight", Family::Lfm2) => "feed_forward.w2.weight",
        ("ffn_up.weight", Family::Lfm2) => "feed_forward.w3.weight",
        _ => slot.hf,
    }
}

/// Whether a model with these hyperparameters has a tensor in the slot named `gguf`, of its layer number `layer` or outside.
fn expected(gguf: &str, hyper: &Hyper, layer: Option<usize>) -> bool {
    let conv = layer.is_some_and(|layer| hyper.convs.get(layer) == Some(&true));
    match (gguf, hyper.family) {
        (name, _) if name.starts_with("shortconv.") => conv,
        (name, Family::Lfm2) if name.starts_with("attn_") && name != "attn_norm.weight" && conv => false,
        (LFM2_NORM, family) => family == Family::Lfm2,
        ("output_norm.weight", Family::Lfm2) => false,
        (name, family) if name.starts_with("ffn_gate_inp.") || name.contains("_exps.") => family == Family::Qwen3Moe,
        ("ffn_gate.weight" | "ffn_up.weight" | "ffn_down.weight", Family::Qwen3Moe) => false,
        (HEAD | EMBEDDING, _) if hyper.copy.is_some() => hyper.copy != Some(gguf),
        (HEAD, _) => !hyper.tied,
        ("attn_q_norm.weight" | "attn_k_norm.weight", family) => {
            matches!(family, Family::Qwen3 | Family::Qwen3Moe | Family::Gemma3 | Family::Lfm2)
        }
        ("post_attention_norm.weight" | "post_ffw_norm.weight", family) => family == Family::Gemma3,
        ("attn_output.bias", Family::Qwen2) => false,
        ("attn_q.bias" | "attn_k.bias" | "attn_v.bias", Family::Qwen2) => true,
        // Llama's `attention_bias` means all four.
        (name, _) if name.starts_with("attn_") && name.ends_with(".bias") => hyper.attention_bias,
        (name, _) if name.ends_with(".bias") => hyper.mlp_bias,
        _ => true,
    }
}

/// The weights of `file` under their Hugging Face names, in file order.
///
/// # Errors
/// A tensor is missing, has another shape than metadata says, or has no place in the model.
pub(super) fn weights(file: &Container, hyper: &Hyper) -> Result<Vec<FoundWeight>> {
    let mut found = Vec::new();
    for (index, tensor) in file.tensors.iter().enumerate() {
        if tensor.name != rope::FREQS && hyper.copy != Some(tensor.name.as_str()) {
            let weight = weight(file, hyper, index)?;
            if weight.meta.shape.len() == 3 && hyper.family == Family::Qwen3Moe {
                found.extend(experts(&weight));
            } else {
                found.push(weight);
            }
        }
    }
    complete(file, hyper, &found)?;
    found.sort_by_key(|w| (file.tensors[w.tensor].offset(), w.first));
    Ok(found)
}

/// Each expert's part of `stack`, which has those of a layer one behind the other.
fn experts(stack: &FoundWeight) -> Vec<FoundWeight> {
    let [experts, rows, cols] = stack.meta.shape[..] else { return vec![stack.clone()] };
    let (layer, projection) =
        stack.meta.name.rsplit_once(".weight").map_or(("", ""), |(name, _)| name.rsplit_once('.').unwrap_or_default());
    let expert = |e: usize| FoundWeight {
        meta: TensorMeta {
            name: format!("{layer}.mlp.experts.{e}.{projection}.weight"),
            shape: vec![rows, cols],
            dtype: stack.meta.dtype.clone(),
        },
        first: e * rows,
        ..stack.clone()
    };
    (0..experts).map(expert).collect()
}

/// Finds the place of tensor number `index` and checks its shape.
fn weight(file: &Container, hyper: &Hyper, index: usize) -> Result<FoundWeight> {
    let meta = &file.metadata;
    let tensor = &file.tensors[index];
    let in_layer = tensor.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).and_then(|(n, rest)| {
        // `blk.01` would be a second name for `blk.1`.
        let layer = n.parse::<usize>().ok().filter(|layer| *layer < hyper.layers && layer.to_string() == n)?;
        let slot = LAYER.iter().find(|s| s.gguf == rest)?;
        Some((slot, format!("model.layers.{layer}.{}", layer_name(slot, hyper.family)), Some(layer)))
    });
    // The better copy of a tied matrix is the embedding, whatever the file calls it.
    let tied = |s: &Slot| if s.gguf == HEAD && hyper.tied { MODEL[0].hf } else { s.hf };
    let outside = || MODEL.iter().find(|s| s.gguf == tensor.name).map(|s| (s, tied(s).to_owned(), None));
    let place = in_layer.or_else(outside).filter(|(slot, _, layer)| expected(slot.gguf, hyper, *layer));
    let Some((slot, name, _)) = place else {
        return Err(Error::unsupported(
            meta.path(),
            format_args!("tensor `{}` in a {:?} model of {} layers", tensor.name, hyper.family, hyper.layers),
            "the file is of a variant of the family that does not run; use a model of the plain family",
        ));
    };
    let size = |dim: &Dim| match dim {
        Hidden => hyper.hidden,
        Ffn => hyper.ffn,
        Vocab => hyper.vocab,
        Query => hyper.query,
        Head => hyper.head_dim,
        // Fits, for there are no more of them than query heads.
        Key => hyper.kv_heads * hyper.head_dim,
        Experts => hyper.experts,
        ExpertFfn => hyper.expert_ffn,
        Thrice => hyper.hidden.saturating_mul(3),
        Taps => hyper.taps,
    };
    let mut shape: Vec<usize> = slot.shape.iter().map(size).collect();
    if tensor.shape != shape {
        let item = format_args!("tensor `{}`", tensor.name);
        let (want, got) = (format!("shape {shape:?} from metadata"), format!("{:?}", tensor.shape));
        return Err(Error::format(meta.path(), item, want, got));
    }
    if matches!(slot.shape, [Hidden, Taps]) {
        // Hugging Face's convolutions have a dimension more.
        shape.insert(1, 1);
    }
    let permuted =
        slot.rotary && matches!(hyper.family, Family::Llama | Family::Mistral | Family::SmolLm3 | Family::Granite);
    Ok(FoundWeight {
        meta: TensorMeta { name, shape, dtype: tensor.dtype.to_string() },
        tensor: index,
        first: 0,
        interleaved: permuted.then_some(hyper.head_dim),
        plus_one: hyper.family == Family::Gemma3 && slot.gguf.ends_with("norm.weight"),
    })
}

/// Checks that no weight is missing. A hostile layer count ends at the first layer without tensors.
fn complete(file: &Container, hyper: &Hyper, found: &[FoundWeight]) -> Result<()> {
    let names: HashSet<&str> = found.iter().map(|w| file.tensors[w.tensor].name.as_str()).collect();
    let check = |name: &str| {
        if names.contains(name) {
            return Ok(());
        }
        Err(Error::format(file.metadata.path(), format_args!("tensor `{name}`"), "a tensor", "none"))
    };
    for slot in MODEL.iter().filter(|s| expected(s.gguf, hyper, None)) {
        check(slot.gguf)?;
    }
    for layer in 0..hyper.layers {
        for slot in LAYER.iter().filter(|s| expected(s.gguf, hyper, Some(layer))) {
            check(&format!("blk.{layer}.{}", slot.gguf))?;
        }
    }
    Ok(())
}

/// The file's row for row `row` of a Hugging Face query or key projection with heads of `head_dim` rows.
///
/// Hugging Face rotates row j of a head with row j + head_dim/2; llama.cpp rotates neighbours, so its converter stores
/// that pair as rows 2j and 2j + 1 (`LlamaModel.permute` in llama.cpp's converter).
pub(crate) fn interleaved_row(row: usize, head_dim: usize) -> usize {
    let (head, r) = (row / head_dim, row % head_dim);
    let half = head_dim / 2;
    head * head_dim + 2 * (r % half) + r / half
}

#[cfg(test)]
mod tests {
    use super::interleaved_row;

    /// The converter's permutation, written as it is there: reshape(heads, 2, d/2), swap the last two, flatten.
    #[test]
    fn undoes_the_converters_permutation() {
        for (heads, d) in [(1, 2), (3, 4), (9, 64), (2, 6)] {
            let mut file = Vec::new();
            for h in 0..heads {
                for j in 0..d / 2 {
                    for k in 0..2 {
                        file.push(h * d + k * (d / 2) + j);
                    }
                }
            }
            for row in 0..heads * d {
                assert_eq!(file[interleaved_row(row, d)], row, "row {row} of {heads} heads of {d}");
            }
        }
    }
}
