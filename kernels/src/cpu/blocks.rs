//! Products with matrices of a structure that adapters have: a small one for each block of columns, and one of a few values.
//!
//! Blocks: `y[t, g, o, s] = sum_k w[g, o, k] x[t, g, k, s]` for each of `G` blocks, with `S` columns side by side that share
//! the matrix; where `w` has fewer matrices than there are blocks, it repeats. With one block and `S > 1` that is one half
//! of a Kronecker product. The gradient by `x` is the same with `w` transposed, that by `w` is a sum over tokens, `S` and
//! the blocks that share a matrix.
//!
//! Sparse: `y[t, rows[n]] += w[n] x[t, cols[n]]`. The gradient by `x` is the same with rows and columns exchanged.

use super::Cpu;
use super::elementwise::add_part;
use super::split::{chunks, parts};
use super::team::Team;
use crate::Blocks;

/// Values of a task of [`sparse_vjp_w`], and of one of [`vjp_w`] on one thread.
const VALUES: usize = 1024;

/// `y` of `x`, or with `transposed` what takes the place of the gradient by `x`.
pub(crate) fn product(cpu: &Cpu, spec: Blocks, transposed: bool, w: &[f32], x: &[f32], y: &mut [f32]) {
    let Blocks { count, shape: [out, input], inner } = spec;
    let [from, to] = if transposed { [out, input] } else { [input, out] };
    let (wide, high) = (count * from * inner, count * to * inner);
    if high == 0 || wide == 0 || y.is_empty() {
        return y.fill(0.0);
    }
    assert!(x.len() / wide * high == y.len() && x.len().is_multiple_of(wide) && w.len().is_multiple_of(out * input));
    let matrices = w.len() / (out * input);
    parts(&cpu.team, y, high, |at, y| {
        let xs = x[at / high * wide..].chunks_exact(wide);
        for (x, y) in xs.zip(y.chunks_exact_mut(high)) {
            let blocks = x.chunks_exact(from * inner).zip(y.chunks_exact_mut(to * inner));
            for (g, (x, y)) in blocks.enumerate() {
                let w = &w[g % matrices * out * input..][..out * input];
                if inner == 1 && !transposed {
                    for (w, y) in w.chunks_exact(input).zip(y) {
                        *y = cpu.table.light().dot(w, x);
                    }
                    continue;
                }
                y.fill(0.0);
                for (o, w) in w.chunks_exact(input).enumerate() {
                    if inner == 1 {
                        let x = x[o];
                        y.iter_mut().zip(w).for_each(|(y, w)| *y += w * x);
                        continue;
                    }
                    for (k, w) in w.iter().enumerate() {
                        let (i, j) = if transposed { (o, k) } else { (k, o) };
                        let x = &x[i * inner..][..inner];
                        y[j * inner..][..inner].iter_mut().zip(x).for_each(|(y, x)| *y += w * x);
                    }
                }
            }
        }
    });
}

/// Adds to `dw` what `dy` and `x` say.
pub(crate) fn vjp_w(cpu: &Cpu, spec: Blocks, dy: &[f32], x: &[f32], dw: &mut [f32]) {
    let Blocks { count, shape: [out, input], inner } = spec;
    let (wide, high) = (count * input * inner, count * out * inner);
    if wide == 0 || high == 0 {
        return;
    }
    assert!(x.len() / wide * high == dy.len() && dw.len().is_multiple_of(out * input));
    let (tokens, matrices) = (x.len() / wide, dw.len() / (out * input));
    // A task has one row of one matrix.
    chunks(&cpu.team, dw, input, tokens * wide * out < VALUES, |row, dw| {
        let (matrix, o) = (row / out, row % out);
        let mut sum = vec![0.0; input];
        for t in 0..tokens {
            sum.fill(0.0);
            for g in (matrix..count).step_by(matrices) {
                let dy = &dy[t * high + (g * out + o) * inner..][..inner];
                let x = &x[t * wide + g * input * inner..][..input * inner];
                match dy {
                    [dy] => sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += dy * x),
                    dy => {
                        for (sum, x) in sum.iter_mut().zip(x.chunks_exact(inner)) {
                            *sum += cpu.table.light().dot(dy, x);
                        }
                    }
                }
            }
            add_part(&sum, dw);
        }
    });
}

/// Adds the sparse product of `x` `[T, wide]` to `y` `[T, high]`.
pub(crate) fn sparse(team: &Team, (rows, cols): (&[u32], &[u32]), tokens: usize, w: &[f32], x: &[f32], y: &mut [f32]) {
    assert!(rows.len() == w.len() && cols.len() == w.len());
    let (wide, high) = (x.len() / tokens.max(1), y.len() / tokens.max(1));
    if wide == 0 || high == 0 {
        return;
    }
    parts(team, y, high, |at, y| {
        for (x, y) in x[at / high * wide..].chunks_exact(wide).zip(y.chunks_exact_mut(high)) {
            for ((row, col), w) in rows.iter().zip(cols).zip(w) {
                y[*row as usize] += w * x[*col as usize];
            }
        }
    });
}

/// Adds the gradient by `w`.
pub(crate) fn sparse_vjp_w(
    team: &Team,
    (rows, cols): (&[u32], &[u32]),
    tokens: usize,
    dy: &[f32],
    x: &[f32],
    dw: &mut [f32],
) {
    assert!(rows.len() == dw.len() && cols.len() == dw.len());
    let (wide, high) = (x.len() / tokens.max(1), dy.len() / tokens.max(1));
    chunks(team, dw, VALUES, false, |i, dw| {
        let places = rows[i * VALUES..].iter().zip(&cols[i * VALUES..]);
        for ((row, col), dw) in places.zip(dw) {
            let at = |t: usize| dy[t * high + *row as usize] * x[t * wide + *col as usize];
            *dw += (0..tokens).map(at).sum::<f32>();
        }
    });
}
