//! The peak of AMX's tiles in bf16.

#![allow(unsafe_code, reason = "tiles exist in assembly only")]

use super::super::bf16::amx::Config;
use super::{NONE, Peak, Probes};
use std::arch::asm;

/// Four sums, as in the kernel: tiles of 16 by 16 that each add 32 products.
pub(super) static AMX: Probes = Probes { bf16: Some(Peak { run: bf16, ops: 4 * 16 * 16 * 32 * 2 }), ..NONE };

fn bf16(rounds: usize) -> f32 {
    let config = Config::new([16, 16]);
    // SAFETY: this probe is listed where `amx::available` had the system enable tiles. No memory but `config` is touched,
    // and the tiles, zero all along, are empty again at the end.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            "2:",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {rounds}",
            "jnz 2b",
            "tilerelease",
            config = in(reg) &raw const config,
            rounds = inout(reg) rounds.max(1) => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, readonly),
        );
    }
    0.0
}
