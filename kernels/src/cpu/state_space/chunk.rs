//! Some tokens at once, forward.

use super::super::light::Light;
use super::{CHUNK, FEW, Inputs};
use crate::StateSpace;
use std::ops::Range;

/// Some tokens that are done at once.
pub(super) struct Chunk<'a> {
    pub light: &'a Light,
    pub inputs: Inputs<'a>,
    /// The first of them.
    pub start: usize,
    pub tokens: usize,
}

/// What the tokens of a chunk do to the state of one head.
pub(super) struct Steps {
    /// `softplus(dt + bias)`, held between the limits.
    pub d: [f32; CHUNK],
    /// How `d` grows with `dt`.
    pub slope: [f32; CHUNK],
    /// Logarithm of what is left, after each token, of the state before the chunk.
    pub g: [f64; CHUNK],
}

impl Steps {
    /// The factor from the state before the chunk to that after token `t`.
    pub fn left(&self, t: usize) -> f32 {
        self.g[t].exp() as f32
    }

    /// The factor on what token `t` wrote, at the chunk's end.
    pub fn kept(&self, t: usize, tokens: usize) -> f32 {
        (self.g[tokens - 1] - self.g[t]).exp() as f32
    }

    /// The factor on `b xᵀ` of token `t` in the state after the chunk.
    pub fn written(&self, t: usize, tokens: usize) -> f32 {
        self.kept(t, tokens) * self.d[t]
    }
}

impl<'a> Chunk<'a> {
    /// Takes the states of `heads`, which share a group, past the chunk and writes its outputs. `scratch` holds
    /// [`super::floats`].
    pub fn forward(&self, heads: &Range<usize>, states: &mut [f32], y: &mut [&mut [f32]], scratch: &mut [f32]) {
        let StateSpace { head_dim, state_dim, .. } = *self.inputs.spec;
        let n = self.tokens;
        let ([b_columns, faded], rest) = cut(scratch, [state_dim * n; 2]);
        let ([products, weights], _) = cut(rest, [n * n; 2]);
        if n >= FEW {
            self.columns(|t| self.inputs.token(t, heads.start)[1], b_columns);
            self.products(heads.start, b_columns, products);
        }
        for (i, head) in heads.clone().enumerate() {
            let state = &mut states[i * state_dim * head_dim..][..state_dim * head_dim];
            let steps = self.steps(head);
            for (t, y) in y.iter_mut().enumerate() {
                let y = &mut y[i * head_dim..][..head_dim];
                let [x, b, c] = self.inputs.token(self.start + t, head);
                let skip = |y: &mut [f32]| y.iter_mut().zip(x).for_each(|(y, x)| *y += self.inputs.skip[head] * x);
                y.fill(0.0);
                if n < FEW {
                    skip(y);
                    let decay = if t == 0 { steps.g[0] } else { steps.g[t] - steps.g[t - 1] };
                    self.light.state_step(decay.exp() as f32, steps.d[t], [x, b, c], state, y);
                    continue;
                }
                // y = e^g S_0ᵀ c + skip x + sum_j (c . b_j) e^(g - g_j) d_j x_j
                self.light.add_rows(c, 1, state, head_dim, state_dim, y);
                let left = steps.left(t);
                y.iter_mut().for_each(|y| *y *= left);
                skip(y);
                let weights = &mut weights[..=t];
                self.light.state_pairs(&steps.g[..=t], &steps.d[..=t], &products[t * n..][..=t], weights);
                let (x, step) = self.x_from(0, head);
                self.light.add_rows(weights, 1, x, step, t + 1, y);
            }
            if n >= FEW {
                self.advance(&steps, head, b_columns, faded, state);
            }
        }
    }

    /// `d`, its slope and `g` of each token, for `head`.
    pub fn steps(&self, head: usize) -> Steps {
        let Inputs { spec, rate, bias, dt, .. } = self.inputs;
        let mut steps = Steps { d: [0.0; CHUNK], slope: [0.0; CHUNK], g: [0.0; CHUNK] };
        let (rate, mut g) = (f64::from(rate[head]).exp(), 0.0);
        for t in 0..self.tokens {
            let z = dt[(self.start + t) * spec.heads + head] + bias[head];
            // Beside a large `z` the logarithm is nothing, and `e^z` would overflow.
            let softplus = z.max(0.0) + (-z.abs()).exp().ln_1p();
            let inside = softplus >= spec.limits.0 && softplus <= spec.limits.1;
            steps.slope[t] = if inside || softplus.is_nan() { 1.0 / (1.0 + (-z).exp()) } else { 0.0 };
            // Not `clamp`, which would lose a NaN.
            let held = if softplus < spec.limits.0 { spec.limits.0 } else { softplus };
            steps.d[t] = if held > spec.limits.1 { spec.limits.1 } else { held };
            g -= rate * f64::from(steps.d[t]);
            steps.g[t] = g;
        }
        steps
    }

    /// Rows of the chunk's tokens as columns `[width, tokens]`.
    pub fn columns<'r>(&self, row: impl Fn(usize) -> &'r [f32], columns: &mut [f32]) {
        for t in 0..self.tokens {
            for (column, value) in columns.chunks_exact_mut(self.tokens).zip(row(self.start + t)) {
                column[t] = *value;
            }
        }
    }

    /// `c_i . b_j` of each token `i` and those up to it, `[tokens, tokens]`.
    pub fn products(&self, head: usize, b_columns: &[f32], products: &mut [f32]) {
        let n = self.tokens;
        for (t, row) in products.chunks_exact_mut(n).enumerate() {
            let [_, _, c] = self.inputs.token(self.start + t, head);
            row[..=t].fill(0.0);
            self.light.add_rows(c, 1, b_columns, n, c.len(), &mut row[..=t]);
        }
    }

    /// `x` of `head` from token `t` of the chunk on, and how far rows are apart.
    pub fn x_from(&self, t: usize, head: usize) -> (&'a [f32], usize) {
        let StateSpace { heads, head_dim, .. } = *self.inputs.spec;
        (&self.inputs.x[((self.start + t) * heads + head) * head_dim..], heads * head_dim)
    }

    /// Takes the state of `head` past the chunk; `faded` is scratch as large as `b_columns`.
    pub fn advance(&self, steps: &Steps, head: usize, b_columns: &[f32], faded: &mut [f32], state: &mut [f32]) {
        let (n, head_dim) = (self.tokens, self.inputs.spec.head_dim);
        // S = e^g_last S_0 + sum_j e^(g_last - g_j) d_j b_j x_jᵀ
        let mut written = [0.0; CHUNK];
        (0..n).for_each(|t| written[t] = steps.written(t, n));
        let left = steps.left(n - 1);
        let (x, step) = self.x_from(0, head);
        for ((b, faded), row) in
            b_columns.chunks_exact(n).zip(faded.chunks_exact_mut(n)).zip(state.chunks_exact_mut(head_dim))
        {
            for t in 0..n {
                faded[t] = b[t] * written[t];
            }
            row.iter_mut().for_each(|s| *s *= left);
            self.light.add_rows(faded, 1, x, step, n, row);
        }
    }
}

/// The beginning of `scratch` in parts of such lengths, and the rest.
pub(super) fn cut<const N: usize>(scratch: &mut [f32], lens: [usize; N]) -> ([&mut [f32]; N], &mut [f32]) {
    let mut rest = scratch;
    let parts = lens.map(|len| {
        let (part, later) = std::mem::take(&mut rest).split_at_mut(len);
        rest = later;
        part
    });
    (parts, rest)
}
