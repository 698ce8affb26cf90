//! What a device may be asked to do: one [`Call`] for each operation that computes, with its shapes.
//!
//! Letters: `T` tokens (rows of activations), `C` width, `O` output rows of a weight, `K` its input columns, `V`
//! vocabulary, `H` query heads, `G` key/value heads, `D` head width. Activations are f32, row-major `[T, C]`. Weights are
//! row-major `[O, K]`, as checkpoints store them.
//!
//! Shapes follow from lengths of buffers. A wrong one is a bug in the caller, which the kernel asserts at its door. What is
//! written is overwritten, whatever it held before, unless it is said to be added to.

use crate::{
    Activation, AdamW, Arithmetic, Attention, Blocks, Columns, DeltaRule, Lends, Lion, Map, Memory, Scores, Sgd,
    StateSpace, Targets,
};
use std::ops::Range;

/// `scale (x Aᵀ) Bᵀ`, what a low-rank adapter adds to a product: `a` is `[r, K]`, `b` `[O, r]`.
pub struct LowRank<'a, M: Memory + ?Sized> {
    /// Down to the rank.
    pub a: &'a M::Matrix,
    /// Up from it.
    pub b: &'a M::Matrix,
    /// Factor on the whole.
    pub scale: f32,
    /// Rows of `x` and `y` that it belongs to: [`ALL_ROWS`], or those of a sequence of a batch.
    pub rows: Range<usize>,
}

/// All rows, however many there are.
pub const ALL_ROWS: Range<usize> = 0..usize::MAX;

/// One of several products of the same `x`, see [`Call::MatmulGroup`].
pub struct Product<'a, M: Memory + ?Sized> {
    /// `[O, K]`.
    pub w: &'a M::Matrix,
    /// Added to `x Wᵀ`.
    pub low_rank: Vec<LowRank<'a, M>>,
    /// `[T, O]`.
    pub y: &'a mut M::Buffer,
}

/// What a call does to a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It reads it.
    Read,
    /// It writes it, and may read it before.
    Write,
}

/// Makes the enum of calls and what is the same for all of them. Each field says what a call does with it:
/// `read` and `write` a buffer, `read_if` and `write_if` one that may be absent; `matrix`, `cache`, `cache_mut` and
/// `codes_mut` are other memory, `terms` and `products` lists with memory in them, `value` is anything else.
macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ident $(($type:ty))?,)* })*) => {
        /// One operation with all that it reads and writes. See the module's text for letters and conventions.
        #[allow(missing_docs, reason = "a variant's text says what its fields are")]
        pub enum Call<'a, M: Memory + ?Sized> {
            $($(#[$doc])* $name { $($field: calls!(@type $kind $(($type))?),)* },)*
        }

        impl<'a, M: Memory + ?Sized> Call<'a, M> {
            /// Its name, for measurements.
            #[must_use]
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$name { .. } => stringify!($name),)*
                }
            }

            /// Shows every buffer to `see` and what is done to it.
            #[allow(unused_variables, reason = "not every field is a buffer")]
            pub fn buffers(&self, see: &mut impl FnMut(&M::Buffer, Access)) {
                match self {
                    $(Self::$name { $($field),* } => { $(calls!(@see $kind $field see);)* })*
                }
            }

            /// The first weight, if there is one.
            #[allow(unused_variables, reason = "not every field is a weight")]
            fn weight(&self) -> Option<&M::Matrix> {
                match self {
                    $(Self::$name { $($field),* } => None$(.or(calls!(@weight $kind $field)))*,)*
                }
            }

            /// Hands the same call to `work` with the parts of its memory as those of `N`.
            pub fn lend<N: Memory, R>(self, work: impl FnOnce(Call<'_, N>) -> R) -> R
            where
                M: Lends<N>,
            {
                match self {
                    $(Self::$name { $($field),* } => {
                        $(calls!(@hold $kind $field M N);)*
                        work(Call::$name { $($field),* })
                    })*
                }
            }
        }
    };

    (@type read) => { &'a M::Buffer };
    (@type read_if) => { Option<&'a M::Buffer> };
    (@type write) => { &'a mut M::Buffer };
    (@type write_if) => { Option<&'a mut M::Buffer> };
    (@type matrix) => { &'a M::Matrix };
    (@type cache) => { &'a M::Cache };
    (@type cache_mut) => { &'a mut M::Cache };
    (@type codes_mut) => { &'a mut M::Codes };
    (@type terms) => { &'a [(&'a M::Matrix, &'a M::Buffer)] };
    (@type products) => { &'a mut [Product<'a, M>] };
    (@type value($type:ty)) => { $type };

    (@see read $field:ident $see:ident) => { $see($field, Access::Read) };
    (@see write $field:ident $see:ident) => { $see($field, Access::Write) };
    (@see read_if $field:ident $see:ident) => { $field.iter().for_each(|buffer| $see(buffer, Access::Read)) };
    (@see write_if $field:ident $see:ident) => { $field.iter().for_each(|buffer| $see(buffer, Access::Write)) };
    (@see terms $field:ident $see:ident) => { $field.iter().for_each(|(_, buffer)| $see(buffer, Access::Read)) };
    (@see products $field:ident $see:ident) => { $field.iter().for_each(|p| $see(p.y, Access::Write)) };
    (@see $kind:ident $field:ident $see:ident) => {};

    (@weight matrix $field:ident) => { Some(*$field) };
    (@weight terms $field:ident) => { $field.first().map(|(w, _)| *w) };
    (@weight products $field:ident) => { $field.first().map(|p| p.w) };
    (@weight $kind:ident $field:ident) => { None };

    (@hold read $field:ident $m:ident $n:ident) => { let $field = $m::lend_buffer($field); };
    (@hold write $field:ident $m:ident $n:ident) => { let $field = $m::lend_buffer_mut($field); };
    (@hold read_if $field:ident $m:ident $n:ident) => { let $field = $field.map($m::lend_buffer); };
    (@hold write_if $field:ident $m:ident $n:ident) => { let $field = $field.map($m::lend_buffer_mut); };
    (@hold matrix $field:ident $m:ident $n:ident) => { let $field = $m::lend_matrix($field); };
    (@hold cache $field:ident $m:ident $n:ident) => { let $field = $m::lend_cache($field); };
    (@hold cache_mut $field:ident $m:ident $n:ident) => { let $field = $m::lend_cache_mut($field); };
    (@hold codes_mut $field:ident $m:ident $n:ident) => { let $field = $m::lend_codes_mut($field); };
    (@hold terms $field:ident $m:ident $n:ident) => {
        let terms: Vec<_> = $field.iter().map(|(w, dy)| ($m::lend_matrix(w), $m::lend_buffer(dy))).collect();
        let $field = &terms[..];
    };
    (@hold products $field:ident $m:ident $n:ident) => {
        let mut products: Vec<Product<'_, $n>> = $field.iter_mut().map(Product::lend::<$n>).collect();
        let $field = &mut products[..];
    };
    (@hold value $field:ident $m:ident $n:ident) => {};
}

calls! {
    /// `y[t, :] = table[ids[t], :]`.
    Embed { table: matrix, ids: value(&'a [u32]), y: write, }
    /// `y[t, :] = x[rows[t], :]`; `y` is `[rows.len(), C]`.
    GatherRows { x: read, rows: value(&'a [u32]), y: write, }
    /// `y[rows[t], :] += x[t, :]`; a row that is there several times takes each, in their order.
    ScatterAddRows { x: read, rows: value(&'a [u32]), y: write, }

    /// `y[T, O] = x[T, K] Wᵀ`, added to `y` if `accumulate`.
    Matmul { arithmetic: value(Arithmetic), w: matrix, x: read, y: write, accumulate: value(bool), }
    /// `y[T, O] = x[T, K] Wᵀ + ` the low-rank terms, for each of `products`: a layer that multiplies the same `x` by several
    /// weights says so at once, so that a device reads `x` once and starts its threads once. Fails if memory is short.
    MatmulGroup { arithmetic: value(Arithmetic), x: read, products: products, }
    /// `dx[T, K] = ` the sum of `dy[T, O] W` over `terms` of `(W, dy)`, added to `dx` if `accumulate`: what a weight and the
    /// way down of its adapter pass on, for which a device touches `dx` once. [`Arithmetic::Int8`] is too coarse for
    /// gradients and taken as exact.
    MatmulVjpX { arithmetic: value(Arithmetic), terms: terms, dx: write, accumulate: value(bool), }
    /// `dw[O, K] += dy[T, O]ᵀ x[T, K]`.
    MatmulVjpW { tokens: value(usize), dy: read, x: read, dw: write, }

    /// `y[t, :] += bias`.
    AddBias { bias: read, y: write, }
    /// `y = a + b`.
    Add { a: read, b: read, y: write, }
    /// `y += x`.
    AddAssign { x: read, y: write, }
    /// `x *= factor`.
    Scale { factor: value(f32), x: write, }
    /// `y = x / (1 - p)` with elements dropped to zero with probability `p`; which ones is a function of `key` and the
    /// element's index alone, counted from `first` for the first of `x`.
    Dropout { p: value(f32), key: value(u64), first: value(u64), x: read, y: write, }
    /// `y = x`.
    Copy { x: read, y: write, }
    /// Packs rows of `width` in 16 bits, each with a power of two as its unit, so that none overflows. `y` has
    /// [`crate::narrow_width`] values for each row.
    Narrow { width: value(usize), x: read, y: write, }
    /// What [`Call::Narrow`] packed, rounded to 11 bits of mantissa.
    Widen { width: value(usize), x: read, y: write, }
    /// Sets all of `x` to zero.
    Zero { x: write, }

    /// `y = x / sqrt(mean(x²) + eps) * w` for each row of `width` values (Zhang & Sennrich 2019). `w` is `[width]`, or that of
    /// several rows one after the other, its values one less than the factors if `plus_one`; without it nothing is
    /// multiplied. With the width of a head it is the norm of each head. The L2 norm `x / sqrt(sum(x²) + e)` is that with
    /// `eps = e / width`, divided by `sqrt(width)`.
    RmsNorm { width: value(usize), w: read_if, plus_one: value(bool), eps: value(f32), x: read, y: write, }
    /// `dx += ` the gradient of [`Call::RmsNorm`] by `x`; `w` is frozen.
    RmsNormVjpX {
        width: value(usize), w: read_if, plus_one: value(bool), eps: value(f32), x: read, dy: read, dx: write,
    }

    /// `y = (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) * w + b` for each row as wide as `w` (Ba et al. 2016);
    /// without `b` nothing is added.
    LayerNorm { w: read, b: read_if, eps: value(f32), x: read, y: write, }
    /// `dx += ` the gradient of [`Call::LayerNorm`] by `x`; `w` and `b` are frozen.
    LayerNormVjpX { w: read, eps: value(f32), x: read, dy: read, dx: write, }

    /// Rotates the first `2 R` elements of each head (`D` = `head_dim`) of `x` `[T, heads * D]` by the angles whose `cos`
    /// and `sin` are `[T, R]`, pairing element `i` with `i + R` as most Hugging Face checkpoints do (Su et al. 2021); the others
    /// are copied. With `pairs`, `2 i` is paired with `2 i + 1`. `inverse` turns back, which is also the gradient.
    Rope {
        heads: value(usize), head_dim: value(usize), cos: read, sin: read, x: read, inverse: value(bool),
        pairs: value(bool), y: write,
    }

    /// `y = act(gate) * up` (Shazeer 2020).
    Gate { activation: value(Activation), gate: read, up: read, y: write, }
    /// Gradients of [`Call::Gate`].
    GateVjp { activation: value(Activation), gate: read, up: read, dy: read, dgate: write, dup: write, }
    /// As [`Call::GateVjp`], with the gradients in the place of what they belong to.
    GateVjpInPlace { activation: value(Activation), dy: read, gate: write, up: write, }

    /// Causal attention inside each of `segments` (lengths that sum to `T`); no token sees another segment. `q`, `y` are
    /// `[T, H * D]`, `k`, `v` `[T, G * D]`; `lse` `[T, H]` receives the log-sum-exp of the scaled scores, which is all that
    /// backward needs besides `y` (Dao et al. 2022). With `sinks` `[H]`, one more score of each head joins the softmax, and what
    /// it gets goes nowhere (Xiao et al. 2023).
    Attention {
        spec: value(&'a Attention), segments: value(&'a [usize]), q: read, k: read, v: read, sinks: read_if, y: write,
        lse: write,
    }
    /// Gradients of [`Call::Attention`]: recomputes scores block by block.
    AttentionVjp {
        spec: value(&'a Attention), segments: value(&'a [usize]), q: read, k: read, v: read, y: read, lse: read, dy: read,
        dq: write, dk: write, dv: write,
    }
    /// Appends the rows `rows` of `k` and `v`. Fails if memory is short; the cache is unchanged then.
    CacheAppend { cache: cache_mut, k: read, v: read, rows: value(Range<usize>), }
    /// Causal attention of as many last cached tokens as there are `rows`: those of `q` `[T, H * D]` are their queries, those
    /// of `y` are written. Other rows, which belong to other sequences of a batch, stay as they are.
    AttentionCached {
        spec: value(&'a Attention), q: read, cache: cache, sinks: read_if, y: write, rows: value(Range<usize>),
    }

    /// `y = f(x)` for each element.
    Map { kind: value(Map), x: read, y: write, }
    /// Gradient of [`Call::Map`].
    MapVjp { kind: value(Map), x: read, dy: read, dx: write, }
    /// `y = a b`, element by element. `da = b dy` and `db = a dy` are calls of the same kind.
    Multiply { a: read, b: read, y: write, }
    /// `y[t, :] = factors[t] x[t, :]`. The gradient by `x` is of the same kind, that by the factors is [`Call::DotRows`] of `x`
    /// and `dy`.
    ScaleRows { factors: read, x: read, y: write, }
    /// `y[t] = a[t, :] . b[t, :]`.
    DotRows { a: read, b: read, y: write, }
    /// `y[t, c] = factors[c] x[t, c]`. The gradient by `x` is of the same kind, that by the factors is [`Call::SumColumns`] of
    /// `x` and `dy`.
    ScaleColumns { factors: read, x: read, y: write, }
    /// `y[c] += sum_t a[t, c] b[t, c]`, without `b` the sum of `a` alone.
    SumColumns { a: read, b: read_if, y: write, }
    /// `y[t, y_at.first + i] = x[t, x_at.first + i]` for `i < width`, added to it if `accumulate`. Other columns of `y` stay as
    /// they are. With the width of a head in [`Columns::of`], `t` counts heads: that takes a part of each.
    CopyColumns {
        width: value(usize), x: read, x_at: value(Columns), y: write, y_at: value(Columns), accumulate: value(bool),
    }

    /// `y[t, g, o, s] = sum_k w[g, o, k] x[t, g, k, s]` for each block `g` of columns, see [`Blocks`]; where `w` has fewer
    /// matrices than there are blocks, it repeats. With `transposed` the sum is over `o`, which is the gradient by `x`.
    BlockProduct { spec: value(Blocks), transposed: value(bool), w: read, x: read, y: write, }
    /// `dw[g, o, k] += sum_t,s dy[t, g, o, s] x[t, g, k, s]`, for the blocks that share a matrix together.
    BlockProductVjpW { spec: value(Blocks), dy: read, x: read, dw: write, }
    /// `y[t, rows[n]] += w[n] x[t, cols[n]]`; with `rows` and `cols` exchanged it is the gradient by `x`. All of them are
    /// columns that there are.
    SparseProduct {
        rows: value(&'a [u32]), cols: value(&'a [u32]), tokens: value(usize), w: read, x: read, y: write,
    }
    /// `dw[n] += sum_t dy[t, rows[n]] x[t, cols[n]]`.
    SparseProductVjpW {
        rows: value(&'a [u32]), cols: value(&'a [u32]), tokens: value(usize), dy: read, x: read, dw: write,
    }

    /// Causal convolution of each channel over the tokens of each of `segments` (lengths that sum to `T`), with `P` taps:
    /// `y[t, c] = bias[c] + sum_j w[c, j] x[t - (P - 1) + j, c]`, where `x` is zero before its segment. `w` is `[C, P]`.
    Conv { w: read, bias: read_if, segments: value(&'a [usize]), x: read, y: write, }
    /// Gradient of [`Call::Conv`] by `x`; `w` is frozen.
    ConvVjpX { w: read, segments: value(&'a [usize]), dy: read, dx: write, }
    /// As [`Call::Conv`] for the rows `rows` of `x` alone, which go on from `state`, the `P - 1` inputs before them (zeros
    /// before the first token). Then it holds their last ones. Other rows of `y` stay as they are.
    ConvFrom { w: read, bias: read_if, state: write, x: read, y: write, rows: value(Range<usize>), }

    /// `g = -e^rate softplus(a + bias)`, the logarithm of how much of a state is kept (Yang et al. 2024): `a` and `g` are
    /// `[T, H]`, `rate` and `bias` `[H]`.
    Decay { rate: read, bias: read, a: read, g: write, }
    /// Gradient of [`Call::Decay`] by `a`; `rate` and `bias` are frozen.
    DecayVjp { rate: read, bias: read, a: read, dg: read, da: write, }
    /// Gated delta rule (Yang et al. 2024) inside each of `segments` (lengths that sum to `T`). Each head of values has a
    /// state `S` `[K, V]`, which begins with zeros; for each token `S' = e^g S`, `S = S' + k (beta (v - S'ᵀ k))ᵀ`, `y = Sᵀ q`.
    /// `q`, `k` are `[T, key_heads * K]`, `v`, `y` `[T, value_heads * V]`, `g`, `beta` `[T, value_heads]`.
    DeltaRule {
        spec: value(&'a DeltaRule), segments: value(&'a [usize]), q: read, k: read, v: read, g: read, beta: read, y: write,
    }
    /// Gradients of [`Call::DeltaRule`]: computes states again, those of a few tokens at a time.
    DeltaRuleVjp {
        spec: value(&'a DeltaRule), segments: value(&'a [usize]), q: read, k: read, v: read, g: read, beta: read, dy: read,
        dq: write, dk: write, dv: write, dg: write, dbeta: write,
    }
    /// As [`Call::DeltaRule`] for the tokens `rows` alone, which go on from `state`, [`DeltaRule::state_len`] values; it becomes
    /// the state after them. Other rows of `y` stay as they are.
    DeltaRuleFrom {
        spec: value(&'a DeltaRule), q: read, k: read, v: read, g: read, beta: read, state: write, y: write,
        rows: value(Range<usize>),
    }

    /// State space of Mamba 2 (Dao & Gu 2024) inside each of `segments` (lengths that sum to `T`). Each head has a state `S`
    /// `[N, P]`, which begins with zeros; for each token, with `d = softplus(dt + bias)` held between limits,
    /// `S = e^(-e^rate d) S + b (d x)ᵀ`, `y = Sᵀ c + skip x`. `rate`, `bias`, `skip` are `[H]`, `x`, `y` `[T, H * P]`, `b`, `c`
    /// `[T, G * N]`, `dt` `[T, H]`.
    StateSpace {
        spec: value(&'a StateSpace), segments: value(&'a [usize]), rate: read, bias: read, skip: read, x: read, b: read,
        c: read, dt: read, y: write,
    }
    /// Gradients of [`Call::StateSpace`] by what belongs to tokens; `rate`, `bias` and `skip` are frozen.
    StateSpaceVjp {
        spec: value(&'a StateSpace), segments: value(&'a [usize]), rate: read, bias: read, skip: read, x: read, b: read,
        c: read, dt: read, dy: read, dx: write, db: write, dc: write, ddt: write,
    }
    /// As [`Call::StateSpace`] for the tokens `rows` alone, which go on from `state`, [`StateSpace::state_len`] values; it
    /// becomes the state after them. Other rows of `y` stay as they are.
    StateSpaceFrom {
        spec: value(&'a StateSpace), rate: read, bias: read, skip: read, x: read, b: read, c: read, dt: read, state: write,
        y: write, rows: value(Range<usize>),
    }

    /// Chooses the `k` largest of each row of `x` `[T, E]`, of equals the first: `chosen` `[T, k]` are their numbers, the
    /// largest first.
    TopK { k: value(usize), x: read, chosen: write, }
    /// How much each chosen expert counts (Shazeer et al. 2017): `weights` `[T, top_k]` are the probabilities of `chosen`
    /// under the softmax of all `logits` `[T, E]`, or their [`Scores::Sigmoid`], divided by their sum if `normalize`; to a sum
    /// of sigmoids `1e-6` is added.
    Route {
        top_k: value(usize), scores: value(Scores), normalize: value(bool), logits: read, chosen: read, weights: write,
    }
    /// Gradient of [`Call::Route`]'s weights by the logits, with the choice as it was.
    RouteVjp {
        top_k: value(usize), scores: value(Scores), normalize: value(bool), logits: read, chosen: read, dweights: read,
        dlogits: write,
    }

    /// For each row of `logits` `[N, V]`: `losses[n] = -log softmax(logits[n])[targets[n]]` (natural log), or the divergence
    /// from a distribution, see [`Targets`]; then the row becomes the gradient of `weights[n] * losses[n]`.
    CrossEntropy { targets: value(Targets<'a>), weights: value(&'a [f32]), logits: write, losses: write, }
    /// Cross-entropy of a linear head, without its logits in memory: with `l = x Wᵀ` of `x` `[N, C]` and `w` `[V, C]`,
    /// `losses[n] = -log softmax(l[n])[targets[n]]` (natural log) or as in [`Targets`], and `dx` `[N, C]`, where there is one,
    /// becomes the gradient of `sum(weights[n] * losses[n])` by `x`. [`Arithmetic::Int8`] is too coarse for it and taken as exact.
    ///
    /// As in blockwise attention, a device may walk the vocabulary with a running maximum `m` and sum `Z` of each row and
    /// add up `sum_v e^(l_v - m) W_v` (Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models"). Fails if
    /// memory is short.
    LinearCrossEntropy {
        arithmetic: value(Arithmetic), w: matrix, targets: value(Targets<'a>), weights: value(&'a [f32]), x: read,
        losses: write, dx: write_if,
    }

    /// Adds the sum of `x` to number `at` of `y`, in f64 and in the order of elements. Numbers in f64 lie in a buffer as
    /// two values each: see [`crate::doubles`].
    Sum { x: read, at: value(usize), y: write, }
    /// Adds the sum of squares of `x` to number `at` of `y`, as [`Call::Sum`] does, in an order that does not depend on the
    /// number of threads.
    SumSquares { x: read, at: value(usize), y: write, }

    /// One AdamW step on `param` with first and second moments `m` and `v`.
    AdamW { step: value(&'a AdamW), grad: read, param: write, m: write, v: write, }
    /// As [`Call::AdamW`] with moments in 8 bits, `m` signed and `v` unsigned.
    AdamW8 { step: value(&'a AdamW), grad: read, param: write, m: codes_mut, v: codes_mut, }
    /// One step of SGD on `param`, with a moment `m` that starts at zero, or without one.
    Sgd { step: value(&'a Sgd), grad: read, param: write, m: write_if, }
    /// One Lion step on `param` with moment `m`.
    Lion { step: value(&'a Lion), grad: read, param: write, m: write, }
}

impl<M: Memory + ?Sized> LowRank<'_, M> {
    /// Its rows where there are `tokens` of them.
    pub(crate) fn rows_of(&self, tokens: usize) -> Range<usize> {
        self.rows.start..self.rows.end.min(tokens)
    }
}

impl<M: Memory + ?Sized> Product<'_, M> {
    fn lend<'b, N: Memory>(&'b mut self) -> Product<'b, N>
    where
        M: Lends<N>,
    {
        let low_rank = self.low_rank.iter().map(|LowRank { a, b, scale, rows }| LowRank {
            a: M::lend_matrix(a),
            b: M::lend_matrix(b),
            scale: *scale,
            rows: rows.clone(),
        });
        Product { w: M::lend_matrix(self.w), low_rank: low_rank.collect(), y: M::lend_buffer_mut(self.y) }
    }
}

impl<M: Memory + ?Sized> Call<'_, M> {
    /// `[O, K]` of the weight, of the first one of several, or of the gradient by a weight.
    #[must_use]
    pub fn shape(&self, memory: &M) -> Option<(usize, usize)> {
        if let Call::MatmulVjpW { tokens, dy, x, .. } = self {
            let width = |buffer| memory.len(buffer).checked_div(*tokens).unwrap_or(0);
            return Some((width(dy), width(x)));
        }
        self.weight().map(|w| memory.shape(w))
    }
}
