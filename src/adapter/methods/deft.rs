//! DEFT (Kadhim et al. 2026): `W + Q (s R - Dᵀ W)`: a part of what W gives is taken away and another put in its place. `P` `[out, r]`
//! and `R` `[r, in]` are in the file; `Q = P` and `D = relu(P)`, or with `decomposition_method: qr` both are the orthonormal factor of
//! `P`. With `para` there is no `R` (PaRa). It runs as a low-rank term whose first factor is made with one product with the base's
//! weight, and once more after each step. Backward needs what a low-rank term does, and one more product with the weight for `P`.
//! Of `qr` the signs are those of Householder's reflections as LAPACK has them; such a file is not trained further.

use crate::adapter::fold::Fold;
use crate::adapter::made::Map;
use crate::adapter::method::{AdapterMethod, Settings, options_of, targets_in};
use crate::adapter::peft::{KeyUse, Keys, Use};
use crate::adapter::pieces::{Of, Piece, Plan};
use crate::adapter::square::orthonormal;
use crate::adapter::tensor::{Stored, TensorSpec, Tensors, transposed};
use crate::adapter::weight::LayerWeight;
use crate::error::{Error, Result};
use Use::{Default as OnlyDefault, Honoured, NoEffect};
use pocketlora_models::{Model, Param};
use serde_json::{Value, json};
use std::ops::Range;
use std::sync::OnceLock;

const PARTS: &[&str] = &["deft_P", "deft_R"];

/// The keys of PEFT's DEFT configs (0.21).
const KEYS: &[KeyUse] = &[
    ("alpha", Honoured, ""),
    ("bias", Honoured, ""),
    ("decomposition_method", Honoured, ""),
    ("deft_dropout", NoEffect, ""), // of training
    ("exclude_modules", Honoured, ""),
    ("fan_in_fan_out", OnlyDefault, "linear layers of the supported families are not transposed: set it to `false`"),
    ("init_scale", NoEffect, ""),   // how it began
    ("init_weights", NoEffect, ""), // the same
    ("layers_pattern", Honoured, ""),
    ("layers_to_transform", Honoured, ""),
    ("para", Honoured, ""),
    ("r", Honoured, ""),
    ("target_modules", Honoured, ""),
];

/// Settings of DEFT.
#[derive(Clone, Debug, PartialEq)]
pub struct Deft {
    /// Rank (`r`).
    pub rank: usize,
    /// `R` is multiplied with this over the rank (`alpha`), with 1 without it.
    pub alpha: Option<f64>,
    /// `Q` and `D` are the orthonormal factor of P.
    pub orthonormal: bool,
    /// There is no `R` (`para`).
    pub removes: bool,
    /// Suffixes of the adapted modules.
    pub targets: Vec<String>,
}

/// The first factor of the term, and with `qr` the second.
#[derive(Clone, Copy)]
struct Injection {
    rank: usize,
    scale: f32,
    orthonormal: bool,
    removes: bool,
}

impl Injection {
    /// `Q` and `D`, both `[out, r]`.
    fn factors(&self, p: &[f32]) -> [Vec<f32>; 2] {
        if self.orthonormal {
            let q = orthonormal(p, self.rank);
            return [q.clone(), q];
        }
        [p.to_vec(), p.iter().map(|p| p.max(0.0)).collect()]
    }

    /// `s R - M`, given `M`.
    fn less(&self, r: Option<&[f32]>, mut m: Vec<f32>) -> Vec<f32> {
        m.iter_mut().for_each(|m| *m = -*m);
        for (m, r) in m.iter_mut().zip(r.unwrap_or_default()) {
            *m += self.scale * r;
        }
        m
    }
}

impl Map for Injection {
    fn forward(&self, own: &[&[f32]], weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        let [q, d] = self.factors(own[0]);
        let [out, _] = weight.shape();
        let a = self.less(own.get(1).copied(), weight.back(&transposed(&d, out))?);
        Ok(if self.orthonormal { vec![a, q] } else { vec![a] })
    }

    fn backward(&self, _own: &[&[f32]], _grads: &[&[f32]]) -> Vec<Vec<f32>> {
        unreachable!("it asks for the weight")
    }

    fn backward_on(&self, own: &[&[f32]], grads: &[&[f32]], weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        // A = s R - relu(P)ᵀ W
        let product = transposed(&weight.times(grads[0])?, self.rank);
        let dp = own[0].iter().zip(product).map(|(p, g)| if *p > 0.0 { -g } else { 0.0 }).collect();
        let dr = (!self.removes).then(|| grads[0].iter().map(|g| self.scale * g).collect());
        Ok([dp].into_iter().chain(dr).collect())
    }
}

/// `W + factor Q (s R - Dᵀ W)`; the product with W is computed once, when all rows are there.
struct DeftFold {
    map: Injection,
    q: Vec<f32>,
    d: Vec<f32>,
    r: Option<Vec<f32>>,
    out: usize,
    factor: f32,
    made: OnceLock<Vec<f32>>,
}

impl Fold for DeftFold {
    fn weight(&self, rows: Range<usize>, values: &mut [f32]) {
        let (cols, rank) = (values.len() / rows.len().max(1), self.map.rank);
        let made = self.made.get_or_init(|| {
            let mut m = vec![0.0; rank * cols];
            for (row, values) in values.chunks_exact(cols.max(1)).enumerate() {
                for (d, m) in self.d[row * rank..].iter().zip(m.chunks_exact_mut(cols.max(1))) {
                    m.iter_mut().zip(values).for_each(|(m, w)| *m += d * w);
                }
            }
            self.map.less(self.r.as_deref(), m)
        });
        for (row, values) in rows.zip(values.chunks_exact_mut(cols.max(1))) {
            for (q, a) in self.q[row * rank..][..rank].iter().zip(made.chunks_exact(cols.max(1))) {
                values.iter_mut().zip(a).for_each(|(w, a)| *w += self.factor * q * a);
            }
        }
    }

    fn span(&self, rows: Range<usize>) -> Range<usize> {
        if self.made.get().is_some() { rows } else { 0..self.out }
    }
}

impl Deft {
    fn map(&self) -> Injection {
        let scale = self.alpha.filter(|alpha| *alpha != 0.0).map_or(1.0, |alpha| alpha / self.rank as f64) as f32;
        Injection { rank: self.rank, scale, orthonormal: self.orthonormal, removes: self.removes }
    }
}

impl AdapterMethod for Deft {
    const PEFT_TYPE: &'static str = "DEFT";
    const NAME: &'static str = "DEFT";
    const KEYS: &'static [KeyUse] = KEYS;
    const PARTS: &'static [&'static str] = PARTS;
    const STORED: Stored = Stored::F32;
    const HAS_STRENGTH: bool = true;
    // Merged one after the other, the second would take away from what the first has changed.
    const ADDS_UP: bool = false;
    const SETTINGS: &'static [&'static str] = &["rank", "targets", "options"];

    fn read(keys: &Keys<'_>) -> Result<Self> {
        let orthonormal = match keys.text("decomposition_method")?.as_deref() {
            None | Some("relu") => false,
            Some("qr") => true,
            Some(_) => return Err(keys.wrong("decomposition_method", "`relu` or `qr`")),
        };
        let alpha = keys.get("alpha").map(|_| keys.number("alpha", None)).transpose()?;
        let (rank, removes) = (keys.whole("r", 1, 8)?, keys.flag("para")?);
        Ok(Self { rank, alpha, orthonormal, removes, targets: Vec::new() })
    }

    fn begin(_settings: &Settings, _model: &dyn Model) -> Result<(Self, Vec<Param>)> {
        Err(Error::config("method", "a method that can be begun here, or `--init` with an adapter of PEFT", "deft"))
    }

    fn parts(&self, _module: &str) -> &'static [&'static str] {
        if self.removes { &PARTS[..1] } else { PARTS }
    }

    fn shapes(&self, _module: &str, [out, input]: [usize; 2]) -> Vec<Vec<usize>> {
        vec![vec![out, self.rank], vec![self.rank, input]]
    }

    fn start(&self, spec: &TensorSpec, _part: usize, _module: usize, _seed: u64) -> Vec<f32> {
        vec![0.0; spec.values()]
    }

    fn plan(&self, _module: &str, weight: &dyn LayerWeight, factor: f32) -> Result<Plan> {
        let ([out, input], rank) = (weight.shape(), self.rank);
        let b = if self.orthonormal { Of::Made(vec![out, rank]) } else { Of::Part(PARTS[0]) };
        Ok(Plan::made(vec![Piece::LowRank { a: Of::Made(vec![rank, input]), b, factor }], self.map()))
    }

    fn fold(&self, module: &str, [out, _]: [usize; 2], tensors: &Tensors, factor: f32) -> Option<Box<dyn Fold>> {
        let part = |part: &str| tensors.get(&format!("{module}.{part}")).map(|tensor| tensor.data.clone());
        let [q, d] = self.map().factors(&part(PARTS[0])?);
        let r = part(PARTS[1]);
        Some(Box::new(DeftFold { map: self.map(), q, d, r, out, factor, made: OnceLock::new() }))
    }

    fn is_final(&self) -> Option<&'static str> {
        self.orthonormal.then_some("no gradient goes through its `qr` here")
    }

    fn settings(&self, settings: Settings) -> Settings {
        let options = options_of(&settings.options, &self.write());
        Settings { rank: self.rank, targets: self.targets.clone(), options, ..settings }
    }

    targets_in!(targets);

    fn write(&self) -> Value {
        let method = if self.orthonormal { "qr" } else { "relu" };
        json!({
            "alpha": self.alpha.map(crate::adapter::peft::number), "decomposition_method": method, "deft_dropout": 0.0,
            "init_scale": 1.0, "para": self.removes, "r": self.rank,
        })
    }

    fn describe(&self) -> (String, Value) {
        (format!("{} of rank {}", Self::NAME, self.rank), json!({"rank": self.rank}))
    }
}
