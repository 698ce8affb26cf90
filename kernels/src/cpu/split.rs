//! How work is cut into tasks.
//!
//! Cuts depend on shapes alone, and an output element is computed by one task in a fixed order, so results
//! are the same bits whatever the number of threads. Outputs are split into `&mut` slices before the tasks
//! start, which is what keeps parallel writes free of unsafe code.

use super::buffer::LINE;
use super::team::Team;
use std::cell::Cell;
use std::sync::{Mutex, PoisonError};

/// Elements of a light op per task: some 10 us of work, a hundred times the cost of a task.
const LIGHT: usize = 16 * 1024;

/// Calls `work(start, part)` for consecutive parts of `y`, each a whole number of rows of `width`.
pub(crate) fn parts(team: &Team, y: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    let width = width.max(1);
    let part = (LIGHT / width).max(1) * width;
    chunks(team, y, part, false, |i, y| work(i * part, y));
}

/// Calls `work(i, chunk)` for the chunks of `y`; on this thread alone where `small`, or where there is only one.
pub(crate) fn chunks(team: &Team, y: &mut [f32], chunk: usize, small: bool, work: impl Fn(usize, &mut [f32]) + Sync) {
    if small || y.len() <= chunk {
        return y.chunks_mut(chunk).enumerate().for_each(|(i, y)| work(i, y));
    }
    run(team, y.chunks_mut(chunk).enumerate().collect(), false, |(i, y)| work(i, y));
}

/// As [`parts`] with two outputs of the same length.
pub(crate) fn parts2(team: &Team, a: &mut [f32], b: &mut [f32], work: impl Fn(usize, &mut [f32], &mut [f32]) + Sync) {
    assert_eq!(a.len(), b.len());
    if a.len() <= LIGHT {
        return work(0, a, b);
    }
    let pairs = a.chunks_mut(LIGHT).zip(b.chunks_mut(LIGHT)).enumerate().collect();
    run(team, pairs, false, |(i, (a, b))| work(i * LIGHT, a, b));
}

/// A rectangle of an output matrix: the place of its first element and a slice of every row.
pub(crate) struct Patch<'a> {
    pub row: usize,
    pub col: usize,
    pub rows: Vec<&'a mut [f32]>,
}

/// Cuts `y` of rows of `width` into patches of at most `rows` by `cols`, row band by row band.
pub(crate) fn patches(y: &mut [f32], width: usize, rows: usize, cols: usize) -> Vec<Patch<'_>> {
    let mut patches = Vec::new();
    for (band, y) in y.chunks_mut(rows * width).enumerate() {
        let first = patches.len();
        let height = y.len() / width;
        let starts = (0..width).step_by(cols);
        patches.extend(starts.map(|col| Patch { row: band * rows, col, rows: Vec::with_capacity(height) }));
        for row in y.chunks_mut(width) {
            for (patch, part) in patches[first..].iter_mut().zip(row.chunks_mut(cols)) {
                patch.rows.push(part);
            }
        }
    }
    patches
}

/// Runs `work` on every task, on this thread alone where `small` says that waking others would cost more.
pub(crate) fn run<T: Send>(team: &Team, tasks: Vec<T>, small: bool, work: impl Fn(T) + Sync) {
    if small || tasks.len() < 2 || team.active() < 2 {
        return tasks.into_iter().for_each(work);
    }
    // A lock that nobody contends for is how a task's data changes threads without unsafe code.
    let tasks: Vec<_> = tasks.into_iter().map(|task| Mutex::new(Some(task))).collect();
    team.run(tasks.len(), &|i| {
        if let Some(task) = tasks[i].lock().unwrap_or_else(PoisonError::into_inner).take() {
            work(task);
        }
    });
}

/// Makes a function that lends scratch which its thread keeps between tasks.
macro_rules! scratch {
    ($(#[$doc:meta])* $name:ident, $cell:ident, $element:ty) => {
        thread_local! {
            static $cell: Cell<Vec<$element>> = const { Cell::new(Vec::new()) };
        }

        $(#[$doc])*
        pub(crate) fn $name<R>(len: usize, work: impl FnOnce(&mut [$element]) -> R) -> R {
            // Taken out of its cell meanwhile: a nested call finds an empty one and is merely slower.
            let mut scratch = $cell.take();
            let spare = LINE / size_of::<$element>();
            if scratch.len() < len + spare {
                // Let go first, for what it held matters no more and its memory may do for the longer one.
                drop(scratch);
                scratch = vec![Default::default(); len + spare];
            }
            let start = scratch.as_ptr().align_offset(LINE).min(spare);
            let result = work(&mut scratch[start..start + len]);
            $cell.set(scratch);
            result
        }
    };
}

scratch!(
    /// Lends `work` a scratch array of floats; it holds anything at first.
    with_scratch, FLOATS, f32
);
scratch!(
    /// As [`with_scratch`], for panels in 8 bits.
    with_bytes, BYTES, u8
);
scratch!(
    /// As [`with_scratch`], for activations in bf16.
    with_rounded, ROUNDED, u16
);
scratch!(
    /// As [`with_scratch`], for panels in bf16.
    with_halves, HALVES, u16
);
