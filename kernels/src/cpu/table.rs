//! The functions that dominate time, one set per instruction set, chosen at run time.

use super::attention;
use super::bf16::{Bf16, Bf16Rows};
use super::cache::{Tile, size};
use super::dense;
use super::light::{self, Light};
use super::nf4::{self, EvenOdd, Nf4};
use super::q8::{self, Down, GROUP, Hidden, Int8, Panel, Place, Q8, Q8Mut, Q8Row, Up};
use super::tile::{self, Coefficients, Rows};
use crate::{Error, FloatType};
#[cfg(target_arch = "aarch64")]
use std::arch::is_aarch64_feature_detected;
use std::sync::LazyLock;

/// Instruction sets with kernels of their own; within an architecture, in order of what they ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Isa {
    /// What the compilation target guarantees: SSE2 on x86-64, NEON on aarch64.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// Those with the dot products in 8 bits that client processors without AVX-512 have.
    AvxVnni,
    /// AVX-512 F, BW and VL beside those, VNNI with VBMI and BF16 where the CPU has them.
    Avx512,
    /// Those with the matrix products of server processors.
    Amx,
    /// What every 64-bit ARM has, dot products, matrix products in 8 bits and in bf16 where the CPU has them.
    Neon,
}

impl Isa {
    /// The name that `POCKETLORA_ISA` and kernel names use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
            Self::Neon => "neon",
        }
    }
}

/// Kernels of one instruction set.
///
/// The fields are `unsafe fn` because they may use instructions that a CPU lacks. The methods of the same
/// names are the only callers: they check bounds, and a table for which this CPU lacks the instructions
/// cannot be had, for the statics are private to this module and [`Table::available`] filters them.
pub struct Table {
    isa: Isa,
    /// What is used beyond the base of the instruction set.
    features: &'static [&'static str],
    /// Tokens from which transposing a panel of weights pays, because `tile_axpy` is so much faster than `tile_dot`.
    transposes_from: usize,
    nf4_decode: unsafe fn(&Nf4, usize, &mut [f32]),
    nf4_matvec: unsafe fn(&Nf4, usize, usize, &EvenOdd, &mut [f32]),
    dense_decode: unsafe fn(FloatType, &[u8], usize, usize, &mut [f32]),
    dense_matvec: unsafe fn(FloatType, &[u8], &[f32], &mut [f32]),
    /// Rows of a panel in the products in 8 bits.
    q8_lanes: usize,
    q8_pairs: bool,
    q8_quantize: unsafe fn(&[f32], Q8Mut),
    q8_nf4_matvec: unsafe fn(&Nf4, usize, Q8Row, &mut [f32]),
    q8_int8_matvec: unsafe fn(&Int8, usize, Q8Row, &mut [f32]),
    q8_down: unsafe fn(&Down, usize, Q8Row, &mut [f32; GROUP]),
    q8_add_columns: unsafe fn(&Up, usize, &[Hidden], &mut [f32]),
    q8_pack_nf4: unsafe fn(&Nf4, usize, Place, Panel),
    q8_pack_int8: unsafe fn(&Int8, Place, Panel),
    q8_tile: unsafe fn(Panel, &Q8, Place, &mut [&mut [f32]], usize),
    /// The same where the panel is one of `q8_pack_int8`.
    q8_tile_int8: unsafe fn(Panel, &Q8, Place, &mut [&mut [f32]], usize),
    /// Where the CPU multiplies in bf16.
    bf16: Option<&'static Bf16>,
    tile_axpy_narrow: unsafe fn(Coefficients, Tile, &mut [&mut [f32]]),
    light: &'static Light,
    tile_dot: unsafe fn(Rows, Rows, &mut [&mut [f32]], usize),
    tile_axpy: unsafe fn(Coefficients, Rows, &mut [&mut [f32]]),
}

static PORTABLE: Table = Table {
    isa: Isa::Portable,
    features: &[],
    transposes_from: 16,
    nf4_decode: nf4::portable::decode,
    nf4_matvec: nf4::portable::matvec,
    dense_decode: dense::portable::decode,
    dense_matvec: dense::portable::matvec,
    q8_lanes: q8::portable::LANES,
    q8_pairs: false,
    q8_quantize: q8::portable::quantize,
    q8_nf4_matvec: q8::portable::nf4_matvec,
    q8_int8_matvec: q8::portable::int8_matvec,
    q8_down: q8::portable::down,
    q8_add_columns: q8::portable::add_columns,
    q8_pack_nf4: q8::portable::pack_nf4,
    q8_pack_int8: q8::portable::pack_int8,
    q8_tile: q8::portable::tile,
    q8_tile_int8: q8::portable::tile,
    bf16: None,
    tile_axpy_narrow: attention::portable::axpy,
    light: &light::portable::LIGHT,
    tile_dot: tile::portable::dot,
    tile_axpy: tile::portable::axpy,
};

#[cfg(target_arch = "x86_64")]
static AVX2: Table = Table {
    isa: Isa::Avx2,
    features: &[],
    transposes_from: usize::MAX,
    nf4_decode: nf4::avx2::decode,
    nf4_matvec: nf4::avx2::matvec,
    dense_decode: dense::avx2::decode,
    dense_matvec: dense::avx2::matvec,
    q8_lanes: q8::avx2::LANES,
    q8_pairs: false,
    q8_quantize: q8::avx2::quantize,
    q8_nf4_matvec: q8::avx2::nf4_matvec,
    q8_int8_matvec: q8::avx2::int8_matvec,
    q8_down: q8::avx2::down,
    q8_add_columns: q8::avx2::add_columns,
    q8_pack_nf4: q8::avx2::pack_nf4,
    q8_pack_int8: q8::avx2::pack_int8,
    q8_tile: q8::avx2::tile,
    q8_tile_int8: q8::avx2::tile_int8,
    bf16: None,
    tile_axpy_narrow: attention::avx2::axpy,
    light: &light::avx2::LIGHT,
    tile_dot: tile::avx2::dot,
    tile_axpy: tile::avx2::axpy,
};

#[cfg(target_arch = "x86_64")]
static AVX_VNNI: Table = Table {
    isa: Isa::AvxVnni,
    q8_nf4_matvec: q8::avxvnni::nf4_matvec,
    q8_int8_matvec: q8::avxvnni::int8_matvec,
    q8_down: q8::avxvnni::down,
    q8_add_columns: q8::avxvnni::add_columns,
    q8_pack_nf4: q8::avxvnni::pack_nf4,
    q8_pack_int8: q8::avxvnni::pack_int8,
    q8_tile: q8::avxvnni::tile,
    q8_tile_int8: q8::avxvnni::tile,
    ..AVX2
};

#[cfg(target_arch = "x86_64")]
static AVX512: Table = Table {
    isa: Isa::Avx512,
    features: &[],
    transposes_from: 48,
    nf4_decode: nf4::avx512::decode,
    nf4_matvec: nf4::avx512::matvec,
    dense_decode: dense::avx512::decode,
    dense_matvec: dense::avx512::matvec,
    tile_axpy_narrow: attention::avx512::axpy,
    light: &light::avx512::LIGHT,
    tile_dot: tile::avx512::dot,
    tile_axpy: tile::avx512::axpy,
    ..AVX2
};

#[cfg(target_arch = "x86_64")]
static AVX512_VNNI: Table = Table {
    features: &["vnni", "vbmi"],
    q8_lanes: q8::avx512::LANES,
    q8_pairs: true,
    q8_nf4_matvec: q8::avx512::nf4_matvec,
    q8_int8_matvec: q8::avx512::int8_matvec,
    q8_down: q8::avx512::down,
    q8_add_columns: q8::avx512::add_columns,
    q8_pack_nf4: q8::avx512::pack_nf4,
    q8_pack_int8: q8::avx512::pack_int8,
    q8_tile: q8::avx512::tile,
    q8_tile_int8: q8::avx512::tile,
    ..AVX512
};

#[cfg(target_arch = "x86_64")]
static AVX512_BF16: Table =
    Table { features: &["vnni", "vbmi", "bf16"], bf16: Some(&super::bf16::avx512::KERNELS), ..AVX512_VNNI };

#[cfg(target_arch = "x86_64")]
static AMX: Table = Table { isa: Isa::Amx, bf16: Some(&super::bf16::amx::KERNELS), ..AVX512_BF16 };

#[cfg(target_arch = "aarch64")]
static NEON: Table = Table {
    isa: Isa::Neon,
    features: &[],
    transposes_from: 48,
    nf4_decode: nf4::neon::decode,
    nf4_matvec: nf4::neon::matvec,
    dense_decode: dense::neon::decode,
    dense_matvec: dense::neon::matvec,
    q8_lanes: q8::neon::LANES,
    q8_pairs: false,
    q8_quantize: q8::neon::quantize,
    q8_nf4_matvec: q8::neon::base::nf4_matvec,
    q8_int8_matvec: q8::neon::base::int8_matvec,
    q8_down: q8::neon::base::down,
    q8_add_columns: q8::neon::base::add_columns,
    q8_pack_nf4: q8::neon_panel::pack_nf4::<{ q8::QUAD }>,
    q8_pack_int8: q8::neon_panel::pack_int8::<{ q8::QUAD }>,
    q8_tile: q8::neon::base::tile,
    q8_tile_int8: q8::neon::base::tile,
    bf16: None,
    tile_axpy_narrow: attention::neon::axpy,
    // What the target guarantees is NEON: the compiler makes vectors of these.
    light: &light::portable::LIGHT,
    tile_dot: tile::neon::dot,
    tile_axpy: tile::neon::axpy,
};

#[cfg(target_arch = "aarch64")]
static NEON_DOTPROD: Table = Table {
    features: &["dotprod"],
    q8_nf4_matvec: q8::neon::dotprod::nf4_matvec,
    q8_int8_matvec: q8::neon::dotprod::int8_matvec,
    q8_down: q8::neon::dotprod::down,
    q8_add_columns: q8::neon::dotprod::add_columns,
    q8_tile: q8::neon::dotprod::tile,
    q8_tile_int8: q8::neon::dotprod::tile,
    ..NEON
};

#[cfg(target_arch = "aarch64")]
static NEON_I8MM: Table = Table {
    features: &["dotprod", "i8mm"],
    q8_pack_nf4: q8::neon_panel::pack_nf4::<{ q8::neon_panel::OCTET }>,
    q8_pack_int8: q8::neon_panel::pack_int8::<{ q8::neon_panel::OCTET }>,
    q8_tile: q8::neon_panel::tile,
    q8_tile_int8: q8::neon_panel::tile,
    ..NEON_DOTPROD
};

#[cfg(target_arch = "aarch64")]
static NEON_BF16: Table =
    Table { features: &["dotprod", "i8mm", "bf16"], bf16: Some(&super::bf16::neon::KERNELS), ..NEON_I8MM };

/// Where every table is checked once against the CPU.
static AVAILABLE: LazyLock<Vec<&'static Table>> = LazyLock::new(|| {
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), expect(unused_mut, reason = "no others"))]
    let mut tables = vec![&PORTABLE];
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
        tables.push(&AVX2);
        if is_x86_feature_detected!("avxvnni") {
            tables.push(&AVX_VNNI);
        }
        let base = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        if base && is_x86_feature_detected!("avx512vl") {
            // One name for what a CPU has of it: bf16 came after VNNI and VBMI, which came after the base.
            if !is_x86_feature_detected!("avx512vnni") || !is_x86_feature_detected!("avx512vbmi") {
                tables.push(&AVX512);
            } else if !is_x86_feature_detected!("avx512bf16") {
                tables.push(&AVX512_VNNI);
            } else {
                tables.push(&AVX512_BF16);
                if super::maker::slow_bf16() {
                    tables.push(&AVX512_VNNI);
                }
                if super::amx::available() {
                    tables.push(&AMX);
                }
            }
        }
    }
    #[cfg(target_arch = "aarch64")]
    if is_aarch64_feature_detected!("neon") {
        let table = if !is_aarch64_feature_detected!("dotprod") {
            &NEON
        } else if !is_aarch64_feature_detected!("i8mm") {
            &NEON_DOTPROD
        } else if !is_aarch64_feature_detected!("bf16") {
            &NEON_I8MM
        } else {
            &NEON_BF16
        };
        tables.push(table);
    }
    tables
});

static BEST: LazyLock<&'static Table> = LazyLock::new(|| Table::from_env().unwrap_or(AVAILABLE[AVAILABLE.len() - 1]));

impl Table {
    /// The tables that this CPU can run, the slowest first; two of one name where what one has beside the other is slow.
    #[must_use]
    pub fn available() -> &'static [&'static Table] {
        &AVAILABLE
    }

    /// The table that `POCKETLORA_ISA` names, or the fastest if it is not set.
    ///
    /// # Errors
    /// [`Error::Device`] if the name is unknown or this CPU or build has no such kernels.
    pub fn from_env() -> Result<&'static Table, Error> {
        match std::env::var("POCKETLORA_ISA") {
            Ok(name) if !name.is_empty() => Self::by_name(&name),
            _ => Ok(AVAILABLE[AVAILABLE.len() - 1]),
        }
    }

    /// The fastest table called `name`, as in `POCKETLORA_ISA`.
    ///
    /// # Errors
    /// [`Error::Device`] if the name is unknown or this CPU or build has no such kernels.
    pub fn by_name(name: &str) -> Result<&'static Table, Error> {
        AVAILABLE.iter().rev().copied().find(|table| table.isa.name() == name).ok_or_else(|| {
            let mut names: Vec<_> = AVAILABLE.iter().map(|table| format!("`{}`", table.isa.name())).collect();
            names.dedup();
            Error::Device(format!("instruction set `{name}` is not available here, only {}", names.join(", ")))
        })
    }

    /// [`Table::from_env`], read once; the fastest table if that fails. A front end that wants to report a
    /// wrong `POCKETLORA_ISA` calls `from_env` first.
    #[must_use]
    pub fn best() -> &'static Table {
        *BEST
    }

    /// What the kernels were written for.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// What the kernels use of this CPU beyond the base of their instruction set: names as in its manual.
    #[must_use]
    pub fn features(&self) -> &'static [&'static str] {
        self.features
    }

    /// Tokens from which a forward product should transpose its panels.
    pub(crate) fn transposes_from(&self) -> usize {
        self.transposes_from
    }

    /// Elements `start..start + out.len()` of the flattened weight.
    pub(crate) fn nf4_decode(&self, w: &Nf4, start: usize, out: &mut [f32]) {
        assert!(start.checked_add(out.len()).is_some_and(|end| end <= w.len()));
        // SAFETY: bounds are checked above; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            (self.nf4_decode)(w, start, out);
        }
    }

    /// `y[i] = sum_k w[row + i, k] x[k]` for rows of `cols` elements, a multiple of [`nf4::GRANULE`].
    pub(crate) fn nf4_matvec(&self, w: &Nf4, cols: usize, row: usize, x: &EvenOdd, y: &mut [f32]) {
        assert!(cols.is_multiple_of(nf4::GRANULE) && x.len() == cols);
        assert!((row + y.len()).checked_mul(cols).is_some_and(|end| end <= w.len()));
        // SAFETY: bounds are checked above; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            (self.nf4_matvec)(w, cols, row, x, y);
        }
    }

    /// Widens rows of `width` little-endian floats that are `stride` floats apart; `out` holds them one after
    /// another.
    pub(crate) fn dense_decode(&self, dtype: FloatType, bytes: &[u8], stride: usize, width: usize, out: &mut [f32]) {
        if out.is_empty() {
            return;
        }
        assert!(stride >= width && out.len().is_multiple_of(width));
        assert!(bytes.len() >= ((out.len() / width - 1) * stride + width) * dtype.size());
        // SAFETY: bounds are checked above; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            (self.dense_decode)(dtype, bytes, stride, width, out);
        }
    }

    /// `y[i] = sum_k w[i, k] x[k]`; `bytes` holds `y.len()` rows of `x.len()` little-endian floats.
    pub(crate) fn dense_matvec(&self, dtype: FloatType, bytes: &[u8], x: &[f32], y: &mut [f32]) {
        assert_eq!(bytes.len(), x.len() * y.len() * dtype.size());
        // SAFETY: bounds are checked above; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            (self.dense_matvec)(dtype, bytes, x, y);
        }
    }

    /// Rows of a panel for [`Table::q8_tile`].
    pub(crate) fn q8_lanes(&self) -> usize {
        self.q8_lanes
    }

    /// Whether products of few tokens want their blocks in pairs, too.
    pub(crate) fn q8_pairs(&self) -> bool {
        self.q8_pairs
    }

    /// Rounds one token of activations to 8 bits.
    pub(crate) fn q8_quantize(&self, x: &[f32], q: Q8Mut) {
        let blocks = x.len() / q8::BLOCK;
        assert!(x.len().is_multiple_of(q8::BLOCK));
        assert!([q.codes.len(), q.units.len(), q.starts.len()] == [blocks; 3]);
        // SAFETY: lengths are checked above; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            (self.q8_quantize)(x, q);
        }
    }

    /// `y[i] = sum_k w[row + i, k] x[k]` in 8 bits.
    pub(crate) fn q8_nf4_matvec(&self, w: &Nf4, row: usize, x: Q8Row, y: &mut [f32]) {
        let cols = x.units.len() * q8::BLOCK;
        assert!(w.has_q8(cols) && x.codes.len() == x.units.len() && x.starts.len() == x.units.len());
        assert!(!self.q8_pairs || x.pairs.len() == x.units.len().div_ceil(2));
        assert!((row + y.len()).checked_mul(cols).is_some_and(|end| end <= w.len()));
        // SAFETY: bounds are checked above; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            (self.q8_nf4_matvec)(w, row, x, y);
        }
    }

    /// As [`Table::q8_nf4_matvec`].
    pub(crate) fn q8_int8_matvec(&self, w: &Int8, row: usize, x: Q8Row, y: &mut [f32]) {
        assert!(y.is_empty() || w.row(row).len() == x.units.len());
        // SAFETY: `Int8::row` checks each row; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            (self.q8_int8_matvec)(w, row, x, y);
        }
    }

    /// `y[i] = sum_k w[8 tile + i, k] x[k]` in 8 bits.
    pub(crate) fn q8_down(&self, w: &Down, tile: usize, x: Q8Row, y: &mut [f32; GROUP]) {
        // SAFETY: any operands will do; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            (self.q8_down)(w, tile, x, y);
        }
    }

    /// `y[i] += sum_j w[row + i, j] h[j]` in 8 bits; `row` is the first of a tile.
    pub(crate) fn q8_add_columns(&self, w: &Up, row: usize, h: &[Hidden], y: &mut [f32]) {
        // SAFETY: any operands will do; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            (self.q8_add_columns)(w, row, h, y);
        }
    }

    /// Unfolds a part of a weight whose rows have `blocks` blocks.
    pub(crate) fn q8_pack_nf4(&self, w: &Nf4, blocks: usize, at: Place, panel: Panel) {
        self.check_panel(&at, &panel);
        assert!(at.block + at.blocks <= blocks && (at.row + at.rows) * blocks * q8::BLOCK <= w.len());
        // SAFETY: bounds are checked above; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            (self.q8_pack_nf4)(w, blocks, at, panel);
        }
    }

    /// Unfolds a part of a weight.
    pub(crate) fn q8_pack_int8(&self, w: &Int8, at: Place, panel: Panel) {
        self.check_panel(&at, &panel);
        // SAFETY: `Int8::row` checks each row; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            (self.q8_pack_int8)(w, at, panel);
        }
    }

    /// `c[t][col + i] += sum_k w[i, k] x[t, k]` over the rows and blocks of a panel of [`Table::q8_pack_nf4`].
    pub(crate) fn q8_tile(&self, panel: Panel, x: &Q8, at: Place, c: &mut [&mut [f32]], col: usize) {
        self.check_tile(&panel, x, &at, c, col);
        // SAFETY: bounds are checked above; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            (self.q8_tile)(panel, x, at, c, col);
        }
    }

    /// As [`Table::q8_tile`] with a panel of [`Table::q8_pack_int8`].
    pub(crate) fn q8_tile_int8(&self, panel: Panel, x: &Q8, at: Place, c: &mut [&mut [f32]], col: usize) {
        self.check_tile(&panel, x, &at, c, col);
        // SAFETY: bounds are checked above; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            (self.q8_tile_int8)(panel, x, at, c, col);
        }
    }

    fn check_tile(&self, panel: &Panel, x: &Q8, at: &Place, c: &[&mut [f32]], col: usize) {
        self.check_panel(at, panel);
        assert!(at.block + at.blocks <= x.blocks() && c.len() <= x.tokens());
        assert!(c.iter().all(|row| col + at.rows <= row.len()));
    }

    fn check_panel(&self, at: &Place, panel: &Panel) {
        assert!(at.rows <= self.q8_lanes && panel.scales.len() >= at.blocks * self.q8_lanes);
        assert!(panel.codes.len() >= at.blocks * self.q8_lanes * q8::BLOCK);
    }

    /// Lanes and group of the bf16 kernels, where there are any.
    pub(crate) fn bf16(&self) -> Option<&'static Bf16> {
        self.bf16
    }

    fn has_bf16(&self) -> &'static Bf16 {
        self.bf16.expect("asked for by `bf16()` first")
    }

    /// Rounds `x` to bf16.
    pub(crate) fn bf16_round(&self, x: &[f32], y: &mut [u16]) {
        assert_eq!(x.len(), y.len());
        // SAFETY: lengths are checked above; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            (self.has_bf16().round)(x, y);
        }
    }

    /// As [`Table::nf4_decode`], rounded to bf16.
    pub(crate) fn bf16_decode_nf4(&self, w: &Nf4, start: usize, out: &mut [u16]) {
        let Some(decode) = self.has_bf16().decode_nf4 else {
            return self.by_f32(out, |at, wide| self.nf4_decode(w, start + at, wide));
        };
        assert!(start.checked_add(out.len()).is_some_and(|end| end <= w.len()));
        // SAFETY: bounds are checked above; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            decode(w, start, out);
        }
    }

    /// As [`Table::dense_decode`], rounded to bf16.
    pub(crate) fn bf16_decode_dense(
        &self,
        dtype: FloatType,
        bytes: &[u8],
        stride: usize,
        width: usize,
        out: &mut [u16],
    ) {
        if out.is_empty() {
            return;
        }
        let Some(decode) = self.has_bf16().decode_dense else {
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                let bytes = &bytes[row * stride * dtype.size()..];
                self.by_f32(out, |at, wide| {
                    self.dense_decode(dtype, &bytes[at * dtype.size()..], wide.len(), wide.len(), wide);
                });
            }
            return;
        };
        assert!(stride >= width && out.len().is_multiple_of(width));
        assert!(bytes.len() >= ((out.len() / width - 1) * stride + width) * dtype.size());
        // SAFETY: bounds are checked above; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            decode(dtype, bytes, stride, width, out);
        }
    }

    /// Rounds to `out` what `decode(at, part)` puts into parts of f32 that stay in first-level cache.
    pub(crate) fn by_f32(&self, out: &mut [u16], decode: impl Fn(usize, &mut [f32])) {
        let mut wide = [0.0; 512];
        for (i, out) in out.chunks_mut(wide.len()).enumerate() {
            let part = &mut wide[..out.len()];
            decode(512 * i, part);
            self.bf16_round(part, out);
        }
    }

    /// Arranges `w`: its rows as lanes if `rows`, else its columns.
    pub(crate) fn bf16_pack(&self, w: Bf16Rows, rows: bool, panel: &mut [u16]) {
        let bf16 = self.has_bf16();
        let (lanes, depth, pack) = match rows {
            true => (w.count, w.width, bf16.pack_rows),
            false => (w.width, w.count, bf16.pack_cols),
        };
        assert!(w.count == 0 || w.width <= w.stride && (w.count - 1) * w.stride + w.width <= w.values.len());
        assert!(lanes <= bf16.lanes && panel.len() >= depth.next_multiple_of(bf16.group) * bf16.lanes);
        // SAFETY: bounds are checked above; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            pack(w, panel);
        }
    }

    /// `c[t][col + i] = x[t] . lane i of the panel` for `i < n`, added to what is there if `add`.
    pub(crate) fn bf16_tile(&self, panel: &[u16], x: Bf16Rows, c: &mut [&mut [f32]], col: usize, n: usize, add: bool) {
        let bf16 = self.has_bf16();
        assert!(n <= bf16.lanes && panel.len().is_multiple_of(bf16.lanes * bf16.group) && c.len() == x.count);
        let depth = panel.len() / bf16.lanes;
        assert!(c.is_empty() || (c.len() - 1) * x.stride + depth <= x.values.len());
        assert!(c.iter().all(|row| col + n <= row.len()));
        // SAFETY: bounds are checked above; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            (bf16.tile)(panel, x, c, col, n, add);
        }
    }

    /// The loops of the light ops.
    pub(crate) fn light(&self) -> &'static Light {
        self.light
    }

    /// `c[i][at + j] += sum_k x[i, k] w[j, k]`.
    pub(crate) fn tile_dot(&self, x: Rows, w: Rows, c: &mut [&mut [f32]], at: usize) {
        assert!(x.count() == c.len() && x.width() == w.width());
        assert!(c.iter().all(|row| at + w.count() <= row.len()));
        // SAFETY: `Rows` checked its own bounds; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            (self.tile_dot)(x, w, c, at);
        }
    }

    /// `c[i][n] += sum_j coef(i, j) p[j, n]`.
    pub(crate) fn tile_axpy(&self, coef: Coefficients, p: Rows, c: &mut [&mut [f32]]) {
        assert!(coef.covers(c.len(), p.count()));
        assert!(c.iter().all(|row| row.len() == p.width()));
        // SAFETY: bounds are checked above; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            (self.tile_axpy)(coef, p, c);
        }
    }

    /// As [`Table::tile_axpy`] with the elements of a cache, before their scales.
    pub(crate) fn tile_axpy_narrow(&self, coef: Coefficients, p: Tile, c: &mut [&mut [f32]]) {
        assert!(coef.covers(c.len(), p.count));
        assert!(p.width <= p.stride && p.count.saturating_mul(p.stride * size(p.dtype)) <= p.bytes.len());
        assert!(c.iter().all(|row| row.len() == p.width));
        // SAFETY: bounds are checked above; `available()` hands out only tables that this CPU runs.
        #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
        unsafe {
            (self.tile_axpy_narrow)(coef, p, c);
        }
    }
}
