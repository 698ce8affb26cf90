//! Structs that begin with their size, so that apps and libraries of different age understand each other.

use crate::error::{Error, ErrorCode, Result};
use std::ptr;

/// Sizes beyond this are no struct's.
const MOST: usize = 4096;

/// A struct of plain numbers, addresses and texts whose first field is its size in bytes as a `u32`.
///
/// # Safety
/// It is `repr(C)`, begins with a `u32`, and any bytes are a value of it: no `bool`, no `enum`, no reference.
pub(super) unsafe trait Sized: Copy {}

/// The struct at `place`; what its size does not reach, and all of it where `place` is null, is as in `unset`.
///
/// # Errors
/// The size is none that it can have; it sets something that this library does not know.
///
/// # Safety
/// `place` is null, or as many bytes can be read there as it says in its first four.
pub(super) unsafe fn read<T: Sized>(place: *const T, unset: T, name: &str) -> Result<T> {
    let mut value = unset;
    if place.is_null() {
        return Ok(value);
    }
    let own = size_of::<T>();
    // SAFETY: every struct of this kind has its size in its first four bytes.
    let size = unsafe { place.cast::<u32>().read_unaligned() } as usize;
    check(size, name)?;
    let shared = size.min(own);
    // SAFETY: `size` bytes can be read there, by this function's own rule; `own` can be written, and any bytes are a value.
    unsafe { ptr::copy_nonoverlapping(place.cast::<u8>(), ptr::from_mut(&mut value).cast::<u8>(), shared) };
    // SAFETY: what is beyond is within `size`.
    let beyond = (own..size).map(|i| unsafe { place.cast::<u8>().add(i).read() });
    if beyond.into_iter().any(|byte| byte != 0) {
        let message = "sets something that this library is too old for; leave it at 0, or link a newer library";
        return Err(Error::new(ErrorCode::Unsupported, format!("struct `{name}`"), message));
    }
    Ok(value)
}

/// Writes `value` to `place` as far as the size that the caller put there reaches, and leaves that size as it is.
///
/// # Errors
/// There is no place; the size is none that it can have.
///
/// # Safety
/// As [`read`], and the bytes can be written.
pub(super) unsafe fn write<T: Sized>(place: *mut T, value: &T, name: &str) -> Result<()> {
    // SAFETY: as this function's own.
    let size = unsafe { check_place(place, name) }?;
    let shared = size.min(size_of::<T>());
    const SIZE: usize = size_of::<u32>();
    // SAFETY: within `size` bytes that can be written, and within the value.
    unsafe {
        let from = ptr::from_ref(value).cast::<u8>().add(SIZE);
        ptr::copy_nonoverlapping(from, place.cast::<u8>().add(SIZE), shared - SIZE);
    }
    Ok(())
}

/// The size of the struct at `place`, before work is done that it is to hold.
///
/// # Errors
/// As [`write`].
///
/// # Safety
/// As [`read`].
pub(super) unsafe fn check_place<T: Sized>(place: *const T, name: &str) -> Result<usize> {
    if place.is_null() {
        return Err(Error::config(name, "the address of a struct for the result", "none"));
    }
    // SAFETY: every struct of this kind has its size in its first four bytes.
    let size = unsafe { place.cast::<u32>().read_unaligned() } as usize;
    check(size, name)?;
    Ok(size)
}

fn check(size: usize, name: &str) -> Result<()> {
    if (size_of::<u32>()..=MOST).contains(&size) {
        return Ok(());
    }
    let expected = format!("its size in bytes, `sizeof({name})`, in the first field");
    Err(Error::config(name, expected, size))
}
