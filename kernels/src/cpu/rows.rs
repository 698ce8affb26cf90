//! Rows picked by number: embeddings, and the tokens whose logits are wanted.

use super::Cpu;
use super::matrix::Matrix;
use super::split::parts;
use super::team::Team;

/// `y[t, :] = table[ids[t], :]`; panics on an id that the table lacks.
pub(crate) fn embed(cpu: &Cpu, table: &Matrix, ids: &[u32], y: &mut [f32]) {
    let (vocab, width) = table.shape();
    assert_eq!(y.len(), ids.len() * width);
    assert!(ids.iter().all(|id| (*id as usize) < vocab), "token id beyond the embedding's `{vocab}` rows");
    if width == 0 {
        return;
    }
    parts(&cpu.team, y, width, |at, y| {
        for (y, id) in y.chunks_exact_mut(width).zip(&ids[at / width..]) {
            table.decode(cpu.table, *id as usize, 0, width, y);
        }
    });
}

/// `y[t, :] = x[rows[t], :]`.
pub(crate) fn gather(team: &Team, x: &[f32], rows: &[u32], y: &mut [f32]) {
    let width = row_width(x, rows, y);
    if width == 0 {
        return;
    }
    parts(team, y, width, |at, y| {
        for (y, row) in y.chunks_exact_mut(width).zip(&rows[at / width..]) {
            y.copy_from_slice(&x[*row as usize * width..][..width]);
        }
    });
}

/// `y[rows[t], :] += x[t, :]`; on one thread, for the rows may come in any order.
pub(crate) fn scatter_add(x: &[f32], rows: &[u32], y: &mut [f32]) {
    let width = row_width(y, rows, x);
    if width == 0 {
        return;
    }
    for (x, row) in x.chunks_exact(width).zip(rows) {
        super::elementwise::add_part(x, &mut y[*row as usize * width..][..width]);
    }
}

/// Width of the rows of `all`, of which `picked` holds `rows.len()`.
fn row_width(all: &[f32], rows: &[u32], picked: &[f32]) -> usize {
    let width = picked.len().checked_div(rows.len()).unwrap_or(0);
    assert_eq!(picked.len(), rows.len() * width);
    assert!(width == 0 || all.len().is_multiple_of(width));
    width
}
