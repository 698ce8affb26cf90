//! How a fresh LoRA begins, as PEFT's `init_lora_weights` calls it.
//!
//! Some beginnings change what the model says: `s B A` is not zero, and PEFT takes it away from the base's weight,
//! which is then another one. Here the base stays as it is. The values of the beginning, `A0` and `B0`, are kept beside
//! `A` and `B`, and the layer gives `x Wᵀ + s (x Aᵀ) Bᵀ - s (x A0ᵀ) B0ᵀ`: the gradients are those that PEFT has. What
//! is saved is a plain LoRA of twice the rank for the unchanged base, as PEFT's conversion writes one. That has `[A;
//! A0]` and `[B, -B0]`; the same product is written here as `[A; A - A0]` and `[B - B0, B0]`, of which f16 keeps what
//! was learned to its own digits rather than to those of what it began with.
//!
//! | name | `s B0 A0` |
//! |---|---|
//! | `pissa`, `pissa_niter_N` | the largest singular values of W (Meng et al. 2024), by a randomized decomposition of N rounds |
//! | `milora` | the smallest ones (Wang et al. 2024) |
//! | `olora` | `s Q_r R_r`, the first columns and rows of `W = Q R` (Büyükakyüz 2024) |
//! | `corda`, `corda_kpm` | of the largest or smallest singular values of `W C`, C the inputs' covariance (Yang et al. 2024) |
//! | `lora_ga` | of singular vectors of the gradient by W (Wang et al. 2024) |
//! | `loftq` | the largest singular values of what rounding took from W (Li et al. 2023): it is added, and not taken away |
//! | `orthogonal` | zero, of an A and a B that are not: they meet in orthogonal halves of the ranks |
//! | `eva` | zero: A has the principal components of the inputs (Paischer et al. 2024), B is zero |
//! | `gaussian`, `true` | zero: A is normal or uniform, B is zero |

mod activations;
mod begin;
mod fit;
mod gradients;
mod loftq;
mod range;
mod weights;

pub(crate) use gradients::Sketch;
pub(super) use range::Operator;
pub(super) use weights::singular;
use weights::{from_weight, orthogonal_halves};

use super::svd::{Columns, Svd, dot, orthogonal};
use super::tensor::{HostTensor, Tensors};
use crate::error::{Error, ErrorCode, Result};
use crate::rng::normals;
use range::floats;

/// Parts of a module that hold what it began with; they are in no file.
pub(super) const FIRST: [&str; 2] = ["lora_A0.weight", "lora_B0.weight"];
/// Whether the tensor `name` holds what a module began with.
pub(crate) fn is_first(name: &str) -> bool {
    FIRST.iter().any(|part| name.strip_suffix(part).is_some_and(|module| module.ends_with('.')))
}

/// Hears how much of how much a beginning has done; its answer is whether that goes on.
pub(crate) type Progress<'a> = dyn FnMut(usize, usize) -> bool + 'a;

/// Tells `progress`.
///
/// # Errors
/// It says that this was enough.
pub(crate) fn go_on(progress: &mut Progress<'_>, done: usize, all: usize) -> Result<()> {
    if progress(done, all) {
        return Ok(());
    }
    Err(Error::new(ErrorCode::Cancelled, "training", "stopped before the adapter had what it begins with"))
}

/// Rounds of the randomized decomposition where none are asked for.
const ITERATIONS: usize = 8;

/// A layer's shape `[out, in]`, and the rank that it gets.
type Layer = ([usize; 2], usize);

/// How a fresh LoRA begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Init {
    /// A uniform, B zero.
    #[default]
    Plain,
    /// A normal with the deviation `1 / r`, B zero.
    Gaussian,
    /// In orthogonal halves of the ranks.
    Orthogonal,
    /// With the largest singular values of the weight, after so many rounds.
    Pissa(usize),
    /// With the smallest ones.
    Milora,
    /// With the first columns and rows of its QR decomposition.
    Olora,
    /// With what rounding to 4 bits took away.
    Loftq,
    /// With the principal components of the inputs.
    Eva,
    /// With the weight as the inputs see it; whether its smallest singular values, so that it keeps what it knows.
    Corda(bool),
    /// With singular vectors of the gradient.
    LoraGa,
}

impl Init {
    /// All names that have no number.
    const NAMES: [(&'static str, Self); 11] = [
        ("true", Self::Plain),
        ("gaussian", Self::Gaussian),
        ("orthogonal", Self::Orthogonal),
        ("pissa", Self::Pissa(ITERATIONS)),
        ("milora", Self::Milora),
        ("olora", Self::Olora),
        ("loftq", Self::Loftq),
        ("eva", Self::Eva),
        ("corda", Self::Corda(false)),
        ("corda_kpm", Self::Corda(true)),
        ("lora_ga", Self::LoraGa),
    ];

    /// The one that is called `name`.
    ///
    /// # Errors
    /// There is none; all are named.
    pub fn named(name: &str) -> Result<Self> {
        let known = Self::NAMES.iter().find(|(own, _)| *own == name).map(|(_, init)| *init);
        let rounds = || name.strip_prefix("pissa_niter_")?.parse().ok().filter(|n| (1..=64).contains(n));
        known.or_else(|| rounds().map(Self::Pissa)).ok_or_else(|| {
            let names = Self::NAMES.map(|(name, _)| name).join("`, `");
            let expected = format!("one of `{names}`, or `pissa_niter_N` with N from 1 to 64");
            Error::config("init-lora-weights", expected, name)
        })
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> String {
        let known = Self::NAMES.iter().find(|(_, init)| *init == self);
        match self {
            Self::Pissa(rounds) if known.is_none() => format!("pissa_niter_{rounds}"),
            _ => known.map_or_else(String::new, |(name, _)| (*name).to_owned()),
        }
    }

    /// Whether what it begins with is taken away, so that the model says at first what the base does.
    #[must_use]
    pub fn is_taken_away(self) -> bool {
        matches!(self, Self::Pissa(_) | Self::Milora | Self::Olora | Self::Corda(_) | Self::LoraGa)
    }

    /// Whether it looks at some of what is learned.
    #[must_use]
    pub fn reads_data(self) -> bool {
        matches!(self, Self::Eva | Self::Corda(_) | Self::LoraGa)
    }

    /// The rank up to which it needs directions of a layer's shorter side, for `rank` ranks.
    pub(super) fn directions(self, rank: usize) -> usize {
        match self {
            Self::Plain | Self::Gaussian | Self::Orthogonal => 0,
            Self::LoraGa => 2 * rank,
            _ => rank,
        }
    }

    /// Bytes that beginning takes beside the adapter, for layers `[out, in]` with their ranks, and texts of so many
    /// tokens of `hidden` values each; without what passes take.
    pub(crate) fn bytes(self, layers: &[Layer], hidden: usize, tokens: usize) -> u64 {
        let sides = |[out, input]: [usize; 2]| (out + input, out.min(input));
        // Rows as the device and the host have them in f32, and those that are made orthogonal in f64.
        let products = |width: usize, both: usize| (width * both * (4 + 4 + 8)) as u64;
        let largest = |(shape, rank): &Layer| {
            let (both, side) = sides(*shape);
            products(range::width(*rank, side), both)
        };
        let smallest = |layer: &Layer| largest(layer) + 8 * sides(layer.0).1.pow(2) as u64;
        let most = |of: &dyn Fn(&Layer) -> u64| layers.iter().map(of).max().unwrap_or(0);
        match self {
            Self::Plain | Self::Gaussian | Self::Orthogonal => 0,
            Self::Pissa(_) | Self::Olora => most(&largest),
            Self::Milora => most(&smallest),
            Self::Loftq => most(&|layer| largest(layer) + 4 * layer.0.iter().product::<usize>() as u64),
            // The directions of all layers at once: in f64, and on the device with what is summed up along them.
            Self::Eva => {
                layers.iter().map(|(shape, r)| 16 * (activations::width(*r, shape[1]) * shape[1]) as u64).sum()
            }
            // The covariance in f32 and decomposed in f64; the hidden states of all texts, in and out of a layer.
            Self::Corda(_) => {
                most(&|layer| smallest(layer) + 16 * layer.0[1].pow(2) as u64) + 8 * (hidden * tokens) as u64
            }
            // A and B of the probe with their gradients, on the device and read; what is known of rows, and of columns in f64.
            Self::LoraGa => {
                let of = |(shape, r): &Layer| {
                    let [out, input] = *shape;
                    (gradients::width(*r, *shape) * (16 * input + 20 * out)) as u64
                };
                layers.iter().map(of).sum()
            }
        }
    }
}

/// `A` and `B` with `s B A = U S Vᵀ`, as PEFT has them: `sqrt(S / s) Vᵀ` and `U sqrt(S / s)`.
fn halves(svd: &Svd, scale: f32) -> [Vec<f32>; 2] {
    let root = |s: &f64| (s / f64::from(scale)).max(0.0).sqrt();
    let roots: Vec<f64> = svd.s.iter().map(root).collect();
    let scaled = |columns: &Columns| -> Columns {
        columns.iter().zip(&roots).map(|(c, root)| c.iter().map(|v| v * root).collect()).collect()
    };
    [floats(&scaled(&svd.v)), transposed(&floats(&scaled(&svd.u)), svd.s.len())]
}

/// Orthonormal `columns`, the last of which may be zero, with some other direction in place of such: an `A` of which a
/// row is zero beside a `B` of zeros would never learn it.
fn filled(mut columns: Columns, seed: u64) -> Columns {
    if columns.iter().all(|column| dot(column, column) > 0.5) {
        return columns;
    }
    for (column, i) in columns.iter_mut().zip(0..) {
        if dot(column, column) <= 0.5 {
            *column = normals(&[seed, i], 1.0, column.len()).into_iter().map(f64::from).collect();
        }
    }
    orthogonal(columns).0
}

/// The transpose of a matrix of `rows` rows.
fn transposed(x: &[f32], rows: usize) -> Vec<f32> {
    let cols = x.len() / rows.max(1);
    (0..cols).flat_map(|col| (0..rows).map(move |row| x[row * cols + col])).collect()
}

/// Puts `values`, A `[r, in]` and B `[out, r]`, into the module at the path `module`, and beside them as what it began
/// with where that has a place.
pub(super) fn put(tensors: &mut Tensors, module: &str, [a, b]: [Vec<f32>; 2]) {
    for ((own, first), values) in ["lora_A.weight", "lora_B.weight"].iter().zip(FIRST).zip([a, b]) {
        if let Some(first) = tensors.get_mut(&format!("{module}.{first}")) {
            first.data.clone_from(&values);
        }
        if let Some(own) = tensors.get_mut(&format!("{module}.{own}")) {
            own.data = values;
        }
    }
}

/// Makes of `A`, `B` and what they once were the parts of a plain LoRA of twice the rank with `now B A - then B0 A0`,
/// which has `[A; A - A0]` and `[now B - then B0, then B0]`.
pub(super) fn grown(tensors: &mut Tensors, now: f32, then: f32) {
    let firsts: Vec<String> =
        tensors.keys().filter_map(|name| name.strip_suffix(FIRST[0]).map(str::to_owned)).collect();
    for module in firsts {
        let parts = ["lora_A.weight", FIRST[0], "lora_B.weight", FIRST[1]];
        let [a, a0, b, b0] = parts.map(|part| tensors.remove(&format!("{module}{part}")));
        let (Some(a), Some(a0), Some(b), Some(b0)) = (a, a0, b, b0) else { continue };
        let rank = a.shape[0];
        let moved_a: Vec<f32> = a.data.iter().zip(&a0.data).map(|(a, a0)| a - a0).collect();
        let rows = b.data.chunks(rank).zip(b0.data.chunks(rank));
        let wide = rows.flat_map(|(b, b0)| {
            let moved = b.iter().zip(b0).map(|(b, b0)| now * b - then * b0);
            moved.chain(b0.iter().map(|b0| then * b0)).collect::<Vec<_>>()
        });
        let wide = wide.collect();
        let shape_a = vec![2 * rank, a.shape[1]];
        tensors
            .insert(format!("{module}{}", parts[0]), HostTensor { shape: shape_a, data: [a.data, moved_a].concat() });
        tensors.insert(format!("{module}{}", parts[2]), HostTensor { shape: vec![b.shape[0], 2 * rank], data: wide });
    }
}
