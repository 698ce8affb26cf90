//! What a model has read: token ids and what its layers remember of them. The one place that runs inference.

use super::Engine;
use crate::adapter::Adapters;
use crate::base::Base;
use crate::error::Result;
use crate::exec::infer::{Logits, Numbers, PREFILL_CHUNK, Sequence, Step, Workspace};
use crate::exec::{Find, KeptFacts, Parts};
use crate::turn::Turn;
use pocketlora_kernels::Cpu;

/// What a transcript is continued with.
#[derive(Clone, Copy)]
pub(crate) struct On<'a> {
    pub base: &'a Base<Cpu>,
    pub turn: &'a Turn,
    pub adapters: &'a Adapters<Cpu>,
}

impl Engine {
    /// What transcripts with `adapters` are continued with. To be called before the first work.
    pub(crate) fn on<'a>(&'a self, adapters: &'a Adapters<Cpu>) -> On<'a> {
        self.choose_threads();
        On { base: self.base(), turn: self.turn(), adapters }
    }
}

/// A text that grows; what is remembered of it is kept, so that a chat's next turn costs only its new tokens.
pub(crate) struct Transcript {
    sequence: Sequence<Cpu>,
    work: Workspace<Cpu>,
    ids: Vec<u32>,
}

impl Transcript {
    pub fn new(base: &Base<Cpu>, numbers: Numbers) -> Result<Self> {
        let (sequence, work) = (Sequence::new(base, numbers.cache)?, Workspace::new(numbers.arithmetic));
        Ok(Self { sequence, work, ids: Vec::new() })
    }

    /// One that gives the states `[C]` after the last norm where others give logits.
    pub fn of_states(base: &Base<Cpu>, numbers: Numbers) -> Result<Self> {
        Ok(Self { work: Workspace::for_states(numbers.arithmetic), ..Self::new(base, numbers)? })
    }

    /// What was read.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// What it remembers, for a file.
    ///
    /// # Errors
    /// Device lost.
    pub fn kept(&mut self, base: &Base<Cpu>) -> Result<(KeptFacts, Parts<'_>)> {
        self.sequence.kept(base)
    }

    /// Remembers what was kept of a transcript that had read `ids` with these numbers and adapters; returns `false`, with
    /// nothing changed, where the parts contradict each other.
    ///
    /// # Errors
    /// Out of memory.
    pub fn restore(
        &mut self,
        on: On<'_>,
        numbers: Numbers,
        ids: Vec<u32>,
        facts: &KeptFacts,
        find: &Find<'_>,
    ) -> Result<bool> {
        let sequence = Sequence::restored(on.base, numbers.cache, on.adapters, facts, find)?;
        let Some(sequence) = sequence.filter(|sequence| sequence.len() == ids.len()) else { return Ok(false) };
        (self.sequence, self.ids) = (sequence, ids);
        Ok(true)
    }

    /// Keeps the tokens that it has in common with the beginning of `ids`, or fewer where a model cannot go back that
    /// far; returns how many.
    pub fn keep(&mut self, base: &Base<Cpu>, ids: &[u32]) -> usize {
        let common = self.ids.iter().zip(ids).take_while(|(a, b)| a == b).count();
        let kept = self.sequence.rewind(base, common);
        self.ids.truncate(kept);
        kept
    }

    /// Runs `ids`, a chunk at a time, after what it holds. `on_logits` takes the number of each token from `first` on and
    /// the logits `[V]` after it; `on_chunk` hears how many of `ids` are done. `keep_going` is asked between layers.
    /// Others may use the device between chunks, and while `on_logits` works.
    ///
    /// # Errors
    /// An id outside the vocabulary, out of memory, stopped ([`ErrorCode::Cancelled`]), and those of the callbacks. What
    /// was held is held then, with whole chunks that were done, or less where a model cannot go back that far.
    ///
    /// [`ErrorCode::Cancelled`]: crate::ErrorCode::Cancelled
    pub fn read(
        &mut self,
        on: On<'_>,
        ids: &[u32],
        first: usize,
        keep_going: &mut dyn FnMut() -> bool,
        on_logits: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
        on_chunk: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        self.sequence.expect(on.adapters.virtual_tokens() + self.sequence.len() + ids.len());
        let mut done = 0;
        for chunk in ids.chunks(PREFILL_CHUNK) {
            let logits = first.saturating_sub(done).min(chunk.len())..chunk.len();
            let mut step = [Step { sequence: &mut self.sequence, ids: chunk, adapters: on.adapters, logits }];
            let on_logits = &mut |made: &Logits| {
                on.turn.without(|| {
                    let each = made.values.chunks_exact(made.values.len() / made.places.len());
                    made.places.iter().zip(each).try_for_each(|((_, row), one)| on_logits(done + row, one))
                })
            };
            let turn = on.turn.take();
            let result = on.base.forward(&mut self.work, &mut step, keep_going, on_logits);
            drop(turn);
            self.ids.extend_from_slice(chunk);
            self.ids.truncate(self.sequence.len());
            result?;
            done += chunk.len();
            on_chunk(done)?;
        }
        Ok(())
    }

    /// Runs `ids`, at least one; `logits` become those after the last of them. Where a model cannot go back by itself, it
    /// can then go back to before the last, from where the same prompt or a longer one is run again.
    pub fn advance(
        &mut self,
        on: On<'_>,
        ids: &[u32],
        logits: &mut Vec<f32>,
        keep_going: &mut dyn FnMut() -> bool,
        on_chunk: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let keep = &mut |_, last: &[f32]| {
            // In the same memory for each token: so much is mapped and cleared anew by the system otherwise.
            logits.clear();
            logits.extend_from_slice(last);
            Ok(())
        };
        let (before, last) = ids.split_at(ids.len() - 1);
        if before.is_empty() || !self.sequence.needs_snapshots() {
            self.read(on, ids, before.len(), keep_going, keep, on_chunk)?;
        } else {
            self.read(on, before, before.len(), keep_going, keep, on_chunk)?;
            let turn = on.turn.take();
            self.sequence.snapshot(on.base)?;
            drop(turn);
            self.read(on, last, 0, keep_going, keep, &mut |done| on_chunk(before.len() + done))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Options, Precision};
    use super::*;
    use std::path::Path;

    fn tiny() -> Engine {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles/tiny-mistral");
        Engine::open(&dir, &Options::new().threads(1).precision(Precision::Exact)).unwrap()
    }

    /// The logits of all tokens, read piece by piece.
    fn logits(engine: &Engine, transcript: &mut Transcript, pieces: &[&[u32]]) -> Vec<f32> {
        let (set, mut all) = (engine.all(), Vec::new());
        for piece in pieces {
            let on_logits = &mut |_, row: &[f32]| {
                all.extend_from_slice(row);
                Ok(())
            };
            transcript.read(engine.on(&set.adapters), piece, 0, &mut || true, on_logits, &mut |_| Ok(())).unwrap();
        }
        all
    }

    #[test]
    fn what_is_read_in_pieces_is_as_if_read_at_once() {
        let engine = tiny();
        let new = || Transcript::new(engine.base(), engine.numbers()).unwrap();
        // Longer than the window.
        let ids: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % 90).collect();
        let whole = logits(&engine, &mut new(), &[&ids]);
        let mut pieces = new();
        let parts = logits(&engine, &mut pieces, &[&ids[..5], &ids[5..6], &ids[6..17], &ids[17..]]);
        let worst = whole.iter().zip(&parts).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(whole.len() == parts.len() && worst < 1e-4, "{worst}");

        // One that was stopped holds what it held before, and goes on.
        let (set, stopped) = (engine.all(), &mut |_: usize, _: &[f32]| Ok(()));
        let kept = pieces.keep(engine.base(), &ids[..17]);
        let mut asked = 0;
        let stop_at_the_second_layer = &mut || {
            asked += 1;
            asked < 2
        };
        let on = engine.on(&set.adapters);
        let error = pieces.read(on, &ids[kept..], 0, stop_at_the_second_layer, stopped, &mut |_| Ok(())).unwrap_err();
        assert_eq!((error.code(), asked, pieces.ids()), (crate::ErrorCode::Cancelled, 2, &ids[..kept]));
        let again = logits(&engine, &mut pieces, &[&ids[kept..]]);
        assert_eq!(again, parts[parts.len() - again.len()..]);
    }
}
