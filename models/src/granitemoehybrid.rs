//! Granite 4 (IBM 2025): most layers are state spaces, the others attention, usually without positions; then a feed-forward
//! part that all tokens share, beside experts or alone. Factors are those of Granite.

use crate::attention::{Attention, AttentionSpec};
use crate::config::{Config, ConfigError, Defaults};
use crate::exec::Exec;
use crate::feed_forward::{FeedForward, Inner, Mixture, check_experts, stacked_experts};
use crate::granite::Factors;
use crate::keys::Keys;
use crate::mamba::{GatedNorm, Mamba, MambaSpec};
use crate::op::{Activation, Norm, Routing, Scores, Value};
use crate::outline::{Builder, Outline};
use crate::rope::RopeKeys;
use crate::windows::{FULL, layer_types};
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family {
    model_type: "granitemoehybrid",
    honoured: &[
        "attention_bias",
        "attention_multiplier",
        "embedding_multiplier",
        "logits_scaling",
        "num_local_experts",
        "position_embedding_type",
        "residual_multiplier",
    ],
    scaled: None,
    build,
};

/// Names of the kinds of layers: those of transformers 5, and those of files before it.
const KINDS: [&str; 4] = [FULL, "attention", "linear_attention", "mamba"];

struct GraniteHybrid {
    outline: Outline,
    factors: Factors,
    layers: Vec<Layer>,
}

struct Layer {
    input_norm: Norm,
    mixer: Mixer,
    post_norm: Norm,
    shared_mlp: FeedForward,
    experts: Option<Mixture>,
}

/// What mixes a layer's tokens.
enum Mixer {
    Attention(Attention),
    Mamba(Mamba),
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { positions: 2048, ..Defaults::default() })?;
    keys.one_of("position_embedding_type", &["rope", "nope"])?;
    let (eps, hidden) = (keys.share("rms_norm_eps", 1e-6)?, config.hidden_size);
    let factors = Factors::read(keys)?;
    let types = layer_types(keys, config.layers, &KINDS)?;
    let types = types.unwrap_or_else(|| vec!["mamba"; config.layers]);
    let norm = Some(GatedNorm { eps, before_gate: false });
    let mamba = MambaSpec { norm, ..MambaSpec::hybrid(keys, hidden)? };
    let (experts, top) =
        (keys.index("num_local_experts")?.unwrap_or(8), keys.index("num_experts_per_tok")?.unwrap_or(2));
    check_experts(experts, top, config.layers)?;
    let (width, shared) =
        (keys.size("intermediate_size")?, keys.optional_size("shared_intermediate_size")?.unwrap_or(1024));
    let bias = keys.flag("attention_bias", false)?;
    let rope = match keys.text("position_embedding_type")? {
        Some("rope") => Some(RopeKeys::of(&config).read(keys)?),
        _ => None,
    };

    let mut b = Builder::new(config);
    let ropes = rope.map(|rope| [b.rope(rope); 2]);
    let scale = Some(factors.attention);
    let attention = AttentionSpec { ropes, scale, qkv_bias: bias, o_bias: bias, ..AttentionSpec::default() };
    let layers = types.into_iter().enumerate().map(|(i, kind)| {
        let at = format!("model.layers.{i}");
        Layer {
            input_norm: b.rms_norm(&format!("{at}.input_layernorm"), hidden, eps),
            mixer: match kind {
                FULL | "attention" => Mixer::Attention(Attention::new(&mut b, &format!("{at}.self_attn"), attention)),
                _ => Mixer::Mamba(Mamba::new(&mut b, &format!("{at}.mamba"), mamba)),
            },
            post_norm: b.rms_norm(&format!("{at}.post_attention_layernorm"), hidden, eps),
            shared_mlp: {
                let inner = Inner::FusedGate(Activation::Silu, ["input_linear", "output_linear"]);
                FeedForward::new(&mut b, &format!("{at}.shared_mlp"), inner, shared, false)
            },
            experts: (experts > 0).then(|| mixture(&mut b, &format!("{at}.block_sparse_moe"), experts, width, top)),
        }
    });
    let layers = layers.collect();
    let norm = b.rms_norm("model.norm", hidden, eps);
    Ok(Box::new(GraniteHybrid { outline: b.finish(norm), factors, layers }))
}

fn mixture(b: &mut Builder, at: &str, experts: usize, width: usize, top: usize) -> Mixture {
    let names = ["input_linear", "output_linear"].map(|name| format!("{at}.{name}.weight"));
    Mixture {
        router: b.router(&format!("{at}.router.layer"), experts, b.config.hidden_size),
        experts: stacked_experts(b, names.each_ref().map(String::as_str), experts, width, Activation::Silu),
        // The softmax of the chosen logits alone is that of all, divided by its sum.
        routing: Routing { top, scores: Scores::Softmax, normalize: true, factors: None },
        scale: 1.0,
    }
}

impl Model for GraniteHybrid {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn embed(&self, ex: &mut dyn Exec) -> Value {
        let x = ex.embed(self.outline.embedding);
        ex.scale(self.factors.embedding, x)
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        let l = &self.layers[index];

        let h = ex.norm(l.input_norm, x);
        let h = match &l.mixer {
            Mixer::Attention(attention) => attention.run(ex, h),
            Mixer::Mamba(mamba) => mamba.run(ex, h),
        };
        let h = ex.scale(self.factors.residual, h);
        let x = ex.add(x, h);

        let h = ex.norm(l.post_norm, x);
        let y = l.shared_mlp.run(ex, h);
        let y = match &l.experts {
            Some(experts) => {
                let chosen = experts.run(ex, h);
                ex.add(chosen, y)
            }
            None => y,
        };
        let y = ex.scale(self.factors.residual, y);
        ex.add(x, y)
    }

    fn norm(&self, ex: &mut dyn Exec, x: Value) -> Value {
        let h = ex.norm(self.outline.norm, x);
        self.factors.divide(ex, h)
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{config, refused_key};
    use serde_json::json;

    #[test]
    fn layers_are_of_the_kinds_that_transformers_has() {
        let small = |change: serde_json::Value| {
            let mut keys = json!({"mamba_n_heads": 8, "num_local_experts": 0, "num_experts_per_tok": 0});
            keys.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            keys
        };
        let mixers = |change| {
            let model = crate::build(&config("granitemoehybrid", &small(change))).unwrap();
            model.params().iter().filter(|p| p.name.ends_with("self_attn.q_proj.weight")).count()
        };
        assert_eq!(mixers(json!({})), 0);
        assert_eq!(mixers(json!({"layer_types": ["mamba", "attention", "mamba"]})), 1);
        assert_eq!(mixers(json!({"layer_types": ["full_attention", "linear_attention", "full_attention"]})), 2);
        for (change, key) in [
            (json!({"layer_types": ["mamba", "conv", "mamba"]}), "layer_types"),
            (json!({"mamba_n_groups": 3}), "mamba_n_groups"),
            (json!({"mamba_d_head": 3}), "mamba_d_head"),
            (json!({"position_embedding_type": "alibi"}), "position_embedding_type"),
        ] {
            assert_eq!(refused_key("granitemoehybrid", &small(change.clone())).as_deref(), Some(key), "{change}");
        }
    }
}
