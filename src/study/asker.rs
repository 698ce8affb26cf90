//! The base model as the one who asks: questions about a sentence that certain words of it answer, and a summary of a note.
//!
//! A question is kept if it is about what the sentence says (its words stand there), if no other sentence fits it better, if
//! it makes its own answer likelier than other parts of the sentence, and if the passage makes that answer clearly likelier
//! than the model finds it without.

use super::kept::{Item, Source};
use super::notes::Note;
use super::unit::{Rarity, Unit};
use super::{notes, templates, words};
use crate::chat::Message;
use crate::engine::{Chat, Engine};
use crate::error::Result;
use crate::eval::Likelihood;
use crate::generate::Sampling;
use std::ops::ControlFlow;

/// How it is done, with invented notes; the model goes on in the same way.
const EXAMPLES: &str = "\
Note: Weekend with the canoe club
Text: We left the boathouse at six because the lake was calm then. Olaf brought two spare paddles.
Answer: Olaf
Question: Who brought the spare paddles?

Note: Weekend with the canoe club
Text: We left the boathouse at six because the lake was calm then.
Answer: because the lake was calm then
Question: Why did we leave the boathouse at six?

Note: Washing machine
Text: A red drop on the display means that the hose is blocked.
Answer: that the hose is blocked
Question: What does a red drop on the display mean?

Note: Choir practice
Text: The choir rents the school hall for 25 dollars an evening.
Answer: 25 dollars an evening
Question: How much does the choir pay for the school hall?

";
/// Questions that are asked for, for each sentence, and the longest one, in tokens.
const SPANS: usize = 4;
const QUESTION_TOKENS: usize = 32;
const SUMMARY_TOKENS: usize = 80;
/// What a chat template may add.
const TEMPLATE_TOKENS: usize = 256;
/// Nats a token by which the passage must make an answer likelier.
const GAIN: f64 = 0.3;
/// Nats a token by which the question must make its answer likelier than one that asks for nothing.
const TELLS: f64 = 0.4;
const NOTHING: &str = "What does the note say?";
/// Share of a summary's words that must stand in the note.
const GROUNDED: f64 = 0.8;
/// Longest note that is summarized, in bytes.
const SUMMARIZED: usize = 6000;

/// A model that asks.
pub struct Asker<'a> {
    engine: &'a Engine,
    chat: Chat,
    /// Of answers without the passage, and with it: what is read of it stays.
    likelihood: [Likelihood<'a>; 2],
    rarity: &'a Rarity,
    /// Words of all sentences, by their numbers.
    all: &'a [Vec<String>],
}

impl<'a> Asker<'a> {
    pub fn new(
        engine: &'a Engine,
        likelihood: [Likelihood<'a>; 2],
        rarity: &'a Rarity,
        all: &'a [Vec<String>],
    ) -> Result<Self> {
        let mut chat = engine.chat()?;
        chat.sampling = Sampling { temperature: 0.0, ..Sampling::default() };
        chat.use_adapters(&[])?;
        Ok(Self { engine, chat, likelihood, rarity, all })
    }

    /// What the model asks about `unit` and passes; `keep_going` may end it early.
    pub fn ask(&mut self, unit: &Unit<'_>, keep_going: &mut dyn FnMut() -> bool) -> Result<Vec<Item>> {
        let text = unit.answer();
        let keys = self.keys(unit);
        let (mut out, mut plain): (Vec<Item>, Vec<f64>) = (Vec::new(), Vec::new());
        for (i, key) in keys.iter().enumerate() {
            if !keep_going() {
                break;
            }
            let prompt = format!("{EXAMPLES}Note: {}\nText: {text}\nAnswer: {key}\nQuestion:", unit.note.title);
            let Some(question) = self.line(&prompt, QUESTION_TOKENS)? else { continue };
            if out.iter().any(|item| item.question == question) || !self.fits(&question, key, unit) {
                continue;
            }
            if plain.is_empty() {
                plain = keys.iter().map(|key| self.likely(Some(&text), NOTHING, key)).collect::<Result<_>>()?;
            }
            let told = keys.iter().map(|key| self.likely(Some(&text), &question, key)).collect::<Result<Vec<_>>>()?;
            let more = |j: usize| told[j] - plain[j];
            if more(i) < TELLS || (0..keys.len()).any(|j| more(j) > more(i)) {
                continue;
            }
            let gain = told[i] - self.likely(None, &question, key)?;
            if gain >= GAIN {
                let score = Some((gain * 100.0).round() / 100.0);
                out.push(Item { key: Some(key.clone()), score, ..Item::new(unit, question, Source::Model) });
            }
        }
        Ok(out)
    }

    /// Words of the sentence to be asked for: its parts, then what it names.
    fn keys(&self, unit: &Unit<'_>) -> Vec<String> {
        let rarity = |word: &str| self.rarity.of(word);
        let asked = templates::questions(unit, &rarity).into_iter().filter_map(|ask| ask.key);
        let mut keys: Vec<String> = Vec::new();
        for key in asked.chain(templates::phrases(unit, &rarity)) {
            let within = |other: &String| other.contains(&key) || key.contains(other.as_str());
            if !keys.iter().any(within) && unit.text.to_lowercase().contains(&key.to_lowercase()) {
                keys.push(key);
            }
        }
        keys.truncate(SPANS);
        keys
    }

    /// The first line that the model writes after `prompt`, if it is a question.
    fn line(&mut self, prompt: &str, tokens: usize) -> Result<Option<String>> {
        self.chat.max_tokens = tokens;
        if !self.has_room(prompt, tokens)? {
            return Ok(None);
        }
        let answer = self.chat.complete(prompt, &mut |piece: &str| {
            if piece.contains('\n') || piece.contains('?') { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        let line = answer.text.trim_start().lines().next().unwrap_or_default();
        let question = line.split_inclusive('?').next().unwrap_or_default().trim();
        let words = question.split_whitespace().count();
        Ok((question.ends_with('?') && (3..=30).contains(&words)).then(|| question.to_owned()))
    }

    /// Whether the model's context takes `text` and `tokens` more.
    fn has_room(&self, text: &str, tokens: usize) -> Result<bool> {
        let ids = self.likelihood[0].text().tokenizer.encode(text, true)?;
        Ok(ids.len() + tokens + TEMPLATE_TOKENS <= self.engine.context_tokens())
    }

    /// Whether the question is about the sentence, does not answer itself, and fits no other sentence better.
    fn fits(&self, question: &str, key: &str, unit: &Unit<'_>) -> bool {
        let (asked, key) = (words::content_words(question), words::content_words(key));
        let mut known = words::content_words(&unit.answer());
        known.extend(words::content_words(&unit.note.title));
        let strange = asked.iter().filter(|word| !known.contains(word)).count();
        let leaks = !key.is_empty() && key.iter().all(|word| asked.contains(word));
        let fit = |unit: &Vec<String>| self.rarity.fit(&asked, unit);
        let own = fit(&known);
        let best = self.all.iter().map(fit).fold(0.0, f64::max);
        asked.len() > strange && 2 * strange <= asked.len().max(2) && !leaks && own > 0.0 && own >= best
    }

    /// Log-likelihood of `key` as the answer to `question`, with the passage `text` before it or without; nats a token.
    fn likely(&mut self, text: Option<&str>, question: &str, key: &str) -> Result<f64> {
        let likelihood = &mut self.likelihood[usize::from(text.is_some())];
        let before = text.map(|text| format!("Text: {text}\n")).unwrap_or_default();
        let given = format!("{before}Question: {question}\nAnswer:");
        let whole = format!("{given} {key}");
        let tokenizer = &likelihood.text().tokenizer;
        let (plain, tokens) = (tokenizer.plain_in(&whole), tokenizer.encode(key, false)?.len().max(1));
        Ok(likelihood.of(&whole, &plain, given.len(), false)? / tokens as f64)
    }

    /// A summary of `note`, if the model writes one whose words stand in it.
    pub fn summary(&mut self, note: &Note) -> Result<Option<Item>> {
        let sentences: usize = note.passages.iter().map(|passage| passage.sentences.len()).sum();
        if sentences < 4 || note.text.len() > SUMMARIZED || !self.has_room(&note.text, SUMMARY_TOKENS)? {
            return Ok(None);
        }
        self.chat.max_tokens = SUMMARY_TOKENS;
        let asked = format!("Summarize this note in two short sentences.\n\n{}", note.text);
        let answer = self.chat.reply(&[Message::new("user", asked)], &mut |_: &str| ControlFlow::Continue(()))?;
        // A sentence that was cut is none of a summary; nor is one that puts words of several passages together.
        let whole = answer.text.rfind(['.', '!']).map_or("", |at| &answer.text[..=at]);
        let parts: Vec<Vec<String>> = note.passages.iter().map(|p| words::content_words(&p.text())).collect();
        let share = |sentence: &str| {
            let said = words::content_words(sentence);
            let known = |part: &Vec<String>| said.iter().filter(|word| part.contains(word)).count();
            parts.iter().map(known).max().unwrap_or(0) as f64 / said.len().max(3) as f64
        };
        let mut kept: Vec<String> = Vec::new();
        for sentence in notes::sentences(whole) {
            if share(&sentence) >= GROUNDED && !kept.contains(&sentence) {
                kept.push(sentence);
            }
        }
        let score = kept.iter().map(|sentence| share(sentence)).fold(1.0, f64::min);
        let whole = kept.join(" ");
        let fits = kept.len() >= 2 && 2 * whole.len() < note.text.len();
        Ok(fits.then(|| Item {
            note: Some(note.name.clone()),
            question: format!("Summarize my note \"{}\".", note.title),
            answer: whole,
            source: Source::Model,
            score: Some((score * 100.0).round() / 100.0),
            ..Item::default()
        }))
    }
}
