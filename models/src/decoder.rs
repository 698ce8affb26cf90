//! The decoder that most families share (Touvron et al. 2023): attention and a feed-forward part, each added to the
//! residual stream, with norms before them, after them, or both.

use crate::Model;
use crate::attention::{Attention, AttentionSpec};
use crate::config::{Config, ConfigError};
use crate::exec::Exec;
use crate::feed_forward::{FeedForward, Inner, Mixture};
use crate::keys::Keys;
use crate::op::{Activation, Norm, Value};
use crate::outline::{Builder, Outline};
use crate::rope::{Rope, RopeKeys};

/// What families differ in.
pub(crate) struct Variant {
    /// Attention of all layers, but for the two lists below.
    pub(crate) attention: AttentionSpec,
    /// Sliding window of each layer, in tokens; a layer without one sees all.
    pub(crate) windows: Vec<Option<usize>>,
    /// Angles of each layer's queries and keys, none where they do not turn; without a list the config's in all layers.
    pub(crate) ropes: Option<Vec<Option<[Rope; 2]>>>,
    /// The feed-forward part of all layers.
    pub(crate) mlp: Inner,
    /// It has biases.
    pub(crate) mlp_bias: bool,
    /// Where the norms are.
    pub(crate) norms: NormNames,
    /// Added to the mean square in these, and in the last norm.
    pub(crate) eps: f32,
    /// What they are.
    pub(crate) norm: NormKind,
}

/// Kinds of norms.
#[derive(Clone, Copy)]
pub(crate) enum NormKind {
    Rms,
    /// The file holds one less than their weights.
    RmsPlusOne,
    /// Without weights.
    Bare,
    Layer,
}

impl Variant {
    /// Norms before both parts, a SiLU gate, no biases.
    pub(crate) fn new(eps: f32, windows: Vec<Option<usize>>) -> Self {
        Self {
            attention: AttentionSpec::default(),
            windows,
            ropes: None,
            mlp: Inner::Gated(Activation::Silu),
            mlp_bias: false,
            norms: PRE_NORM,
            eps,
            norm: NormKind::Rms,
        }
    }
}

/// Names of the norms before and after attention, and before and after the feed-forward part.
pub(crate) type NormNames = [[Option<&'static str>; 2]; 2];

/// Norms before both parts.
pub(crate) const PRE_NORM: NormNames = [[Some("input_layernorm"), None], [Some("post_attention_layernorm"), None]];
/// Norms after both parts.
pub(crate) const POST_NORM: NormNames =
    [[None, Some("post_attention_layernorm")], [None, Some("post_feedforward_layernorm")]];

pub(crate) struct Decoder {
    pub(crate) outline: Outline,
    pub(crate) layers: Vec<Layer>,
}

pub(crate) struct Layer {
    pub(crate) attention_norms: Around,
    pub(crate) attention: Attention,
    pub(crate) mlp_norms: Around,
    pub(crate) mlp: Mlp,
}

/// The norms before and after a part of a layer.
pub(crate) struct Around {
    before: Option<Norm>,
    after: Option<Norm>,
}

pub(crate) enum Mlp {
    Dense(FeedForward),
    Sparse(Mixture),
}

/// The model that `keys` describe beside `config`.
pub(crate) fn build(keys: &Keys<'_>, config: Config, variant: &Variant) -> Result<Box<dyn Model>, ConfigError> {
    Ok(Box::new(Decoder::new(keys, config, variant, &|_, _, _| None)?))
}

impl Decoder {
    /// The same, with a mixture of experts in the layers for whose module and number `mixture` declares one.
    pub(crate) fn new(
        keys: &Keys<'_>,
        config: Config,
        variant: &Variant,
        mixture: &dyn Fn(&mut Builder, &str, usize) -> Option<Mixture>,
    ) -> Result<Self, ConfigError> {
        let (ffn, hidden) = (keys.size("intermediate_size")?, config.hidden_size);
        let ropes = match &variant.ropes {
            Some(ropes) => ropes.clone(),
            None => RopeKeys::of(&config).read(keys)?.everywhere(&config),
        };
        let norm = |b: &mut Builder, module: &str| match variant.norm {
            NormKind::Rms => b.rms_norm(module, hidden, variant.eps),
            NormKind::RmsPlusOne => Norm { plus_one: true, ..b.rms_norm(module, hidden, variant.eps) },
            NormKind::Bare => Norm::bare(hidden, variant.eps),
            NormKind::Layer => b.layer_norm(module, hidden, variant.eps),
        };
        let [[before_attention, after_attention], [before_mlp, after_mlp]] = variant.norms;
        let mut b = Builder::new(config);
        let layer = |(i, (window, ropes)): (usize, (&Option<usize>, Option<[Rope; 2]>))| {
            let at = format!("model.layers.{i}");
            let of_layer = |b: &mut Builder, name: Option<&str>| name.map(|name| norm(b, &format!("{at}.{name}")));
            let ropes = ropes.map(|ropes| ropes.map(|rope| b.rope(rope)));
            let spec = AttentionSpec { ropes, window: *window, ..variant.attention };
            let before = of_layer(&mut b, before_attention);
            let attention = Attention::new(&mut b, &format!("{at}.self_attn"), spec);
            let attention_norms = Around { before, after: of_layer(&mut b, after_attention) };
            let before = of_layer(&mut b, before_mlp);
            let mlp = {
                let at = format!("{at}.mlp");
                let dense = |b: &mut Builder| FeedForward::new(b, &at, variant.mlp, ffn, variant.mlp_bias);
                mixture(&mut b, &at, i).map_or_else(|| Mlp::Dense(dense(&mut b)), Mlp::Sparse)
            };
            let mlp_norms = Around { before, after: of_layer(&mut b, after_mlp) };
            Layer { attention_norms, attention, mlp_norms, mlp }
        };
        let layers = variant.windows.iter().zip(ropes).enumerate().map(layer).collect();
        let norm = norm(&mut b, "model.norm");
        Ok(Self { outline: b.finish(norm), layers })
    }
}

impl Around {
    pub(crate) fn before(&self, ex: &mut dyn Exec, x: Value) -> Value {
        self.before.map_or(x, |norm| ex.norm(norm, x))
    }

    pub(crate) fn after(&self, ex: &mut dyn Exec, x: Value) -> Value {
        self.after.map_or(x, |norm| ex.norm(norm, x))
    }
}

impl Mlp {
    pub(crate) fn run(&self, ex: &mut dyn Exec, h: Value) -> Value {
        match self {
            Self::Dense(mlp) => mlp.run(ex, h),
            Self::Sparse(mlp) => mlp.run(ex, h),
        }
    }
}

impl Model for Decoder {
    fn outline(&self) -> &Outline {
        &self.outline
    }

    fn layer(&self, ex: &mut dyn Exec, index: usize, x: Value) -> Value {
        let l = &self.layers[index];

        let h = l.attention_norms.before(ex, x);
        let a = l.attention.run(ex, h);
        let a = l.attention_norms.after(ex, a);
        let x = ex.add(x, a);

        let h = l.mlp_norms.before(ex, x);
        let h = l.mlp.run(ex, h);
        let h = l.mlp_norms.after(ex, h);
        ex.add(x, h)
    }
}
