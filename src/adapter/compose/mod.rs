//! Several LoRA adapters as one: what PEFT's `add_weighted_adapter` makes of them, module by module. With `s` = alpha / rank
//! of an adapter and `w` its weight:
//!
//! | combination | result |
//! |---|---|
//! | linear | `A = sum of sign(w s) sqrt\|w s\| A_i`, `B = sum of sqrt\|w s\| B_i`: not the sum of the changes, cross terms appear |
//! | cat | rows `w s A_i` and columns `B_i` one after the other: the sum of the changes, exactly |
//! | svd | the sum of the changes `w s B_i A_i`, of which the largest singular values are kept |
//! | magnitude_prune | as linear, of the largest values of each A and B |
//! | ties | as that, without values whose sign is not the elected one (Yadav et al. 2023) |
//! | dare_linear, dare_ties | as linear and as ties, of values kept by chance and made larger for it (Yu et al. 2023) |
//! | *_svd | the same with the changes in place of A and B, and as svd from there |
//!
//! The result has a scale of 1 at every module. Weights below zero take away (task arithmetic, Ilharco et al. 2023).

mod bounded;
mod combine;
#[cfg(test)]
mod tests;
mod write;

pub(crate) use bounded::low_rank_sum;
pub use write::{Composed, compose};
pub(super) use write::{check_place, is_adapter_alone, texts, write_texts};

use super::experts::is_fused;
use super::method::EMBEDDING;
use super::methods::lora::Lora;
use super::svd::{self, Columns, Svd};
use super::{AdapterFile, HostTensor, Method, mark};
use crate::checksum::add;
use crate::error::{Error, ErrorCode, Result};
use crate::rng::{Rng, mix};
use combine::{Prune, combined};

/// How adapters are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Combination {
    /// The weighted sums of A and of B.
    Linear,
    /// All ranks beside each other.
    Cat,
    /// The sum of the changes, cut to a rank.
    Svd,
    /// Pruned sums of the values whose sign was elected.
    Ties,
    /// The same with the changes.
    TiesSvd,
    /// Sums of values that are kept by chance.
    DareLinear,
    /// As [`Combination::Ties`] with values that are kept by chance.
    DareTies,
    /// As [`Combination::DareLinear`] with the changes.
    DareLinearSvd,
    /// As [`Combination::DareTies`] with the changes.
    DareTiesSvd,
    /// Sums of the largest values.
    MagnitudePrune,
    /// The same with the changes.
    MagnitudePruneSvd,
}

impl Combination {
    /// All of them, with the names that PEFT gives them.
    pub const ALL: [(&'static str, Self); 11] = [
        ("linear", Self::Linear),
        ("cat", Self::Cat),
        ("svd", Self::Svd),
        ("ties", Self::Ties),
        ("ties_svd", Self::TiesSvd),
        ("dare_linear", Self::DareLinear),
        ("dare_ties", Self::DareTies),
        ("dare_linear_svd", Self::DareLinearSvd),
        ("dare_ties_svd", Self::DareTiesSvd),
        ("magnitude_prune", Self::MagnitudePrune),
        ("magnitude_prune_svd", Self::MagnitudePruneSvd),
    ];

    /// Its name in PEFT (`combination_type`).
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, one)| *one == self).expect("the list has all").0
    }

    /// The one that PEFT calls `name`.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(one, _)| *one == name).map(|(_, one)| *one)
    }

    /// Whether values are left out, so that it needs a density.
    fn prunes(self) -> bool {
        !matches!(self, Self::Linear | Self::Cat | Self::Svd)
    }

    fn by_chance(self) -> bool {
        matches!(self, Self::DareLinear | Self::DareTies | Self::DareLinearSvd | Self::DareTiesSvd)
    }

    fn elects(self) -> bool {
        matches!(self, Self::Ties | Self::TiesSvd | Self::DareTies | Self::DareTiesSvd)
    }

    /// Whether it joins the changes, and cuts their sum to a rank.
    fn cuts(self) -> bool {
        use Combination::{DareLinearSvd, DareTiesSvd, MagnitudePruneSvd, TiesSvd};
        matches!(self, Self::Svd | TiesSvd | DareLinearSvd | DareTiesSvd | MagnitudePruneSvd)
    }
}

/// How the sign of a value is elected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MajoritySign {
    /// The sign of the sum.
    #[default]
    Total,
    /// The sign that more adapters have.
    Frequency,
}

/// What is asked of a composition.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Composition {
    /// How values are joined.
    pub combination: Combination,
    /// The share of values that stays, above 0 and at most 1: of those that prune.
    pub density: Option<f64>,
    /// The rank of the result, of those that cut to one; none for the largest of the adapters'.
    pub rank: Option<usize>,
    /// Of those: the quantile of all values of a module to which larger ones are cut (PEFT's `svd_clamp`).
    pub clamp: Option<f64>,
    /// How signs are elected.
    pub majority: MajoritySign,
    /// Of what is kept by chance.
    pub seed: u64,
}

impl Composition {
    /// A composition by `combination`, without choices.
    #[must_use]
    pub fn new(combination: Combination) -> Self {
        Self { combination, density: None, rank: None, clamp: None, majority: MajoritySign::Total, seed: 0 }
    }

    /// Refuses what is out of range, or asks for what the combination does not do.
    fn check(&self) -> Result<()> {
        let name = self.combination.name();
        match self.density {
            Some(density) if !self.combination.prunes() => {
                Err(Error::config("density", format!("none, for `{name}` leaves no values out"), density))
            }
            Some(density) if density > 0.0 && density <= 1.0 => Ok(()),
            Some(density) => Err(Error::config("density", "a share above 0 and at most 1", density)),
            None if self.combination.prunes() => {
                Err(Error::config("density", format!("the share of values that `{name}` keeps, such as 0.5"), "none"))
            }
            None => Ok(()),
        }?;
        let cuts = self.combination.cuts();
        match self.rank {
            Some(rank) if !cuts => {
                let expected =
                    format!("none, for `{name}` decides the rank; `svd` and those that end in `_svd` cut to one");
                return Err(Error::config("rank", expected, rank));
            }
            Some(0) => return Err(Error::config("rank", "1 or more", 0)),
            _ => {}
        }
        match self.clamp {
            Some(clamp) if !cuts => Err(Error::config("svd-clamp", format!("none, for `{name}` cuts nothing"), clamp)),
            Some(clamp) if !(clamp > 0.0 && clamp <= 1.0) => {
                Err(Error::config("svd-clamp", "a quantile above 0 and at most 1", clamp))
            }
            _ => Ok(()),
        }
    }
}

/// Which of that many values stay, of the module at a path: of adapter number `i`, part 0 for A, 1 for B, 2 for the change.
type Stays<'a> = dyn FnMut(&str, usize, usize, usize) -> Vec<bool> + 'a;

/// What is kept by chance with `density`, by `seed` alone: whatever other modules and adapters there are.
fn by_chance(seed: u64, density: f64) -> impl FnMut(&str, usize, usize, usize) -> Vec<bool> {
    move |module, adapter, part, count| {
        let mut rng = Rng::new(mix(add(seed, module.as_bytes()), (2 * adapter + part) as u64 + 1));
        (0..count).map(|_| f64::from(rng.unit()) < density).collect()
    }
}

/// A LoRA with its weight.
struct Weighted<'a> {
    file: &'a AdapterFile,
    lora: &'a Lora,
    weight: f64,
}

/// What an adapter has at a module.
struct Pair<'a> {
    /// Number of the adapter.
    adapter: usize,
    a: &'a HostTensor,
    b: &'a HostTensor,
    /// Factor on `B A` in the adapter.
    scale: f64,
    /// Weight of the adapter.
    weight: f64,
}

impl Pair<'_> {
    fn rank(&self) -> usize {
        self.a.shape[0]
    }

    /// `B A` `[out, in]`.
    fn change(&self) -> Vec<f32> {
        let (rank, cols) = (self.a.shape[0], self.a.shape[1]);
        let row = |of_row: &[f32]| -> Vec<f32> {
            let mut row = vec![0.0f64; cols];
            for (b, a) in of_row.iter().zip(self.a.data.chunks_exact(cols)) {
                row.iter_mut().zip(a).for_each(|(sum, a)| *sum += f64::from(*b) * f64::from(*a));
            }
            row.iter().map(|v| (self.scale * v) as f32).collect()
        };
        self.b.data.chunks_exact(rank).flat_map(row).collect()
    }
}

/// Names of A and B below a module.
pub(super) fn parts_of(module: &str) -> [&'static str; 2] {
    if module == EMBEDDING { ["lora_embedding_A", "lora_embedding_B"] } else { ["lora_A.weight", "lora_B.weight"] }
}

impl Weighted<'_> {
    fn pair(&self, adapter: usize, module: &str) -> Option<Pair<'_>> {
        let [a, b] = parts_of(module).map(|part| self.file.tensors.get(&format!("{module}.{part}")));
        let scale = f64::from(self.lora.of_module(module).1);
        Some(Pair { adapter, a: a?, b: b?, scale, weight: self.weight })
    }
}

/// The settings of an adapter whose ranks can be taken apart. `instead` says what to do with one of another method, and with
/// a LoRA that is more than A and B.
///
/// # Errors
/// It is none; `verb` names what was to be done with it.
pub(super) fn plain_lora<'a>(file: &'a AdapterFile, verb: &str, instead: [&str; 2]) -> Result<&'a Lora> {
    let refused = |what: String, next: &str| Err(Error::unsupported(&file.dir, format!("to {verb} {what}"), next));
    file.check_alone(&format!("`{verb}` takes one adapter"))?;
    let Method::Lora(lora) = &file.method else {
        return refused(file.method.kind().name().to_owned(), instead[0]);
    };
    if file.needs_base() {
        return refused(
            "an adapter whose rows are in another program's order".to_owned(),
            "write it as a folder first (`pocketlora export ADAPTER --to peft -o DIR`)",
        );
    }
    let more = if file.modules().any(is_fused) {
        Some("terms on all experts as one".to_owned())
    } else if lora.invocation.is_some() {
        Some("an adapter with an invocation".to_owned())
    } else if lora.bias {
        Some("terms with biases (`lora_bias`)".to_owned())
    } else {
        file.replaced.names().next().map(|name| format!("an adapter that brings `{name}` in place of the base's"))
    };
    more.map_or(Ok(lora), |what| refused(what, instead[1]))
}

/// The adapters, each a plain LoRA of one base, and none of them with a weight that is no number.
fn weighted(adapters: &[(AdapterFile, f32)]) -> Result<Vec<Weighted<'_>>> {
    let mut all: Vec<Weighted<'_>> = Vec::with_capacity(adapters.len());
    for (file, weight) in adapters {
        let place = || format!("`{}`", file.dir.display());
        if !weight.is_finite() {
            return Err(Error::config("weight", "a finite number", weight).at(place()));
        }
        let beside = ["compose LoRA adapters, or attach this one beside them", "attach the adapters beside each other"];
        let lora = plain_lora(file, "compose", beside)?;
        if let Some(first) = all.first()
            && let Some(apart) = mark::apart(first.file, file)
        {
            let message = format!(
                "expected the base of `{}`, got an adapter for another one: {apart}; compose adapters of one base",
                first.file.dir.display()
            );
            return Err(Error::new(ErrorCode::AdapterMismatch, place(), message));
        }
        all.push(Weighted { file, lora, weight: f64::from(*weight) });
    }
    Ok(all)
}

/// What the composition has at a module.
struct Joined {
    /// `[rank, in]` and `[out, rank]`.
    a: HostTensor,
    b: HostTensor,
    /// The squared sizes of what there was, and of what was kept of it.
    sizes: [f64; 2],
}

impl Composition {
    /// The rank that it gives the module of `pairs`, of adapters whose largest rank is `largest`.
    fn rank_of(&self, pairs: &[Pair<'_>], largest: usize) -> usize {
        let sum = pairs.iter().map(Pair::rank).sum();
        let side = pairs[0].a.shape[1].min(pairs[0].b.shape[0]);
        match self.combination {
            Combination::Cat => sum,
            Combination::Svd => self.rank.unwrap_or(largest).min(sum),
            // What was pruned has more ranks than the adapters had.
            one if one.cuts() => self.rank.unwrap_or(largest).min(side),
            _ => pairs[0].rank(),
        }
    }

    /// Joins `pairs`, of the module at the path `module`, to one of `rank`.
    fn join(&self, module: &str, pairs: &[Pair<'_>], rank: usize, stays: &mut Stays<'_>) -> Joined {
        let (out, input) = (pairs[0].b.shape[0], pairs[0].a.shape[1]);
        let strengths: Vec<f64> = pairs.iter().map(|p| p.weight * p.scale).collect();
        let joined = |a: Vec<f32>, b: Vec<f32>, sizes| Joined {
            a: HostTensor { shape: vec![rank, input], data: a },
            b: HostTensor { shape: vec![out, rank], data: b },
            sizes,
        };
        let mut pruned = |tensors: Vec<Vec<f32>>, weights: &[f64], part: usize| {
            let mut by_number = |i: usize, count: usize| stays(module, pairs[i].adapter, part, count);
            let mut prune = match self.combination {
                one if one.by_chance() => Prune::Random(&mut by_number),
                one if one.prunes() => Prune::Magnitude,
                _ => Prune::None,
            };
            let elect = self.combination.elects().then_some(self.majority);
            combined(tensors, weights, self.density.unwrap_or(1.0), &mut prune, elect)
        };
        match self.combination {
            Combination::Cat => {
                let scaled = pairs
                    .iter()
                    .zip(&strengths)
                    .flat_map(|(pair, s)| pair.a.data.iter().map(move |v| (f64::from(*v) * s) as f32));
                let row = |row: usize| {
                    pairs.iter().flat_map(move |p| p.b.data[row * p.rank()..(row + 1) * p.rank()].iter().copied())
                };
                joined(scaled.collect(), (0..out).flat_map(row).collect(), [0.0; 2])
            }
            Combination::Svd => {
                let (mut a, mut b) = (Columns::new(), Columns::new());
                for (pair, strength) in pairs.iter().zip(&strengths) {
                    a.extend(pair.a.data.chunks_exact(input).map(|row| row.iter().map(|v| f64::from(*v)).collect()));
                    let column = |j: usize| pair.b.data.iter().skip(j).step_by(pair.rank());
                    b.extend((0..pair.rank()).map(|j| column(j).map(|v| f64::from(*v) * strength).collect()));
                }
                let whole = svd::of_product(b, a, usize::MAX);
                let squares: f64 = whole.s.iter().map(|s| s * s).sum();
                let (a, b, kept) = self.cut(whole, rank, [out, input]);
                joined(a, b, [squares, kept])
            }
            one if one.cuts() => {
                let weights: Vec<f64> = pairs.iter().map(|p| p.weight).collect();
                let sum = pruned(pairs.iter().map(Pair::change).collect(), &weights, 2);
                let squares = sum.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
                let (a, b, kept) = self.cut(svd::of_dense(&sum, input, rank), rank, [out, input]);
                joined(a, b, [squares, kept])
            }
            _ => {
                let tensors = |of: fn(&Pair<'_>) -> Vec<f32>| pairs.iter().map(of).collect::<Vec<_>>();
                // The sign is A's.
                let roots: Vec<f64> = strengths.iter().map(|s| s.abs().sqrt()).collect();
                let signed: Vec<f64> = roots.iter().zip(&strengths).map(|(root, s)| root.copysign(*s)).collect();
                let a = pruned(tensors(|pair| pair.a.data.clone()), &signed, 0);
                let b = pruned(tensors(|pair| pair.b.data.clone()), &roots, 1);
                joined(a, b, [0.0; 2])
            }
        }
    }

    /// The largest `rank` of singular values as A and B, `B = U S` and `A = Vᵀ`, for a layer `[out, input]`, and the square
    /// of their size.
    fn cut(&self, of: Svd, rank: usize, [out, input]: [usize; 2]) -> (Vec<f32>, Vec<f32>, f64) {
        let (mut a, mut b) = (vec![0.0; rank * input], vec![0.0; out * rank]);
        for i in 0..rank.min(of.s.len()) {
            a[i * input..(i + 1) * input].iter_mut().zip(&of.v[i]).for_each(|(a, v)| *a = *v as f32);
            let column = b.iter_mut().skip(i).step_by(rank);
            column.zip(&of.u[i]).for_each(|(b, u)| *b = (of.s[i] * u) as f32);
        }
        if let Some(clamp) = self.clamp {
            let mut all: Vec<f32> = a.iter().chain(&b).copied().collect();
            all.sort_unstable_by(f32::total_cmp);
            let at = clamp * (all.len() - 1) as f64;
            let (below, above) = (f64::from(all[at as usize]), f64::from(all[at.ceil() as usize]));
            // Below the median the quantile may be negative: both ends are of its size.
            let most = (below + (above - below) * at.fract()).abs() as f32;
            a.iter_mut().chain(&mut b).for_each(|v| *v = v.clamp(-most, most));
        }
        (a, b, of.s.iter().take(rank).map(|s| s * s).sum())
    }
}
