//! FourierFT (Gao et al. 2024): `W + s Re(ifft2(F))`, where `F` `[out, in]` has the trained values `c` `[n]` at `n` places that the
//! config's seed draws, and zeros elsewhere: `W[a, b] += s / (out in) sum_k c_k cos(2 pi (u_k a / out + v_k b / in))`. It runs as
//! a low-rank term: of the layer's shorter side the waves that occur, cosines and sines, are one factor and stay as they are; what
//! the values make of the other side's waves is the other one. So it never has more ranks than the layer. Backward needs what a
//! low-rank term does, and goes from that factor to `c` on the host.

use crate::adapter::made::Map;
use crate::adapter::method::{AdapterMethod, Settings, begin_with, options_of, targets_in};
use crate::adapter::peft::{KeyUse, Keys, RETRAIN, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::tensor::{Stored, TensorSpec, transposed};
use crate::adapter::torch_rng::TorchRng;
use crate::adapter::weight::LayerWeight;
use crate::error::{Error, ErrorCode, Result};
use Use::{Default as OnlyDefault, Honoured, NoEffect};
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::f64::consts::TAU;

/// The keys of PEFT's FourierFT configs (0.21).
const KEYS: &[KeyUse] = &[
    ("bias", Honoured, ""),
    ("exclude_modules", Honoured, ""),
    ("fan_in_fan_out", OnlyDefault, "linear layers of the supported families are not transposed: set it to `false`"),
    ("init_weights", NoEffect, ""), // how it began
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("n_frequency", Honoured, ""),
    ("n_frequency_pattern", OnlyDefault, RETRAIN),
    ("random_loc_seed", Honoured, ""),
    ("scaling", Honoured, ""),
    ("target_modules", Honoured, ""),
];

/// Settings of FourierFT.
#[derive(Clone, Debug, PartialEq)]
pub struct Fourierft {
    /// Trained values of each layer (`n_frequency`).
    pub frequencies: usize,
    /// What draws their places (`random_loc_seed`).
    pub seed: u64,
    /// On the whole (`scaling`).
    pub scaling: f64,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
}

/// Where a value goes.
struct Place {
    /// The ranks of the cosine and, unless that is zero everywhere, of the sine on the side of the fixed waves.
    ranks: (usize, Option<usize>),
    /// What the sine is multiplied with.
    sign: f64,
    /// Its frequency on the other side.
    other: usize,
}

/// The two factors.
struct Waves {
    /// `[out, in]`
    layer: [usize; 2],
    /// The side whose waves stay as they are: that of outputs, or that of inputs.
    by_outputs: bool,
    /// Frequencies of the fixed waves, and for each rank which one it is and whether it is the sine.
    fixed: Vec<(usize, bool)>,
    places: Vec<Place>,
}

impl Waves {
    fn new(layer: [usize; 2], count: usize, seed: u64) -> Self {
        let [out, input] = layer;
        let by_outputs = out <= input;
        let side = if by_outputs { out } else { input };
        let drawn = TorchRng::new(seed).permuted(out * input, count);
        let pairs: Vec<(usize, usize)> = drawn.into_iter().map(|at| (at / input, at % input)).collect();
        let pairs = pairs.into_iter().map(|(u, v)| if by_outputs { (u, v) } else { (v, u) });
        let (mut ranks, mut fixed) = (BTreeMap::new(), Vec::new());
        let place = |(own, other): (usize, usize)| {
            // A wave and the one that runs the other way are the same two ranks.
            let folded = own.min((side - own) % side);
            let ranks = *ranks.entry(folded).or_insert_with(|| {
                fixed.push((folded, false));
                let cosine = fixed.len() - 1;
                let has_sine = folded > 0 && 2 * folded != side;
                if has_sine {
                    fixed.push((folded, true));
                }
                (cosine, has_sine.then_some(cosine + 1))
            });
            // cos(x + y) = cos x cos y - sin x sin y
            Place { ranks, sign: if folded == own { -1.0 } else { 1.0 }, other }
        };
        let places = pairs.map(place).collect();
        Self { layer, by_outputs, fixed, places }
    }

    /// Lengths of the side of the fixed waves, and of the other.
    fn sides(&self) -> [usize; 2] {
        let [out, input] = self.layer;
        if self.by_outputs { [out, input] } else { [input, out] }
    }

    /// Cosines and sines of all multiples of one turn over `n`.
    fn table(n: usize) -> Vec<(f64, f64)> {
        let of = |i: usize| TAU * i as f64 / n as f64;
        (0..n).map(|i| (of(i).cos(), of(i).sin())).collect()
    }
}

impl Map for Waves {
    fn forward(&self, own: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        let [side, length] = self.sides();
        let (ranks, own_waves, waves) = (self.fixed.len(), Self::table(side), Self::table(length));
        let fixed = self.fixed.iter().flat_map(|(frequency, sine)| {
            let of = |x: usize| own_waves[frequency * x % side];
            (0..side).map(move |x| if *sine { of(x).1 } else { of(x).0 } as f32).collect::<Vec<f32>>()
        });
        let fixed: Vec<f32> = fixed.collect();
        let mut made = vec![0.0_f64; ranks * length];
        for (place, c) in self.places.iter().zip(own[0]) {
            for x in 0..length {
                let (cos, sin) = waves[place.other * x % length];
                made[place.ranks.0 * length + x] += f64::from(*c) * cos;
                if let Some(sine) = place.ranks.1 {
                    made[sine * length + x] += place.sign * f64::from(*c) * sin;
                }
            }
        }
        let made: Vec<f32> = made.into_iter().map(|v| v as f32).collect();
        Ok(if self.by_outputs { vec![made, transposed(&fixed, ranks)] } else { vec![fixed, transposed(&made, ranks)] })
    }

    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>> {
        let [_, length] = self.sides();
        let (ranks, waves) = (self.fixed.len(), Self::table(length));
        let made = if self.by_outputs { grads[0].to_vec() } else { transposed(grads[1], length) };
        debug_assert_eq!((made.len(), own[0].len()), (ranks * length, self.places.len()));
        let of = |place: &Place| {
            let all = (0..length).map(|x| {
                let (cos, sin) = waves[place.other * x % length];
                let turned = place.ranks.1.map_or(0.0, |sine| place.sign * sin * f64::from(made[sine * length + x]));
                cos * f64::from(made[place.ranks.0 * length + x]) + turned
            });
            all.sum::<f64>() as f32
        };
        vec![self.places.iter().map(of).collect()]
    }
}

impl AdapterMethod for Fourierft {
    const PEFT_TYPE: &'static str = "FOURIERFT";
    const NAME: &'static str = "FourierFT";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = &["fourierft_spectrum"];
    const STORED: Stored = Stored::F32;
    const HAS_STRENGTH: bool = true;
    const SETTINGS: &'static [&'static str] = &["targets", "options"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let seed = keys.get("random_loc_seed").map_or(Some(777), Value::as_u64);
        let seed = seed.ok_or_else(|| keys.wrong("random_loc_seed", "a whole number from 0"))?;
        let (frequencies, scaling) = (keys.whole("n_frequency", 1, 1000)?, keys.number("scaling", Some(150.0))?);
        Ok(Self { frequencies, seed, scaling, targets: Vec::new() })
    }

    fn begin(settings: &Settings, model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        let (method, layers): (Self, Vec<Param>) = begin_with(&[], settings, model)?;
        let sizes = layers.iter().map(|p| model.params()[p.0 as usize].shape.iter().product::<usize>());
        match sizes.min().filter(|size| *size < method.frequencies) {
            Some(size) => {
                let expected = format!("an `n_frequency` up to the {size} values of the smallest layer");
                Err(Error::config("options", expected, method.frequencies))
            }
            None => Ok((method, layers)),
        }
    }

    fn shapes(&self, _module: &str, _layer: [usize; 2]) -> Vec<Vec<usize>> {
        vec![vec![self.frequencies]]
    }

    /// Zeros, so that it begins as the base: PEFT's default begins elsewhere.
    fn start(&self, spec: &TensorSpec, _part: usize, _module: usize, _seed: u64) -> Vec<f32> {
        vec![0.0; spec.values()]
    }

    fn plan(&self, module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let [out, input] = weight.shape();
        if self.frequencies > out * input {
            let message = format!(
                "expected a layer of {} values or more, for `n_frequency`, got `[{out}, {input}]`; use the base that the \
                 adapter was trained on",
                self.frequencies
            );
            return Err(Error::new(ErrorCode::AdapterMismatch, format!("module `{module}`"), message));
        }
        let waves = Waves::new([out, input], self.frequencies, self.seed);
        let ranks = waves.fixed.len();
        let factor = factor * (self.scaling / (out * input) as f64) as f32;
        let (a, b) = (Of::Made(vec![ranks, input]), Of::Made(vec![out, ranks]));
        Ok(Plan::made(vec![Piece::LowRank { a, b, factor }], waves))
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = options_of(&settings.options, &self.write());
        Settings { targets: self.targets.clone(), options, ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        json!({
            "n_frequency": self.frequencies, "n_frequency_pattern": {}, "random_loc_seed": self.seed,
            "scaling": crate::adapter::peft::number(self.scaling),
        })
    }

    fn describe(&self) -> (String, Value) {
        (format!("{} of {} values a layer", Self::NAME, self.frequencies), json!({"n_frequency": self.frequencies}))
    }
}
