//! What is asked of the system about memory: the only mapping of files (whole, read-only, as shareable [`Bytes`]), and
//! that it takes back what was freed.
//!
//! Weights are asked for in large pages. A token reads all of them, and to find each 4 KiB of them anew costs a core up to
//! half of its rate: one core of a Zen 4 read 36 GB/s from large pages and 20 GB/s from small ones. On Linux a file comes in
//! large pages if its map asks for them, the file system has them (ext4 from Linux 6.16 on, XFS), its pages are not in the
//! cache already, and they are first asked for from front to back. For this reason a large file that was just written is
//! dropped from the cache when it is on the disk (`format/atomic.rs`).

use crate::error::{Error, Result};
use bytes::Bytes;
use std::fs::File;
use std::path::Path;

/// Maps `path` read-only. The bytes stay valid for as long as any slice of them lives, also when the file is
/// renamed over or unlinked meanwhile.
///
/// # Errors
/// The file cannot be opened or mapped, or is empty.
pub fn map(path: &Path) -> Result<Bytes> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let len = file.metadata().map_err(|e| Error::io("read the size of", path, e))?.len();
    if len == 0 {
        return Err(Error::format(path, "file", "at least one byte", "an empty file"));
    }
    #[allow(unsafe_code)] // one of the six places where unsafe lives
    // SAFETY: nothing is written through the map, which is read-only. It is shared with the file: who changes the file
    // in place changes these bytes, and who cuts it short takes them away. Pocketlora does neither: it writes each file
    // beside and renames it, so a mapped file keeps its bytes. No user of a map can guard against other programs that
    // do, private maps would not either; SECURITY.md says so.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io("map", path, e))?;
    // A wish, which older systems do not know for files.
    #[cfg(target_os = "linux")]
    map.advise(memmap2::Advice::HugePage).ok();
    Ok(Bytes::from_owner(map))
}

/// Maps `len` bytes of `file` from byte `offset` on, which need not be the start of a page; `name` is for messages. The file
/// may be closed afterwards.
///
/// # Errors
/// The bytes are not all there, there are none, or they cannot be mapped.
pub(crate) fn map_part(file: &File, offset: u64, len: u64, name: &Path) -> Result<Bytes> {
    let all = file.metadata().map_err(|e| Error::io("read the size of", name, e))?.len();
    if len == 0 || offset.checked_add(len).is_none_or(|end| end > all) {
        let got = format!("{len} bytes from byte {offset} of {all} on");
        return Err(Error::format(name, "place in the file", "some bytes, all within the file", got));
    }
    let size = usize::try_from(len).map_err(|_| Error::format(name, "length", "what memory has addresses for", len))?;
    #[allow(unsafe_code)] // one of the six places where unsafe lives
    // SAFETY: as in `map`: nothing is written through it, and the owner of the file, here the app, leaves it alone.
    let map = unsafe { memmap2::MmapOptions::new().offset(offset).len(size).map(file) };
    Ok(Bytes::from_owner(map.map_err(|e| Error::io("map", name, e))?))
}

/// Has the system bring in a map from front to back. What threads then touch in any order lies in large pages, where the
/// file system has them: asked for out of order, pages come in small ones, and a core reads those at half the rate.
/// Does nothing but on Linux.
pub(crate) fn bring_in(map: &Bytes) {
    #[cfg(target_os = "linux")]
    for page in map.chunks(LARGE_PAGE) {
        std::hint::black_box(page[0]);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = map;
}

/// Bytes of a large page on the processors that have them.
#[cfg(target_os = "linux")]
pub(crate) const LARGE_PAGE: usize = 2 << 20;

/// Gives freed memory back to the system, where its allocator would keep it for later: what a tokenizer leaves behind in
/// thousands of pieces is dirty memory that nobody uses. Takes about a millisecond; does nothing but on Linux with glibc,
/// for other allocators (Android's scudo, Apple's) give pages back by themselves.
pub(crate) fn release_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[allow(unsafe_code)] // one of the six places where unsafe lives
    // SAFETY: `malloc_trim` takes no pointer and touches only pages that the allocator itself knows to be free; it may be
    // called from any thread (malloc_trim(3), MT-Safe).
    unsafe {
        libc::malloc_trim(0);
    }
}

/// As the last field of what holds much memory: gives it back to the system when that is dropped.
pub(crate) struct ReleasesFreed;

impl Drop for ReleasesFreed {
    fn drop(&mut self) {
        release_freed();
    }
}
