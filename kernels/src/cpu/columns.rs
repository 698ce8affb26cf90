//! Some columns of an array, copied to some columns of another: what splits the output of a product that made several
//! things at once, and what joins their gradients again.

use super::elementwise::add_part;
use super::split::parts;
use super::team::Team;
use crate::Columns;

/// `y[t, y_at.first + i] = x[t, x_at.first + i]` for the first `width` of each, added to it if `accumulate`. Other columns
/// of `y` stay as they are.
pub(crate) fn copy(
    team: &Team,
    width: usize,
    x: &[f32],
    x_at: Columns,
    y: &mut [f32],
    y_at: Columns,
    accumulate: bool,
) {
    let rows = rows(width, x.len(), x_at);
    assert_eq!(rows, self::rows(width, y.len(), y_at));
    if rows == 0 {
        return;
    }
    parts(team, y, y_at.of, |at, y| {
        let x = x[at / y_at.of * x_at.of..].chunks_exact(x_at.of);
        for (x, y) in x.zip(y.chunks_exact_mut(y_at.of)) {
            let (x, y) = (&x[x_at.first..][..width], &mut y[y_at.first..][..width]);
            if accumulate {
                add_part(x, y);
            } else {
                y.copy_from_slice(x);
            }
        }
    });
}

fn rows(width: usize, len: usize, Columns { of, first }: Columns) -> usize {
    assert!(len.is_multiple_of(of.max(1)) && first + width <= of);
    len / of.max(1)
}
