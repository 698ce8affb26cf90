//! Handles that C holds. They look like pointers and are numbers: nothing is ever read through them. So a handle that is
//! null, was freed, is of another kind or is no handle at all is refused by name, and never followed.
//!
//! The tables of what is open are the library's only state beside its handles. They begin empty, without an initializer.

use crate::error::{Error, ErrorCode, Result};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// Numbers of handles, each given out once: far apart from what counts or stray small numbers are, and from each other.
static NEXT: AtomicUsize = AtomicUsize::new(0x5_1000);
const APART: usize = 0x30;

/// What is open of one kind.
pub(super) struct Table<T>(Mutex<BTreeMap<usize, Arc<T>>>);

impl<T> Table<T> {
    pub const fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    fn open(&self) -> MutexGuard<'_, BTreeMap<usize, Arc<T>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What C can hold a handle of.
pub(super) trait Held: Send + Sync + Sized + 'static {
    /// How messages call it.
    const NAME: &'static str;

    /// All that are open.
    fn table() -> &'static Table<Self>;

    /// A handle of it, valid until [`free`].
    fn hold(self) -> *mut Self {
        let number = NEXT.fetch_add(APART, Ordering::Relaxed);
        Self::table().open().insert(number, Arc::new(self));
        std::ptr::without_provenance_mut(number)
    }

    /// What `handle` is of. It stays for as long as the caller works on it, also if it is freed meanwhile.
    ///
    /// # Errors
    /// It is no handle of this kind, or was freed.
    fn of(handle: *const Self) -> Result<Arc<Self>> {
        Self::table().open().get(&handle.addr()).cloned().ok_or_else(|| {
            let got = if handle.is_null() { "null" } else { "one that was freed, or is of another kind" };
            let message =
                format!("expected the handle of an open {}, got {got}; use each until it is freed", Self::NAME);
            Error::new(ErrorCode::Handle, format!("handle of a {}", Self::NAME), message)
        })
    }
}

/// Takes it from the table, if it is there; it goes when nobody works on it any more.
pub(super) fn free<T: Held>(handle: *mut T) {
    let gone = T::table().open().remove(&handle.addr());
    // Not under the lock: it may be long work, and hold others.
    drop(gone);
}

/// Makes a type one of which C holds handles.
macro_rules! held {
    ($type:ty, $name:literal) => {
        impl $crate::ffi::handle::Held for $type {
            const NAME: &'static str = $name;

            fn table() -> &'static $crate::ffi::handle::Table<Self> {
                static TABLE: $crate::ffi::handle::Table<$type> = $crate::ffi::handle::Table::new();
                &TABLE
            }
        }
    };
}
pub(super) use held;

/// The one caller at a time of what `mutex` holds, a `name`.
///
/// # Errors
/// Another call works on it; a call before ended in a panic.
pub(super) fn only<'m, T>(mutex: &'m Mutex<T>, name: &str) -> Result<MutexGuard<'m, T>> {
    mutex.try_lock().map_err(|e| match e {
        TryLockError::WouldBlock => {
            let message = format!(
                "expected a {name} that is not at work, got one that another call works on, or this call's own callback \
                 asked; wait until it has returned"
            );
            Error::new(ErrorCode::Busy, name, message)
        }
        TryLockError::Poisoned(_) => {
            let message =
                format!("expected a whole {name}, got one that a bug broke in an earlier call; free it, and make a new one");
            Error::new(ErrorCode::Internal, name, message)
        }
    })
}
