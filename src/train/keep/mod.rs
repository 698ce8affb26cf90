//! Holding the adapted model, on general prompts, to what the base says: it learns what it is given and keeps what it knew.
//!
//! Before the first step the base answers some prompts, with the adapter off, and its likeliest tokens at each place of the
//! answers are kept. Beside the samples of a step, some of these texts are run with the adapter on, and the divergence from
//! what was kept, times a weight, is added to the loss. There is no second copy of the weights, and no second pass of the
//! base. Which texts a step holds is a function of the seed and its number, as its samples are.
//!
//! A run that goes on from an adapter is also held to what that one says to the questions of its own data, which lie beside
//! it: so it keeps what it was taught before.

mod lessons;
mod prompts;
mod references;
mod setting;

pub(super) use lessons::Lessons;
pub use prompts::Prompts;
pub(crate) use prompts::asked;
pub use setting::{Forgetting, Keep};

use super::step::MicroBatch;
use super::{Observer, Parts, TrainConfig, Trainer};
use crate::adapter::Adapters;
use crate::error::{Error, ErrorCode, Result};
use crate::exec::infer::Numbers;
use crate::generate::Greedy;
use crate::rng::{Rng, mix};
use pocketlora_kernels::{Backend, CacheType};
pub(crate) use prompts::ANSWER;
use references::{References, TOP, Tops, fingerprint, share};

/// Stream of random numbers for the order of held texts.
const ORDER: u64 = 6;
/// Tokens of general texts beside one token of samples: more holds better, and takes as much longer.
const SHARE: f64 = 0.4;
/// The same of texts that were taught before.
const TAUGHT_SHARE: f64 = 0.8;
/// Prompts that are answered at once at most: enough for the weights to be read once for many, and few in memory.
pub(super) const AT_ONCE: usize = 16;

/// Held tokens beside one token of samples, at most; `taught` where the run goes on from an adapter.
pub(crate) fn keep_share(config: &TrainConfig, taught: bool) -> f64 {
    let taught = if taught { TAUGHT_SHARE } else { 0.0 };
    if config.keep == Keep::Off { 0.0 } else { SHARE + taught }
}

/// How a run is held.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct KeepReport {
    /// General prompts that it is held on.
    pub prompts: usize,
    /// Questions of what the adapter of the start was taught that it is held on.
    pub taught: usize,
    /// Prompts and questions that the model's context or `seq` has no room for.
    pub left_out: usize,
    /// How many of them stand beside the samples of a step; below 1, in how many of the steps one does.
    pub per_step: f64,
    /// Factor on the divergence.
    pub weight: f32,
}

/// Prompts with one teacher.
struct Set {
    prompts: Vec<Vec<u32>>,
    /// Answered with the adapter that the run starts from; else with none.
    taught: bool,
    per_step: f64,
    references: Option<References>,
}

impl Set {
    /// Of `prompts` as many as `steps` steps of some `tokens` held tokens come by; at most `most` in a step.
    fn new(mut prompts: Vec<Vec<u32>>, taught: bool, steps: u64, tokens: f64, most: usize) -> Option<Self> {
        let all: usize = prompts.iter().map(|ids| ids.len() + ANSWER).sum();
        if all == 0 {
            return None;
        }
        let mean = all as f64 / prompts.len() as f64;
        let per_step = (tokens / mean).min(most as f64);
        prompts.truncate(((steps as f64 * per_step) as usize).max(1));
        Some(Self { prompts, taught, per_step, references: None })
    }

    /// Name of its file in the output folder.
    fn file(&self) -> &'static str {
        if self.taught { references::TAUGHT } else { references::GENERAL }
    }

    /// Adds the texts that step `number` (1-based) holds to `micro`, numbered from `first` on.
    fn add(&self, number: u64, seed: u64, first: usize, micro: &mut MicroBatch) {
        let Some(references) = &self.references else { return };
        let until = |step: u64| (step as f64 * self.per_step) as u64;
        let count = references.len() as u64;
        let mut order = (u64::MAX, Vec::new());
        for visit in until(number - 1)..until(number) {
            let (round, at) = (visit / count, (visit % count) as usize);
            if order.0 != round {
                let key = mix(mix(seed, ORDER), u64::from(self.taught));
                order = (round, Rng::new(mix(key, round)).permutation(references.len()));
            }
            let text = order.1[at];
            let reference = references.get(text);
            let shares = reference.shares.iter().map(|stored| share(*stored));
            micro.hold((first + text) as u32, reference.tokens, reference.ids, shares, TOP);
        }
    }
}

/// What a run is held to.
pub(super) struct Held {
    /// General prompts, then what was taught before; at least one set.
    sets: Vec<Set>,
    stop: Vec<u32>,
    left_out: usize,
    weight: f32,
    seed: u64,
}

impl Held {
    /// What a run of `steps` steps of some `step_tokens` tokens each is held to: as many of the prompts, and of what was
    /// `taught` before, as it comes by. `places` is how many of a text's positions virtual tokens leave.
    pub fn new(
        prompts: Prompts,
        taught: Lessons,
        config: &TrainConfig,
        steps: u64,
        step_tokens: f64,
        places: usize,
    ) -> Option<Self> {
        let weight = config.keep.weight()?;
        let (most, mut left_out) = (config.batch * config.accumulate, prompts.left_out);
        let mut set = |mut ids: Vec<Vec<u32>>, taught, share: f64| {
            let before = ids.len();
            ids.retain(|ids| !ids.is_empty() && ids.len() + ANSWER <= places);
            left_out += before - ids.len();
            Set::new(ids, taught, steps, share * step_tokens, most)
        };
        // In an order of their own, for a run may be too short for all of them.
        let order = Rng::new(mix(config.seed, ORDER)).permutation(taught.questions.len());
        let taught = order.into_iter().map(|i| taught.questions[i].clone()).collect();
        let sets = [set(prompts.ids, false, SHARE), set(taught, true, TAUGHT_SHARE)];
        let sets: Vec<Set> = sets.into_iter().flatten().collect();
        (!sets.is_empty()).then_some(Self { sets, stop: prompts.stop, left_out, weight, seed: config.seed })
    }

    pub fn report(&self) -> KeepReport {
        let count = |taught| self.sets.iter().filter(|set| set.taught == taught).map(|set| set.prompts.len()).sum();
        KeepReport {
            prompts: count(false),
            taught: count(true),
            left_out: self.left_out,
            per_step: self.sets.iter().map(|set| set.per_step).sum(),
            weight: self.weight,
        }
    }

    /// Factor on the divergence.
    pub fn weight(&self) -> f32 {
        self.weight
    }

    /// A number that changes when any prompt does.
    pub fn fingerprint(&self) -> u64 {
        self.sets.iter().fold(ANSWER as u64, |key, set| fingerprint(&set.prompts, key))
    }

    /// Lengths of the longest texts that one step may hold, the longest first.
    pub fn longest(&self) -> Vec<usize> {
        let longest = |set: &Set| {
            let mut lengths: Vec<usize> = set.prompts.iter().map(|ids| ids.len() + ANSWER - 1).collect();
            lengths.sort_unstable_by(|a, b| b.cmp(a));
            lengths.truncate(set.per_step.ceil() as usize);
            lengths
        };
        self.sets.iter().flat_map(longest).collect()
    }

    /// Tokens of the longest prompt with its answer.
    pub fn longest_text(&self) -> usize {
        self.prompts().map(|ids| ids.len() + ANSWER).max().unwrap_or(0)
    }

    fn prompts(&self) -> impl Iterator<Item = &Vec<u32>> {
        self.sets.iter().flat_map(|set| &set.prompts)
    }

    /// Most bytes of what is kept for it.
    pub fn most_bytes(&self) -> u64 {
        References::most_bytes(self.prompts().count(), self.prompts().map(Vec::len).sum(), ANSWER)
    }

    /// The texts that step `number` (1-based) holds, if any.
    pub fn micro_batch(&self, number: u64) -> Option<MicroBatch> {
        let (mut micro, mut first) = (MicroBatch::empty(), 0);
        for set in &self.sets {
            set.add(number, self.seed, first, &mut micro);
            first += set.prompts.len();
        }
        micro.is_held().then_some(micro)
    }
}

/// Lengths of texts like those that a step may hold, to count what they take.
pub(super) fn held_of_lengths(lengths: &[usize]) -> MicroBatch {
    let mut micro = MicroBatch::empty();
    for (i, len) in (0..).zip(lengths) {
        let places = ANSWER.min(*len);
        let shares = std::iter::repeat_n(1.0 / (2 * TOP) as f32, places * TOP);
        micro.hold(i, &vec![0; *len], &vec![0; places * TOP], shares, TOP);
    }
    micro
}

impl<B: Backend> Trainer<B> {
    /// How the run is held to what the base says on general prompts, and to what the adapter of the start was taught.
    #[must_use]
    pub fn keep_report(&self) -> Option<KeepReport> {
        self.held.as_ref().map(Held::report)
    }

    /// Has all answers ready: those that lie in the output folder, or else the base and the adapter of the start are asked.
    ///
    /// # Errors
    /// Stopped, logits that are not numbers, out of memory; the adapter of the start is no more, for it has learned since.
    pub(super) fn prepare(&mut self, observer: &mut dyn Observer) -> Result<()> {
        for i in 0..self.held.as_ref().map_or(0, |held| held.sets.len()) {
            let Some(Held { sets, .. }) = &self.held else { break };
            let set = &sets[i];
            if set.references.is_some() {
                continue;
            }
            let file = set.file();
            let starting = if set.taught { self.facts.init } else { 0 };
            let prompts = fingerprint(&set.prompts, ANSWER as u64);
            let made_from = mix(mix(mix(prompts, self.facts.base), starting), self.config.precision as u64);
            let references = match References::load(&self.out.join(file), made_from) {
                Some(found) if found.len() == set.prompts.len() => found,
                _ if set.taught && self.facts.step > 0 => {
                    let message = "expected the answers of the adapter that the run began with, got none that are whole; \
                                   start again with `--overwrite`";
                    let place = format!("`{}`", self.out.join(file).display());
                    return Err(Error::new(ErrorCode::Data, place, message));
                }
                _ => {
                    let made = self.ask(i, observer)?;
                    if let Err(e) = made.save(&self.out.join(file), made_from) {
                        observer.on_warning(&e);
                    }
                    made
                }
            };
            self.held.as_mut().expect("looked at above").sets[i].references = Some(references);
        }
        Ok(())
    }

    /// The answers to the prompts of set number `set`, and the likeliest tokens at each place of them.
    fn ask(&mut self, set: usize, observer: &mut dyn Observer) -> Result<References> {
        let Some(held) = &self.held else { return Ok(References::default()) };
        let (prompts, taught, stop) = (held.sets[set].prompts.clone(), held.sets[set].taught, held.stop.clone());
        let numbers = Numbers { cache: CacheType::F16, arithmetic: self.config.precision.arithmetic() };
        let none = Adapters::none(&self.base);
        let mut references = References::default();
        self.give_back();
        for (i, group) in prompts.chunks(self.at_once).enumerate() {
            observer.on_preparing(i * self.at_once, prompts.len());
            let mut tops = vec![Tops::default(); group.len()];
            let queue = self.turn.clone();
            let _turn = queue.take();
            let answers = self.guarded(observer, |Parts { base, adapters, .. }, keep_going| {
                // Before the first step, the adapter in training is the one that the run starts from.
                let adapters = if taught { adapters } else { &none };
                let greedy = Greedy { base, adapters, numbers, max_tokens: ANSWER, stop: &stop };
                greedy.answers(group, keep_going, &mut |text, logits| {
                    tops[text].push(logits);
                    Ok(())
                })
            });
            let answers = answers.map_err(|e| match e.code() {
                ErrorCode::Cancelled => stopped(),
                _ => e,
            })?;
            for ((prompt, answer), tops) in group.iter().zip(answers).zip(tops) {
                // Its last token has no successor: the distribution before it is what is held.
                let text = [prompt, &answer[..answer.len() - 1]].concat();
                references.push(&text, tops);
            }
        }
        crate::mmap::release_freed();
        observer.on_preparing(prompts.len(), prompts.len());
        Ok(references)
    }

    /// Once the run is over: forgets the answers on the disk, and leaves the questions of what was taught beside the adapter.
    pub(super) fn leave_lessons(&self) -> Result<()> {
        References::remove(&self.out)?;
        if self.config.keep == Keep::Off {
            return Ok(());
        }
        Lessons::of(&self.data).after(&self.taught).write(&self.out)
    }
}

fn stopped() -> Error {
    Error::new(ErrorCode::Cancelled, "training", "stopped before the first step")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(per_step: f64, texts: usize) -> Held {
        let mut references = References::default();
        for text in 0..texts as u32 {
            let mut tops = Tops::default();
            tops.push(&[0.0, 1.0, 2.0]);
            references.push(&[text, 1], tops);
        }
        let set = Set { prompts: vec![vec![1]; texts], taught: false, per_step, references: Some(references) };
        Held { sets: vec![set], stop: Vec::new(), left_out: 0, weight: 1.0, seed: 3 }
    }

    #[test]
    fn steps_hold_every_text_in_turn_and_any_step_can_be_found_by_itself() {
        for (per_step, texts) in [(0.3, 5), (1.0, 7), (2.7, 6), (4.0, 3)] {
            let held = held(per_step, texts);
            let mut counts = vec![0u32; texts];
            for step in 1..=100 {
                let texts: Vec<u32> = held.micro_batch(step).map_or(Vec::new(), |m| m.numbers().to_vec());
                assert!(texts.len() as f64 <= per_step.ceil() && texts.len() as f64 >= per_step.floor(), "{per_step}");
                texts.iter().for_each(|text| counts[*text as usize] += 1);
            }
            let (most, least) = (counts.iter().max().unwrap(), counts.iter().min().unwrap());
            assert!(most - least <= 1, "{counts:?}");
            assert!((f64::from(counts.iter().sum::<u32>()) - 100.0 * per_step).abs() <= 1.0);
        }
    }

    #[test]
    fn a_run_is_held_by_its_share_of_tokens_and_on_no_more_than_it_comes_by() {
        let prompts = Prompts { ids: vec![vec![1; 8]; 40], ..Prompts::default() };
        let config = TrainConfig { keep: Keep::Auto, batch: 4, ..TrainConfig::default() };
        let new =
            |steps, tokens, places| Held::new(prompts.clone(), Lessons::default(), &config, steps, tokens, places);
        let report = |steps, tokens| new(steps, tokens, 1000).unwrap().report();
        assert_eq!(report(100, 100.0).per_step, 1.0);
        assert_eq!(report(100, 100.0).prompts, 40);
        assert_eq!(report(10, 100.0).prompts, 10);
        assert_eq!(report(1, 10.0).prompts, 1);
        // Never more texts than samples.
        assert_eq!(report(100, 1e6).per_step, 4.0);
        assert!(new(100, 100.0, 39).is_none());
        assert!(Held::new(prompts.clone(), Lessons::default(), &TrainConfig::default(), 100, 100.0, 1000).is_none());
        // What was taught before stands beside the prompts, in a set of its own.
        let taught = Lessons { questions: vec![vec![2; 8]; 9] };
        let both = Held::new(prompts, taught, &config, 100, 100.0, 1000).unwrap();
        assert_eq!((both.report().prompts, both.report().taught, both.report().per_step), (40, 9, 3.0));
    }
}
