//! The gated activations of feed-forward layers (Shazeer 2020): `y = act(gate) * up`, element by element.
//!
//! Both are `act(g) = g s` with a logistic function `s = 1 / (1 + e^-z)`: SiLU has `z = g`; GELU in its tanh form
//! (Hendrycks & Gimpel 2016) has `z = 2 sqrt(2 / pi) (g + 0.044715 g³)`, as `(1 + tanh(z / 2)) / 2 = s`.
//! Then `act'(g) = s (1 + g z' (1 - s))`. Backward computes `s` again.

use super::Cpu;
use super::lanes::{LANES, load, store, update};
use super::split::{parts, parts2};
use super::table::Table;
use wide::f32x8;

/// Elements whose exponentials wait in first-level cache.
const BLOCK: usize = 1024;
/// `2 sqrt(2 / pi)`, and the cubic term's factor.
const GELU: (f32, f32) = (1.595_769_2, 0.044_715);

/// Which activation.
#[derive(Clone, Copy)]
pub(crate) enum Gate {
    Silu,
    Gelu,
}

/// `y` from `gate` and `up`, all of one length.
pub(crate) fn forward(cpu: &Cpu, kind: Gate, gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert!(gate.len() == y.len() && up.len() == y.len());
    parts(&cpu.team, y, 1, |start, y| {
        for (i, y) in y.chunks_mut(BLOCK).enumerate() {
            let (at, n) = (start + i * BLOCK, y.len());
            let (gate, up) = (&gate[at..][..n], &up[at..][..n]);
            logistic(cpu.table, kind, gate, y);
            update(y, [gate, up], |s, [g, u]| g * s * u);
        }
    });
}

/// `dup = dy act(gate)`, `dgate = dy up act'(gate)`.
pub(crate) fn vjp(cpu: &Cpu, kind: Gate, gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    assert!(gate.len() == dup.len() && up.len() == dup.len() && dy.len() == dup.len());
    parts2(&cpu.team, dgate, dup, |start, dgate, dup| {
        for (i, (dgate, dup)) in dgate.chunks_mut(BLOCK).zip(dup.chunks_mut(BLOCK)).enumerate() {
            let (at, n) = (start + i * BLOCK, dup.len());
            let (gate, up, dy) = (&gate[at..][..n], &up[at..][..n], &dy[at..][..n]);
            logistic(cpu.table, kind, gate, dup);
            for i in (0..n).step_by(LANES) {
                let (g, u, dy, s) = (load(&gate[i..]), load(&up[i..]), load(&dy[i..]), load(&dup[i..]));
                // g z'
                let slope = match kind {
                    Gate::Silu => g,
                    Gate::Gelu => g * f32x8::splat(GELU.0) * (f32x8::ONE + g * g * f32x8::splat(3.0 * GELU.1)),
                };
                store(&mut dup[i..], dy * g * s);
                store(&mut dgate[i..], dy * u * s * (f32x8::ONE + slope * (f32x8::ONE - s)));
            }
        }
    });
}

/// `s = 1 / (1 + e^-z)`.
fn logistic(table: &Table, kind: Gate, x: &[f32], s: &mut [f32]) {
    match kind {
        Gate::Silu => s.copy_from_slice(x),
        Gate::Gelu => {
            let (factor, cubic) = (f32x8::splat(GELU.0), f32x8::splat(GELU.1));
            super::lanes::map([x], s, |[g]| factor * g * (f32x8::ONE + cubic * g * g));
        }
    }
    table.exp(-1.0, 0.0, s);
    update(s, [], |e, []| f32x8::ONE / (f32x8::ONE + e));
}
