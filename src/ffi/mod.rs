//! The library for C, and for all that can call C: `pocketlora.h` (`ios/Sources/CPocketLora`) is made of this module.
//!
//! Each function checks what it is given, hands it to the engine, and gives back a code: no work is done here. What a call
//! takes and gives:
//!
//! - Handles are opaque. Each `_free` function takes null, and a handle that was freed already, and does nothing then.
//! - Texts are UTF-8 with a length. Those that go in are read before the call returns. Those that come out live as long as
//!   the handle that they were asked of.
//! - Structs begin with their size in bytes. An app that was built with an older header works on a newer library, which
//!   takes what the app does not know as not set; a newer app's settings that this library does not know are refused.
//! - Codes: 0 is success, all others are those of `pl_code`. `error`, where it is not null, is set to null by success, and
//!   to a new error by failure, which the caller frees.
//! - Threads: every function may be called from any thread, and works on its own thread until it returns. A chat or trainer
//!   works for one call at a time; a second one is refused as busy. Engines serve any number of calls.
//! - Values out of range are refused as `PL_CODE_CONFIG`, and the message tells the range. What may be null says so.
//! - Stopping: chats and vectors by a `pl_cancel`, runs by `pl_trainer_order`, and work on files by its listener's answer.
//! - Callbacks are called on the thread of the call that they were given to, and must not throw or jump through it.

#![allow(unsafe_code, reason = "one of the six places where unsafe lives")]

mod handle;
mod sized;

// In the order of the header.
mod work;

mod engine;

mod adapters;

mod seal;

mod chat;

mod train;

use crate::error::{Error, ErrorCode, Result};
use handle::{Held, held};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

/// Raised when an app that was built for an older library could no longer work on a newer one.
pub const ABI: u32 = 1;

/// Text or bytes that somebody else owns.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Str {
    /// The first byte; may be null where there are none.
    pub data: *const u8,
    /// How many bytes; no zero byte ends them.
    pub len: usize,
}

impl Str {
    const NONE: Self = Self { data: std::ptr::null(), len: 0 };

    /// Text that lives as long as what `text` is borrowed from.
    fn of(text: &str) -> Self {
        Self::of_bytes(text.as_bytes())
    }

    fn of_bytes(bytes: &[u8]) -> Self {
        Self { data: bytes.as_ptr(), len: bytes.len() }
    }

    /// The bytes that C handed in as `name`.
    ///
    /// # Errors
    /// Null in place of bytes; more of them than memory has.
    ///
    /// # Safety
    /// Where `data` is not null, `len` bytes can be read there, and nobody changes them until the call returns.
    unsafe fn bytes<'a>(self, name: &str) -> Result<&'a [u8]> {
        if self.len == 0 {
            return Ok(&[]);
        }
        if self.data.is_null() || self.len > isize::MAX as usize {
            return Err(Error::config(name, format!("{} bytes", self.len), "no address of them"));
        }
        // SAFETY: by this function's own rule, which the header states for every text.
        Ok(unsafe { std::slice::from_raw_parts(self.data, self.len) })
    }

    /// The text that C handed in as `name`.
    ///
    /// # Errors
    /// As [`Str::bytes`]; it is not UTF-8.
    ///
    /// # Safety
    /// As there.
    unsafe fn text<'a>(self, name: &str) -> Result<&'a str> {
        // SAFETY: as this function's own.
        let bytes = unsafe { self.bytes(name) }?;
        std::str::from_utf8(bytes).map_err(|e| {
            Error::config(name, "text in UTF-8", format!("a broken character after {} bytes", e.valid_up_to()))
        })
    }

    /// The path that C handed in as `name`; none if it is empty.
    ///
    /// # Errors
    /// As [`Str::text`].
    ///
    /// # Safety
    /// As there.
    unsafe fn path(self, name: &str) -> Result<Option<PathBuf>> {
        // SAFETY: as this function's own.
        let text = unsafe { self.text(name) }?;
        Ok((!text.is_empty()).then(|| PathBuf::from(text)))
    }

    /// As [`Str::path`], for one that there must be.
    ///
    /// # Errors
    /// As there; it is empty.
    ///
    /// # Safety
    /// As there.
    unsafe fn needed_path(self, name: &str) -> Result<PathBuf> {
        // SAFETY: as this function's own.
        let path = unsafe { self.path(name) }?;
        path.ok_or_else(|| Error::config(name, "a path", "an empty one"))
    }
}

/// Numbers that C handed in as `name`.
///
/// # Errors
/// Null in place of them.
///
/// # Safety
/// Where `data` is not null, `len` of them can be read there until the call returns.
unsafe fn list<'a, T>(data: *const T, len: usize, name: &str) -> Result<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    if data.is_null() || !data.is_aligned() || len > isize::MAX as usize / size_of::<T>() {
        return Err(Error::config(name, format!("{len} values"), "no address of them"));
    }
    // SAFETY: by this function's own rule; it is neither null nor out of line.
    Ok(unsafe { std::slice::from_raw_parts(data, len) })
}

/// A place for a result.
struct Out<T>(*mut T);

impl<T> Out<T> {
    /// The place that C handed in as `name`, before any work is done for it.
    ///
    /// # Errors
    /// There is none.
    fn new(place: *mut T, name: &str) -> Result<Self> {
        if place.is_null() || !place.is_aligned() {
            return Err(Error::config(name, "the address of a place for the result", "none"));
        }
        Ok(Self(place))
    }

    /// # Safety
    /// The caller of the library may be written to there, as the header states for every place of a result.
    unsafe fn set(self, value: T) {
        // SAFETY: by this function's own rule; it is neither null nor out of line.
        unsafe { self.0.write(value) }
    }
}

/// What went wrong, as C sees it.
pub struct Failure {
    code: ErrorCode,
    message: String,
    item: String,
    next: String,
}
held!(Failure, "error");

impl Failure {
    fn new(e: &Error) -> Self {
        let mut message = e.to_string();
        let mut cause = std::error::Error::source(e);
        while let Some(inner) = cause {
            message += &format!(": {inner}");
            cause = inner.source();
        }
        Self { code: e.code(), message, item: e.item().to_owned(), next: e.next().unwrap_or_default().to_owned() }
    }
}

/// Runs `body`; what it fails with, a panic included, goes to `error` and comes back as a code.
fn guarded(error: *mut *mut Failure, body: impl FnOnce() -> Result<()>) -> u32 {
    // A handle that a panic broke says so itself: its lock is poisoned.
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(bug(&*panic)));
    let (code, failure) = match result {
        Ok(()) => (0, std::ptr::null_mut()),
        Err(e) => (e.code().number(), if error.is_null() { std::ptr::null_mut() } else { Failure::new(&e).hold() }),
    };
    if !error.is_null() && error.is_aligned() {
        // SAFETY: the header asks for the address of a place for a handle, or null.
        unsafe { error.write(failure) }
    }
    code
}

/// The error for a panic, which is a bug whatever was handed in.
fn bug(panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
    let message = format!("the library met a bug: {text}; report it with what led to it");
    Error::new(ErrorCode::Internal, "pocketlora", message)
}

/// Bytes that the library made.
pub struct Buffer(Vec<u8>);
held!(Buffer, "buffer");

/// The version of the interface: raised when older apps would no longer work. An app compares it with `PL_ABI_VERSION`.
#[unsafe(no_mangle)]
pub extern "C" fn pl_abi_version() -> u32 {
    ABI
}

/// The library's version, such as `0.1.0`; it lives forever.
#[unsafe(no_mangle)]
pub extern "C" fn pl_version() -> Str {
    Str::of(env!("CARGO_PKG_VERSION"))
}

/// The code of an error, as the failed call returned it; 0 for what is no error.
#[unsafe(no_mangle)]
pub extern "C" fn pl_error_code(error: *const Failure) -> u32 {
    Failure::of(error).map_or(0, |failure| failure.code.number())
}

/// What an error says for people: place, what was expected and found, and what to do. It lives until the error is freed.
#[unsafe(no_mangle)]
pub extern "C" fn pl_error_message(error: *const Failure) -> Str {
    told(error, |failure| &failure.message)
}

/// The file, tensor, line or setting that failed. It lives until the error is freed.
#[unsafe(no_mangle)]
pub extern "C" fn pl_error_item(error: *const Failure) -> Str {
    told(error, |failure| &failure.item)
}

/// What to do about it, empty where nothing can be done. It lives until the error is freed.
#[unsafe(no_mangle)]
pub extern "C" fn pl_error_next(error: *const Failure) -> Str {
    told(error, |failure| &failure.next)
}

/// A part of an error, which its table keeps until it is freed.
fn told(error: *const Failure, part: impl FnOnce(&Failure) -> &String) -> Str {
    Failure::of(error).map_or(Str::NONE, |failure| Str::of(part(&failure)))
}

/// Frees an error.
#[unsafe(no_mangle)]
pub extern "C" fn pl_error_free(error: *mut Failure) {
    handle::free(error);
}

/// The bytes of a buffer; text is UTF-8. They live until it is freed. None of what is no buffer, as with the parts of errors.
#[unsafe(no_mangle)]
pub extern "C" fn pl_buffer_bytes(buffer: *const Buffer) -> Str {
    Buffer::of(buffer).map_or(Str::NONE, |buffer| Str::of_bytes(&buffer.0))
}

/// Frees a buffer.
#[unsafe(no_mangle)]
pub extern "C" fn pl_buffer_free(buffer: *mut Buffer) {
    handle::free(buffer);
}
