//! Grouped-query attention (Ainslie et al. 2023) with its projections.

use crate::exec::Exec;
use crate::op::{AttentionShape, Linear, Norm, RopeTable, StateId, StateSpec, Value};
use crate::outline::Builder;

/// What families differ in.
#[derive(Clone, Copy)]
pub(crate) struct AttentionSpec {
    /// Rotary tables of queries and of keys; without them a layer knows no positions.
    pub(crate) ropes: Option<[RopeTable; 2]>,
    /// Factor on the scores; none is `1 / sqrt(D)`.
    pub(crate) scale: Option<f32>,
    /// See [`AttentionShape::softcap`].
    pub(crate) softcap: Option<f32>,
    /// A token sees so many, itself included; without one, all.
    pub(crate) window: Option<usize>,
    /// q, k and v are one matrix.
    pub(crate) fused: bool,
    /// q, k, v have biases.
    pub(crate) qkv_bias: bool,
    /// The output has a bias.
    pub(crate) o_bias: bool,
    /// Name of the output's projection.
    pub(crate) o: &'static str,
    /// Norms of q and k.
    pub(crate) norms: Option<QkNorms>,
    /// See [`AttentionShape::sinks`].
    pub(crate) sinks: bool,
    /// Name of a norm before the output's projection, and what it adds to the mean square.
    pub(crate) o_norm: Option<(&'static str, f32)>,
}

impl Default for AttentionSpec {
    fn default() -> Self {
        Self {
            ropes: None,
            scale: None,
            softcap: None,
            window: None,
            fused: false,
            qkv_bias: false,
            o_bias: false,
            o: "o_proj",
            norms: None,
            sinks: false,
            o_norm: None,
        }
    }
}

/// Norms of q and k.
#[derive(Clone, Copy)]
pub(crate) struct QkNorms {
    /// Their names.
    pub(crate) names: [&'static str; 2],
    /// Added to the mean square.
    pub(crate) eps: f32,
    /// The file holds `w - 1`.
    pub(crate) plus_one: bool,
    /// All heads are normed together.
    pub(crate) whole: bool,
    /// They have weights.
    pub(crate) weights: bool,
    /// They come after q and k are turned.
    pub(crate) after_rope: bool,
}

impl QkNorms {
    /// Of each head by itself, before q and k are turned.
    pub(crate) fn of_heads(eps: f32) -> Self {
        Self { names: ["q_norm", "k_norm"], eps, plus_one: false, whole: false, weights: true, after_rope: false }
    }

    pub(crate) fn declare(self, b: &mut Builder, at: &str) -> [Norm; 2] {
        let head = b.config.head_dim;
        let widths = if self.whole { [b.config.heads * head, b.config.kv_heads * head] } else { [head; 2] };
        [0, 1].map(|i| {
            if !self.weights {
                return Norm::bare(widths[i], self.eps);
            }
            let norm = b.rms_norm(&format!("{at}.{}", self.names[i]), widths[i], self.eps);
            Norm { plus_one: self.plus_one, ..norm }
        })
    }
}

pub(crate) struct Attention {
    qkv: Qkv,
    o_norm: Option<Norm>,
    o: Linear,
    norms: Option<[Norm; 2]>,
    ropes: Option<[RopeTable; 2]>,
    norms_after_rope: Option<[Norm; 2]>,
    shape: AttentionShape,
    state: StateId,
}

enum Qkv {
    Apart([Linear; 3]),
    Fused(Linear),
}

impl Attention {
    /// Declares the projections of the module `at`, and what it remembers.
    pub(crate) fn new(b: &mut Builder, at: &str, spec: AttentionSpec) -> Self {
        let (heads, kv_heads, head_dim) = (b.config.heads, b.config.kv_heads, b.config.head_dim);
        let (hidden, width, kv_width) = (b.config.hidden_size, heads * head_dim, kv_heads * head_dim);
        let AttentionSpec { window, softcap, qkv_bias, .. } = spec;
        let qkv = if spec.fused {
            Qkv::Fused(b.linear(&format!("{at}.qkv_proj"), width + 2 * kv_width, hidden, qkv_bias))
        } else {
            let projections = [("q_proj", width), ("k_proj", kv_width), ("v_proj", kv_width)];
            Qkv::Apart(projections.map(|(name, out)| b.linear(&format!("{at}.{name}"), out, hidden, qkv_bias)))
        };
        let o = b.linear(&format!("{at}.{}", spec.o), hidden, width, spec.o_bias);
        let norms = spec.norms.map(|norms| norms.declare(b, at));
        let (norms, norms_after_rope) =
            if spec.norms.is_some_and(|norms| norms.after_rope) { (None, norms) } else { (norms, None) };
        let o_norm = spec.o_norm.map(|(name, eps)| b.rms_norm(&format!("{at}.{name}"), width, eps));
        let sinks = spec.sinks.then(|| b.vector(format!("{at}.sinks"), heads));
        let scale = spec.scale.unwrap_or_else(|| (head_dim as f32).sqrt().recip());
        Self {
            qkv,
            o_norm,
            o,
            norms,
            ropes: spec.ropes,
            norms_after_rope,
            shape: AttentionShape { heads, kv_heads, head_dim, scale, softcap, window, sinks },
            state: b.state(StateSpec::Kv { kv_heads, head_dim, window }),
        }
    }

    pub(crate) fn run(&self, ex: &mut dyn Exec, h: Value) -> Value {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let [q, k, v] = match self.qkv {
            Qkv::Apart(qkv) => ex.linear_group(qkv, h),
            Qkv::Fused(qkv) => {
                let qkv = ex.linear(qkv, h);
                ex.split(qkv, [heads, kv_heads, kv_heads].map(|heads| heads * head_dim))
            }
        };
        let (q, k) = normed(ex, self.norms, q, k);
        let (q, k) = match self.ropes {
            Some([of_q, of_k]) => (ex.rope(of_q, heads, q), ex.rope(of_k, kv_heads, k)),
            None => (q, k),
        };
        let (q, k) = normed(ex, self.norms_after_rope, q, k);
        let a = ex.attention(self.state, self.shape, q, k, v);
        let a = self.o_norm.map_or(a, |norm| ex.norm(norm, a));
        ex.linear(self.o, a)
    }
}

fn normed(ex: &mut dyn Exec, norms: Option<[Norm; 2]>, q: Value, k: Value) -> (Value, Value) {
    let Some([of_q, of_k]) = norms else { return (q, k) };
    (ex.norm(of_q, q), ex.norm(of_k, k))
}
