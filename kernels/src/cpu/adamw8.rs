//! AdamW whose moments rest in 8 bits (8-bit optimizers, Dettmers et al. 2021, <https://arxiv.org/abs/2110.02861>):
//! blocks of 256 elements, scaled by their absmax and coded with the dynamic maps of [`crate::quant`], the signed one
//! for the first moment and the unsigned one for the second.
//!
//! A step decodes a block, moves it in f32 as [`super::adamw`] does, and codes it anew: nearest code, the lower one at a
//! tie, nothing random. The update uses the moments before they are rounded, as bitsandbytes does.

use super::Cpu;
use super::adamw::{CHUNK, Factors, elements};
use super::buffer::reserve;
use super::split::run;
use crate::quant::{dynamic_map, unsigned_dynamic_map};
use crate::{AdamW, Error};
use std::sync::LazyLock;

/// Elements that share an absmax.
pub(crate) const BLOCK: usize = crate::MOMENT_BLOCK;

/// The values of the codes, and the borders between them.
pub(crate) struct DynamicMap {
    values: [f32; 256],
    midpoints: [f32; 255],
}

impl DynamicMap {
    fn new(values: [f32; 256]) -> Self {
        Self { values, midpoints: std::array::from_fn(|i| (values[i] + values[i + 1]) / 2.0) }
    }

    /// The nearest code: eight halvings without a branch.
    #[inline(always)]
    fn code(&self, x: f32) -> u8 {
        let mut at = 0;
        let mut step = 128;
        while step > 0 {
            // `at + step - 1` is at most 254.
            at += if self.midpoints[at + step - 1] < x { step } else { 0 };
            step /= 2;
        }
        at as u8
    }
}

static SIGNED: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(dynamic_map()));
static UNSIGNED: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(unsigned_dynamic_map()));

/// An array in 8 bits, zeros at first.
pub struct Codes {
    pub(super) codes: Vec<u8>,
    /// One for each block.
    pub(super) absmax: Vec<f32>,
    map: &'static DynamicMap,
}

impl Codes {
    pub(super) fn zeros(len: usize, signed: bool) -> Result<Self, Error> {
        let (mut codes, mut absmax) = (reserve(len)?, reserve(len.div_ceil(BLOCK))?);
        codes.resize(len, 0);
        absmax.resize(len.div_ceil(BLOCK), 0.0);
        Ok(Self { codes, absmax, map: if signed { &SIGNED } else { &UNSIGNED } })
    }

    fn blocks(&mut self) -> impl Iterator<Item = Blocks<'_>> {
        let map = self.map;
        let chunks = self.codes.chunks_mut(CHUNK).zip(self.absmax.chunks_mut(CHUNK / BLOCK));
        chunks.map(move |(codes, absmax)| Blocks { codes, absmax, map })
    }
}

/// Whole blocks of an array, but for the last one's tail.
pub(crate) struct Blocks<'a> {
    codes: &'a mut [u8],
    absmax: &'a mut [f32],
    map: &'static DynamicMap,
}

impl Blocks<'_> {
    #[inline(always)]
    fn decode(&self, block: usize, out: &mut [f32]) {
        let codes = &self.codes[block * BLOCK..][..out.len()];
        for (out, code) in out.iter_mut().zip(codes) {
            *out = self.map.values[usize::from(*code)] * self.absmax[block];
        }
    }

    #[inline(always)]
    fn encode(&mut self, block: usize, x: &[f32]) {
        let absmax = x.iter().fold(0.0f32, |most, x| if x.abs() > most { x.abs() } else { most });
        self.absmax[block] = absmax;
        let codes = &mut self.codes[block * BLOCK..][..x.len()];
        if absmax == 0.0 {
            // Whatever the code, its value is zero.
            return codes.fill(0);
        }
        for (code, x) in codes.iter_mut().zip(x) {
            *code = self.map.code(x / absmax);
        }
    }
}

/// As [`super::adamw::step`] on moments in 8 bits.
pub(crate) fn step(cpu: &Cpu, settings: &AdamW, grad: &[f32], param: &mut [f32], m: &mut Codes, v: &mut Codes) {
    assert!(grad.len() == param.len() && m.codes.len() == param.len() && v.codes.len() == param.len());
    let (factors, light) = (Factors::new(settings), cpu.table.light());
    let chunks = param.chunks_mut(CHUNK).zip(grad.chunks(CHUNK)).zip(m.blocks().zip(v.blocks())).collect();
    run(&cpu.team, chunks, false, |((param, grad), (m, v))| light.adamw8(&factors, grad, param, m, v));
}

/// The blocks of one task.
#[inline(always)]
pub(super) fn blocks(f: &Factors, grad: &[f32], param: &mut [f32], mut m: Blocks<'_>, mut v: Blocks<'_>) {
    let (mut first, mut second) = ([0.0; BLOCK], [0.0; BLOCK]);
    for (i, (param, grad)) in param.chunks_mut(BLOCK).zip(grad.chunks(BLOCK)).enumerate() {
        let (first, second) = (&mut first[..param.len()], &mut second[..param.len()]);
        m.decode(i, first);
        v.decode(i, second);
        elements(f, grad, param, first, second);
        m.encode(i, first);
        v.encode(i, second);
    }
}
