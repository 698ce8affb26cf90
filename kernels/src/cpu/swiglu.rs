//! The gated activation of Llama-like models (Shazeer 2020): `y = silu(gate) * up`, element by element, with
//! `silu(g) = g s` and `s = 1 / (1 + e^-g)`. Backward computes `s` again.

use super::Cpu;
use super::lanes::{LANES, load, store, update};
use super::split::{parts, parts2};
use super::table::Table;
use wide::f32x8;

/// Elements whose exponentials wait in first-level cache.
const BLOCK: usize = 1024;

/// `y` from `gate` and `up`, all of one length.
pub(crate) fn forward(cpu: &Cpu, gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert!(gate.len() == y.len() && up.len() == y.len());
    parts(&cpu.team, y, 1, |start, y| {
        for (i, y) in y.chunks_mut(BLOCK).enumerate() {
            let (at, n) = (start + i * BLOCK, y.len());
            let (gate, up) = (&gate[at..][..n], &up[at..][..n]);
            sigmoid(cpu.table, gate, y);
            update(y, [gate, up], |s, [g, u]| g * s * u);
        }
    });
}

/// `dup = dy g s`, `dgate = dy up s (1 + g (1 - s))`.
pub(crate) fn vjp(cpu: &Cpu, gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    assert!(gate.len() == dup.len() && up.len() == dup.len() && dy.len() == dup.len());
    parts2(&cpu.team, dgate, dup, |start, dgate, dup| {
        for (i, (dgate, dup)) in dgate.chunks_mut(BLOCK).zip(dup.chunks_mut(BLOCK)).enumerate() {
            let (at, n) = (start + i * BLOCK, dup.len());
            let (gate, up, dy) = (&gate[at..][..n], &up[at..][..n], &dy[at..][..n]);
            sigmoid(cpu.table, gate, dup);
            for i in (0..n).step_by(LANES) {
                let (g, u, dy, s) = (load(&gate[i..]), load(&up[i..]), load(&dy[i..]), load(&dup[i..]));
                store(&mut dup[i..], dy * g * s);
                store(&mut dgate[i..], dy * u * s * (f32x8::ONE + g * (f32x8::ONE - s)));
            }
        }
    });
}

/// `s = 1 / (1 + e^-x)`.
fn sigmoid(table: &Table, x: &[f32], s: &mut [f32]) {
    s.copy_from_slice(x);
    table.exp(-1.0, 0.0, s);
    update(s, [], |e, []| f32x8::ONE / (f32x8::ONE + e));
}
