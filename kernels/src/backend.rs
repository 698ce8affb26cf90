//! A device that runs [`Call`]s.
//!
//! A backend may record work instead of doing it: only what reads memory back ([`Memory::read`] and the like) has to wait
//! for it. A device that is lost meanwhile says so there. What a call touches may be dropped before its recorded work is done.
//!
//! A backend keeps calls in their order where one needs another's result, gives the same bits for the same calls, and yields
//! exactly bitsandbytes' value for every 4-bit weight. It need not have a kernel for every call: [`Call::lend`] hands a call
//! on to another backend that can use the same memory.

use crate::cpu::Table;
use crate::{Call, Error, Memory};

/// Memory, and a device that computes with it.
pub trait Backend: Memory {
    /// Runs one call, or records it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] where the call says that it may fail. What it writes is unspecified then, but for a cache.
    fn run(&self, call: Call<'_, Self>) -> Result<(), Error>;

    /// Threads that calls run on.
    fn threads(&self) -> usize;

    /// The CPU kernels that calls run on, or those calls that the device has no kernel for: [`crate::Counted`] counts what
    /// they take.
    fn table(&self) -> &'static Table;
}
