//! LFM2 with experts (Liquid AI 2025): in all but the first layers a token goes through a few of many feed-forward parts.

use crate::config::ConfigError;
use crate::decoder::Mlp;
use crate::feed_forward::{Mixture, check_experts, expert};
use crate::keys::Keys;
use crate::lfm2::{Lfm2, PROJECTIONS, dense};
use crate::op::{Routing, Scores};
use crate::outline::Builder;
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family { model_type: "lfm2_moe", honoured: &["num_experts"], scaled: None, build };

/// The keys of the experts.
struct MixtureKeys {
    experts: usize,
    width: usize,
    top: usize,
    normalize: bool,
    bias: bool,
    scale: f32,
}

impl MixtureKeys {
    fn read(keys: &Keys<'_>) -> Result<Self, ConfigError> {
        let (experts, top) = (keys.count_or("num_experts", 32)?, keys.count_or("num_experts_per_tok", 4)?);
        check_experts(experts, top, keys.count("num_hidden_layers")?)?;
        Ok(Self {
            experts,
            top,
            width: keys.optional_size("moe_intermediate_size")?.unwrap_or(1792),
            normalize: keys.flag("norm_topk_prob", true)?,
            bias: keys.flag("use_expert_bias", true)?,
            scale: keys.positive("routed_scaling_factor", 1.0)? as f32,
        })
    }

    fn declare(&self, b: &mut Builder, at: &str) -> Mixture {
        let router = b.router(&format!("{at}.gate"), self.experts, b.config.hidden_size);
        let bias = self.bias.then(|| b.vector(format!("{at}.expert_bias"), self.experts));
        let names = (0..self.experts).map(|e| format!("{at}.experts.{e}"));
        Mixture {
            router,
            experts: names.map(|at| expert(b, &at, PROJECTIONS, self.width)).collect(),
            routing: Routing {
                top: self.top,
                scores: Scores::Sigmoid { bias },
                normalize: self.normalize,
                factors: None,
            },
            scale: self.scale,
        }
    }
}

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let (mixture, width) = (MixtureKeys::read(keys)?, keys.size("intermediate_size")?);
    let first = keys.index("num_dense_layers")?.unwrap_or(2);
    let feed_forward = |b: &mut Builder, at: &str, i: usize| match i {
        _ if i < first => dense(b, at, width),
        _ => Mlp::Sparse(mixture.declare(b, at)),
    };
    Ok(Box::new(Lfm2::new(keys, &feed_forward)?))
}

#[cfg(test)]
mod tests {
    use crate::testing::{config, refused_key};
    use serde_json::json;

    #[test]
    fn experts_are_in_the_layers_where_transformers_has_them() {
        let routers = |change| {
            let model = crate::build(&config("lfm2_moe", &change)).unwrap();
            let name = |p: &&crate::ParamSpec| p.name.ends_with("feed_forward.gate.weight");
            model.params().iter().filter(name).count()
        };
        assert_eq!(routers(json!({})), 1);
        assert_eq!(routers(json!({"num_dense_layers": 0})), 3);
        for (change, key) in [
            (json!({"num_experts": 2}), "num_experts_per_tok"),
            (json!({"num_experts": 4096, "num_hidden_layers": 64}), "num_experts"),
            (json!({"routed_scaling_factor": 0}), "routed_scaling_factor"),
        ] {
            assert_eq!(refused_key("lfm2_moe", &change).as_deref(), Some(key), "{change}");
        }
    }
}
