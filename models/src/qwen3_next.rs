//! Qwen3-Next (Qwen Team 2025): the layers of Qwen3.5, whose delta nets have their inputs by heads; in most layers a token
//! goes through a few of many experts and through one that all tokens share, as far as a gate lets it.

use crate::config::ConfigError;
use crate::feed_forward::{FeedForward, Inner, SharedMixture};
use crate::gated_delta_net::{Hybrid, InputsBy, Mlp};
use crate::keys::Keys;
use crate::op::Activation;
use crate::outline::Builder;
use crate::qwen3_moe::MixtureKeys;
use crate::{Family, Model};

pub(crate) const FAMILY: Family = Family {
    model_type: "qwen3_next",
    honoured: &["attention_bias", "attn_output_gate", "num_experts", "num_local_experts", "partial_rotary_factor"],
    scaled: None,
    build,
};

fn build(keys: &Keys<'_>) -> Result<Box<dyn Model>, ConfigError> {
    let mixture = MixtureKeys::read(keys, keys.count("num_hidden_layers")?, &MixtureKeys::NEXT)?;
    // Not read where all layers have experts.
    let width = keys.optional_size("intermediate_size")?.unwrap_or(5632);
    let shared = keys.optional_size("shared_expert_intermediate_size")?.unwrap_or(512);
    let mlp = |b: &mut Builder, at: &str, i: usize| {
        let dense =
            |b: &mut Builder, at: &str, width| FeedForward::new(b, at, Inner::Gated(Activation::Silu), width, false);
        if !mixture.has_experts(i) {
            return Mlp::Dense(dense(b, at, width));
        }
        Mlp::Shared(SharedMixture {
            mixture: mixture.declare(b, at),
            shared: dense(b, &format!("{at}.shared_expert"), shared),
            gate: b.linear(&format!("{at}.shared_expert_gate"), 1, b.config.hidden_size, false),
        })
    };
    Ok(Box::new(Hybrid::new(keys, 2, InputsBy::Head, &mlp)?))
}

#[cfg(test)]
mod tests {
    use crate::testing::{config, refused_key};
    use serde_json::json;

    #[test]
    fn experts_are_in_the_layers_where_transformers_has_them() {
        let gates = |change| {
            let model = crate::build(&config("qwen3_next", &change)).unwrap();
            model.params().iter().filter(|p| p.name.ends_with("shared_expert_gate.weight")).count()
        };
        let few = json!({"num_experts": 4, "num_experts_per_tok": 2});
        assert_eq!(gates(few.clone()), 3);
        let mut dense = few.clone();
        dense["mlp_only_layers"] = json!([2]);
        assert_eq!(gates(dense), 2);
        for (change, key) in [
            (json!({"num_experts": 4}), "num_experts_per_tok"),
            (json!({"linear_num_value_heads": 3, "linear_num_key_heads": 2}), "linear_num_value_heads"),
        ] {
            assert_eq!(refused_key("qwen3_next", &change).as_deref(), Some(key), "{change}");
        }
    }
}
