//! Whether this processor has AMX and the system lets this process use it.
//!
//! AMX has a table of its own, named `amx`, because it works differently: AVX-512 prepares the operands, and one block of
//! assembly (`bf16/amx.rs`) multiplies 32 tokens by a panel's 32 lanes. The compiler does not know the tile registers, so
//! no tile is used outside that block. Linux enables tiles for a process that asks; this is done when tables are listed.
//! Where Linux refuses, the best table is `avx512`.

#![allow(unsafe_code, reason = "asks processor and system by instruction and system call")]

use std::arch::x86_64::*;

/// Bits of `cpuid(7, 0).edx`: products in bf16, tiles, products in 8 bits.
const FEATURES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
/// Bits of XCR0: the system saves configuration and contents of tiles.
const SAVED: u64 = 1 << 17 | 1 << 18;

/// Whether tiles can be used; has the system enable them for this process, as Linux wants to be asked.
pub(crate) fn available() -> bool {
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & FEATURES == FEATURES && saved() && enable()
}

fn saved() -> bool {
    is_x86_feature_detected!("xsave") && {
        // SAFETY: feature checked; it implies that the system has enabled the instruction.
        unsafe { read_xcr0() & SAVED == SAVED }
    }
}

#[target_feature(enable = "xsave")]
fn read_xcr0() -> u64 {
    // SAFETY: register 0 is there wherever the instruction is.
    unsafe { _xgetbv(0) }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn enable() -> bool {
    // Linux, arch/x86/include/uapi/asm/prctl.h; the number of the contents of tiles as in XCR0.
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: a call that takes two numbers and changes nothing but what this process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn enable() -> bool {
    false
}
