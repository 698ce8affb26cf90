//! Causal attention with grouped queries, block by block: no `T x T` matrix exists (Dao et al. 2022).
//!
//! For query `t` of head `h`, whose keys and values are those of head `g = h / (H / G)`:
//! `s[j] = scale q[t, h] . k[j, g]` over the visible `j` (`t - window < j <= t`, same segment),
//! `p = softmax(s)`, `y[t, h] = sum_j p[j] v[j, g]`, `lse[t, h] = log sum_j e^s[j]`.
//! With a softcap `c`, `c tanh(s / c)` takes the place of `s`.
//! A sink is one more score of its head, of no key: it is in `lse`, and so in `p`, and adds nothing to `y`.
//! Forward keeps `y` and `lse`; backward computes `p = e^(s - lse)` again.
//!
//! All products have the form `axpy`, whose sums stay in vectors until they are done. Scores come out of it when keys are
//! turned, `[D, KEYS]`: the cache holds them so, elsewhere a block is turned once for many queries. No sum runs across a
//! vector's lanes, and one kernel reads keys and values alike, in the type in which they are kept.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
mod backward;
mod cached;
mod forward;
#[cfg(target_arch = "aarch64")]
pub(super) mod neon;
mod online;
pub(super) mod portable;

pub(crate) use backward::{cost as vjp_cost, vjp};
pub(crate) use cached::forward as forward_cached;
pub(crate) use forward::{cost, forward};

use super::cache::BLOCK as KEYS;
use super::lanes::{LANES, load, store};
use super::tile::Rows;
use crate::Attention;
use std::ops::Range;
use wide::f32x8;

/// Constants in place of [`crate::CacheType`], which can be no parameter of a function.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const F32: u8 = 0;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const F16: u8 = 1;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const I8: u8 = 2;

/// Bytes of an element.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const fn size<const TYPE: u8>() -> usize {
    match TYPE {
        F32 => 4,
        F16 => 2,
        _ => 1,
    }
}

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

    /// Elements of a block of turned keys.
    fn turned(&self) -> usize {
        self.head_dim * KEYS
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

/// Columns of a block of turned keys that `count` keys need: whole vectors of any kind.
fn columns(count: usize) -> usize {
    count.next_multiple_of(16).min(KEYS)
}

/// Writes up to [`KEYS`] rows as the columns of `turned`, `[D, KEYS]`, whose further columns keep what they hold.
fn turn(x: Rows, turned: &mut [f32]) {
    assert!(x.count() <= KEYS && turned.len() == x.width() * KEYS);
    // Squares of eight by eight, as many as there are.
    let (rows, columns) = (x.count() / LANES * LANES, x.width() / LANES * LANES);
    for j in (0..rows).step_by(LANES) {
        let eight: [&[f32]; LANES] = std::array::from_fn(|i| x.row(j + i));
        for d in (0..columns).step_by(LANES) {
            let square = f32x8::transpose(eight.map(|row| load(&row[d..d + LANES])));
            for (i, column) in square.into_iter().enumerate() {
                store(&mut turned[(d + i) * KEYS + j..][..LANES], column);
            }
        }
    }
    for j in 0..x.count() {
        let done = if j < rows { columns } else { 0 };
        for (d, x) in x.row(j).iter().enumerate().skip(done) {
            turned[d * KEYS + j] = *x;
        }
    }
}
