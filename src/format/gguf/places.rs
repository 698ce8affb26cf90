//! Where a checkpoint's tensor lies in a file of llama.cpp: one name for another, or parts of a checkpoint's tensor that lie
//! apart there, or in another order.

use super::families::{COMMON, Family, OUTSIDE};

/// A place of a tensor, or of all that a module holds.
#[derive(Debug)]
pub(crate) struct Place {
    /// What checkpoints call it, behind the layer's number; `{}` stands for an expert's. A module is named without
    /// `.weight` or `.bias`, which are then the ends of both names.
    hf: &'static str,
    /// What llama.cpp calls it behind `blk.N.`, or the two tensors that it is made of.
    gguf: [&'static str; 2],
    pub(super) made: Made,
}

/// How a checkpoint's tensor is made of those in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Made {
    /// It is the same.
    Same,
    /// It is the same, in files of an older converter.
    Older,
    /// It is one of several matrices in a stack.
    Expert,
    /// It is the first half of the rows of such a matrix, or the second: files made with `--fuse-gate-up-exps`.
    HalfExpert(usize),
    /// It is some of the tensor's rows, behind which, or before, are those of the other two of queries, keys and values: files
    /// made with `--fuse-qkv`.
    OfQkv,
    /// The first tensor's rows, then the second's; of a stack, in each matrix.
    Halves,
    /// Rows of the first and of the second by turns, each from a stack.
    Turns,
    /// Each head of keys has its part of the first and of the second.
    ByHead,
    /// Heads of values lie in another order.
    Tiled(Tiled),
    /// Each head has columns of the first and rows of the second.
    Latent,
    /// It is a number in a list of the metadata.
    Listed,
}

/// Where heads of values are in a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tiled {
    /// They are its rows.
    Rows,
    /// They are its last rows, behind those of queries and keys.
    Tail,
    /// Each has one row or element.
    Each,
    /// They are its columns.
    Columns,
}

const fn place(hf: &'static str, gguf: [&'static str; 2], made: Made) -> Place {
    Place { hf, gguf, made }
}

pub(super) const fn same(hf: &'static str, gguf: &'static str) -> Place {
    place(hf, [gguf, ""], Made::Same)
}

pub(super) const fn older(hf: &'static str, gguf: &'static str) -> Place {
    place(hf, [gguf, ""], Made::Older)
}

pub(super) const fn expert(hf: &'static str, gguf: &'static str) -> Place {
    place(hf, [gguf, ""], Made::Expert)
}

pub(super) const fn half_expert(hf: &'static str, gguf: &'static str, half: usize) -> Place {
    place(hf, [gguf, ""], Made::HalfExpert(half))
}

pub(super) const fn of_qkv(hf: &'static str, gguf: &'static str) -> Place {
    place(hf, [gguf, ""], Made::OfQkv)
}

pub(super) const fn halves(hf: &'static str, gguf: [&'static str; 2]) -> Place {
    place(hf, gguf, Made::Halves)
}

pub(super) const fn turns(hf: &'static str, gguf: [&'static str; 2]) -> Place {
    place(hf, gguf, Made::Turns)
}

pub(super) const fn by_head(hf: &'static str, gguf: [&'static str; 2]) -> Place {
    place(hf, gguf, Made::ByHead)
}

pub(super) const fn tiled(hf: &'static str, gguf: &'static str, of: Tiled) -> Place {
    place(hf, [gguf, ""], Made::Tiled(of))
}

pub(super) const fn latent(hf: &'static str, gguf: [&'static str; 2]) -> Place {
    place(hf, gguf, Made::Latent)
}

pub(super) const fn listed(hf: &'static str, key: &'static str) -> Place {
    place(hf, [key, ""], Made::Listed)
}

/// A place found for a name.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) place: &'static Place,
    /// Names of the tensors that it is made of.
    pub(super) tensors: Vec<String>,
    pub(super) layer: Option<usize>,
    pub(super) expert: usize,
    /// Whether it is that of a projection of queries or keys.
    pub(super) turned: bool,
}

impl Place {
    /// The metadata's key where it is a number there.
    pub(super) fn key(&self) -> Option<&'static str> {
        (self.made == Made::Listed).then_some(self.gguf[0])
    }

    /// The expert's number, and the end that both names have, if `rest` is a name of it.
    fn matches<'n>(&self, rest: &'n str) -> Option<(usize, &'n str)> {
        if let Some((before, after)) = self.hf.split_once("{}") {
            let rest = rest.strip_prefix(before)?;
            let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            let end = rest[digits..].strip_prefix(after)?;
            return matches!(end, ".weight" | ".bias").then_some((rest[..digits].parse().ok()?, end));
        }
        let end = rest.strip_prefix(self.hf)?;
        matches!(end, "" | ".weight" | ".bias").then_some((0, end))
    }

    /// Names in the file of the tensors that it is made of.
    fn tensors(&self, layer: Option<usize>, end: &str) -> Vec<String> {
        let before = layer.map(|layer| format!("blk.{layer}.")).unwrap_or_default();
        let parts = self.gguf.iter().filter(|name| !name.is_empty());
        parts.map(|name| format!("{before}{name}{end}")).collect()
    }
}

impl Family {
    /// All places for the tensor that checkpoints call `name`, the likeliest first.
    pub(super) fn places_of(&self, name: &str) -> Vec<Found> {
        let in_layer = name.strip_prefix(self.layer).and_then(|rest| rest.split_once('.'));
        let in_layer = in_layer.and_then(|(layer, rest)| Some((layer.parse::<usize>().ok()?, rest)));
        let (layer, rest) = in_layer.map_or((None, name), |(layer, rest)| (Some(layer), rest));
        let shared = if layer.is_some() { COMMON } else { OUTSIDE };
        let found = |place: &'static Place| {
            let (expert, end) = place.matches(rest)?;
            let turned = matches!(place.hf, "self_attn.q_proj" | "self_attn.k_proj");
            Some(Found { place, tensors: place.tensors(layer, end), layer, expert, turned })
        };
        self.places.iter().chain(shared).filter_map(found).collect()
    }

    /// The file's name of the tensor that checkpoints call `name`, where it is the same in both.
    pub(crate) fn tensor_of(&self, name: &str) -> Option<String> {
        self.places_of(name).into_iter().find(|found| found.place.made == Made::Same)?.tensors.pop()
    }

    /// The module of a checkpoint whose weight the file calls `name`, where it is the same in both.
    pub(crate) fn module_of(&self, name: &str) -> Option<String> {
        let (layer, rest) = match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
            Some((layer, rest)) => (Some(layer.parse::<usize>().ok()?), rest),
            None => (None, name),
        };
        let module = rest.strip_suffix(".weight")?;
        let shared = if layer.is_some() { COMMON } else { OUTSIDE };
        let mut own = self.places.iter().filter(|place| layer.is_some() != is_whole(place.hf)).chain(shared);
        let place = own.find(|place| place.made == Made::Same && place.gguf[0] == module)?;
        Some(layer.map_or_else(|| place.hf.to_owned(), |layer| format!("{}{layer}.{}", self.layer, place.hf)))
    }
}

/// Whether a name is that of a tensor outside the layers.
fn is_whole(hf: &str) -> bool {
    ["model.", "transformer.", "backbone.", "lm_head"].iter().any(|start| hf.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_linear_layers_go_both_ways() {
        for (model_type, module, name) in [
            ("llama", "model.layers.3.self_attn.q_proj", "blk.3.attn_q"),
            ("mistral", "lm_head", "output"),
            ("gemma2", "model.layers.0.mlp.gate_proj", "blk.0.ffn_gate"),
            ("phi3", "model.layers.12.mlp.gate_up_proj", "blk.12.ffn_up"),
            ("gpt2", "transformer.h.1.attn.c_attn", "blk.1.attn_qkv"),
            ("mamba2", "backbone.layers.1.mixer.in_proj", "blk.1.ssm_in"),
            ("lfm2", "model.layers.2.feed_forward.w3", "blk.2.ffn_up"),
            ("gemma4_text", "model.layers.2.per_layer_projection", "blk.2.proj"),
        ] {
            let family = Family::of_model(model_type).unwrap();
            let weight = format!("{name}.weight");
            assert_eq!(family.tensor_of(&format!("{module}.weight")).as_deref(), Some(&weight[..]), "{model_type}");
            assert_eq!(family.module_of(&weight).as_deref(), Some(module), "{model_type}");
        }
        // What is not the same in both has no name for an adapter.
        let family = Family::of_model("qwen3_5_text").unwrap();
        assert_eq!(family.tensor_of("model.layers.0.linear_attn.in_proj_qkv.weight"), None);
        assert_eq!(family.module_of("blk.0.attn_qkv.weight"), None);
        assert_eq!(family.tensor_of("model.layers.0.mlp.up_proj.weight").as_deref(), Some("blk.0.ffn_up.weight"));
    }
}
