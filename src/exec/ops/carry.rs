//! Values that later layers read beside their input, such as keys that they share with an earlier one.
//!
//! A pass keeps them: a layer that is run again for its gradient finds them as they were. Their gradients add up there
//! while later layers go backward, and are complete when the operation that made them does.

use super::Interpreter;
use crate::base::Pool;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call, Columns};
use pocketlora_models::Value;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a pass keeps of them, by the numbers that the family gave them.
pub(in crate::exec) struct Carried<B: Backend>(Mutex<BTreeMap<u16, Kept<B>>>);

struct Kept<B: Backend> {
    data: B::Buffer,
    grad: Option<B::Buffer>,
    width: usize,
}

impl<B: Backend> Default for Carried<B> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<B: Backend> Carried<B> {
    fn all(&self) -> MutexGuard<'_, BTreeMap<u16, Kept<B>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether later layers left a gradient for what comes before the first one.
    pub fn has_gradient(&self) -> bool {
        self.all().values().any(|kept| kept.grad.is_some())
    }

    /// Hands the buffers back.
    pub fn finish(self, backend: &B, pool: &mut Pool<B>) {
        let all = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        for kept in all.into_values() {
            [Some(kept.data), kept.grad].into_iter().flatten().for_each(|buffer| pool.put(backend, buffer));
        }
    }
}

/// `y = x`, and later layers find it under the number `slot`.
pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, slot: u16, x: Value, y: Value) -> Result<()> {
    let (pass, backend) = (it.pass, it.backend());
    let mut out = it.buffer(it.len(y))?;
    // y = x
    backend.run(Call::Copy { x: it.data(x), y: &mut out })?;
    // A layer that is run again has carried it before.
    let known = pass.carried.all().contains_key(&slot);
    if !known {
        let mut data = it.buffer(it.len(x))?;
        backend.run(Call::Copy { x: it.data(x), y: &mut data })?;
        let width = it.slots[x.0 as usize].width;
        pass.carried.all().insert(slot, Kept { data, grad: None, width });
    }
    it.set(y, out);
    Ok(())
}

/// `dy` is the gradient by what its own layer makes of `y`, if that is anything.
pub(super) fn back<B: Backend>(it: &mut Interpreter<'_, B>, slot: u16, x: Value, dy: Option<B::Buffer>) -> Result<()> {
    let later = it.pass.carried.all().get_mut(&slot).and_then(|kept| kept.grad.take());
    // y = x, here and in later layers
    for part in [dy, later].into_iter().flatten() {
        it.add_grad(x, part)?;
    }
    Ok(())
}

/// `y` is the elements `part` of each row of what an earlier layer carries under `slot`.
pub(super) fn run_read<B: Backend>(
    it: &mut Interpreter<'_, B>,
    slot: u16,
    part: &Range<usize>,
    y: Value,
) -> Result<()> {
    let (pass, backend) = (it.pass, it.backend());
    let mut out = it.buffer(it.len(y))?;
    {
        let all = pass.carried.all();
        let kept = &all[&slot];
        let (x_at, y_at) = places(kept.width, part);
        // y = x[.., part]
        backend.run(Call::CopyColumns {
            width: part.len(),
            x: &kept.data,
            x_at,
            y: &mut out,
            y_at,
            accumulate: false,
        })?;
    }
    it.set(y, out);
    Ok(())
}

pub(super) fn back_read<B: Backend>(
    it: &mut Interpreter<'_, B>,
    slot: u16,
    part: &Range<usize>,
    dy: B::Buffer,
) -> Result<()> {
    let (pass, backend) = (it.pass, it.backend());
    let (width, grad) = {
        let mut all = pass.carried.all();
        let kept = all.get_mut(&slot).expect("carried before it is read");
        (kept.width, kept.grad.take())
    };
    let mut grad = match grad {
        Some(grad) => grad,
        None => {
            let mut grad = it.buffer(width * it.rows.len())?;
            backend.run(Call::Zero { x: &mut grad })?;
            grad
        }
    };
    let (x_at, y_at) = places(width, part);
    // y = x[.., part], so dx[.., part] += dy
    backend.run(Call::CopyColumns {
        width: part.len(),
        x: &dy,
        x_at: y_at,
        y: &mut grad,
        y_at: x_at,
        accumulate: true,
    })?;
    it.put(dy);
    if let Some(kept) = pass.carried.all().get_mut(&slot) {
        kept.grad = Some(grad);
    }
    Ok(())
}

/// Where the part is in a row of what is carried, and in what is made of it.
fn places(width: usize, part: &Range<usize>) -> (Columns, Columns) {
    (Columns { of: width, first: part.start }, Columns { of: part.len(), first: 0 })
}
