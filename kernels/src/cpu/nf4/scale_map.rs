//! The map of 8-bit block scales, once for all weights that share it, as all of a model do: so it stays in the
//! first-level cache while their codes pass by.

use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A map and what kernels make of it.
pub(super) struct ScaleMap {
    pub values: Arc<[f32; 256]>,
    #[cfg(target_arch = "x86_64")]
    pub planes: Planes,
}

/// The first bytes of all values, then the second ones and so on: vectors of bytes look up one of each at a time.
#[cfg(target_arch = "x86_64")]
#[repr(align(64))]
pub(super) struct Planes(pub [[u8; 256]; 4]);

impl ScaleMap {
    /// The one in use that has these values, bit for bit, or a new one.
    pub fn of(values: &Arc<[f32; 256]>) -> Arc<Self> {
        static LAST: Mutex<Weak<ScaleMap>> = Mutex::new(Weak::new());
        let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = last.upgrade()
            && found.values.map(f32::to_bits) == values.map(f32::to_bits)
        {
            return found;
        }
        let map = Arc::new(Self {
            #[cfg(target_arch = "x86_64")]
            planes: Planes(std::array::from_fn(|byte| values.map(|value| value.to_le_bytes()[byte]))),
            values: values.clone(),
        });
        *last = Arc::downgrade(&map);
        map
    }
}
