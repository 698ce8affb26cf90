//! Causal depthwise convolution with a few taps, as LFM2 and Qwen3.5 have it beside attention.
//!
//! With `P` taps and weights `w` `[C, P]`, each channel by itself:
//! `y[t, c] = bias[c] + sum_j w[c, j] x[t - (P - 1) + j, c]`: the last tap meets the token itself. What lies before the
//! first token is zero or, where a text goes on, the state: its last `P - 1` inputs, `[P - 1, C]`.
//! Backward, with `w` frozen: `dx[t, c] = sum_j w[c, j] dy[t + (P - 1) - j, c]`. It needs nothing that forward computed.

use super::loops::multiply_add;
use super::split::chunks;
use super::{Cost, Cpu};
use std::ops::Range;

/// Rows of a task.
const ROWS: usize = 8;

/// Which row of another array a tap of a row meets.
type RowOf<'a> = dyn Fn(usize, usize) -> Option<&'a [f32]> + Sync + 'a;

/// `y[T, C]` from `x[T, C]`, each of `segments` (lengths that sum to `T`) by itself.
pub(crate) fn forward(cpu: &Cpu, w: &[f32], bias: Option<&[f32]>, segments: &[usize], x: &[f32], y: &mut [f32]) {
    let (channels, segment_of) = (channels(segments, x, y), segment_of(segments));
    let taps = taps(w, bias, channels);
    each_row(cpu, w, taps, bias, y, &|t, tap| {
        let at = (t + tap + 1).checked_sub(taps).filter(|at| *at >= segment_of[t].start);
        at.map(|at| &x[at * channels..][..channels])
    });
}

/// `dx[T, C]` from `dy[T, C]`.
pub(crate) fn vjp_x(cpu: &Cpu, w: &[f32], segments: &[usize], dy: &[f32], dx: &mut [f32]) {
    let (channels, segment_of) = (channels(segments, dy, dx), segment_of(segments));
    let taps = taps(w, None, channels);
    each_row(cpu, w, taps, None, dx, &|t, tap| {
        let at = Some(t + taps - 1 - tap).filter(|at| *at < segment_of[t].end);
        at.map(|at| &dy[at * channels..][..channels])
    });
}

/// [`forward`] of the rows `rows` of `x` and `y`, which go on after what `state` holds; then it holds their last inputs.
pub(crate) fn forward_from(
    cpu: &Cpu,
    w: &[f32],
    bias: Option<&[f32]>,
    state: &mut [f32],
    x: &[f32],
    y: &mut [f32],
    rows: Range<usize>,
) {
    let channels = w.len().saturating_sub(state.len());
    let taps = taps(w, bias, channels);
    assert!(x.len() == y.len() && state.len() == (taps - 1) * channels);
    let part = rows.start * channels..rows.end * channels;
    let (x, y) = (&x[part.clone()], &mut y[part]);
    let past = taps - 1;
    let before: &[f32] = state;
    each_row(cpu, w, taps, bias, y, &|t, tap| {
        let (from, at) = if t + tap < past { (before, t + tap) } else { (x, t + tap - past) };
        Some(&from[at * channels..][..channels])
    });
    let keep = past.saturating_sub(rows.len()) * channels;
    state.copy_within(state.len() - keep.., 0);
    let new = state.len() - keep;
    state[keep..].copy_from_slice(&x[x.len() - new..]);
}

/// `y[t, c] = bias[c] + sum_j w[c, j] row_of(t, j)[c]`, with zeros for a row that is not there.
fn each_row<'a>(cpu: &Cpu, w: &[f32], taps: usize, bias: Option<&[f32]>, y: &mut [f32], row_of: &RowOf<'a>) {
    let channels = w.len() / taps;
    if channels == 0 {
        return;
    }
    let zeros = vec![0.0; channels];
    chunks(&cpu.team, y, ROWS * channels, false, |i, y| {
        let mut inputs = Vec::with_capacity(taps);
        for (t, y) in (i * ROWS..).zip(y.chunks_exact_mut(channels)) {
            match bias {
                Some(bias) => y.copy_from_slice(bias),
                None => y.fill(0.0),
            }
            inputs.clear();
            inputs.extend((0..taps).map(|tap| row_of(t, tap).unwrap_or(&zeros)));
            cpu.table.light().conv(w, &inputs, y);
        }
    });
}

/// What these take for an input of so many values: a row of zeros, and the segment of each token.
pub(crate) fn cost(segments: &[usize], len: usize) -> Cost {
    let tokens: usize = segments.iter().sum();
    let channels = len / tokens.max(1);
    Cost { passing: channels * size_of::<f32>() + tokens * size_of::<Range<usize>>(), ..Cost::default() }
}

/// One row: `y[c] += sum_j w[c, j] xs[j][c]`.
#[inline(always)]
pub(super) fn row<const FMA: bool>(w: &[f32], xs: &[&[f32]], y: &mut [f32]) {
    match xs {
        [a, b, c] => row_of::<FMA, 3>(w, [a, b, c], y),
        [a, b, c, d] => row_of::<FMA, 4>(w, [a, b, c, d], y),
        _ => {
            assert!(w.len() == y.len() * xs.len() && xs.iter().all(|x| x.len() == y.len()));
            for (c, (w, y)) in w.chunks_exact(xs.len()).zip(y).enumerate() {
                *y = w.iter().zip(xs).fold(*y, |sum, (w, x)| multiply_add::<FMA>(*w, x[c], sum));
            }
        }
    }
}

/// With a number of taps that is known when this is compiled, channels become vectors.
#[inline(always)]
fn row_of<const FMA: bool, const TAPS: usize>(w: &[f32], xs: [&[f32]; TAPS], y: &mut [f32]) {
    let (w, rest) = w.as_chunks::<TAPS>();
    assert!(rest.is_empty() && w.len() == y.len());
    let (w, xs) = (&w[..y.len()], xs.map(|x| &x[..y.len()]));
    for c in 0..y.len() {
        let mut sum = y[c];
        for tap in 0..TAPS {
            sum = multiply_add::<FMA>(w[c][tap], xs[tap][c], sum);
        }
        y[c] = sum;
    }
}

/// The segment of each token.
fn segment_of(segments: &[usize]) -> Vec<Range<usize>> {
    let mut end = 0;
    let of_segment = |len: &usize| {
        let start = end;
        end += len;
        std::iter::repeat_n(start..end, *len)
    };
    segments.iter().flat_map(of_segment).collect()
}

fn channels(segments: &[usize], x: &[f32], y: &[f32]) -> usize {
    let tokens: usize = segments.iter().sum();
    assert!(x.len() == y.len() && x.len().is_multiple_of(tokens.max(1)));
    x.len() / tokens.max(1)
}

fn taps(w: &[f32], bias: Option<&[f32]>, channels: usize) -> usize {
    assert!(channels == 0 || w.len().is_multiple_of(channels) && !w.is_empty());
    assert!(bias.is_none_or(|bias| bias.len() == channels));
    (w.len() / channels.max(1)).max(1)
}
