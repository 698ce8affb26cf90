//! Grouped-query attention (Ainslie et al. 2023) with its projections.

use crate::exec::Exec;
use crate::op::{AttentionShape, Linear, Norm, RopeTable, StateId, StateSpec, Value};
use crate::outline::Builder;

/// What families differ in.
#[derive(Clone, Copy)]
pub(crate) struct AttentionSpec {
    /// Rotary table of the layer.
    pub(crate) rope: RopeTable,
    /// Factor on the scores.
    pub(crate) scale: f32,
    /// A token sees so many, itself included; without one, all.
    pub(crate) window: Option<usize>,
    /// q, k, v have biases.
    pub(crate) qkv_bias: bool,
    /// The output has a bias.
    pub(crate) o_bias: bool,
    /// Name of the output's projection.
    pub(crate) o: &'static str,
    /// Norms of each head of q and k, before they are turned.
    pub(crate) norms: Option<HeadNorms>,
}

/// Norms of each head of q and k.
#[derive(Clone, Copy)]
pub(crate) struct HeadNorms {
    /// Their names.
    pub(crate) names: [&'static str; 2],
    /// Added to the mean square.
    pub(crate) eps: f32,
    /// The file holds `w - 1`.
    pub(crate) plus_one: bool,
}

pub(crate) struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    norms: Option<[Norm; 2]>,
    rope: RopeTable,
    shape: AttentionShape,
    state: StateId,
}

impl AttentionSpec {
    /// Without biases, norms and window, scaled by `1 / sqrt(D)`.
    pub(crate) fn plain(head_dim: usize, rope: RopeTable) -> Self {
        let scale = (head_dim as f32).sqrt().recip();
        Self { rope, scale, window: None, qkv_bias: false, o_bias: false, o: "o_proj", norms: None }
    }
}

impl HeadNorms {
    pub(crate) fn declare(self, b: &mut Builder, at: &str) -> [Norm; 2] {
        let width = b.config.head_dim;
        self.names.map(|name| Norm { plus_one: self.plus_one, ..b.rms_norm(&format!("{at}.{name}"), width, self.eps) })
    }
}

impl Attention {
    /// Declares the projections of the module `at`, and what it remembers.
    pub(crate) fn new(b: &mut Builder, at: &str, spec: AttentionSpec) -> Self {
        let (heads, kv_heads, head_dim) = (b.config.heads, b.config.kv_heads, b.config.head_dim);
        let (hidden, window) = (b.config.hidden_size, spec.window);
        Self {
            q: b.linear(&format!("{at}.q_proj"), heads * head_dim, hidden, spec.qkv_bias),
            k: b.linear(&format!("{at}.k_proj"), kv_heads * head_dim, hidden, spec.qkv_bias),
            v: b.linear(&format!("{at}.v_proj"), kv_heads * head_dim, hidden, spec.qkv_bias),
            o: b.linear(&format!("{at}.{}", spec.o), hidden, heads * head_dim, spec.o_bias),
            norms: spec.norms.map(|norms| norms.declare(b, at)),
            rope: spec.rope,
            shape: AttentionShape { heads, kv_heads, head_dim, scale: spec.scale, window },
            state: b.state(StateSpec::Kv { kv_heads, head_dim, window }),
        }
    }

    pub(crate) fn run(&self, ex: &mut dyn Exec, h: Value) -> Value {
        let [q, k, v] = ex.linear_group([self.q, self.k, self.v], h);
        let (q, k) = match self.norms {
            Some([q_norm, k_norm]) => (ex.rms_norm(q_norm, q), ex.rms_norm(k_norm, k)),
            None => (q, k),
        };
        let (q, k) = (ex.rope(self.rope, self.shape.heads, q), ex.rope(self.rope, self.shape.kv_heads, k));
        let a = ex.attention(self.state, self.shape, q, k, v);
        ex.linear(self.o, a)
    }
}
