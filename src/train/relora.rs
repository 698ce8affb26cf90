//! ReLoRA (Lialin et al. 2023): every so many steps what a LoRA has learned is put aside, and it begins anew, so that a low
//! rank learns a change of higher rank with moments and gradients of the low one.
//!
//! The paper adds `s B A` to the weight. Our base never changes, so it is added to a second low-rank term, which stays as it is
//! until the next time: `B' = [B' | B]` and `A' = [A'; A]`, the same factor before it. So nothing that the model says changes
//! with a restart. A is drawn anew then and B is zero. Most of the optimizer's moments become zero (`relora-prune`): both of a
//! value where the first is among the smallest, while the paper looks at each by itself. And the learning rate rises again from zero in a few steps (`relora-warmup`). With all of them zero
//! the optimizer begins anew, too, and counts its steps from there, as in PeriodicLoRA (Meng et al. 2024).
//!
//! The file is one plain LoRA with the ranks of all terms. `relora-rank` bounds them: what is put aside is then the nearest of
//! that rank, by its singular values. Room for all of it is there from the beginning, zeros at first.

use super::Trainer;
use super::config::TrainConfig;
use super::optimizer::{bytes_of, floats};
use super::trained::Trained;
use crate::adapter::{Adapters, Method, TensorId, TensorSpec, low_rank_names, low_rank_sum};
use crate::base::Base;
use crate::error::{Error, Result};
use crate::format::Entry;
use crate::format::safetensors::TensorFile;
use crate::rng::mix;
use pocketlora_kernels::Backend;
use safetensors::Dtype;

/// Stream of random numbers for what begins anew.
const ANEW: u64 = 0x7265_6c6f;
/// Share of moments that become zero, and steps in which the rate rises again, unless given.
const PRUNE: f32 = 0.99;
const WARMUP: u64 = 10;
/// Before the names of what was put aside, in a checkpoint.
const PART: &str = "aside";

impl TrainConfig {
    /// Share of the smallest moments that a restart makes zero.
    fn pruned(&self) -> f32 {
        self.relora_prune.unwrap_or(PRUNE)
    }

    /// Steps of the optimizer since it began anew, with step `number` (1-based), where it does so.
    pub(super) fn steps_since_restart(&self, number: u64) -> Option<u64> {
        let every = self.relora.filter(|_| self.pruned() >= 1.0)?;
        Some((number - 1) % every + 1)
    }

    /// Share of the learning rate that step `number` has, behind a restart.
    pub(super) fn rate_after_restart(&self, number: u64) -> f32 {
        let Some(every) = self.relora.filter(|every| number > *every) else { return 1.0 };
        let since = (number - 1) % every + 1;
        (since as f32 / (self.relora_warmup.unwrap_or(WARMUP) + 1) as f32).min(1.0)
    }

    /// Checks these settings of it.
    ///
    /// # Errors
    /// The first that is out of range or has no effect.
    pub(super) fn check_relora(&self) -> Result<()> {
        if self.relora == Some(0) {
            return Err(Error::config("relora", "a whole number of steps from 1", 0));
        }
        for (name, on) in [
            ("relora-prune", self.relora_prune.is_some()),
            ("relora-warmup", self.relora_warmup.is_some()),
            ("relora-rank", self.relora_rank.is_some()),
        ] {
            if on && self.relora.is_none() {
                return Err(Error::config(name, "`relora` beside it", "none"));
            }
        }
        if let Some(share) = self.relora_prune.filter(|share| !(0.0..=1.0).contains(share)) {
            return Err(Error::config("relora-prune", "a share from 0 to 1", share));
        }
        if let Some((every, steps)) = self.relora.zip(self.relora_warmup).filter(|(every, steps)| steps >= every) {
            return Err(Error::config("relora-warmup", format!("fewer steps than the {every} of `relora`"), steps));
        }
        let largest = self.rank_pattern.values().copied().chain([self.rank]).max().unwrap_or(1);
        match self.relora_rank.filter(|rank| *rank < 2 * largest) {
            Some(rank) => Err(Error::config("relora-rank", format!("at least twice the rank of `{largest}`"), rank)),
            None => Ok(()),
        }
    }

    /// How often a run of `total` steps begins anew up to the end of step `step`.
    fn restarts(&self, step: u64, total: u64) -> u64 {
        self.relora.map_or(0, |every| step.min(total.saturating_sub(1)) / every)
    }
}

/// What a module has put aside.
struct Aside {
    module: String,
    /// Names of A and B.
    names: [String; 2],
    /// Of the tensors in training, the numbers of A and B.
    own: [usize; 2],
    /// A' and B', where they are there.
    sum: [TensorId; 2],
    rank: usize,
    /// Ranks that A' and B' have room for.
    room: usize,
}

/// What all modules have put aside.
pub(super) struct Cycles {
    config: TrainConfig,
    total: u64,
    asides: Vec<Aside>,
}

/// For each module of a LoRA with tensors `specs` its path, the number of A among them, its rank, and the ranks that it puts aside in
/// a run of `total` steps.
fn rooms<'s>(config: &TrainConfig, specs: &[&'s TensorSpec], total: u64) -> Vec<(&'s str, usize, usize, usize)> {
    let restarts = config.restarts(total, total) as usize;
    let mut rooms = Vec::new();
    for (i, spec) in specs.iter().enumerate() {
        let Some(module) = low_rank_names(&spec.name) else { continue };
        let rank = spec.shape[0];
        let most = config.relora_rank.map_or(usize::MAX, |most| most.saturating_sub(rank));
        rooms.push((module, i, rank, (restarts * rank).min(most)));
    }
    rooms
}

/// The method and the tensors of what a run puts aside, where it does.
///
/// # Errors
/// The run has no step behind the first restart.
pub(super) fn aside(
    config: &TrainConfig,
    method: &Method,
    specs: &[TensorSpec],
    total: u64,
) -> Result<Option<(Method, Vec<TensorSpec>)>> {
    let Some(every) = config.relora else { return Ok(None) };
    if config.restarts(total, total) == 0 {
        return Err(Error::config("relora", format!("fewer than the {total} steps of the run"), every));
    }
    let all: Vec<&TensorSpec> = specs.iter().collect();
    let (mut ranks, mut asides) = (Vec::new(), Vec::new());
    for (module, at, _, room) in rooms(config, &all, total) {
        ranks.push((module.to_owned(), room));
        let (a, b) = (&specs[at], &specs[at + 1]);
        asides.push(TensorSpec { name: a.name.clone(), shape: vec![room, a.shape[1]] });
        asides.push(TensorSpec { name: b.name.clone(), shape: vec![b.shape[0], room] });
    }
    Ok(Some((method.of_other_ranks(&ranks, false), asides)))
}

impl Cycles {
    /// Attaches what a run of `total` steps puts aside to `adapters`, beside the LoRA `file` whose tensors are in training.
    ///
    /// # Errors
    /// As [`aside`]; out of memory.
    pub fn new<B: Backend>(
        base: &Base<B>,
        adapters: &mut Adapters<B>,
        method: &Method,
        tensors: &[Trained<B>],
        config: &TrainConfig,
        total: u64,
    ) -> Result<Option<Self>> {
        let specs: Vec<TensorSpec> = tensors.iter().map(|t| t.spec.clone()).collect();
        let Some((of_sums, sums)) = aside(config, method, &specs, total)? else { return Ok(None) };
        let ids = adapters.attach_fixed_zeros(base, &of_sums, &sums)?;
        for (_, id) in &ids {
            let zeros = vec![0.0; adapters.held().spec(*id).values()];
            adapters.held_mut().update(&base.backend, *id, &mut |buffer| base.backend.write(buffer, &zeros));
        }
        let all: Vec<&TensorSpec> = specs.iter().collect();
        let mut asides = Vec::new();
        for (module, at, rank, room) in rooms(config, &all, total) {
            let names = [at, at + 1].map(|i| specs[i].name.clone());
            let find = |name: &String| ids.iter().find(|(own, _)| own == name).map(|(_, id)| *id);
            let [Some(a), Some(b)] = names.each_ref().map(find) else { unreachable!("attached just now") };
            asides.push(Aside { module: module.to_owned(), names, own: [at, at + 1], sum: [a, b], rank, room });
        }
        Ok(Some(Self { config: config.clone(), total, asides }))
    }

    /// Ranks that `aside` holds after `step` steps.
    fn used(&self, aside: &Aside, step: u64) -> usize {
        (self.config.restarts(step, self.total) as usize * aside.rank).min(aside.room)
    }

    /// Values that are put aside in all.
    pub fn values<B: Backend>(&self, adapters: &Adapters<B>) -> usize {
        self.asides.iter().flat_map(|aside| aside.sum).map(|id| adapters.held().spec(id).values()).sum()
    }

    /// After step `number`: puts aside what was learned and begins anew, if it is time.
    ///
    /// # Errors
    /// Device lost, out of memory.
    pub fn step<B: Backend>(
        &self,
        number: u64,
        base: &Base<B>,
        method: &Method,
        adapters: &mut Adapters<B>,
        tensors: &mut [Trained<B>],
    ) -> Result<()> {
        let restarts = self.config.restarts(number, self.total);
        if restarts == self.config.restarts(number - 1, self.total) {
            return Ok(());
        }
        let backend = &base.backend;
        for (i, aside) in self.asides.iter().enumerate() {
            let (rank, room, used) = (aside.rank, aside.room, self.used(aside, number - 1));
            let [a, b] = aside.own.map(|own| adapters.held().read(backend, tensors[own].id));
            let [sum_a, sum_b] = aside.sum.map(|id| adapters.held().read(backend, id));
            let (a, b, sum_a, sum_b) = (a?, b?, sum_a?, sum_b?);
            let input = sum_a.len() / room;
            let before = columns(&sum_b, room, used);
            let [sum_a, sum_b] = if used + rank <= room {
                let mut all = sum_a;
                all[used * input..(used + rank) * input].copy_from_slice(&a);
                [all, widened(&joined(&before, used, &b, rank), used + rank, room)]
            } else {
                low_rank_sum(&[(&sum_a[..used * input], &before), (&a, &b)], input, room)
            };
            let specs = aside.own.map(|own| tensors[own].spec.clone());
            let seed = mix(mix(mix(self.config.seed, ANEW), restarts), i as u64);
            let fresh = method.fresh(&specs, base, seed)?;
            let write = |adapters: &mut Adapters<B>, id, values: &[f32]| {
                adapters.held_mut().update(backend, id, &mut |buffer| backend.write(buffer, values));
            };
            write(adapters, aside.sum[0], &sum_a);
            write(adapters, aside.sum[1], &sum_b);
            for (own, name) in aside.own.into_iter().zip(&aside.names) {
                write(adapters, tensors[own].id, &fresh[name].data);
                let t = &mut tensors[own];
                t.moments.prune(backend, self.config.pruned())?;
            }
        }
        Ok(())
    }

    /// The method of the file after `step` steps: a LoRA with the ranks of what is in training and what was put aside.
    pub fn method(&self, method: &Method, step: u64) -> Method {
        let ranks = self.asides.iter().map(|aside| (aside.module.clone(), aside.rank + self.used(aside, step)));
        method.of_other_ranks(&ranks.collect::<Vec<_>>(), true)
    }

    /// The shape of the tensor `t` of the file after `step` steps.
    pub fn shape<B: Backend>(&self, number: usize, t: &Trained<B>, step: u64) -> Vec<usize> {
        let mut shape = t.spec.shape.clone();
        if let Some((aside, part)) = self.of(number) {
            shape[part] += self.used(aside, step);
        }
        shape
    }

    /// The values of tensor number `number` of the file after `step` steps, given those in training.
    ///
    /// # Errors
    /// Device lost.
    pub fn values_of<B: Backend>(
        &self,
        backend: &B,
        adapters: &Adapters<B>,
        number: usize,
        own: Vec<f32>,
        step: u64,
    ) -> Result<Vec<f32>> {
        let Some((aside, part)) = self.of(number) else { return Ok(own) };
        let (rank, used) = (aside.rank, self.used(aside, step));
        let sum = adapters.held().read(backend, aside.sum[part])?;
        if part == 0 {
            let input = own.len() / rank;
            return Ok(sum[..used * input].iter().chain(&own).copied().collect());
        }
        Ok(joined(&columns(&sum, aside.room, used), used, &own, rank))
    }

    /// The module that tensor number `number` of those in training belongs to: 0 for its A, 1 for its B.
    fn of(&self, number: usize) -> Option<(&Aside, usize)> {
        self.asides.iter().find_map(|aside| Some((aside, aside.own.iter().position(|own| *own == number)?)))
    }

    /// What a checkpoint holds of it.
    pub fn entries<B: Backend>(&self, adapters: &Adapters<B>) -> Vec<Entry> {
        let entry = |(name, id): (&String, TensorId)| {
            let shape = adapters.held().spec(id).shape.clone();
            Entry { name: format!("{PART}.{name}"), dtype: Dtype::F32, shape }
        };
        self.parts().map(entry).collect()
    }

    /// Tells `put` the names and bytes of these.
    ///
    /// # Errors
    /// Device lost; what `put` returns.
    pub fn save<B: Backend>(
        &self,
        backend: &B,
        adapters: &Adapters<B>,
        put: &mut dyn FnMut(&str, &[u8]) -> Result<()>,
    ) -> Result<()> {
        self.parts()
            .try_for_each(|(name, id)| put(&format!("{PART}.{name}"), &bytes_of(&adapters.held().read(backend, id)?)))
    }

    /// Takes them back.
    ///
    /// # Errors
    /// One is not there.
    pub fn load<B: Backend>(&self, backend: &B, adapters: &mut Adapters<B>, file: &TensorFile) -> Result<()> {
        self.parts().try_for_each(|(name, id)| {
            let values = floats(&file.get(&format!("{PART}.{name}"))?.bytes);
            adapters.held_mut().update(backend, id, &mut |buffer| backend.write(buffer, &values));
            Ok(())
        })
    }

    fn parts(&self) -> impl Iterator<Item = (&String, TensorId)> {
        self.asides.iter().flat_map(|aside| aside.names.iter().zip(aside.sum))
    }
}

impl<B: Backend> Trainer<B> {
    /// After the optimizer's step `number`.
    ///
    /// # Errors
    /// As [`Cycles::step`].
    pub(super) fn restart_if_due(&mut self, number: u64) -> Result<()> {
        let Self { base, adapters, tensors, cycles, file, .. } = self;
        match cycles {
            Some(cycles) => cycles.step(number, base, &file.method, adapters, tensors),
            None => Ok(()),
        }
    }
}

/// The first `count` columns of `x` `[.., width]`.
fn columns(x: &[f32], width: usize, count: usize) -> Vec<f32> {
    x.chunks_exact(width).flat_map(|row| row[..count].iter().copied()).collect()
}

/// `[x | y]` with `x` `[.., n]` and `y` `[.., m]`.
fn joined(x: &[f32], n: usize, y: &[f32], m: usize) -> Vec<f32> {
    let row = |(i, y): (usize, &[f32])| -> Vec<f32> { x[i * n..(i + 1) * n].iter().chain(y).copied().collect() };
    y.chunks_exact(m).enumerate().flat_map(row).collect()
}

/// `x` `[.., n]` with zeros behind, up to `width` columns.
fn widened(x: &[f32], n: usize, width: usize) -> Vec<f32> {
    let row = |row: &[f32]| -> Vec<f32> { row.iter().copied().chain(std::iter::repeat_n(0.0, width - n)).collect() };
    x.chunks_exact(n).flat_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_come_in_time_and_rates_rise_again() {
        let config = TrainConfig { relora: Some(4), relora_warmup: Some(1), ..TrainConfig::default() };
        let restarts: Vec<u64> = (0..=12).map(|step| config.restarts(step, 12)).collect();
        // Not behind the last step, after which nothing is learned.
        assert_eq!(restarts, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]);
        let rates: Vec<f32> = (1..=10).map(|number| config.rate_after_restart(number)).collect();
        assert_eq!(rates, [1.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.5, 1.0]);
        assert_eq!(config.steps_since_restart(5), None);
        let anew = TrainConfig { relora_prune: Some(1.0), ..config };
        assert_eq!([4, 5, 6].map(|number| anew.steps_since_restart(number)), [Some(4), Some(1), Some(2)]);
    }

    #[test]
    fn columns_are_put_beside_each_other() {
        let x = [1.0, 2.0, 0.0, 3.0, 4.0, 0.0];
        assert_eq!(columns(&x, 3, 2), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(joined(&[1.0, 2.0, 3.0, 4.0], 2, &[5.0, 6.0], 1), [1.0, 2.0, 5.0, 3.0, 4.0, 6.0]);
        assert_eq!(joined(&[], 0, &[5.0, 6.0], 1), [5.0, 6.0]);
        assert_eq!(widened(&[1.0, 2.0], 1, 2), [1.0, 0.0, 2.0, 0.0]);
    }

    #[test]
    fn bad_settings_name_themselves() {
        let on = || TrainConfig { relora: Some(4), relora_warmup: Some(0), ..TrainConfig::default() };
        for (config, name) in [
            (TrainConfig { relora: Some(0), ..on() }, "relora"),
            (TrainConfig { relora: None, ..on() }, "relora-warmup"),
            (TrainConfig { relora_warmup: Some(4), ..on() }, "relora-warmup"),
            (TrainConfig { relora_prune: Some(1.5), ..on() }, "relora-prune"),
            (TrainConfig { relora_rank: Some(15), ..on() }, "relora-rank"),
        ] {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(&format!("`{name}`")), "{error}");
        }
    }
}
