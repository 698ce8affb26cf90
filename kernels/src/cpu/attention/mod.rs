//! Causal attention with grouped queries, block by block: no `T x T` matrix exists (Dao et al. 2022).
//!
//! For query `t` of head `h`, whose keys and values are those of head `g = h / (H / G)`:
//! `s[j] = scale q[t, h] . k[j, g]` over the visible `j` (`t - window < j <= t`, same segment),
//! `p = softmax(s)`, `y[t, h] = sum_j p[j] v[j, g]`, `lse[t, h] = log sum_j e^s[j]`.
//! Forward keeps `y` and `lse`; backward computes `p = e^(s - lse)` again.

mod backward;
mod cached;
mod forward;
mod online;

pub(crate) use backward::vjp;
pub(crate) use cached::forward as forward_cached;
pub(crate) use forward::forward;

use crate::Attention;
use std::ops::Range;

/// Keys of a block: with 64-wide heads, a block of keys and one of values are 32 KiB.
const KEYS: usize = 64;
/// Query rows (tokens times heads of a group) that a forward task aims for.
const QUERIES: usize = 48;

/// Widths that follow from an [`Attention`].
#[derive(Clone, Copy)]
struct Shape {
    /// Query heads that share a key/value head.
    group: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Elements of a row of `q`.
    q_width: usize,
    /// Elements of a row of `k`.
    kv_width: usize,
}

impl Shape {
    fn new(spec: &Attention) -> Self {
        let Attention { heads, kv_heads, head_dim, .. } = *spec;
        assert!(kv_heads > 0 && head_dim > 0 && heads > 0 && heads.is_multiple_of(kv_heads));
        assert!(spec.window != Some(0));
        let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        Self { group: heads / kv_heads, kv_heads, head_dim, q_width, kv_width }
    }

    /// Tokens of a forward task.
    fn query_tokens(&self) -> usize {
        (QUERIES / self.group).max(8)
    }
}

/// Keys that the query at position `t` sees.
fn visible(spec: &Attention, t: usize) -> Range<usize> {
    let first = spec.window.map_or(0, |window| (t + 1).saturating_sub(window));
    first..t + 1
}

/// The part of `range` inside the block `first..first + len`, counted from the block's start.
fn clip(range: &Range<usize>, first: usize, len: usize) -> Range<usize> {
    let local = |at: usize| at.saturating_sub(first).min(len);
    local(range.start)..local(range.end)
}
