//! The likeliest answers to several prompts at once: each pass over the weights serves all of them.

use super::sampler::{argmax, check_finite};
use crate::adapter::Adapters;
use crate::base::Base;
use crate::error::Result;
use crate::exec::infer::{Logits, Numbers, PREFILL_CHUNK, Sequence, Step, Workspace};
use pocketlora_kernels::Backend;

/// How prompts are answered.
pub(crate) struct Greedy<'a, B: Backend> {
    pub base: &'a Base<B>,
    pub adapters: &'a Adapters<B>,
    pub numbers: Numbers,
    /// Most tokens of an answer, at least one.
    pub max_tokens: usize,
    /// Tokens that end one.
    pub stop: &'a [u32],
}

/// An answer that is being given.
struct Text<B: Backend> {
    sequence: Sequence<B>,
    answer: Vec<u32>,
}

impl<B: Backend> Greedy<'_, B> {
    /// The answers to `prompts`, which have a token each at least, and what they hold of each token: the one that ended an
    /// answer is its last. `each` hears, for every token of an answer, the prompt's number and the logits that it was chosen
    /// by. `keep_going` is asked between layers.
    ///
    /// # Errors
    /// An id outside the vocabulary, logits that are not numbers, out of memory, stopped, and those of `each`.
    pub fn answers(
        &self,
        prompts: &[Vec<u32>],
        keep_going: &mut dyn FnMut() -> bool,
        each: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<Vec<Vec<u32>>> {
        let mut work = Workspace::new(self.numbers.arithmetic);
        let mut texts = Vec::with_capacity(prompts.len());
        for (i, prompt) in prompts.iter().enumerate() {
            let mut text = Text { sequence: Sequence::new(self.base, self.numbers.cache)?, answer: Vec::new() };
            for (at, ids) in (0..).step_by(PREFILL_CHUNK).zip(prompt.chunks(PREFILL_CHUNK)) {
                // Only the prompt's last token has a successor to choose.
                let last = if at + ids.len() == prompt.len() { ids.len() - 1..ids.len() } else { 0..0 };
                let Text { sequence, answer } = &mut text;
                let mut step = [Step { sequence, ids, adapters: self.adapters, logits: last }];
                self.base.forward(&mut work, &mut step, keep_going, &mut |logits| {
                    choose(logits, &mut [(i, &mut *answer)], each)
                })?;
            }
            texts.push(text);
        }
        loop {
            let (mut steps, mut answers) = (Vec::new(), Vec::new());
            let last: Vec<u32> = texts.iter().map(|text| text.answer.last().copied().unwrap_or_default()).collect();
            for (i, (Text { sequence, answer }, last)) in texts.iter_mut().zip(&last).enumerate() {
                if answer.len() < self.max_tokens && !self.stop.contains(last) {
                    let ids = std::slice::from_ref(last);
                    steps.push(Step { sequence, ids, adapters: self.adapters, logits: 0..1 });
                    answers.push((i, answer));
                }
            }
            if steps.is_empty() {
                break;
            }
            let on_logits = &mut |logits: &Logits| choose(logits, &mut answers, each);
            self.base.forward(&mut work, &mut steps, keep_going, on_logits)?;
        }
        Ok(texts.into_iter().map(|text| text.answer).collect())
    }
}

/// Adds the likeliest token to the answers whose logits these are. `answers` has the number of each step's prompt.
fn choose(
    logits: &Logits,
    answers: &mut [(usize, &mut Vec<u32>)],
    each: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
) -> Result<()> {
    let rows = logits.values.chunks_exact(logits.values.len() / logits.places.len().max(1));
    for (&(step, _), row) in logits.places.iter().zip(rows) {
        check_finite(row)?;
        let (prompt, answer) = &mut answers[step];
        each(*prompt, row)?;
        answer.push(argmax(row)? as u32);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Engine;
    use crate::engine::{Options, Precision};
    use std::path::Path;

    /// The model's `eos_token_id`.
    const END: u32 = 2;

    #[test]
    fn answers_are_those_of_a_chat_whoever_answers_beside_them() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles/tiny-mistral");
        let engine = Engine::open(&dir, &Options::new().threads(1).precision(Precision::Exact)).unwrap();
        let prompts: Vec<Vec<u32>> = (0..5).map(|i| (0..3 + 7 * i).map(|t| (t * 37 + i * 11) % 90).collect()).collect();
        let alone = |prompt: &Vec<u32>| {
            let mut chat = engine.chat().unwrap();
            chat.max_tokens = 9;
            let mut decoder = chat.decoder(prompt.clone()).unwrap();
            let mut ids = Vec::new();
            while let Some(id) = decoder.next_token().unwrap() {
                ids.push(id);
            }
            ids
        };
        let expected: Vec<Vec<u32>> = prompts.iter().map(alone).collect();
        let (set, mut heard) = (engine.all(), vec![0; prompts.len()]);
        let answers = |stop: &[u32], heard: &mut Vec<usize>| {
            let (base, numbers, adapters) = (engine.base(), engine.numbers(), &set.adapters);
            let greedy = Greedy { base, adapters, numbers, max_tokens: 9, stop };
            greedy
                .answers(&prompts, &mut || true, &mut |i, _| {
                    heard[i] += 1;
                    Ok(())
                })
                .unwrap()
        };
        // A chat leaves out the token that ended an answer.
        let whole = answers(&[END], &mut heard);
        let said = |ids: &Vec<u32>| ids.iter().copied().filter(|id| *id != END).collect::<Vec<u32>>();
        assert_eq!(whole.iter().map(said).collect::<Vec<_>>(), expected);
        assert_eq!(heard, whole.iter().map(Vec::len).collect::<Vec<_>>());
        // One that is over holds what ended it, and the others go on.
        let stop = whole[0][3];
        for (stopped, whole) in answers(&[END, stop], &mut heard).iter().zip(&whole) {
            let until = whole.iter().position(|id| *id == stop).map_or(whole.len(), |at| at + 1);
            assert_eq!(stopped[..], whole[..until]);
        }
    }
}
