//! Records to samples: rendered, tokenized as one text, masked, and split where they are too long.

use super::record::Record;
use super::split::{self, Coded, Splits};
use super::{Limits, Sample, data_error};
use crate::chat::{ChatTemplate, Message, Rendering};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use serde_json::Value;
use std::ops::Range;

/// Turns records of one model's data into samples.
pub(super) struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    /// Longest sample, in tokens.
    limit: usize,
    vocab: usize,
    /// What the tokenizer puts before any text.
    prefix: Vec<u32>,
    pub splits: Splits,
}

impl<'a> Encoder<'a> {
    pub fn new(tokenizer: &'a Tokenizer, template: &'a ChatTemplate, limits: Limits) -> Result<Self> {
        let prefix = tokenizer.prefix_ids()?;
        let least = prefix.len() + 2;
        if limits.tokens < least {
            let expected = format!("at least {least} tokens, to learn one from another");
            return Err(Error::config("seq", expected, limits.tokens));
        }
        Ok(Self { tokenizer, template, limit: limits.tokens, vocab: limits.vocab, prefix, splits: Splits::default() })
    }

    /// Appends the samples of one record.
    pub fn encode(&mut self, record: Record, out: &mut Vec<Sample>) -> Result<()> {
        let before = out.len();
        self.samples(record, out)?;
        match out[before..].iter().flat_map(|s| &s.ids).find(|&&id| id as usize >= self.vocab) {
            None => Ok(()),
            Some(id) => {
                let message = format!(
                    "expected ids below the vocabulary's {}, got `{id}`; use the tokenizer of this model",
                    self.vocab
                );
                Err(data_error("tokens", message))
            }
        }
    }

    fn samples(&mut self, record: Record, out: &mut Vec<Sample>) -> Result<()> {
        match record {
            Record::Chat { messages, tools, from } => self.chat(&messages, tools.as_ref(), from, out),
            Record::Instruction { instruction, input, output } if self.template.is_own() => {
                let question = if input.is_empty() { instruction } else { format!("{instruction}\n\n{input}") };
                self.chat(&[Message::new("user", question), Message::new("assistant", output)], None, 0, out)
            }
            Record::Instruction { instruction, input, output } => {
                let prompt = alpaca_prompt(&instruction, &input);
                let start = prompt.len();
                self.text(&(prompt + &output), start, out)
            }
            Record::Text { text, start } => self.text(&text, start, out),
        }
    }

    fn chat(&mut self, messages: &[Message], tools: Option<&Value>, from: usize, out: &mut Vec<Sample>) -> Result<()> {
        if !messages[from..].iter().any(|m| m.role == "assistant") {
            let message =
                "expected a turn with role `assistant`, got none, so there is nothing to learn; add an answer";
            return Err(data_error("messages", message));
        }
        let parts = self.template.render_with_answers(messages, tools, from)?;
        let coded: Vec<Coded> = parts.iter().map(|r| self.code(r)).collect::<Result<_>>()?;
        if coded.iter().all(|c| c.learned() == 0) {
            return Err(nothing_learned());
        }
        for (part, coded) in parts.iter().zip(coded) {
            if coded.ids.len() <= self.limit {
                self.push(coded, out);
            } else {
                self.splits.samples += 1;
                let before = out.len();
                self.split_turns(&messages[..part.turns.end], tools, part.turns.start, out)?;
                self.splits.parts += out.len() - before;
            }
        }
        Ok(())
    }

    /// Splits a conversation between exchanges (what a user says and what follows up to the next user's turn). Each part
    /// begins with the system's turns and has as many exchanges as fit.
    fn split_turns(
        &mut self,
        messages: &[Message],
        tools: Option<&Value>,
        from: usize,
        out: &mut Vec<Sample>,
    ) -> Result<()> {
        let head = messages.iter().take_while(|m| matches!(m.role.as_str(), "system" | "developer")).count();
        let answered = messages.iter().rposition(|m| m.role == "assistant").map_or(0, |i| i + 1);
        self.splits.left_out_turns += messages.len() - answered;
        let mut borders = exchanges(&messages[..answered], head);
        borders.push(answered);
        let last = borders.len() - 1;
        let part = |range: Range<usize>| {
            let turns = borders[range.start]..borders[range.end];
            let learned = if from > turns.start { head + from - turns.start } else { 0 };
            ([&messages[..head], &messages[turns]].concat(), learned)
        };
        let mut start = borders[..last].partition_point(|&b| b <= from).saturating_sub(1);
        while start < last {
            let (mut end, mut begin, mut best) = (start, start, None);
            while end < last {
                let (turns, learned) = part(start..end + 1);
                let coded = self.coded(&turns, tools, learned)?;
                if !self.fits(&coded) {
                    break;
                }
                (best, end) = (Some(coded), end + 1);
            }
            // Where only later turns are learned, as many of the earlier ones as fit are read before them.
            while best.is_some() && begin > 0 && from > borders[begin - 1] {
                let (turns, learned) = part(begin - 1..end);
                let coded = self.coded(&turns, tools, learned)?;
                if !self.fits(&coded) {
                    self.splits.left_out_turns += borders[begin] - borders[0];
                    break;
                }
                (best, begin) = (Some(coded), begin - 1);
            }
            let coded = match best {
                Some(coded) => coded,
                None => {
                    let (turns, learned) = part(start..start + 1);
                    end = start + 1;
                    self.one_exchange(&turns, head, tools, learned)?
                }
            };
            for coded in coded {
                self.push_windows(coded, out);
            }
            start = end;
        }
        Ok(())
    }

    /// An exchange that does not fit behind the system's turns: without them if that helps, else as it is.
    fn one_exchange(
        &mut self,
        turns: &[Message],
        head: usize,
        tools: Option<&Value>,
        learned: usize,
    ) -> Result<Vec<Coded>> {
        if head > 0 || tools.is_some() {
            let bare = self.coded(&turns[head..], None, learned.saturating_sub(head))?;
            if self.fits(&bare) {
                self.splits.without_system += 1;
                return Ok(bare);
            }
        }
        self.coded(turns, tools, learned)
    }

    fn coded(&self, messages: &[Message], tools: Option<&Value>, from: usize) -> Result<Vec<Coded>> {
        self.template.render_with_answers(messages, tools, from)?.iter().map(|r| self.code(r)).collect()
    }

    fn fits(&self, coded: &[Coded]) -> bool {
        coded.iter().all(|c| c.ids.len() <= self.limit)
    }

    /// Tokens of a rendered conversation. Answers are learned up to and including the token that ends them.
    fn code(&self, rendering: &Rendering) -> Result<Coded> {
        let tokens = self.tokenizer.encode_with_offsets(&rendering.text)?;
        let mut coded = Coded::new(&tokens, &rendering.answers);
        if rendering.marked {
            return Ok(coded);
        }
        // What a template prints after the end of a turn is its own, not the model's.
        for answer in &rendering.answers {
            let inside = |i: &usize| answer.contains(&tokens[*i].1.start) && tokens[*i].1.end <= answer.end;
            let first = tokens.partition_point(|t| t.1.start < answer.start);
            let mut ended = false;
            for i in (first..tokens.len()).take_while(|&i| tokens[i].1.start < answer.end).filter(inside) {
                coded.trained[i] &= !ended;
                ended |= self.tokenizer.stop.contains(&tokens[i].0);
            }
        }
        Ok(coded)
    }

    /// Plain text, learned from byte `start` on, closed by the end-of-text token.
    fn text(&mut self, text: &str, start: usize, out: &mut Vec<Sample>) -> Result<()> {
        if start == 0 && text.len() > split::PIECE {
            return self.long_text(text, out);
        }
        let mut tokens = self.tokenizer.encode_with_offsets(text)?;
        tokens.splice(0..0, self.prefix.iter().map(|&id| (id, 0..0)));
        if let Some(eos) = self.tokenizer.eos() {
            tokens.push((eos, text.len()..text.len() + 1));
        }
        if start == 0 && tokens.len() > self.limit {
            return self.long_text(text, out);
        }
        let learned = start..text.len() + 1;
        let coded = Coded::new(&tokens, std::slice::from_ref(&learned));
        if coded.learned() == 0 || start == text.len() && start > 0 {
            return Err(nothing_learned());
        }
        let before = out.len();
        if coded.ids.len() > self.limit {
            self.splits.samples += 1;
            self.push_windows(coded, out);
            self.splits.parts += out.len() - before;
        } else {
            self.push(coded, out);
        }
        Ok(())
    }

    /// A text of many windows. Each begins with what the tokenizer puts before a text or, where that is nothing, with
    /// the last token of the window before it, so that every token but the text's first is learned once.
    fn long_text(&mut self, text: &str, out: &mut Vec<Sample>) -> Result<()> {
        let (before, room) = (out.len(), self.limit - self.prefix.len().max(1));
        let mut context = self.prefix.clone();
        let mut pieces = split::pieces(text).peekable();
        while let Some(piece) = pieces.next() {
            let mut tokens = self.tokenizer.encode_with_offsets(piece)?;
            if let (None, Some(eos)) = (pieces.peek(), self.tokenizer.eos()) {
                tokens.push((eos, piece.len()..piece.len() + 1));
            }
            for window in split::text_windows(piece, &tokens, room) {
                let given = context.len().max(1);
                let ids: Vec<u32> = context.iter().copied().chain(tokens[window].iter().map(|t| t.0)).collect();
                if self.prefix.is_empty() {
                    context = ids.last().copied().into_iter().collect();
                }
                let trained = (0..ids.len()).map(|i| i >= given).collect();
                self.push(Coded { ids, trained }, out);
            }
        }
        self.splits.samples += 1;
        self.splits.parts += out.len() - before;
        Ok(())
    }

    fn push_windows(&mut self, coded: Coded, out: &mut Vec<Sample>) {
        if coded.ids.len() <= self.limit {
            return self.push(coded, out);
        }
        let starts_with_prefix = !self.prefix.is_empty() && coded.ids.starts_with(&self.prefix);
        let keep = if starts_with_prefix { self.prefix.len() } else { 0 };
        let (windows, left_out) = split::masked_windows(&coded, self.limit, keep);
        self.splits.left_out_tokens += left_out;
        for window in windows {
            self.push(window, out);
        }
    }

    /// Keeps what has something to learn.
    fn push(&mut self, coded: Coded, out: &mut Vec<Sample>) {
        if coded.learned() > 0 {
            let mut ids = coded.ids;
            ids.shrink_to_fit();
            out.push(Sample { ids, trained: coded.trained.into_iter().collect() });
        }
    }
}

/// Where exchanges begin: at the first turn after the system's, and at each user's turn after an answer.
fn exchanges(messages: &[Message], head: usize) -> Vec<usize> {
    let mut starts = vec![head];
    let mut answered = false;
    for (i, message) in messages.iter().enumerate().skip(head) {
        if message.role == "user" && answered {
            starts.push(i);
            answered = false;
        }
        answered |= message.role == "assistant";
    }
    starts
}

/// The layout of the Stanford Alpaca data, which models without a chat template are usually taught with.
fn alpaca_prompt(instruction: &str, input: &str) -> String {
    if input.is_empty() {
        return format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the \
             request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        );
    }
    format!(
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
         response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### \
         Input:\n{input}\n\n### Response:\n"
    )
}

fn nothing_learned() -> Error {
    data_error("sample", "expected at least one token to learn, got none; give it an answer")
}
