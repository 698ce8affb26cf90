//! The experts of Gemma 4, which work beside the feed-forward part of a layer on the same residual stream.

use crate::config::ConfigError;
use crate::exec::Exec;
use crate::feed_forward::{FUSED, check_experts, stacked_experts};
use crate::keys::Keys;
use crate::op::{Activation, Expert, Linear, Norm, Op, Routing, Scores, Value};
use crate::outline::Builder;

/// The keys of the experts.
#[derive(Clone, Copy)]
pub(crate) struct MixtureKeys {
    experts: usize,
    top: usize,
    width: usize,
}

impl MixtureKeys {
    pub(crate) fn read(keys: &Keys<'_>, layers: usize) -> Result<Self, ConfigError> {
        let (experts, top) = (keys.count("num_experts")?, keys.count("top_k_experts")?);
        check_experts(experts, top, layers)?;
        Ok(Self { experts, top, width: keys.size("moe_intermediate_size")? })
    }
}

pub(crate) struct Experts {
    /// What the router reads: a bare norm times a weight.
    router_norm: Norm,
    router_scale: f32,
    router: Linear,
    routing: Routing,
    before: Norm,
    experts: Vec<Expert>,
    /// Of the feed-forward part, and of the experts.
    after: [Norm; 2],
}

impl Experts {
    /// Declares those of the layer `at`.
    pub(crate) fn new(b: &mut Builder, at: &str, keys: MixtureKeys, eps: f32) -> Self {
        let (hidden, MixtureKeys { experts, top, width }) = (b.config.hidden_size, keys);
        let norm = |b: &mut Builder, name: &str| b.rms_norm(&format!("{at}.{name}"), hidden, eps);
        let scale = b.vector(format!("{at}.router.scale"), hidden);
        let names = FUSED.map(|name| format!("{at}.experts.{name}"));
        Self {
            router_norm: Norm { weight: Some(scale), ..Norm::bare(hidden, eps) },
            router_scale: (hidden as f32).sqrt().recip(),
            router: b.router(&format!("{at}.router.proj"), experts, hidden),
            routing: Routing {
                top,
                scores: Scores::Softmax,
                normalize: true,
                factors: Some(b.vector(format!("{at}.router.per_expert_scale"), experts)),
            },
            before: norm(b, "pre_feedforward_layernorm_2"),
            experts: stacked_experts(b, names.each_ref().map(String::as_str), experts, width, Activation::GeluTanh),
            after: ["post_feedforward_layernorm_1", "post_feedforward_layernorm_2"].map(|name| norm(b, name)),
        }
    }

    /// What the feed-forward part made of the residual stream `x`, which is `dense`, and what experts make of it.
    pub(crate) fn beside(&self, ex: &mut dyn Exec, x: Value, dense: Value) -> Value {
        let dense = ex.norm(self.after[0], dense);
        let h = ex.norm(self.router_norm, x);
        let h = ex.scale(self.router_scale, h);
        let logits = ex.linear(self.router, h);
        let weights = ex.run(Op::Route { router: self.router.weight, routing: self.routing, logits });
        let h = ex.norm(self.before, x);
        let h = ex.run(Op::Experts { experts: self.experts.clone(), x: h, weights });
        let h = ex.norm(self.after[1], h);
        ex.add(dense, h)
    }
}
