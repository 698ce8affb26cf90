//! `tdpbf16ps` of AMX, in server processors: squares of 16 tokens by 16 lanes that each add 32 products. What prepares
//! the operands is AVX-512's; panels are as there, but of whole tiles.

#![allow(unsafe_code, reason = "tiles are loaded and stored by assembly: the compiler has no stable names for them")]

use super::super::avx512::first_lanes;
use super::{Bf16, Bf16Rows, avx512};
use std::arch::asm;
use std::arch::x86_64::*;

/// Rows of a tile, and its columns in f32.
const SIDE: usize = 16;
/// Terms of a sum in a row of a tile.
const DEPTH: usize = 32;
/// Bytes of a row of a tile.
const ROW: usize = 64;

pub(crate) static KERNELS: Bf16 = Bf16 { group: DEPTH, tile, ..avx512::KERNELS };

/// Shapes of the tiles, as `ldtilecfg` reads them.
#[repr(C, align(64))]
pub(in super::super) struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// Tiles 0 to 3 for sums, two by two of them; 4 and 5 for `rows` of activations; 6 and 7 for the panel.
    pub fn new(rows: [u8; 2]) -> Self {
        let (mut bytes, mut all) = ([0; 16], [0; 16]);
        bytes[..8].fill(ROW as u16);
        let [upper, lower] = rows;
        all[..8].copy_from_slice(&[upper, upper, lower, lower, upper, lower, SIDE as u8, SIDE as u8]);
        Self { palette: 1, start_row: 0, reserved: [0; 14], bytes, rows: all }
    }
}

/// Sums of `2 SIDE` tokens by all lanes.
#[repr(align(64))]
struct Sums([[f32; avx512::LANES]; 2 * SIDE]);

/// See [`Bf16::tile`].
#[target_feature(enable = "avx512f,avx512bf16")]
fn tile(panel: &[u16], x: Bf16Rows, c: &mut [&mut [f32]], col: usize, n: usize, add: bool) {
    let mut sums = Sums([[0.0; avx512::LANES]; 2 * SIDE]);
    let masks = [first_lanes(n), first_lanes(n.saturating_sub(SIDE))];
    for (i, c) in c.chunks_mut(2 * SIDE).enumerate() {
        let first = 2 * SIDE * i * x.stride;
        square(panel, Bf16Rows { values: &x.values[first..], count: c.len(), ..x }, &mut sums);
        for (c, sums) in c.iter_mut().zip(&sums.0) {
            let c = c[col..][..n].as_mut_ptr();
            for (j, mask) in masks.into_iter().enumerate() {
                let at = c.wrapping_add(SIDE * j);
                // SAFETY: the mask keeps to the `n` columns of `c`; `sums` is an array of two vectors.
                unsafe {
                    let mut sum = _mm512_loadu_ps(sums.as_ptr().add(SIDE * j));
                    if add {
                        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, at));
                    }
                    _mm512_mask_storeu_ps(at, mask, sum);
                }
            }
        }
    }
}

/// Up to `2 SIDE` rows of `x` with all lanes of the panel.
fn square(panel: &[u16], x: Bf16Rows, sums: &mut Sums) {
    let steps = panel.len() / (DEPTH * avx512::LANES);
    assert!(x.count > 0 && (x.count - 1) * x.stride + DEPTH * steps <= x.values.len());
    if steps == 0 {
        sums.0.as_flattened_mut().fill(0.0);
        return;
    }
    let upper = x.count.min(SIDE);
    // Without a second half the first one is taken twice, and the copy goes to sums that nobody reads.
    let (lower, second) = if x.count > SIDE { (x.count - SIDE, SIDE * x.stride) } else { (upper, 0) };
    let config = Config::new([upper as u8, lower as u8]);
    // SAFETY: `amx::available` had the system enable tiles before this table was handed out. Tiles 4 and 5 read 64 bytes
    // a step of `upper` and `lower` rows, which `x` has by the assertion; 6 and 7 the two halves of a step's 16 pairs of
    // 128 bytes; 0 to 3 are stored to the quarters of `sums`. The tiles are empty again at the end.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm6, [{panel} + {pair}*1]",
            "tileloadd tmm4, [{upper} + {stride}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{panel} + {pair}*1 + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{lower} + {stride}*1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {panel}, 2048",
            "add {upper}, 64",
            "add {lower}, 64",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {pair}*1], tmm0",
            "tilestored [{sums} + {pair}*1 + 64], tmm1",
            "tilestored [{sums} + {pair}*1 + 2048], tmm2",
            "tilestored [{sums} + {pair}*1 + 2112], tmm3",
            "tilerelease",
            config = in(reg) &raw const config,
            panel = inout(reg) panel.as_ptr() => _,
            upper = inout(reg) x.values.as_ptr() => _,
            lower = inout(reg) x.values[second..].as_ptr() => _,
            stride = in(reg) x.stride * size_of::<u16>(),
            pair = in(reg) 2 * ROW,
            steps = inout(reg) steps => _,
            sums = in(reg) &raw mut sums.0,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

const _: () = assert!(size_of::<Config>() == 64 && avx512::LANES == 2 * SIDE);
