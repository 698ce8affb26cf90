//! For each head, `pieces` side by side: a piece of each head, one that all heads have, or zeros.

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call, Columns};
use pocketlora_models::{Piece, Value};

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, heads: usize, pieces: &[Piece], y: Value) -> Result<()> {
    let (backend, total) = (it.backend(), total(pieces));
    let mut out = it.buffer(it.len(y))?;
    if pieces.iter().any(|piece| piece.value.is_none()) {
        backend.run(Call::Zero { x: &mut out })?;
    }
    // y = [pieces[0], pieces[1], ..] of each head
    for (piece, value, places) in places(heads, total, pieces) {
        for y_at in places {
            let (x, x_at) = (it.data(value), own(piece));
            backend.run(Call::CopyColumns { width: piece.width, x, x_at, y: &mut out, y_at, accumulate: false })?;
        }
    }
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(
    it: &mut Interpreter<'_, B>,
    heads: usize,
    pieces: &[Piece],
    dy: B::Buffer,
) -> Result<()> {
    let (backend, total) = (it.backend(), total(pieces));
    for (piece, value, places) in places(heads, total, pieces) {
        if !it.needs(value) {
            continue;
        }
        let [mut dx] = it.like([value])?;
        // y = [.., piece, ..] of each head, so dx is that part of dy, or its sum over heads
        for (i, x_at) in places.into_iter().enumerate() {
            let (y_at, accumulate) = (own(piece), i > 0);
            backend.run(Call::CopyColumns { width: piece.width, x: &dy, x_at, y: &mut dx, y_at, accumulate })?;
        }
        it.add_grad(value, dx)?;
    }
    it.put(dy);
    Ok(())
}

/// Width of a head.
fn total(pieces: &[Piece]) -> usize {
    pieces.iter().map(|piece| piece.width).sum()
}

/// Where a piece lies in its own value, head by head.
fn own(piece: &Piece) -> Columns {
    Columns { of: piece.width, first: 0 }
}

/// The pieces that are values, with the places at which they lie in all heads: one of each head, or in rows as a whole.
fn places(heads: usize, total: usize, pieces: &[Piece]) -> Vec<(&Piece, Value, Vec<Columns>)> {
    let (mut first, mut all) = (0, Vec::new());
    for piece in pieces {
        if let Some(value) = piece.value {
            let places = match piece.shared {
                true => (0..heads).map(|head| Columns { of: heads * total, first: head * total + first }).collect(),
                false => vec![Columns { of: total, first }],
            };
            all.push((piece, value, places));
        }
        first += piece.width;
    }
    all
}
