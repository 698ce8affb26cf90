//! Qwen3 MoE (Yang et al. 2025): Qwen3's attention; in most layers a token goes through a few of many experts.

use crate::attention::{AttentionSpec, QkNorms};
use crate::config::{Config, ConfigError, Defaults};
use crate::decoder::{Decoder, Variant};
use crate::feed_forward::{Mixture, PROJECTIONS, check_experts, expert};
use crate::keys::Keys;
use crate::op::{Routing, Scores};
use crate::outline::Builder;
use crate::windows::WindowKeys;
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family {
    model_type: "qwen3_moe",
    honoured: &["attention_bias", "num_experts", "num_local_experts"],
    scaled: None,
    build,
};

/// The keys of the experts.
pub(crate) struct MixtureKeys {
    experts: usize,
    width: usize,
    top: usize,
    normalize: bool,
    /// Every so many layers have experts, unless listed.
    step: usize,
    dense: Vec<usize>,
}

/// What is taken where keys are missing.
pub(crate) struct MixtureDefaults {
    experts: usize,
    top: usize,
    width: usize,
    normalize: bool,
}

impl MixtureKeys {
    /// What Qwen3-Next takes where its keys are missing.
    pub(crate) const NEXT: MixtureDefaults = MixtureDefaults { experts: 512, top: 10, width: 512, normalize: true };
    const MOE: MixtureDefaults = MixtureDefaults { experts: 128, top: 8, width: 768, normalize: false };

    pub(crate) fn read(keys: &Keys<'_>, layers: usize, defaults: &MixtureDefaults) -> Result<Self, ConfigError> {
        let (new, old) = (keys.index("num_local_experts")?, keys.index("num_experts")?);
        if let (Some(new), Some(old)) = (new, old)
            && new != old
        {
            return Err(ConfigError::new("num_experts", format!("{new}, as `num_local_experts` says"), old));
        }
        let experts = new.or(old).unwrap_or(defaults.experts);
        let top = keys.optional_size("num_experts_per_tok")?.unwrap_or(defaults.top);
        check_experts(experts, top, layers)?;
        Ok(Self {
            experts,
            top,
            width: keys.optional_size("moe_intermediate_size")?.unwrap_or(defaults.width),
            normalize: keys.flag("norm_topk_prob", defaults.normalize)?,
            step: keys.optional_size("decoder_sparse_step")?.unwrap_or(1),
            dense: keys.indices("mlp_only_layers")?.unwrap_or_default(),
        })
    }

    pub(crate) fn has_experts(&self, layer: usize) -> bool {
        self.experts > 0 && !self.dense.contains(&layer) && (layer + 1).is_multiple_of(self.step)
    }

    pub(crate) fn declare(&self, b: &mut Builder, at: &str) -> Mixture {
        let (experts, hidden) = (self.experts, b.config.hidden_size);
        let expert = |b: &mut Builder, e| expert(b, &format!("{at}.experts.{e}"), PROJECTIONS, self.width);
        Mixture {
            router: b.router(&format!("{at}.gate"), experts, hidden),
            experts: (0..experts).map(|e| expert(b, e)).collect(),
            routing: Routing { top: self.top, scores: Scores::Softmax, normalize: self.normalize, factors: None },
            scale: 1.0,
        }
    }
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let config = Config::read(keys, &Defaults { kv_heads: Some(4), positions: 32768, ..Defaults::default() })?;
    let bias = keys.flag("attention_bias", false)?;
    let window = WindowKeys::read(keys, Some(4096), false)?;
    let windows = window.same(keys, config.layers, window.window.filter(|_| window.on))?;
    let mixture = MixtureKeys::read(keys, config.layers, &MixtureKeys::MOE)?;
    let eps = keys.share("rms_norm_eps", 1e-6)?;
    let norms = Some(QkNorms::of_heads(eps));
    let attention = AttentionSpec { qkv_bias: bias, o_bias: bias, norms, ..AttentionSpec::default() };
    let variant = Variant { attention, ..Variant::new(eps, windows) };
    let experts = |b: &mut Builder, at: &str, i: usize| mixture.has_experts(i).then(|| mixture.declare(b, at));
    Ok(Box::new(Decoder::new(keys, config, &variant, &experts)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{config, refused_key};
    use serde_json::json;

    #[test]
    fn experts_are_in_the_layers_where_transformers_has_them() {
        let sparse = |change| {
            let config = config("qwen3_moe", &change);
            let keys = MixtureKeys::read(&Keys(&config), 4, &MixtureKeys::MOE).unwrap();
            (0..4).filter(|&i| keys.has_experts(i)).collect::<Vec<_>>()
        };
        assert_eq!(sparse(json!({})), [0, 1, 2, 3]);
        assert_eq!(sparse(json!({"decoder_sparse_step": 2})), [1, 3]);
        assert_eq!(sparse(json!({"mlp_only_layers": [0, 2]})), [1, 3]);
        assert!(sparse(json!({"num_experts": 0})).is_empty());
    }

    #[test]
    fn contradictions_are_refused_by_name() {
        for (change, key) in [
            (json!({"num_experts": 4, "num_local_experts": 8}), "num_experts"),
            (json!({"num_experts": 4, "num_experts_per_tok": 5}), "num_experts_per_tok"),
            (json!({"num_experts": 1 << 16}), "num_experts"),
            (json!({"mlp_only_layers": ["first"]}), "mlp_only_layers"),
        ] {
            assert_eq!(refused_key("qwen3_moe", &change).as_deref(), Some(key), "{change}");
        }
    }
}
