//! C3A (Chen et al. 2025): `y = x Wᵀ + (1 / in) C x`, `C` in blocks of `n` rows and columns that are circulant: the kernel `k` `[out /
//! n, in / n, n]` gives `C_ij[a, b] = k[i, j, (b - a) mod n]`. On waves of one frequency a circulant block is a turn with a scale,
//! so that it works there with two values a frequency (`circulant.rs`), and no matrix of the layer's size is ever there. Backward
//! computes the waves of `x` once more; the gradient goes from those values to `k` on the host.

use crate::adapter::fold::Fold;
use crate::adapter::made::Map;
use crate::adapter::method::{AdapterMethod, Settings, begin_with, check_divides, options_of, targets_in};
use crate::adapter::peft::{KeyUse, Keys, RETRAIN, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{Stored, TensorSpec, Tensors};
use crate::adapter::weight::LayerWeight;
use crate::error::{Error, Result};
use Use::{Default as OnlyDefault, Honoured, NoEffect};
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};
use std::f64::consts::TAU;
use std::ops::Range;

const PARTS: &[&str] = &["c3a_kernel"];

/// The keys of PEFT's C3A configs (0.21).
const KEYS: &[KeyUse] = &[
    ("bias", Honoured, ""),
    ("block_size", Honoured, ""),
    ("block_size_pattern", OnlyDefault, RETRAIN),
    ("init_weights", NoEffect, ""), // how it began
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("target_modules", Honoured, ""),
];

/// Settings of C3A.
#[derive(Clone, Debug, PartialEq)]
pub struct C3a {
    /// Rows and columns of a block (`block_size`).
    pub size: usize,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
}

/// The values of the blocks among waves.
struct Spectrum {
    size: usize,
}

impl Spectrum {
    /// Cosines and sines of all multiples of one turn over `n`.
    fn table(&self) -> Vec<(f64, f64)> {
        let of = |i: usize| TAU * i as f64 / self.size as f64;
        (0..self.size).map(|i| (of(i).cos(), of(i).sin())).collect()
    }

    /// Frequencies that have a cosine alone, and whether a frequency is such.
    fn is_single(&self, frequency: usize) -> bool {
        frequency == 0 || 2 * frequency == self.size
    }

    /// Rows and columns in a block of the values of one, in their order: of each frequency the one of the cosine, or cosine by
    /// cosine, sine by cosine, sine by sine and cosine by sine.
    fn places(&self) -> Vec<(usize, usize)> {
        let (mut places, mut at) = (Vec::new(), 0);
        for frequency in 0..=self.size / 2 {
            if self.is_single(frequency) {
                places.push((at, at));
                at += 1;
            } else {
                places.extend([(at, at), (at + 1, at), (at + 1, at + 1), (at, at + 1)]);
                at += 2;
            }
        }
        places
    }
}

/// The orthonormal basis of real waves `[n, n]`: of each frequency the cosine, then the sine.
fn basis([size, _]: [usize; 2]) -> Vec<f32> {
    let (own, n) = (Spectrum { size }, size as f64);
    let table = own.table();
    let mut rows = Vec::with_capacity(size * size);
    for frequency in 0..=size / 2 {
        let single = own.is_single(frequency);
        let scale = if single { n.recip().sqrt() } else { (2.0 / n).sqrt() };
        let of = |x: usize| table[frequency * x % size];
        rows.extend((0..size).map(|x| (scale * of(x).0) as f32));
        rows.extend((0..size).filter(|_| !single).map(|x| (scale * of(x).1) as f32));
    }
    rows
}

impl Map for Spectrum {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        let table = self.table();
        let mut values = Vec::with_capacity(2 * own[0].len());
        for kernel in own[0].chunks_exact(self.size) {
            for frequency in 0..=self.size / 2 {
                let sum = |(p, q): (f64, f64), (s, k): (usize, &f32)| {
                    let (cos, sin) = table[frequency * s % self.size];
                    (p + f64::from(*k) * cos, q + f64::from(*k) * sin)
                };
                let (p, q) = kernel.iter().enumerate().fold((0.0, 0.0), sum);
                let all = [p, -q, p, q].map(|v| v as f32);
                values.extend(&all[..if self.is_single(frequency) { 1 } else { 4 }]);
            }
        }
        Ok(vec![values])
    }

    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        let table = self.table();
        let of_block = self.places().len();
        let mut all = Vec::with_capacity(own[0].len());
        for grad in grads[0].chunks_exact(of_block) {
            let (mut dk, mut rest) = (vec![0.0_f64; self.size], grad);
            for frequency in 0..=self.size / 2 {
                let (own, after) = rest.split_at(if self.is_single(frequency) { 1 } else { 4 });
                rest = after;
                let g = |i: usize| own.get(i).map_or(0.0, |g| f64::from(*g));
                let (dp, dq) = (g(0) + g(2), g(3) - g(1));
                for (s, dk) in dk.iter_mut().enumerate() {
                    let (cos, sin) = table[frequency * s % self.size];
                    *dk += dp * cos + dq * sin;
                }
            }
            all.extend(dk.into_iter().map(|d| d as f32));
        }
        vec![all]
    }
}

/// `W + factor C`.
struct CirculantFold {
    kernel: Vec<f32>,
    size: usize,
    factor: f32,
}

impl Fold for CirculantFold {
    fn weight(&self, rows: Range<usize>, values: &mut [f32]) {
        let (n, cols) = (self.size, values.len() / rows.len().max(1));
        for (row, values) in rows.zip(values.chunks_exact_mut(cols.max(1))) {
            for (j, block) in values.chunks_exact_mut(n).enumerate() {
                let kernel = &self.kernel[(row / n * (cols / n) + j) * n..][..n];
                for (b, w) in block.iter_mut().enumerate() {
                    *w += self.factor * kernel[(b + n - row % n) % n];
                }
            }
        }
    }
}

impl AdapterMethod for C3a {
    const PEFT_TYPE: &'static str = "C3A";
    const NAME: &'static str = "C3A";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = PARTS;
    const STORED: Stored = Stored::F32;
    const HAS_STRENGTH: bool = true;
    const SETTINGS: &'static [&'static str] = &["targets", "options"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        Ok(Self { size: keys.whole("block_size", 1, 256)?, targets: Vec::new() })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let (method, layers): (Self, Vec<Param>) = begin_with(&[], settings, model)?;
        let mut sides = layers.iter().flat_map(|p| &model.params()[p.0 as usize].shape);
        match sides.find(|side| !side.is_multiple_of(method.size)) {
            Some(side) => {
                let expected = format!("a `block_size` that divides both sides of every layer, {side} among them");
                Err(Error::config("options", expected, method.size))
            }
            None => Ok((method, layers)),
        }
    }

    fn shapes(&self, _module: &str, [out, input]: [usize; 2]) -> Vec<Vec<usize>> {
        vec![vec![out / self.size, input / self.size, self.size]]
    }

    /// Zeros, so that it begins as the base: PEFT's default begins elsewhere.
    fn start(&self, spec: &TensorSpec, _part: usize, _module: usize, _seed: u64) -> Vec<f32> {
        vec![0.0; spec.values()]
    }

    fn plan(&self, module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let ([out, input], n) = (weight.shape(), self.size);
        [out, input].into_iter().try_for_each(|side| check_divides(module, side, n, "block_size"))?;
        let map = Spectrum { size: n };
        let of_block = map.places();
        let blocks = (0..out / n).flat_map(|i| (0..input / n).map(move |j| (i * n, j * n)));
        let places = blocks.flat_map(|(i, j)| of_block.iter().map(move |(r, c)| ((i + r) as u32, (j + c) as u32)));
        let (rows, cols): (Vec<u32>, Vec<u32>) = places.unzip();
        let (basis, values) = (Of::Pattern("waves", [n, n], basis), Of::Made(vec![rows.len()]));
        let factor = factor / input as f32;
        Ok(Plan::made(vec![Piece::Circulant { basis, values, rows, cols, factor }], map))
    }

    fn fold(&self, module: &str, layer: [usize; 2], tensors: &Tensors, factor: f32) -> Option<Box<dyn Fold>> {
        let kernel = tensors[&format!("{module}.{}", PARTS[0])].data.clone();
        layer.iter().all(|side| side.is_multiple_of(self.size)).then_some(())?;
        Some(Box::new(CirculantFold { kernel, size: self.size, factor: factor / layer[1] as f32 }))
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = options_of(&settings.options, &self.write());
        Settings { targets: self.targets.clone(), options, ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({"block_size": self.size, "block_size_pattern": {}})
    }

    fn describe(&self) -> (String, Value) {
        (format!("{} with blocks of {}", Self::NAME, self.size), json!({"block_size": self.size}))
    }
}
